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
#include "root.h"
#include "sanitizer.h"
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

/* a sanitizer's own _exit is in the way */
#define VANISHED (SANITIZED ? "" : "has called _exit(0), in step 5, in strategy ddp: ")

Test(lost_ranks, status_0_before_the_end_is_a_failure, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  expect_failed(dir, "2", "fault.what=leave", "fault.rank=-1", "fault.at=call",
                "has called exit(0), in step 5, in strategy ddp: release, stage 0");
  expect_failed(dir, "1", "fault.what=leave", "fault.rank=-1", "fault.at=create",
                "has called exit(0), in step 0, in comm fault: create");
  expect_failed(dir, "1", "fault.what=leave", "fault.rank=-1", "fault.at=destroy",
                "has called exit(0), in step 20, in comm fault: destroy");
  expect_failed(dir, "1", "fault.what=vanish", "fault.rank=0", "fault.at=call", VANISHED);
  expect_failed(dir, "3", "fault.what=vanish", "fault.rank=1", "fault.at=call", VANISHED);
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

/* ---- the communicator is asked ---- */

#define HELD(health, ranks, timeout, what) \
  RUN(dir, 60, SMALL, "-n", ranks, SET("fault.health=" health), SET("fault.what=" what), SET("run.timeout=" timeout))
#define IN_RELEASE " s), in step 5, in strategy ddp: release, stage 0"

/* Its reason ends the job when half of the timeout is over. */
Test(lost_ranks, an_unwell_communicator_says_why, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = HELD("sick", "2", "16", "hang");
  cr_expect_eq(r.status, 3, "status %d\n%s", r.status, r.out);
  cr_expect_lt(r.seconds, 15, "%g s", r.seconds);
  EXPECT(r.out, " s ([run] timeout = 16" IN_RELEASE ": comm fault says: link 3 is down");
  command_free(&r);
  r = HELD("mute", "2", "4", "hang");
  cr_expect_eq(r.status, 3, "status %d\n%s", r.status, r.out);
  EXPECT(r.out, IN_RELEASE ": comm fault says: DEVICE (status 5), without a reason");
  command_free(&r);
  command_remove_dir(dir);
}

static int count(const char *text, const char *word) {
  int n = 0;
  for (const char *at = text; at && (at = strstr(at, word)); at++) n++;
  return n;
}

/* abort, once, ends the wait of a call that nothing else ends: after health, and after a peer has given up. */
Test(lost_ranks, abort_ends_a_call_that_waits, .timeout = 120) {
  static const char *const healths[] = {"fault.health=sick", "fault.health=ok"};
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int i = 0; i < 2; i++) {
    command_result r = RUN(dir, 60, SMALL, "-n", "2", SET(healths[i]), SET("fault.what=await"), SET("run.timeout=4"));
    char *log = command_read_file(dir, "out/rank-1.log");
    cr_expect_eq(r.status, 3, "status %d\n%s", r.status, r.out);
    cr_expect_lt(r.seconds, 15, "%g s", r.seconds);
    EXPECT(log, "fault: its wait has ended with an abort");
    cr_expect_eq(count(log, "abort, call "), 1, "%s", log);
    free(log);
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* Whatever health does, the deadline ends the rank. */
Test(lost_ranks, a_health_that_hangs_or_crashes_changes_no_deadline, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = RUN(dir, 60, SMALL, "-n", "2", SET("fault.health=hang"), SET("fault.what=hang"),
                         SET("fault.rank=-1"), SET("run.timeout=2"));
  cr_expect_eq(r.status, 3, "status %d\n%s", r.status, r.out);
  cr_expect_lt(r.seconds, 15, "%g s", r.seconds);
  EXPECT(r.out, " s ([run] timeout = 2" IN_RELEASE);
  cr_expect_null(strstr(r.out, "says:"), "%s", r.out);
  command_free(&r);
  r = HELD("crash", "2", "4", "hang");
  cr_expect_eq(r.status, 3, "status %d\n%s", r.status, r.out);
  cr_expect_lt(r.seconds, 15, "%g s", r.seconds);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT(r.out, "in the communicator's health, while [main] was in strategy ddp: release, stage 0");
#endif
  command_free(&r);
  command_remove_dir(dir);
}

/* It hangs while [main] is only slow, and [main] comes back: the run is what it would have been. */
Test(lost_ranks, a_health_that_hangs_does_not_fail_a_run_that_goes_on, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = RUN(dir, 60, SMALL, "-n", "1", SET("fault.health=hang"), SET("fault.what=busy"),
                         SET("fault.seconds=3"), SET("fault.rank=0"), SET("run.timeout=2"));
  cr_expect_eq(r.status, 0, "status %d\n%s", r.status, r.out);
  EXPECT(r.out, "a call of health or abort does not return: the communicator and the device stay open");
  command_free(&r);
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

/* ---- slow, and not lost ---- */

/* Rank 1 computes for a second more in step 2; the others wait for it. */
Test(lost_ranks, the_slowest_rank_is_named_by_its_own_time, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = RUN(dir, 60, SMALL, "-n", "3", SET("fault.what=busy"), SET("fault.seconds=1"),
                         SET("fault.step=2"), "--steps", "3", SET("run.balance_every=3"));
  cr_assert_eq(r.status, 0, "status %d\n%s", r.status, r.out);
  EXPECT(r.out, "steps 1 to 3: rank 1 is the slowest with "); /* the line of three steps, and the last one */
  cJSON *json = training_json(dir, "out/run.json");
  const cJSON *own = training_get(json, "result.balance.own_ms"), *wait = training_get(json, "result.balance.wait_ms");
  cr_assert(own && wait && cJSON_GetArraySize(own) == 3 && cJSON_GetArraySize(wait) == 3);
  cr_expect_eq(training_get(json, "result.balance.slowest")->valueint, 1);
  cr_expect_gt(training_get(json, "result.balance.ratio")->valuedouble, 1.5);
  for (int i = 0; i < 3; i += 2) { /* of steps 2 and 3: half a second each */
    cr_expect_gt(cJSON_GetArrayItem(own, 1)->valuedouble, cJSON_GetArrayItem(own, i)->valuedouble + 250);
    cr_expect_gt(cJSON_GetArrayItem(wait, i)->valuedouble, 250);
  }
  cJSON_Delete(json);
  char *metrics = command_read_file(dir, "out/metrics.jsonl");
  EXPECT(strstr(metrics, "{\"step\":3,"), "\"balance\":{\"from\":1,\"slowest\":1,\"own_ms\":[");
  free(metrics);
  command_free(&r);
  command_remove_dir(dir);
}

/* ---- ranks of another launcher ---- */

/* Waits until rank 0 has written that: the ranks have met then. */
static void reach(foreign *f, const char *text) {
  char *log = NULL;
  for (double end = now() + 40; now() < end; usleep(5000)) {
    free(log);
    log = foreign_log(f, 0);
    if (log && strstr(log, text)) {
      free(log);
      return;
    }
  }
  foreign_end(f);
  cr_assert_fail("rank 0 did not come to '%s':\n%s", text, log ? log : "");
}

#define LONG_RUN "train", "run.ini", "--strategy", "ddp", SET("model.layers=1"), "--steps", "1000000", \
                 SET("run.log_every=100000"), SET("run.timeout=60"), SET("checkpoint.every=500000")

/* Both of a GPU, and of its communicator: the doubles lie in one folder. */
static char doubles[160];
static void use_doubles(const char *dir) {
  char command[600], path[128];
  snprintf(command, sizeof command, "mkdir -m 755 %s/doubles && cp %s %s %s/doubles/", dir,
           test_path("lib/phalanx-emulated/phx_device_cuda.so"), test_path("lib/phalanx-test/phx_comm_nccl_double.so"),
           dir);
  cr_assert_eq(system(command), 0);
  snprintf(path, sizeof path, "%s/double-memory", dir);
  snprintf(doubles, sizeof doubles, "plugins.path=%s/doubles", dir);
  setenv("NCCL_DOUBLE_MEMORY", path, 1);
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
}
static const char *const on_shm[] = {"comm.plugin=shm", "run.seed=1", "run.seed=1"};
static const char *const on_nccl[] = {"comm.plugin=nccl_double", "device.plugin=cuda", doubles};

static void lose_one(const char *dir, int kind, const char *const *comm, int number, double limit_s,
                     const char *says) {
  char text[160], out[64];
  snprintf(out, sizeof out, "run.out=out-%s-%d", foreign_names[kind], number);
  const int n = comm == on_nccl ? 2 : 3; /* the doubles are slow */
  foreign f = FOREIGN(dir, kind, n, LONG_RUN, "-n", n == 2 ? "2" : "3", SET(out), SET(comm[0]), SET(comm[1]),
                      SET(comm[2]), comm == on_nccl ? "--set" : NULL, "cuda.share=yes");
  reach(&f, n == 2 ? "] NCCL " : "step    1/");
  const pid_t victim = f.pids[1];
  const double began = now();
  kill(victim, number);
  snprintf(text, sizeof text, says, (int)victim);
  for (int r = 0; r < n; r += 2) {
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
    lose_one(dir, kind, on_shm, kind == FOREIGN_MPIRUN ? SIGSEGV : SIGKILL, 10,
             kind == FOREIGN_MPIRUN ? "rank 1 failed: crashed: SIGSEGV"
                                    : "its process has ended without saying that it is done (pid %d), in step ");
  command_remove_dir(dir);
}

Test(lost_ranks, ranks_of_another_launcher_find_a_stopped_one, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  lose_one(dir, FOREIGN_SRUN, on_shm, SIGSTOP, 20, "s (pid %d), in step ");
  command_remove_dir(dir);
}

Test(lost_ranks, a_stopped_one_is_found_with_nccl, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  use_doubles(dir);
  lose_one(dir, FOREIGN_TORCHRUN, on_nccl, SIGSTOP, 25, "s (pid %d), in step ");
  command_remove_dir(dir);
}

/* ---- who is asked to end while a peer is lost ---- */

/* Rank 0, asked by SIGTERM now, ends with status 3 within `limit_s`, and names rank 1. */
static void expect_ends(foreign *f, double limit_s, const char *says) {
  const double began = now();
  kill(f->pids[0], SIGTERM);
  const int status = foreign_status(f, 0, limit_s + 20);
  char *log = foreign_log(f, 0);
  cr_expect_eq(status, 3, "rank 0 ended with %d\n%s", status, log);
  cr_expect_lt(now() - began, limit_s, "%g s after SIGTERM", now() - began);
  EXPECT(log, "rank 1 failed: ");
  EXPECT(log, says);
  free(log);
  foreign_end(f);
}

/* The timeout is 60 s, and the run would save on SIGTERM: it waits in a collective for who does not come. */
Test(lost_ranks, a_rank_that_waits_for_a_stopped_one_ends_on_sigterm, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int kind = 0; kind < FOREIGN_KINDS; kind += 2) {
    foreign f = FOREIGN(dir, kind, 2, LONG_RUN, SET(kind ? "run.out=srun" : "run.out=torchrun"));
    reach(&f, "step    1/");
    kill(f.pids[1], SIGSTOP);
    usleep(200000);
    expect_ends(&f, 8, "its process has been stopped for ");
  }
  command_remove_dir(dir);
}

/* Rank 0 never comes back from a call; its peer waits for it, and dies.  By itself it would end after 5 s. */
Test(lost_ranks, a_rank_that_is_stuck_in_a_call_ends_on_sigterm, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  foreign f = FOREIGN(dir, FOREIGN_TORCHRUN, 2, LONG_RUN, FAULTS, SET("fault.what=hang"), SET("fault.rank=0"),
                      SET("fault.step=2"));
  reach(&f, "step    1/");
  usleep(500000);
  kill(f.pids[1], SIGKILL);
  usleep(100000);
  expect_ends(&f, 3, "the job has failed, and [main] does not come back: the process ends");
  command_remove_dir(dir);
}
