/* The cpu device where OpenMP gives fewer threads than asked for: operations stay right, and the device says how many
 * it has.  Products and loops are compared with double precision (tests/support/ops_suite.h).
 *
 * OpenMP reads its variables when it is loaded, so every case has a process of its own. */
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "device_ops.h"
#include "ops_suite.h"

enum { ASKED = 3 };

static void open_with(device_ops *d, const char *variable, const char *value) {
  phx_error err = {.struct_size = sizeof err};
  setenv("OMP_WAIT_POLICY", "passive", 1); /* the machine may have fewer CPUs than threads, and be busy */
  if (variable) setenv(variable, value, 1);
  cr_assert_eq(device_ops_open(d, ASKED, NULL, &err), PHX_OK, "%s", err.message);
}

/* Products in fp32, or every operation in both dtypes. */
static void check_operations(const device_ops *d, int every) {
  static const char *const products[] = {"linear", "linear_backward_input", "linear_backward_weight"};
  const ops_suite suite = {d->table, d->self, ops_suite_seed(), 1, 0};
  for (int i = 0; i < (every ? 1 : 3); i++) {
    if (!every) setenv("PHX_TEST_CASE", products[i], 1);
    cr_expect_eq(ops_suite_run(&suite, PHX_F32), 0, "see above");
    if (every) cr_expect_eq(ops_suite_run(&suite, PHX_BF16), 0, "see above");
  }
}

/* threads: what the device must have */
static void check_under(const char *variable, const char *value, int32_t threads) {
  device_ops d;
  char name[32], said[64];
  open_with(&d, variable, value);
  cr_expect_eq(d.device->threads, threads, "%s=%s: %d threads", variable, value, d.device->threads);
  snprintf(name, sizeof name, "%d thread%s,", threads, threads == 1 ? "" : "s");
  cr_expect(strstr(d.device->name, name), "%s", d.device->name);
  snprintf(said, sizeof said, "%d threads were asked for and OpenMP gives %d,", ASKED, threads);
  cr_expect_eq(strstr(d.fake.last_log, said) != NULL, threads < ASKED, "%s=%s: \"%s\"", variable, value,
               d.fake.last_log);
  check_operations(&d, threads == 2);
  device_ops_close(&d);
}

Test(cpu_threads, limit_of_one, .timeout = 120) { check_under("OMP_THREAD_LIMIT", "1", 1); }
Test(cpu_threads, limit_of_two, .timeout = 120) { check_under("OMP_THREAD_LIMIT", "2", 2); }
Test(cpu_threads, no_level, .timeout = 120) { check_under("OMP_MAX_ACTIVE_LEVELS", "0", ASKED); }
Test(cpu_threads, dynamic, .timeout = 120) { check_under("OMP_DYNAMIC", "true", ASKED); }
Test(cpu_threads, nested, .timeout = 120) { check_under("OMP_NESTED", "true", ASKED); }
Test(cpu_threads, other_number, .timeout = 120) { check_under("OMP_NUM_THREADS", "7,5", ASKED); }

/* A plugin of the same process may use OpenMP, too, and change its settings between two operations. */
Test(cpu_threads, settings_changed_by_a_plugin, .timeout = 120) {
  device_ops d;
  open_with(&d, NULL, NULL);
  void *openmp = dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (!openmp) cr_skip_test("OpenMP is not GCC's here");
  static const struct {
    const char *name;
    int value;
  } calls[] = {{"omp_set_dynamic", 1}, {"omp_set_max_active_levels", 0}, {"omp_set_num_threads", ASKED + 4}};
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
    void (*call)(int);
    *(void **)&call = dlsym(openmp, calls[i].name);
    cr_assert_not_null(call, "%s", calls[i].name);
    call(calls[i].value);
  }
  check_operations(&d, 0);
  cr_expect_eq(d.device->threads, ASKED);
  dlclose(openmp);
  device_ops_close(&d);
}

/* All threads on one CPU: right, slow, and said. */
Test(cpu_threads, bound_to_one_cpu, .timeout = 120) {
  device_ops d;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  cr_assert_eq(sched_getaffinity(0, sizeof mask, &mask), 0);
  if (CPU_COUNT(&mask) < 2 || !CPU_ISSET(0, &mask)) cr_skip_test("needs CPU 0 and another");
  open_with(&d, "GOMP_CPU_AFFINITY", "0");
  cr_expect_eq(d.device->threads, ASKED);
  cr_expect(strstr(d.fake.last_log, "OpenMP keeps 3 threads on 1 of"), "\"%s\"", d.fake.last_log);
  cr_expect(strstr(d.fake.last_log, "GOMP_CPU_AFFINITY is 0"), "\"%s\"", d.fake.last_log);
  device_ops_close(&d);
}
