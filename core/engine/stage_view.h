/* core/engine/stage_view.h - a stage's weights and gradients, borrowed from the strategy.  [main] */
#ifndef PHX__STAGE_VIEW_H
#define PHX__STAGE_VIEW_H
#include "engine/runtime.h"

/* [collective] *view is looked at (handed.h) and lives until release; pass: PHX_PASS_*. */
phx_status phx__stage_acquire(const phx__runtime *rt, uint32_t stage, int32_t pass, int32_t micro_batch,
                              const phx_view **view, phx_error *err);
/* The compute stream waits until the view can be read. */
phx_status phx__stage_ready(const phx__runtime *rt, const phx_view *view, phx_error *err);
/* [collective] flags: PHX_RELEASE_* */
phx_status phx__stage_release(const phx__runtime *rt, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                              phx_error *err);
#endif
