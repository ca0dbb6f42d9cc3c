/* core/engine/handed.h - what a plugin hands over is looked at before it is used: sizes, numbers, pointers.  [main]
 *
 * These checks cost nothing beside what the values are used for, so they are always made.  Where [run] checked is on,
 * pointers must also be aligned as coordinates promise, and lie in memory of the host's as a whole or not at all. */
#ifndef PHX__HANDED_H
#define PHX__HANDED_H
#include "engine/runtime.h"

/* A stage's view, as acquire gave it for a pass. */
phx_status phx__handed_view(const phx__runtime *rt, uint32_t stage, int32_t pass, const phx_view *view,
                            phx_error *err);
/* A slice that visit_state names, and the memory that map gave for it. */
phx_status phx__handed_slice(const phx__runtime *rt, const phx_slice *slice, phx_error *err);
phx_status phx__handed_map(const phx__runtime *rt, const phx_slice *slice, const void *p, phx_error *err);
/* Blocks of gradients for the norm. */
phx_status phx__handed_gradient(const phx__runtime *rt, uint32_t unit, int64_t first_block, int64_t blocks,
                                const float *gradient, phx_error *err);
/* A ticket, in update. */
phx_status phx__handed_ticket(const phx__runtime *rt, const phx_ticket *ticket, float scale, phx_error *err);
/* What a plugin's create gave back with PHX_OK. */
phx_status phx__handed_device(const phx_device *device, const phx_ops *ops, const phx_plugin *plugin, phx_error *err);
phx_status phx__handed_comm(const phx_comm *comm, const phx_job *job, const phx_plugin *plugin, phx_error *err);
phx_status phx__handed_self(const void *self, const char *kind, const phx_plugin *plugin, phx_error *err);
#endif
