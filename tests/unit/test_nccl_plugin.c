/* The nccl plugin itself, where it was built: on a machine without a driver it loads and says why it cannot be used. */
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>
#include "fake_job.h"

Test(nccl_plugin, without_a_gpu_it_says_so, .timeout = 60) {
  char config[256];
  phx_error err = {.struct_size = sizeof err};
  if (access(PHX_TEST_PLUGINS "/phx_comm_nccl.so", R_OK) != 0)
    cr_skip_test("not built: the CUDA toolkit or NCCL was not found");
  const phx_plugin *plugin = fake_plugin_load(PHX_TEST_PLUGINS "/phx_comm_nccl.so", config, sizeof config);
  cr_assert_not_null(plugin);
  const phx_comm_table *table = plugin->table;
  if (table->probe(&err) == PHX_OK) cr_skip_test("there is a GPU here");
  cr_expect_eq(err.code, PHX_UNSUPPORTED);
  cr_expect(strstr(err.message, "NVIDIA GPUs") && err.cause != 0, "%s", err.message);
}
