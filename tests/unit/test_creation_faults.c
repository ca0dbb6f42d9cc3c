/* A rank runs out of memory while it is created: every allocation of the core and every one that a plugin makes by
 * itself fails once, in turn, for one rank alone and for each of two.  The error says so, nothing is leaked, no file
 * stays open; the other rank is told, and does not wait. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plugin/config_load.h"
#include "fault_turn.h"
#include "job/job.h"
#include "rank_rig.h"
#include "raw_alloc.h"
#include "base/status.h"
#include "training.h"

#ifdef __SANITIZE_ADDRESS__
enum { STRIDE = 9 }; /* each turn has processes of its own, which look for leaks */
#else
enum { STRIDE = 1 };
#endif

/* What this rank has printed since `at`. */
static bool said_since(const rank_rig *rig, long at, const char *text) {
  char name[32], said[8192];
  snprintf(name, sizeof name, "errors.%d", rig->rank);
  fflush(stderr);
  const int fd = open(name, O_RDONLY | O_CLOEXEC);
  const ssize_t n = fd >= 0 ? pread(fd, said, sizeof said - 1, at) : 0;
  if (fd >= 0) close(fd);
  said[n > 0 ? n : 0] = 0;
  return strstr(said, text) != NULL;
}

static void begin(bool plugins, long turn) {
  if (plugins) raw_alloc_begin(turn);
  else fault_begin(FAULT_MEMORY, 0, turn);
}
static bool end(bool plugins) {
  if (plugins) raw_alloc_end();
  else fault_end();
  return plugins ? raw.fired : fault.fired;
}

/* Opens it once with a failure; returns whether there was such a call. */
static bool open_once(rank_rig *rig, const char *strategy, bool plugins, long turn) {
  phx_error err = PHX_ERROR_INIT;
  const long said = lseek(STDERR_FILENO, 0, SEEK_CUR);
  begin(plugins, turn);
  const phx_status status = rank_rig_open(rig, strategy, NULL, &err);
  const bool fired = end(plugins);
  const char *whose = !plugins ? "the core" : raw.plugin;
  if (!status != !fired)
    rank_rig_report(rig, __FILE__, __LINE__, "failed", "%s, allocation %ld of %s: status %d: %s", strategy, turn, whose,
                    status, err.message);
  /* of the configuration, it is said; of the rest, returned */
  if (status && !strstr(err.message, "memory") && !said_since(rig, said, "memory"))
    rank_rig_report(rig, __FILE__, __LINE__, "clear", "%s, allocation %ld of %s: %s", strategy, turn, whose,
                    err.message);
  if (fired && rig->size > 1) /* as a rank that ends */
    rig->job->fail(rig->job->ctx, err.message[0] ? err.message : "no memory for the configuration");
  return fired;
}

/* The core's, of one rank: its job outlives them. */
static void one_rank(rank_rig *rig, void *arg) {
  static const char *const strategies[] = {"ddp", "fsdp", "zero"};
  const int files = rank_rig_open_files();
  (void)arg;
  fault_install();
  rank_rig_close(rig);
  for (size_t s = 0; s < sizeof strategies / sizeof *strategies; s++) {
    long turn = 1;
    for (; open_once(rig, strategies[s], false, turn); turn++) continue;
    if (rig->report[0]) return;
    RIG_CHECK(rig, turn > 100, "%s: only %ld allocations were seen", strategies[s], turn - 1);
    rank_rig_close(rig);
    RIG_CHECK(rig, rank_rig_open_files() <= files, "%d files were open, and now %d", files, rank_rig_open_files());
  }
}

typedef struct turn_of { /* of a job of its own: after most of these failures there is none any more */
  const char *strategy;
  int32_t rank;
  bool plugins;
  long turn;
  bool *fired; /* shared */
} turn_of;

static void one_turn(rank_rig *rig, void *arg) {
  const turn_of *t = arg;
  phx_error err = PHX_ERROR_INIT;
  fault_install();
  RIG_CHECK(rig, !phx__job_open(15, &rig->job, &err), "%s", err.message);
  if (rig->rank == t->rank) {
    *t->fired = open_once(rig, t->strategy, t->plugins, t->turn);
    return;
  }
  const phx_status status = rank_rig_open(rig, t->strategy, NULL, &err);
  if (!status) return; /* nothing is created together after that allocation */
  RIG_CHECK(rig, status == PHX_COMM && strstr(err.message, "memory"), "%s, allocation %ld of rank %d: status %d: %s",
            t->strategy, t->turn, t->rank, status, err.message);
}

/* ---- the tests ---- */
/* Plugins are loaded and hashed here: every child has them. */
static char *in_dir(const char *strategy) {
  char path[600], name[64];
  char *dir = rank_rig_dir();
  phx__config *config = NULL;
  training_files(dir, rank_rig_model);
  snprintf(path, sizeof path, "%s/run.ini", dir);
  snprintf(name, sizeof name, "run.strategy=%.*s", (int)strcspn(strategy, "."), strategy);
  const phx__override overrides[] = {{"plugins.path=" PHX_TEST_PLUGINS, "--set"}, {name, "--strategy"}};
  cr_assert_eq(phx__config_load(path, overrides, 2, stderr, &config), PHX_OK);
  phx__config_free(config);
  return dir;
}

Test(creation_faults, of_one_rank, .timeout = 240) {
  char *dir = in_dir("ddp");
  rank_rig_run run = {.size = 1, .dir = dir, .limit_s = 200, .body = one_rank};
  cr_assert(rank_rig_ranks(&run), "%s", run.message);
  command_remove_dir(dir);
}

static void each_turn(const char *strategy, int32_t size, int32_t rank, bool plugins) {
  char *dir = in_dir(strategy);
  bool *fired = mmap(NULL, sizeof *fired, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  cr_assert_neq(fired, MAP_FAILED);
  turn_of t = {.strategy = strategy, .rank = rank, .plugins = plugins, .fired = fired};
  rank_rig_run run = {.size = size, .dir = dir, .limit_s = 20, .unopened = true, .body = one_turn, .arg = &t};
  for (t.turn = 1, *fired = true; *fired; t.turn += STRIDE)
    cr_assert(rank_rig_ranks(&run), "%s, allocation %ld of rank %d: %s", strategy, t.turn, rank, run.message);
  cr_assert_gt(t.turn, plugins ? 25 : 150, "%s: only %ld allocations were seen", strategy, t.turn);
  munmap(fired, sizeof *fired);
  command_remove_dir(dir);
}
Test(creation_faults, plugins_of_one_rank, .timeout = 240) {
  static const char *const strategies[] = {"ddp", "fsdp", "zero.stage=3"};
  for (int s = 0; s < 3; s++) each_turn(strategies[s], 1, 0, true);
}
Test(creation_faults, of_two_ranks, .timeout = 240) {
  each_turn("fsdp", 2, 0, false);
  each_turn("zero.stage=3", 2, 1, false);
}
Test(creation_faults, plugins_of_two_ranks, .timeout = 240) {
  each_turn("fsdp", 2, 1, true);
  each_turn("zero.stage=3", 2, 0, true);
}
