/* report.c - the flight record, and what an error says: who is absent, and which collective each of them is in.
 *
 * Every report that ends a collective also ends the job (job->fail): the ranks no longer agree on where they are, and
 * the first message counts.  The pages of other ranks are read with relaxed atomics; a torn record is a wrong line in a
 * report, never more.  Threads: any that runs a call; several communicators may run at once, so the numbers of records
 * are taken with an atomic add. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "shm.h"

#define LOAD(p) __atomic_load_n(&(p), __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELAXED)

typedef struct shm_text { /* appends and never overflows */
  char *at;
  size_t left;
} shm_text;
static void say(shm_text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(shm_text *t, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(t->at, t->left, format, args);
  va_end(args);
  if (n < 0) return;
  size_t used = (size_t)n < t->left ? (size_t)n : t->left - 1;
  t->at += used;
  t->left -= used;
}

void shm_flight_begin(shm_call *call, uint64_t sequence) {
  phx_liveness *page = call->comm->world->job->mine;
  int64_t now = shm_now_ns();
  call->flight = __atomic_fetch_add(&page->n_flights, 1, __ATOMIC_RELAXED);
  phx_flight *f = &page->ring[call->flight % PHX_FLIGHT_RING];
  STORE(f->sequence, 0);
  STORE(f->comm, call->comm->id);
  STORE(f->bytes, call->numel * (int64_t)phx_dtype_bytes(call->dtype));
  STORE(f->begin_ns, now);
  STORE(f->end_ns, 0);
  STORE(f->op, call->op);
  STORE(f->unit, call->unit);
  __atomic_store_n(&f->sequence, sequence, __ATOMIC_RELEASE);
  STORE(page->heartbeat_ns, (uint64_t)now);
}

void shm_flight_end(shm_call *call) {
  phx_liveness *page = call->comm->world->job->mine;
  int64_t now = shm_now_ns();
  STORE(page->ring[call->flight % PHX_FLIGHT_RING].end_ns, now);
  STORE(page->heartbeat_ns, (uint64_t)now);
}

static const char *dtype_name(int32_t dtype) {
  static const char *const names[] = {"-", "f32", "f16", "bf16", "f64", "i32", "i64", "u8", "u16", "u32", "u64"};
  return dtype >= 0 && dtype <= PHX_U64 ? names[dtype] : "?";
}
static const char *reduce_name(int32_t op) {
  static const char *const names[] = {"sum", "min", "max"};
  return op >= 0 && op <= PHX_MAX ? names[op] : "?";
}

/* "all_reduce(1000 f32, sum)" */
static void say_record(shm_text *t, const shm_record *r) {
  say(t, "%s(", phx_op_name(r->op));
  if (r->op != PHX_OP_BARRIER && r->op != PHX_OP_SPLIT) say(t, "%lld %s", (long long)r->numel, dtype_name(r->dtype));
  if (r->op <= PHX_OP_REDUCE_SCATTER) say(t, ", %s", reduce_name(r->reduce));
  if (r->op == PHX_OP_REDUCE || r->op == PHX_OP_BROADCAST) say(t, ", root %d", r->root);
  if (r->op == PHX_OP_SEND || r->op == PHX_OP_RECV) say(t, ", peer %d", r->root);
  say(t, ")");
}
static shm_record own_record(const shm_call *call) {
  return (shm_record){call->comm->sequence, call->numel, -1, -1, call->op, call->dtype, call->reduce, call->root};
}

/* "rank 0: all_reduce(1000 f32, sum), call 12 of communicator 1, unit 3" */
static void say_own(shm_text *t, const shm_call *call) {
  shm_record r = own_record(call);
  say(t, "rank %d: ", call->comm->world->job->rank);
  say_record(t, &r);
  say(t, ", call %llu of communicator %llu", (unsigned long long)call->ticket + 1,
      (unsigned long long)call->comm->id);
  if (call->unit >= 0) say(t, ", unit %d", call->unit);
}

/* "rank 2 (pid 17) is in barrier 4 of communicator 2 for 61.2 s" */
static void say_flight(shm_text *t, const phx_job *job, int32_t rank) {
  const phx_liveness *page = job->ranks[rank];
  uint64_t n = LOAD(page->n_flights);
  int64_t now = shm_now_ns();
  say(t, "rank %d (pid %d) ", rank, LOAD(page->pid));
  if (n == 0) {
    say(t, "%s", LOAD(page->state) == 0 ? "never came" : "has begun no collective");
    return;
  }
  const phx_flight *f = &page->ring[(n - 1) % PHX_FLIGHT_RING];
  int64_t begin = LOAD(f->begin_ns), end = LOAD(f->end_ns);
  say(t, "%s %s, number %llu of communicator %llu", end ? "last finished" : "is in", phx_op_name(LOAD(f->op)),
      (unsigned long long)LOAD(f->sequence), (unsigned long long)LOAD(f->comm));
  if (LOAD(f->unit) >= 0) say(t, ", unit %d", LOAD(f->unit));
  say(t, end ? ", %.1f s ago" : ", for %.1f s", (double)(now - (end ? end : begin)) * 1e-9);
}

static phx_status end_job(shm_call *call, phx_error *err, const char *message) {
  const phx_job *job = call->comm->world->job;
  job->fail(job->ctx, message);
  return shm_fail(err, PHX_COMM, "%s", message);
}

static int is_absent(const shm_call *call, int32_t p) {
  const shm_comm *c = call->comm;
  if (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV) return p == call->root;
  return !shm_reached(&c->lane[p]->phase, c->base[p] + c->steps);
}

phx_status shm_report_absent(shm_call *call, int64_t waited_ns, phx_error *err) {
  char message[496];
  shm_text t = {message, sizeof message};
  const shm_comm *c = call->comm;
  say_own(&t, call);
  say(&t, ": absent after %.1f s: ", (double)waited_ns * 1e-9);
  for (int32_t p = 0, n = 0; p < c->n; p++) {
    if (p == c->me || !is_absent(call, p)) continue;
    if (n++) say(&t, "; ");
    say_flight(&t, c->world->job, c->ranks[p]);
  }
  return end_job(call, err, message);
}

phx_status shm_report_mismatch(shm_call *call, int32_t peer, const shm_record *theirs, phx_error *err) {
  char message[496];
  shm_text t = {message, sizeof message};
  say(&t, "ranks disagree: ");
  say_own(&t, call);
  say(&t, "; rank %d: ", call->comm->ranks[peer]);
  say_record(&t, theirs);
  say(&t, ", sequence %llu against %llu; every rank must issue the same collectives in the same order",
      (unsigned long long)theirs->sequence, (unsigned long long)call->comm->sequence);
  return end_job(call, err, message);
}

phx_status shm_report_crossed(shm_call *call, int32_t peer, phx_error *err) {
  char message[496];
  shm_text t = {message, sizeof message};
  say(&t, "ranks wait for each other in different calls: ");
  say_own(&t, call);
  say(&t, "; ");
  say_flight(&t, call->comm->world->job, call->comm->ranks[peer]);
  say(&t, "; order them equally, or use split()");
  return end_job(call, err, message);
}

void shm_job_failure(const phx_job *job, char *text, size_t size) {
  shm_text t = {text, size};
  int32_t who = -1;
  for (int32_t r = 0; r < job->size && who < 0; r++) {
    if (__atomic_load_n(&job->ranks[r]->state, __ATOMIC_ACQUIRE) == 4) who = r;
  }
  if (who < 0)
    say(&t, "the job was ended");
  else
    say(&t, "rank %d failed: %.*s", who, (int)sizeof job->ranks[who]->message, job->ranks[who]->message);
}

phx_status shm_report_failed(shm_call *call, phx_error *err) {
  char message[496], why[300];
  shm_text t = {message, sizeof message};
  const phx_job *job = call->comm->world->job;
  say_own(&t, call);
  if (__atomic_load_n(job->failed, __ATOMIC_ACQUIRE)) {
    shm_job_failure(job, why, sizeof why);
    say(&t, ": given up, %s", why);
  } else {
    say(&t, ": given up, the communicator was aborted");
  }
  return shm_fail(err, PHX_COMM, "%s", message);
}
