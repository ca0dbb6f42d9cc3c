/* Signals to a run: one is a wish to save and stop, whoever gets it; a second press of Ctrl-C ends the run at once, and
 * what comes twice at once is one press.  The exit status tells which. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "root.h"
#include "job/stop.h"
#include "training.h"

#define HEARD "press Ctrl-C again to end at once"
static const char tiny_model[] =
    "[batch]\nmicro = 1\nsequence = 9\n"
    "[model]\nplugin = gpt\nlayers = 2\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";
static const char slow_model[] = /* with batch.accumulate = 39 a step takes seconds */
    "[batch]\nmicro = 4\nsequence = 128\n"
    "[model]\nplugin = gpt\nlayers = 4\nheads = 4\nwidth = 256\ncontext = 128\nvocab = 257\n";

static char *dir;
static void begin_tiny(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, tiny_model);
}
static void begin_slow(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, slow_model);
}
static void end(void) { command_remove_dir(dir); }
TestSuite(stops, .init = begin_tiny, .fini = end, .timeout = 120);
TestSuite(presses, .init = begin_slow, .fini = end, .timeout = 120);

/* ---- a run that goes on meanwhile ---- */
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void rest(double seconds) {
  for (const double until = now() + seconds; now() < until;) usleep(2000);
}

static size_t bytes_of(const char *name) {
  char path[512];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", dir, name);
  return stat(path, &st) ? 0 : (size_t)st.st_size;
}

static int says(const char *text) {
  char *said = command_read_file(dir, "said");
  int n = 0;
  for (const char *at = said; at && (at = strstr(at, text)); at++) n++;
  free(said);
  return n;
}

/* `phalanx train run.ini` and the words, in a process group of its own; what it says goes to DIR/said. */
static pid_t start(const char *words) {
  const char *argv[40] = {"phalanx", "train", "run.ini"};
  char line[1024];
  int n = 3;
  snprintf(line, sizeof line, "%s", words);
  for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[n++] = word;
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0);
    signal(SIGINT, SIG_DFL); /* whoever runs the tests may ignore them */
    signal(SIGHUP, SIG_DFL);
    const int out = chdir(dir) ? -1 : open("said", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
    dup2(out, 1);
    dup2(out, 2);
    execv(test_path("bin/phalanx"), (char *const *)(unsigned long)argv);
    _exit(127);
  }
  cr_assert_gt(pid, 0);
  setpgid(pid, pid);
  return pid;
}

static void forget_run(void) {
  char line[300];
  snprintf(line, sizeof line, "rm -rf %s/out", dir);
  cr_assert_eq(system(line), 0);
}

static void wait_for_file(const char *name, size_t bytes) {
  for (int i = 0; i < 6000 && bytes_of(name) < bytes; i++) usleep(5000);
  cr_assert_geq(bytes_of(name), bytes, "no %s after 30 s", name);
}
static void wait_for_step(void) { wait_for_file("out/metrics.jsonl", 10); }
static void wait_for_ranks(void) { wait_for_file("out/run.json", 10); }

/* The exit status, or 128 + a signal, or -1: it went on for longer than that. */
static int status_of(pid_t pid, double seconds) {
  int status = 0;
  for (const double until = now() + seconds; now() < until; usleep(5000))
    if (waitpid(pid, &status, WNOHANG) == pid)
      return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  kill(-pid, SIGKILL);
  waitpid(pid, &status, 0);
  return -1;
}

static void expect_status(pid_t pid, double seconds, int status) {
  const int got = status_of(pid, seconds);
  char *said = command_read_file(dir, "said");
  cr_assert_eq(got, status, "status %d instead of %d:\n%s", got, status, said);
  free(said);
}

/* A rank of the launcher `pid`: the last of its children. */
static pid_t last_rank(pid_t pid) {
  char path[64], text[256] = "";
  snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)pid, (int)pid);
  FILE *f = fopen(path, "re");
  if (!f || !fgets(text, sizeof text, f)) cr_skip_test("the kernel does not list children");
  fclose(f);
  char *at = strchr(text, ' ');
  cr_assert_not_null(at, "one rank only: %s", text);
  return (pid_t)strtol(at, NULL, 10);
}

/* ---- one signal ---- */
enum target { COMMAND, ONE_RANK, GROUP };
#define LONG "--set run.steps=1000000 --set optimizer.schedule=constant --set run.log_every=1000 "

static int stopped_at(const char *name) {
  cJSON *json = training_json(dir, "out/run.json");
  const cJSON *step = training_get(json, "stopped.step"), *by = training_get(json, "stopped.by");
  cr_assert(step && by && !strcmp(by->valuestring, name), "%s: run.json does not say so", name);
  const int at = (int)step->valuedouble;
  cJSON_Delete(json);
  return at;
}

static void check_signal(int number, enum target target, int ranks) {
  char words[512];
  snprintf(words, sizeof words, "-n %d --set checkpoint.every=1000000 " LONG, ranks);
  const pid_t pid = start(words);
  wait_for_step();
  pid_t who = pid;
  if (target == GROUP) who = -pid;
  if (target == ONE_RANK) who = last_rank(pid);
  kill(who, number);
  expect_status(pid, 30, 5);
  cr_expect_eq(says(HEARD), number == SIGINT);
  cr_expect_eq(says("--resume goes on from there"), 1);
  cr_expect_gt(stopped_at(phx__stop_name(number)), 0);
}
Test(stops, sigterm_to_the_launcher) { check_signal(SIGTERM, COMMAND, 2); }
Test(stops, sigterm_to_one_rank) { check_signal(SIGTERM, ONE_RANK, 2); }
Test(stops, sigterm_to_the_group) { check_signal(SIGTERM, GROUP, 2); }
Test(stops, sigterm_to_a_run_of_one_rank) { check_signal(SIGTERM, COMMAND, 1); }
Test(stops, sigusr1_to_the_group) { check_signal(SIGUSR1, GROUP, 2); }
Test(stops, sighup_to_the_group) { check_signal(SIGHUP, GROUP, 2); }
Test(stops, ctrl_c) { check_signal(SIGINT, GROUP, 2); }
Test(stops, ctrl_c_to_a_run_of_one_rank) { check_signal(SIGINT, COMMAND, 1); }

static void hash_of(const char *name, char hash[40]) {
  cJSON *json = training_json(dir, name);
  const cJSON *value = training_get(json, "result.state_hash");
  cr_assert_not_null(value, "%s has no result", name);
  snprintf(hash, 40, "%s", value->valuestring);
  cJSON_Delete(json);
}

/* What is saved goes on as if nothing had been. */
Test(stops, a_resume_has_the_same_bits) {
  char words[512], whole[40], again[40];
  const pid_t pid = start("-n 2 --set checkpoint.every=1000000 " LONG);
  wait_for_step();
  kill(pid, SIGTERM);
  expect_status(pid, 30, 5);
  const char *rest_of = "-n 2 --set run.steps=%d --set run.log_every=1000 --set optimizer.schedule=constant %s";
  const int steps = stopped_at("SIGTERM") + 3;
  snprintf(words, sizeof words, rest_of, steps, "--resume");
  expect_status(start(words), 60, 0);
  snprintf(words, sizeof words, rest_of, steps, "--set run.out=whole");
  expect_status(start(words), 60, 0);
  hash_of("out/run.json", again);
  hash_of("whole/run.json", whole);
  cr_assert_str_eq(whole, again);
}

/* ---- the exit status ---- */
Test(stops, status_0_where_that_is_asked_for) {
  for (int ranks = 1; ranks <= 2; ranks++) {
    char words[512];
    snprintf(words, sizeof words, "-n %d --set checkpoint.every=1000000 --set run.stopped_status=0 " LONG, ranks);
    const pid_t pid = start(words);
    wait_for_step();
    kill(pid, SIGTERM);
    expect_status(pid, 30, 0);
    cr_expect_gt(stopped_at("SIGTERM"), 0);
    forget_run();
  }
  command_result r = RUN(dir, 20, "--help");
  cr_expect(strstr(r.out, "5 stopped by a signal"), "%s", r.out);
  command_free(&r);
}

Test(stops, nothing_is_saved_without_checkpoints) {
  pid_t pid = start("-n 1 " LONG);
  wait_for_step();
  kill(pid, SIGTERM);
  expect_status(pid, 30, 128 + SIGTERM);
  forget_run();
  pid = start("-n 2 " LONG);
  wait_for_step();
  kill(pid, SIGTERM);
  expect_status(pid, 30, 3);
  cr_expect_eq(says("stopped by SIGTERM"), 1);
}

Test(stops, what_a_signal_stopped_is_not_restarted) {
  const pid_t pid = start("-n 2 --set checkpoint.every=1000000 --set run.max_restarts=3 " LONG);
  wait_for_step();
  kill(last_rank(pid), SIGTERM);
  expect_status(pid, 30, 5);
  cr_expect_eq(says("restart 1"), 0);
}

/* ---- more than one ---- */
/* Code that oneDNN generates for products keeps the stack pointer in the heap: a handler on that stack wrote there. */
Test(stops, signals_within_a_product) {
  const pid_t pid = start("-n 1 --set checkpoint.every=9 --set batch.accumulate=2000");
  wait_for_ranks();
  for (int i = 0; i < 400; i++) {
    kill(pid, SIGUSR1);
    usleep(200);
  }
  expect_status(pid, 60, 5);
}

/* As `timeout -s INT` does, and mpirun, and container engines: the process, then its group. */
Test(stops, ctrl_c_that_comes_twice_at_once_is_one_press) {
  static const useconds_t apart[] = {0, 300, 5000, 60000};
  for (int ranks = 1; ranks <= 2; ranks++)
    for (size_t i = 0; i < sizeof apart / sizeof *apart; i++) {
      char words[512];
      snprintf(words, sizeof words, "-n %d --set checkpoint.every=1000000 --set batch.accumulate=300 " LONG, ranks);
      const pid_t pid = start(words);
      wait_for_ranks();
      kill(pid, SIGINT);
      usleep(apart[i]);
      kill(-pid, SIGINT);
      expect_status(pid, 60, 5);
      cr_expect_eq(says(HEARD), 1);
      cr_expect_gt(stopped_at("SIGINT"), 0);
      forget_run();
    }
}

/* While a step takes long nothing is saved: who cannot wait asks again. */
static void check_second(int number, int ranks, double after, int status) {
  char words[512];
  snprintf(words, sizeof words, "-n %d --set checkpoint.every=9 --set batch.accumulate=39", ranks);
  const pid_t pid = start(words);
  wait_for_ranks();
  kill(pid, number);
  for (int i = 0; number == SIGINT && i < 2000 && !says(HEARD); i++) usleep(5000);
  rest(after);
  kill(pid, number);
  expect_status(pid, 5, status);
  cr_expect_eq(says(HEARD), number == SIGINT);
  cr_expect_eq(says("step "), 0, "no step was to end");
}
Test(presses, a_second_ctrl_c_ends_one_rank) { check_second(SIGINT, 1, 0.55, 128 + SIGINT); }
Test(presses, a_second_ctrl_c_ends_two_ranks) { check_second(SIGINT, 2, 0.55, 3); }
Test(presses, a_second_sigterm_ends_one_rank) { check_second(SIGTERM, 1, 1.05, 128 + SIGTERM); }
Test(presses, a_second_sigterm_ends_two_ranks) { check_second(SIGTERM, 2, 1.05, 3); }

Test(presses, count_after_the_first_was_announced) {
  const uint64_t at = 7000000000, half = 500000000;
  cr_expect_not(phx__stop_twice(0, at));
  cr_expect_not(phx__stop_twice(at, at));
  cr_expect_not(phx__stop_twice(at, at + half - 1));
  cr_expect(phx__stop_twice(at, at + half));
}
