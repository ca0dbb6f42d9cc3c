/* Ranks that are lost in silence: a plugin that calls exit(0), a process that is killed or stopped while nobody's
 * launcher looks, a call of a plugin that never returns.  Each is named soon, and ends the job with status 3. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "foreign.h"
#include "training.h"

#define FAULTS "--set", "plugins.path=" PHX_TEST_ONLY_PLUGINS, "--set", "comm.plugin=fault"
#define SMALL "train", "run.ini", "--strategy", "ddp", "--set", "model.layers=1", FAULTS
#define SET(pair) "--set", pair
#define EXPECT(text, what) cr_expect((text) && strstr(text, what), "no '%s' in:\n%s", what, text)

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- exit(0) ---- */

static void expect_failed(const char *dir, const char *ranks, const char *what, const char *who, const char *at,
                          const char *says) {
  command_result r = RUN(dir, 60, SMALL, "-n", ranks, SET(what), SET(who), SET(at));
  cr_expect_eq(r.status, 3, "%s %s %s, -n %s: status %d\n%s", what, who, at, ranks, r.status, r.out);
  cr_expect_lt(r.seconds, 20, "%s %s: %g s", what, who, r.seconds); /* the timeout is 30 s */
  EXPECT(r.out, says);
  command_free(&r);
}

Test(lost_ranks, status_0_before_the_end_is_a_failure, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  expect_failed(dir, "2", "fault.what=leave", "fault.rank=-1", "fault.at=call",
                "has called exit(0), in step 5, in strategy ddp: release, stage 0");
  expect_failed(dir, "1", "fault.what=leave", "fault.rank=-1", "fault.at=create",
                "has called exit(0), in step 0, in comm fault: create");
  expect_failed(dir, "1", "fault.what=leave", "fault.rank=-1", "fault.at=destroy",
                "has called exit(0), in step 20, in comm fault: destroy");
  expect_failed(dir, "2", "fault.what=vanish", "fault.rank=-1", "fault.at=call",
                "exited with status 0 before it was done");
  expect_failed(dir, "3", "fault.what=vanish", "fault.rank=1", "fault.at=call",
                "exited with status 0 before it was done");
  command_remove_dir(dir);
}

/* ---- a call that never returns ---- */

static void expect_quiet(const char *dir, const char *ranks, const char *at, const char *timeout, const char *says) {
  command_result r = RUN(dir, 60, SMALL, "-n", ranks, SET("fault.what=hang"), SET("fault.rank=-1"), SET(at),
                         SET(timeout));
  cr_expect_eq(r.status, 3, "%s, -n %s: status %d\n%s", at, ranks, r.status, r.out);
  cr_expect_lt(r.seconds, 20, "%s: %g s", at, r.seconds);
  EXPECT(r.out, "no progress for ");
  EXPECT(r.out, says);
  command_free(&r);
}

Test(lost_ranks, a_call_that_never_returns_is_named, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  expect_quiet(dir, "1", "fault.at=create", "run.timeout=0.2",
               " s ([run] timeout = 0.2 s), in step 0, in comm fault: create");
  expect_quiet(dir, "2", "fault.at=call", "run.timeout=2",
               " s ([run] timeout = 2 s), in step 5, in strategy ddp: release, stage 0");
  expect_quiet(dir, "1", "fault.at=destroy", "run.timeout=0.2",
               " s ([run] timeout = 0.2 s), in step 20, in comm fault: destroy");
  command_remove_dir(dir);
}

/* Ten times the timeout in one call, and computing: slow is no failure. */
Test(lost_ranks, a_call_that_computes_for_long_is_no_failure, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = RUN(dir, 60, SMALL, "-n", "1", SET("fault.what=busy"), SET("fault.seconds=2"),
                         SET("fault.rank=0"), SET("fault.at=create"), SET("run.timeout=0.2"));
  cr_expect_eq(r.status, 0, "status %d\n%s", r.status, r.out);
  cr_expect_gt(r.seconds, 2);
  command_free(&r);
  command_remove_dir(dir);
}

/* ---- ranks of another launcher ---- */

/* Waits until the run has written `steps` lines. */
static void reach(foreign *f, const char *out, int steps) {
  char name[128];
  snprintf(name, sizeof name, "%s/metrics.jsonl", out);
  for (double end = now() + 30; now() < end; usleep(5000)) {
    char *metrics = command_read_file(f->dir, name);
    int lines = 0;
    for (const char *at = metrics; at && (at = strchr(at, '\n')); at++) lines++;
    free(metrics);
    if (lines >= steps) return;
  }
  char *log = foreign_log(f, 0);
  foreign_end(f);
  cr_assert_fail("the run did not come to step %d:\n%s", steps, log ? log : "");
}

#define LONG_RUN "train", "run.ini", "--strategy", "ddp", SET("model.layers=1"), "--steps", "1000000", \
                 SET("run.log_every=100000"), SET("run.timeout=60"), SET("checkpoint.every=500000")

static void lose_one(const char *dir, int kind, int number, double limit_s, const char *says) {
  char text[160], out[64];
  snprintf(out, sizeof out, "run.out=out-%s-%d", foreign_names[kind], number);
  foreign f = FOREIGN(dir, kind, 3, LONG_RUN, "-n", "3", SET(out));
  reach(&f, out + 8, 5);
  const pid_t victim = f.pids[1];
  const double began = now();
  kill(victim, number);
  snprintf(text, sizeof text, says, (int)victim);
  for (int r = 0; r < 3; r += 2) {
    const int status = foreign_status(&f, r, 30);
    char *log = foreign_log(&f, r);
    cr_expect_eq(status, 3, "%s, signal %d: rank %d ended with %d\n%s", foreign_names[kind], number, r, status, log);
    EXPECT(log, text);
    EXPECT(log, "rank 1 failed: ");
    free(log);
  }
  cr_expect_lt(now() - began, limit_s, "%s, signal %d: %g s", foreign_names[kind], number, now() - began);
  foreign_end(&f);
}

Test(lost_ranks, ranks_of_another_launcher_find_a_dead_one, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int kind = 0; kind < FOREIGN_KINDS; kind++)
    lose_one(dir, kind, kind == FOREIGN_MPIRUN ? SIGSEGV : SIGKILL, 10,
             kind == FOREIGN_MPIRUN ? "rank 1 failed: crashed: SIGSEGV"
                                    : "its process has ended without saying that it is done (pid %d), in step ");
  command_remove_dir(dir);
}

Test(lost_ranks, ranks_of_another_launcher_find_a_stopped_one, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  lose_one(dir, FOREIGN_SRUN, SIGSTOP, 20, "s (pid %d), in step ");
  command_remove_dir(dir);
}
