/* phalanx/job.h - ranks that find each other: shared memory, deadlines, the flight record.  Provisional (providers).
 *
 * "phx.job/1" is what a communicator is built from.  The launcher made one memory object for the job; every rank maps
 * it, and nothing of it has a name in the file system.  Ranks on several machines (local_size < size) have no such
 * memory: they exchange over TCP, `failed` is this process's word for all of them, and share() is refused. */
#ifndef PHALANX_JOB_H
#define PHALANX_JOB_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_EXT_JOB "phx.job/1"
#define PHX_RANKS_MAX 64
#define PHX_FLIGHT_RING 64
#define PHX_EXCHANGE_MAX 4096

/* One collective in the flight record; fields are written with relaxed atomics (__atomic), `sequence` last, released.
 */
typedef struct phx_flight {
  uint64_t sequence; /* from 1, per communicator; 0: empty */
  uint64_t comm;     /* id of the communicator, equal on its ranks */
  int64_t bytes;     /* of this rank's buffer */
  int64_t begin_ns, end_ns; /* CLOCK_MONOTONIC; end 0: still in it */
  int32_t op, unit;  /* PHX_OP_*, unit or -1 */
} phx_flight;

/* The plugin's call that [main] is in. */
enum {
  PHX_IN_CORE = 0,   /* none */
  PHX_IN_CREATE = 1,
  PHX_IN_STATE = 2, /* visit_state, map, unmap, state_changed */
  PHX_IN_BEGIN = 3, /* begin_micro_batch */
  PHX_IN_ACQUIRE = 4,
  PHX_IN_RELEASE = 5,
  PHX_IN_FINISH = 6, /* finish_gradients, discard_gradients */
  PHX_IN_NORM = 7,
  PHX_IN_UPDATE = 8,
  PHX_IN_RUN_STEP = 9,
  PHX_IN_FORWARD = 10,
  PHX_IN_BACKWARD = 11,
  PHX_IN_COLLECTIVE = 12, /* one of the core's own */
  PHX_IN_DESTROY = 13,
  PHX_IN_PREPARE = 14, /* prepare_state */
  PHX_IN_RESTORED = 15 /* state_restored */
};

/* How far a rank has come; what has failed stays so. */
enum {
  PHX_RANK_ABSENT = 0, /* it has not come yet */
  PHX_RANK_JOINED = 1,
  PHX_RANK_RUNNING = 2, /* in a step */
  PHX_RANK_DONE = 3,
  PHX_RANK_FAILED = 4
};

/* A rank's page in the job's memory: written by that rank only, read by all and by the launcher. */
typedef struct phx_liveness {
  uint64_t heartbeat_ns; /* CLOCK_MONOTONIC, stamped at every collective and every stage */
  uint64_t start_ns;
  int64_t step;
  int32_t pid;
  int32_t state;         /* PHX_RANK_* */
  uint64_t n_flights;    /* collectives begun so far; the record of number k is ring[k % PHX_FLIGHT_RING] */
  phx_flight ring[PHX_FLIGHT_RING];
  char message[512];     /* what failed, with PHX_RANK_FAILED */
  /* Where a crash happened: written around every call of a plugin, relaxed atomics; a call that failed stays. */
  int32_t in_call;       /* PHX_IN_* */
  int32_t in_plugin;     /* PHX_KIND_* */
  int32_t in_stage;      /* the stage it is for, or -1 */
  int32_t reserved0;
  char plugins[8][32];   /* ids by PHX_KIND_*, once the plugins are chosen */
} phx_liveness;

typedef struct phx_job {
  size_t struct_size;
  void *ctx;
  int32_t rank, size, local_rank, local_size;
  double timeout_s;            /* a rank may be missing from a collective this long; 0: for ever */
  phx_liveness *mine;
  phx_liveness *const *ranks;  /* (size) everybody's, read-only; on several machines the others' tell only pid, state
                                * and message, and have start_ns 0 */
  const uint32_t *failed;      /* nonzero once any rank failed or the launcher ends the job; futex word (shared) */
  int32_t may_spin;            /* 1: this rank has a core to itself for waiting; 0: go to sleep at once */
  int32_t reserved0;
  /* [main][collective] bytes (equal on all ranks) of shared memory per rank, page-aligned, zero, mapped by everybody
   * and pre-faulted by its owner; bases[r] is rank r's part in this process.  It lives as long as the process. */
  phx_status (*share)(void *ctx, const char *name, int64_t bytes, void **bases /* (size) */, phx_error *err);
  /* [any] sets *failed and wakes every sleeper; the message goes to this rank's page (the first one counts). */
  void (*fail)(void *ctx, const char *message);
  /* [main][collective] every rank brings `bytes` (1 to PHX_EXCHANGE_MAX, equal on all ranks) and gets everybody's, in
   * the order of ranks, in all (size * bytes).  For start-up: identifiers, places, versions. */
  phx_status (*exchange)(void *ctx, const char *name, const void *mine, int64_t bytes, void *all, phx_error *err);
} phx_job;

#ifdef __cplusplus
}
#endif
#endif
