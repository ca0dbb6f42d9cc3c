/* phalanx/comm.h - collectives, asynchronous on a stream.
 *
 * Reduction order: every reduction, on every deterministic communicator, combines ranks by the tree
 *     T(1) = the rank itself;  T(n) = T(ranks 0..left-1) + T(the rest),  left = the largest power of two below n
 * element by element, so the bits do not depend on how a buffer is cut.  No collective averages.
 *
 * One communicator is one order: all ranks issue its collectives in the same order, from [main], on streams that run
 * them in that order.  Concurrent orders need split().  In-place use is as in NCCL: all_reduce with src == dst;
 * reduce_scatter with dst == src + rank * recv_numel; all_gather with src == dst + rank * send_numel.
 * When a call's work is done on its stream, the rank may reuse all its buffers.
 * send and recv meet without a buffer and cannot be grouped: two ranks that both send first wait for each other.
 * Memory that host->alloc took with this communicator is reached by peers in place; other memory is staged.
 *
 * Buffers of a call are all in the device's space or all in host memory (pinned or not), told apart by address.  With
 * host memory and the compute stream (NULL) a call is over when it returns, and does not wait for the stream: what the
 * core's own small exchanges (losses, norms, hashes, agreements) are; so is a barrier. */
#ifndef PHALANX_COMM_H
#define PHALANX_COMM_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_EXT_COMM "phx.comm/1"

enum { PHX_SUM = 0, PHX_MIN = 1, PHX_MAX = 2 };
enum {
  PHX_OP_ALL_REDUCE = 0,
  PHX_OP_REDUCE = 1,
  PHX_OP_REDUCE_SCATTER = 2,
  PHX_OP_ALL_GATHER = 3,
  PHX_OP_BROADCAST = 4,
  PHX_OP_SEND = 5,
  PHX_OP_RECV = 6,
  PHX_OP_ALL_TO_ALL = 7,
  PHX_OP_BARRIER = 8,
  PHX_OP_SPLIT = 9,
  PHX_OPS = 10,
  /* Reserved for one count per rank; no communicator has them yet. */
  PHX_OP_ALL_GATHER_V = 10,
  PHX_OP_REDUCE_SCATTER_V = 11,
  PHX_OP_ALL_TO_ALL_V = 12,
  PHX_OPS_ROOM = 32 /* length of arrays by operation in structs; the rest is zero */
};
static inline const char *phx_op_name(int32_t op) {
  static const char *const names[PHX_OPS] = {"all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast",
                                             "send",       "recv",   "all_to_all",     "barrier",    "split"};
  return op >= 0 && op < PHX_OPS ? names[op] : "none";
}

typedef struct phx_comm_stats { /* since create(), this rank; the world's count what was split off it, too */
  size_t struct_size;
  int64_t calls[PHX_OPS_ROOM];
  /* payload: bytes this rank read from or wrote into a peer's memory, or put on the wire */
  int64_t bytes[PHX_OPS_ROOM];
  int64_t wait_ns; /* time spent waiting for peers */
} phx_comm_stats;

typedef struct phx_comm phx_comm;
struct phx_comm {
  size_t struct_size;
  void *ctx;
  int32_t rank, size; /* within this communicator */

  /* All: [main][collective]; numel >= 0 (0 is a no-op that still counts as a call); float types for SUM/MIN/MAX:
   * F32, F64, BF16 (sum in fp32, rounded once); integer types all. */
  phx_status (*all_reduce)(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                           phx_stream *s, phx_error *err);
  phx_status (*reduce)(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op, int32_t root,
                       phx_stream *s, phx_error *err); /* dst is read only on root, else may be NULL */
  phx_status (*reduce_scatter)(void *ctx, const void *src, void *dst, int64_t recv_numel, int32_t dtype, int32_t op,
                               phx_stream *s, phx_error *err); /* src: size * recv_numel */
  phx_status (*all_gather)(void *ctx, const void *src, void *dst, int64_t send_numel, int32_t dtype, phx_stream *s,
                           phx_error *err); /* dst: size * send_numel */
  phx_status (*broadcast)(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                          phx_error *err);
  phx_status (*send)(void *ctx, const void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                     phx_error *err); /* not [collective]: it meets the peer's recv, in order, and is
                                                 over when the peer has the data; nothing is buffered */
  phx_status (*recv)(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s, phx_error *err);
  phx_status (*all_to_all)(void *ctx, const void *src, void *dst, int64_t numel_per_peer, int32_t dtype,
                           phx_stream *s, phx_error *err); /* src != dst */
  phx_status (*barrier)(void *ctx, phx_stream *s, phx_error *err);

  /* [main][collective] ranks of equal colour form a new communicator, ordered by (key, rank); a negative colour joins
   * none and gets *out = NULL.  Freed with destroy. */
  phx_status (*split)(void *ctx, int32_t color, int32_t key, phx_comm **out, phx_error *err);
  void (*destroy)(phx_comm *comm); /* [main] of what split() made; NULL is fine */

  /* [main] names the unit that the next collectives are for, in the flight record; -1: none. */
  void (*annotate)(void *ctx, int32_t unit);
  void (*stats)(void *ctx, phx_comm_stats *out); /* [any] */
  /* [any] never blocks.  Asked when [main] has not been heard of for half of the job's timeout: an error that no call
   * has returned yet (a link that is down), or PHX_OK.  A failure ends the job, with its text. */
  phx_status (*health)(void *ctx, phx_error *err);
  /* [any] never blocks.  Waiting calls return PHX_COMM soon, and so do later ones; of what was split off, too.  Called
   * once, where the job has failed and [main] is in a call for a second more. */
  void (*abort)(void *ctx);
};

#ifdef __cplusplus
}
#endif
#endif
