/* The cpu device: creation, memory, streams, events, errors, elementwise operations. */
#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "device_ops.h"
#include "random_array.h"

static device_ops f;
static const phx_device *d;
static void open_one(void) {
  cr_assert_eq(device_ops_open(&f, 1, NULL, &f.err), PHX_OK, "%s", f.err.message);
  d = f.device;
}
static void close_one(void) {
  device_ops_close(&f);
}
TestSuite(cpu_device, .init = open_one, .fini = close_one, .timeout = 60);

Test(cpu_device, descriptor_and_name) {
  const phx_plugin *p = fake_host_plugin("phx_device_cpu.so");
  cr_assert_eq(p, fake_host_plugin("phx_device_cpu.so"));
  cr_assert_eq(p->kind, PHX_KIND_DEVICE);
  cr_assert_str_eq(p->id, "cpu");
  cr_assert_eq(f.table->probe(&f.err), PHX_OK);
  cr_assert_eq(strncmp(d->name, "cpu (", 5), 0);
  cr_assert(strstr(d->name, "1 thread, oneDNN "), "%s", d->name);
  cr_assert_eq(d->caps & PHX_DEVICE_HOST_MEMORY, PHX_DEVICE_HOST_MEMORY);
  cr_assert_eq(d->threads, 1);
  cr_assert_gt(f.ops->scratch_bytes, 0);
  cr_assert_null(d->native_stream(d->ctx, NULL));
}

Test(cpu_device, bad_creations_are_refused) {
  device_ops g;
  cr_assert_eq(device_ops_open(&g, 0, NULL, &g.err), PHX_INVALID);
  cr_assert(strstr(g.err.message, "threads is 0"), "%s", g.err.message);
  cr_assert_eq(device_ops_open(&g, 1, "sse9", &g.err), PHX_INVALID);
  cr_assert(strstr(g.err.message, "sse9"), "%s", g.err.message);
  cr_assert_null(g.self);
}

/* ---- memory ---- */
static void check_memory(int64_t bytes) {
  void *p = NULL;
  cr_assert_eq(f.table->alloc(f.self, PHX_SPACE_DEVICE, bytes, &p, &f.err), PHX_OK, "%s", f.err.message);
  cr_assert_eq((uintptr_t)p % PHX_ALIGN, 0);
  const int64_t pages = (bytes + 4095) / 4096;
  unsigned char *in_core = calloc(1, (size_t)pages);
  cr_assert_eq(mincore(p, (size_t)bytes, in_core), 0);
  for (int64_t i = 0; i < pages; i++) cr_assert_eq(in_core[i] & 1, 1, "page %lld was not touched", (long long)i);
  free(in_core);
  for (int64_t i = 0; i < bytes; i++) cr_assert_eq(((char *)p)[i], 0);
  memset(p, 1, (size_t)bytes);
  f.table->free(f.self, PHX_SPACE_DEVICE, p, bytes);
}

Test(cpu_device, memory_is_zero_aligned_and_touched) {
  for (int turn = 0; turn < 2; turn++) { /* the second turn gets what the first gave back */
    check_memory(1);
    check_memory(4097);
    check_memory((2 << 20) + 13);
    check_memory(5 << 20);
  }
  cr_assert_eq(f.fake.logs, 1, "the page size is logged once, was %d times", f.fake.logs);
  cr_assert(strstr(f.fake.last_log, "pages"), "%s", f.fake.last_log);
}

Test(cpu_device, memory_that_does_not_fit_is_refused) {
  void *p = &f;
  cr_assert_eq(f.table->alloc(f.self, PHX_SPACE_DEVICE, 0, &p, &f.err), PHX_INVALID);
  cr_assert_eq(f.table->alloc(f.self, 7, 4096, &p, &f.err), PHX_INVALID);
  cr_assert_eq(f.table->alloc(f.self, PHX_SPACE_DEVICE, (int64_t)1 << 56, &p, &f.err), PHX_NOMEM);
  cr_assert_eq(p, &f, "output written only on success");
}

/* ---- streams ---- */
typedef struct step {
  int *log, *count, value, sleep_ms;
  phx_status status;
} step;
static phx_status run_step(void *arg, phx_error *err) {
  step *s = arg;
  if (s->sleep_ms) nanosleep(&(struct timespec){0, s->sleep_ms * 1000000L}, NULL);
  if (s->log) s->log[(*s->count)++] = s->value;
  if (s->status != PHX_OK && err) {
    strcpy(err->message, "step failed");
    err->code = s->status;
  }
  return s->status;
}

Test(cpu_device, compute_stream_runs_inline) {
  int log[4], count = 0;
  step s = {log, &count, 7, 0, PHX_OK};
  cr_assert_eq(d->enqueue(d->ctx, NULL, run_step, &s, &f.err), PHX_OK);
  cr_assert_eq(count, 1);
  s.status = PHX_IO;
  cr_assert_eq(d->enqueue(d->ctx, NULL, run_step, &s, &f.err), PHX_IO);
  cr_assert_str_eq(f.err.message, "step failed");
  phx_event *e = NULL;
  cr_assert_eq(d->event_create(d->ctx, &e, &f.err), PHX_OK);
  cr_assert_eq(d->event_done(d->ctx, e), 1, "never recorded: complete");
  cr_assert_eq(d->event_synchronize(d->ctx, e, &f.err), PHX_OK);
  cr_assert_eq(d->event_record(d->ctx, e, NULL, &f.err), PHX_OK);
  cr_assert_eq(d->event_done(d->ctx, e), 1);
  d->event_destroy(d->ctx, e);
}

Test(cpu_device, stream_keeps_order_beyond_its_ring) {
  enum { N = 1000 };
  static int log[N];
  static step steps[N];
  int count = 0;
  phx_stream *s = NULL;
  cr_assert_eq(d->stream_create(d->ctx, "order", &s, &f.err), PHX_OK);
  for (int i = 0; i < N; i++) {
    steps[i] = (step){log, &count, i, i == 0 ? 20 : 0, PHX_OK};
    cr_assert_eq(d->enqueue(d->ctx, s, run_step, &steps[i], &f.err), PHX_OK);
  }
  cr_assert_eq(d->stream_synchronize(d->ctx, s, &f.err), PHX_OK);
  cr_assert_eq(count, N);
  for (int i = 0; i < N; i++) cr_assert_eq(log[i], i);
  d->stream_destroy(d->ctx, s);
}

Test(cpu_device, destroy_waits_for_work) {
  int log[1], count = 0;
  step s = {log, &count, 1, 30, PHX_OK};
  phx_stream *stream = NULL;
  cr_assert_eq(d->stream_create(d->ctx, "a-name-that-is-longer-than-threads-may-have", &stream, &f.err), PHX_OK);
  cr_assert_eq(d->enqueue(d->ctx, stream, run_step, &s, &f.err), PHX_OK);
  d->stream_destroy(d->ctx, stream);
  cr_assert_eq(count, 1);
}

Test(cpu_device, events_order_two_streams) {
  int log[300], count = 0;
  phx_stream *a = NULL, *b = NULL;
  phx_event *e = NULL, *back = NULL;
  static step first[100], second[100];
  cr_assert_eq(d->stream_create(d->ctx, "a", &a, &f.err), PHX_OK);
  cr_assert_eq(d->stream_create(d->ctx, "b", &b, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &e, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &back, &f.err), PHX_OK);
  for (int i = 0; i < 100; i++) { /* log and count are shared without a lock: the events alone order them */
    first[i] = (step){log, &count, 2 * i, i % 50 == 0 ? 5 : 0, PHX_OK};
    second[i] = (step){log, &count, 2 * i + 1, i % 50 == 25 ? 5 : 0, PHX_OK};
    cr_assert_eq(d->stream_wait(d->ctx, a, back, &f.err), PHX_OK);
    cr_assert_eq(d->enqueue(d->ctx, a, run_step, &first[i], &f.err), PHX_OK);
    cr_assert_eq(d->event_record(d->ctx, e, a, &f.err), PHX_OK);
    cr_assert_eq(d->stream_wait(d->ctx, b, e, &f.err), PHX_OK);
    cr_assert_eq(d->enqueue(d->ctx, b, run_step, &second[i], &f.err), PHX_OK);
    cr_assert_eq(d->event_record(d->ctx, back, b, &f.err), PHX_OK);
  }
  cr_assert_eq(d->stream_wait(d->ctx, NULL, back, &f.err), PHX_OK);
  cr_assert_eq(d->event_done(d->ctx, back), 1);
  cr_assert_eq(count, 200);
  for (int i = 0; i < 200; i++) cr_assert_eq(log[i], i);
  d->event_destroy(d->ctx, e);
  d->event_destroy(d->ctx, back);
  d->stream_destroy(d->ctx, a);
  d->stream_destroy(d->ctx, b);
}

/* A record on a fast stream must not complete the older one on a slow stream. */
Test(cpu_device, event_recorded_on_another_stream_keeps_its_order) {
  int log[1], count = 0;
  step slow = {log, &count, 1, 50, PHX_OK};
  phx_stream *a = NULL, *b = NULL;
  phx_event *e = NULL;
  cr_assert_eq(d->stream_create(d->ctx, "a", &a, &f.err), PHX_OK);
  cr_assert_eq(d->stream_create(d->ctx, "b", &b, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &e, &f.err), PHX_OK);
  cr_assert_eq(d->enqueue(d->ctx, a, run_step, &slow, &f.err), PHX_OK);
  cr_assert_eq(d->event_record(d->ctx, e, a, &f.err), PHX_OK);
  cr_assert_eq(d->event_done(d->ctx, e), 0);
  cr_assert_eq(d->event_record(d->ctx, e, b, &f.err), PHX_OK);
  cr_assert_eq(d->event_synchronize(d->ctx, e, &f.err), PHX_OK);
  cr_assert_eq(count, 1);
  d->event_destroy(d->ctx, e);
  d->stream_destroy(d->ctx, a);
  d->stream_destroy(d->ctx, b);
}

Test(cpu_device, failures_are_kept_and_travel_with_events) {
  int log[8], count = 0;
  step good = {log, &count, 1, 0, PHX_OK}, bad = {log, &count, 2, 0, PHX_COMM}, later = {log, &count, 3, 0, PHX_OK};
  phx_stream *s = NULL, *other = NULL;
  phx_event *e = NULL;
  cr_assert_eq(d->stream_create(d->ctx, "s", &s, &f.err), PHX_OK);
  cr_assert_eq(d->stream_create(d->ctx, "other", &other, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &e, &f.err), PHX_OK);
  d->enqueue(d->ctx, s, run_step, &good, &f.err);
  cr_assert_eq(d->enqueue(d->ctx, s, run_step, &bad, &f.err), PHX_OK, "the failure comes later");
  d->enqueue(d->ctx, s, run_step, &later, &f.err);
  d->event_record(d->ctx, e, s, &f.err);
  cr_assert_eq(d->event_synchronize(d->ctx, e, &f.err), PHX_COMM);
  cr_assert_str_eq(f.err.message, "step failed");
  cr_assert_eq(f.err.code, PHX_COMM);
  cr_assert_eq(count, 2, "what follows a failure is skipped");
  cr_assert_eq(d->stream_wait(d->ctx, NULL, e, NULL), PHX_COMM);
  cr_assert_eq(d->stream_wait(d->ctx, other, e, &f.err), PHX_OK);
  cr_assert_eq(d->stream_synchronize(d->ctx, other, &f.err), PHX_COMM, "a waiting stream inherits it");
  cr_assert_eq(d->stream_synchronize(d->ctx, s, &f.err), PHX_COMM);
  cr_assert_eq(d->stream_synchronize(d->ctx, s, &f.err), PHX_OK, "returned once");
  d->enqueue(d->ctx, s, run_step, &later, &f.err);
  d->event_record(d->ctx, e, s, &f.err);
  cr_assert_eq(d->event_synchronize(d->ctx, e, &f.err), PHX_OK);
  cr_assert_eq(count, 3);
  d->event_destroy(d->ctx, e);
  d->stream_destroy(d->ctx, s);
  d->stream_destroy(d->ctx, other);
}

/* Events behind a failure still mean what they say. */
Test(cpu_device, a_failed_stream_still_waits) {
  int log[2], count = 0;
  step bad = {NULL, NULL, 0, 0, PHX_IO}, slow = {log, &count, 1, 50, PHX_OK};
  phx_stream *s = NULL, *other = NULL;
  phx_event *e = NULL, *behind = NULL;
  cr_assert_eq(d->stream_create(d->ctx, "s", &s, &f.err), PHX_OK);
  cr_assert_eq(d->stream_create(d->ctx, "other", &other, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &e, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &behind, &f.err), PHX_OK);
  d->enqueue(d->ctx, s, run_step, &bad, &f.err);
  d->enqueue(d->ctx, other, run_step, &slow, &f.err);
  d->event_record(d->ctx, e, other, &f.err);
  d->stream_wait(d->ctx, s, e, &f.err);
  d->event_record(d->ctx, behind, s, &f.err);
  cr_assert_eq(d->event_synchronize(d->ctx, behind, &f.err), PHX_IO);
  cr_assert_eq(count, 1, "the event completed before the work it stands behind");
  d->event_destroy(d->ctx, e);
  d->event_destroy(d->ctx, behind);
  d->stream_destroy(d->ctx, s);
  d->stream_destroy(d->ctx, other);
}

Test(cpu_device, operations_on_a_thread_stream_follow_its_work) {
  float x[100], by_two[100];
  int count = 0, log[1];
  step slow = {log, &count, 1, 20, PHX_OK};
  phx_stream *s = NULL;
  for (int i = 0; i < 100; i++) x[i] = (float)i;
  cr_assert_eq(d->stream_create(d->ctx, "s", &s, &f.err), PHX_OK);
  d->enqueue(d->ctx, s, run_step, &slow, &f.err);
  d->copy(d->ctx, by_two, x, sizeof x, s, &f.err);
  d->scale(d->ctx, by_two, 2.0f, 100, s, &f.err);
  cr_assert_eq(f.ops->add(f.ops->ctx, PHX_F32, x, x, by_two, 100, s, &f.err), PHX_OK);
  for (int i = 0; i < 100; i++) cr_assert_eq(x[i], 3.0f * (float)i);
  d->zero(d->ctx, x, sizeof x, s, &f.err);
  d->add(d->ctx, x, by_two, 100, s, &f.err);
  cr_assert_eq(d->stream_synchronize(d->ctx, s, &f.err), PHX_OK);
  for (int i = 0; i < 100; i++) cr_assert_eq(x[i], 2.0f * (float)i);
  d->stream_destroy(d->ctx, s);
}

static _Atomic int asked;
static void *ask_event(void *arg) {
  while (!d->event_done(d->ctx, arg)) {
    atomic_fetch_add(&asked, 1);
    nanosleep(&(struct timespec){0, 1000000}, NULL);
  }
  return NULL;
}
Test(cpu_device, any_thread_may_ask_an_event) {
  step slow = {NULL, NULL, 0, 30, PHX_OK};
  phx_stream *s = NULL;
  phx_event *e = NULL;
  pthread_t thread;
  cr_assert_eq(d->stream_create(d->ctx, "s", &s, &f.err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &e, &f.err), PHX_OK);
  d->enqueue(d->ctx, s, run_step, &slow, &f.err);
  d->event_record(d->ctx, e, s, &f.err);
  cr_assert_eq(pthread_create(&thread, NULL, ask_event, e), 0);
  pthread_join(thread, NULL);
  cr_assert_gt(atomic_load(&asked), 0);
  d->event_destroy(d->ctx, e);
  d->stream_destroy(d->ctx, s);
}

/* A waiting stream must leave the core to the rank: it may use next to no processor time. */
Test(cpu_device, streams_sleep) {
  step slow = {NULL, NULL, 0, 200, PHX_OK};
  phx_stream *s = NULL;
  struct timespec before, after;
  cr_assert_eq(d->stream_create(d->ctx, "s", &s, &f.err), PHX_OK);
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  d->enqueue(d->ctx, s, run_step, &slow, &f.err);
  cr_assert_eq(d->stream_synchronize(d->ctx, s, &f.err), PHX_OK);
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const double used = (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
  cr_assert_lt(used, 0.05, "%g s", used);
  d->stream_destroy(d->ctx, s);
}

/* ---- casts ---- */
static float cast_to_float(uint16_t h, int32_t dtype) {
  float x = NAN;
  cr_assert_eq(d->cast(d->ctx, &x, PHX_F32, &h, dtype, 1, NULL, &f.err), PHX_OK);
  return x;
}
static uint16_t cast_from_float(float x, int32_t dtype) {
  uint16_t h = 0xdead;
  cr_assert_eq(d->cast(d->ctx, &h, dtype, &x, PHX_F32, 1, NULL, &f.err), PHX_OK);
  return h;
}
/* The value of a 16-bit float by its definition. */
static double value_of(unsigned h, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int e = (int)(h >> mantissa_bits) & top, m = (int)(h & ((1u << mantissa_bits) - 1u));
  const double sign = h & 0x8000u ? -1.0 : 1.0;
  if (e == top) return m ? NAN : sign * INFINITY;
  return sign * (e ? ldexp(m + (1 << mantissa_bits), e - bias - mantissa_bits) : ldexp(m, 1 - bias - mantissa_bits));
}
static void check_cast(int32_t dtype, int exponent_bits, int mantissa_bits) {
  const unsigned top = ((1u << exponent_bits) - 1u) << mantissa_bits; /* infinity */
  for (unsigned h = 0; h < 0x10000u; h++) {
    const double want = value_of(h, exponent_bits, mantissa_bits);
    const float x = cast_to_float((uint16_t)h, dtype);
    if (isnan(want)) {
      cr_assert(isnan(x) && isnan(cast_to_float(cast_from_float(x, dtype), dtype)), "%04x", h);
      continue;
    }
    cr_assert_eq((double)x, want, "%04x: %g, not %g", h, (double)x, want);
    cr_assert_eq(signbit(x) != 0, h >> 15);
    cr_assert_eq(cast_from_float(x, dtype), h, "%04x does not come back", h);
    if ((h & 0x7fffu) + 1u >= top) continue;
    /* the middle to the next one goes to the even one, a little more or less to the nearer one */
    const float middle = (float)((want + value_of(h + 1u, exponent_bits, mantissa_bits)) / 2);
    const float away = signbit(x) ? -INFINITY : INFINITY;
    cr_assert_eq(cast_from_float(middle, dtype), (uint16_t)(h + (h & 1u)), "middle above %04x", h);
    cr_assert_eq(cast_from_float(nextafterf(middle, away), dtype), (uint16_t)(h + 1u), "above the middle of %04x", h);
    cr_assert_eq(cast_from_float(nextafterf(middle, -0.0f), dtype), (uint16_t)h, "below the middle of %04x", h);
  }
  cr_assert_eq(cast_from_float(FLT_MAX, dtype), top);
  cr_assert_eq(cast_from_float(-INFINITY, dtype), top | 0x8000u);
}
Test(cpu_device, casts_round_to_nearest_even) {
  check_cast(PHX_F16, 5, 10);
  check_cast(PHX_BF16, 8, 7);
  float x = 1.5f, y = 0;
  cr_assert_eq(d->cast(d->ctx, &y, PHX_F32, &x, PHX_F32, 1, NULL, &f.err), PHX_OK);
  cr_assert_eq(y, 1.5f);
  uint16_t h = cast_from_float(-2.5f, PHX_BF16), g = 0;
  cr_assert_eq(d->cast(d->ctx, &g, PHX_F16, &h, PHX_BF16, 1, NULL, &f.err), PHX_OK);
  cr_assert_eq(cast_to_float(g, PHX_F16), -2.5f);
  cr_assert_eq(d->cast(d->ctx, &y, PHX_F32, &x, PHX_I32, 1, NULL, &f.err), PHX_UNSUPPORTED);
}

/* ---- slicing: whole arrays against random pieces, at any alignment, on every instruction set ---- */
enum { N = 5003 };
typedef struct slices {
  float w[N], m[N], v[N], sum[N], s[N];
  uint16_t bf16[N], f16[N];
  double norms[4];
} slices;

/* In the forked process, where the test library's assertions would not reach the test. */
static void must(int ok) {
  if (!ok) _exit(3);
}

static void run_piece(device_ops *x, slices *o, const float *g, int64_t at, int64_t n) {
  const phx_ops *ops = x->ops;
  const phx_device *dev = x->device;
  must(ops->adamw(ops->ctx, o->w + at, g + at, o->m + at, o->v + at, o->bf16 + at, PHX_BF16, n, 0.37f, 3e-3f, 0.9f,
                  0.95f, 0.1f, 0.05f, 1e-8f, 0.1f, NULL, &x->err) == PHX_OK);
  must(ops->sgd(ops->ctx, o->s + at, g + at, o->f16 + at, PHX_F16, n, 0.7f, 0.01f, 0.1f, NULL, &x->err) == PHX_OK);
  must(ops->add(ops->ctx, PHX_F32, o->sum + at, o->w + at, g + at, n, NULL, &x->err) == PHX_OK);
  must(dev->scale(dev->ctx, o->sum + at, 1.1f, n, NULL, &x->err) == PHX_OK);
  must(dev->add(dev->ctx, o->sum + at, g + at, n, NULL, &x->err) == PHX_OK);
}

static void run_slices(const char *isa, int pieces, uint64_t seed, slices *o) {
  device_ops x;
  uint64_t state = 42;
  must(device_ops_open(&x, 1, isa, &x.err) == PHX_OK);
  float *g = random_array(N, 1e-2f, &state);
  for (int i = 0; i < N; i++) {
    o->w[i] = random_float(&state);
    o->m[i] = 1e-2f * random_float(&state);
    o->v[i] = 1e-4f * fabsf(random_float(&state));
    o->s[i] = o->w[i];
  }
  if (!pieces) run_piece(&x, o, g, 0, N);
  for (int64_t at = 0, n; pieces && at < N; at += n) {
    seed = seed * 6364136223846793005ull + 1;
    n = 1 + (int64_t)(seed >> 33) % (seed >> 62 ? 97 : 1500);
    if (n > N - at) n = N - at;
    run_piece(&x, o, g, at, n);
  }
  must(x.ops->block_norms(x.ops->ctx, o->norms, o->sum + 1, 4, NULL, &x.err) == PHX_OK);
  free(g);
  device_ops_close(&x);
}

/* In a process of its own: oneDNN's instruction set is fixed once in a process. */
static void run_apart(const char *isa, int pieces, uint64_t seed, slices *shared) {
  const pid_t child = fork();
  if (child == 0) {
    run_slices(isa, pieces, seed, shared);
    _exit(0);
  }
  int status = -1;
  cr_assert_eq(waitpid(child, &status, 0), child);
  cr_assert_eq(status, 0, "isa %s", isa);
}

Test(cpu_isa, slices_and_instruction_sets_give_equal_bits, .timeout = 60) { /* a suite without a device of its own */
  slices *whole = mmap(NULL, 2 * sizeof *whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  cr_assert_neq(whole, MAP_FAILED);
  slices *other = whole + 1;
  run_apart("base", 0, 0, whole);
  cr_assert(isfinite(whole->w[N - 1]) && whole->norms[3] > 0);
  const char *isas[] = {"base", "avx2", "avx512"};
  const int sets = device_ops_sets();
  for (int i = 0; i < sets; i++)
    for (int pieces = 0; pieces < 6; pieces++) {
      memset(other, 0xff, sizeof *other);
      run_apart(isas[i], pieces, (uint64_t)pieces * 1234567u, other);
      cr_assert_eq(memcmp(whole, other, sizeof *whole), 0, "isa %s, slicing %d", isas[i], pieces);
    }
  munmap(whole, 2 * sizeof *whole);
}

Test(cpu_device, lower_instruction_set_is_refused_after_products) {
  float a[16] = {1}, b[16] = {1}, c[16];
  device_ops g;
  if (strstr(d->name, "base")) return;
  cr_assert_eq(f.ops->linear(f.ops->ctx, PHX_F32, c, 0, NULL, a, b, NULL, 4, 4, 4, 0, NULL, &f.err), PHX_OK);
  cr_assert_eq(device_ops_open(&g, 1, "base", &g.err), PHX_STATE);
  cr_assert(strstr(g.err.message, "too late"), "%s", g.err.message);
}
