/* Runs on two machines: network namespaces of this one, joined by a pair of virtual interfaces, 10.77.0.1 and
 * 10.77.0.2.
 *
 * The ranks are started as torchrun would, the device is the emulated cuda, the communicator plugins/nccl on its double
 * (whose bytes move in a file; what travels between the machines is what the store carries).  The namespaces belong to
 * two processes of the test and end with them, however the test ends. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../plugins/nccl_double/nccl_double.h"
#include "root.h"
#include "training.h"

enum { MACHINES = 2, RANKS_MAX = 4 };

typedef struct world {
  char *dir;
  pid_t holders[MACHINES]; /* whose network namespaces are the machines */
  pid_t pids[RANKS_MAX];
  int each, ranks; /* on a machine, and together */
  int runs;
  char why[200]; /* it cannot be done here */
} world;

/* ---- two machines ---- */
static void sleep_ms(long ms) { nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL); }
static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static pid_t hold_namespace(world *w) {
  int ends[2], error = 0;
  cr_assert_eq(pipe2(ends, O_CLOEXEC), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    error = unshare(CLONE_NEWNET) == 0 ? 0 : errno;
    if (write(ends[1], &error, sizeof error) != sizeof error) _exit(1);
    for (;;) pause();
  }
  close(ends[1]);
  if (read(ends[0], &error, sizeof error) != sizeof error) error = EIO;
  close(ends[0]);
  if (error) snprintf(w->why, sizeof w->why, "no network namespaces here: %s", strerror(error));
  return pid;
}

/* `ip` in a machine's namespace. */
static void ip(world *w, int machine, const char *what) {
  char command[300];
  if (w->why[0]) return;
  snprintf(command, sizeof command, "nsenter -t %d -n ip %.200s >/dev/null 2>&1", (int)w->holders[machine], what);
  if (system(command) != 0) snprintf(w->why, sizeof w->why, "cannot be done here: ip %.100s", what);
}

static void open_world(world *w, int each) {
  char command[300];
  memset(w, 0, sizeof *w);
  w->each = each;
  w->ranks = each * MACHINES;
  if (geteuid() != 0) cr_skip_test("two network namespaces need root");
  for (int m = 0; m < MACHINES; m++) w->holders[m] = hold_namespace(w);
  snprintf(command, sizeof command, "link add phx0 type veth peer name phx0 netns %d", (int)w->holders[1]);
  ip(w, 0, command);
  for (int m = 0; m < MACHINES; m++) {
    snprintf(command, sizeof command, "addr add 10.77.0.%d/24 dev phx0", m + 1);
    ip(w, m, command);
    ip(w, m, "link set phx0 up");
    ip(w, m, "link set lo up");
  }
  if (w->why[0]) {
    for (int m = 0; m < MACHINES; m++) kill(w->holders[m], SIGKILL), waitpid(w->holders[m], NULL, 0);
    cr_skip_test("%s", w->why);
  }
  w->dir = command_temp_dir();
  training_files(w->dir, training_odd_model);
  snprintf(command, sizeof command, "mkdir -m 755 %s/plugins %s/other && cp %s %s %s/plugins/", w->dir, w->dir,
           test_path("lib/phalanx-emulated/phx_device_cuda.so"), test_path("lib/phalanx-test/phx_comm_nccl_double.so"),
           w->dir);
  cr_assert_eq(system(command), 0);
}

static void close_world(world *w) {
  for (int r = 0; r < w->ranks; r++)
    if (w->pids[r] > 0) kill(w->pids[r], SIGKILL), waitpid(w->pids[r], NULL, 0);
  for (int m = 0; m < MACHINES; m++) kill(w->holders[m], SIGKILL), waitpid(w->holders[m], NULL, 0);
  command_remove_dir(w->dir);
}

/* ---- ranks ---- */
/* argv of a run on the emulated device; the double's memory is this run's own. */
static const char **command(world *w, const char *const *more) {
  static const char *argv[64];
  static char plugins[300];
  int n = 0;
  snprintf(plugins, sizeof plugins, "plugins.path=%s/plugins", w->dir);
  const char *const always[] = {"phalanx", "train", "run.ini", "-n", w->ranks == 2 ? "2" : "4", "--set",
                                "device.plugin=cuda", "--set", "comm.plugin=nccl_double", "--set", "cuda.share=yes",
                                "--set", "run.deterministic=yes", "--set", plugins, "--set", "model.layers=1"};
  for (size_t i = 0; i < sizeof always / sizeof *always; i++) argv[n++] = always[i];
  for (; *more; more++) {
    cr_assert_lt(n, 62);
    argv[n++] = *more;
  }
  argv[n] = NULL;
  return argv;
}
static void new_double(world *w) {
  char path[300];
  snprintf(path, sizeof path, "%s/double-%d", w->dir, w->runs++);
  setenv("NCCL_DOUBLE_MEMORY", path, 1);
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
}
static void set_number(const char *name, long value) {
  char text[32];
  snprintf(text, sizeof text, "%ld", value);
  setenv(name, text, 1);
}

/* In the rank's process. */
static void be_rank(const world *w, int rank, const char *dir, const char **argv) {
  char path[300];
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  snprintf(path, sizeof path, "/proc/%d/ns/net", (int)w->holders[rank / w->each]);
  const int ns = open(path, O_RDONLY | O_CLOEXEC);
  if (ns < 0 || setns(ns, CLONE_NEWNET) != 0) _exit(120);
  snprintf(path, sizeof path, "%s/log-%d", w->dir, rank);
  const int log = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (log < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0 || chdir(dir) != 0) _exit(121);
  set_number("RANK", rank);
  set_number("WORLD_SIZE", w->ranks);
  set_number("LOCAL_RANK", rank % w->each);
  set_number("LOCAL_WORLD_SIZE", w->each);
  setenv("MASTER_ADDR", "10.77.0.1", 1);
  set_number("MASTER_PORT", 29500);
  setenv("PHALANX_SECRET", "what the machines of this test know", 1);
  execv(test_path("bin/phalanx"), (char *const *)(unsigned long)argv);
  _exit(122);
}
static void start(world *w, int first, int last, const char *dir, const char *const *more) {
  const char **argv = command(w, more);
  for (int r = first; r <= last; r++) {
    w->pids[r] = fork();
    cr_assert_geq(w->pids[r], 0);
    if (w->pids[r] == 0) be_rank(w, r, dir, argv);
  }
}
static char *log_of(const world *w, int rank) {
  char name[32];
  snprintf(name, sizeof name, "log-%d", rank);
  return command_read_file(w->dir, name);
}
/* Exit statuses of ranks first..last, within the time; -1: still there. */
static void finish(world *w, int first, int last, double limit_s, int *status) {
  const double until = seconds() + limit_s;
  for (int r = first; r <= last; r++) {
    int raw = 0;
    status[r] = -1;
    pid_t ended;
    while ((ended = waitpid(w->pids[r], &raw, WNOHANG)) != w->pids[r] && seconds() < until) sleep_ms(5);
    if (ended != w->pids[r]) continue;
    status[r] = WIFEXITED(raw) ? WEXITSTATUS(raw) : 128 + WTERMSIG(raw);
    w->pids[r] = 0;
  }
}
static void must_end(world *w, int first, int last, int wanted, const char *text) {
  int status[RANKS_MAX];
  finish(w, first, last, 120, status);
  for (int r = first; r <= last; r++) {
    char *log = log_of(w, r);
    cr_expect_eq(status[r], wanted, "rank %d ended with %d:\n%s", r, status[r], log);
    if (text) cr_expect(log && strstr(log, text), "rank %d does not say '%s':\n%s", r, text, log);
    free(log);
  }
}
#define ON_TWO(w, ...) (new_double(w), start(w, 0, (w)->ranks - 1, (w)->dir, (const char *const[]){__VA_ARGS__, NULL}))
#define SET(pair) "--set", pair

/* The next line of metrics.jsonl that is a step's; NULL: there is none. */
static cJSON *next_step(char **line) {
  while (**line) {
    cJSON *json = cJSON_Parse(*line);
    *line += strcspn(*line, "\n");
    *line += **line == '\n';
    if (training_get(json, "loss") && training_get(json, "grad_norm")) return json;
    cJSON_Delete(json);
  }
  return NULL;
}

/* Every step's loss and norm with 17 digits, and the final hash. */
static void same_run(const world *w, const char *a, const char *b) {
  char path[2][100];
  const char *const dirs[2] = {a, b};
  static const char *const values[] = {"loss", "grad_norm"};
  cJSON *json[2];
  for (int i = 0; i < 2; i++) {
    snprintf(path[i], sizeof path[i], "%s/run.json", dirs[i]);
    json[i] = training_json(w->dir, path[i]);
    cr_assert_not_null(json[i], "%s", path[i]);
  }
  cr_expect_str_eq(training_get(json[0], "result.state_hash")->valuestring,
                   training_get(json[1], "result.state_hash")->valuestring, "%s and %s", a, b);
  for (int i = 0; i < 2; i++) cJSON_Delete(json[i]);
  char *text[2], *line[2];
  for (int i = 0; i < 2; i++) {
    snprintf(path[i], sizeof path[i], "%s/metrics.jsonl", dirs[i]);
    line[i] = text[i] = command_read_file(w->dir, path[i]);
    cr_assert_not_null(line[i], "%s", path[i]);
  }
  int steps = 0;
  for (; (json[0] = next_step(&line[0])) != NULL; steps++) {
    json[1] = next_step(&line[1]);
    cr_assert_not_null(json[1], "%s has %d steps only", b, steps);
    for (size_t v = 0; v < 2; v++)
      cr_expect_eq(training_get(json[0], values[v])->valuedouble, training_get(json[1], values[v])->valuedouble,
                   "%s of step %d, %s and %s", values[v], steps + 1, a, b);
    for (int i = 0; i < 2; i++) cJSON_Delete(json[i]);
  }
  cr_expect_geq(steps, 2);
  for (int i = 0; i < 2; i++) free(text[i]);
}

static void on_one(world *w, const char *const *more) {
  new_double(w);
  command_result r = command_run(w->dir, 120, command(w, more));
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
}
#define ON_ONE(w, ...) on_one(w, (const char *const[]){__VA_ARGS__, NULL})

/* ---- the tests ---- */
static void bits_of_one(int each, const char *const *strategies) {
  world w;
  open_world(&w, each);
  for (; *strategies; strategies++) {
    char one[40], two[40];
    snprintf(one, sizeof one, "run.out=one-%s", *strategies);
    snprintf(two, sizeof two, "run.out=two-%s", *strategies);
    ON_ONE(&w, SET("run.steps=2"), "--strategy", *strategies, SET(one));
    ON_TWO(&w, SET("run.steps=2"), "--strategy", *strategies, SET(two), SET("run.drift_every=1"));
    must_end(&w, 0, w.ranks - 1, 0, NULL);
    same_run(&w, one + 8, two + 8);
  }
  close_world(&w);
}
Test(machines, two_have_the_bits_of_one, .timeout = 400) {
  bits_of_one(1, (const char *const[]){"ddp", "zero", NULL});
}
Test(machines, with_two_ranks_each, .timeout = 400) { bits_of_one(2, (const char *const[]){"fsdp", NULL}); }

Test(machines, checkpoints_go_from_two_to_one_and_back, .timeout = 400) {
  world w;
  open_world(&w, 1);
  ON_ONE(&w, SET("run.steps=3"), "--strategy", "fsdp", SET("run.out=whole"));
  ON_TWO(&w, SET("run.steps=3"), "--strategy", "fsdp", SET("run.out=two"), SET("checkpoint.every=1"));
  must_end(&w, 0, w.ranks - 1, 0, NULL);
  same_run(&w, "whole", "two");
  ON_ONE(&w, SET("run.steps=3"), "--strategy", "zero", SET("run.out=back"), SET("checkpoint.every=1"), "--resume",
         "two/checkpoints/step-00000001");
  ON_TWO(&w, SET("run.steps=3"), "--strategy", "ddp", SET("run.out=again"), "--resume",
         "back/checkpoints/step-00000002");
  must_end(&w, 0, w.ranks - 1, 0, NULL);
  cJSON *a = training_json(w.dir, "whole/run.json"), *b = training_json(w.dir, "again/run.json");
  cr_expect_str_eq(training_get(a, "result.state_hash")->valuestring,
                   training_get(b, "result.state_hash")->valuestring);
  cJSON_Delete(a);
  cJSON_Delete(b);
  close_world(&w);
}

/* Until rank 0 has made two steps. */
static void run_well(const world *w) {
  for (int i = 0; i < 3000; i++) {
    char *log = log_of(w, 0);
    const int made = log && strstr(log, "step    2/");
    free(log);
    if (made) return;
    sleep_ms(20);
  }
  cr_assert_fail("no step was made");
}

/* Ended by name: `rank` with status 3, and its log has every one of the words. */
static void expect_failure(const world *w, int rank, int status, const char *const *words) {
  char *log = log_of(w, rank);
  cr_expect_eq(status, 3, "rank %d ended with %d:\n%s", rank, status, log);
  for (; *words; words++) cr_expect(log && strstr(log, *words), "rank %d does not say '%s':\n%s", rank, *words, log);
  free(log);
}
#define WORDS(...) (const char *const[]){__VA_ARGS__, NULL}

Test(machines, a_killed_rank_ends_the_other_by_name, .timeout = 300) {
  world w;
  int status[RANKS_MAX];
  open_world(&w, 1);
  ON_TWO(&w, SET("run.steps=100000"), SET("run.timeout=100"));
  run_well(&w);
  const double begin = seconds();
  kill(w.pids[1], SIGKILL);
  finish(&w, 0, 1, 60, status);
  cr_expect_lt(seconds() - begin, 20, "%g s", seconds() - begin); /* not the timeout's 100 */
  cr_expect_eq(status[1], 128 + SIGKILL);
  expect_failure(&w, 0, status[0], WORDS("rank 1 (", "10.77.0.2, pid", "is gone"));
  close_world(&w);
}

/* The cable of this world: the interfaces, and the double, whose bytes do not pass there. */
static void cut(world *w) {
  const double_control control = {.fault = DOUBLE_CUT};
  const int fd = open(getenv("NCCL_DOUBLE_MEMORY"), O_WRONLY | O_CLOEXEC);
  ip(w, 1, "link set phx0 down");
  cr_assert_str_eq(w->why, "");
  cr_assert_eq(pwrite(fd, &control.fault, sizeof control.fault, offsetof(double_control, fault)), sizeof control.fault);
  close(fd);
}

/* No machine is told: what it sends is not answered any more.  Rank 0 waits for a stream, which an abort ends; rank 1's
 * streams are inline, so that it stands in a call that never returns. */
Test(machines, a_cut_cable_ends_both_by_name, .timeout = 300) {
  const char *const run[] = {SET("run.steps=100000"), SET("run.timeout=8"), NULL};
  world w;
  int status[RANKS_MAX];
  open_world(&w, 1);
  new_double(&w);
  setenv("PHX_CUDA_DOUBLE", "threads=1", 1);
  start(&w, 0, 0, w.dir, run);
  unsetenv("PHX_CUDA_DOUBLE");
  start(&w, 1, 1, w.dir, run);
  run_well(&w);
  const double begin = seconds();
  cut(&w);
  finish(&w, 0, 1, 60, status); /* all there is of them: a rank is one process */
  cr_expect_lt(seconds() - begin, 16, "%g s", seconds() - begin); /* 4 to know it, 4 more for rank 1 */
  expect_failure(&w, 0, status[0], WORDS("rank 1 (", "10.77.0.2, pid", "is gone: its connection broke"));
  expect_failure(&w, 1, status[1], WORDS("rank 0 (", "10.77.0.1, pid", "is gone: its connection broke",
                                           "did not end by itself within 4 s"));
  close_world(&w);
}

Test(machines, what_cannot_be_is_refused, .timeout = 300) {
  world w;
  open_world(&w, 2);
  ON_TWO(&w, SET("comm.plugin=shm"), SET("run.out=shm"));
  must_end(&w, 0, w.ranks - 1, 2, "shm joins ranks of one machine; 2 of 4 are on this one");
  new_double(&w); /* half of the ranks have another seed */
  start(&w, 0, 1, w.dir, (const char *const[]){SET("run.steps=2"), NULL});
  start(&w, 2, 3, w.dir, (const char *const[]){SET("run.steps=2"), SET("run.seed=8"), NULL});
  must_end(&w, 0, w.ranks - 1, 2, "the ranks disagree about the configuration");
  new_double(&w); /* or another directory of the same name */
  char other[300], copy[1400];
  snprintf(other, sizeof other, "%s/other", w.dir);
  snprintf(copy, sizeof copy, "cp %s/run.ini %s/*.bin %s/ && mkdir %s/apart", w.dir, w.dir, other, other);
  cr_assert_eq(system(copy), 0);
  start(&w, 0, 1, w.dir, (const char *const[]){SET("run.timeout=4"), SET("run.out=apart"), NULL});
  start(&w, 2, 3, other, (const char *const[]){SET("run.timeout=4"), SET("run.out=apart"), NULL});
  must_end(&w, 0, w.ranks - 1, 2, "rank 2 does not see what rank 0 writes in run.out = apart");
  new_double(&w); /* a machine that does not come */
  start(&w, 0, 1, w.dir, (const char *const[]){SET("run.timeout=1"), NULL});
  must_end(&w, 0, 1, 2, "ranks 2, 3 never came to 10.77.0.1:29500 within 1 s, 2 of 4 are here");
  close_world(&w);
}
