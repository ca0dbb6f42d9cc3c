/* collective.c - from a call to NCCL's calls on a stream.
 *
 * Moves (gather, broadcast, all_to_all, send, recv) are of bytes, so every dtype can travel.  Reductions are NCCL's
 * own where their bits cannot depend on an order (integers) or nobody asked that they do not; else canonical.c's.
 * Memory that the device does not own passes through the first half of the staging, a quarter for what goes out and a
 * quarter for what comes back, with the pinned buffer as its mirror.
 *
 * All ranks of a collective must bring the same kind of memory (lane.c names who does not); send and recv travel in
 * the same pieces from either.  [main] only. */
#include <string.h>

#include "comm_nccl.h"

phx_status nccl_copy(const nccl_call *call, void *dst, const void *src, int64_t bytes, phx_error *err) {
  if (bytes <= 0 || dst == src) return PHX_OK;
  NCCL_CUDA(err, cudaMemcpyAsync(dst, src, (size_t)bytes, cudaMemcpyDefault, call->stream));
  return PHX_OK;
}

/* One NCCL call, or a group: between the two the communicator cannot be aborted. */
static int enter(nccl_comm *c) {
  pthread_mutex_lock(&c->world->calls);
  if (c->nccl) return 1;
  pthread_mutex_unlock(&c->world->calls);
  return 0;
}
static phx_status leave(const nccl_call *call, ncclResult_t r, phx_error *err) {
  pthread_mutex_unlock(&call->comm->world->calls);
  return nccl_settle(call->comm, &call->shown, r, err);
}
static phx_status gone(const nccl_call *call, phx_error *err) { return nccl_check_alive(call->comm, err); }

static int is_fine(ncclResult_t r) { return r == ncclSuccess || r == ncclInProgress; }

phx_status nccl_exchange(const nccl_call *call, const nccl_parcel *parcels, phx_error *err) {
  nccl_comm *c = call->comm;
  if (!enter(c)) return gone(call, err);
  ncclResult_t r = ncclGroupStart();
  for (int32_t k = 1; k < c->n && is_fine(r); k++) { /* begin with the neighbours: not all with the same rank */
    const int32_t to = (c->me + k) % c->n, from = (c->me + c->n - k) % c->n;
    const nccl_parcel *out = &parcels[to], *in = &parcels[from];
    if (out->send > 0) r = ncclSend(out->from, (size_t)out->send, ncclUint8, to, c->nccl, call->stream);
    if (is_fine(r) && in->recv > 0) r = ncclRecv(in->to, (size_t)in->recv, ncclUint8, from, c->nccl, call->stream);
  }
  const ncclResult_t ended = ncclGroupEnd(); /* also after a failure: the group must not stay open */
  return leave(call, is_fine(r) ? ended : r, err);
}

static phx_status all_to_all(const nccl_call *call, const char *src, char *dst, int64_t bytes, phx_error *err) {
  nccl_parcel parcels[PHX_RANKS_MAX];
  const int32_t me = call->comm->me;
  for (int32_t p = 0; p < call->comm->n; p++)
    parcels[p] = (nccl_parcel){src + p * bytes, dst + p * bytes, bytes, bytes};
  PHX_TRY(nccl_copy(call, parcels[me].to, parcels[me].from, bytes, err));
  return nccl_exchange(call, parcels, err);
}

static int nccl_type(int32_t dtype, ncclDataType_t *out) {
  switch (dtype) {
    case PHX_F32: *out = ncclFloat32; return 1;
    case PHX_F64: *out = ncclFloat64; return 1;
    case PHX_BF16: *out = ncclBfloat16; return 1;
    case PHX_I32: *out = ncclInt32; return 1;
    case PHX_I64: *out = ncclInt64; return 1;
    case PHX_U8: *out = ncclUint8; return 1;
    case PHX_U32: *out = ncclUint32; return 1;
    case PHX_U64: *out = ncclUint64; return 1;
    default: return 0; /* NCCL has no 16-bit integers */
  }
}
static int is_canonical(const nccl_call *call) {
  ncclDataType_t type;
  const int is_float = call->dtype == PHX_F32 || call->dtype == PHX_F64 || call->dtype == PHX_BF16;
  return !nccl_type(call->dtype, &type) || (call->comm->world->deterministic && is_float);
}

static phx_status reduce(const nccl_call *call, const void *src, void *dst, int64_t numel, phx_error *err) {
  static const ncclRedOp_t ops[] = {[PHX_SUM] = ncclSum, [PHX_MIN] = ncclMin, [PHX_MAX] = ncclMax};
  nccl_comm *c = call->comm;
  const ncclRedOp_t op = ops[call->reduce];
  const size_t count = (size_t)numel;
  ncclDataType_t type = ncclUint8;
  if (is_canonical(call)) return nccl_canonical(call, src, dst, numel, err);
  nccl_type(call->dtype, &type);
  if (!enter(c)) return gone(call, err);
  ncclResult_t r = ncclSuccess;
  if (call->op == PHX_OP_ALL_REDUCE) r = ncclAllReduce(src, dst, count, type, op, c->nccl, call->stream);
  else if (call->op == PHX_OP_REDUCE) r = ncclReduce(src, dst, count, type, op, call->root, c->nccl, call->stream);
  else r = ncclReduceScatter(src, dst, count, type, op, c->nccl, call->stream);
  return leave(call, r, err);
}

static int64_t chunk_of(const nccl_comm *c, int64_t element) { return c->world->config.staging / 4 / (c->n * element); }

/* In the pieces in which memory of the host travels: the other end may be such. */
static phx_status pair(const nccl_call *call, const char *src, char *dst, int64_t numel, phx_error *err) {
  nccl_comm *c = call->comm;
  const int64_t element = (int64_t)phx_dtype_bytes(call->dtype), bytes = numel * element;
  const int64_t piece = chunk_of(c, element) * element;
  if (!enter(c)) return gone(call, err);
  ncclResult_t r = ncclGroupStart();
  for (int64_t at = 0; at < bytes && is_fine(r); at += piece) {
    const size_t n = (size_t)(bytes - at < piece ? bytes - at : piece);
    r = call->op == PHX_OP_SEND ? ncclSend(src + at, n, ncclUint8, call->root, c->nccl, call->stream)
                                : ncclRecv(dst + at, n, ncclUint8, call->root, c->nccl, call->stream);
  }
  const ncclResult_t ended = ncclGroupEnd();
  return leave(call, is_fine(r) ? ended : r, err);
}

/* src and dst are the device's, numel > 0, more than one rank. */
phx_status nccl_launch(const nccl_call *call, const void *src, void *dst, int64_t numel, phx_error *err) {
  nccl_comm *c = call->comm;
  const int64_t bytes = numel * (int64_t)phx_dtype_bytes(call->dtype);
  if (call->op <= PHX_OP_REDUCE_SCATTER) return reduce(call, src, dst, numel, err);
  if (call->op == PHX_OP_ALL_TO_ALL) return all_to_all(call, src, dst, bytes, err);
  if (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV) return pair(call, src, dst, numel, err);
  if (!enter(c)) return gone(call, err);
  ncclResult_t r = ncclInvalidArgument;
  if (call->op == PHX_OP_ALL_GATHER) r = ncclAllGather(src, dst, (size_t)bytes, ncclUint8, c->nccl, call->stream);
  if (call->op == PHX_OP_BROADCAST)
    r = ncclBroadcast(src, dst, (size_t)bytes, ncclUint8, call->root, c->nccl, call->stream);
  return leave(call, r, err);
}

/* ---- memory that the device does not own ---- */

typedef struct sides { /* what a call reads and writes: pieces of `numel` elements each, and chunks of them */
  int32_t in, out;     /* pieces; 0: this rank has none */
  int64_t numel, chunk, element;
} sides;

static sides sides_of(const nccl_call *call) {
  const int32_t op = call->op, n = call->comm->n, me = call->comm->me;
  sides s = {1, 1, call->numel, 0, (int64_t)phx_dtype_bytes(call->dtype)};
  if (op == PHX_OP_REDUCE_SCATTER || op == PHX_OP_ALL_TO_ALL) s.in = n;
  if (op == PHX_OP_ALL_GATHER || op == PHX_OP_ALL_TO_ALL) s.out = n;
  if (op == PHX_OP_RECV || (op == PHX_OP_BROADCAST && call->root != me)) s.in = 0;
  if (op == PHX_OP_SEND ||
      ((op == PHX_OP_REDUCE || op == PHX_OP_BROADCAST) && (call->root != me) == (op == PHX_OP_REDUCE)))
    s.out = 0;
  s.chunk = chunk_of(call->comm, s.element);
  return s;
}

/* Elements [at, at + numel) of every piece, to the staging; and back. */
static phx_status stage_in(const nccl_call *call, const sides *s, int64_t at, int64_t numel, phx_error *err) {
  char *device = nccl_staging(call->comm), *pinned = nccl_pinned(call->comm);
  const int64_t bytes = numel * s->element;
  for (int32_t q = 0; q < s->in; q++) {
    const char *from = (const char *)call->src + (q * s->numel + at) * s->element;
    if (call->src_host) {
      memcpy(pinned + q * bytes, from, (size_t)bytes);
      from = pinned + q * bytes;
    }
    PHX_TRY(nccl_copy(call, device + q * bytes, from, bytes, err));
  }
  return PHX_OK;
}
static phx_status stage_out(const nccl_call *call, const sides *s, int64_t at, int64_t numel, phx_error *err) {
  const int64_t quarter = call->comm->world->config.staging / 4, bytes = numel * s->element;
  char *device = nccl_staging(call->comm) + quarter, *pinned = nccl_pinned(call->comm) + quarter;
  for (int32_t q = 0; q < s->out; q++) {
    char *to = (char *)call->dst + (q * s->numel + at) * s->element;
    PHX_TRY(nccl_copy(call, call->dst_host ? pinned + q * bytes : to, device + q * bytes, bytes, err));
  }
  PHX_TRY(nccl_wait(call, err)); /* also before the next chunk overwrites the pinned memory */
  for (int32_t q = 0; q < s->out && call->dst_host; q++)
    memcpy((char *)call->dst + (q * s->numel + at) * s->element, pinned + q * bytes, (size_t)bytes);
  return PHX_OK;
}

static phx_status run_staged(const nccl_call *call, phx_error *err) {
  const sides s = sides_of(call);
  char *in = nccl_staging(call->comm), *out = in + call->comm->world->config.staging / 4;
  for (int64_t at = 0; at < s.numel; at += s.chunk) {
    const int64_t numel = s.numel - at < s.chunk ? s.numel - at : s.chunk;
    PHX_TRY(stage_in(call, &s, at, numel, err));
    PHX_TRY(nccl_launch(call, in, call->op == PHX_OP_SEND ? NULL : out, numel, err));
    PHX_TRY(stage_out(call, &s, at, numel, err));
  }
  return PHX_OK;
}

/* A world of one: copy, or nothing. */
static phx_status run_alone(const nccl_call *call, phx_error *err) {
  PHX_TRY(nccl_copy(call, call->dst, call->src, call->numel * (int64_t)phx_dtype_bytes(call->dtype), err));
  return call->src_host || call->dst_host ? nccl_wait(call, err) : PHX_OK;
}

phx_status nccl_run(nccl_call *call, phx_error *err) {
  nccl_comm *c = call->comm;
  if (call->op == PHX_OP_BARRIER) {
    if (c->n == 1) return PHX_OK;
    if (!enter(c)) return gone(call, err);
    void *word = nccl_staging(c); /* whatever it holds */
    return leave(call, ncclAllReduce(word, word, 1, ncclInt32, ncclSum, c->nccl, call->stream), err);
  }
  if (call->numel == 0) return PHX_OK;
  if (c->n == 1) return run_alone(call, err);
  if (call->src_host || call->dst_host) return run_staged(call, err);
  return nccl_launch(call, call->src, call->dst, call->numel, err);
}
