/* core/command/run_dir_shared.c - do the ranks of several machines see the same run directory, and are they its
 * owner's?
 *
 * Checkpoints and weights are written by all ranks into one directory.  Where each machine has one of its own, the
 * files would be incomplete without anybody noticing: rank 0 makes a file with a random name and random content, and
 * the others must read it.  A network file system may show it a little later.
 * Only the owner can read the file: each rank proves that it has (secret.h), so a process that took the place of a rank
 * over the network is found before anything is trained, also where the job has no PHALANX_SECRET.  [main] */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/secret.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/run_dir.h"
#include "job/job_segment.h"

#define LATE_S 10.0
enum { KEY_BYTES = 32 };

typedef struct proof { /* of having read the file, by a rank, in this meeting */
  uint64_t has_seen;
  uint8_t bytes[PHX__PROOF_BYTES];
} proof;

static bool read_key(const char *path, phx__secret *key) {
  const int fd = phx__sys.open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW, 0); /* opening asks the server; stat may not */
  if (fd < 0) return false;
  const ssize_t got = phx__sys.read(fd, key->key, KEY_BYTES);
  phx__sys.close(fd);
  key->bytes = got == KEY_BYTES ? KEY_BYTES : 0;
  return key->bytes > 0;
}

static bool appears(const char *path, double timeout_s, phx__secret *key) {
  const double limit_s = timeout_s > 0 && timeout_s < 2 * LATE_S ? timeout_s / 2 : LATE_S;
  const uint64_t start = phx__now_ns();
  do {
    if (read_key(path, key)) return true;
    nanosleep(&(struct timespec){0, 50000000}, NULL);
  } while ((double)(phx__now_ns() - start) < limit_s * 1e9);
  return false;
}

static phx_status make_file(const char *path, phx__secret *key, phx_error *err) {
  key->bytes = KEY_BYTES;
  phx_status status = phx__random(key->key, KEY_BYTES, err);
  if (status) return status;
  const int fd = phx__sys.open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot make %s", path);
  const ssize_t written = phx__sys.write(fd, key->key, KEY_BYTES);
  if (written != KEY_BYTES)
    status = phx_fail_errno(err, PHX_IO, written < 0 ? errno : ENOSPC, "cannot write %s", path);
  if (phx__sys.close(fd) != 0 && !status) status = phx_fail_errno(err, PHX_IO, errno, "cannot write %s", path);
  if (status) phx__sys.unlink(path);
  return status;
}

/* `all`: every rank's random number of this meeting, so that a proof of another one is worth nothing. */
static void prove(const phx__secret *key, int32_t rank, const uint64_t *all, int32_t size, proof *out) {
  uint64_t text[1 + PHX_RANKS_MAX] = {(uint64_t)rank};
  memcpy(text + 1, all, (size_t)size * sizeof *all);
  phx__secret_prove(key, text, sizeof text, out->bytes);
}

static phx_status judge(const phx__config *config, const phx__secret *key, const uint64_t *numbers, const proof *all,
                        const phx_job *job, phx_error *err) {
  proof expected;
  for (int32_t r = 0; r < job->size; r++) {
    if (!all[r].has_seen)
      return phx_fail(err, PHX_INVALID,
                      "rank %d does not see what rank 0 writes in run.out = %s: ranks on several machines need a run "
                      "directory on a file system that all of them share", r, config->s.run.out);
    prove(key, r, numbers, job->size, &expected);
    if (key->bytes && !phx__proofs_are_equal(expected.bytes, all[r].bytes))
      return phx_fail(err, PHX_INVALID,
                      "rank %d says that it sees run.out = %s, but has not read what rank 0 wrote there: another "
                      "user's process may have taken its place; set PHALANX_SECRET for all ranks", r,
                      config->s.run.out);
  }
  return PHX_OK;
}

phx_status phx__run_dir_shared(const phx__config *config, const phx_job *job, phx_error *err) {
  uint64_t mine = 0, nothing = 0, numbers[PHX_RANKS_MAX], made[PHX_RANKS_MAX];
  proof shown = {0}, all[PHX_RANKS_MAX];
  phx__secret key = {0};
  char path[4200];
  phx_status status = phx__random(&mine, sizeof mine, err);
  if (!status) status = job->exchange(job->ctx, "the run directory", &mine, sizeof mine, numbers, err);
  if (status) return status;
  snprintf(path, sizeof path, "%s/.meeting-%016llx", config->s.run.out, (unsigned long long)numbers[0]);
  if (job->rank == 0) status = make_file(path, &key, err);
  if (!status) status = job->exchange(job->ctx, "the run directory, made", &nothing, sizeof nothing, made, err);
  if (status) goto done;
  shown.has_seen = job->rank == 0 || appears(path, job->timeout_s, &key);
  prove(&key, job->rank, numbers, job->size, &shown);
  status = job->exchange(job->ctx, "the run directory, seen", &shown, sizeof shown, all, err);
  if (!status) status = judge(config, &key, numbers, all, job, err);
done:
  if (job->rank == 0 && key.bytes && phx__sys.unlink(path) != 0 && errno != ENOENT && !status)
    status = phx_fail_errno(err, PHX_IO, errno, "cannot remove %s", path);
  return status;
}
