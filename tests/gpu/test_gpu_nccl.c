/* The communicator "nccl" on GPUs: the suite of every communicator with two ranks, in both orders of reduction, in
 * memory of the device and of the host, and a rank that is killed.  Two GPUs, or one where NCCL lets two ranks share it
 * (2.30.3 and newer, with NCCL_MULTI_RANK_GPU_ENABLE=1).  The same on doubles of NCCL and CUDA: unit/test_nccl.c. */
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "comm_suite.h"
#include "root.h"

enum { RANKS = 2, SHARING = 23003 /* NCCL's version that joins two ranks on a GPU */ };
typedef struct nccl_config { int64_t staging, communicators; int32_t registered, reserved0; } nccl_config;

/* [cuda] share comes first, as in plugins/cuda/cuda.h. */
static union { char bytes[4096]; int32_t share; } device_config;
static nccl_config config;
static const phx_device_table *devices;
static phx_device_self *device;
static int32_t deterministic;

static void enter(fake_rank *rank) {
  phx_error err = {.struct_size = sizeof err};
  rank->host.deterministic = deterministic;
  if (devices->create(&rank->host, &device_config, 1, &device, &err) != PHX_OK) {
    fprintf(stderr, "rank %d: %s\n", rank->job.rank, err.message);
    _exit(3);
  }
  rank->device = devices->device(device);
}
static void leave(fake_rank *rank) {
  (void)rank;
  devices->destroy(device);
}

typedef struct seen { /* by a child: a process that has used CUDA cannot fork ranks that do */
  int32_t gpus;
  char why[500];
} seen;
static const seen *look(void) {
  seen *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  cr_assert_neq(s, MAP_FAILED);
  const pid_t child = fork();
  if (child == 0) {
    phx_error err = {.struct_size = sizeof err};
    if (devices->probe(&err) != PHX_OK) snprintf(s->why, sizeof s->why, "%s", err.message);
    else s->gpus = devices->count();
    _exit(0);
  }
  cr_assert_eq(waitpid(child, NULL, 0), child);
  return s;
}

static int nccl_version(void) {
  int version = 0;
  void *library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL); /* which the plugin has loaded */
  void *symbol = library ? dlsym(library, "ncclGetVersion") : NULL;
  int (*ask)(int *);
  memcpy(&ask, &symbol, sizeof ask);
  return symbol && ask(&version) == 0 ? version : 0;
}

static void prepare(void) {
  const char *path = test_path("lib/phalanx/phx_comm_nccl.so"), *set = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  if (access(path, R_OK)) cr_skip_test("the nccl communicator is not built");
  const phx_plugin *comm = fake_plugin_load(path, &config, sizeof config);
  if (!comm) cr_skip_test("nccl does not load: CUDA's libraries or NCCL are not found");
  cr_assert_eq(comm->config_size, sizeof config);
  const phx_plugin *cuda =
      fake_plugin_load(test_path("lib/phalanx/phx_device_cuda.so"), &device_config, sizeof device_config);
  if (!cuda) cr_skip_test("cuda does not load: CUDA's libraries are not found");
  devices = cuda->table;
  const seen *s = look();
  if (s->gpus == 0) cr_skip_test("%s", s->why);
  if (s->gpus < RANKS) {
    const int version = nccl_version(), may = version >= SHARING && set && strcmp(set, "1") == 0;
    if (!may)
      cr_skip_test("one GPU: two ranks need two, or NCCL 2.30.3 (here: %d) and NCCL_MULTI_RANK_GPU_ENABLE=1", version);
    device_config.share = 1;
  }
  config.staging = 1 << 20;
  config.communicators = 4;
  comm_suite = (comm_suite_setup){.table = comm->table, .config = &config, .communicators = 4, .far_arena = 1,
                                  .any_order = !deterministic, .enter = enter, .leave = leave};
}

static double run(double timeout_s, fake_body *body, int32_t killed) {
  static fake_result result;
  fake_setup s = {.n = RANKS, .timeout_s = timeout_s, .limit_s = 200, .share_bytes = (int64_t)32 << 20};
  cr_assert(fake_job_run(&s, body, &result));
  const char *report = fake_job_report(&result, RANKS);
  cr_assert_eq(report[0], 0, "%s", report);
  cr_assert_eq(result.late, 0, "%d ranks were late", result.late);
  for (int r = 0; r < RANKS; r++)
    cr_expect(r == killed ? WIFSIGNALED(result.status[r]) : result.status[r] == 0, "rank %d: status %x", r,
              (unsigned)result.status[r]);
  return result.seconds;
}

static void canonical(void) {
  deterministic = 1;
  prepare();
}

TestSuite(gpu_nccl, .init = prepare, .timeout = 240);
TestSuite(gpu_nccl_canonical, .init = canonical, .timeout = 240);
Test(gpu_nccl, battery) { run(60, comm_suite_battery, -1); }
Test(gpu_nccl, send_recv_ring) { run(60, comm_suite_pairs, -1); }
Test(gpu_nccl, wrong_arguments_are_refused_and_harmless) { run(60, comm_suite_arguments, -1); }
Test(gpu_nccl_canonical, battery) { run(60, comm_suite_battery, -1); }

/* Nobody sees the death: the deadline ends the call, by name, and the GPU's kernel with it. */
static void one_is_killed(fake_rank *rank) {
  rig g;
  static float x[300000];
  if (!comm_suite_rig_open(&g, rank, COMM_SUITE_ARENA)) return;
  for (int k = 0;; k++) {
    if (rank->job.rank == 1 && k == 20) raise(SIGKILL);
    const phx_status status = g.comm->all_reduce(g.comm->ctx, x, x, 300000, PHX_F32, PHX_SUM, NULL, &g.err);
    if (status == PHX_OK) continue;
    FAKE_CHECK(rank, k == 20 && status == PHX_COMM && strstr(g.err.message, "rank 1"), "%d: %s", k, g.err.message);
    break;
  }
  comm_suite_rig_close(&g);
}
Test(gpu_nccl, a_killed_rank_ends_the_other) { cr_expect_lt(run(5, one_is_killed, 1), 60.0); }
