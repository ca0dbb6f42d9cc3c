/* device.c - collectives on memory that the CPU cannot reach: staged, as work of the caller's stream.
 *
 * A call becomes a row of entries on its stream: the device copies a chunk from and to the shared staging, which is
 * pinned, and functions in between, on the stream's thread, meet the peers and reduce.  The functions call nothing of
 * the device, since a GPU's host functions may not.  Chunks, cuts and the order of additions are those of
 * collective.c's staged form, and so is the payload; peers' staging is copied straight to where it goes.
 *
 *   arrive | copy in 0 | meet, reduce, (meet) | copy out 0 | copy in 1 | meet, reduce, (meet) | copy out 1 | ...
 *
 * Halves alternate: chunk r + 2 overwrites what peers read of chunk r, and they did so before they met for chunk r + 1.
 * Does not: overlap copies with the peers' (one stream, one order), or send and recv (refused).
 * Threads: issuing is [main], the functions run on the stream's thread. */
#include <string.h>

#include "shm.h"

/* ---- functions on the stream ---- */
static phx_status over(shm_call *call, phx_status status) { return status == PHX_OK ? PHX_OK : shm_end(call, status); }

/* After a failure the record may be another call's: only the communicator is looked at. */
static phx_status is_alive(const shm_call *call, phx_error *err) {
  if (!__atomic_load_n(&call->comm->broken, __ATOMIC_ACQUIRE)) return PHX_OK;
  return phx_fail(err, PHX_COMM, "communicator %llu: an earlier call failed", (unsigned long long)call->comm->id);
}

static phx_status arrive(void *arg, phx_error *err) {
  shm_call *call = arg;
  shm_comm *c = call->comm;
  PHX_TRY(is_alive(call, err));
  phx_status status = shm_begin(call, err);
  if (status == PHX_OK && c->n > 1 && !call->small) {
    const shm_record mine = {++c->sequence, call->numel, -1, -1, call->op, call->dtype, call->reduce, call->root};
    status = shm_arrive(call, &mine, err);
  }
  return over(call, status);
}

static phx_status work(void *arg, phx_error *err) {
  shm_call *call = arg;
  phx_status status = is_alive(call, err);
  if (status != PHX_OK) return status;
  const int64_t round = call->round++;
  if (call->small) {
    status = shm_collective(call, err);
  } else if (call->comm->n > 1) {
    status = shm_barrier(call, err);
    if (status == PHX_OK) status = shm_staged_reduce(call, round, err);
  }
  if (status != PHX_OK) return over(call, status);
  return call->round == call->rounds ? shm_end(call, PHX_OK) : PHX_OK;
}

/* ---- issuing ---- */
typedef struct issue {
  shm_call *record;
  const phx_device *device;
  phx_stream *stream;
  phx_error *err;
} issue;

static phx_status put(const issue *i, phx_stream_fn *fn) {
  return i->device->enqueue(i->device->ctx, i->stream, fn, i->record, i->err);
}
static phx_status copy(const issue *i, void *dst, const void *src, int64_t bytes) {
  if (bytes <= 0 || dst == src) return PHX_OK;
  return i->device->copy(i->device->ctx, dst, src, bytes, i->stream, i->err);
}
static phx_status issue_alone(const issue *i, int64_t put_bytes) {
  shm_call *call = i->record;
  call->rounds = 1;
  PHX_TRY(put(i, arrive));
  PHX_TRY(copy(i, call->dst, call->src, call->dst ? put_bytes : 0));
  return put(i, work);
}

/* What travels in the lanes passes through the part of the staging that serves send. */
static phx_status issue_small(const issue *i, int64_t put_bytes, int64_t got_bytes) {
  shm_call *call = i->record;
  shm_comm *c = call->comm;
  char *in = c->staging[c->me] + c->world->config.staging, *out = in + SHM_SMALL;
  const void *src = call->src;
  void *dst = call->dst;
  const int brings = call->op != PHX_OP_BROADCAST || call->root == c->me;
  const int takes = (call->op != PHX_OP_REDUCE && call->op != PHX_OP_BROADCAST) ||
                    (call->op == PHX_OP_REDUCE) == (call->root == c->me);
  if (SHM_SMALL + got_bytes > c->world->config.staging / 2)
    return phx_fail(i->err, PHX_UNSUPPORTED, "%s of %lld bytes on %d ranks: raise `staging` in [shm]",
                    phx_op_name(call->op), (long long)put_bytes, c->n);
  call->small = 1;
  call->rounds = 1;
  call->src = in;
  call->dst = out;
  PHX_TRY(put(i, arrive));
  if (brings) PHX_TRY(copy(i, in, src, put_bytes));
  PHX_TRY(put(i, work));
  return takes ? copy(i, dst, out, got_bytes) : PHX_OK;
}

static phx_status issue_staged(const issue *i) {
  shm_call *call = i->record;
  const shm_chunks k = shm_chunks_of(call);
  const int64_t element = (int64_t)phx_dtype_bytes(call->dtype);
  const void *src = call->src;
  void *dst = call->dst;
  shm_part part;
  call->rounds = k.rounds;
  PHX_TRY(put(i, arrive));
  for (int64_t r = 0; r < k.rounds; r++) {
    for (int32_t q = 0; shm_staged_in(call, &k, r, q, &part); q++)
      PHX_TRY(copy(i, part.staging, (const char *)src + part.at * element, part.numel * element));
    PHX_TRY(put(i, work));
    for (int32_t q = 0; shm_staged_out(call, &k, r, q, &part); q++)
      PHX_TRY(copy(i, (char *)dst + part.at * element, part.staging, part.numel * element));
  }
  return PHX_OK;
}

/* A row that could not be issued whole: what is on the stream ends, then the communicator is broken. */
static void give_up(const issue *i, uint64_t ticket) {
  shm_comm *c = i->record->comm;
  __atomic_store_n(&c->broken, 1, __ATOMIC_RELEASE);
  i->device->stream_synchronize(i->device->ctx, i->stream, NULL);
  if (__atomic_load_n(&c->done, __ATOMIC_ACQUIRE) == ticket) shm_end(i->record, PHX_COMM);
}

phx_status shm_device_issue(shm_call *record, phx_stream *s, phx_error *err) {
  shm_comm *c = record->comm;
  const issue i = {record, c->world->device, s, err};
  const uint64_t ticket = record->ticket;
  const int64_t put_bytes = shm_put_bytes(record->op, record->numel, (int64_t)phx_dtype_bytes(record->dtype), c->n);
  phx_status status = PHX_OK;
  if (c->n == 1) status = issue_alone(&i, put_bytes);
  else if (put_bytes <= SHM_SMALL) status = issue_small(&i, put_bytes, shm_got_bytes(record->op, put_bytes, c->n));
  else status = issue_staged(&i);
  if (status != PHX_OK) give_up(&i, ticket);
  return status;
}

/* ---- which memory is it? ---- */
static int is_far(const shm_comm *c, const void *p) {
  const phx_device *d = c->world->device;
  return p && d->space(d->ctx, p) == PHX_SPACE_DEVICE;
}

phx_status shm_device_check(const shm_call *call, int32_t *is_device, phx_error *err) {
  const shm_comm *c = call->comm;
  *is_device = 0;
  if (!c->world->far || call->numel == 0) return PHX_OK;
  const int src = is_far(c, call->src), dst = is_far(c, call->dst);
  if (call->src && call->dst && src != dst && (call->op != PHX_OP_REDUCE || call->root == c->me))
    return phx_fail(err, PHX_INVALID, "%s: one buffer is the device's, the other host memory", phx_op_name(call->op));
  if ((src || dst) && (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV))
    return phx_fail(err, PHX_UNSUPPORTED, "%s: shm does not send memory of device %s between ranks: choose another "
                    "[comm] plugin", phx_op_name(call->op), c->world->device->name);
  *is_device = src || dst;
  return PHX_OK;
}

phx_status shm_device_open(shm_world *w, phx_error *err) {
  const phx_device *d = w->device;
  phx_status status = PHX_OK;
  if (!w->far) return PHX_OK;
  for (int32_t r = 0; r < w->job->size && status == PHX_OK; r++) {
    status = d->pin(d->ctx, w->base[r], w->arena_at, err);
    if (status == PHX_OK) w->pinned = r + 1;
  }
  return status;
}

void shm_device_close(shm_world *w) {
  for (; w->pinned > 0; w->pinned--) w->device->unpin(w->device->ctx, w->base[w->pinned - 1]);
}
