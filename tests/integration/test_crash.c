/* Crashes at random moments of runs that save all the time: kill -9 of a random rank, or of everything.
 *
 * Half of the kills wait until a save is seen in flight (its .part directory is there).  After each kill the run is
 * resumed to its end, and every step it did, and its end, must have the hashes and held-out losses of a run that nobody
 * disturbed; nothing that was committed before the kill may be lost, nothing may hang, no checkpoint may be found
 * damaged.
 * PHX_TEST_CRASHES, PHX_TEST_SEED: more rounds, others (`./dev soak`). */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "training.h"

enum { STEPS = 16, RANKS = 2 };
static const char *const strategies[] = {"ddp", "fsdp", "zero"};
typedef struct told { /* of a step, in metrics.jsonl; "": nothing */
  char hash[33], valid_loss[32];
} told;
static told reference[3][STEPS + 1]; /* [step]; the strategies' must be equal, too */
static unsigned seed;
static int verified; /* checkpoints, by the command */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static double random_part(void) {
  return rand_r(&seed) / (RAND_MAX + 1.0);
}

#define ARGUMENTS(strategy) \
  "train", "run.ini", "-n", "2", "--strategy", strategy, "--set", "checkpoint.every=1", "--set", "run.hash_every=1", \
      "--set", "run.steps=16", "--set", "data.valid=valid.bin", "--set", "run.valid_every=1", "--set", \
      "run.valid_windows=3"

/* By step, what is in metrics.jsonl; returns how many steps have a line. */
static int read_told(const char *dir, told of[STEPS + 1]) {
  char *text = command_read_file(dir, "out/metrics.jsonl");
  int lines = 0;
  for (char *line = text; line && *line; line = strchr(line, '\n') + 1) {
    char *end = strchr(line, '\n'), *at = strstr(line, "\"state_hash\":\""), *loss = strstr(line, "\"valid_loss\":");
    int step;
    if (!end) break; /* torn by the crash */
    const int own = sscanf(line, "{\"step\":%d", &step) == 1;
    if (!own && sscanf(line, "{\"after_step\":%d", &step) != 1) continue;
    lines += own;
    if (step < 1 || step > STEPS) continue;
    if (at && at < end) snprintf(of[step].hash, 33, "%s", at + 14);
    if (loss && loss < end) sscanf(loss, "\"valid_loss\":%31[^,}]", of[step].valid_loss);
  }
  free(text);
  return lines;
}

/* Newest committed step, or 0; *in_flight: a save is under way, or was when everything died. */
static int look(const char *dir, int *in_flight) {
  char path[512];
  int newest = 0, step;
  snprintf(path, sizeof path, "%s/out/checkpoints", dir);
  DIR *d = opendir(path);
  *in_flight = 0;
  for (struct dirent *e; d && (e = readdir(d));) {
    if (sscanf(e->d_name, "step-%d", &step) == 1 && step > newest) newest = step;
    *in_flight |= strstr(e->d_name, ".part") != NULL;
  }
  if (d) closedir(d);
  return newest;
}

static pid_t start(const char *dir, const char *const *argv) {
  const pid_t pid = fork();
  if (pid == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int out = chdir(dir) ? -1 : open("output", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    dup2(out, 1);
    dup2(out, 2);
    execv(PHX_TEST_COMMAND, (char *const *)(uintptr_t)argv);
    _exit(127);
  }
  setpgid(pid, pid);
  return pid;
}

/* A random child of the launcher, or 0. */
static pid_t a_rank(pid_t launcher) {
  char path[64], text[256];
  int pids[RANKS], n = 0, skip = 0;
  snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)launcher, (int)launcher);
  const int fd = open(path, O_RDONLY);
  const ssize_t bytes = fd >= 0 ? read(fd, text, sizeof text - 1) : 0;
  if (fd >= 0) close(fd);
  text[bytes > 0 ? bytes : 0] = 0;
  for (const char *at = text; n < RANKS && sscanf(at, "%d%n", &pids[n], &skip) == 1; at += skip) n++;
  return n > 0 ? pids[rand_r(&seed) % (unsigned)n] : 0;
}

typedef struct crash {
  int ended;     /* the run was over before the kill, or had no rank yet: nothing was killed */
  int in_save;   /* a save was in flight at the kill */
  int committed; /* newest checkpoint seen before the kill */
  int all;       /* everything was killed */
} crash;

/* Where the processes of a job that hangs are, for the one who has to find out why. */
static void say_where(pid_t launcher) {
  char line[256];
  snprintf(line, sizeof line,
           "for p in %d $(cat /proc/%d/task/%d/children); do for t in /proc/$p/task/*; do"
           " echo $t $(sed -n 's/^State://p' $t/status) $(cat $t/wchan) >&2; done; done",
           (int)launcher, (int)launcher, (int)launcher);
  if (system(line)) fprintf(stderr, "nothing is known of job %d\n", (int)launcher);
}

/* Waits for a random moment, kills, and waits for the end. */
static crash disturb(const char *dir, pid_t launcher, int wait_for_save) {
  crash c = {.all = rand_r(&seed) % 3 == 0};
  int status;
  const int target = rand_r(&seed) % STEPS; /* after this step's save; 0: from the first moment on */
  double until = target ? 0 : now() + random_part() * 0.15;
  for (;; usleep(100)) {
    if (waitpid(launcher, &status, WNOHANG) == launcher) return (crash){.ended = 1};
    c.committed = look(dir, &c.in_save);
    if (c.committed >= target && until == 0) until = now() + (wait_for_save ? 0 : random_part() * 0.03);
    if (until > 0 && now() >= until && (!wait_for_save || c.in_save)) break;
  }
  if (wait_for_save && rand_r(&seed) % 2) { /* later in the same save, maybe behind its end */
    usleep((useconds_t)(random_part() * 1e4));
    c.committed = look(dir, &c.in_save);
  }
  const pid_t victim = c.all ? -launcher : a_rank(launcher);
  if (victim) kill(victim, SIGKILL);
  c.ended = !victim;
  double last = now();
  /* on a crowded virtual machine the launcher was seen to spend seconds inside the kernel's waitid */
  for (until = last + 60; waitpid(launcher, &status, WNOHANG) != launcher; usleep(500)) {
    if (now() - last > 1) until += now() - last; /* the machine slept, and the job with it */
    last = now();
    if (last > until) {
      say_where(launcher);
      kill(-launcher, SIGKILL);
      waitpid(launcher, &status, 0);
      cr_assert_fail("the job hangs after a kill of %s (%d)", c.all ? "all" : "a rank", (int)victim);
    }
  }
  kill(-launcher, SIGKILL); /* only orphans of a killed launcher, which die by themselves: see test_launcher.c */
  return c;
}

static void check_told(const char *dir, int s, const char *when) {
  told of[STEPS + 1] = {{"", ""}};
  cr_assert_eq(read_told(dir, of), STEPS, "%s: steps are missing from metrics.jsonl, or there twice", when);
  for (int i = 1; i <= STEPS; i++) {
    cr_assert_str_eq(of[i].hash, reference[s][i].hash, "%s, %s: step %d differs", when, strategies[s], i);
    cr_assert_str_eq(of[i].valid_loss, reference[s][i].valid_loss, "%s, %s: step %d differs", when, strategies[s], i);
  }
}

static void remove_out(const char *dir) {
  command_result r = command_run(dir, 10, (const char *const[]){"/bin/sh", "-c", "rm -rf out out.*", NULL});
  command_free(&r);
}

/* Whatever has a checkpoint's name is whole. */
static void verify_all(const char *dir) {
  command_result r = command_run(dir, 60, (const char *const[]){"/bin/sh", "-c",
                                 "for c in out/checkpoints/step-*; do [ ! -d $c ] || " PHX_TEST_COMMAND
                                 " checkpoint verify $c || exit; done", NULL});
  cr_assert_eq(r.status, 0, "a committed checkpoint is not whole:\n%s", r.out);
  for (const char *at = r.out; (at = strstr(at, ": whole: ")); at++) verified++;
  command_free(&r);
}

/* Runs to the end from what is there; returns 1 when that was a checkpoint. */
static int finish(const char *dir, int s, const crash *c) {
  int in_flight, newest = look(dir, &in_flight);
  verify_all(dir);
  cr_assert_geq(newest, c->committed, "step %d was committed, and is lost", c->committed);
  command_result r = newest ? RUN(dir, 60, ARGUMENTS(strategies[s]), "--resume")
                            : RUN(dir, 60, ARGUMENTS(strategies[s]));
  cr_assert_eq(r.status, 0, "%s after a kill at step %d: status %d\n%s", strategies[s], newest, r.status, r.out);
  cr_assert_null(strstr(r.out, "damaged"), "%s", r.out);
  cJSON *json = training_json(dir, "out/run.json");
  const cJSON *hash = training_get(json, "result.state_hash");
  cr_assert(hash && !strcmp(hash->valuestring, reference[s][STEPS].hash), "%s: the final state differs", strategies[s]);
  if (newest) {
    const cJSON *list = training_get(json, "resumed"), *last = cJSON_GetArrayItem(list, cJSON_GetArraySize(list) - 1);
    const cJSON *from = cJSON_GetObjectItem(last, "step");
    cr_assert(from && from->valueint == newest, "resumed from %d, not %d", from ? from->valueint : -1, newest);
  }
  cJSON_Delete(json);
  command_free(&r);
  check_told(dir, s, newest ? "resumed" : "begun again");
  look(dir, &in_flight);
  cr_assert_not(in_flight, "a dead save's leftovers are still there");
  return newest > 0;
}

Test(crash, every_resume_after_a_kill_has_the_same_bits, .timeout = 7200) {
  const char *asked = getenv("PHX_TEST_CRASHES"), *other = getenv("PHX_TEST_SEED");
  const int crashes = asked ? atoi(asked) : 10;
  char *dir = command_temp_dir();
  int in_save = 0, resumed = 0, whole = 0;
  seed = other ? (unsigned)atoi(other) : 1;
  training_files(dir, training_odd_model);
  for (int s = 0; s < 3; s++) {
    command_result r = RUN(dir, 60, ARGUMENTS(strategies[s]));
    cr_assert_eq(r.status, 0, "%s", r.out);
    command_free(&r);
    cr_assert_eq(read_told(dir, reference[s]), STEPS);
    for (int i = 1; i <= STEPS; i++) {
      cr_assert_str_eq(reference[s][i].hash, reference[0][i].hash);
      cr_assert_str_eq(reference[s][i].valid_loss, reference[0][i].valid_loss);
      cr_assert(reference[s][i].hash[0] && reference[s][i].valid_loss[0], "step %d", i);
    }
    remove_out(dir);
  }
  for (int done = 0; done < crashes;) {
    const int s = done % 3;
    const char *const argv[] = {PHX_TEST_COMMAND, ARGUMENTS(strategies[s]), NULL};
    const pid_t launcher = start(dir, argv);
    const crash c = disturb(dir, launcher, done % 4 != 3);
    if (!c.ended) {
      done++;
      in_save += c.in_save;
      whole += c.all;
      resumed += finish(dir, s, &c);
    }
    remove_out(dir);
  }
  printf("%d crashes, %d of them of the whole job, %d inside a save; %d checkpoints verified; %d resumed from one, all "
         "bit-exact\n", crashes, whole, in_save, verified, resumed);
  cr_expect_geq(2 * in_save, crashes, "only %d of %d kills fell into a save", in_save, crashes);
  cr_expect(resumed > 0 && verified >= resumed, "%d resumed, %d verified", resumed, verified);
  command_remove_dir(dir);
}
