/* tests/support/cuda_runs.h - whole runs on the cuda device, through the command: the same checks on the emulation
 * (test_cuda_runs.c) and on a GPU (gpu/test_gpu_runs.c).  They need Criterion. */
#ifndef PHX__CUDA_RUNS_H
#define PHX__CUDA_RUNS_H

typedef struct cuda_where {
  const char *plugins;  /* plugins.path: where the cuda device is looked for first; NULL: beside the command */
  const char *comm;     /* "comm.plugin=..." */
  int steps;            /* few where the device is slow */
  const char *model[4]; /* "section.key=value" for every run, where the model has to be another; NULL behind the last */
  const char *const *strategies; /* of `compare`, a NULL behind the last */
} cuda_where;

/* Why the cuda device does not run here, as `phalanx plugins` says it; NULL: it does.  Freed by the caller. */
char *cuda_runs_reason(const cuda_where *where);
/* deterministic = yes: every strategy gives the same bits, plans are kept; the loss is near the cpu's.  compute: fp32
 * or bf16; near: bound on the difference of the losses, in nats. */
void cuda_runs_compare(const cuda_where *where, const char *ranks, const char *compute, double near);
/* A checkpoint of cuda goes on on the cpu and the other way; its state hash is the same on both. */
void cuda_runs_checkpoints(const cuda_where *where);
/* [cuda] profile = yes: says the milliseconds of every kind of operation that a step has. */
void cuda_runs_profile(const cuda_where *where);
#endif
