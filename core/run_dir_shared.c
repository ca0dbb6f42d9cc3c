/* core/run_dir_shared.c - do the ranks of several machines see the same run directory?
 *
 * Checkpoints and weights are written by all ranks into one directory.  Where each machine has one of its own, the
 * files would be incomplete without anybody noticing: rank 0 makes a file with a random name, and the others must find
 * it.  A network file system may show it a little later.  [main] */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "job_segment.h"
#include "report.h"
#include "status.h"
#include "sys.h"

#define LATE_S 10.0

static bool appears(const char *path, double timeout_s) {
  const double limit_s = timeout_s > 0 && timeout_s < 2 * LATE_S ? timeout_s / 2 : LATE_S;
  const uint64_t start = phx__now_ns();
  do {
    const int fd = phx__sys.open(path, O_RDONLY | O_CLOEXEC, 0); /* opening asks the server; stat may not */
    if (fd >= 0) phx__sys.close(fd);
    if (fd >= 0) return true;
    nanosleep(&(struct timespec){0, 50000000}, NULL);
  } while ((double)(phx__now_ns() - start) < limit_s * 1e9);
  return false;
}

phx_status phx__run_dir_shared(const phx__config *config, const phx_job *job, phx_error *err) {
  uint64_t mine = 0, all[PHX_RANKS_MAX];
  char path[4200];
  if (getrandom(&mine, sizeof mine, GRND_NONBLOCK) < 0) mine = phx__now_ns();
  phx_status status = job->exchange(job->ctx, "the run directory", &mine, sizeof mine, all, err);
  if (status) return status;
  snprintf(path, sizeof path, "%s/.meeting-%016llx", config->s.run.out, (unsigned long long)all[0]);
  if (job->rank == 0) {
    const int fd = phx__sys.open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return phx__fail_errno(err, PHX_IO, errno, "cannot make %s", path);
    phx__sys.close(fd);
  }
  mine = 0;
  status = job->exchange(job->ctx, "the run directory, made", &mine, sizeof mine, all, err);
  if (status) return status;
  mine = appears(path, job->timeout_s);
  status = job->exchange(job->ctx, "the run directory, seen", &mine, sizeof mine, all, err);
  if (job->rank == 0 && phx__sys.unlink(path) != 0 && !status)
    status = phx__fail_errno(err, PHX_IO, errno, "cannot remove %s", path);
  for (int32_t r = 0; r < job->size && !status; r++)
    if (!all[r])
      status = phx__fail(err, PHX_INVALID,
                         "rank %d does not see what rank 0 writes in run.out = %s: ranks on several machines need a "
                         "run directory on a file system that all of them share", r, config->s.run.out);
  return status;
}
