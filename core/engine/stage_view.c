/* core/engine/stage_view.c - see stage_view.h. */
#include "engine/stage_view.h"

#include "base/job_calls.h"
#include "engine/handed.h"
#include "plugin/where.h"

phx_status phx__stage_acquire(const phx__runtime *rt, uint32_t stage, int32_t pass, int32_t micro_batch,
                              const phx_view **view, phx_error *err) {
  const phx_status status =
      PHX__IN_STRATEGY(rt->job, PHX_IN_ACQUIRE, (int32_t)stage,
                       rt->prepared->strategy->acquire(rt->strategy, stage, pass, micro_batch, NULL, view, err));
  phx__job_heartbeat(rt->job);
  return status ? status : phx__handed_view(rt, stage, pass, *view, err);
}

phx_status phx__stage_ready(const phx__runtime *rt, const phx_view *view, phx_error *err) {
  return view->ready ? rt->device->stream_wait(rt->device->ctx, NULL, view->ready, err) : PHX_OK;
}

phx_status phx__stage_release(const phx__runtime *rt, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                              phx_error *err) {
  return PHX__IN_STRATEGY(rt->job, PHX_IN_RELEASE, (int32_t)stage,
                          rt->prepared->strategy->release(rt->strategy, stage, pass, micro_batch, flags, NULL, err));
}
