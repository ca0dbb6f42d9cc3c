/* The launcher with real ranks: this program runs itself again with --rank as a rank of a job.
 *
 * Every test starts a launcher in a process group of its own, watches it from outside with a deadline, and checks
 * afterwards that no rank is left: this process is the subreaper, so that an orphan would be found here. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <phalanx/comm.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/clock.h"
#include "command.h"
#include "plugin/config_load.h"
#include "job/job.h"
#include "base/job_calls.h"
#include "job/job_segment.h"
#include "job/launcher.h"
#include "base/status.h"
#include "base/sys.h"
#include "sanitizer.h"
#include "sys_faults.h"
#include "command/train.h"
#include "training.h"

/* ---- the rank: --rank DIR MODE WHO STEPS PAUSE_US ---- */

/* What a communicator does: a flight record around a meeting of all. */
static void collective(const phx_job *job, uint64_t number) {
  phx_error err = PHX_ERROR_INIT;
  phx_flight *f = &job->mine->ring[number % PHX_FLIGHT_RING];
  int64_t largest;
  f->comm = 1;
  f->bytes = 4096;
  f->begin_ns = (int64_t)phx__now_ns();
  f->end_ns = 0;
  f->op = PHX_OP_ALL_REDUCE;
  f->unit = 3;
  __atomic_store_n(&f->sequence, number, __ATOMIC_RELEASE);
  __atomic_store_n(&job->mine->n_flights, number, __ATOMIC_RELEASE);
  phx__job_heartbeat(job);
  if (phx__job_max(job, (int64_t)number, &largest, &err) != PHX_OK) {
    fprintf(stderr, "rank %d: %s\n", job->rank, err.message);
    job->fail(job->ctx, err.message);
    exit(PHX__EXIT_RANK);
  }
  __atomic_store_n(&f->end_ns, (int64_t)phx__now_ns(), __ATOMIC_RELEASE);
}

static int own_rank(void) {
  const char *text = getenv("PHALANX_RANK");
  return atoi(text ? text : getenv("OMPI_COMM_WORLD_RANK"));
}

static void note_pid(const char *dir) {
  char path[512], text[32];
  snprintf(path, sizeof path, "%s/pid-%d", dir, own_rank());
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644), n = snprintf(text, sizeof text, "%d", (int)getpid());
  if (fd < 0 || write(fd, text, (size_t)n) != n) _exit(97);
  close(fd);
}

static int rank_main(char **argv) {
  const char *mode = argv[1];
  int who = atoi(argv[2]), steps = atoi(argv[3]), mine = own_rank();
  useconds_t pause = (useconds_t)atoi(argv[4]);
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  bool chosen = mine == who;
  note_pid(argv[0]);
  if (chosen && !strcmp(mode, "never"))
    for (;;) pause ? usleep(pause) : usleep(1000);
  if (chosen && !strcmp(mode, "refuse")) return PHX__EXIT_REFUSED;
  if (phx__job_open(30, &job, &err) != PHX_OK) {
    fprintf(stderr, "%s\n", err.message);
    return PHX__EXIT_RANK;
  }
  printf("rank %d of %d speaks\n", job->rank, job->size);
  fflush(stdout);
  if (!strcmp(mode, "agree")) return phx__job_agree(job, (uint64_t)mine, "configuration", &err) == PHX_INVALID ? 2 : 99;
  if (!strcmp(mode, "pinned")) {
    cpu_set_t mask;
    sched_getaffinity(0, sizeof mask, &mask);
    printf("cpus %d\n", CPU_COUNT(&mask));
  }
  for (int step = 1; step <= steps; step++) {
    phx__job_state(job, PHX_RANK_RUNNING, step);
    if (!strcmp(mode, "stuck") && step == 5) {
      if (chosen) phx__job_state(job, PHX_RANK_DONE, step);
      if (chosen) return 0;
      for (;;) usleep(1000);
    }
    if (!strcmp(mode, "all leave") && step == 5) return 0;
    if (chosen && step == 5) {
      if (!strcmp(mode, "exit7")) return 7;
      if (!strcmp(mode, "leave")) return 0;
      if (!strcmp(mode, "crash")) raise(SIGSEGV);
      if (!strcmp(mode, "deaf"))
        for (;;) usleep(1000);
    }
    collective(job, (uint64_t)step);
    usleep(pause);
  }
  phx__job_state(job, PHX_RANK_DONE, steps);
  return 0;
}

/* Before Criterion's main: a rank is no test. */
__attribute__((constructor)) static void become_rank(int argc, char **argv) {
  if (argc == 7 && strcmp(argv[1], "--rank") == 0) exit(rank_main(argv + 2));
}

/* ---- the launcher in a process of its own ---- */

struct trial {
  char dir[64];
  pid_t launcher;
  double begin;
};
struct plan {
  int ranks, threads;
  double timeout;
  const char *mode;
  int who, steps, pause_us;
  void (*prepare)(void); /* in the launcher's process */
};

static double now(void) {
  return (double)phx__now_ns() * 1e-9;
}

static struct trial launch(struct plan plan) {
  struct trial t = {.dir = "/tmp/phx-launcher-XXXXXX"};
  char self[512], who[16], steps[16], pause[16], file[128];
  ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  cr_assert(n > 0);
  self[n] = 0;
  cr_assert_not_null(mkdtemp(t.dir));
  cr_assert_eq(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
  snprintf(who, sizeof who, "%d", plan.who);
  snprintf(steps, sizeof steps, "%d", plan.steps);
  snprintf(pause, sizeof pause, "%d", plan.pause_us);
  char *argv[] = {self, (char *)"--rank", t.dir, (char *)plan.mode, who, steps, pause, NULL};
  phx__launch asked = {
      .ranks = plan.ranks, .threads = plan.threads, .timeout_s = plan.timeout, .run_dir = t.dir, .argv = argv};
  t.begin = now();
  t.launcher = fork();
  cr_assert_geq(t.launcher, 0);
  if (t.launcher == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(file, sizeof file, "%s/out", t.dir);
    int out = open(file, O_WRONLY | O_CREAT | O_APPEND, 0644);
    snprintf(file, sizeof file, "%s/err", t.dir);
    int err = open(file, O_WRONLY | O_CREAT | O_APPEND, 0644);
    dup2(out, 1);
    dup2(err, 2);
    signal(SIGINT, SIG_DFL); /* whoever runs the tests may ignore it */
    signal(SIGHUP, SIG_DFL);
    if (plan.prepare) plan.prepare();
    _exit(phx__launch_run(&asked));
  }
  setpgid(t.launcher, t.launcher);
  return t;
}

static const char *content(const struct trial *t, const char *name) {
  static char text[4][20000];
  static int turn;
  char path[128], *out = text[turn++ % 4];
  snprintf(path, sizeof path, "%s/%s", t->dir, name);
  int fd = open(path, O_RDONLY);
  ssize_t n = fd >= 0 ? read(fd, out, sizeof text[0] - 1) : 0;
  out[n > 0 ? n : 0] = 0;
  if (fd >= 0) close(fd);
  return out;
}

/* The pid of a rank that has started; waits for it. */
static pid_t pid_of(const struct trial *t, int rank) {
  char name[32];
  snprintf(name, sizeof name, "pid-%d", rank);
  for (double end = now() + 10; now() < end; usleep(2000)) {
    int pid = atoi(content(t, name));
    if (pid > 0) return pid;
  }
  cr_assert_fail("rank %d did not start", rank);
  return -1;
}

/* The launcher's exit status within `seconds`, -signal when it was killed, or -1000: it is killed then. */
static int wait_for(const struct trial *t, double seconds) {
  int status;
  for (double end = now() + seconds; now() < end; usleep(2000))
    if (waitpid(t->launcher, &status, WNOHANG) == t->launcher)
      return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  kill(t->launcher, SIGKILL);
  waitpid(t->launcher, &status, 0);
  return -1000;
}

/* No rank is left: not running, not as a zombie, within `seconds`. */
static void expect_nothing_left(const struct trial *t, int ranks, double seconds) {
  double end = now() + seconds;
  for (int r = 0; r < ranks; r++) {
    char name[32];
    snprintf(name, sizeof name, "pid-%d", r);
    pid_t pid = atoi(content(t, name));
    if (pid <= 0) continue;
    while (kill(pid, 0) == 0 && now() < end) {
      waitpid(pid, NULL, WNOHANG); /* an orphan comes to us */
      usleep(1000);
    }
    cr_expect(kill(pid, 0) == -1 && errno == ESRCH, "rank %d (pid %d) is left", r, (int)pid);
    kill(pid, SIGKILL);
  }
}

static void clean(const struct trial *t) {
  DIR *dir = opendir(t->dir);
  char path[512];
  for (struct dirent *e; dir && (e = readdir(dir));) {
    snprintf(path, sizeof path, "%s/%s", t->dir, e->d_name);
    unlink(path);
  }
  if (dir) closedir(dir);
  rmdir(t->dir);
}

#define EXPECT_SAYS(t, name, what) cr_expect(strstr(content(t, name), what), "no '%s' in:\n%s", what, content(t, name))

/* ---- tests ---- */

Test(launcher, a_job_ends_well, .timeout = 60) {
  static const int sizes[] = {1, 2, 3, 7};
  for (size_t i = 0; i < 4; i++) {
    struct trial t = launch((struct plan){.ranks = sizes[i], .timeout = 20, .mode = "run", .who = -1, .steps = 30});
    cr_expect_eq(wait_for(&t, 20), 0, "%s", content(&t, "err"));
    expect_nothing_left(&t, sizes[i], 0);
    EXPECT_SAYS(&t, "out", "rank 0 of");
    cr_expect_null(strstr(content(&t, "out"), "rank 1 of"));
    if (sizes[i] > 1) EXPECT_SAYS(&t, "rank-1.log", "rank 1 of");
    cr_expect_str_empty(content(&t, "err"));
    clean(&t);
  }
}

Test(launcher, a_status_ends_all, .timeout = 60) {
  struct trial t =
      launch((struct plan){.ranks = 3, .timeout = 20, .mode = "exit7", .who = 1, .steps = 1000, .pause_us = 1000});
  cr_expect_eq(wait_for(&t, 10), 3);
  expect_nothing_left(&t, 3, 0);
  EXPECT_SAYS(&t, "err", "the job of 3 ranks failed: rank 1 (pid");
  EXPECT_SAYS(&t, "err", "exited with status 7");
  EXPECT_SAYS(&t, "err", "finished all_reduce 4, unit 3, 4096 bytes");
  EXPECT_SAYS(&t, "err", "in all_reduce 5, unit 3, 4096 bytes, for 0.");
  EXPECT_SAYS(&t, "err", "absent: rank 1; all_reduce 5 waits, entered by rank 0, 2");
  EXPECT_SAYS(&t, "err", "rank-R.log");
  EXPECT_SAYS(&t, "rank-2.log", "rank 1 (pid"); /* the survivors' own report */
  clean(&t);
}

/* PHX_TEST_KILLS: more rounds, for a night. */
Test(launcher, kill_9_of_any_rank_at_any_moment, .timeout = 3600) {
  unsigned seed = 12345;
  int rounds = getenv("PHX_TEST_KILLS") ? atoi(getenv("PHX_TEST_KILLS")) : 10;
  for (int i = 0; i < rounds; i++) {
    int ranks = 2 + i % 3, victim = rand_r(&seed) % ranks;
    char text[64];
    struct trial t = launch(
        (struct plan){.ranks = ranks, .timeout = 20, .mode = "run", .who = -1, .steps = 100000, .pause_us = 300});
    pid_t pid = pid_of(&t, victim);
    usleep((useconds_t)(rand_r(&seed) % (i % 2 ? 5000 : 150000))); /* while they start, and while they run */
    double killed = now();
    kill(pid, SIGKILL);
    cr_expect_eq(wait_for(&t, 10), 3);
    cr_expect_lt(now() - killed, 1.0, "gone after %.2f s", now() - killed);
    expect_nothing_left(&t, ranks, 0);
    snprintf(text, sizeof text, "rank %d (pid %d) was killed by SIGKILL", victim, (int)pid);
    EXPECT_SAYS(&t, "err", text);
    clean(&t);
  }
}

Test(launcher, a_rank_deaf_to_everything_is_killed_in_time, .timeout = 60) {
  struct trial t = launch((struct plan){.ranks = 3, .timeout = 20, .mode = "deaf", .who = 2, .steps = 1000});
  pid_t pid = pid_of(&t, 0);
  pid_of(&t, 2);
  usleep(300000);
  double killed = now();
  kill(pid, SIGKILL);
  cr_expect_eq(wait_for(&t, 10), 3);
  cr_expect_lt(now() - killed, 1.0, "gone after %.2f s", now() - killed);
  expect_nothing_left(&t, 3, 0);
  clean(&t);
}

Test(launcher, a_crash_says_where, .timeout = 60) {
  if (SANITIZED) cr_skip_test("a sanitizer reports crashes in its own way");
  struct trial t = launch((struct plan){.ranks = 2, .timeout = 20, .mode = "crash", .who = 1, .steps = 1000});
  cr_expect_eq(wait_for(&t, 10), 3);
  expect_nothing_left(&t, 2, 0);
  EXPECT_SAYS(&t, "err", "was killed by SIGSEGV");
  EXPECT_SAYS(&t, "err", "first failure: rank 1: crashed: SIGSEGV");
  EXPECT_SAYS(&t, "rank-1.log", "this rank crashed: SIGSEGV");
  EXPECT_SAYS(&t, "rank-1.log", "test_launcher(");
  clean(&t);
}

Test(launcher, a_stopped_rank_is_named_within_5_s, .timeout = 60) {
  struct trial t =
      launch((struct plan){.ranks = 3, .timeout = 60, .mode = "run", .who = -1, .steps = 100000, .pause_us = 300});
  pid_t pid = pid_of(&t, 1);
  char text[64];
  usleep(200000);
  double stopped = now();
  kill(pid, SIGSTOP);
  cr_expect_eq(wait_for(&t, 10), 3);
  cr_expect(now() - stopped > 3.7 && now() - stopped < 5.0, "ended after %.2f s", now() - stopped);
  expect_nothing_left(&t, 3, 0);
  snprintf(text, sizeof text, "rank 1 (pid %d) has been stopped (SIGSTOP) for 3.", (int)pid);
  EXPECT_SAYS(&t, "err", text);
  EXPECT_SAYS(&t, "err", "is stopped (SIGSTOP)");
  /* it may have been stopped inside the call that the others are in: then nobody is absent */
  const char *table = content(&t, "err"), *row = strstr(table, "is stopped (SIGSTOP)");
  const char *inside = row ? strstr(row, "in all_reduce") : NULL;
  const bool is_inside = inside && inside < strchr(row, '\n');
  cr_expect(is_inside || strstr(table, "absent: rank 1; all_reduce"), "%s", table);
  clean(&t);
}

Test(launcher, a_stopped_rank_may_go_on, .timeout = 60) {
  struct trial t =
      launch((struct plan){.ranks = 2, .timeout = 60, .mode = "run", .who = -1, .steps = 200, .pause_us = 5000});
  pid_t pid = pid_of(&t, 1);
  for (int i = 0; i < 2; i++) {
    usleep(200000);
    kill(pid, SIGSTOP);
    usleep(1000000);
    kill(pid, SIGCONT);
  }
  cr_expect_eq(wait_for(&t, 20), 0, "%s", content(&t, "err"));
  clean(&t);
}

Test(launcher, ctrl_z_of_all_is_no_failure, .timeout = 60) {
  /* longer than the launcher's limit for a stopped rank, and than the timeout */
  struct trial t =
      launch((struct plan){.ranks = 2, .timeout = 3, .mode = "run", .who = -1, .steps = 200, .pause_us = 5000});
  pid_of(&t, 0);
  pid_of(&t, 1);
  usleep(200000);
  kill(-t.launcher, SIGSTOP); /* SIGTSTP does nothing to a group without a terminal's session */
  usleep(5000000);
  kill(-t.launcher, SIGCONT);
  cr_expect_eq(wait_for(&t, 20), 0, "%s", content(&t, "err"));
  expect_nothing_left(&t, 2, 0);
  clean(&t);
}

Test(launcher, a_rank_that_never_joins_is_named, .timeout = 60) {
  struct trial t = launch((struct plan){.ranks = 3, .timeout = 2, .mode = "never", .who = 2, .steps = 100});
  int status = wait_for(&t, 10);
  double took = now() - t.begin;
  cr_expect_eq(status, 3);
  cr_expect(took > 1.9 && took < 3.5, "ended after %.2f s", took);
  expect_nothing_left(&t, 3, 0);
  EXPECT_SAYS(&t, "err", "rank 2 (pid");
  EXPECT_SAYS(&t, "err", "did not join the job within 2 s");
  EXPECT_SAYS(&t, "err", "never came");
  EXPECT_SAYS(&t, "err", "absent: rank 2; all_reduce 1 waits, entered by rank 0, 1");
  clean(&t);
}

/* It is no rank of the job yet: only the launcher knows its process. */
Test(launcher, a_rank_killed_before_it_joins_is_named_at_once, .timeout = 60) {
  char text[80];
  struct trial t = launch((struct plan){.ranks = 3, .timeout = 40, .mode = "never", .who = 2, .steps = 100});
  for (int r = 0; r < 3; r++) pid_of(&t, r);
  usleep(200000);
  const pid_t pid = pid_of(&t, 2);
  const double killed = now();
  kill(pid, SIGKILL);
  cr_expect_eq(wait_for(&t, 10), 3);
  cr_expect_lt(now() - killed, 1.0, "ended after %.2f s", now() - killed);
  expect_nothing_left(&t, 3, 0);
  snprintf(text, sizeof text, "the job of 3 ranks failed: rank 2 (pid %d) was killed by SIGKILL\n", (int)pid);
  EXPECT_SAYS(&t, "err", text);
  EXPECT_SAYS(&t, "err", "absent: rank 2; all_reduce 1 waits, entered by rank 0, 1");
  clean(&t);
}

Test(launcher, a_rank_that_leaves_early_is_named, .timeout = 60) {
  struct trial t = launch((struct plan){.ranks = 2, .timeout = 20, .mode = "leave", .who = 1, .steps = 100});
  cr_expect_eq(wait_for(&t, 10), 3);
  expect_nothing_left(&t, 2, 0);
  EXPECT_SAYS(&t, "err", "the job of 2 ranks failed: rank 1 (pid");
  EXPECT_SAYS(&t, "err", "exited with status 0 before it was done\n");
  clean(&t);
}

/* It is no end that all agree on: nobody is done. */
Test(launcher, all_ranks_that_leave_early_are_a_failure, .timeout = 60) {
  struct trial t = launch((struct plan){.ranks = 3, .timeout = 20, .mode = "all leave", .who = -1, .steps = 100});
  cr_expect_eq(wait_for(&t, 10), 3);
  expect_nothing_left(&t, 3, 0);
  EXPECT_SAYS(&t, "err", "exited with status 0 before it was done\n");
  clean(&t);
}

Test(launcher, no_progress_after_a_rank_left_is_a_failure, .timeout = 60) {
  struct trial t = launch((struct plan){.ranks = 3, .timeout = 1, .mode = "stuck", .who = 1, .steps = 100});
  cr_expect_eq(wait_for(&t, 10), 3);
  double took = now() - t.begin;
  cr_expect(took > 1.9 && took < 4.0, "ended after %.2f s", took);
  expect_nothing_left(&t, 3, 0);
  EXPECT_SAYS(&t, "err", "has left with status 0, and rank 2 (pid");
  EXPECT_SAYS(&t, "err", "makes no progress for 2");
  clean(&t);
}

Test(launcher, ctrl_c_ends_all, .timeout = 60) {
  static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
  static const char *const names[] = {"stopped by SIGINT", "stopped by SIGTERM", "stopped by SIGHUP"};
  for (int i = 0; i < 3; i++) {
    struct trial t =
        launch((struct plan){.ranks = 3, .timeout = 20, .mode = "deaf", .who = 1, .steps = 100000, .pause_us = 300});
    for (int r = 0; r < 3; r++) pid_of(&t, r);
    usleep(100000);
    double sent = now();
    if (i == 0)
      kill(-t.launcher, signals[i]); /* as the terminal does */
    else
      kill(t.launcher, signals[i]);
    cr_expect_eq(wait_for(&t, 10), 3);
    cr_expect_lt(now() - sent, 1.0);
    expect_nothing_left(&t, 3, 0);
    EXPECT_SAYS(&t, "err", names[i]);
    cr_expect_null(strstr(content(&t, "err"), "collective"), "a table after Ctrl-C");
    clean(&t);
  }
}

Test(launcher, kill_9_of_the_launcher_leaves_nothing, .timeout = 60) {
  for (int i = 0; i < 3; i++) {
    struct trial t =
        launch((struct plan){.ranks = 3, .timeout = 20, .mode = "deaf", .who = 1, .steps = 100000, .pause_us = 300});
    for (int r = 0; r < 3; r++) pid_of(&t, r);
    usleep((useconds_t)(i * 50000));
    kill(t.launcher, SIGKILL);
    cr_expect_eq(wait_for(&t, 5), -SIGKILL);
    expect_nothing_left(&t, 3, 1.0);
    clean(&t);
  }
}

Test(launcher, kill_9_of_everything_leaves_nothing, .timeout = 60) {
  struct trial t =
      launch((struct plan){.ranks = 4, .timeout = 20, .mode = "run", .who = -1, .steps = 100000, .pause_us = 300});
  for (int r = 0; r < 4; r++) pid_of(&t, r);
  usleep(100000);
  kill(-t.launcher, SIGKILL); /* the launcher's group: everything */
  cr_expect_eq(wait_for(&t, 5), -SIGKILL);
  expect_nothing_left(&t, 4, 1.0);
  cr_expect_eq(command_shared_memory(), 0);
  clean(&t);
}

Test(launcher, a_refused_configuration_is_status_2_without_a_table, .timeout = 60) {
  struct trial t = launch((struct plan){.ranks = 3, .timeout = 20, .mode = "agree", .who = -1, .steps = 1});
  cr_expect_eq(wait_for(&t, 10), 2);
  cr_expect_str_empty(content(&t, "err"));
  clean(&t);
  t = launch((struct plan){.ranks = 3, .timeout = 20, .mode = "refuse", .who = 2, .steps = 100});
  cr_expect_eq(wait_for(&t, 10), 2);
  expect_nothing_left(&t, 3, 0);
  cr_expect_null(strstr(content(&t, "err"), "collective"));
  EXPECT_SAYS(&t, "err", "rank-2.log"); /* nobody else has said why */
  clean(&t);
}

Test(launcher, ranks_get_cores_of_their_own, .timeout = 60) {
  cpu_set_t mask;
  sched_getaffinity(0, sizeof mask, &mask);
  if (CPU_COUNT(&mask) < 2) cr_skip_test("needs 2 CPUs");
  struct trial t =
      launch((struct plan){.ranks = 2, .threads = 1, .timeout = 20, .mode = "pinned", .who = -1, .steps = 1});
  cr_expect_eq(wait_for(&t, 10), 0);
  EXPECT_SAYS(&t, "out", "cpus 1\n");
  EXPECT_SAYS(&t, "rank-1.log", "cpus 1\n");
  clean(&t);
  t = launch(
      (struct plan){.ranks = 2, .threads = CPU_COUNT(&mask), .timeout = 20, .mode = "pinned", .who = -1, .steps = 1});
  cr_expect_eq(wait_for(&t, 10), 0);
  cr_expect_null(strstr(content(&t, "out"), "cpus 1\n")); /* too few for all: not pinned */
  clean(&t);
}

Test(launcher, ranks_of_a_real_mpirun_meet, .timeout = 60) {
  char dir[] = "/tmp/phx-launcher-XXXXXX", command[1400], self[512];
  if (system("command -v mpirun >/dev/null 2>&1") != 0) cr_skip_test("mpirun is not installed");
  ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  cr_assert(n > 0);
  self[n] = 0;
  cr_assert_not_null(mkdtemp(dir));
  snprintf(command, sizeof command,
           "timeout 30 mpirun --allow-run-as-root --oversubscribe -n 3 '%s' --rank %s run -1 20 0 >%s/out 2>%s/err",
           self, dir, dir, dir);
  struct trial t = {.launcher = -1};
  memcpy(t.dir, dir, sizeof dir);
  cr_expect_eq(system(command), 0, "%s", content(&t, "err"));
  EXPECT_SAYS(&t, "out", "rank 0 of 3 speaks");
  EXPECT_SAYS(&t, "out", "rank 2 of 3 speaks");
  clean(&t);
}

/* ---- killed for lack of memory ---- */

static int (*open_really)(const char *path, int flags, mode_t mode);
static char group_dir[64];
static void write_group(const char *name, const char *text) {
  char path[160];
  snprintf(path, sizeof path, "%s/%s", group_dir, name);
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) _exit(98);
  close(fd);
}
/* This process's group is one of the test's, and the kernel kills between the first look at its count and the
 * second. */
static int open_in_group(const char *path, int flags, mode_t mode) {
  static int looks;
  char other[160], count[64];
  const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  if (strcmp(path, "/proc/self/cgroup") && strcmp(path, "/proc/self/mountinfo") && strcmp(name, "memory.events"))
    return open_really(path, flags, mode);
  if (strcmp(name, "memory.events") == 0) {
    snprintf(count, sizeof count, "low 0\nhigh 0\noom 3\noom_kill %d\n", 7 + looks++);
    write_group(name, count);
  }
  snprintf(other, sizeof other, "%s/%s", group_dir, name);
  return open_really(other, flags, mode);
}
static void be_in_group(void) {
  snprintf(group_dir, sizeof group_dir, "/tmp/phx-group-XXXXXX");
  char text[160];
  if (!mkdtemp(group_dir)) _exit(98);
  write_group("cgroup", "0::/\n");
  snprintf(text, sizeof text, "31 30 0:27 / %s rw - cgroup2 cgroup2 rw\n", group_dir);
  write_group("mountinfo", text);
  open_really = phx__sys.open;
  phx__sys.open = open_in_group;
}
Test(launcher, a_kill_for_lack_of_memory_is_said, .timeout = 60) {
  for (int in_group = 0; in_group < 2; in_group++) {
    struct trial t = launch((struct plan){.ranks = 2, .timeout = 20, .mode = "run", .who = -1, .steps = 100000,
                                          .pause_us = 300, .prepare = in_group ? be_in_group : NULL});
    kill(pid_of(&t, 1), SIGKILL);
    cr_expect_eq(wait_for(&t, 10), 3);
    EXPECT_SAYS(&t, "err", in_group ? "was killed by SIGKILL, out of memory by the kernel's count\n"
                                    : "was killed by SIGKILL\n");
    clean(&t);
  }
  cr_expect_eq(system("rm -rf /tmp/phx-group-??????"), 0);
}

/* In a process of its own: a run whose rank 1 is killed in step 5 of every attempt. */
static _Noreturn void be_killed_again_and_again(const char *dir) {
  char *argv[] = {(char *)PHX_TEST_COMMAND, (char *)"train", (char *)"run.ini", (char *)"-n", (char *)"2",
                  (char *)"--set", (char *)"plugins.path=" PHX_TEST_ONLY_PLUGINS, (char *)"--set",
                  (char *)"comm.plugin=fault", (char *)"--set", (char *)"fault.what=kill", NULL};
  const phx__override overrides[] = {{argv[6], "--set"}, {argv[8], "--set"}, {argv[10], "--set"},
                                     {"run.ranks=2", "-n"}, {"run.max_restarts=5", "--set"}};
  phx__config *config = NULL;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int out = chdir(dir) ? -1 : open("said", O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (out < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(98);
  if (phx__config_load("run.ini", overrides, sizeof overrides / sizeof *overrides, stderr, &config)) _exit(97);
  be_in_group();
  const int status = phx__train_launch(config, NULL, argv);
  fflush(NULL);
  _exit(status);
}

Test(launcher, a_second_kill_for_lack_of_memory_in_a_row_is_the_last, .timeout = 60) {
  char *dir = command_temp_dir();
  int status = 0;
  training_files(dir, training_odd_model);
  const pid_t pid = fork();
  if (pid == 0) be_killed_again_and_again(dir);
  cr_assert_eq(waitpid(pid, &status, 0), pid);
  char *said = command_read_file(dir, "said");
  cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 3, "%x: %s", status, said);
  cr_expect(strstr(said, "killed by SIGKILL, out of memory by the kernel's count (before the start: 2 ranks"), "%s",
            said);
  cr_expect(strstr(said, "restart 1 of at most 5") && !strstr(said, "restart 2 of"), "%s", said);
  cr_expect(strstr(said, "no restart: ranks were killed for lack of memory twice in a row"), "%s", said);
  free(said);
  command_remove_dir(dir);
  cr_expect_eq(system("rm -rf /tmp/phx-group-??????"), 0);
}

/* ---- what cannot be started ---- */

static int (*real_open)(const char *path, int flags, mode_t mode);
static int fail_second_log(const char *path, int flags, mode_t mode) {
  if (!strstr(path, "rank-2.log")) return real_open(path, flags, mode);
  errno = EACCES;
  return -1;
}
static void break_memfd(void) {
  phx__sys.memfd_create = fail_memfd;
}
static void break_ftruncate(void) {
  phx__sys.ftruncate = fail_ftruncate;
}
static void break_mmap(void) {
  phx__sys.mmap = fail_mmap;
}
static void break_log(void) {
  real_open = phx__sys.open;
  phx__sys.open = fail_second_log;
}
static void ignore_children(void) {
  signal(SIGCHLD, SIG_IGN);
}

Test(launcher, failing_calls_are_clear_errors, .timeout = 60) {
  static const struct {
    void (*prepare)(void);
    const char *says;
    int status;
  } cases[] = {{break_memfd, "memfd_create): Too many open files", 3},
               {break_ftruncate, "ftruncate): No space left on device", 3},
               {break_mmap, "mmap): Cannot allocate memory", 3},
               {break_log, "rank-2.log, the log of rank 2: Permission denied", 2}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct trial t = launch(
        (struct plan){.ranks = 3, .timeout = 5, .mode = "run", .who = -1, .steps = 100, .prepare = cases[i].prepare});
    cr_expect_eq(wait_for(&t, 5), cases[i].status);
    EXPECT_SAYS(&t, "err", cases[i].says);
    expect_nothing_left(&t, 3, 0);
    clean(&t);
  }
}

Test(launcher, ignored_sigchld_is_no_trap, .timeout = 60) {
  struct trial t = launch(
      (struct plan){.ranks = 2, .timeout = 20, .mode = "exit7", .who = 1, .steps = 100, .prepare = ignore_children});
  cr_expect_eq(wait_for(&t, 10), 3);
  EXPECT_SAYS(&t, "err", "exited with status 7");
  clean(&t);
}

Test(launcher, bad_requests_are_refused, .timeout = 20) {
  char *none[] = {(char *)"/nonexistent/phalanx", NULL};
  char dir[] = "/tmp/phx-launcher-XXXXXX";
  cr_assert_not_null(mkdtemp(dir));
  phx__launch asked = {.ranks = 2, .timeout_s = 5, .run_dir = dir, .argv = none};
  cr_expect_eq(phx__launch_run(&asked), 3); /* the table says that it cannot be executed */
  asked.ranks = 0;
  cr_expect_eq(phx__launch_run(&asked), 2);
  asked.ranks = 65;
  cr_expect_eq(phx__launch_run(&asked), 2);
  asked.ranks = 2;
  asked.run_dir = NULL;
  cr_expect_eq(phx__launch_run(&asked), 2);
  asked.run_dir = "/nonexistent/run";
  cr_expect_eq(phx__launch_run(&asked), 2);
  struct trial t = {.launcher = -1};
  memcpy(t.dir, dir, sizeof dir);
  clean(&t);
}
