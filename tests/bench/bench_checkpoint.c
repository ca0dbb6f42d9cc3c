/* bench_checkpoint.c - saving and loading a whole checkpoint, over dd with direct I/O on the same disk.
 *
 * Ranks are children of this program that do what they are told through pipes, so that nothing but the save or the load
 * is between the two ends of a clock.  A save ends when it is flushed and renamed; dd flushes, too (conv=fsync). 
 * Neither finds anything in the page cache. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "checkpoint/checkpoint.h"
#include "plugin/config_load.h"
#include "job/job.h"
#include "engine/prepare.h"
#include "engine/runtime_open.h"
#include "engine/state.h"
#include "base/status.h"

enum { RANKS_MOST = 2, MIB = 1 << 20 };

typedef struct job {
  const char *strategy;
  int ranks;
  char dir[200];          /* on the disk in question */
  pid_t pid[RANKS_MOST];
  int ask[RANKS_MOST], answer[RANKS_MOST];
  int64_t bytes;          /* of all files */
  int64_t step;
} job;

static void die(const char *what, const char *why) {
  fprintf(stderr, "bench_checkpoint: %s: %s\n", what, why);
  exit(3);
}

/* ---- a rank ---- */
static void open_rank(const job *j, phx__runtime **out) {
  const phx_job *met = NULL;
  phx__config *config = NULL;
  phx__prepared *prepared = NULL;
  phx_error err = PHX_ERROR_INIT;
  char ini[260];
  snprintf(ini, sizeof ini, "%s/run.ini", j->dir);
  if (phx__config_load(ini, NULL, 0, stderr, &config)) die(ini, "refused");
  phx_status status = phx__job_open(config->s.run.timeout, &met, &err);
  if (!status) status = phx__prepare(config, met->rank, met->size, met->local_rank, met->local_size, 0, 0, &prepared,
                                     &err);
  if (!status) status = phx__runtime_open(config, met, prepared, out, &err);
  if (!status) status = phx__runtime_initialise(*out, &err);
  if (status) die("a rank", err.message);
}

static void serve(const job *j, int rank, int ask, int answer) {
  phx__runtime *rt = NULL;
  phx_error err = PHX_ERROR_INIT;
  phx__resumed resumed;
  char path[PHX__CHECKPOINT_PATH];
  int64_t step; /* to save, or minus the one to load */
  char text[16];
  snprintf(text, sizeof text, "%d", rank);
  setenv("RANK", text, 1);
  setenv("LOCAL_RANK", text, 1);
  snprintf(text, sizeof text, "%d", j->ranks);
  setenv("WORLD_SIZE", text, 1);
  setenv("LOCAL_WORLD_SIZE", text, 1);
  snprintf(path, sizeof path, "bench%d", (int)getppid());
  setenv("MASTER_PORT", path, 1); /* names the job */
  setenv("PHALANX_LOG", "warn", 0);
  open_rank(j, &rt);
  while (read(ask, &step, sizeof step) == (ssize_t)sizeof step) {
    const phx__position at = {.step = step};
    const double begin = bench_now();
    phx_status status = step < 0 ? phx__checkpoint_path(j->dir, -step, path, &err)
                                 : phx__checkpoint_save(rt, j->dir, &at, NULL, NULL, &err);
    if (!status && step < 0) status = phx__checkpoint_load(rt, path, &resumed, &err);
    const double seconds = bench_now() - begin;
    if (status) die(step < 0 ? "load" : "save", err.message);
    if (write(answer, &seconds, sizeof seconds) != (ssize_t)sizeof seconds) die("a rank", strerror(errno));
  }
  phx__runtime_close(rt);
  exit(0);
}

/* ---- the job ---- */
static void write_ini(const job *j, const char *build, int layers) {
  char path[260];
  snprintf(path, sizeof path, "%s/run.ini", j->dir);
  FILE *f = fopen(path, "w");
  if (!f) die(path, strerror(errno));
  fprintf(f, "[run]\nout = %s/out\nsteps = 1000000\nranks = %d\nstrategy = %s\ntimeout = 60\n[device]\nthreads = 1\n"
          "[data]\ntrain = %s/none.bin\n[batch]\nmicro = 1\nsequence = 64\n[plugins]\npath = %s/lib/phalanx\n"
          "[model]\nplugin = gpt\nlayers = %d\nheads = 12\nwidth = 768\ncontext = 64\nvocab = 257\n",
          j->dir, j->ranks, j->strategy, j->dir, build, layers);
  if (fclose(f)) die(path, strerror(errno));
}

static void start(job *j) {
  for (int r = 0; r < j->ranks; r++) {
    int down[2], up[2];
    if (pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC)) die("pipe", strerror(errno));
    fflush(stdout);
    j->pid[r] = fork();
    if (j->pid[r] < 0) die("fork", strerror(errno));
    if (j->pid[r] == 0) {
      for (int before = 0; before < r; before++) close(j->ask[before]);
      close(down[1]);
      serve(j, r, down[0], up[1]);
    }
    close(down[0]);
    close(up[1]);
    j->ask[r] = down[1];
    j->answer[r] = up[0];
  }
}

static void stop(job *j) {
  for (int r = 0; r < j->ranks; r++) close(j->ask[r]);
  for (int r = 0; r < j->ranks; r++) {
    int status = 0;
    while (waitpid(j->pid[r], &status, 0) < 0 && errno == EINTR) continue;
    if (!WIFEXITED(status) || WEXITSTATUS(status)) die("a rank", "ended badly");
    close(j->answer[r]);
  }
}

/* The slowest rank's seconds. */
static double order(job *j, int64_t step) {
  double slowest = 0, seconds = 0;
  for (int r = 0; r < j->ranks; r++)
    if (write(j->ask[r], &step, sizeof step) != (ssize_t)sizeof step) die("a rank", "is gone");
  for (int r = 0; r < j->ranks; r++) {
    if (read(j->answer[r], &seconds, sizeof seconds) != (ssize_t)sizeof seconds) die("a rank", "is gone");
    if (seconds > slowest) slowest = seconds;
  }
  return slowest;
}

static void file_of(const job *j, int rank, char path[PHX__CHECKPOINT_PATH + 64]) {
  char dir[PHX__CHECKPOINT_PATH];
  phx__checkpoint_path(j->dir, j->step, dir, NULL);
  snprintf(path, PHX__CHECKPOINT_PATH + 64, "%s/rank-%05d.safetensors", dir, rank);
}

static int64_t forget_cached(const job *j) {
  int64_t bytes = 0;
  for (int r = 0; r < j->ranks; r++) {
    char path[PHX__CHECKPOINT_PATH + 64];
    struct stat st;
    file_of(j, r, path);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)) die(path, strerror(errno));
    bytes += st.st_size;
    close(fd);
  }
  return bytes;
}

static double save(void *arg) {
  job *j = arg;
  char path[PHX__CHECKPOINT_PATH];
  if (j->step && (phx__checkpoint_path(j->dir, j->step, path, NULL) || phx__checkpoint_remove(path, NULL)))
    die("the checkpoint before", "cannot be removed");
  const double seconds = order(j, ++j->step);
  j->bytes = forget_cached(j);
  return (double)j->bytes / seconds;
}

static double load(void *arg) {
  job *j = arg;
  const int64_t bytes = forget_cached(j);
  return (double)bytes / order(j, -j->step);
}

/* Seconds by its own clock: starting it does not count. */
static double dd(const char *from, const char *to, const char *flags) {
  char command[2 * PHX__CHECKPOINT_PATH], line[300];
  double seconds = 0;
  snprintf(command, sizeof command, "LC_ALL=C dd if=%s of=%s bs=1M %s 2>&1", from, to, flags);
  FILE *f = popen(command, "re");
  if (!f) die(command, strerror(errno));
  while (fgets(line, sizeof line, f)) {
    const char *at = strstr(line, "copied, ");
    if (at) seconds = strtod(at + 8, NULL);
  }
  if (pclose(f) || !(seconds > 0)) die(command, "failed");
  return seconds;
}

static double dd_write(void *arg) {
  const job *j = arg;
  char path[260], flags[80];
  snprintf(path, sizeof path, "%s/dd", j->dir);
  snprintf(flags, sizeof flags, "count=%" PRId64 " oflag=direct conv=fsync", j->bytes / MIB);
  unlink(path);
  return (double)(j->bytes / MIB * MIB) / dd("/dev/zero", path, flags);
}

/* The very files that are loaded, one after the other: disks are not equally fast everywhere. */
static double dd_read(void *arg) {
  const job *j = arg;
  double seconds = 0;
  for (int r = 0; r < j->ranks; r++) {
    char path[PHX__CHECKPOINT_PATH + 64];
    file_of(j, r, path);
    seconds += dd(path, "/dev/null", "iflag=direct");
  }
  return (double)j->bytes / seconds;
}

static void compare(const char *build, const char *strategy, int ranks, int layers) {
  job j = {.strategy = strategy, .ranks = ranks};
  char name[100], command[300], saves[80], loads[80];
  snprintf(saves, sizeof saves, "checkpoint save, %s, %d rank%s", strategy, ranks, ranks > 1 ? "s" : "");
  snprintf(loads, sizeof loads, "checkpoint load, %s, %d rank%s", strategy, ranks, ranks > 1 ? "s" : "");
  if (!bench_wanted(saves) && !bench_wanted(loads)) return;
  snprintf(j.dir, sizeof j.dir, "%.100s/checkpoint-bench.XXXXXX", build);
  if (!mkdtemp(j.dir)) die(j.dir, strerror(errno));
  write_ini(&j, build, layers);
  start(&j);
  save(&j); /* how many bytes they are */
  bench_line line = {.name = saves, .a = "save, flushed and renamed", .b = "dd oflag=direct conv=fsync", .unit = "MB/s",
                     .divisor = 1e6, .limit = 0.9};
  bench_compare(&line, save, &j, dd_write, &j);
  if (bench_wanted(saves)) bench_print(&line);
  line = (bench_line){.name = loads, .a = "load, verified", .b = "dd iflag=direct", .unit = "MB/s", .divisor = 1e6,
                      .limit = 0.9}; /* ddp on 2 ranks: a load also makes the replicas whole and compares them */
  bench_compare(&line, load, &j, dd_read, &j);
  if (bench_wanted(loads)) bench_print(&line);
  snprintf(name, sizeof name, "%s, %d", strategy, ranks);
  bench_note(name, "%.0f MB of state in %d files", (double)j.bytes / 1e6, ranks);
  stop(&j);
  snprintf(command, sizeof command, "rm -rf '%s'", j.dir);
  if (system(command)) die(command, "failed");
}

int main(int argc, char **argv) {
  char build[160] = PHX_TEST_BUILD;
  bench_init(argc, argv);
  signal(SIGPIPE, SIG_IGN);
  compare(build, "ddp", 1, 12);
  compare(build, "ddp", 2, 12);
  compare(build, "fsdp", 2, 12);
  return bench_finish();
}
