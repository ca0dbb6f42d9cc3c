/* tests/support/job_ranks.h - ranks of a job as forked processes of a test.  They need Criterion. */
#ifndef PHX__JOB_RANKS_H
#define PHX__JOB_RANKS_H
#include <phalanx/job.h>
#include <stdio.h>
#include <unistd.h>

/* In a rank: Criterion's assertions belong to the test's own process. */
#define NEED(x)                                                                              \
  do {                                                                                       \
    if (!(x)) {                                                                              \
      fprintf(stderr, "%s:%d: rank of pid %d: %s\n", __FILE__, __LINE__, (int)getpid(), #x); \
      _exit(99);                                                                             \
    }                                                                                        \
  } while (0)

/* Runs body in `size` processes that share a segment; every one must return 0. */
typedef int (*job_rank_body)(int rank, int size);
void job_ranks_run(int size, job_rank_body body);
/* In a rank: its job, which must open; our launcher's variables given, or taken away; a variable set to a number. */
const phx_job *job_ranks_open(double timeout);
void job_ranks_be(int rank, int size, int fd); /* as our launcher says it */
void job_ranks_forget(void);
void job_ranks_set(const char *name, long value);
#endif
