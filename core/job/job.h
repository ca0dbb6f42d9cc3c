/* core/job/job.h - this process's place in the job, and the job's shared memory.
 *
 * phx__job_open: in a rank started by the launcher (PHALANX_RANK and friends, an inherited memfd), in one of
 * torchrun's, mpirun's or srun's, on one machine or several, else a job of one rank with memory of its own.  The
 * launcher side is in launcher.h. */
#ifndef PHX__JOB_H
#define PHX__JOB_H
#include <phalanx/job.h>
#include <stdbool.h>

/* [main] once per process; stays until the process ends. */
phx_status phx__job_open(double timeout_s, const phx_job **out, phx_error *err);
/* [main] from here on a thread watches this rank and the others; see job_watch.c. */
phx_status phx__job_watch(const phx_job *job, phx_error *err);
/* [main] this rank failed and ends by itself with this exit status, as soon as it has cleaned up. */
void phx__job_ends(const phx_job *job, int exit_status);
/* [main] when all is over for this rank, well or not: ranks on several machines part, so that no one's end is taken for
 * a failure, and each knows of the first one.  Nothing is exchanged after it. */
void phx__job_leave(const phx_job *job);
/* [main][collective] every rank arrives within the timeout, and all gave the same value, else an error that names a
 * rank that differs and says `what`.  Before any allocation: the hash of the configuration goes through it. */
phx_status phx__job_agree(const phx_job *job, uint64_t value, const char *what, phx_error *err);
#endif
