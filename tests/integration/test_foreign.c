/* Ranks that torchrun, mpirun or srun start: how many they are is taken from the launcher, and -n may only say the
 * same. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "foreign.h"
#include "training.h"

#define SMALL "train", "run.ini", "--strategy", "ddp", "--set", "model.layers=1", "--steps", "2"
#define SET(pair) "--set", pair

static void expect(foreign *f, int kind, int status, const char *says) {
  for (int r = 0; r < f->n; r++) {
    const int ended = foreign_status(f, r, 60);
    char *log = foreign_log(f, r);
    cr_expect_eq(ended, status, "%s: rank %d ended with %d:\n%s", foreign_names[kind], r, ended, log);
    if (says && r == 0) cr_expect(log && strstr(log, says), "no '%s' in:\n%s", says, log);
    free(log);
  }
  foreign_end(f);
}

Test(foreign, the_number_of_ranks_comes_from_the_launcher, .timeout = 120) {
  char *dir = command_temp_dir(), out[40], file[40];
  training_files(dir, training_odd_model);
  for (int kind = 0; kind < FOREIGN_KINDS; kind++) {
    snprintf(out, sizeof out, "run.out=%s", foreign_names[kind]);
    foreign f = FOREIGN(dir, kind, 2, SMALL, SET(out));
    expect(&f, kind, 0, "step    2/2");
    snprintf(file, sizeof file, "%s/run.json", foreign_names[kind]);
    cJSON *json = training_json(dir, file);
    cr_assert_not_null(json, "%s", file);
    cr_expect_eq(training_get(json, "ranks")->valueint, 2);
    cJSON_Delete(json);
  }
  command_remove_dir(dir);
}

Test(foreign, another_number_is_refused, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  foreign f = FOREIGN(dir, FOREIGN_TORCHRUN, 2, SMALL, "-n", "3");
  expect(&f, FOREIGN_TORCHRUN, 2,
         "run.ranks = 3, but the launcher started 2 ranks: leave -n and [run] ranks out, which takes what it started, "
         "or give -n 2");
  command_remove_dir(dir);
}

/* A shell under `srun --pty` is the only task of its step: -n starts ranks there, as anywhere. */
Test(foreign, the_only_task_of_a_step_starts_ranks, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  foreign f = FOREIGN(dir, FOREIGN_SRUN, 1, SMALL, "-n", "2");
  expect(&f, FOREIGN_SRUN, 0, "step    2/2");
  char *log = command_read_file(dir, "out/rank-1.log");
  cr_expect_not_null(log, "rank 1 was not started");
  free(log);
  command_remove_dir(dir);
}

/* Rank 0 is busy for a second after the last step, and rank 1 leaves no sooner: the lock is the last of the files. */
static void expect_end_together(const char *dir, int kind, int status, foreign *f) {
  char lock[64];
  snprintf(lock, sizeof lock, "%s/lock", foreign_names[kind]);
  const int ended = foreign_status(f, 1, 60);
  char *left = command_read_file(dir, lock), *log = foreign_log(f, 1);
  cr_expect_eq(ended, status, "%s: rank 1 ended with %d:\n%s", foreign_names[kind], ended, log);
  cr_expect_null(left, "%s: rank 1 has left, and rank 0 has not ended", foreign_names[kind]);
  cr_expect_eq(foreign_status(f, 0, 60), status);
  free(left);
  free(log);
  foreign_end(f);
}

static void await_step(foreign *f) {
  for (int i = 0; i < 4000; i++) {
    char *log = foreign_log(f, 0);
    const bool there = log && strstr(log, "step    1/");
    free(log);
    if (there) return;
    usleep(5000);
  }
  cr_assert_fail("rank 0 has not finished its first step after 20 s");
}

#define BUSY_END SET("plugins.path=" PHX_TEST_ONLY_PLUGINS), SET("comm.plugin=fault"), SET("fault.what=busy"), \
                 SET("fault.at=destroy"), SET("fault.rank=0"), SET("fault.seconds=1")
Test(foreign, nobody_leaves_before_rank_0_is_done, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  foreign f = FOREIGN(dir, FOREIGN_MPIRUN, 2, SMALL, BUSY_END, SET("run.out=mpirun"));
  expect_end_together(dir, FOREIGN_MPIRUN, 0, &f);
  command_remove_dir(dir);
}

Test(foreign, nobody_who_stopped_leaves_before_rank_0_is_done, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  foreign f = FOREIGN(dir, FOREIGN_SRUN, 2, SMALL, BUSY_END, SET("run.out=srun"), "--steps", "1000000",
              SET("checkpoint.every=500000"), SET("run.log_every=100000"));
  await_step(&f);
  kill(f.pids[1], SIGTERM);
  expect_end_together(dir, FOREIGN_SRUN, 5, &f);
  command_remove_dir(dir);
}

/* Half of the timeout is less than the 15 s in which a run elsewhere gives a sign of life: the others would give up. */
Test(foreign, a_lock_of_another_machine_is_refused_where_time_is_short, .timeout = 60) {
  static const char lock[] = "host elsewhere\nprocess 1 77\nstarted 2026-01-01T00:00:00Z\nplace another-boot/1\n"
                             "number 0000000000000abc\nbeat 0000000000000000\n";
  char *dir = command_temp_dir(), out[100];
  training_files(dir, training_odd_model);
  snprintf(out, sizeof out, "%s/out", dir);
  cr_assert_eq(mkdir(out, 0755), 0);
  command_write_file(dir, "out/lock", lock, sizeof lock - 1);
  foreign f = FOREIGN(dir, FOREIGN_TORCHRUN, 2, SMALL, SET("run.timeout=29"));
  cr_expect_eq(foreign_status(&f, 0, 10), 2, "rank 0 was not refused within 10 s");
  char *log = foreign_log(&f, 0);
  cr_expect(log && strstr(log, "is more than [run] timeout allows the other ranks: raise it, or remove the file if "
                               "that run has ended"), "%s", log);
  free(log);
  const int status = foreign_status(&f, 1, 10);
  cr_expect(status == 2 || status == 3, "rank 1 ended with %d", status);
  foreign_end(&f);
  command_remove_dir(dir);
}
