/* A rank is lost at any moment: every signal under every launcher with every communicator ends the job with status 3,
 * soon, named, and with no rank left that waits.
 *
 * The launchers are our own and, for the others, their environment: the test starts those ranks, so nobody watches
 * them.  Four combinations in which every signal and every launcher comes once; PHX_TEST_MATRIX: so many rounds of all
 * of them; PHX_TEST_SEED: other moments and victims. */
#include <criterion/criterion.h>
#include <errno.h>
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

#include "foreign.h"
#include "root.h"
#include "training.h"

#define SET(pair) "--set", pair
enum { OWN = FOREIGN_KINDS, LAUNCHERS, SIGNALS = 4, COMMS = 2, RANKS = 2 };
enum { SHM, NCCL };
static const int signals[SIGNALS] = {SIGKILL, SIGSTOP, SIGSEGV, SIGABRT};
static const char *const comm_names[COMMS] = {"shm", "nccl's double"};
static char plugins[160];
static int runs;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void prepare(const char *dir) {
  char command[600];
  training_files(dir, training_odd_model);
  snprintf(command, sizeof command, "mkdir -m 755 %s/doubles && cp %s %s %s/doubles/", dir,
           test_path("lib/phalanx-emulated/phx_device_cuda.so"), test_path("lib/phalanx-test/phx_comm_nccl_double.so"),
           dir);
  cr_assert_eq(system(command), 0);
  snprintf(plugins, sizeof plugins, "plugins.path=%s/doubles", dir);
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
}

/* The run's arguments; `out` is a directory of its own. */
static const char *const *arguments(int comm, const char *dir, char out[64]) {
  static const char *on_shm[] = {"train", "run.ini", "--strategy", "ddp", "--steps", "1000000", SET("model.layers=1"),
                                 SET("checkpoint.every=500000"), SET("run.log_every=100000"), SET("run.timeout=60"),
                                 SET(""), "-n", "2", NULL};
  static const char *on_nccl[] = {"train", "run.ini", "--strategy", "ddp", "--steps", "1000000", SET("model.layers=1"),
                                  SET("checkpoint.every=500000"), SET("run.log_every=100000"), SET("run.timeout=60"),
                                  SET(""), "-n", "2", SET("comm.plugin=nccl_double"), SET("device.plugin=cuda"),
                                  SET("cuda.share=yes"), SET(plugins), NULL};
  enum { OUT = 15 };
  char path[160];
  snprintf(out, 64, "run.out=out-%d", runs++);
  on_shm[OUT] = on_nccl[OUT] = out;
  snprintf(path, sizeof path, "%s/double-%d", dir, runs); /* each run's own */
  setenv("NCCL_DOUBLE_MEMORY", path, 1);
  return comm == SHM ? on_shm : on_nccl;
}

/* Our own launcher, as if it were a rank of a job of one: its ranks are its children. */
static foreign start_own(const char *dir, const char *const *argv) {
  foreign f = {.n = 1};
  const char *all[64] = {"phalanx"};
  char path[128];
  snprintf(f.dir, sizeof f.dir, "%s", dir);
  fflush(NULL);
  f.pids[0] = fork();
  if (f.pids[0] != 0) return f;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (int n = 1; *argv && n < 63; argv++) all[n++] = *argv;
  snprintf(path, sizeof path, "%s/log-0", dir);
  const int log = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (log < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0 || chdir(dir)) _exit(121);
  execv(test_path("bin/phalanx"), (char *const *)(uintptr_t)all);
  _exit(122);
}
static int children(pid_t parent, pid_t *out) {
  char path[64], text[256];
  snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)parent, (int)parent);
  const int fd = open(path, O_RDONLY);
  const ssize_t bytes = fd >= 0 ? read(fd, text, sizeof text - 1) : 0;
  int n = 0, skip = 0, pid = 0;
  if (fd >= 0) close(fd);
  text[bytes > 0 ? bytes : 0] = 0;
  for (const char *at = text; n < RANKS && sscanf(at, "%d%n", &pid, &skip) == 1; at += skip) out[n++] = pid;
  return n;
}

static int has_said(const foreign *f, const char *text) {
  char *log = foreign_log(f, 0);
  const int said = log && strstr(log, text);
  free(log);
  return said;
}

static void lose_one(const char *dir, int number, int launcher, int comm, unsigned *seed) {
  char out[64], what[160], text[64];
  const char *const *argv = arguments(comm, dir, out);
  foreign f = launcher == OWN ? start_own(dir, argv) : foreign_start(dir, launcher, RANKS, argv);
  const int victim = rand_r(seed) % RANKS;
  pid_t pids[RANKS] = {f.pids[0], f.pids[1]};
  snprintf(what, sizeof what, "signal %d to rank %d, %s, %s", number, victim,
           launcher == OWN ? "our launcher" : foreign_names[launcher], comm_names[comm]);
  /* the double is slow: it is enough that the ranks have joined */
  for (const double end = now() + 60; !has_said(&f, comm == SHM ? "step    1/" : "] NCCL ") && now() < end;)
    usleep(5000);
  if (launcher == OWN) cr_assert_eq(children(f.pids[0], pids), RANKS, "%s: the ranks are not there", what);
  usleep((useconds_t)(rand_r(seed) % 200000));
  const double began = now();
  kill(pids[victim], number);
  for (int r = 0; r < f.n; r++) {
    if (launcher != OWN && r == victim) continue;
    const int status = foreign_status(&f, r, 45);
    char *log = foreign_log(&f, r);
    snprintf(text, sizeof text, launcher == OWN ? "rank %d (pid" : "rank %d failed: ", victim);
    cr_expect_eq(status, 3, "%s: rank %d ended with %d\n%s", what, r, status, log);
    cr_expect(log && strstr(log, text), "%s: no '%s' in\n%s", what, text, log);
    free(log);
  }
  cr_expect_lt(now() - began, 40, "%s: %g s", what, now() - began); /* the timeout is 60 s */
  if (launcher == OWN)
    for (int r = 0; r < RANKS; r++) cr_expect(kill(pids[r], 0) && errno == ESRCH, "%s: rank %d is left", what, r);
  foreign_end(&f);
}

Test(kill_matrix, a_rank_is_lost, .timeout = 3600) {
  char *dir = command_temp_dir();
  unsigned seed = getenv("PHX_TEST_SEED") ? (unsigned)atoi(getenv("PHX_TEST_SEED")) : 1;
  const int rounds = getenv("PHX_TEST_MATRIX") ? atoi(getenv("PHX_TEST_MATRIX")) : 0;
  prepare(dir);
  const int shift = (int)(seed % LAUNCHERS);
  for (int i = 0; i < SIGNALS && rounds == 0; i++) /* each signal with another launcher; nccl with SIGABRT */
    lose_one(dir, signals[i], (i + shift) % LAUNCHERS, i == SIGNALS - 1 ? NCCL : SHM, &seed);
  for (int i = 0; i < rounds * SIGNALS * LAUNCHERS * COMMS; i++)
    lose_one(dir, signals[i % SIGNALS], i / SIGNALS % LAUNCHERS, i / SIGNALS / LAUNCHERS % COMMS, &seed);
  command_remove_dir(dir);
}
