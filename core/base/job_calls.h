/* core/base/job_calls.h - what a rank does with a job that it was given, whoever made it. */
#ifndef PHX__JOB_CALLS_H
#define PHX__JOB_CALLS_H
#include <phalanx/job.h>

/* [main] state: PHX_RANK_*, of this rank's liveness page; a failure stays. */
void phx__job_state(const phx_job *job, int32_t state, int64_t step);
void phx__job_heartbeat(const phx_job *job); /* [main] */
/* [main][collective] the largest of all ranks' values. */
phx_status phx__job_max(const phx_job *job, int64_t value, int64_t *out, phx_error *err);
#endif
