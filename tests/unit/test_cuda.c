/* The cuda device on the processor: the plugin's own sources against the double of the CUDA runtime (inline, and with
 * streams as threads) and of cuBLASLt.  What only a GPU can show is in test_cuda_gpu.c.
 * TSan: run.
 * Links: cuda_double */
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cublaslt_double.h"
#include "cuda_double.h"
#include "fake_host.h"
#include "ops_suite.h"

#define MIB ((int64_t)1 << 20)
typedef struct config { /* as in plugins/cuda/cuda.h; its size is checked */
  int32_t share, tf32;
  int64_t workspace;
} config;

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
  void *library = dlopen(PHX_TEST_ONLY_PLUGINS "/phx_device_cuda.so", RTLD_NOW | RTLD_LOCAL);
  cr_assert_not_null(library, "%s", dlerror());
  void *symbol = dlsym(library, PHX_ENTRY_SYMBOL);
  phx_plugin_entry *entry;
  memcpy(&entry, &symbol, sizeof entry);
  cr_assert_not_null(entry);
  cr_assert_eq(entry()->config_size, sizeof(config));
  return entry();
}

static void use(int threads, int devices) {
  cuda_double_config c = cuda_double_defaults();
  c.threads = threads;
  c.devices = devices;
  cuda_double_configure(&c);
  cublaslt_double = (cublaslt_double_state){.reduction_mask = 7};
}

static phx_status rig_open(rig *r, int32_t rank, int32_t ranks) {
  if (!r->table) { /* the rest is the caller's wish */
    fake_host_init(&r->fake, rank, ranks);
    r->table = cuda_plugin()->table;
    r->err.struct_size = sizeof r->err;
    if (!r->config.workspace) r->config.workspace = 1 * MIB;
  }
  const phx_status status = r->table->create(&r->fake.host, &r->config, 1, &r->self, &r->err);
  if (status != PHX_OK) return status;
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
static void suite(int threads, int32_t dtype, int refuse, int deterministic) {
  rig r = {0};
  use(threads, 1);
  cublaslt_double.refuse = refuse;
  fake_host_init(&r.fake, 0, 1);
  cr_assert_eq(rig_open(&r, 0, 1), PHX_OK, "%s", r.err.message);
  r.fake.host.deterministic = deterministic;
  const ops_suite s = {r.table, r.self, ops_suite_seed(), 1, getenv("PHX_TEST_PRINT") != NULL};
  cr_expect_eq(ops_suite_run(&s, dtype), 0, "see above");
  cr_expect_eq(cublaslt_double.reduction_mask, deterministic ? 2 : 7);
  rig_close(&r);
}

Test(cuda, operations_fp32, .timeout = 300) { suite(0, PHX_F32, 0, 0); }
Test(cuda, operations_bf16, .timeout = 300) { suite(0, PHX_BF16, 0, 0); }
Test(cuda, operations_fp32_without_epilogues, .timeout = 300) { suite(0, PHX_F32, ~0, 1); }
Test(cuda, operations_bf16_without_epilogues, .timeout = 300) { suite(0, PHX_BF16, ~0, 1); }
Test(cuda, operations_on_stream_threads, .timeout = 300) { suite(1, PHX_BF16, 0, 0); }
Test(cuda, operations_with_threads_run_downwards, .timeout = 300) {
  setenv("PHX_CUDA_DOUBLE_ORDER", "down", 1);
  suite(0, PHX_F32, 0, 0);
}
