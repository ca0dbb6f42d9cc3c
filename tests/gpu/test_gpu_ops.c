/* The cuda device's operations on a GPU, by the suite that every device runs (ops_suite.h).  The same sources emulated:
 * unit/test_cuda.c. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <unistd.h>

#include "fake_host.h"
#include "fake_job.h"
#include "ops_suite.h"
#include "root.h"

enum { MOST = 1800 }; /* seconds, under compute-sanitizer; gpu-check and CTest allow less without it */

static void run_suite(int32_t dtype, int32_t deterministic) {
  static _Alignas(16) char config[4096];
  phx_error err = {.struct_size = sizeof err};
  const char *path = test_path("lib/phalanx/phx_device_cuda.so");
  if (access(path, R_OK)) cr_skip_test("the cuda device is not built");
  const phx_plugin *plugin = fake_plugin_load(path, config, sizeof config);
  if (!plugin) cr_skip_test("%s does not load: CUDA's libraries are not found", path);
  const phx_device_table *table = plugin->table;
  if (table->probe(&err)) cr_skip_test("%s", err.message);
  fake_host fake;
  phx_device_self *self = NULL;
  fake_host_init(&fake, 0, 1);
  fake.host.deterministic = deterministic;
  cr_assert_eq(table->create(&fake.host, config, 1, &self, &err), PHX_OK, "%s", err.message);
  const ops_suite suite = {table, self, ops_suite_seed(), 1, getenv("PHX_TEST_PRINT") != NULL};
  cr_expect_eq(ops_suite_run(&suite, dtype), 0, "see above");
  table->destroy(self);
}

Test(gpu_ops, fp32, .timeout = MOST) { run_suite(PHX_F32, 0); }
Test(gpu_ops, bf16, .timeout = MOST) { run_suite(PHX_BF16, 0); }
Test(gpu_ops, bf16_deterministic, .timeout = MOST) { run_suite(PHX_BF16, 1); }
