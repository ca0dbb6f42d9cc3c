/* core/base/job_calls.c - see job_calls.h. */
#include "base/job_calls.h"

#include <phalanx/error.h>
#include <stdbool.h>

#include "base/clock.h"

void phx__job_heartbeat(const phx_job *job) {
  __atomic_store_n(&job->mine->heartbeat_ns, phx__now_ns(), __ATOMIC_RELAXED);
}

void phx__job_state(const phx_job *job, int32_t state, int64_t step) {
  int32_t old = __atomic_load_n(&job->mine->state, __ATOMIC_ACQUIRE);
  __atomic_store_n(&job->mine->step, step, __ATOMIC_RELAXED);
  /* A failure stays: fail() may come from another thread at this very moment. */
  while (old != PHX_RANK_FAILED &&
         !__atomic_compare_exchange_n(&job->mine->state, &old, state, false, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE)) {
  }
  phx__job_heartbeat(job);
}

phx_status phx__job_max(const phx_job *job, int64_t value, int64_t *out, phx_error *err) {
  int64_t all[PHX_RANKS_MAX];
  PHX_TRY(job->exchange(job->ctx, "largest", &value, sizeof value, all, err));
  int64_t largest = all[0];
  for (int32_t r = 1; r < job->size; r++)
    if (all[r] > largest) largest = all[r];
  *out = largest;
  return PHX_OK;
}
