/* comm_report.c - see kit_comm.h.  Several communicators of a rank may run at once, so the numbers of records are taken
 * with an atomic add; a record belongs to the thread that runs its call. */
#include <phalanx/kit_comm.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#define LOAD(p) __atomic_load_n(&(p), __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELAXED)

int64_t phx_kit_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void phx_kit_say(phx_kit_text *t, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(t->at, t->left, format, args);
  va_end(args);
  if (n < 0) return;
  size_t used = (size_t)n < t->left ? (size_t)n : t->left - 1;
  t->at += used;
  t->left -= used;
}

uint64_t phx_kit_flight_begin(const phx_job *job, const phx_kit_call *call, uint64_t sequence) {
  phx_liveness *page = job->mine;
  int64_t now = phx_kit_now_ns();
  uint64_t flight = __atomic_fetch_add(&page->n_flights, 1, __ATOMIC_RELAXED);
  phx_flight *f = &page->ring[flight % PHX_FLIGHT_RING];
  STORE(f->sequence, 0);
  STORE(f->comm, call->comm);
  STORE(f->bytes, call->numel * (int64_t)phx_dtype_bytes(call->dtype));
  STORE(f->begin_ns, now);
  STORE(f->end_ns, 0);
  STORE(f->op, call->op);
  STORE(f->unit, call->unit);
  __atomic_store_n(&f->sequence, sequence, __ATOMIC_RELEASE);
  STORE(page->heartbeat_ns, (uint64_t)now);
  return flight;
}
void phx_kit_flight_started(const phx_job *job, uint64_t flight, int64_t now_ns) {
  if (LOAD(job->mine->n_flights) - flight <= PHX_FLIGHT_RING)
    STORE(job->mine->ring[flight % PHX_FLIGHT_RING].begin_ns, now_ns);
}
void phx_kit_flight_end(const phx_job *job, uint64_t flight) {
  phx_liveness *page = job->mine;
  int64_t now = phx_kit_now_ns();
  if (LOAD(page->n_flights) - flight <= PHX_FLIGHT_RING) STORE(page->ring[flight % PHX_FLIGHT_RING].end_ns, now);
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

void phx_kit_say_call(phx_kit_text *t, const phx_kit_call *c) {
  phx_kit_say(t, "%s(", phx_op_name(c->op));
  if (c->op != PHX_OP_BARRIER && c->op != PHX_OP_SPLIT)
    phx_kit_say(t, "%lld %s", (long long)c->numel, dtype_name(c->dtype));
  if (c->op <= PHX_OP_REDUCE_SCATTER) phx_kit_say(t, ", %s", reduce_name(c->reduce));
  if (c->op == PHX_OP_REDUCE || c->op == PHX_OP_BROADCAST) phx_kit_say(t, ", root %d", c->root);
  if (c->op == PHX_OP_SEND || c->op == PHX_OP_RECV) phx_kit_say(t, ", peer %d", c->root);
  phx_kit_say(t, ")");
}

void phx_kit_say_own(phx_kit_text *t, int32_t rank, const phx_kit_call *c) {
  phx_kit_say(t, "rank %d: ", rank);
  phx_kit_say_call(t, c);
  phx_kit_say(t, ", call %llu of communicator %llu", (unsigned long long)c->number, (unsigned long long)c->comm);
  if (c->unit >= 0) phx_kit_say(t, ", unit %d", c->unit);
}

void phx_kit_say_rank(phx_kit_text *t, const phx_job *job, int32_t rank) {
  const phx_liveness *page = job->ranks[rank];
  uint64_t n = LOAD(page->n_flights);
  int64_t now = phx_kit_now_ns();
  phx_kit_say(t, "rank %d (pid %d) ", rank, LOAD(page->pid));
  if (n == 0) {
    const char *how = "has begun no collective";
    if (LOAD(page->start_ns) == 0) how = "is on another machine, and what it is in is not known here";
    if (LOAD(page->state) == PHX_RANK_ABSENT) how = "never came";
    phx_kit_say(t, "%s", how);
    return;
  }
  const phx_flight *f = &page->ring[(n - 1) % PHX_FLIGHT_RING];
  int64_t begin = LOAD(f->begin_ns), end = LOAD(f->end_ns);
  phx_kit_say(t, "%s %s, number %llu of communicator %llu", end ? "last finished" : "is in", phx_op_name(LOAD(f->op)),
              (unsigned long long)LOAD(f->sequence), (unsigned long long)LOAD(f->comm));
  if (LOAD(f->unit) >= 0) phx_kit_say(t, ", unit %d", LOAD(f->unit));
  phx_kit_say(t, end ? ", %.1f s ago" : ", for %.1f s", (double)(now - (end ? end : begin)) * 1e-9);
}

void phx_kit_job_failure(const phx_job *job, char *text, size_t size) {
  phx_kit_text t = {text, size};
  int32_t who = -1;
  for (int32_t r = 0; r < job->size && who < 0; r++) {
    if (__atomic_load_n(&job->ranks[r]->state, __ATOMIC_ACQUIRE) == PHX_RANK_FAILED) who = r;
  }
  if (who < 0)
    phx_kit_say(&t, "the job was ended");
  else
    phx_kit_say(&t, "rank %d failed: %.*s", who, (int)sizeof job->ranks[who]->message, job->ranks[who]->message);
}
