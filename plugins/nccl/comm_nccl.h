/* comm_nccl.h - the NCCL communicator's data structures.
 *
 * One world per process; split() makes more communicators of it.  Each has a slot: a part of the staging buffers,
 * taken once at create(), and a lane in the job's shared pages, where its rank says which calls it has begun (only
 * when all ranks share a host; else there are no lanes, and disagreement is found by the deadline).
 *
 * Every NCCL call is made under world.calls, on a communicator that is not aborted: ncclCommAbort frees the handle,
 * and the watchdog may call it while [main] is between two calls.  Communicators are non-blocking, so that no call
 * should wait for a peer; but one may (a launch behind a full queue), and so the watchdog never waits for world.calls
 * without a bound.  What it reads lies under world.lock, which nobody holds while NCCL or CUDA is called; world.calls
 * is taken first where both are. */
#ifndef COMM_NCCL_H
#define COMM_NCCL_H
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <phalanx/error.h>
#include <phalanx/kit.h>
#include <phalanx/kit_comm.h>
#include <phalanx/provider.h>
#include <pthread.h>

#define NCCL_COMMS_MAX 32
#define NCCL_PENDING 128 /* calls that may be on their way, per communicator; the next one waits for the oldest */
#define NCCL_PAIRS 16    /* records of send and recv that a lane keeps, per peer */
#define NCCL_GRAIN 64    /* slices are cut at multiples of this many elements: rows of the staging stay aligned */

typedef struct nccl_config {
  int64_t staging;       /* bytes per communicator, on the device and as much pinned */
  int64_t communicators; /* live at once, the world included */
  int32_t registered;
  int32_t reserved0;
} nccl_config;

typedef struct nccl_record { /* a call as its rank announces it; `number` last, released */
  uint64_t number, comm;
  int64_t numel;
  int32_t op, dtype, reduce, root;
  int32_t staged; /* memory of the host: it travels in other pieces than the device's */
  int32_t reserved0;
} nccl_record;
typedef struct nccl_lane {     /* of one slot; written by its rank only */
  uint64_t comm, begun;       /* id of the communicator; number of the collective begun last */
  nccl_record ring[NCCL_PENDING];
  nccl_record sent[PHX_RANKS_MAX][NCCL_PAIRS], received[PHX_RANKS_MAX][NCCL_PAIRS]; /* by the peer's world rank */
} nccl_lane;

typedef struct nccl_comm nccl_comm;
typedef struct nccl_call {
  nccl_comm *comm;
  const void *src;
  void *dst;
  int64_t numel;
  int32_t op, dtype, reduce, root; /* root: also the peer of send and recv */
  int32_t src_host, dst_host;      /* memory that the device does not own: staged, and the call returns when done */
  uint64_t sequence;               /* among the collectives of the communicator, from 1; the same on all ranks */
  phx_kit_call shown;
  phx_stream *s;
  cudaStream_t stream;
  cudaEvent_t begin, end; /* of its place among the pending */
} nccl_call;

/* A call on its way; written by [main], read by the watchdog, under world.lock.  Its events are made once, and the
 * watchdog asks them without the lock. */
typedef struct nccl_pending {
  nccl_call call;
  uint64_t flight;
  cudaEvent_t begin, end; /* made once */
  int64_t began_ns; /* when `begin` was seen to have passed; 0: not yet */
  int32_t launched; /* `end` is recorded */
  int32_t reserved0;
} nccl_pending;

typedef struct nccl_world {
  const phx_host *host;
  const phx_job *job;
  const phx_device *device;
  nccl_config config;
  int32_t cuda_device, version, deterministic, timed; /* timed: the device is, and so are calls */
  void *arena, *staging, *pinned;
  int64_t arena_bytes;
  nccl_lane *lanes[PHX_RANKS_MAX]; /* rank r's, config.communicators of them; all NULL on several hosts */
  nccl_comm *comms, *all;          /* all that are alive; the world's */
  uint64_t next_id;
  uint32_t slots; /* in use */
  double ms[PHX_OPS]; /* timed: between a call's events, those of all communicators; under the lock */
  int64_t ended[PHX_OPS];
  /* between threads */
  pthread_mutex_t calls, lock;
  int64_t main_ns; /* atomic: when [main] looked last, in a wait of its own */
  pthread_cond_t changed;
  pthread_t watchdog;
  int32_t watched, stop, busy,
      looking;                 /* the thread runs; shall end; [main] is in a call; it looks.  Under the lock. */
  uint32_t aborted, stuck;     /* atomic: all communicators; it was said that they cannot be aborted */
} nccl_world;

struct nccl_comm {
  phx_comm table; /* first: a phx_comm * is a nccl_comm * */
  nccl_world *world;
  nccl_comm *next;
  ncclComm_t nccl; /* NULL: aborted; under world.calls */
  void *handle;    /* of the registered arena */
  uint64_t id;
  int32_t slot, n, me, unit;
  int32_t ranks[PHX_RANKS_MAX]; /* world rank of each member */
  int32_t slots[PHX_RANKS_MAX]; /* the slot that each member uses for this communicator */
  uint64_t issued, sequence;    /* calls, collectives */
  uint64_t sends[PHX_RANKS_MAX], recvs[PHX_RANKS_MAX];
  uint64_t head, tail;          /* pending[tail..head), under the lock */
  uint32_t aborted;             /* atomic */
  phx_kit_counters counters;
  nccl_pending pending[NCCL_PENDING];
};

/* ---- nccl.c ---- */
int64_t nccl_payload(int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size, int32_t root);

/* ---- setup.c: the world, from nothing; a communicator's record ---- */
/* [collective] A failure closes nothing. */
phx_status nccl_world_open(nccl_world *w, int64_t arena_bytes, phx_error *err);
void nccl_world_close(nccl_world *w); /* also of one that is half open */
phx_status nccl_comm_new(nccl_world *w, int32_t slot, nccl_comm **out, phx_error *err);
phx_status nccl_comm_register(nccl_comm *c, phx_error *err); /* the arena */
void nccl_comm_free(nccl_comm *c);
ncclConfig_t nccl_library_config(void);
phx_status nccl_cuda_fail(phx_error *err, cudaError_t code, const char *what);

/* ---- issue.c: the phx_comm table ---- */
void nccl_comm_table(nccl_comm *c);
phx_status nccl_begin(nccl_call *call, nccl_pending **out, phx_error *err); /* a call is announced */
phx_status nccl_end(nccl_call *call, nccl_pending *pending, phx_status status, phx_error *err); /* ... and on its way */

/* ---- collective.c, canonical.c: launching ---- */
phx_status nccl_run(nccl_call *call, phx_error *err);
phx_status nccl_launch(const nccl_call *call, const void *src, void *dst, int64_t numel, phx_error *err);
phx_status nccl_canonical(const nccl_call *call, const void *src, void *dst, int64_t numel, phx_error *err);
/* sends[p] elements from `from[p]` to each member p, and recvs[p] into `to[p]`, as one group; this rank's own excluded
 */
typedef struct nccl_parcel {
  const char *from;
  char *to;
  int64_t send, recv; /* bytes */
} nccl_parcel;
phx_status nccl_exchange(const nccl_call *call, const nccl_parcel *parcels, phx_error *err);
phx_status nccl_copy(const nccl_call *call, void *dst, const void *src, int64_t bytes, phx_error *err);
/* dst = T(n) over the n rows of `rows`, `stride` bytes apart; in the CPU's memory.  tree.c */
void nccl_tree(int32_t dtype, int32_t reduce, char *rows, int64_t stride, int32_t n, int64_t numel);
static inline char *nccl_staging(const nccl_comm *c) {
  return (char *)c->world->staging + c->slot * c->world->config.staging;
}
static inline char *nccl_pinned(const nccl_comm *c) {
  return (char *)c->world->pinned + c->slot * c->world->config.staging;
}

/* ---- watch.c: every wait, the watchdog, failure ---- */
phx_status nccl_watch(nccl_world *w, phx_error *err);
void nccl_watch_end(nccl_world *w);
/* After an NCCL call that returned `r` on c: waits until it is no longer in progress. */
phx_status nccl_settle(nccl_comm *c, const phx_kit_call *shown, ncclResult_t r, phx_error *err);
/* Until all that is on the call's stream is done.  The stream's work belongs to this call. */
phx_status nccl_wait(const nccl_call *call, phx_error *err);
phx_status nccl_drain(nccl_comm *c, uint64_t upto, phx_error *err); /* [main] until tail >= upto */
phx_status nccl_check_alive(nccl_comm *c, phx_error *err);
/* [any] The same, and what NCCL says of itself, which no call has returned yet. */
phx_status nccl_health(nccl_comm *c, phx_error *err);
int nccl_is_aborted(const nccl_comm *c);
void nccl_abort_now(nccl_world *w); /* every communicator that was asked to; takes the lock */
/* The job ends with this message; the communicators are aborted; PHX_COMM. */
phx_status nccl_end_job(nccl_world *w, phx_error *err, const char *message);

/* ---- lane.c: who is in which call ---- */
phx_status nccl_announce(nccl_call *call, phx_error *err); /* PHX_COMM when a peer's record differs */
void nccl_say_absent(phx_kit_text *t, const nccl_call *call);

/* ---- split.c ---- */
phx_status nccl_split(nccl_call *call, int32_t color, int32_t key, phx_comm **out, phx_error *err);

/* The cut: rank's part of numel elements. */
static inline void nccl_cut(int64_t numel, int32_t n, int32_t rank, int64_t *begin, int64_t *end) {
  int64_t blocks = (numel + NCCL_GRAIN - 1) / NCCL_GRAIN, each = blocks / n, more = blocks % n;
  int64_t first = (rank * each + (rank < more ? rank : more)) * NCCL_GRAIN;
  int64_t last = first + (each + (rank < more)) * NCCL_GRAIN;
  *begin = first < numel ? first : numel;
  *end = last < numel ? last : numel;
}
#define NCCL_CUDA(err, call)                                                        \
  do {                                                                             \
    cudaError_t cuda_code = (call);                                                \
    if (cuda_code != cudaSuccess) return nccl_cuda_fail((err), cuda_code, #call);   \
  } while (0)
#endif
