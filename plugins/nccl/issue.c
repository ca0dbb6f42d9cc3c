/* issue.c - the phx_comm table: arguments are checked, a call gets its number, is announced, launched, and pending.
 *
 * Calls are launched from [main] in the order of the program, on the stream they were given; a call on another
 * stream than the one before it waits for that one (an event), so that a communicator stays one order on the device.
 *
 * Stats count a call when it was launched; each communicator its own, the world those of all that was split off it,
 * too.  wait_ns is the time that [main] waited.  Threads: [main]; stats, health and abort [any]. */
#include <stdio.h>
#include <string.h>

#include "comm_nccl.h"

/* Does the device own it?  Pinned memory belongs to the host: NCCL would reach it slowly, or not at all. */
static phx_status find_owner(nccl_world *w, const void *p, int32_t *host, phx_error *err) {
  struct cudaPointerAttributes at;
  const uintptr_t arena = (uintptr_t)w->arena, address = (uintptr_t)p;
  *host = 0;
  if (!p || (address >= arena && address - arena < (uint64_t)w->arena_bytes)) return PHX_OK;
  memset(&at, 0, sizeof at);
  if (cudaPointerGetAttributes(&at, p) != cudaSuccess) {
    (void)cudaGetLastError(); /* it would stay for the next call */
    *host = 1;
    return PHX_OK;
  }
  *host = at.type == cudaMemoryTypeUnregistered || at.type == cudaMemoryTypeHost;
  if (!*host && at.device != w->cuda_device)
    return phx_fail(err, PHX_INVALID, "a buffer lies on device %d, and this rank's is %d", at.device, w->cuda_device);
  return PHX_OK;
}

static phx_status find_owners(nccl_call *call, phx_error *err) {
  nccl_world *w = call->comm->world;
  const int32_t op = call->op, me = call->comm->me;
  const int reads = op != PHX_OP_RECV, writes = op != PHX_OP_SEND && !(op == PHX_OP_REDUCE && call->root != me);
  if (call->numel == 0) return PHX_OK;
  if (reads) PHX_TRY(find_owner(w, call->src, &call->src_host, err));
  if (writes) PHX_TRY(find_owner(w, call->dst, &call->dst_host, err));
  return PHX_OK;
}

phx_status nccl_begin(nccl_call *call, nccl_pending **out, phx_error *err) {
  nccl_comm *c = call->comm;
  nccl_world *w = c->world;
  const int pairs = call->op == PHX_OP_SEND || call->op == PHX_OP_RECV;
  if (c->head >= NCCL_PENDING) PHX_TRY(nccl_drain(c, c->head - NCCL_PENDING + 1, err)); /* its place must be free */
  call->stream = w->device->native_stream(w->device->ctx, call->s);
  call->sequence = pairs ? c->sequence : ++c->sequence;
  call->shown = (phx_kit_call){c->id, ++c->issued, call->numel, call->op, call->dtype, call->reduce, call->root,
                               c->unit, 0};
  nccl_pending *p = &c->pending[c->head % NCCL_PENDING];
  call->begin = p->begin;
  call->end = p->end;
  const uint64_t flight = phx_kit_flight_begin(w->job, &call->shown, c->issued);
  PHX_TRY(nccl_announce(call, err));
  if (c->head > 0) {
    const nccl_call *before = &c->pending[(c->head - 1) % NCCL_PENDING].call;
    if (before->stream != call->stream) NCCL_CUDA(err, cudaStreamWaitEvent(call->stream, before->end, 0));
  }
  NCCL_CUDA(err, cudaEventRecord(call->begin, call->stream));
  pthread_mutex_lock(&w->lock);
  p->call = *call;
  p->flight = flight;
  p->began_ns = 0;
  p->launched = 0;
  c->head++;
  w->busy = 1;
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->lock);
  *out = p;
  return PHX_OK;
}

phx_status nccl_end(nccl_call *call, nccl_pending *pending, phx_status status, phx_error *err) {
  nccl_comm *c = call->comm;
  nccl_world *w = c->world;
  if (status == PHX_OK) {
    const cudaError_t code = cudaEventRecord(call->end, call->stream);
    if (code != cudaSuccess) status = nccl_cuda_fail(err, code, "cudaEventRecord");
  }
  pthread_mutex_lock(&w->lock);
  pending->launched = status == PHX_OK;
  w->busy = 0;
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->lock);
  if (status == PHX_OK) {
    const int64_t payload = nccl_payload(call->op, call->numel, call->dtype, c->me, c->n, call->root);
    phx_kit_count_call(&c->counters, &w->all->counters, call->op, payload);
    const int returns_done = call->src_host || call->dst_host || (call->op == PHX_OP_BARRIER && !call->s);
    return returns_done ? nccl_drain(c, c->head, err) : PHX_OK;
  }
  if (status != PHX_COMM) { /* a failure of this rank only: its peers must not wait for what will not come */
    char message[496];
    snprintf(message, sizeof message, "rank %d: %s: %.400s", w->job->rank, phx_op_name(call->op),
             err ? err->message : "a call failed");
    nccl_end_job(w, NULL, message);
  }
  return status;
}

static phx_status issue(nccl_call call, phx_stream *s, phx_error *err) {
  nccl_pending *pending = NULL;
  phx_error own = {.struct_size = sizeof own};
  if (!err) err = &own;
  call.s = s;
  const phx_kit_call shown = {.numel = call.numel, .op = call.op, .dtype = call.dtype, .reduce = call.reduce,
                              .root = call.root};
  PHX_TRY(phx_kit_check_call(&shown, call.comm->me, call.comm->n, call.src, call.dst, err));
  PHX_TRY(nccl_check_alive(call.comm, err));
  PHX_TRY(find_owners(&call, err));
  PHX_TRY(nccl_begin(&call, &pending, err));
  return nccl_end(&call, pending, nccl_run(&call, err), err);
}

/* ---- the table ---- */

static phx_status start(nccl_comm *c, int32_t op, const void *src, void *dst, int64_t numel, int32_t dtype,
                        int32_t reduce, int32_t root, phx_stream *s, phx_error *err) {
  return issue((nccl_call){.comm = c, .src = src, .dst = dst, .numel = numel, .op = op, .dtype = dtype,
                           .reduce = reduce, .root = root}, s, err);
}
static phx_status all_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                             phx_stream *s, phx_error *err) {
  return start(ctx, PHX_OP_ALL_REDUCE, src, dst, numel, dtype, op, -1, s, err);
}
static phx_status reduce_to(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                            int32_t root, phx_stream *s, phx_error *err) {
  return start(ctx, PHX_OP_REDUCE, src, dst, numel, dtype, op, root, s, err);
}
static phx_status reduce_scatter(void *ctx, const void *src, void *dst, int64_t recv_numel, int32_t dtype, int32_t op,
                                 phx_stream *s, phx_error *err) {
  return start(ctx, PHX_OP_REDUCE_SCATTER, src, dst, recv_numel, dtype, op, -1, s, err);
}
static phx_status all_gather(void *ctx, const void *src, void *dst, int64_t send_numel, int32_t dtype, phx_stream *s,
                             phx_error *err) {
  return start(ctx, PHX_OP_ALL_GATHER, src, dst, send_numel, dtype, -1, -1, s, err);
}
static phx_status broadcast(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                            phx_error *err) {
  return start(ctx, PHX_OP_BROADCAST, buf, buf, numel, dtype, -1, root, s, err);
}
static phx_status send_to(void *ctx, const void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                          phx_error *err) {
  return start(ctx, PHX_OP_SEND, buf, NULL, numel, dtype, -1, peer, s, err);
}
static phx_status recv_from(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                            phx_error *err) {
  return start(ctx, PHX_OP_RECV, NULL, buf, numel, dtype, -1, peer, s, err);
}
static phx_status all_to_all(void *ctx, const void *src, void *dst, int64_t numel_per_peer, int32_t dtype,
                             phx_stream *s, phx_error *err) {
  return start(ctx, PHX_OP_ALL_TO_ALL, src, dst, numel_per_peer, dtype, -1, -1, s, err);
}
static phx_status barrier(void *ctx, phx_stream *s, phx_error *err) {
  return issue((nccl_call){.comm = ctx, .op = PHX_OP_BARRIER, .reduce = -1, .root = -1}, s, err);
}

static phx_status split(void *ctx, int32_t color, int32_t key, phx_comm **out, phx_error *err) {
  nccl_call call = {.comm = ctx, .op = PHX_OP_SPLIT, .reduce = -1, .root = -1};
  nccl_pending *pending = NULL;
  phx_error own = {.struct_size = sizeof own};
  if (!err) err = &own;
  PHX_TRY(nccl_check_alive(ctx, err));
  PHX_TRY(nccl_drain(ctx, call.comm->head, err)); /* after what is still on a stream */
  PHX_TRY(nccl_begin(&call, &pending, err));
  const phx_status status = nccl_split(&call, color, key, out, err);
  if (status != PHX_UNSUPPORTED) {
    const phx_status ended = nccl_end(&call, pending, status, err);
    return ended == PHX_OK ? nccl_drain(ctx, call.comm->head, err) : ended;
  }
  const phx_error said = *err; /* all ranks agree on that: the communicator is whole */
  const phx_status ended = nccl_end(&call, pending, PHX_OK, err);
  if (ended == PHX_OK) *err = said;
  return ended == PHX_OK ? status : ended;
}

static void destroy(phx_comm *comm) {
  nccl_comm *c = (nccl_comm *)(void *)comm;
  if (c && c != c->world->all) nccl_comm_free(c); /* the world's goes with the plugin's destroy */
}
static void annotate(void *ctx, int32_t unit) { ((nccl_comm *)ctx)->unit = unit; }
static void stats(void *ctx, phx_comm_stats *out) { phx_kit_counters_read(&((nccl_comm *)ctx)->counters, out); }
static phx_status health(void *ctx, phx_error *err) { return nccl_health(ctx, err); }
static void abort_calls(void *ctx) { /* the watchdog, or who waits, sees it and aborts NCCL */
  nccl_comm *c = ctx;
  __atomic_store_n(c == c->world->all ? &c->world->aborted : &c->aborted, 1, __ATOMIC_RELEASE);
}

void nccl_comm_table(nccl_comm *c) {
  c->table = (phx_comm){.struct_size = sizeof(phx_comm), .ctx = c, .rank = c->me, .size = c->n,
                        .all_reduce = all_reduce, .reduce = reduce_to, .reduce_scatter = reduce_scatter,
                        .all_gather = all_gather, .broadcast = broadcast, .send = send_to, .recv = recv_from,
                        .all_to_all = all_to_all, .barrier = barrier, .split = split, .destroy = destroy,
                        .annotate = annotate, .stats = stats, .health = health, .abort = abort_calls};
}
