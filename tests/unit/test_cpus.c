/* CPUs and limits: what a cgroup of either version says, and how CPUs are shared out among ranks. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cgroup.h"
#include "command.h"
#include "engine/cpus.h"
#include "command/memory_room.h"

static char *dir;
static void setup(void) { cr_assert_not_null(dir = command_temp_dir()); }
static void teardown(void) { command_remove_dir(dir); }
TestSuite(cgroup, .init = setup, .fini = teardown, .timeout = 30);

static void put(const char *path, const char *text) {
  char name[600];
  for (const char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
    snprintf(name, sizeof name, "%s/%.*s", dir, (int)(slash - path), path);
    mkdir(name, 0755);
  }
  command_write_file(dir, path, text, strlen(text));
}

static phx__cgroup look(void) {
  phx__cgroup out;
  phx__cgroup_read(dir, &out);
  return out;
}

static void expect(double cpus, long long memory, long long memory_free) {
  const phx__cgroup got = look();
  cr_expect_float_eq(got.cpus, cpus, 1e-12, "%g CPUs, not %g", got.cpus, cpus);
  cr_expect_eq(got.memory, memory, "%lld bytes, not %lld", (long long)got.memory, memory);
  cr_expect_eq(got.memory_free, memory_free, "%lld bytes left, not %lld", (long long)got.memory_free, memory_free);
}

Test(cgroup, nothing_to_read_is_no_limit) { expect(0, 0, 0); }

static void version_2(const char *root, const char *group) {
  char text[300];
  snprintf(text, sizeof text,
           "22 1 0:20 / /proc rw - proc proc rw\n30 22 0:26 %s /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", root);
  put("proc/self/mountinfo", text);
  snprintf(text, sizeof text, "0::%s\n", group);
  put("proc/self/cgroup", text);
}

Test(cgroup, version_2_of_a_container) {
  version_2("/", "/");
  put("sys/fs/cgroup/cpu.max", "150000 100000\n");
  put("sys/fs/cgroup/memory.max", "1000000\n");
  put("sys/fs/cgroup/memory.current", "400000\n");
  put("sys/fs/cgroup/memory.stat", "anon 300000\nfile 100000\ninactive_file 60000\nactive_file 40000\nx 1\n");
  expect(1.5, 1000000, 700000);
}

Test(cgroup, version_2_without_limits) {
  version_2("/", "/user.slice/session-1.scope");
  put("sys/fs/cgroup/user.slice/session-1.scope/cpu.max", "max 100000\n");
  put("sys/fs/cgroup/user.slice/session-1.scope/memory.max", "max\n");
  expect(0, 0, 0);
}

Test(cgroup, a_limit_above_counts_too) {
  version_2("/", "/a/b/c");
  put("sys/fs/cgroup/a/b/c/cpu.max", "800000 100000\n");
  put("sys/fs/cgroup/a/cpu.max", "50000 100000\n");
  put("sys/fs/cgroup/a/b/c/memory.max", "9000\n");
  put("sys/fs/cgroup/a/b/c/memory.current", "1000\n");
  put("sys/fs/cgroup/a/b/memory.max", "20000\n"); /* larger, but others use most of it */
  put("sys/fs/cgroup/a/b/memory.current", "15000\n");
  expect(0.5, 9000, 5000);
}

Test(cgroup, a_mount_whose_root_is_a_group) {
  version_2("/docker/abc", "/docker/abc/inner");
  put("sys/fs/cgroup/inner/cpu.max", "300000 100000\n");
  put("sys/fs/cgroup/cpu.max", "200000 100000\n");
  expect(2, 0, 0);
}

Test(cgroup, version_1) {
  put("proc/self/mountinfo",
      "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
      "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
      "33 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
      "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
      "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  put("proc/self/cgroup", "4:memory:/job\n3:cpuset:/\n2:cpu,cpuacct:/job/step\n0::/\n");
  put("sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us", "-1\n");
  put("sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_period_us", "100000\n");
  put("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "350000\n");
  put("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n");
  put("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "50000\n");
  put("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "30000\n");
  put("sys/fs/cgroup/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 10000\ntotal_active_file 5000\n");
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  expect(3.5, 50000, 35000);
}

/* ---- sharing ---- */
static cpu_set_t set_of(int first, int n) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int i = first; i < first + n; i++) CPU_SET(i, &set);
  return set;
}

Test(cpus, share) {
  const cpu_set_t same[] = {set_of(0, 8), set_of(0, 8), set_of(0, 8)};
  const cpu_set_t own[] = {set_of(0, 4), set_of(4, 4)};
  const cpu_set_t mixed[] = {set_of(0, 4), set_of(2, 2), set_of(4, 1)};
  const cpu_set_t few[] = {set_of(0, 1), set_of(0, 1)};
  for (int r = 0; r < 3; r++) cr_expect_eq(phx__cpus_share(same, 3, r), 2);
  for (int r = 0; r < 2; r++) cr_expect_eq(phx__cpus_share(own, 2, r), 4, "a rank's own CPUs are not divided");
  cr_expect_eq(phx__cpus_share(mixed, 3, 0), 3);
  cr_expect_eq(phx__cpus_share(mixed, 3, 1), 1);
  cr_expect_eq(phx__cpus_share(mixed, 3, 2), 1);
  for (int r = 0; r < 2; r++) cr_expect_eq(phx__cpus_share(few, 2, r), 1);
}

/* A library that a plugin brings may bind its process to one CPU. */
Test(cpus, what_was_remembered_counts) {
  cpu_set_t mask;
  phx__cpus_remember();
  const int count = phx__cpus_count();
  if (count < 2) cr_skip_test("needs two CPUs");
  CPU_ZERO(&mask);
  cr_assert_eq(sched_getaffinity(0, sizeof mask, &mask), 0);
  cr_assert_eq(CPU_COUNT(&mask), count);
  int first = 0;
  while (!CPU_ISSET(first, &mask)) first++;
  mask = set_of(first, 1);
  cr_assert_eq(sched_setaffinity(0, sizeof mask, &mask), 0);
  cr_expect_eq(phx__cpus_count(), count);
  phx__cpus_remember();
  cr_expect_eq(phx__cpus_count(), 1);
}

/* ---- memory ---- */
static phx__room room(void) {
  phx__room out;
  phx__room_read(dir, &out);
  return out;
}

Test(cgroup, room_of_a_machine_and_of_a_cgroup) {
  cr_expect_eq(room().total, 0, "nothing to read");
  put("proc/meminfo",
      "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    600 kB\nSwapTotal: 90 kB\nSwapFree: 50 kB\n");
  phx__room r = room();
  cr_expect(r.total == 1000 << 10 && r.available == 650 << 10 && !r.of_cgroup);
  version_2("/", "/");
  put("sys/fs/cgroup/memory.max", "614400\n");
  put("sys/fs/cgroup/memory.current", "204800\n");
  r = room();
  cr_expect(r.total == 614400 && r.available == 409600 && r.of_cgroup);
  put("sys/fs/cgroup/memory.max", "900000000\n"); /* more than there is */
  r = room();
  cr_expect(r.total == 1000 << 10 && r.available == 650 << 10 && !r.of_cgroup);
}
