/* core/job/job.c - this process's place in the job: opening it, agreeing, and saying how it goes.
 *
 * What it is for: phx.job/1 for communicators, and the few meetings of all ranks before anything is allocated.
 * What it does not do: start ranks (launcher.c), collectives on data (the communicator plugins).
 * On one machine all ranks map one segment.  On several, each process has one of its own, and the ranks meet in the
 * store (tcp_store.c); of other ranks' pages it then holds only what the store's thread writes: who failed, and why.
 * Invariant: one job per process, until the process ends.  On one machine a liveness page is written by its rank only;
 * the first failure's message stays, later ones are dropped.
 * Threads: [main]; fail() is [any], and safe in a signal handler. */
#include "job/job.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/clock.h"
#include "base/identity.h"
#include "base/job_calls.h"
#include "base/secret.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/job_segment.h"
#include "job/job_watch.h"
#include "job/tcp_store.h"

struct job {
  phx_job shown;
  phx__member member;
  phx_liveness *pages[PHX_RANKS_MAX];
  phx__store *store; /* ranks on several machines; else NULL */
  uint32_t failing;  /* FAILING: a message is being taken; TAKEN: it has been, or no more will be */
};
enum { FAILING = 1, TAKEN = 2 };
static struct job *the_job;

/* The communicator's thread shares the rank's cores with its compute, so nobody may spin for long: a waiter that may
 * spin does so for some 20 us, which hides a peer that is nearly there, then sleeps.  With fewer cores than ranks the
 * peer we wait for may need this very core: sleep at once. */
static int32_t decide_spin(const phx__segment *segment, int32_t local_size) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 0;
  int cpus = CPU_COUNT(&mask);
  return segment->pinned ? cpus >= 1 : cpus >= local_size;
}

static void note_failure(phx_liveness *page, const char *message) {
  size_t length = strnlen(message, sizeof page->message - 1);
  memcpy(page->message, message, length);
  page->message[length] = 0;
  __atomic_store_n(&page->state, PHX_RANK_FAILED, __ATOMIC_RELEASE);
}

static void job_fail(void *ctx, const char *message) {
  struct job *job = ctx;
  uint32_t nobody = 0;
  if (__atomic_compare_exchange_n(&job->failing, &nobody, FAILING, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    note_failure(job->shown.mine, message);
    if (job->store) phx__store_fail(job->store, message);
    __atomic_store_n(&job->failing, TAKEN, __ATOMIC_RELEASE);
  }
  phx__segment_fail(job->member.segment, 1 + (uint32_t)job->shown.rank);
}

/* The store's thread: some rank has failed, or this one in the others' eyes. */
static void job_failed(void *ctx, int32_t who, const char *message) {
  struct job *job = ctx;
  uint32_t nobody = 0;
  if (who != job->shown.rank) {
    note_failure(job->pages[who], message);
  } else if (__atomic_compare_exchange_n(&job->failing, &nobody, FAILING, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    note_failure(job->shown.mine, message);
    __atomic_store_n(&job->failing, TAKEN, __ATOMIC_RELEASE);
  }
  phx__segment_fail(job->member.segment, 1 + (uint32_t)who);
}

/* Around a wait with a deadline of its own, within which nobody is late: see job_watch.c. */
static void meet(struct job *job, uint32_t begins) {
  __atomic_store_n(&job->member.segment->pages[job->shown.rank].meets, begins, __ATOMIC_RELEASE);
  phx__job_heartbeat(&job->shown);
}

static phx_status job_share(void *ctx, const char *name, int64_t bytes, void **bases, phx_error *err) {
  struct job *job = ctx;
  void *found[PHX_RANKS_MAX];
  if (job->store)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "shared memory '%s': the ranks are on several machines; choose a [comm] plugin that joins "
                    "machines, such as nccl", name);
  meet(job, 1);
  phx_status status = phx__segment_share(&job->member, name, bytes, found, err);
  meet(job, 0);
  if (status == PHX_OK) memcpy(bases, found, (size_t)job->shown.size * sizeof *found);
  return status;
}

static phx_status job_exchange(void *ctx, const char *name, const void *mine, int64_t bytes, void *all,
                               phx_error *err) {
  struct job *job = ctx;
  meet(job, 1);
  const phx_status status = job->store ? phx__store_exchange(job->store, name, mine, bytes, all, err)
                                       : phx__segment_exchange(&job->member, name, mine, bytes, all, err);
  meet(job, 0);
  return status;
}

/* The namespace in which getpid() is this process: ranks in containers of their own may have others.  0: not known. */
static uint64_t pid_space(void) {
  struct stat info;
  return stat("/proc/self/ns/pid", &info) == 0 ? (uint64_t)info.st_ino : 0;
}

/* Takes this rank's page; a second process with the same number is refused. */
static phx_status join(struct job *job, phx_error *err) {
  phx_liveness *mine = job->shown.mine;
  int32_t nobody = 0;
  if (!__atomic_compare_exchange_n(&mine->pid, &nobody, (int32_t)getpid(), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) &&
      nobody != (int32_t)getpid())
    return phx_fail(err, PHX_INVALID, "rank %d of this job is process %d already; this one is %d", job->shown.rank,
                    nobody, (int)getpid());
  job->member.segment->pages[job->shown.rank].pid_space = pid_space();
  uint64_t now = phx__now_ns();
  __atomic_store_n(&mine->start_ns, now, __ATOMIC_RELAXED);
  __atomic_store_n(&mine->heartbeat_ns, now, __ATOMIC_RELAXED);
  __atomic_store_n(&mine->state, PHX_RANK_JOINED, __ATOMIC_RELEASE);
  return PHX_OK;
}

static void fill_shown(struct job *job, const phx__identity *me, double timeout_s) {
  phx__segment *segment = job->member.segment;
  for (int32_t r = 0; r < me->size; r++) job->pages[r] = &segment->pages[r].alive;
  job->shown = (phx_job){
      .struct_size = sizeof(phx_job),
      .ctx = job,
      .rank = me->rank,
      .size = me->size,
      .local_rank = me->local_rank,
      .local_size = me->local_size,
      .timeout_s = timeout_s,
      .mine = job->pages[me->rank],
      .ranks = job->pages,
      .failed = &segment->failed,
      .may_spin = decide_spin(segment, me->local_size),
      .share = job_share,
      .fail = job_fail,
      .exchange = job_exchange,
  };
  job->member.rank = me->rank;
  job->member.size = me->size;
  job->member.timeout_s = timeout_s;
  job->member.may_spin = job->shown.may_spin;
}

static phx_status meet_in_store(struct job *job, const phx__identity *me, double timeout_s, phx_error *err) {
  phx__secret secret;
  PHX_TRY(phx__secret_find(&secret, err));
  const phx__store_place place = {.address = me->address,
                                  .port = me->port,
                                  .job = XXH3_64bits(me->key, strlen(me->key)),
                                  .rank = me->rank,
                                  .size = me->size,
                                  .secret = &secret,
                                  .timeout_s = timeout_s,
                                  .failed = job_failed,
                                  .ctx = job};
  phx_status status = phx__store_open(&place, &job->store, err);
  int32_t pid = (int32_t)getpid(), pids[PHX_RANKS_MAX];
  if (status == PHX_OK) status = phx__store_exchange(job->store, "processes", &pid, sizeof pid, pids, err);
  /* of what they do, their pages say nothing here: start_ns stays 0 */
  for (int32_t r = 0; r < me->size && status == PHX_OK; r++) {
    int32_t not_come = 0;
    __atomic_store_n(&job->pages[r]->pid, pids[r], __ATOMIC_RELEASE);
    __atomic_compare_exchange_n(&job->pages[r]->state, &not_come, PHX_RANK_JOINED, false, __ATOMIC_ACQ_REL,
                                __ATOMIC_ACQUIRE);
  }
  return status;
}

phx_status phx__job_open(double timeout_s, const phx_job **out, phx_error *err) {
  phx__identity me;
  phx_status status;
  struct job *job = NULL;
  int fd = -1;
  if (the_job) return phx_fail(err, PHX_STATE, "this process has opened its job already");
  if (!(timeout_s >= 0) || timeout_s > 1e9)
    return phx_fail(err, PHX_INVALID, "timeout is %g s; expected 0 (for ever) to 1e9", timeout_s);
  PHX_TRY_GOTO(phx__identity_read(&me, err), status, done);
  job = phx__calloc(1, sizeof *job);
  if (!job) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the job's record, %zu bytes", sizeof *job);
    goto done;
  }
  if (me.by == PHX__BY_PHALANX) {
    fd = me.fd;
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) { /* what a rank starts is no rank */
      status = phx_fail_errno(err, PHX_INVALID, errno, "PHALANX_JOB_FD=%d is not an open file", fd);
      fd = -1;
      goto done;
    }
  } else if (me.by == PHX__ALONE || me.several) {
    fd = phx__job_create_segment(me.size, err);
    if (fd < 0) {
      status = PHX_NOMEM;
      goto done;
    }
  } else {
    PHX_TRY_GOTO(phx__rendezvous(&me, timeout_s, &fd, err), status, done);
  }
  job->member.fd = fd;
  PHX_TRY_GOTO(phx__segment_map(fd, me.size, &job->member.segment, err), status, done);
  fill_shown(job, &me, timeout_s);
  PHX_TRY_GOTO(join(job, err), status, done);
  if (me.several) PHX_TRY_GOTO(meet_in_store(job, &me, timeout_s, err), status, done);
  if (me.by != PHX__ALONE) phx__crash_install(&job->shown);
  the_job = job;
  *out = &job->shown;
  return PHX_OK;
done:
  if (job) {
    phx__store_close(job->store);
    phx__segment_unmap(job->member.segment);
    if (fd >= 0 && me.by != PHX__BY_PHALANX) phx__sys.close(fd);
  }
  phx__free(job);
  return status;
}

static struct job *inner(const phx_job *job) {
  return job->ctx;
}

phx_status phx__job_watch(const phx_job *job, phx_error *err) {
  return phx__watch_start(job, inner(job)->member.segment, err);
}

void phx__job_ends(const phx_job *shown, int exit_status) {
  struct job *job = inner(shown);
  if (job->store) phx__store_ends(job->store, exit_status);
}

void phx__job_leave(const phx_job *shown) {
  struct job *job = inner(shown);
  uint32_t state = 0;
  if (!job->store) return;
  /* another thread may be telling the store of a failure */
  while (!__atomic_compare_exchange_n(&job->failing, &state, TAKEN, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) &&
         state != TAKEN) {
    nanosleep(&(struct timespec){0, 1000000}, NULL);
    state = 0;
  }
  meet(job, 1); /* and stays: the process ends now */
  phx__store_close(job->store);
  job->store = NULL;
}

static phx_status exchange(struct job *job, const phx__post *mine, phx__post *all, phx_error *err) {
  if (job->store) return phx__store_exchange(job->store, mine->name, mine, sizeof *mine, all, err);
  return phx__exchange(&job->member, mine, all, err);
}

/* The value that most ranks have; of equally frequent ones, the lowest rank's. */
static int32_t most_common(const phx__post *all, int32_t size) {
  int32_t best = 0, best_count = 0;
  for (int32_t r = 0; r < size; r++) {
    int32_t count = 0;
    for (int32_t s = 0; s < size; s++) count += all[s].value == all[r].value;
    if (count > best_count) {
      best = r;
      best_count = count;
    }
  }
  return best;
}

phx_status phx__job_agree(const phx_job *job, uint64_t value, const char *what, phx_error *err) {
  phx__post all[PHX_RANKS_MAX], mine = {.kind = PHX__POST_AGREE, .value = value};
  strncpy(mine.name, what, sizeof mine.name - 1);
  PHX_TRY(exchange(inner(job), &mine, all, err));
  int32_t usual = most_common(all, job->size);
  for (int32_t r = 0; r < job->size; r++)
    if (all[r].value != all[usual].value)
      return phx_fail(
          err, PHX_INVALID,
          "the ranks disagree about %s: rank %d has %016llx, rank %d has %016llx; start all ranks with the "
          "same files and options",
          what, r, (unsigned long long)all[r].value, usual, (unsigned long long)all[usual].value);
  return PHX_OK;
}
