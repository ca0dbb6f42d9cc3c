/* tests/support/job_ranks.c - see job_ranks.h. */
#include "job_ranks.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "job/job.h"
#include "job/job_segment.h"
#include "base/status.h"

void job_ranks_set(const char *name, long value) {
  char text[32];
  snprintf(text, sizeof text, "%ld", value);
  setenv(name, text, 1);
}

void job_ranks_be(int rank, int size, int fd) {
  job_ranks_set("PHALANX_RANK", rank);
  job_ranks_set("PHALANX_WORLD_SIZE", size);
  job_ranks_set("PHALANX_LOCAL_RANK", rank);
  job_ranks_set("PHALANX_LOCAL_SIZE", size);
  job_ranks_set("PHALANX_JOB_FD", fd);
}

void job_ranks_forget(void) {
  unsetenv("PHALANX_RANK");
  unsetenv("PHALANX_WORLD_SIZE");
  unsetenv("PHALANX_LOCAL_RANK");
  unsetenv("PHALANX_LOCAL_SIZE");
  unsetenv("PHALANX_JOB_FD");
}

void job_ranks_run(int size, job_rank_body body) {
  phx_error err = PHX_ERROR_INIT;
  pid_t pids[PHX_RANKS_MAX], parent = getpid();
  int fd = phx__job_create_segment(size, &err);
  cr_assert_geq(fd, 0, "%s", err.message);
  for (int r = 0; r < size; r++) {
    pids[r] = fork();
    cr_assert_geq(pids[r], 0);
    if (pids[r] == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(98);
      job_ranks_be(r, size, fd);
      _exit(body(r, size));
    }
  }
  close(fd);
  for (int r = 0; r < size; r++) {
    int status = 0;
    cr_assert_eq(waitpid(pids[r], &status, 0), pids[r]);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank %d of %d ended with wait status %x", r, size,
              status);
  }
}

const phx_job *job_ranks_open(double timeout) {
  const phx_job *job = NULL;
  phx_error err = PHX_ERROR_INIT;
  phx_status status = phx__job_open(timeout, &job, &err);
  if (status != PHX_OK) fprintf(stderr, "open: %s\n", err.message);
  NEED(status == PHX_OK && job);
  return job;
}
