/* Every allocation of the core fails once, in a run of one rank from its configuration to its final weights: a clear
 * error and a status that is not 0, never a crash, and never a file with its final name that is not whole.
 *
 * Under the address sanitizer every one of these runs looks for what it leaks, too. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif
#include "config/config.h"
#include "plugin/config_load.h"
#include "command/report.h"
#include "command/run_dir.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/train.h"
#include "command/train_check.h"
#include "training.h"

#ifdef __SANITIZE_ADDRESS__
enum { SECONDS = 8 };
#else
enum { SECONDS = 30 };
#endif
enum { EVERY_ONE = 300 }; /* and after so many seconds, on a slow machine, larger steps */

static long calls, failing;
static int for_ever;

static int fails(void) {
  calls++;
  return failing && (calls == failing || (for_ever && calls > failing));
}
static void *counted_calloc(size_t n, size_t bytes) { return fails() ? NULL : calloc(n, bytes); }
static void *counted_realloc(void *p, size_t bytes) { return fails() ? NULL : realloc(p, bytes); }

static int run(void) {
  static const phx__override overrides[] = {{"plugins.path=" PHX_TEST_PLUGINS, "--set"}};
  phx__config *config = NULL;
  phx_error err = PHX_ERROR_INIT;
  int status = PHX__EXIT_REFUSED;
  if (phx__config_load("run.ini", overrides, 1, stderr, &config)) return status;
  if (phx__train_check(config, &err) || phx__run_dir_create(config, &err)) fprintf(stderr, "%s\n", err.message);
  else status = phx__train_rank(config, NULL);
  phx__config_free(config);
  return status;
}

/* In the child: what the n-th call's failure comes to; writes how many calls there were. */
static void child(const char *dir, int report) {
  if (chdir(dir) || !freopen("errors", "we", stderr) || !freopen("/dev/null", "we", stdout)) _exit(100);
  phx__sys.calloc = counted_calloc;
  phx__sys.realloc = counted_realloc;
  const int status = run();
  fflush(stderr);
#ifdef __SANITIZE_ADDRESS__
  if (__lsan_do_recoverable_leak_check()) _exit(102);
#endif
  if (write(report, &calls, sizeof calls) != (ssize_t)sizeof calls) _exit(101);
  _exit(status);
}

static void check_files(const char *dir, long n) {
  char *text = command_read_file(dir, "out/run.json");
  if (text) {
    cJSON *json = cJSON_Parse(text);
    cr_assert(cJSON_HasObjectItem(json, "config") && cJSON_HasObjectItem(json, "plugins"),
              "call %ld: run.json is not whole", n);
    cJSON_Delete(json);
  }
  free(text);
  text = command_read_file(dir, "out/run.json.part");
  cr_assert_null(text, "call %ld: run.json.part was left", n);
}

/* Returns whether the run made fewer than n calls, and so passed. */
static int fail_call(const char *dir, long n) {
  int ends[2], status = 0;
  long made = 0;
  cr_assert_eq(pipe2(ends, O_CLOEXEC), 0);
  failing = n;
  const pid_t pid = fork();
  if (pid == 0) child(dir, ends[1]);
  cr_assert_gt(pid, 0);
  close(ends[1]);
  const ssize_t got = read(ends[0], &made, sizeof made);
  close(ends[0]);
  cr_assert_eq(waitpid(pid, &status, 0), pid);
  char *errors = command_read_file(dir, "errors");
  cr_assert(WIFEXITED(status), "call %ld: signal %d\n%s", n, WTERMSIG(status), errors);
  cr_assert_eq(got, (ssize_t)sizeof made, "call %ld: ended on its way with status %d\n%s", n, WEXITSTATUS(status),
               errors);
  const int passed = made < n;
  if (passed) {
    cr_assert_eq(WEXITSTATUS(status), 0, "%s", errors);
  } else {
    const int code = WEXITSTATUS(status);
    cr_assert(code == PHX__EXIT_REFUSED || code == PHX__EXIT_RANK,
              "call %ld failed, and the run ended with status %d\n%s", n, code, errors);
    cr_assert(strstr(errors, "memory"), "call %ld: no clear error:\n%s", n, errors);
  }
  check_files(dir, n);
  free(errors);
  return passed;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Steps of one at first, then growing: the later calls are many of the same kind. */
static void fail_each(void) {
  char *dir = command_temp_dir();
  const double begin = now();
  training_files(dir, "[batch]\nmicro = 1\nsequence = 8\n"
                      "[model]\nplugin = gpt\nlayers = 1\nheads = 1\nwidth = 8\ncontext = 8\nvocab = 257\n");
  char *ini = command_read_file(dir, "run.ini"), *steps = strstr(ini, "steps = 20");
  memcpy(steps, "steps = 2 ", 10);
  command_write_file(dir, "run.ini", ini, strlen(ini));
  free(ini);
  long n = 1;
  while (!fail_call(dir, n)) {
    n += now() - begin > SECONDS ? n / 8 + 1 : n < EVERY_ONE ? 1 : n / 32;
    char rm[300];
    snprintf(rm, sizeof rm, "rm -rf %s/out %s/out.*", dir, dir);
    cr_assert_eq(system(rm), 0);
  }
  cr_assert_gt(n, 200, "only %ld calls were seen", n);
  command_remove_dir(dir);
}

Test(alloc_faults, each_call_fails_once, .timeout = 150) { fail_each(); }

Test(alloc_faults, each_call_and_all_after_it_fail, .timeout = 150) {
  for_ever = 1;
  fail_each();
}
