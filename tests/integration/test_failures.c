/* What goes wrong in a run, made on purpose: every failure is named, ends the job in time, and leaves nothing behind;
 * what is no failure (a stop that is continued, Ctrl-Z, a debugger, a busy machine) changes no bit. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fake_job.h"
#include "sanitizer.h"
#include "training.h"

#define FAULTS "--set", "plugins.path=" PHX_TEST_ONLY_PLUGINS, "--set", "comm.plugin=fault"
#define EXPECT(text, what) cr_expect(strstr(text, what), "no '%s' in:\n%s", what, text)

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The run's result, and the hash of its end. */
static void read_result(const char *dir, char hash[33], int *skipped) {
  cJSON *json = training_json(dir, "out/run.json");
  const cJSON *text = training_get(json, "result.state_hash"), *count = training_get(json, "result.skipped_steps");
  cr_assert(text && count, "the run has no result");
  snprintf(hash, 33, "%s", text->valuestring);
  if (skipped) *skipped = count->valueint;
  cJSON_Delete(json);
}

/* strategy: "zero" or "zero zero.stage=3" */
static command_result run_under(const char *dir, const char *strategy, const char *const *more) {
  const char *argv[40] = {"phalanx", "train", "run.ini", FAULTS, "--strategy"};
  char name[64];
  int n = 8;
  snprintf(name, sizeof name, "%.*s", (int)strcspn(strategy, " "), strategy);
  argv[n++] = name;
  if (strchr(strategy, ' ')) {
    argv[n++] = "--set";
    argv[n++] = strchr(strategy, ' ') + 1;
  }
  for (; *more; more++) argv[n++] = *more;
  return command_run(dir, 60, argv);
}
#define UNDER(dir, strategy, ...) run_under(dir, strategy, (const char *const[]){__VA_ARGS__, NULL})
static const char *const strategies[] = {
    "ddp",           "fsdp", "fsdp fsdp.sharding=grad_op", "fsdp fsdp.sharding=none", "zero zero.stage=1",
    "zero zero.stage=2", "zero zero.stage=3"};
enum { STRATEGIES = sizeof strategies / sizeof *strategies };

/* ---- named ---- */

Test(failures, collectives_that_differ_are_named_at_once, .timeout = 120) {
  static const char *const faults[] = {"fault.what=count", "fault.what=op"};
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int s = 0; s < STRATEGIES; s++) {
    command_result r = UNDER(dir, strategies[s], "-n", "2", "--set", faults[s % 2]);
    cr_expect_eq(r.status, 3, "%s: status %d", strategies[s], r.status);
    cr_expect_lt(r.seconds, 10, "%s: %g s", strategies[s], r.seconds); /* the timeout is 30 s */
    EXPECT(r.out, "ranks disagree: rank ");
    EXPECT(r.out, s % 2 ? "barrier()" : " f32");
    command_free(&r);
  }
  command_result r = UNDER(dir, "fsdp", "-n", "3", "--set", "fault.what=skip");
  cr_expect_eq(r.status, 3);
  cr_expect_lt(r.seconds, 10);
  EXPECT(r.out, "ranks disagree: rank ");
  command_free(&r);
  command_remove_dir(dir);
}

Test(failures, a_crash_names_the_plugin_and_the_call, .timeout = 60) {
  if (SANITIZED) cr_skip_test("a sanitizer reports crashes in its own way");
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "ddp", "-n", "2", "--set", "fault.what=crash");
  char *log = command_read_file(dir, "out/rank-1.log");
  cr_assert_eq(r.status, 3);
  EXPECT(r.out, "was killed by SIGSEGV");
  EXPECT(r.out, "[main] is in strategy ddp: release, stage 0");
  EXPECT(r.out, "crashed: SIGSEGV, a bad memory access, in strategy ddp: release, stage 0;");
  /* rank 0 waits for it in the collective, or has heard of it before */
  cr_expect(strstr(r.out, "absent: rank 1; all_reduce") || strstr(r.out, "rank 1 failed: crashed: SIGSEGV"), "%s",
            r.out);
  EXPECT(log, "phx_comm_fault.so("); /* the backtrace */
  EXPECT(log, "phx_strategy_ddp.so(");
  free(log);
  command_free(&r);
  static const char *const others[][3] = {
      {"fault.what=abort", "was killed by SIGABRT",
       "crashed: SIGABRT, an assertion, in strategy ddp: release, stage 0;"},
      {"fault.what=bus", "was killed by SIGBUS",
       "crashed: SIGBUS, a mapped file became shorter or memory ran out, in strategy ddp: release, stage 0;"}};
  for (int i = 0; i < 2; i++) {
    r = UNDER(dir, "ddp", "-n", "2", "--set", others[i][0]);
    log = command_read_file(dir, "out/rank-1.log");
    cr_assert_eq(r.status, 3);
    EXPECT(r.out, others[i][1]);
    EXPECT(r.out, others[i][2]);
    EXPECT(log, "phx_comm_fault.so(");
    EXPECT(log, "phx_strategy_ddp.so(");
    free(log);
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* It lives, and never enters the collective in which the others wait. */
Test(failures, a_rank_that_never_comes_is_named_as_absent, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "zero", "-n", "3", "--set", "fault.what=hang", "--set", "run.timeout=2");
  cr_expect_eq(r.status, 3);
  cr_expect_lt(r.seconds, 10, "%g s", r.seconds);
  EXPECT(r.out, "absent after 2.0 s: rank 1 (pid");
  const char *table = strstr(r.out, "condition                  step  collective");
  cr_assert(table && !strstr(table + 1, "condition  "), "not one table:\n%s", r.out);
  EXPECT(table, " alive ");
  EXPECT(table, "in strategy zero: release, stage 0");
  EXPECT(table, "\n  absent: rank 1; reduce");
  EXPECT(table, "waits, entered by rank 0, 2");
  command_free(&r);
  command_remove_dir(dir);
}

Test(failures, drift_is_found_within_k_steps, .timeout = 200) {
  char *dir = command_temp_dir(), plain[33], checked[33];
  training_files(dir, training_odd_model);
  for (int s = 0; s < STRATEGIES; s++) {
    const int whole = s == 0 || s == 3; /* gradients are reduced to all, weights never gathered */
    command_result r = UNDER(dir, strategies[s], "-n", "3", "--set", "run.drift_every=3", "--set", "fault.what=flip",
                             "--set", whole ? "fault.on=reduction" : "fault.on=gather", "--set", "fault.step=5",
                             "--set", whole ? "fault.lasting=no" : "fault.lasting=yes");
    cr_expect_eq(r.status, 3, "%s: status %d\n%s", strategies[s], r.status, r.out);
    /* what is flipped is the first element of what a step reduces first, or gathers first */
    EXPECT(r.out, whole ? "step 6: the ranks' weights have drifted apart: 'ln_f.weight' is the first of "
                        : "step 6: the ranks' weights have drifted apart: 'wte.weight' is the first of ");
    EXPECT(r.out, "rank 1 against rank 0 and those that agree with it");
    command_free(&r);
    r = UNDER(dir, strategies[s], "-n", "3");
    cr_assert_eq(r.status, 0, "%s", r.out);
    read_result(dir, plain, NULL);
    command_free(&r);
    r = UNDER(dir, strategies[s], "-n", "3", "--set", "run.drift_every=1");
    cr_assert_eq(r.status, 0, "%s", r.out);
    read_result(dir, checked, NULL);
    cr_expect_str_eq(plain, checked, "looking changes bits");
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* ---- survived ---- */

/* state_hash of a step, from metrics.jsonl */
static void hash_at(const char *metrics, int step, char hash[33]) {
  char key[32];
  snprintf(key, sizeof key, "{\"step\":%d,", step);
  const char *line = strstr(metrics, key), *at = line ? strstr(line, "\"state_hash\":\"") : NULL;
  cr_assert_not_null(at, "no hash of step %d", step);
  snprintf(hash, 33, "%s", at + 14);
}

Test(failures, a_step_that_is_not_finite_is_skipped_alike_everywhere, .timeout = 200) {
  char *dir = command_temp_dir(), first[33] = "", hash[33], before[33], after[33];
  int skipped = 0;
  training_files(dir, training_odd_model);
  for (int s = 0; s < STRATEGIES + 2; s++) {
    const int adding = s >= STRATEGIES; /* sums over micro-batches must forget it, too */
    const char *strategy = adding ? strategies[s == STRATEGIES ? 1 : 5] : strategies[s];
    command_result r = UNDER(dir, strategy, "-n", "2", "--set", "run.on_nonfinite=skip", "--set", "run.hash_every=1",
                             "--set", "run.drift_every=1", "--set", "fault.what=nan", "--set", "fault.on=reduction",
                             "--set", adding ? "batch.accumulate=2" : "batch.accumulate=1", "--set",
                             adding ? "batch.reduce=micro_batch" : "batch.reduce=step");
    cr_assert_eq(r.status, 0, "%s: status %d\n%s", strategy, r.status, r.out);
    read_result(dir, hash, &skipped);
    cr_expect_eq(skipped, 1, "%s: %d steps skipped", strategy, skipped);
    char *metrics = command_read_file(dir, "out/metrics.jsonl");
    hash_at(metrics, 4, before);
    hash_at(metrics, 5, after);
    cr_expect_str_eq(before, after, "%s: a skipped step changed the state", strategy);
    EXPECT(strstr(metrics, "{\"step\":5,"), "\"grad_norm\":null");
    EXPECT(strstr(metrics, "{\"step\":5,"), "\"skipped\":true");
    cr_expect_null(strstr(strstr(metrics, "{\"step\":6,"), "skipped"), "%s", strategy);
    if (s == 0 || s == STRATEGIES) snprintf(first, sizeof first, "%s", hash);
    cr_expect_str_eq(hash, first, "%s differs", strategy);
    free(metrics);
    command_free(&r);
  }
  command_result r = UNDER(dir, "ddp", "-n", "2", "--set", "fault.what=nan");
  cr_expect_eq(r.status, 3);
  EXPECT(r.out, "not finite, stopped before the update");
  command_free(&r);
  command_remove_dir(dir);
}

/* Step 7, the last whole one, is saved with the three steps that were skipped. */
Test(failures, a_resume_goes_on_counting_skipped_steps, .timeout = 120) {
#define NEVER_FINITE "-n", "2", "--set", "run.on_nonfinite=skip", "--set", "fault.what=nan", "--set", \
                     "fault.on=reduction", "--set", "fault.lasting=yes", "--set", "run.max_skipped=4", "--set", \
                     "checkpoint.every=100"
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r[] = {UNDER(dir, "ddp", NEVER_FINITE), UNDER(dir, "ddp", NEVER_FINITE, "--resume")};
  for (int i = 0; i < 2; i++) {
    cr_expect_eq(r[i].status, 3, "%d: status %d\n%s", i, r[i].status, r[i].out);
    EXPECT(r[i].out, "step 8: loss ");
    EXPECT(r[i].out, "not finite, as in the 3 steps before: nothing has been learned since step 4");
    command_free(&r[i]);
  }
  command_remove_dir(dir);
}

Test(failures, a_run_is_restarted_and_ends_with_the_same_bits, .timeout = 120) {
  char *dir = command_temp_dir(), plain[33], restarted[33];
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "zero", "-n", "2");
  cr_assert_eq(r.status, 0, "%s", r.out);
  read_result(dir, plain, NULL);
  command_free(&r);
  r = UNDER(dir, "zero", "-n", "2", "--set", "fault.what=kill", "--set", "fault.once=once", "--set",
            "run.max_restarts=1");
  cr_assert_eq(r.status, 0, "%s", r.out);
  EXPECT(r.out, "was killed by SIGKILL");
  EXPECT(r.out, "restart 1 of at most 1, on 2 ranks");
  EXPECT(r.out, "done after 1 restart; the first failure was: rank 1 (pid");
  read_result(dir, restarted, NULL);
  cr_expect_str_eq(plain, restarted);
  command_free(&r);
  command_remove_dir(dir);
}

/* The restart's --resume stands behind the user's own. */
Test(failures, a_resumed_run_is_restarted, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "zero", "-n", "2", "--set", "checkpoint.every=3", "--set", "run.steps=3");
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  r = UNDER(dir, "zero", "-n", "2", "--resume", "out", "--set", "checkpoint.every=3", "--set", "fault.step=8", "--set",
            "fault.what=kill", "--set", "fault.once=once", "--set", "run.max_restarts=1");
  cr_assert_eq(r.status, 0, "%s", r.out);
  EXPECT(r.out, "restart 1 of at most 1");
  command_free(&r);
  command_remove_dir(dir);
}

Test(failures, a_restart_goes_on_from_the_latest_checkpoint, .timeout = 120) {
  char *dir = command_temp_dir(), plain[33], restarted[33];
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "fsdp", "-n", "2");
  cr_assert_eq(r.status, 0, "%s", r.out);
  read_result(dir, plain, NULL);
  command_free(&r);
  r = UNDER(dir, "fsdp", "-n", "2", "--set", "checkpoint.every=3", "--set", "checkpoint.background=no", "--set",
            "fault.step=11", "--set", "fault.what=kill", "--set", "fault.once=once", "--set", "run.max_restarts=1");
  cr_assert_eq(r.status, 0, "%s", r.out);
  EXPECT(r.out, "restart 1 of at most 1, on 2 ranks, accumulate 1, from the checkpoint of step 9");
  read_result(dir, restarted, NULL);
  cr_expect_str_eq(plain, restarted);
  char *metrics = command_read_file(dir, "out/metrics.jsonl"), *first = strstr(metrics, "{\"step\":10,");
  cr_expect(first && !strstr(first + 1, "{\"step\":10,"), "step 10 is there twice, or not at all");
  free(metrics);
  command_free(&r);
  /* a save may be under way when the rank dies: that of step 10, or the one before is done */
  r = UNDER(dir, "fsdp", "-n", "2", "--set", "checkpoint.every=1", "--set", "checkpoint.background=yes", "--set",
            "fault.step=11", "--set", "fault.what=kill", "--set", "fault.once=background", "--set",
            "run.max_restarts=1");
  cr_assert_eq(r.status, 0, "%s", r.out);
  cr_expect(strstr(r.out, "from the checkpoint of step 9") || strstr(r.out, "from the checkpoint of step 10"), "%s",
            r.out);
  read_result(dir, restarted, NULL);
  cr_expect_str_eq(plain, restarted);
  command_free(&r);
  /* with a rank fewer, the same samples: 4 ranks x 3 and 3 ranks x 4 */
  r = UNDER(dir, "zero", "-n", "4", "--set", "batch.accumulate=3", "--set", "checkpoint.every=3", "--set",
            "checkpoint.background=no", "--set", "fault.step=11", "--set", "fault.what=kill", "--set",
            "fault.once=again", "--set", "run.max_restarts=1", "--set", "run.elastic=yes");
  cr_assert_eq(r.status, 0, "%s", r.out);
  EXPECT(r.out, "restart 1 of at most 1, on 3 ranks, accumulate 4, from the checkpoint of step 9");
  command_free(&r);
  command_remove_dir(dir);
}

Test(failures, a_crash_loop_stops_at_the_limit, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "ddp", "-n", "2", "--set", "fault.what=exit", "--set", "run.max_restarts=2");
  cr_expect_eq(r.status, 3);
  EXPECT(r.out, "restart 2 of at most 2");
  EXPECT(r.out, "given up after 2 restarts; the first failure was: rank 1 (pid");
  EXPECT(r.out, "exited with status 9, in step 5");
  cr_expect_null(strstr(r.out, "restart 3"));
  command_free(&r);
  r = UNDER(dir, "ddp", "-n", "1", "--set", "fault.what=exit", "--set", "fault.rank=0", "--set", "run.max_restarts=1");
  cr_expect_eq(r.status, 3);
  EXPECT(r.out, "given up after 1 restart;"); /* a job of one rank, too */
  command_free(&r);
  command_remove_dir(dir);
}

Test(failures, an_elastic_run_goes_on_without_the_lost_rank, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = UNDER(dir, "fsdp", "-n", "4", "--set", "batch.accumulate=3", "--set", "fault.what=kill", "--set",
                           "fault.once=once", "--set", "run.max_restarts=1", "--set", "run.elastic=yes");
  cr_expect_eq(r.status, 0, "%s", r.out);
  EXPECT(r.out, "restart 1 of at most 1, on 3 ranks, accumulate 4");
  cJSON *json = training_json(dir, "out/run.json");
  cr_expect_eq(training_get(json, "ranks")->valueint, 3);
  cJSON_Delete(json);
  command_free(&r);
  r = UNDER(dir, "fsdp", "-n", "4", "--set", "fault.what=kill", "--set", "run.max_restarts=1", "--set",
            "run.elastic=yes");
  cr_expect_eq(r.status, 3);
  EXPECT(r.out, "no restart: run.elastic: the global batch of 4 ranks x 1 micro x 1 accumulate = 4 sequences does not "
                "divide over 3 ranks x 1 = 3 (remainder 1)");
  command_free(&r);
  /* a rank that ends by itself is not lost */
  r = UNDER(dir, "fsdp", "-n", "4", "--set", "fault.what=exit", "--set", "fault.once=again", "--set",
            "run.max_restarts=1", "--set", "run.elastic=yes");
  cr_expect_eq(r.status, 0, "%s", r.out);
  EXPECT(r.out, "restart 1 of at most 1, on 4 ranks");
  command_free(&r);
  r = UNDER(dir, "ddp", "--set", "run.elastic=yes");
  cr_expect_eq(r.status, 2);
  EXPECT(r.out, "max_restarts");
  command_free(&r);
  command_remove_dir(dir);
}

/* Neither the training data nor the held-out data divide by three ranks, and both are too few for the run. */
Test(failures, data_that_do_not_divide_never_hang, .timeout = 120) {
  char *dir = command_temp_dir(), first[33] = "", hash[33];
  uint16_t tokens[16 * 33 + 6];
  training_files(dir, training_odd_model);
  for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) tokens[i] = (uint16_t)(i * 7 % 257);
  command_write_file(dir, "train.bin", tokens, sizeof tokens);
  command_write_file(dir, "valid.bin", tokens, (5 * 33 + 1) * sizeof *tokens);
  for (int s = 0; s < STRATEGIES; s++) {
    command_result r = UNDER(dir, strategies[s], "-n", "3", "--set", "batch.micro=2", "--set", "data.valid=valid.bin",
                             "--set", "run.valid_every=3", "--set", "run.timeout=10");
    cr_assert_eq(r.status, 0, "%s: status %d\n%s", strategies[s], r.status, r.out);
    read_result(dir, hash, NULL);
    if (s == 0) snprintf(first, sizeof first, "%s", hash);
    cr_expect_str_eq(hash, first, "%s differs", strategies[s]);
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* ---- processes that stop ---- */

typedef struct job {
  pid_t launcher, ranks[4];
  int n;
} job;

static job start(const char *dir, int ranks, const char *const *more) {
  const char *argv[40] = {PHX_TEST_COMMAND, "train", "run.ini", "-n"};
  char n[8], path[64], text[256];
  int used = 4;
  job j = {.n = ranks};
  snprintf(n, sizeof n, "%d", ranks);
  argv[used++] = n;
  for (; *more; more++) argv[used++] = *more;
  j.launcher = fork();
  if (j.launcher == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (chdir(dir)) _exit(126);
    const int out = open("output", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    dup2(out, 1);
    dup2(out, 2);
    execv(argv[0], (char *const *)(uintptr_t)argv);
    _exit(127);
  }
  setpgid(j.launcher, j.launcher);
  snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)j.launcher, (int)j.launcher);
  for (double end = now() + 10; now() < end; usleep(2000)) {
    const int fd = open(path, O_RDONLY);
    const ssize_t bytes = fd >= 0 ? read(fd, text, sizeof text - 1) : 0;
    if (fd >= 0) close(fd);
    text[bytes > 0 ? bytes : 0] = 0;
    int got = 0, skip = 0, pid = 0;
    for (const char *at = text; got < ranks && sscanf(at, "%d%n", &pid, &skip) == 1; at += skip) j.ranks[got++] = pid;
    if (got == ranks) return j;
  }
  cr_assert_fail("the ranks did not start");
  return j;
}
#define START(dir, ranks, ...) start(dir, ranks, (const char *const[]){__VA_ARGS__, NULL})

/* Waits until the run has written `steps` lines. */
static void reach(const char *dir, int steps) {
  for (double end = now() + 20; now() < end; usleep(2000)) {
    char *metrics = command_read_file(dir, "out/metrics.jsonl");
    int lines = 0;
    for (const char *at = metrics; at && (at = strchr(at, '\n')); at++) lines++;
    free(metrics);
    if (lines >= steps) return;
  }
  cr_assert_fail("the run did not come to step %d", steps);
}

/* The status within `seconds`; afterwards nothing of the job is left. */
static int end_of(const job *j, double seconds) {
  int status = 0, found = 0;
  for (double end = now() + seconds; now() < end && !found; usleep(2000))
    found = waitpid(j->launcher, &status, WNOHANG) == j->launcher;
  if (!found) {
    kill(-j->launcher, SIGKILL);
    waitpid(j->launcher, &status, 0);
  }
  for (int r = 0; r < j->n; r++) {
    for (double end = now() + 1; kill(j->ranks[r], 0) == 0 && now() < end; usleep(1000))
      waitpid(j->ranks[r], NULL, WNOHANG);
    cr_expect(kill(j->ranks[r], 0) == -1 && errno == ESRCH, "rank %d is left", r);
  }
  cr_expect_eq(command_shared_memory(), 0, "shared memory is left");
  return !found ? -1 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define LONG_RUN "--steps", "300", "--strategy", "fsdp", "--set", "run.log_every=100"

Test(failures, stops_that_are_continued_change_no_bit, .timeout = 120) {
  char *dir = command_temp_dir(), plain[33], hash[33];
  training_files(dir, training_odd_model);
  command_result r = RUN(dir, 60, "train", "run.ini", "-n", "2", LONG_RUN);
  cr_assert_eq(r.status, 0, "%s", r.out);
  read_result(dir, plain, NULL);
  command_free(&r);
  for (int all = 0; all < 2; all++) { /* one rank for 2 s; then Ctrl-Z of all, longer than any limit */
    command_result gone = command_run(dir, 5, (const char *const[]){"/bin/rm", "-rf", "out", NULL});
    command_free(&gone);
    job j = START(dir, 2, LONG_RUN, "--set", all ? "run.timeout=2" : "run.timeout=30");
    reach(dir, 20);
    kill(all ? -j.launcher : j.ranks[1], SIGSTOP);
    usleep(all ? 4500000 : 2000000);
    kill(all ? -j.launcher : j.ranks[1], SIGCONT);
    const int status = end_of(&j, 60);
    char *output = command_read_file(dir, "output");
    cr_assert_eq(status, 0, "status %d:\n%s", status, output);
    read_result(dir, hash, NULL);
    cr_expect_str_eq(hash, plain);
    free(output);
  }
  command_remove_dir(dir);
}

Test(failures, a_stopped_rank_is_named_within_5_s_and_the_job_ends, .timeout = 60) {
  char *dir = command_temp_dir(), text[96];
  training_files(dir, training_odd_model);
  job j = START(dir, 2, "--steps", "1000000", "--strategy", "zero", "--set", "run.timeout=60", "--set",
                "run.log_every=100000");
  reach(dir, 20);
  const double stopped = now();
  kill(j.ranks[1], SIGSTOP);
  cr_expect_eq(end_of(&j, 10), 3);
  cr_expect_lt(now() - stopped, 5.0, "ended after %.2f s", now() - stopped);
  char *output = command_read_file(dir, "output");
  snprintf(text, sizeof text, "rank 1 (pid %d) has been stopped (SIGSTOP)", (int)j.ranks[1]);
  EXPECT(output, text);
  EXPECT(output, "is stopped (SIGSTOP)"); /* in the table; absent, or inside a collective: as it happened */
  free(output);
  command_remove_dir(dir);
}

/* Longer in the debugger's hands than the limit for a stopped rank, and than waiters look. */
Test(failures, a_rank_under_a_debugger_is_no_failure, .timeout = 60) {
  char *dir = command_temp_dir();
  int status;
  training_files(dir, training_odd_model);
  job j = START(dir, 2, LONG_RUN, "--set", "run.timeout=0");
  reach(dir, 20);
  if (ptrace(PTRACE_SEIZE, j.ranks[1], NULL, NULL) != 0 || ptrace(PTRACE_INTERRUPT, j.ranks[1], NULL, NULL) != 0) {
    kill(-j.launcher, SIGKILL);
    end_of(&j, 10);
    command_remove_dir(dir);
    cr_skip_test("this machine lets nobody debug");
  }
  cr_assert_eq(waitpid(j.ranks[1], &status, __WALL), j.ranks[1]);
  sleep(5);
  cr_expect_eq(kill(j.launcher, 0), 0);
  cr_expect_eq(ptrace(PTRACE_DETACH, j.ranks[1], NULL, NULL), 0);
  cr_expect_eq(end_of(&j, 40), 0);
  command_remove_dir(dir);
}

/* ---- no false alarm ---- */

static int n_calls;
static void many_calls(fake_rank *rank) {
  const phx_plugin *plugin = rank->arg;
  const phx_comm_table *table = plugin->table;
  static char config[256];
  phx_error err = {.struct_size = sizeof err};
  phx_comm *c = NULL;
  cr_assert_leq(plugin->config_size, sizeof config);
  fake_plugin_load(PHX_TEST_PLUGINS "/phx_comm_shm.so", config, sizeof config);
  phx_status status = table->create(&rank->host, config, 4096, &c, &err);
  FAKE_CHECK(rank, status == PHX_OK, "%s", err.message);
  for (int k = 0; k < n_calls; k++) {
    int64_t x = c->rank + k;
    status = c->all_reduce(c->ctx, &x, &x, 1, PHX_I64, PHX_SUM, NULL, &err);
    FAKE_CHECK(rank, status == PHX_OK, "call %d: %s", k, err.message);
    FAKE_CHECK(rank, x == 2 * k + 1, "call %d gave %lld", k, (long long)x);
  }
  table->destroy(c);
}

/* PHX_TEST_CALLS: another number. */
Test(failures, no_false_alarm_on_a_busy_machine, .timeout = 3600) {
  static fake_result result;
  static char config[256];
  pid_t busy[8];
  const char *asked = getenv("PHX_TEST_CALLS");
  n_calls = asked ? atoi(asked) : 100000;
  const phx_plugin *plugin = fake_plugin_load(PHX_TEST_PLUGINS "/phx_comm_shm.so", config, sizeof config);
  cr_assert_not_null(plugin);
  cpu_set_t before, two;
  CPU_ZERO(&two);
  cr_assert_eq(sched_getaffinity(0, sizeof before, &before), 0);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&two) < 2; cpu++)
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &two);
  cr_assert_eq(sched_setaffinity(0, sizeof two, &two), 0); /* all ten of them: however large the machine */
  for (int i = 0; i < 8; i++) {
    busy[i] = fork();
    if (busy[i] == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (volatile unsigned turns = 0;; turns++) continue;
    }
  }
  fake_setup setup = {
      .n = 2, .timeout_s = 3, .limit_s = 3500, .share_bytes = 64 << 20, .arg = (void *)(uintptr_t)plugin};
  const int ran = fake_job_run(&setup, many_calls, &result);
  for (int i = 0; i < 8; i++) {
    kill(busy[i], SIGKILL);
    waitpid(busy[i], NULL, 0);
  }
  sched_setaffinity(0, sizeof before, &before);
  cr_assert(ran);
  cr_expect_eq(result.late, 0);
  cr_expect_str_empty(fake_job_report(&result, 2));
  if (asked) fprintf(stderr, "%d collectives beside 8 busy processes: %.1f s, no alarm\n", n_calls, result.seconds);
}
