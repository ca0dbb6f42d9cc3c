/* core/job/run_lock.c - see run_lock.h.
 *
 * Two signs say that a run is alive.  The kernel's: an open file description lock (fcntl F_OFD_SETLK), which ends with
 * the last process that has the descriptor, and which NFS carries to its server.  The file's own: host, process and
 * start of the holder, a random number, and a count that the holder raises every other second; it decides where locks
 * are missing, or reach no further than one machine.  A file is never changed into another run's: one of a dead run is
 * removed, and a new one appears by link(), whole and locked.
 *
 * A holder that was taken for dead (its machine stood still) finds another number in the file, and ends.
 * What it does not do: guard against a person who removes the file, but for ending the run that lost it.
 * Threads: [main]; one of our own looks every other second; phx__run_lock_check from any. */
#include "job/run_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/process_stat.h"
#include "base/status.h"
#include "base/sys.h"

enum { PATH_BYTES = 4200, TEXT_BYTES = 640, LOOK_S = 2, LEFT_BEHIND_MS = 5000, ATTEMPTS = 200 };

int phx__run_lock_limit_ms;
int phx__run_lock_patience_ms = 15000; /* several beats, and what a network file system remembers of a file */

typedef struct holder { /* what a lock file says */
  char host[65], started[32], place[96];
  long pid;
  uint64_t nonce, beat;
} holder;

static struct {
  bool held, adopted, watching;
  int fd;
  char path[PATH_BYTES];
  holder mine;
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  bool end, lost;      /* under mutex */
  char why[512];       /* with lost */
} run_lock = {.fd = -1, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* ---- who ---- */
static uint64_t start_of(long pid) {
  phx__process_stat it;
  phx__process_stat_read(pid, &it);
  return it.start;
}

/* Where a process number means something: this boot of this machine, and this namespace. */
static void place_of_this(char place[96]) {
  char boot[48] = "";
  struct stat st = {0};
  const int fd = phx__sys.open("/proc/sys/kernel/random/boot_id", O_RDONLY, 0);
  if (fd >= 0) {
    const ssize_t n = phx__sys.read(fd, boot, sizeof boot - 1);
    boot[n > 0 ? n : 0] = 0;
    boot[strcspn(boot, "\n ")] = 0;
    phx__sys.close(fd);
  }
  if (stat("/proc/self/ns/pid", &st)) st.st_ino = 0;
  snprintf(place, 96, "%s/%llu", boot[0] ? boot : "unknown", (unsigned long long)st.st_ino);
}

static void fill_mine(holder *h) {
  time_t now = time(NULL);
  struct tm tm;
  *h = (holder){.pid = (long)getpid()};
  if (gethostname(h->host, sizeof h->host - 1) || !h->host[0]) snprintf(h->host, sizeof h->host, "unknown");
  for (char *c = h->host; *c; c++)
    if (*c <= ' ' || *c > '~') *c = '_';
  strftime(h->started, sizeof h->started, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
  place_of_this(h->place);
  if (getrandom(&h->nonce, sizeof h->nonce, GRND_NONBLOCK) < 0)
    h->nonce = (uint64_t)now * UINT64_C(0x9e3779b97f4a7c15) ^ (uint64_t)h->pid;
}

#define BEAT "%016" PRIu64 "\n" /* at the end of the file, and always as long */
enum { BEAT_BYTES = 17 };

static int text_of(const holder *h, char text[TEXT_BYTES]) {
  return snprintf(text, TEXT_BYTES,
                  "host %s\nprocess %ld %" PRIu64 "\nstarted %s\nplace %s\nnumber %016" PRIx64 "\nbeat " BEAT, h->host,
                  h->pid, start_of(h->pid), h->started, h->place, h->nonce, h->beat);
}

typedef enum reading { READ_OK, READ_EMPTY, READ_GONE, READ_UNKNOWN } reading;

/* Opened anew: a network file system asks its server then. */
static reading read_holder(const char *path, holder *out, uint64_t *start) {
  char text[TEXT_BYTES];
  *out = (holder){.pid = 0};
  *start = 0;
  const int fd = phx__sys.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0);
  if (fd < 0) return errno == ENOENT || errno == ENOTDIR || errno == ELOOP ? READ_GONE : READ_UNKNOWN;
  const ssize_t n = phx__sys.pread(fd, text, sizeof text - 1, 0);
  phx__sys.close(fd);
  if (n < 0) return READ_UNKNOWN;
  text[n] = 0;
  const int got = sscanf(text,
                         "host %64s process %ld %" SCNu64 " started %31s place %95s number %" SCNx64 " beat %" SCNu64,
                         out->host, &out->pid, start, out->started, out->place, &out->nonce, &out->beat);
  return got == 7 ? READ_OK : READ_EMPTY;
}

static bool is_of_this_machine(const holder *h) {
  char place[96];
  place_of_this(place);
  return !strcmp(place, h->place);
}

/* Is the process alive that wrote this?  Elsewhere only its beats tell: this waits for one. */
static bool seems_alive(const char *path, const holder *h, uint64_t start) {
  holder again;
  uint64_t ignored;
  if (is_of_this_machine(h)) return (!kill((pid_t)h->pid, 0) || errno == EPERM) && start_of(h->pid) == start;
  phx__complain("%s is of process %ld on host %s, of which nothing more is known here: waiting %.1f s for a sign of "
          "life", path, h->pid, h->host, 1e-3 * phx__run_lock_patience_ms);
  for (int ms = 0; ms < phx__run_lock_patience_ms; ms += 250) {
    nanosleep(&(struct timespec){0, 250000000}, NULL);
    const reading r = read_holder(path, &again, &ignored);
    if (r == READ_GONE) return false;
    if (r == READ_OK && (again.nonce != h->nonce || again.beat != h->beat)) return true;
  }
  return false;
}

/* ---- taking ---- */
static bool beyond_limit(int ms) { return phx__run_lock_limit_ms > 0 && ms > phx__run_lock_limit_ms; }

/* A shorter look at the file would take a run that lives for a dead one. */
static phx_status refuse_to_wait(const char *dir, const char *path, const holder *h, phx_error *err) {
  return phx_fail(err, PHX_INVALID,
                  "run.out = %s: %s is of process %ld on host %s, of which nothing more is known here; to wait %.1f s "
                  "for a sign of life is more than [run] timeout allows the other ranks: raise it, or remove the file "
                  "if that run has ended", dir, path, h->pid, h->host, 1e-3 * phx__run_lock_patience_ms);
}

static phx_status refuse(const char *dir, const char *path, const holder *h, phx_error *err) {
  if (!h->host[0])
    return phx_fail(err, PHX_INVALID,
                    "run.out = %s is in use by another run (%s): wait until it has ended, or change run.out", dir,
                    path);
  return phx_fail(err, PHX_INVALID,
                  "run.out = %s is in use by another run: process %ld on host %s, started %s (%s): wait until it has "
                  "ended, or change run.out", dir, h->pid, h->host, h->started, path);
}

/* A name that nobody else uses, beside the lock. */
static void name_beside(char out[PATH_BYTES + 64], const char *path) {
  const size_t dir = strlen(path) - strlen(PHX__LOCK_NAME);
  snprintf(out, PATH_BYTES + 64, "%.*s.lock-%016" PRIx64 ".part", (int)dir, path, run_lock.mine.nonce);
}

/* The name appears with the whole file behind it, or (*taken false) was there already.  Where a file system has no
 * links, the name comes first. */
static phx_status create(const char *path, int *out, bool *taken, phx_error *err) {
  char part[PATH_BYTES + 64], text[TEXT_BYTES];
  struct stat st;
  const int length = text_of(&run_lock.mine, text);
  phx_status status = PHX_OK;
  *taken = false;
  name_beside(part, path);
  int fd = phx__sys.open(part, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0644);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot create %s", part);
  if (phx__sys.pwrite(fd, text, (size_t)length, 0) != length)
    status = phx_fail_errno(err, PHX_IO, errno, "cannot write %s", part);
  phx__sys.lock(fd); /* where there are none, what is written in the file has to do */
  const int failed = !status && phx__sys.link(part, path) ? errno : 0;
  if (!status) *taken = !failed || (!phx__sys.fstat(fd, &st) && st.st_nlink == 2); /* over NFS an answer may be lost */
  if (!status && !*taken && failed != EEXIST) {
    const int other = phx__sys.open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0644);
    if (other < 0 && errno != EEXIST) status = phx_fail_errno(err, PHX_IO, errno, "cannot create %s", path);
    if (other >= 0) {
      phx__sys.close(fd);
      fd = other;
      phx__sys.lock(fd);
      *taken = phx__sys.pwrite(fd, text, (size_t)length, 0) == length;
      if (!*taken) status = phx_fail_errno(err, PHX_IO, errno, "cannot write %s", path);
    }
  }
  phx__sys.unlink(part);
  if (*taken) *out = fd;
  else phx__sys.close(fd);
  return status;
}

/* The file of a dead run goes, and if it was another one by then, it comes back. */
static void remove_stale(const char *path, const holder *judged) {
  char part[PATH_BYTES + 64];
  holder moved;
  uint64_t ignored;
  name_beside(part, path);
  if (read_holder(path, &moved, &ignored) == READ_OK && moved.nonce != judged->nonce) return;
  if (phx__sys.rename(path, part)) return;
  if (read_holder(part, &moved, &ignored) == READ_OK && moved.nonce != judged->nonce) phx__sys.link(part, path);
  phx__sys.unlink(part);
}

static bool same_file(int fd, const char *path) {
  struct stat ours, there;
  return !phx__sys.fstat(fd, &ours) && !lstat(path, &there) && ours.st_dev == there.st_dev &&
         ours.st_ino == there.st_ino;
}

/* A file is there.  *free: whose it was is dead, and it is gone. */
static phx_status judge(const char *dir, const char *path, bool *free, bool *leftover, phx_error *err) {
  struct stat st;
  holder h;
  uint64_t start;
  *free = *leftover = false;
  const int fd = phx__sys.open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK, 0);
  if (fd < 0 && errno == ENOENT) {
    *free = true;
    return PHX_OK;
  }
  if (fd < 0 && errno == ELOOP)
    return phx_fail(err, PHX_INVALID, "%s is a link: remove it, or change run.out", path);
  if (fd < 0) return phx_fail_errno(err, PHX_INVALID, errno, "cannot open %s", path);
  phx_status status = PHX_OK;
  if (phx__sys.fstat(fd, &st) || !S_ISREG(st.st_mode)) {
    status = phx_fail(err, PHX_INVALID, "%s is not a regular file: remove it, or change run.out", path);
    goto done;
  }
  const bool locked = phx__sys.lock(fd) && (errno == EAGAIN || errno == EACCES);
  const reading r = read_holder(path, &h, &start);
  if (r == READ_UNKNOWN) {
    status = phx_fail_errno(err, PHX_INVALID, errno, "cannot read %s", path);
  } else if (locked) { /* ranks of a launcher that was killed may be on their way out */
    *leftover = r != READ_OK || (is_of_this_machine(&h) && start_of(h.pid) != start);
    status = refuse(dir, path, &h, err);
  } else if (r == READ_OK && beyond_limit(phx__run_lock_patience_ms) && !is_of_this_machine(&h)) {
    status = refuse_to_wait(dir, path, &h, err);
  } else if (r == READ_OK && seems_alive(path, &h, start)) {
    status = refuse(dir, path, &h, err);
  } else if (r != READ_GONE && same_file(fd, path)) {
    remove_stale(path, &h);
    *free = true;
  } else {
    *free = true; /* it went meanwhile */
  }
done:
  phx__sys.close(fd);
  return status;
}

static phx_status take_file(const char *dir, const char *path, int *fd, phx_error *err) {
  phx_status status = PHX_OK;
  int waited_ms = 0;
  for (int i = 0; i < ATTEMPTS; i++) {
    bool taken = false, free = false, leftover = false;
    status = judge(dir, path, &free, &leftover, err);
    if (status && (!leftover || waited_ms >= LEFT_BEHIND_MS || beyond_limit(waited_ms + 50))) return status;
    if (free) status = create(path, fd, &taken, err);
    if (taken || (free && status)) return status;
    if (free) continue;
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    waited_ms += 50;
  }
  return status ? status : phx_fail(err, PHX_INVALID, "run.out = %s: others take %s all the time", dir, path);
}

/* ---- watching ---- */
/* true: it is another's, or gone. */
static bool look(char *why, size_t bytes) {
  holder h;
  uint64_t ignored;
  const reading r = read_holder(run_lock.path, &h, &ignored);
  if (r == READ_UNKNOWN || (r == READ_OK && h.nonce == run_lock.mine.nonce)) return false;
  if (r == READ_OK)
    snprintf(why, bytes, "%.300s is now of another run: process %ld on host %s, started %s", run_lock.path, h.pid,
             h.host, h.started);
  else
    snprintf(why, bytes, "%.300s is %s: another run may be in this directory", run_lock.path,
             r == READ_GONE ? "gone" : "not this run's any more");
  return true;
}

/* One that cannot be written ends no run.  It is flushed: a network file system would keep it on this machine for a
 * while, and other machines would take the run for dead. */
static void beat(void) {
  char text[BEAT_BYTES + 8];
  struct stat st;
  snprintf(text, sizeof text, BEAT, run_lock.mine.beat + 1);
  if (phx__sys.fstat(run_lock.fd, &st) || st.st_size < BEAT_BYTES) return;
  if (phx__sys.pwrite(run_lock.fd, text, BEAT_BYTES, st.st_size - BEAT_BYTES) != BEAT_BYTES) return;
  run_lock.mine.beat++;
  phx__sys.fsync(run_lock.fd);
}

static void *watch(void *arg) {
  char why[sizeof run_lock.why];
  struct timespec until;
  (void)arg;
  pthread_mutex_lock(&run_lock.mutex);
  while (!run_lock.end && !run_lock.lost) {
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LOOK_S;
    pthread_cond_timedwait(&run_lock.wake, &run_lock.mutex, &until);
    if (run_lock.end) break;
    pthread_mutex_unlock(&run_lock.mutex);
    const bool lost = look(why, sizeof why);
    if (!lost) beat();
    pthread_mutex_lock(&run_lock.mutex);
    if (lost) memcpy(run_lock.why, why, sizeof why);
    run_lock.lost = lost;
  }
  pthread_mutex_unlock(&run_lock.mutex);
  return NULL;
}

static phx_status start_watching(phx_error *err) {
  sigset_t all, before;
  run_lock.end = run_lock.lost = false;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(&run_lock.thread, NULL, watch, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (failed) return phx_fail_errno(err, PHX_NOMEM, failed, "cannot start the thread that watches %s", run_lock.path);
  run_lock.watching = true;
  return PHX_OK;
}

static void stop_watching(void) {
  if (!run_lock.watching) return;
  pthread_mutex_lock(&run_lock.mutex);
  run_lock.end = true;
  pthread_cond_signal(&run_lock.wake);
  pthread_mutex_unlock(&run_lock.mutex);
  pthread_join(run_lock.thread, NULL);
  run_lock.watching = false;
}

/* ---- for callers ---- */
static phx_status path_in(const char *dir, char path[PATH_BYTES], phx_error *err) {
  if (snprintf(path, PATH_BYTES, "%s/" PHX__LOCK_NAME, dir) < PATH_BYTES - 64) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "%.200s...: the path is too long", dir);
}

phx_status phx__run_lock_take(const char *dir, phx_error *err) {
  if (run_lock.held) return phx_fail(err, PHX_STATE, "a second lock, of %s, in one process", dir);
  PHX_TRY(path_in(dir, run_lock.path, err));
  fill_mine(&run_lock.mine);
  PHX_TRY(take_file(dir, run_lock.path, &run_lock.fd, err));
  run_lock.held = true;
  run_lock.adopted = false;
  phx_status status = start_watching(err);
  if (status) phx__run_lock_release();
  return status;
}

/* Both are held for a moment, so that at no time somebody could take the earlier run for a dead one's. */
phx_status phx__run_lock_move(const char *dir, const char *moved, phx_error *err) {
  const int old = run_lock.fd;
  char gone[PATH_BYTES];
  int fd = -1;
  if (!run_lock.held) return PHX_OK;
  phx_status status = path_in(moved, gone, err);
  stop_watching();
  if (!status) status = take_file(dir, run_lock.path, &fd, err);
  if (status) return status; /* the caller gives up, and releases */
  run_lock.fd = fd;
  phx__sys.unlink(gone);
  phx__sys.close(old);
  return start_watching(err);
}

phx_status phx__run_lock_adopt(const char *dir, int fd, phx_error *err) {
  uint64_t ignored;
  struct stat st;
  PHX_TRY(path_in(dir, run_lock.path, err));
  if (phx__sys.fstat(fd, &st) || !S_ISREG(st.st_mode) || !same_file(fd, run_lock.path) ||
      read_holder(run_lock.path, &run_lock.mine, &ignored) != READ_OK)
    return phx_fail(err, PHX_STATE, "%s is not the launcher's lock any more", run_lock.path);
  if (fcntl(fd, F_SETFD, FD_CLOEXEC)) return phx_fail_errno(err, PHX_INTERNAL, errno, "cannot keep %s", run_lock.path);
  run_lock.fd = fd;
  run_lock.held = run_lock.adopted = true;
  return PHX_OK;
}

phx_status phx__run_lock_check(phx_error *err) {
  char why[sizeof run_lock.why];
  if (!run_lock.held || !look(why, sizeof why)) return PHX_OK;
  return phx_fail(err, PHX_STATE, "%s; this run stops, and leaves everything as it is", why);
}

phx_status phx__run_lock_seen(phx_error *err) {
  phx_status status = PHX_OK;
  if (!run_lock.watching) return PHX_OK;
  pthread_mutex_lock(&run_lock.mutex);
  if (run_lock.lost)
    status = phx_fail(err, PHX_STATE, "%s; this run stops, and leaves everything as it is", run_lock.why);
  pthread_mutex_unlock(&run_lock.mutex);
  return status;
}

int phx__run_lock_fd(void) { return run_lock.held ? run_lock.fd : -1; }

void phx__run_lock_release(void) {
  char why[sizeof run_lock.why];
  if (!run_lock.held) return;
  stop_watching();
  if (!run_lock.adopted && !look(why, sizeof why)) phx__sys.unlink(run_lock.path);
  phx__sys.close(run_lock.fd);
  run_lock.fd = -1;
  run_lock.held = false;
}
