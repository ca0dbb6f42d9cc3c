/* issue.c - the phx_comm table: arguments are checked, a call gets its ticket, and is run inline or enqueued.
 *
 * Calls on the NULL stream run at once in the caller (not so those on device memory, which are device.c's); calls on
 * any other stream are records in the communicator's queue (SHM_QUEUE, part of the communicator: no allocation per
 * call), enqueued with device->enqueue; when the queue is full, issuing waits for the oldest.  One communicator is one
 * order: a call runs only when all calls issued before it are done; one that is started earlier (two streams that no
 * event orders) is refused as PHX_STATE.
 *
 * Once a call failed after it was announced to peers the ranks no longer agree on where they are: the communicator is
 * broken, and every later call returns PHX_COMM at once.
 *
 * Stats: each communicator counts its own calls; the world counts, besides, those of all that was split off it, so that
 * world->stats() is what this rank moved.  Threads: issuing is [main]; running is the stream's thread. */
#include <string.h>

#include "shm.h"

static phx_status check_alive(const shm_comm *c, phx_error *err) {
  const phx_job *job = c->world->job;
  char why[300];
  if (__atomic_load_n(job->failed, __ATOMIC_ACQUIRE)) {
    phx_kit_job_failure(job, why, sizeof why);
    return phx_fail(err, PHX_COMM, "communicator %llu: %s", (unsigned long long)c->id, why);
  }
  if (__atomic_load_n(&c->aborted, __ATOMIC_ACQUIRE) || __atomic_load_n(&c->world->all->aborted, __ATOMIC_ACQUIRE))
    return phx_fail(err, PHX_COMM, "communicator %llu was aborted", (unsigned long long)c->id);
  if (__atomic_load_n(&c->broken, __ATOMIC_ACQUIRE))
    return phx_fail(err, PHX_COMM, "communicator %llu: an earlier call failed", (unsigned long long)c->id);
  return PHX_OK;
}

/* Every call passes begin() and end(), in ticket order. */
static phx_status check_order(const shm_call *call, phx_error *err) {
  const shm_comm *c = call->comm;
  uint64_t done = __atomic_load_n(&c->done, __ATOMIC_ACQUIRE);
  if (done == call->ticket) return PHX_OK;
  return phx_fail(err, PHX_STATE,
                  "%s is call %llu of communicator %llu, but was started when only %llu were done: order the "
                  "streams of one communicator with events, or use split()",
                  phx_op_name(call->op), (unsigned long long)call->ticket + 1, (unsigned long long)c->id,
                  (unsigned long long)done);
}
phx_status shm_begin(shm_call *call, phx_error *err) {
  phx_status status = check_order(call, err);
  if (status == PHX_OK) status = check_alive(call->comm, err);
  if (status == PHX_OK) shm_flight_begin(call, call->ticket + 1);
  return status;
}
phx_status shm_end(shm_call *call, phx_status status) {
  shm_comm *c = call->comm;
  int32_t on_stream = call->on_stream; /* once `done` is stored, the record belongs to [main] again */
  if (status == PHX_OK) {
    shm_flight_end(call);
    phx_kit_count_call(&c->counters, &c->world->all->counters, call->op, call->moved);
  } else {
    __atomic_store_n(&c->broken, 1, __ATOMIC_RELEASE);
  }
  __atomic_store_n(&c->done, __atomic_load_n(&c->done, __ATOMIC_RELAXED) + 1, __ATOMIC_RELEASE);
  if (on_stream) { /* only then can [main] be waiting */
    __atomic_fetch_add(&c->done_word, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->main_waits, __ATOMIC_SEQ_CST)) shm_wake(&c->done_word);
  }
  return status;
}
static phx_status run(void *arg, phx_error *err) {
  shm_call *call = arg;
  phx_status status = shm_begin(call, err);
  if (status == PHX_OK) {
    if (call->op == PHX_OP_SEND) status = shm_send(call, err);
    else if (call->op == PHX_OP_RECV) status = shm_recv(call, err);
    else status = shm_collective(call, err);
  }
  return shm_end(call, status);
}

static phx_status issue(shm_call call, phx_stream *s, phx_error *err) {
  shm_comm *c = call.comm;
  const phx_kit_call shown = {.numel = call.numel, .op = call.op, .dtype = call.dtype, .reduce = call.reduce,
                              .root = call.root};
  phx_status status = phx_kit_check_call(&shown, c->me, c->n, call.src, call.dst, err);
  if (status == PHX_OK) status = check_alive(c, err);
  if (status != PHX_OK) return status;
  int32_t is_device = 0;
  PHX_TRY(shm_device_check(&call, &is_device, err));
  call.ticket = c->issued;
  call.unit = c->unit;
  if (!s && !is_device) {
    if (c->world->far) shm_drain(c, c->issued); /* what is on streams may be behind the caller here, and only here */
    status = check_order(&call, err); /* refused before it takes its ticket: what is pending goes on */
    if (status != PHX_OK) return status;
    c->issued++;
    return run(&call, err);
  }
  if (c->issued >= SHM_QUEUE) shm_drain(c, c->issued - SHM_QUEUE + 1); /* the record's last call must be done */
  shm_call *record = &c->queue[c->issued % SHM_QUEUE];
  call.on_stream = 1;
  *record = call;
  if (is_device) {
    c->issued++;
    return shm_device_issue(record, s, err);
  }
  status = c->world->device->enqueue(c->world->device->ctx, s, run, record, err);
  if (status == PHX_OK) c->issued++;
  return status;
}

/* ---- the table ---- */

static phx_status all_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                             phx_stream *s, phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = src, .dst = dst, .numel = numel, .op = PHX_OP_ALL_REDUCE, .dtype = dtype,
                          .reduce = op, .root = -1}, s, err);
}
static phx_status reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op, int32_t root,
                         phx_stream *s, phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = src, .dst = dst, .numel = numel, .op = PHX_OP_REDUCE, .dtype = dtype,
                          .reduce = op, .root = root}, s, err);
}
static phx_status reduce_scatter(void *ctx, const void *src, void *dst, int64_t recv_numel, int32_t dtype, int32_t op,
                                 phx_stream *s, phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = src, .dst = dst, .numel = recv_numel, .op = PHX_OP_REDUCE_SCATTER,
                          .dtype = dtype, .reduce = op, .root = -1}, s, err);
}
static phx_status all_gather(void *ctx, const void *src, void *dst, int64_t send_numel, int32_t dtype, phx_stream *s,
                             phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = src, .dst = dst, .numel = send_numel, .op = PHX_OP_ALL_GATHER,
                          .dtype = dtype, .reduce = -1, .root = -1}, s, err);
}
static phx_status broadcast(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                            phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = buf, .dst = buf, .numel = numel, .op = PHX_OP_BROADCAST, .dtype = dtype,
                          .reduce = -1, .root = root}, s, err);
}
static phx_status send_to(void *ctx, const void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                          phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = buf, .numel = numel, .op = PHX_OP_SEND, .dtype = dtype, .reduce = -1,
                          .root = peer}, s, err);
}
static phx_status recv_from(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                            phx_error *err) {
  return issue((shm_call){.comm = ctx, .dst = buf, .numel = numel, .op = PHX_OP_RECV, .dtype = dtype, .reduce = -1,
                          .root = peer}, s, err);
}
static phx_status all_to_all(void *ctx, const void *src, void *dst, int64_t numel_per_peer, int32_t dtype,
                             phx_stream *s, phx_error *err) {
  return issue((shm_call){.comm = ctx, .src = src, .dst = dst, .numel = numel_per_peer, .op = PHX_OP_ALL_TO_ALL,
                          .dtype = dtype, .reduce = -1, .root = -1}, s, err);
}
static phx_status barrier(void *ctx, phx_stream *s, phx_error *err) {
  return issue((shm_call){.comm = ctx, .op = PHX_OP_BARRIER, .reduce = -1, .root = -1}, s, err);
}

static phx_status split(void *ctx, int32_t color, int32_t key, phx_comm **out, phx_error *err) {
  shm_comm *c = ctx;
  shm_call call = {.comm = c, .op = PHX_OP_SPLIT, .reduce = -1, .root = -1, .unit = c->unit};
  PHX_TRY(check_alive(c, err));
  shm_drain(c, c->issued); /* inline, after what is still on a stream */
  call.ticket = c->issued++;
  phx_status status = shm_begin(&call, err);
  if (status != PHX_OK) return shm_end(&call, status);
  status = shm_split(&call, color, key, out, err);
  if (status == PHX_UNSUPPORTED) { /* all ranks agree on that: the communicator is whole */
    shm_end(&call, PHX_OK);
    return status;
  }
  return shm_end(&call, status);
}

static void destroy(phx_comm *comm) {
  shm_comm *c = (shm_comm *)(void *)comm;
  if (c && c != c->world->all) shm_comm_free(c); /* the world's goes with the plugin's destroy */
}
static void annotate(void *ctx, int32_t unit) { ((shm_comm *)ctx)->unit = unit; }
static void stats(void *ctx, phx_comm_stats *out) { phx_kit_counters_read(&((shm_comm *)ctx)->counters, out); }
static phx_status health(void *ctx, phx_error *err) { return check_alive(ctx, err); }
static void abort_calls(void *ctx) { __atomic_store_n(&((shm_comm *)ctx)->aborted, 1, __ATOMIC_RELEASE); }

void shm_comm_table(shm_comm *c) {
  c->table = (phx_comm){.struct_size = sizeof(phx_comm), .ctx = c, .rank = c->me, .size = c->n,
                        .all_reduce = all_reduce, .reduce = reduce, .reduce_scatter = reduce_scatter,
                        .all_gather = all_gather, .broadcast = broadcast, .send = send_to, .recv = recv_from,
                        .all_to_all = all_to_all, .barrier = barrier, .split = split, .destroy = destroy,
                        .annotate = annotate, .stats = stats, .health = health, .abort = abort_calls};
}
