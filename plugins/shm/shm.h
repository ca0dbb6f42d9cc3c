/* shm.h - the shared-memory communicator's data structures.
 *
 * One region per rank, mapped by everybody, made once at create():
 *
 *     [ group 0: lane | staging ] [ group 1: lane | staging ] ... [ arena ]
 *
 * A group is one communicator's share of it; group 0 is the world, split() takes the others from the pool.  A lane
 * holds what a rank tells its peers: a phase counter, the record and (when small) the data of its current call, and one
 * channel per peer for send and recv.  Everything in a rank's region is written by that rank, with three exceptions:
 * `sleepers` counts those who wait on its words, a peer stores results into its arena in all_reduce and reduce, and
 * into its staging half in the staged form of the same. */
#ifndef SHM_H
#define SHM_H
#include <phalanx/error.h>
#include <phalanx/kit.h>
#include <phalanx/kit_comm.h>
#include <phalanx/provider.h>

#include "kernels.h"

#define SHM_SMALL 512       /* calls that put at most this many bytes travel inside the lane: one round of flags */
#define SHM_GRAIN 64        /* slices are cut at multiples of this many bytes from the buffer's start: no shared line */
#define SHM_STREAM (4 << 20) /* out-of-place stores of at least this many bytes go around the caches */
#define SHM_GROUPS_MAX 64
#define SHM_QUEUE 256       /* calls on streams that may be pending; the next one waits */
#define SHM_PIPE 2          /* chunks in flight between a sender and a receiver */

typedef struct shm_config {
  int64_t staging;       /* bytes per rank and communicator */
  int64_t spin;          /* polls before sleep */
  int64_t communicators; /* live at once, the world included */
  int32_t huge_pages;
  int32_t reserved0;
} shm_config;

typedef struct shm_record { /* one call, as its rank announces it; equal on all ranks but for src and dst */
  uint64_t sequence;
  int64_t numel;
  int64_t src, dst; /* offsets in this rank's arena, -1: elsewhere */
  int32_t op, dtype, reduce, root;
} shm_record;

typedef struct shm_pair { /* towards one peer (by world rank); all words grow for ever */
  _Alignas(128) uint32_t posted; /* as sender: chunks handed over */
  uint32_t taken;                /* as receiver: chunks read */
  uint32_t sends, recvs;         /* calls begun */
  shm_record record;             /* of the send in progress */
} shm_pair;

typedef struct shm_lane {
  _Alignas(128) uint32_t phase; /* steps done; futex word */
  uint32_t sleepers;            /* who sleeps on a word of this lane */
  uint64_t begun;               /* sequence of the collective begun last, in the group that owns the lane now */
  uint64_t left;                /* the newest communicator id that this rank destroyed in this group */
  struct {
    _Alignas(128) shm_record record;
    _Alignas(64) char data[SHM_SMALL];
  } slot[2]; /* [sequence & 1]: a peer may still read the one before */
  shm_pair pair[PHX_RANKS_MAX];
} shm_lane;

typedef struct shm_comm shm_comm;
typedef struct shm_call { /* an issued call; on a stream it lives in the communicator's queue until it ran */
  shm_comm *comm;
  const void *src;
  void *dst;
  int64_t numel;
  int32_t op, dtype, reduce, root; /* root: also the peer of send and recv */
  int32_t unit, on_stream;
  uint64_t ticket;
  uint64_t flight; /* its number in the flight record */
  int64_t moved;   /* payload so far */
  int64_t round, rounds; /* device.c: pieces of its work done, and all */
  int32_t small, reserved0;
} shm_call;

typedef struct shm_group { /* this rank's use of one group of the pool */
  int32_t used, n;
  int32_t ranks[PHX_RANKS_MAX]; /* members of the last communicator that had it */
  uint64_t id;                  /* of that communicator; 0: never used */
} shm_group;

typedef struct shm_world {
  const phx_host *host;
  const phx_job *job;
  const phx_device *device;
  const shm_kernels *kernels;
  shm_config config;
  char *base[PHX_RANKS_MAX]; /* rank r's region */
  int64_t group_bytes, arena_at, arena_bytes;
  shm_group groups[SHM_GROUPS_MAX];
  uint64_t next_id;
  shm_comm *comms; /* all that are alive, the world's last */
  shm_comm *all;   /* the world's */
  int32_t far;     /* the CPU cannot reach the device's memory */
  int32_t pinned;  /* regions that the device copies from and to: base[0 .. pinned) */
} shm_world;

struct shm_comm {
  phx_comm table; /* first: a phx_comm * is a shm_comm * */
  shm_world *world;
  shm_comm *next;
  uint64_t id;
  int32_t group, n, me;
  int32_t unit;                  /* [main] annotate() */
  int32_t ranks[PHX_RANKS_MAX];  /* world rank of each member */
  shm_lane *lane[PHX_RANKS_MAX]; /* by member */
  char *staging[PHX_RANKS_MAX], *arena[PHX_RANKS_MAX];
  uint32_t base[PHX_RANKS_MAX];  /* the lane's phase when this communicator began */
  /* Written by the thread that runs the calls (one at a time, in ticket order). */
  uint32_t steps;
  uint64_t sequence;
  /* Shared between threads; atomics. */
  uint64_t issued, done; /* tickets: [main] counts issued, the runner done */
  uint32_t done_word, main_waits;
  uint32_t broken; /* a call failed: the ranks no longer agree on where they are */
  uint32_t aborted;
  phx_kit_counters counters;
  shm_call queue[SHM_QUEUE];
};

/* ---- the cut: rank's part of numel elements.  The only place that knows it; payload() counts with it. ---- */
static inline void shm_cut(int64_t numel, int64_t element, int32_t n, int32_t rank, int64_t *begin, int64_t *end) {
  int64_t grain = SHM_GRAIN / element, blocks = numel / grain + (numel % grain != 0);
  int64_t each = blocks / n, more = blocks % n; /* the first `more` ranks have one block more */
  int64_t first = rank * each + (rank < more ? rank : more);
  int64_t last = first + each + (rank < more);
  *begin = first * grain < numel ? first * grain : numel;
  *end = last * grain < numel ? last * grain : numel;
}
/* Bytes that a rank puts into its lane when the call is small. */
static inline int64_t shm_put_bytes(int32_t op, int64_t numel, int64_t element, int32_t n) {
  return numel * element * (op == PHX_OP_REDUCE_SCATTER || op == PHX_OP_ALL_TO_ALL ? n : 1);
}
/* Bytes that a rank gets from a call in which it brings `put`. */
static inline int64_t shm_got_bytes(int32_t op, int64_t put, int32_t n) {
  if (op == PHX_OP_ALL_GATHER) return put * n;
  return op == PHX_OP_REDUCE_SCATTER ? put / n : put;
}
int64_t shm_payload(int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size, int32_t root);

/* ---- shm.c ---- */
shm_comm *shm_comm_new(shm_world *w, int32_t group, uint64_t id, int32_t n, const int32_t *ranks); /* or NULL */
void shm_comm_free(shm_comm *c); /* waits for its calls */
void shm_comm_table(shm_comm *c);                                  /* issue.c */

/* ---- wait.c: the only places where a rank waits ---- */
static inline int shm_reached(const uint32_t *word, uint32_t target) {
  return (int32_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - target) >= 0;
}
void shm_post(shm_lane *mine, uint32_t *word, uint32_t value); /* publish a word of the own lane, wake sleepers */
/* Until *word of `peer`'s lane has reached target; else PHX_COMM, naming who is absent. */
phx_status shm_await(shm_call *call, int32_t peer, const uint32_t *word, uint32_t target, phx_error *err);
void shm_step(shm_comm *c);                                            /* this rank reached its next phase */
phx_status shm_step_of(shm_call *call, int32_t peer, phx_error *err);  /* wait until a peer reached it, too */
phx_status shm_barrier(shm_call *call, phx_error *err);                /* step, and wait for everybody */
void shm_drain(shm_comm *c, uint64_t ticket);                          /* [main] until call `ticket` is done */
void shm_sleep(const uint32_t *word, uint32_t seen, int64_t ns);       /* a futex wait */
void shm_wake(const uint32_t *word);

/* ---- report.c: what the error says; the flight record ---- */
void shm_flight_begin(shm_call *call, uint64_t sequence);
void shm_flight_end(shm_call *call);
phx_status shm_report_absent(shm_call *call, int64_t waited_ns, phx_error *err);
phx_status shm_report_failed(shm_call *call, phx_error *err);
phx_status shm_report_mismatch(shm_call *call, int32_t peer, const shm_record *theirs, phx_error *err);
phx_status shm_report_crossed(shm_call *call, int32_t peer, phx_error *err);

/* ---- issue.c: around every call, in ticket order ---- */
phx_status shm_begin(shm_call *call, phx_error *err);
phx_status shm_end(shm_call *call, phx_status status);

/* ---- the staged form: a buffer is `pieces` parts; chunk k takes elements [k * step, (k + 1) * step) of each ---- */
typedef struct shm_chunks {
  int32_t pieces;
  int64_t step, rounds;
} shm_chunks;
typedef struct shm_part {
  int64_t at, numel; /* elements of the call's src or dst */
  char *staging;
} shm_part;
shm_chunks shm_chunks_of(const shm_call *call);
/* Part q = 0, 1, ... of what goes into the staging in a round; 0: no more. */
int shm_staged_in(const shm_call *call, const shm_chunks *k, int64_t round, int32_t q, shm_part *out);
/* The same of what comes out of it: out of this rank's own, or of a peer's. */
int shm_staged_out(const shm_call *call, const shm_chunks *k, int64_t round, int32_t q, shm_part *out);
/* Between the two, when all have met: reduces within the staging; counts the payload. */
phx_status shm_staged_reduce(shm_call *call, int64_t round, phx_error *err);

/* ---- device.c: buffers that the CPU cannot reach ---- */
phx_status shm_device_check(const shm_call *call, int32_t *is_device, phx_error *err);
phx_status shm_device_issue(shm_call *record, phx_stream *s, phx_error *err);
phx_status shm_device_open(shm_world *w, phx_error *err);
void shm_device_close(shm_world *w);

/* ---- collective.c, p2p.c, split.c ---- */
phx_status shm_collective(shm_call *call, phx_error *err);
phx_status shm_arrive(shm_call *call, const shm_record *mine, phx_error *err);
phx_status shm_send(shm_call *call, phx_error *err);
phx_status shm_recv(shm_call *call, phx_error *err);
phx_status shm_split(shm_call *call, int32_t color, int32_t key, phx_comm **out, phx_error *err);
int64_t shm_arena_offset(const shm_comm *c, const void *p, int64_t bytes); /* -1: not in this rank's arena */

#endif
