/* The cuda device on the processor: the plugin's own sources against the double of the CUDA runtime (inline, and with
 * streams as threads) and of cuBLASLt.  What only a GPU can show is in tests/gpu. */
#include <criterion/criterion.h>
#include <phalanx/error.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "cublaslt_double.h"
#include "cuda_double.h"
#include "device_ops.h"
#include "fake_host.h"
#include "fake_job.h"
#include "ops_suite.h"
#include "plugin_file.h"
#include "said.h"
#include "sanitizer.h"

#define MIB ((int64_t)1 << 20)
typedef struct config { /* as in plugins/cuda/cuda.h; its size is checked */
  int32_t share, tf32, attention, profile;
  int64_t workspace;
} config;
enum { OWN_ATTENTION = 2 }; /* [cuda] attention = own: cuDNN is in test_cuda_cudnn.c */

typedef struct rig {
  fake_host fake;
  const phx_device_table *table;
  phx_device_self *self;
  const phx_device *device;
  const phx_ops *ops;
  config config;
  phx_error err;
} rig;

static const phx_plugin *cuda_plugin(void) {
  phx_error err = {.struct_size = sizeof err};
  const phx_plugin *plugin = plugin_file_open(PHX_TEST_BUILD "/lib/phalanx-emulated/phx_device_cuda.so", &err);
  cr_assert_not_null(plugin, "%s", err.message);
  cr_assert_eq(plugin->config_size, sizeof(config));
  return plugin;
}

static void use(int threads, int devices, int guard) {
  cuda_double_config c = cuda_double_defaults();
  c.threads = threads;
  c.devices = devices;
  c.guard = guard; /* keeps the host out of device memory, for a price */
  cuda_double_configure(&c);
  cublaslt_double = (cublaslt_double_state){.reduction_mask = 7};
}

static phx_status rig_open(rig *r, int32_t rank, int32_t ranks) {
  if (!r->table) { /* the rest is the caller's wish */
    fake_host_init(&r->fake, rank, ranks);
    r->table = cuda_plugin()->table;
    r->err.struct_size = sizeof r->err;
    if (!r->config.workspace) r->config.workspace = 1 * MIB;
    r->config.attention = OWN_ATTENTION;
  }
  PHX_TRY(r->table->create(&r->fake.host, &r->config, 1, &r->self, &r->err));
  r->device = r->table->device(r->self);
  r->ops = r->table->ops(r->self);
  return PHX_OK;
}
static void rig_close(rig *r) {
  if (r->self) r->table->destroy(r->self);
  r->self = NULL;
  const cuda_double_stats stats = cuda_double_read();
  cr_expect_eq(stats.device_blocks, 0);
  cr_expect_eq(stats.pinned_blocks, 0);
  cr_expect_eq(stats.streams, 0);
  cr_expect_eq(stats.events, 0);
  cr_expect_eq(stats.overruns, 0);
  cr_expect_eq(cublaslt_double.alive, 0);
}

/* ---- operations ---- */
static void suite(int threads, int32_t dtype, int refuse, int deterministic, int guard) {
  rig r = {0};
  use(threads, 1, guard);
  cublaslt_double.refuse = refuse;
  fake_host_init(&r.fake, 0, 1);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  r.fake.host.deterministic = deterministic;
  const ops_suite s = {r.table, r.self, ops_suite_seed(), 1, getenv("PHX_TEST_PRINT") != NULL};
  cr_expect_eq(ops_suite_run(&s, dtype), 0, "see above");
  cr_expect_eq(cublaslt_double.reduction_mask, deterministic ? 2 : 7);
  cr_expect_eq(cublaslt_double.bf16_masks, dtype == PHX_BF16 ? 2 : 0, "partial sums are not rounded to bf16");
  rig_close(&r);
}

#if !UNDER_TSAN /* there, only what has threads */
Test(cuda, operations_fp32, .timeout = 300) { suite(0, PHX_F32, 0, 0, 1); }
Test(cuda, operations_bf16_without_epilogues, .timeout = 300) { suite(0, PHX_BF16, ~0, 1, 0); }
#if !UNDER_ASAN /* ten times as long there, and the memory that they touch is that of the others */
Test(cuda, operations_bf16, .timeout = 300) { suite(0, PHX_BF16, 0, 0, 0); }
Test(cuda, operations_fp32_without_epilogues, .timeout = 300) { suite(0, PHX_F32, ~0, 1, 0); }
Test(cuda, operations_with_threads_run_downwards, .timeout = 300) {
  setenv("PHX_CUDA_DOUBLE_ORDER", "down", 1);
  suite(0, PHX_F32, 0, 0, 0);
}
#endif
#endif
Test(cuda, operations_on_stream_threads, .timeout = 300) { suite(1, PHX_BF16, 0, 0, 0); }

/* AdamW's bits are the cpu device's, under any slicing and at any element of an array. */
enum { ELEMENTS = 3001 };
static void fill_state(float *x, uint64_t seed) {
  for (int i = 0; i < 4 * ELEMENTS; i++) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    x[i] = (float)((double)(seed >> 40) / 8388608.0 - (i < 3 * ELEMENTS ? 1.0 : 0.0));
  }
}
static phx_status step(const phx_ops *o, float *x, void *low, int64_t at, int64_t n, phx_error *err) {
  return o->adamw(o->ctx, x + at, x + ELEMENTS + at, x + 2 * ELEMENTS + at, x + 3 * ELEMENTS + at,
                  (uint16_t *)low + at, PHX_BF16, n, 0.7f, 1e-2f, 0.9f, 0.95f, 0.271f, 0.142f, 1e-8f, 0.1f, NULL, err);
}
Test(cuda, adamw_has_the_cpus_bits_under_any_slicing, .timeout = 60) {
  static float want[4 * ELEMENTS];
  static uint16_t want_low[ELEMENTS];
  static const int64_t cuts[][3] = {{0, 0, 0}, {1, 7, 2000}, {3, 1026, 1027}, {2048, 2049, 3000}};
  device_ops cpu;
  rig r = {0};
  use(0, 1, 0);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  cr_assert_eq(device_ops_open(&cpu, 1, NULL, &r.err), PHX_OK, "%s", r.err.message);
  fill_state(want, 5);
  cr_assert_eq(step(cpu.ops, want, want_low, 0, ELEMENTS, &r.err), PHX_OK);
  device_ops_close(&cpu);
  for (int c = 0; c < 4; c++) {
    void *x, *low;
    cr_assert_eq(r.table->alloc(r.self, PHX_SPACE_DEVICE, sizeof want, &x, &r.err), PHX_OK);
    cr_assert_eq(r.table->alloc(r.self, PHX_SPACE_DEVICE, sizeof want_low, &low, &r.err), PHX_OK);
    fill_state(x, 5); /* no guard in this test */
    int64_t at = 0;
    for (int i = 0; i < 4; i++) {
      const int64_t to = i < 3 ? cuts[c][i] : ELEMENTS;
      cr_assert_eq(step(r.ops, x, low, at, to - at, &r.err), PHX_OK, "%s", r.err.message);
      at = to;
    }
    cr_assert_eq(r.device->stream_synchronize(r.device->ctx, NULL, &r.err), PHX_OK);
    cr_expect_eq(memcmp(x, want, sizeof want), 0, "cut %d", c);
    cr_expect_eq(memcmp(low, want_low, sizeof want_low), 0, "cut %d", c);
    r.table->free(r.self, PHX_SPACE_DEVICE, x, sizeof want);
    r.table->free(r.self, PHX_SPACE_DEVICE, low, sizeof want_low);
  }
  rig_close(&r);
}

/* ---- which GPU ---- */
Test(cuda, a_rank_without_a_gpu_is_refused_unless_it_may_share, .timeout = 60) {
  rig r = {0};
  use(0, 2, 1);
  fake_host_init(&r.fake, 2, 3);
  cr_assert_eq(rig_open(&r, 2, 3), PHX_UNSUPPORTED);
  cr_expect(strstr(r.err.message, "rank 2") && strstr(r.err.message, "share = yes"), "%s", r.err.message);
  cr_expect_eq(r.table->shared(&r.config), 0); /* by which [comm] plugin = auto is chosen */
  r.config.share = 1;
  cr_expect_eq(r.table->shared(&r.config), 1);
  cr_assert_eq(rig_open(&r, 2, 3), PHX_OK, "%s", r.err.message);
  cr_expect(strncmp(r.device->name, "cuda:0 ", 7) == 0, "%s", r.device->name);
  cr_expect(strstr(r.fake.last_log, "share this GPU"), "%s", r.fake.last_log);
  cr_expect_eq(r.table->driver_bytes(r.self), -1, "others' bytes are not ours");
  rig_close(&r);
}

Test(cuda, local_rank_takes_its_gpu, .timeout = 60) {
  rig r = {0};
  use(0, 4, 1);
  setenv("CUDA_VISIBLE_DEVICES", "3,1", 1);
  cr_assert_eq(rig_open(&r, 1, 2), PHX_OK, "%s", r.err.message);
  cr_expect(strncmp(r.device->name, "cuda:1 ", 7) == 0, "%s", r.device->name);
  rig_close(&r);
}

/* A launcher that shows each rank one GPU: they are told apart by where they are, not by how many are seen. */
static void take_one(fake_rank *rank) {
  const char *const *list = rank->arg;
  const config c = {.attention = OWN_ATTENTION, .workspace = 1 * MIB};
  const phx_device_table *table = cuda_plugin()->table;
  phx_device_self *self = NULL;
  phx_error err = {.struct_size = sizeof err};
  setenv("CUDA_VISIBLE_DEVICES", list[rank->job.rank], 1);
  const phx_status status = table->create(&rank->host, &c, 1, &self, &err);
  if (strcmp(list[0], list[1]) == 0) {
    FAKE_CHECK(rank, status == PHX_UNSUPPORTED, "status %d", status);
    FAKE_CHECK(rank, strstr(err.message, "share = yes"), "%s", err.message);
    return;
  }
  FAKE_CHECK(rank, status == PHX_OK, "%s", err.message);
  FAKE_CHECK(rank, strncmp(table->device(self)->name, "cuda:0 ", 7) == 0, "%s", table->device(self)->name);
  FAKE_CHECK(rank, table->driver_bytes(self) >= 0, "nobody shares it");
  table->destroy(self);
}
Test(cuda, a_gpu_per_rank_may_be_all_that_each_sees, .timeout = 60) {
  static const char *const lists[][2] = {{"1", "0"}, {"1", "1"}};
  for (int i = 0; i < 2; i++) {
    static fake_result result;
    fake_setup s = {.n = 2, .timeout_s = 20, .limit_s = 30, .share_bytes = 1 * MIB, .arg = (void *)lists[i]};
    use(0, 2, 1);
    cr_assert(fake_job_run(&s, take_one, &result));
    cr_expect_eq(fake_job_report(&result, 2)[0], 0, "%s", fake_job_report(&result, 2));
  }
}

static void check_probe(cuda_double_config c, const char *reason) {
  const phx_device_table *table = cuda_plugin()->table;
  phx_error err = {.struct_size = sizeof err};
  cuda_double_configure(&c);
  cr_assert_eq(table->probe(&err), reason ? PHX_UNSUPPORTED : PHX_OK, "%s", err.message);
  if (reason) cr_expect(strstr(err.message, reason), "%s", err.message);
}
Test(cuda, probe_says_why_not, .timeout = 60) {
  cuda_double_config c = cuda_double_defaults();
  check_probe(c, NULL);
  c.capability = 75;
  check_probe(c, "compute capability 7.5");
  c.devices = 0;
  check_probe(c, "no GPU");
  c.driver = cudaErrorInsufficientDriver;
  check_probe(c, "no NVIDIA driver");
  check_probe(cuda_double_defaults(), NULL);
}

/* ---- memory ---- */
Test(cuda, memory_is_zero_aligned_and_counted, .timeout = 60) {
  rig r = {0};
  void *p[3];
  use(0, 1, 0);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  cr_expect_eq(cuda_double_read().device_bytes, 0, "nothing before the first alloc");
  cr_expect_eq(r.table->driver_bytes(r.self), 0);
  for (int32_t space = 0; space < 3; space++) {
    cr_assert_eq(r.table->alloc(r.self, space, 1000, &p[space], &r.err), PHX_OK, "%s", r.err.message);
    cr_expect_eq((uintptr_t)p[space] % PHX_ALIGN, 0);
    for (int i = 0; i < 1000; i++) cr_assert_eq(((char *)p[space])[i], 0);
  }
  cr_expect_eq(r.table->driver_bytes(r.self), r.ops->scratch_bytes + 1000);
  cr_expect_eq(r.table->alloc(r.self, 0, (int64_t)1 << 40, &p[0], &r.err), PHX_NOMEM);
  cr_expect(strstr(r.err.message, "MiB are free"), "%s", r.err.message);
  for (int32_t space = 0; space < 3; space++) r.table->free(r.self, space, p[space], 1000);
  rig_close(&r);
}

/* ---- streams ---- */
typedef struct note {
  int *list, *n, number;
  int32_t fail;
} note;
static phx_status write_note(void *arg, phx_error *err) {
  note *x = arg;
  usleep(2000);
  x->list[(*x->n)++] = x->number;
  return x->fail ? phx_fail(err, PHX_COMM, "note %d", x->number) : PHX_OK;
}

static void host_functions(int threads) {
  rig r = {0};
  int list[16], n = 0;
  note notes[4] = {{list, &n, 0, 0}, {list, &n, 1, 0}, {list, &n, 2, 1}, {list, &n, 3, 0}};
  phx_stream *a, *b;
  phx_event *e;
  float *pinned, *device;
  use(threads, 1, 1);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  const phx_device *d = r.device;
#define DO(call) cr_assert_eq(call, PHX_OK, "%s", r.err.message)
  DO(d->stream_create(d->ctx, "a", &a, &r.err));
  DO(d->stream_create(d->ctx, "b", &b, &r.err));
  DO(d->event_create(d->ctx, &e, &r.err));
  cr_expect_eq(d->event_done(d->ctx, e), 1, "never recorded");
  DO(r.table->alloc(r.self, PHX_SPACE_PINNED, 1024, (void **)&pinned, &r.err));
  DO(r.table->alloc(r.self, PHX_SPACE_DEVICE, 1024, (void **)&device, &r.err));
  for (int i = 0; i < 256; i++) pinned[i] = (float)i;
  DO(d->enqueue(d->ctx, a, write_note, &notes[0], &r.err));
  DO(d->copy(d->ctx, device, pinned, 1024, a, &r.err));
  DO(d->enqueue(d->ctx, a, write_note, &notes[1], &r.err));
  DO(d->event_record(d->ctx, e, a, &r.err));
  DO(d->stream_wait(d->ctx, b, e, &r.err));
  DO(d->scale(d->ctx, device, 2, 256, b, &r.err));
  DO(d->add(d->ctx, device, device, 256, b, &r.err));
  DO(d->copy(d->ctx, pinned, device, 1024, b, &r.err));
  DO(d->stream_synchronize(d->ctx, b, &r.err));
  cr_expect_eq(n, 2);
  cr_expect(list[0] == 0 && list[1] == 1);
  for (int i = 0; i < 256; i++) cr_assert_eq(pinned[i], (float)(4 * i));
  /* a failure: what follows on the stream is skipped, and whoever waits hears of it */
  DO(d->enqueue(d->ctx, a, write_note, &notes[2], &r.err));
  DO(d->enqueue(d->ctx, a, write_note, &notes[3], &r.err));
  DO(d->event_record(d->ctx, e, a, &r.err));
  DO(d->stream_wait(d->ctx, b, e, &r.err));
  cr_expect_eq(d->event_synchronize(d->ctx, e, &r.err), PHX_COMM);
  cr_expect_eq(d->stream_synchronize(d->ctx, b, &r.err), PHX_COMM);
  cr_expect_str_eq(r.err.message, "note 2");
  cr_expect_eq(d->stream_synchronize(d->ctx, a, &r.err), PHX_COMM);
  cr_expect_eq(d->stream_synchronize(d->ctx, a, &r.err), PHX_OK, "returned once");
  cr_expect_eq(n, 3, "the function after it was skipped");
  DO(d->enqueue(d->ctx, NULL, write_note, &notes[3], &r.err));
  DO(d->stream_synchronize(d->ctx, NULL, &r.err));
  cr_expect_eq(n, 4);
  d->event_destroy(d->ctx, e);
  d->stream_destroy(d->ctx, a);
  d->stream_destroy(d->ctx, b);
  r.table->free(r.self, PHX_SPACE_PINNED, pinned, 1024);
  r.table->free(r.self, PHX_SPACE_DEVICE, device, 1024);
  rig_close(&r);
}
Test(cuda, host_functions_run_in_order, .timeout = 60) { host_functions(0); }
Test(cuda, host_functions_run_in_order_on_stream_threads, .timeout = 60) { host_functions(1); }

/* Products are asked for once: the same shape again costs no heuristic. */
Test(cuda, algorithms_are_kept_by_shape, .timeout = 60) {
  rig r = {0};
  void *x;
  use(0, 1, 1);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  DO(r.table->alloc(r.self, PHX_SPACE_DEVICE, 4096, &x, &r.err));
  float *p = x;
  for (int i = 0; i < 3; i++)
    DO(r.ops->linear(r.ops->ctx, PHX_F32, p + 512, 0, NULL, p, p + 64, NULL, 8, 8, 8, 0, NULL, &r.err));
  cr_expect_eq(cublaslt_double.heuristics, 1);
  DO(r.ops->linear(r.ops->ctx, PHX_F32, p + 512, 0, NULL, p, p + 64, p + 128, 8, 8, 8, 0, NULL, &r.err));
  cr_expect_eq(cublaslt_double.heuristics, 2, "another epilogue");
  r.table->free(r.self, PHX_SPACE_DEVICE, x, 4096);
  rig_close(&r);
}

/* ---- [cuda] profile ---- */
/* All that a stream is given has a kind. */
static void profiled(int threads) {
  static const char *const kinds[] = {"copy", "fill", "cast", "accumulate", "scale", "adamw", "host_function"};
  rig r = {.config = {.profile = 1}};
  void *x;
  phx_stream *s = NULL;
  int list[8], n = 0;
  note one = {list, &n, 0, 0};
  use(threads, 1, 0);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  said_keep(&r.fake.host);
  const phx_device *d = r.device;
  float *f;
  cr_expect(d->caps & PHX_DEVICE_TIMED);
  DO(r.table->alloc(r.self, PHX_SPACE_DEVICE, 1 * MIB, &x, &r.err));
  f = x;
  DO(d->stream_create(d->ctx, "s", &s, &r.err));
  for (int i = 0; i < 3; i++) {
    DO(d->zero(d->ctx, f, 65536, s, &r.err));
    DO(d->copy(d->ctx, f + 16384, f, 65536, s, &r.err));
    DO(d->cast(d->ctx, f + 32768, PHX_BF16, f, PHX_F32, 16384, s, &r.err));
    DO(d->add(d->ctx, f, f + 16384, 16384, s, &r.err));
    DO(d->scale(d->ctx, f, 0.5f, 16384, s, &r.err));
    DO(r.ops->adamw(r.ops->ctx, f, f + 16384, f + 32768, f + 49152, NULL, PHX_F32, 16384, 1, 1, 1, 1, 1, 1, 1, 1, s,
                    &r.err));
    DO(d->enqueue(d->ctx, s, write_note, &one, &r.err));
  }
  DO(d->stream_synchronize(d->ctx, s, &r.err));
  d->stream_destroy(d->ctx, s);
  r.table->free(r.self, PHX_SPACE_DEVICE, x, 1 * MIB);
  rig_close(&r);
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    long long calls;
    const double ms = said_ms(kinds[i], &calls);
    cr_expect_eq(calls, 3, "%s: %lld calls\n%s", kinds[i], calls, said());
    cr_expect_geq(ms, i == 6 ? 3 * 1.9 : 0, "%s: %g ms", kinds[i], ms); /* the function sleeps for 2 ms */
  }
}
Test(cuda, profile_has_a_kind_for_all_that_a_stream_is_given, .timeout = 60) { profiled(0); }
Test(cuda, profile_of_stream_threads, .timeout = 60) { profiled(1); }

/* ---- every call of the runtime fails once ---- */
/* calls: of the runtime, before what was made is destroyed */
static phx_status a_little_of_everything(rig *r, int64_t *calls) {
  void *x = NULL, *pinned = NULL;
  phx_stream *s = NULL;
  phx_event *e = NULL;
  int list[4], n = 0;
  note one = {list, &n, 0, 0};
  phx_status status = r->table->alloc(r->self, PHX_SPACE_DEVICE, 65536, &x, &r->err);
  const phx_device *d = r->device;
  const phx_ops *o = r->ops;
  float *f = x;
#define NEXT(call) \
  if (status == PHX_OK) status = call
  NEXT(r->table->alloc(r->self, PHX_SPACE_PINNED, 1024, &pinned, &r->err));
  NEXT(d->stream_create(d->ctx, "s", &s, &r->err));
  NEXT(d->event_create(d->ctx, &e, &r->err));
  NEXT(o->linear(o->ctx, PHX_F32, f + 512, 0, f + 1024, f, f + 64, f + 128, 8, 8, 8, 1, NULL, &r->err));
  NEXT(o->layer_norm_backward(o->ctx, PHX_F32, f + 1024, NULL, f + 2048, PHX_GRAD_WRITE, f + 2112, PHX_GRAD_WRITE, f, f,
                              f, f + 512, f + 600, 8, 8, NULL, &r->err));
  NEXT(o->attention(o->ctx, PHX_F32, f + 4096, f + 5000, f, 1, 8, 8, 2, s, &r->err));
  NEXT(o->linear_backward_weight(o->ctx, PHX_F32, f + 512, f + 1024, f, 0, f + 64, 8, 8, 8, PHX_GRAD_ADD, PHX_GRAD_ADD,
                                 s, &r->err));
  NEXT(d->cast(d->ctx, f, PHX_BF16, f + 64, PHX_F32, 64, s, &r->err));
  NEXT(d->enqueue(d->ctx, s, write_note, &one, &r->err));
  NEXT(d->event_record(d->ctx, e, s, &r->err));
  NEXT(d->stream_wait(d->ctx, NULL, e, &r->err));
  NEXT(d->copy(d->ctx, pinned, x, 1024, NULL, &r->err));
  NEXT(d->event_synchronize(d->ctx, e, &r->err));
  NEXT(d->stream_synchronize(d->ctx, NULL, &r->err));
  *calls = cuda_double_read().calls;
  if (e) d->event_destroy(d->ctx, e);
  if (s) d->stream_destroy(d->ctx, s);
  if (pinned) r->table->free(r->self, PHX_SPACE_PINNED, pinned, 1024);
  if (x) r->table->free(r->self, PHX_SPACE_DEVICE, x, 65536);
  return status;
}
/* One round, in a process of its own, since a call that frees may be the one that fails: 0 it went well, 1 it failed as
 * it should, 2 there was no nth call, 3 anything else. */
static int round_with_failure(int64_t nth) {
  rig r = {0};
  int64_t used = 0;
  use(0, 1, 0);
  cuda_double_fail("", nth, cudaErrorUnknown, 0);
  phx_status status = rig_open(&r, 0, 1);
  if (status == PHX_OK) status = a_little_of_everything(&r, &used);
  if (r.self) r.table->destroy(r.self);
  const cuda_double_stats left = cuda_double_read();
  const int64_t kept = left.device_blocks + left.pinned_blocks + left.streams + left.events + cublaslt_double.alive;
  const int said = strstr(r.err.message, "rank 0: ") != NULL && r.err.code == status;
  if (nth > left.calls) return status == PHX_OK && kept == 0 ? 2 : 3;
  if (status != PHX_OK) return said && kept <= 1 ? 1 : 3; /* 1: cleaning up may meet the call, too */
  return nth > used && kept <= 1 ? 0 : 3;
}
Test(cuda, every_call_fails_once, .timeout = 120) {
  int results[4] = {0};
  for (int64_t nth = 1; !results[2]; nth++) {
    int status = 0;
    const pid_t child = fork();
    if (child == 0) _exit(round_with_failure(nth));
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) < 3, "call %lld: status %x", (long long)nth, (unsigned)status);
    results[WEXITSTATUS(status)]++;
  }
  cr_expect_gt(results[1], 40, "failures that were reported");
}
