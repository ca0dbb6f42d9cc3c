/* core/plugin/where.h - which plugin's call a rank is in: set around every call, read when the rank is gone. */
#ifndef PHX__WHERE_H
#define PHX__WHERE_H
#include <phalanx/job.h>
#include <phalanx/plugin.h>
#include <stdbool.h>

/* [main] Told before a plugin's call begins (kind PHX_KIND_*) and when it has ended (0); NULL: nobody listens. */
extern void (*phx__where_watch)(int32_t kind);

/* [main] */
static inline void phx__enter(const phx_job *job, int32_t kind, int32_t call, int32_t stage) {
  __atomic_store_n(&job->mine->in_plugin, kind, __ATOMIC_RELAXED);
  __atomic_store_n(&job->mine->in_stage, stage, __ATOMIC_RELAXED);
  __atomic_store_n(&job->mine->in_call, call, __ATOMIC_RELAXED);
  if (phx__where_watch) phx__where_watch(kind);
}
/* [main] A call that failed stays, for the report. */
static inline phx_status phx__leave(const phx_job *job, phx_status status) {
  if (phx__where_watch) phx__where_watch(0);
  if (status == PHX_OK) __atomic_store_n(&job->mine->in_call, PHX_IN_CORE, __ATOMIC_RELAXED);
  return status;
}
/* The status of `call`, which is made between the two. */
#define PHX__IN(job, kind, what, stage, call) (phx__enter(job, kind, what, stage), phx__leave(job, call))
#define PHX__IN_STRATEGY(job, what, stage, call) PHX__IN(job, PHX_KIND_STRATEGY, what, stage, call)
#define PHX__IN_COMM(job, call) PHX__IN(job, PHX_KIND_COMM, PHX_IN_COLLECTIVE, -1, call)

/* A failure without a text gets one: the call that failed, and its status. */
void phx__where_reason(const phx_job *job, phx_status status, phx_error *err);
/* [any] "strategy fsdp: acquire, stage 3"; false and "" when the rank is in none.  Safe in a signal handler. */
bool phx__where_text(const phx_liveness *page, char *out, size_t bytes);
#endif
