/* tests/support/foreign.c - see foreign.h. */
#include "foreign.h"

#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "command.h"
#include "root.h"

const char *const foreign_names[FOREIGN_KINDS] = {"torchrun", "mpirun", "srun"};

static void set_number(const char *name, long value) {
  char text[32];
  snprintf(text, sizeof text, "%ld", value);
  setenv(name, text, 1);
}

/* `job` tells this job's ranks from those of another test that runs at the same time. */
static void set_environment(int kind, int rank, int ranks, long job) {
  if (kind == FOREIGN_TORCHRUN) {
    set_number("RANK", rank);
    set_number("WORLD_SIZE", ranks);
    set_number("LOCAL_RANK", rank);
    set_number("LOCAL_WORLD_SIZE", ranks);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    set_number("MASTER_PORT", 20000 + job % 40000);
    set_number("TORCHELASTIC_RESTART_COUNT", job);
  } else if (kind == FOREIGN_MPIRUN) {
    set_number("OMPI_COMM_WORLD_RANK", rank);
    set_number("OMPI_COMM_WORLD_SIZE", ranks);
    set_number("OMPI_COMM_WORLD_LOCAL_RANK", rank);
    set_number("OMPI_COMM_WORLD_LOCAL_SIZE", ranks);
    set_number("OMPI_MCA_ess_base_jobid", job);
  } else {
    set_number("SLURM_PROCID", rank);
    set_number("SLURM_STEP_NUM_TASKS", ranks);
    set_number("SLURM_NTASKS", ranks);
    set_number("SLURM_LOCALID", rank);
    set_number("SLURM_STEP_NUM_NODES", 1);
    set_number("SLURM_JOB_ID", job);
    set_number("SLURM_STEP_ID", 0);
  }
}

static void be_rank(const foreign *f, int kind, int rank, long job, const char *const *argv) {
  const char *all[64] = {"phalanx"};
  char path[128];
  int n = 1;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  snprintf(path, sizeof path, "%s/log-%d", f->dir, rank);
  const int log = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (log < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0 || chdir(f->dir) != 0) _exit(121);
  for (; *argv && n < 63; argv++) all[n++] = *argv;
  set_environment(kind, rank, f->n, job);
  signal(SIGINT, SIG_DFL);
  execv(test_path("bin/phalanx"), (char *const *)(uintptr_t)all);
  _exit(122);
}

foreign foreign_start(const char *dir, int kind, int ranks, const char *const *argv) {
  static long jobs;
  foreign f = {.n = ranks};
  const long job = (long)getpid() * 100 + jobs++ % 100;
  snprintf(f.dir, sizeof f.dir, "%s", dir);
  fflush(NULL);
  for (int r = 0; r < ranks; r++) {
    f.pids[r] = fork();
    if (f.pids[r] == 0) be_rank(&f, kind, r, job, argv);
  }
  return f;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int foreign_status(foreign *f, int rank, double seconds) {
  int status = 0;
  for (const double end = now() + seconds;; usleep(2000)) {
    if (f->pids[rank] > 0 && waitpid(f->pids[rank], &status, WNOHANG) == f->pids[rank]) break;
    if (f->pids[rank] <= 0 || now() >= end) return -1;
  }
  f->pids[rank] = 0;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

char *foreign_log(const foreign *f, int rank) {
  char name[32];
  snprintf(name, sizeof name, "log-%d", rank);
  return command_read_file(f->dir, name);
}

void foreign_end(foreign *f) {
  for (int r = 0; r < f->n; r++) {
    if (f->pids[r] <= 0) continue;
    kill(f->pids[r], SIGKILL);
    waitpid(f->pids[r], NULL, 0);
    f->pids[r] = 0;
  }
}
