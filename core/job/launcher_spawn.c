/* core/job/launcher_spawn.c - fork and exec of one rank: environment, log file, cores, and death with the launcher.
 *
 * Invariant: whatever can fail with a message is done before the fork; the child only makes system calls.  A rank
 * never outlives the launcher: PR_SET_PDEATHSIG, and a look at getppid() for a launcher that died before that call.
 * Ranks stay in the launcher's process group, so that Ctrl-C and Ctrl-Z reach all of them as the shell means it.
 * Threads: [main]. */
#include "job/launcher_spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/job_calls.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/run_lock.h"

extern char **environ;

enum { N_OWN = 6 };
typedef struct surroundings { /* of one rank */
  char own[N_OWN][48];
  char **variables;
  int log; /* -1: rank 0, which inherits */
  int null;
} surroundings;

static bool is_own(const char *variable) {
  static const char *const names[N_OWN] = {
      "PHALANX_RANK=", "PHALANX_WORLD_SIZE=", "PHALANX_LOCAL_RANK=", "PHALANX_LOCAL_SIZE=", "PHALANX_JOB_FD=",
      PHX__LOCK_VARIABLE "="};
  for (int i = 0; i < N_OWN; i++)
    if (strncmp(variable, names[i], strlen(names[i])) == 0) return true;
  return false;
}

static phx_status make_environment(surroundings *around, int32_t rank, int32_t size, int memfd, phx_error *err) {
  size_t count = 0, used = 0;
  while (environ[count]) count++;
  around->variables = phx__calloc(count + N_OWN + 1, sizeof *around->variables);
  if (!around->variables) return phx_fail(err, PHX_NOMEM, "no memory for the environment of rank %d", rank);
  snprintf(around->own[0], sizeof around->own[0], "PHALANX_RANK=%d", rank);
  snprintf(around->own[1], sizeof around->own[1], "PHALANX_WORLD_SIZE=%d", size);
  snprintf(around->own[2], sizeof around->own[2], "PHALANX_LOCAL_RANK=%d", rank);
  snprintf(around->own[3], sizeof around->own[3], "PHALANX_LOCAL_SIZE=%d", size);
  snprintf(around->own[4], sizeof around->own[4], "PHALANX_JOB_FD=%d", memfd);
  for (size_t i = 0; i < count; i++)
    if (!is_own(environ[i])) around->variables[used++] = environ[i];
  if (rank == 0 && phx__run_lock_fd() >= 0)
    snprintf(around->own[5], sizeof around->own[5], PHX__LOCK_VARIABLE "=%d", phx__run_lock_fd());
  for (int i = 0; i < N_OWN; i++)
    if (around->own[i][0]) around->variables[used++] = around->own[i];
  return PHX_OK;
}

static phx_status open_log(surroundings *around, int32_t rank, const char *run_dir, phx_error *err) {
  char path[4096];
  if (rank == 0) return PHX_OK;
  int used = snprintf(path, sizeof path, "%s/rank-%d.log", run_dir, rank);
  if (used < 0 || (size_t)used >= sizeof path)
    return phx_fail(err, PHX_INVALID, "the run directory's name has more than %zu bytes", sizeof path - 20);
  around->log = phx__sys.open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (around->log < 0)
    return phx_fail_errno(err, PHX_IO, errno, "cannot write %.300s, the log of rank %d", path, rank);
  around->null = phx__sys.open("/dev/null", O_RDONLY, 0);
  if (around->null < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot open /dev/null for rank %d", rank);
  return PHX_OK;
}

/* Without CPUs of its own a rank gets all that this process had before any plugin was loaded. */
static void pin(const phx__spawn *spawn, int32_t rank) {
  cpu_set_t mine;
  if (spawn->cpus) CPU_ZERO(&mine);
  else phx__cpus_mask(&mine);
  for (int i = 0; spawn->cpus && i < spawn->threads; i++)
    CPU_SET(spawn->cpus->ids[rank * spawn->threads + i], &mine);
  sched_setaffinity(0, sizeof mine, &mine); /* a hint: a rank that stays unpinned computes the same */
}

/* After a failed exec: the page is mapped here too. */
static void say_in_page(const phx__spawn *spawn, int32_t rank, int cause) {
  phx_liveness *page = &spawn->segment->pages[rank].alive;
  snprintf(page->message, sizeof page->message, "cannot execute %.300s: %s", spawn->argv[0], strerror(cause));
  __atomic_store_n(&page->state, PHX_RANK_FAILED, __ATOMIC_RELEASE);
  phx__segment_fail(spawn->segment, 1 + (uint32_t)rank);
}

static _Noreturn void run_child(const phx__spawn *spawn, int32_t rank, pid_t launcher, const surroundings *around) {
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != launcher) _exit(127);
  pin(spawn, rank);
  if (around->log >= 0 && (dup2(around->null, 0) < 0 || dup2(around->log, 1) < 0 || dup2(around->log, 2) < 0))
    _exit(127);
  if (fcntl(spawn->memfd, F_SETFD, 0) != 0) _exit(127);
  const int lock = phx__run_lock_fd();
  if (rank == 0 && lock >= 0 && fcntl(lock, F_SETFD, 0) != 0) _exit(127);
  sigprocmask(SIG_SETMASK, &spawn->mask, NULL);
  execve(spawn->argv[0], spawn->argv, around->variables);
  say_in_page(spawn, rank, errno);
  _exit(127);
}

phx_status phx__spawn_rank(const phx__spawn *spawn, int32_t rank, pid_t *out, phx_error *err) {
  surroundings around = {.log = -1, .null = -1};
  pid_t launcher = getpid(), pid = -1;
  phx_status status;
  PHX_TRY_GOTO(make_environment(&around, rank, spawn->ranks, spawn->memfd, err), status, done);
  PHX_TRY_GOTO(open_log(&around, rank, spawn->run_dir, err), status, done);
  pid = fork();
  if (pid == 0) run_child(spawn, rank, launcher, &around);
  if (pid < 0) {
    status = phx_fail_errno(err, PHX_NOMEM, errno, "cannot start rank %d (fork)", rank);
    goto done;
  }
  *out = pid;
done:
  if (around.null >= 0) phx__sys.close(around.null);
  if (around.log >= 0) phx__sys.close(around.log);
  phx__free(around.variables);
  return status;
}
