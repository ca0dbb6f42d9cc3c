/* Attention by cuDNN, without a GPU.  The graphs, as the real library's heuristics and compilers take them for the
 * properties of an H100 and an A100 (skipped where libcudnn.so.9 is not found); and the device's use of it, numbers
 * included, against a libcudnn.so.9 that carries graphs out on the processor.  What is left for a GPU: that the fused
 * kernels do what the graphs say. */
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <phalanx/error.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda_double.h"
#include "cudnn_double.h"
#include "fake_host.h"
#include "ops_suite.h"
#include "plugin_file.h"
#include "sanitizer.h"

#define EMULATED PHX_TEST_BUILD "/lib/phalanx-emulated/"
#define MIB ((int64_t)1 << 20)
#ifdef PHX__CUDNN
#include "../../plugins/cuda/attention_graph.h"

/* ---- the graphs, by the real cuDNN ---- */
#if !UNDER_ASAN /* the library leaves memory behind, and what it does takes minutes there */
#define DEVICE(name, version, processors, shared, l2)                                                             \
  "{\"maxGridSize\":[2147483647,65535,65535],\"maxBlockSize\":[1024,1024,64],\"regsPerBlock\":65536,"             \
  "\"multiProcessorCount\":" #processors ",\"warpSize\":32,\"maxSharedMemoryPerBlock\":49152,"                    \
  "\"maxSharedMemoryPerBlockOptin\":" #shared ",\"reservedSharedMemoryPerBlock\":1024,"                           \
  "\"maxRegistersPerSM\":65536,\"maxCtasPerSM\":32,\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,"         \
  "\"pciDeviceId\":0,\"isTccDriver\":0,\"supportCoopLaunch\":1,\"totalGlobalMem\":85174583296,"                   \
  "\"smClockRateKHz\":1410000,\"memClockRateKHz\":1593000,\"l2CacheSize\":" #l2 ",\"cudaDeviceId\":0,"            \
  "\"deviceVer\":" #version ",\"driverVer\":13000,\"deviceName\":\"" name "\"}"
static const char *const devices[] = {DEVICE("NVIDIA H100 80GB HBM3", 900, 132, 232448, 52428800),
                                      DEVICE("NVIDIA A100-SXM4-80GB", 800, 108, 166912, 41943040)};

/* The driver's double first: cuDNN asks for a driver to load what it compiled. */
static void open_cudnn(phx__cudnn_api *api) {
  char reason[400];
  cr_assert_not_null(dlopen(EMULATED "driver_double.so", RTLD_NOW | RTLD_GLOBAL), "%s", dlerror());
  if (!phx__cudnn_open(api, reason, sizeof reason)) cr_skip_test("%s", reason);
}

Test(cudnn, plans_for_gpt2_are_made_without_a_gpu, .timeout = 300) {
  static const phx__cudnn_shape shapes[] = {{32, 1024, 12, 64, 0, 0}, {8, 1024, 25, 64, 0, 0}, {2, 331, 3, 128, 0, 0}};
  phx__cudnn_api api;
  open_cudnn(&api);
  for (size_t d = 0; d < 2; d++)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      for (int pass = 0; pass < 4; pass++) {
        phx__cudnn_shape s = shapes[i];
        phx__cudnn_plan plan;
        s.backward = pass & 1, s.deterministic = pass >> 1;
        phx__cudnn_plan_make(&api, NULL, devices[d], &s, &plan);
        const long long rows = (long long)(s.b * s.heads * s.t);
        fprintf(stderr, "device %zu, %lld x %lld, %lld heads of %lld, backward %d, deterministic %d: engine %lld, "
                "workspace %lld, sums of dq %lld %s\n", d, (long long)s.b, (long long)s.t, (long long)s.heads,
                (long long)s.width, s.backward, s.deterministic, (long long)plan.engine, (long long)plan.workspace,
                (long long)plan.dq_sum, plan.reason);
        cr_expect_not_null(plan.plan, "%s", plan.reason);
        cr_expect_eq(plan.dq_sum, pass == 1 ? 4 * rows * s.width : 0);
        if (!s.backward) cr_expect_leq(plan.workspace, MIB);
        /* forward, and backward where order does not matter, hold rows, not (T, T): within the default workspace */
        if (pass != 3) cr_expect_leq(plan.workspace, 4 * rows * s.width + MIB);
        if (pass != 3) cr_expect_leq(phx_align_bytes(plan.dq_sum) + plan.workspace, 256 * MIB);
        phx__cudnn_plan_free(&api, &plan);
      }
  phx__cudnn_close(&api);
}

Test(cudnn, a_shape_without_an_engine_is_refused_in_one_line, .timeout = 60) {
  phx__cudnn_api api;
  open_cudnn(&api);
  for (int32_t backward = 0; backward < 2; backward++) {
    const phx__cudnn_shape odd = {2, 64, 3, 20, backward, 0};
    phx__cudnn_plan plan;
    phx__cudnn_plan_make(&api, NULL, devices[0], &odd, &plan);
    cr_expect_null(plan.plan);
    cr_expect_not_null(strstr(plan.reason, "NOT_SUPPORTED"), "%s", plan.reason);
    cr_expect_null(strchr(plan.reason, '\n'));
  }
  phx__cudnn_close(&api);
}
#endif

/* ---- the device's use of it, by the double ---- */
enum { AUTO, CUDNN, OWN };
typedef struct config { /* as in plugins/cuda/cuda.h; its size is checked */
  int32_t share, tf32, attention, reserved0;
  int64_t workspace;
} config;

typedef struct rig {
  fake_host fake;
  const phx_device_table *table;
  phx_device_self *self;
  const phx_ops *ops;
  cudnn_double_state *cudnn;
  void *memory;
  phx_error err;
} rig;
enum { PART = 64 << 10 };

static cudnn_double_state *open_double(void) {
  void *library = dlopen(EMULATED "cudnn_double.so", RTLD_NOW | RTLD_LOCAL), *symbol;
  cudnn_double_settings_entry *entry;
  cr_assert_not_null(library, "%s", dlerror());
  symbol = dlsym(library, "cudnn_double_settings");
  memcpy(&entry, &symbol, sizeof entry);
  cr_assert_not_null(entry);
  return entry();
}

static void rig_prepare(rig *r) {
  phx_error err = {.struct_size = sizeof err};
  const phx_plugin *plugin = plugin_file_open(EMULATED "phx_device_cuda.so", &err);
  cr_assert_not_null(plugin, "%s", err.message);
  cr_assert_eq(plugin->config_size, sizeof(config));
  cuda_double_config c = cuda_double_defaults();
  c.threads = 0, c.devices = 1, c.guard = 0;
  cuda_double_configure(&c);
  *r = (rig){.table = plugin->table, .cudnn = open_double(), .err = {.struct_size = sizeof(phx_error)}};
  fake_host_init(&r->fake, 0, 1);
}

static phx_status rig_open(rig *r, int32_t attention, int64_t workspace) {
  const config c = {.attention = attention, .workspace = workspace};
  const phx_status status = r->table->create(&r->fake.host, &c, 1, &r->self, &r->err);
  if (status == PHX_OK) r->ops = r->table->ops(r->self);
  return status;
}

static void rig_close(rig *r) {
  if (r->memory) r->table->free(r->self, PHX_SPACE_DEVICE, r->memory, 16 * PART);
  if (r->self) r->table->destroy(r->self);
  r->memory = NULL, r->self = NULL;
  cr_expect_eq(r->cudnn->descriptors, 0);
  cr_expect_eq(r->cudnn->handles, 0);
  cr_expect_eq(cuda_double_read().device_blocks, 0);
}

static phx_status pass(rig *r, int backward, int32_t dtype, int64_t t, int64_t c, int64_t heads) {
  phx_error *err = &r->err;
  if (!r->memory) PHX_TRY(r->table->alloc(r->self, PHX_SPACE_DEVICE, 16 * PART, &r->memory, err));
  char *at = r->memory, *qkv = at, *out = at + 3 * PART, *dout = at + 4 * PART, *dqkv = at + 5 * PART,
       *lse = at + 8 * PART, *work = at + 9 * PART;
  const phx_ops *o = r->ops;
  if (!backward) return o->attention(o->ctx, dtype, out, (float *)lse, qkv, 1, t, c, heads, NULL, err);
  return o->attention_backward(o->ctx, dtype, dqkv, dout, qkv, out, (const float *)lse, (float *)work, 1, t, c, heads,
                               NULL, err);
}

static void suite(int32_t deterministic) {
  rig r;
  rig_prepare(&r);
  r.cudnn->workspace = 512;
  r.fake.host.deterministic = deterministic;
  cr_assert_eq(rig_open(&r, AUTO, 4 * MIB), PHX_OK, "%s", r.err.message);
  cr_expect_not_null(strstr(r.fake.last_log, deterministic ? "" : "cuDNN 9.19.0"), "%s", r.fake.last_log);
  const ops_suite s = {r.table, r.self, ops_suite_seed(), 1, getenv("PHX_TEST_PRINT") != NULL};
  cr_expect_eq(ops_suite_run(&s, PHX_BF16), 0, "see above");
  cr_expect_geq(r.cudnn->executed, 6, "cuDNN computed %d times", r.cudnn->executed);
  cr_expect_eq(r.cudnn->operations, deterministic ? 21 : 22);
  rig_close(&r);
}
Test(cudnn, the_graphs_compute_attention, .timeout = 300) { suite(0); }
#if !UNDER_ASAN /* minutes there, of the same code */
Test(cudnn, the_deterministic_graphs_compute_attention, .timeout = 300) { suite(1); }
#endif

Test(cudnn, what_it_does_not_take_is_computed_by_own_kernels, .timeout = 60) {
  rig r;
  rig_prepare(&r);
  cr_assert_eq(rig_open(&r, AUTO, 4 * MIB), PHX_OK, "%s", r.err.message);
  cr_expect_eq(pass(&r, 0, PHX_F32, 8, 16, 2), PHX_OK);
  cr_expect_eq(pass(&r, 0, PHX_BF16, 8, 20, 2), PHX_OK);
  cr_expect_not_null(strstr(r.fake.last_log, "heads of 8, 16 ... 128"), "%s", r.fake.last_log);
  cr_expect_eq(pass(&r, 0, PHX_BF16, 1, 16, 2), PHX_OK);
  cr_expect_eq(r.cudnn->executed, 0);
  cr_expect_eq(pass(&r, 0, PHX_BF16, 8, 16, 2), PHX_OK);
  cr_expect_eq(r.cudnn->executed, 1);
  r.cudnn->no_engine = 1;
  cr_expect_eq(pass(&r, 1, PHX_BF16, 8, 16, 2), PHX_OK);
  cr_expect_eq(r.cudnn->executed, 1);
  cr_expect_not_null(strstr(r.fake.last_log, "own kernel, not cuDNN"), "%s", r.fake.last_log);
  const int32_t logs = r.fake.logs;
  cr_expect_eq(pass(&r, 1, PHX_BF16, 8, 16, 2), PHX_OK);
  cr_expect_eq(r.fake.logs, logs, "told once");
  rig_close(&r);
}

Test(cudnn, a_plan_that_needs_more_memory_is_not_used, .timeout = 60) {
  rig r;
  rig_prepare(&r);
  r.cudnn->workspace = 3 * MIB;
  cr_assert_eq(rig_open(&r, AUTO, 2 * MIB), PHX_OK, "%s", r.err.message);
  cr_expect_eq(pass(&r, 0, PHX_BF16, 8, 16, 2), PHX_OK);
  cr_expect_eq(r.cudnn->executed, 0);
  cr_expect_not_null(strstr(r.fake.last_log, "3 MiB"), "%s", r.fake.last_log);
  rig_close(&r);
  cr_assert_eq(rig_open(&r, CUDNN, 2 * MIB), PHX_OK, "%s", r.err.message);
  cr_expect_eq(pass(&r, 0, PHX_BF16, 8, 16, 2), PHX_UNSUPPORTED);
  cr_expect_not_null(strstr(r.err.message, "rank 0: attention of 1 x 8 tokens"), "%s", r.err.message);
  cr_expect_not_null(strstr(r.err.message, "3 MiB, [cuda] workspace is 2 MiB"), "%s", r.err.message);
  rig_close(&r);
  /* a matrix of tokens by tokens: refused even where it would fit */
  r.fake.host.deterministic = 1;
  r.cudnn->workspace = 2 * 64 * 64 * 2;
  cr_assert_eq(rig_open(&r, AUTO, 2 * MIB), PHX_OK, "%s", r.err.message);
  cr_expect_eq(pass(&r, 1, PHX_BF16, 64, 16, 2), PHX_OK);
  cr_expect_eq(r.cudnn->executed, 0);
  cr_expect_not_null(strstr(r.fake.last_log, "tokens by tokens"), "%s", r.fake.last_log);
  rig_close(&r);
}

Test(cudnn, an_engine_without_order_is_passed_over_when_order_counts, .timeout = 60) {
  for (int deterministic = 0; deterministic < 2; deterministic++) {
    rig r;
    rig_prepare(&r);
    r.cudnn->noted = 1;
    r.fake.host.deterministic = deterministic;
    cr_assert_eq(rig_open(&r, CUDNN, 2 * MIB), PHX_OK, "%s", r.err.message);
    cr_expect_eq(pass(&r, 1, PHX_BF16, 64, 16, 2), PHX_OK, "%s", r.err.message);
    cr_expect_not_null(strstr(r.fake.last_log, deterministic ? "engine 1" : "engine 0"), "%s", r.fake.last_log);
    rig_close(&r);
  }
}

Test(cudnn, asked_for_and_impossible_is_refused, .timeout = 60) {
  rig r;
  rig_prepare(&r);
  r.cudnn->version = 90900;
  cr_expect_eq(rig_open(&r, CUDNN, MIB), PHX_UNSUPPORTED);
  cr_expect_not_null(strstr(r.err.message, "cuDNN 9.9.0 is too old, 9.10.2"), "%s", r.err.message);
  cr_assert_eq(rig_open(&r, AUTO, MIB), PHX_OK, "%s", r.err.message);
  cr_expect_not_null(strstr(r.fake.last_log, "own kernels, since cuDNN 9.9.0"), "%s", r.fake.last_log);
  rig_close(&r);
  r.cudnn->version = 0, r.cudnn->no_handle = 1;
  cr_expect_eq(rig_open(&r, CUDNN, MIB), PHX_UNSUPPORTED);
  cr_expect_not_null(strstr(r.err.message, "cuDNN 9.19 does not start"), "%s", r.err.message);
  r.cudnn->no_handle = 0;
  cr_assert_eq(rig_open(&r, CUDNN, MIB), PHX_OK, "%s", r.err.message);
  cr_expect_eq(pass(&r, 0, PHX_F32, 8, 16, 2), PHX_UNSUPPORTED);
  cr_expect_not_null(strstr(r.err.message, "it takes bf16 only"), "%s", r.err.message);
  rig_close(&r);
  cr_assert_eq(rig_open(&r, OWN, MIB), PHX_OK, "%s", r.err.message);
  cr_expect_eq(pass(&r, 0, PHX_BF16, 8, 16, 2), PHX_OK);
  cr_expect_eq(r.cudnn->executed, 0);
  rig_close(&r);
}

/* Whatever call fails: own kernels where nothing was started, else an error that names the operation. */
Test(cudnn, every_call_fails_once, .timeout = 300) {
  int32_t calls = 0, errors = 0, own = 0;
  rig r;
  rig_prepare(&r);
  /* 0: none fails; most calls only describe the graphs, and one in seven of them is enough */
  for (int32_t n = 0; n <= calls; n += n > 40 && n < calls - 80 ? 7 : 1) {
    r.cudnn->calls = 0, r.cudnn->executed = 0, r.cudnn->fail_at = n;
    cr_assert_eq(rig_open(&r, AUTO, MIB), PHX_OK, "%s", r.err.message);
    phx_status status = pass(&r, 0, PHX_BF16, 8, 16, 2);
    if (status == PHX_OK) status = pass(&r, 1, PHX_BF16, 8, 16, 2);
    if (status != PHX_OK) {
      errors++;
      cr_expect_eq(status, PHX_DEVICE);
      cr_expect_not_null(strstr(r.err.message, "rank 0: attention"), "%s", r.err.message);
      cr_expect_not_null(strstr(r.err.message, "cuDNN: "), "%s", r.err.message);
    } else if (r.cudnn->executed < 2) {
      own++;
    }
    if (n == 0) calls = r.cudnn->calls;
    rig_close(&r);
  }
  cr_expect_gt(own, 100, "of %d calls %d led to own kernels", calls, own);
  cr_expect_geq(errors, 8, "of %d calls %d led to errors", calls, errors);
}
#else
Test(cudnn, needs_headers) { cr_skip_test("this build has no headers of cuDNN (9.10 or newer)"); }
#endif
