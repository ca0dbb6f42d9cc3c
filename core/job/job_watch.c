/* core/job/job_watch.c - a thread of every rank that watches its own [main] and the other ranks of this machine.
 *
 * What it is for: no rank waits for what cannot come, whoever started it.
 *   - [main] that is in one call of a plugin for longer than the job's timeout without a heartbeat is named with the
 *     call, and the job ends.  A second more is given, since who waits in a collective has a deadline of its own and a
 *     better report.  A call that uses the processor or the disk meanwhile may compute for long: it has BUSY times as
 *     long.
 *   - When half of that time is over, the communicator is asked whether it is well (comm_watch.h).  If it is not, the
 *     job ends with its reason.
 *   - Under another launcher, a rank of this machine is named at once when its process ends without saying that it is
 *     done, and after 3.8 s when it is stopped.  Our own launcher sees both itself.
 *   - When the job has failed and [main] is still in a call, the communicator is told to give up (abort), once.  If
 *     [main] does not come back, the process ends: at once when it was asked to (SIGTERM).
 *   - exit() or _exit() in the middle of a run, which is a plugin's, is a failure, whatever its status says.
 * What it does not do: wait, call a plugin on this thread, or take a lock that [main] or a plugin holds for more than
 * a moment.
 * Never counted: time in which this process did not run (Ctrl-Z), in which somebody debugs it, in which it meets the
 * other ranks (that wait has a deadline), timeout = 0.
 * Invariant: the page of another rank is written here only after that rank's end, and by one rank only: see claim.
 * Threads: one per process, from phx__watch_start until the process ends; the exit handler runs in whoever exits. */
#include "job/job_watch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/cgroup.h"
#include "base/clean.h"
#include "base/clock.h"
#include "base/job_calls.h"
#include "base/process_stat.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/job_segment.h"
#include "job/stop.h"
#include "plugin/comm_watch.h"
#include "plugin/where.h"

#define MS UINT64_C(1000000)
#define TICK_MS 200
#define LATE_NS (1000 * MS)  /* a tick this late: this process did not run */
#define MORE_NS (1000 * MS)  /* than the timeout: collectives report first */
#define ABORT_NS (150 * MS)  /* [main] was not heard of for this long when the job failed: it waits */
#define GRACE_NS (5000 * MS) /* from the job's failure, for [main] to come back */
#define LEAVING_NS (30000 * MS) /* for [main] to end, once it is back */
#define BUSY 10
#define MEANINGS 5 /* exit statuses up to here mean something: see status.h */

typedef struct used { /* by the whole process */
  uint64_t cpu_ns;
  int64_t blocks; /* read and written */
} used;

static struct watcher {
  const phx_job *job;
  phx__segment *segment;
  pid_t pid;
  int pidfds[PHX_RANKS_MAX]; /* -1: not open */
  bool no_pidfd[PHX_RANKS_MAX]; /* refused, as containers and old kernels do: /proc says it, a tick later */
  uint64_t starts[PHX_RANKS_MAX]; /* with no_pidfd, of its process; 0: not known */
  bool gone[PHX_RANKS_MAX];  /* nothing more to see */
  int32_t stopped;           /* the rank that is stopped, or -1 */
  uint64_t stopped_ns;
  uint64_t last_ns, quiet_ns; /* the tick before; since when nothing was heard of [main] */
  uint64_t beat;
  int32_t call, stage, state;
  used at_quiet;
  uint64_t failed_ns;
  uint64_t leaving_ns; /* when [main] said that it ends this process after a failure; 0: not yet */
  int64_t oom_kills; /* at the start; -1: not known */
} watcher;

/* ---- saying ---- */

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...) { /* stdio may be locked by [main], for ever */
  char line[1200];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(line, sizeof line - 1, format, args);
  va_end(args);
  if (n > (int)sizeof line - 2) n = (int)sizeof line - 2;
  if (n < 0) return;
  phx__clean(line, (size_t)n);
  line[n++] = '\n';
  if (phx__sys.write(STDERR_FILENO, line, (size_t)n) < 0) return; /* nobody is left to be told */
}

static int32_t state_of(const phx_liveness *page) {
  return __atomic_load_n(&page->state, __ATOMIC_ACQUIRE);
}

/* " in step 5, in strategy ddp: release, stage 0" */
static void say_place(const phx_liveness *page, char *out, size_t bytes) {
  char where[160];
  const bool inside = phx__where_text(page, where, sizeof where);
  snprintf(out, bytes, " in step %lld%s%s", (long long)__atomic_load_n(&page->step, __ATOMIC_RELAXED),
           inside ? ", in " : "", where);
}

/* ---- the other ranks of this machine ---- */

/* The first rank that finds another one lost says so in that one's page. */
static void lose(struct watcher *w, int32_t rank, const char *how) {
  phx_liveness *page = &w->segment->pages[rank].alive;
  uint32_t nobody = 0;
  char place[240];
  if (__atomic_load_n(&w->segment->failed, __ATOMIC_ACQUIRE)) return;
  if (!__atomic_compare_exchange_n(&w->segment->pages[rank].claim, &nobody, 1, false, __ATOMIC_ACQ_REL,
                                   __ATOMIC_ACQUIRE))
    return;
  say_place(page, place, sizeof place);
  if (state_of(page) != PHX_RANK_FAILED) {
    snprintf(page->message, sizeof page->message, "%s (pid %d),%s", how, page->pid, place);
    __atomic_store_n(&page->state, PHX_RANK_FAILED, __ATOMIC_RELEASE);
  }
  phx__segment_fail(w->segment, 1 + (uint32_t)rank);
}

static void found_dead(struct watcher *w, int32_t rank) {
  const int32_t state = state_of(&w->segment->pages[rank].alive);
  w->gone[rank] = true;
  if (w->pidfds[rank] >= 0) phx__sys.close(w->pidfds[rank]);
  w->pidfds[rank] = -1;
  if (state == PHX_RANK_DONE) return;
  const bool no_memory = w->oom_kills >= 0 && phx__oom_kills("") > w->oom_kills;
  lose(w, rank, no_memory ? "its process has ended, out of memory by the kernel's count"
                          : "its process has ended without saying that it is done");
}

/* Whether the rank is one of ours to watch: it has come, and its pid means the same here as there. */
static bool is_near(const struct watcher *w, int32_t rank) {
  const phx__page *page = &w->segment->pages[rank], *mine = &w->segment->pages[w->job->rank];
  return rank != w->job->rank && state_of(&page->alive) != 0 && page->pid_space && page->pid_space == mine->pid_space;
}

static void look_without_pidfd(struct watcher *w, int32_t r) {
  const int32_t pid = w->segment->pages[r].alive.pid;
  phx__process_stat it;
  if (phx__process_has_ended(pid, w->starts[r])) found_dead(w, r);
  else if (!w->starts[r] && phx__process_stat_read(pid, &it)) w->starts[r] = it.start;
}

static void look_near(struct watcher *w) {
  for (int32_t r = 0; r < w->job->size; r++) {
    if (w->gone[r] || w->pidfds[r] >= 0 || !is_near(w, r)) continue;
    if (!w->no_pidfd[r]) w->pidfds[r] = phx__sys.pidfd_open(w->segment->pages[r].alive.pid);
    if (w->pidfds[r] >= 0) continue;
    if (!w->no_pidfd[r] && errno == ESRCH) found_dead(w, r);
    else look_without_pidfd(w, r);
    w->no_pidfd[r] = true;
  }
}

/* Every rank looks at the next one that runs: so a stopped one is seen as long as any rank runs. */
static void look_for_stop(struct watcher *w, uint64_t now) {
  char how[64];
  int32_t next = -1;
  for (int32_t k = 1; k < w->job->size && next < 0; k++) {
    const int32_t r = (w->job->rank + k) % w->job->size;
    if (!w->gone[r] && is_near(w, r) && state_of(&w->segment->pages[r].alive) < PHX_RANK_DONE) next = r;
  }
  phx__process_stat it = {0};
  if (next >= 0) phx__process_stat_read(w->segment->pages[next].alive.pid, &it);
  if (it.state != 'T') { /* 't' is a debugger's doing */
    w->stopped = -1;
    return;
  }
  if (w->stopped != next) w->stopped_ns = now;
  w->stopped = next;
  if (now - w->stopped_ns < PHX__STOPPED_NS) return;
  snprintf(how, sizeof how, "its process has been stopped for %.1f s", (double)(now - w->stopped_ns) * 1e-9);
  lose(w, next, how);
}

/* Sleeps for a tick, less when somebody ends. */
static void sleep_a_tick(struct watcher *w) {
  struct pollfd fds[PHX_RANKS_MAX];
  int32_t ranks[PHX_RANKS_MAX];
  nfds_t n = 0;
  for (int32_t r = 0; r < w->job->size; r++) {
    if (w->pidfds[r] < 0) continue;
    ranks[n] = r;
    fds[n++] = (struct pollfd){.fd = w->pidfds[r], .events = POLLIN};
  }
  if (poll(fds, n, TICK_MS) <= 0) return;
  for (nfds_t i = 0; i < n; i++)
    if (fds[i].revents) found_dead(w, ranks[i]);
}

/* ---- [main] ---- */

static used use_now(void) {
  struct rusage r;
  if (getrusage(RUSAGE_SELF, &r) != 0) return (used){0, 0};
  const int64_t us =
      (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * INT64_C(1000000) + r.ru_utime.tv_usec + r.ru_stime.tv_usec;
  return (used){(uint64_t)us * 1000, r.ru_inblock + r.ru_oublock};
}

static bool is_debugged(void) {
  char text[4096];
  const int fd = phx__sys.open("/proc/self/status", O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return false;
  const ssize_t n = phx__sys.read(fd, text, sizeof text - 1);
  phx__sys.close(fd);
  text[n > 0 ? n : 0] = 0;
  const char *at = strstr(text, "TracerPid:");
  return at && atoi(at + 10) > 0;
}

static void heard(struct watcher *w, uint64_t now) {
  w->quiet_ns = now;
  w->at_quiet = use_now();
}

/* Notes whether [main] did something since the tick before. */
static void listen(struct watcher *w, uint64_t now) {
  const phx_liveness *mine = w->job->mine;
  const uint64_t beat =
      __atomic_load_n(&mine->heartbeat_ns, __ATOMIC_RELAXED) + __atomic_load_n(&mine->n_flights, __ATOMIC_RELAXED);
  const int32_t call = __atomic_load_n(&mine->in_call, __ATOMIC_RELAXED);
  const int32_t stage = __atomic_load_n(&mine->in_stage, __ATOMIC_RELAXED), state = state_of(mine);
  const bool meets = __atomic_load_n(&w->segment->pages[w->job->rank].meets, __ATOMIC_ACQUIRE) != 0 && !w->failed_ns;
  if (meets || beat != w->beat || call != w->call || stage != w->stage || state != w->state) heard(w, now);
  else if (now - w->last_ns > LATE_NS) w->quiet_ns += now - w->last_ns;
  w->beat = beat;
  w->call = call;
  w->stage = stage;
  w->state = state;
}

/* [main] has been quiet for `limit`, or for BUSY times as long when the process does something. */
static bool is_quiet(const struct watcher *w, uint64_t now, uint64_t limit) {
  const uint64_t quiet = now - w->quiet_ns;
  if (quiet < limit) return false;
  if (w->failed_ns && w->job->size > 1) return true; /* what it does is of no use any more */
  const used use = use_now();
  const bool busy = use.cpu_ns - w->at_quiet.cpu_ns >= quiet / 50 || use.blocks != w->at_quiet.blocks;
  return !busy || quiet / BUSY >= limit;
}

static _Noreturn void end_process(void) {
  phx__exit_now(PHX__EXIT_RANK); /* not exit: its handlers may be what hangs */
}

/* The communicator may know long before the deadline that [main] waits in vain. */
static void judge_comm(struct watcher *w, uint64_t now) {
  char place[240], reason[240], message[600];
  const double timeout = w->job->timeout_s;
  if (timeout <= 0 || w->call <= PHX_IN_CORE || now - w->quiet_ns < (uint64_t)(timeout * 0.5e9)) return;
  phx__comm_ask_health();
  if (!phx__comm_health_failed(reason, sizeof reason)) return;
  if (__atomic_load_n(&w->segment->failed, __ATOMIC_ACQUIRE) || is_debugged()) return; /* that is what it says */
  say_place(w->job->mine, place, sizeof place);
  snprintf(message, sizeof message, "no progress for %.1f s ([run] timeout = %g s),%s: comm %.32s says: %s",
           (double)(now - w->quiet_ns) * 1e-9, timeout, place, w->job->mine->plugins[PHX_KIND_COMM], reason);
  say("phalanx: rank %d: %s", w->job->rank, message);
  w->job->fail(w->job->ctx, message);
  if (w->job->size == 1) end_process();
}

static void judge_main(struct watcher *w, uint64_t now) {
  char place[240], message[480];
  const double timeout = w->job->timeout_s;
  const bool inside = w->call > PHX_IN_CORE, done = w->state == PHX_RANK_DONE;
  if (timeout <= 0 || (!inside && !done)) return;
  if (!is_quiet(w, now, (uint64_t)(timeout * 1e9) + MORE_NS)) return;
  if (is_debugged()) {
    heard(w, now);
    return;
  }
  say_place(w->job->mine, place, sizeof place);
  const double seconds = (double)(now - w->quiet_ns) * 1e-9;
  if (done)
    snprintf(message, sizeof message, "done, but its process does not end for %.1f s ([run] timeout = %g s)", seconds,
             timeout);
  else
    snprintf(message, sizeof message, "no progress for %.1f s ([run] timeout = %g s),%s", seconds, timeout, place);
  say("phalanx: rank %d: %s", w->job->rank, message);
  w->job->fail(w->job->ctx, message);
  if (done || w->job->size == 1) end_process();
}

/* The job has failed: [main] hears of it in its next collective, if it comes to one. */
static void judge_failed(struct watcher *w, uint64_t now) {
  const uint32_t failed = __atomic_load_n(&w->segment->failed, __ATOMIC_ACQUIRE);
  if (!failed) return;
  const uint64_t leaving = __atomic_load_n(&w->leaving_ns, __ATOMIC_RELAXED);
  const bool waits = now - w->quiet_ns >= ABORT_NS || (w->failed_ns && now - w->failed_ns >= ABORT_NS);
  if (!leaving && w->call > PHX_IN_CORE && waits) phx__comm_abort();
  if (!w->failed_ns) {
    w->failed_ns = now;
    heard(w, now);
  }
  const bool asked = phx__stop_asked() && now - w->failed_ns >= GRACE_NS / 10;
  if (!asked && !is_quiet(w, now, GRACE_NS)) return;
  if (!asked && is_debugged()) return;
  /* [main] is on its way out: it ends a save, and gives memory back */
  if (leaving && now - leaving < LEAVING_NS) return;
  if (failed <= (uint32_t)w->job->size)
    say("phalanx: rank %d: rank %u failed: %.500s", w->job->rank, failed - 1,
        w->segment->pages[failed - 1].alive.message);
  say("phalanx: rank %d: the job has failed, and [main] does not come back: the process ends", w->job->rank);
  end_process();
}

static void *watch(void *arg) {
  struct watcher *w = arg;
  for (;;) {
    sleep_a_tick(w);
    const uint64_t now = phx__now_ns();
    const bool late = now - w->last_ns > LATE_NS;
    listen(w, now);
    if (late) w->stopped = -1;
    if (!w->segment->launcher_pid && !late) {
      look_near(w);
      look_for_stop(w, now);
    }
    if (!w->failed_ns) judge_comm(w, now);
    if (!w->failed_ns) judge_main(w, now);
    judge_failed(w, now);
    w->last_ns = now;
  }
  return NULL;
}

void phx__watch_leaving(void) { __atomic_store_n(&watcher.leaving_ns, phx__now_ns(), __ATOMIC_RELAXED); }

/* ---- exit() ---- */

static void judge_ending(struct watcher *w, const char *call, int status) {
  char place[240], message[480];
  if (getpid() != w->pid) return; /* a child that a plugin forked */
  const int32_t state = state_of(w->job->mine);
  if (state == PHX_RANK_DONE || state == PHX_RANK_FAILED) return;
  say_place(w->job->mine, place, sizeof place);
  snprintf(message, sizeof message, "a plugin, or a library that it uses, has called %s(%d),%s", call, status,
           place);
  say("phalanx: rank %d: %s", w->job->rank, message);
  w->job->fail(w->job->ctx, message);
  if (status <= MEANINGS) end_process(); /* not done, not refused: failed */
}

static void on_ending(int status, void *arg) { judge_ending(arg, "exit", status); }

void phx__watch_exits(int status) {
  if (watcher.job) judge_ending(&watcher, "_exit", status);
}

phx_status phx__watch_start(const phx_job *job, phx__segment *segment, phx_error *err) {
  pthread_t thread;
  sigset_t all, before;
  const uint64_t now = phx__now_ns();
  if (watcher.job) return PHX_OK;
  watcher = (struct watcher){.job = job, .segment = segment, .pid = getpid(), .stopped = -1, .last_ns = now};
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) watcher.pidfds[r] = -1;
  watcher.oom_kills = phx__oom_kills("");
  heard(&watcher, now);
  if (on_exit(on_ending, &watcher) != 0) {
    watcher.job = NULL;
    return phx_fail(err, PHX_NOMEM, "cannot watch for the process's end (on_exit)");
  }
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are [main]'s */
  const int code = pthread_create(&thread, NULL, watch, &watcher);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (code != 0) return phx_fail_errno(err, PHX_NOMEM, code, "cannot start the thread that watches the ranks");
  pthread_detach(thread);
  return PHX_OK;
}
