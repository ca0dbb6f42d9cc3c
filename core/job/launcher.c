/* core/job/launcher.c - starts the ranks of a job on this machine, watches them, and ends all when one goes wrong.
 *
 * What it is for: no rank hangs.  A death is seen at once (pidfd), and so is a rank that ends with status 0 before it
 * has said that it is done; a stopped rank after 3.8 s, a rank that never joins after the timeout, and ranks that wait
 * for one that is done and left with status 0 or 5 after the timeout too.  A rank that hangs finds that itself
 * (job_watch.c).  Then all others are told (`failed`), given 0.3 s to report, asked (SIGTERM) and killed, so that a
 * second after a death nothing is left.
 * What it does not do: restart anything (restart.c), or look into what the ranks compute.
 * Invariant: every rank started is waited for before phx__launch_run returns.  Time in which the launcher itself was
 * suspended (Ctrl-Z, then fg: the ranks with it) counts for none of the limits.
 * Threads: [main]; while it runs, the launcher's termination signals are blocked and read from a signalfd. */
#include "job/launcher.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cgroup.h"
#include "base/clean.h"
#include "base/clock.h"
#include "base/complain.h"
#include "base/job_calls.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/flight.h"
#include "job/job_segment.h"
#include "job/launcher_spawn.h"
#include "job/run_lock.h"
#include "job/stop.h"
#include "plugin/where.h"

#define MS UINT64_C(1000000)
#define TICK_MS 50
#define SUSPENDED_NS (1000 * MS) /* a tick this late: we did not run */
#define REPORT_NS (300 * MS)     /* from the failure: the others may report */
#define TERM_NS (300 * MS)       /* from SIGTERM to SIGKILL */
#define GIVE_UP_NS (10000 * MS)

struct rank {
  pid_t pid;
  int pidfd;
  bool running;
  int stop_signal; /* 0: not stopped */
  uint64_t stopped_ns;
  phx__rank_end end; /* how it ended, when not running */
  bool was_asked;    /* it ended after our SIGTERM */
  bool lost;         /* stopped for too long, or it never came */
  uint64_t beat, moved_ns;
};

struct launch {
  const phx__launch *asked;
  phx__segment *segment;
  int memfd, signals;
  int32_t started, running;
  int interrupt; /* a signal to us: the user ends the job */
  bool asked_to_end;
  int32_t cause_rank; /* -1: none */
  char cause[400];    /* "": nothing is wrong; else what, unless cause_rank's own end says it better */
  uint64_t started_ns, last_ns, failed_ns, interrupt_ns;
  int64_t oom_kills;  /* at the start; -1: not known */
  bool no_memory;     /* somebody was killed for lack of it meanwhile */
  uint64_t announced_ns, term_ns; /* when the first Ctrl-C was answered, the first SIGTERM passed on; or 0 */
  phx_liveness *pages; /* (ranks) as they were at failed_ns */
  phx__rank_end *ends;
  struct rank ranks[PHX_RANKS_MAX];
};

static void set_cause(struct launch *l, int32_t rank, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void set_cause(struct launch *l, int32_t rank, const char *format, ...) {
  if (l->cause[0]) return;
  va_list args;
  va_start(args, format);
  vsnprintf(l->cause, sizeof l->cause, format, args);
  va_end(args);
  l->cause_rank = rank;
}

/* ---- looking ---- */

static void note_change(struct launch *l, struct rank *rank, const siginfo_t *info, uint64_t now) {
  switch (info->si_code) {
    case CLD_STOPPED:
      rank->stop_signal = info->si_status;
      rank->stopped_ns = now;
      return;
    case CLD_CONTINUED:
      rank->stop_signal = 0;
      return;
    case CLD_EXITED:
    case CLD_KILLED:
    case CLD_DUMPED:
      rank->running = false;
      rank->was_asked = l->asked_to_end;
      rank->end.condition = info->si_code == CLD_EXITED ? PHX__RANK_EXITED : PHX__RANK_KILLED;
      rank->end.number = info->si_status;
      l->running--;
      if (rank->pidfd >= 0) phx__sys.close(rank->pidfd);
      rank->pidfd = -1;
      return;
    default:
      return;
  }
}

static void reap(struct launch *l, uint64_t now) {
  for (int32_t r = 0; r < l->started; r++) {
    struct rank *rank = &l->ranks[r];
    while (rank->running) {
      siginfo_t info = {0};
      if (waitid(P_PID, (id_t)rank->pid, &info, WEXITED | WSTOPPED | WCONTINUED | WNOHANG) != 0 || info.si_pid == 0)
        break;
      note_change(l, rank, &info, now);
    }
  }
}

static void signal_all(struct launch *l, int number) {
  for (int32_t r = 0; r < l->started; r++)
    if (l->ranks[r].running) kill(l->ranks[r].pid, number); /* not reaped yet: the pid is still its own */
}

/* Whoever asks a process group asks the ranks, too, and a second time after us: for them it is one wish.  SIGUSR1 and
 * SIGHUP (a terminal that is gone, where nobody waits any more) stay wishes however often they come. */
static bool pass_on(struct launch *l, int number) {
  const uint64_t now = phx__now_ns();
  if (!l->asked->saves) return false;
  if (number == SIGTERM && phx__stop_term_twice(l->term_ns, now)) return false;
  if (number == SIGINT && phx__stop_twice(l->announced_ns, now)) return false;
  if (number == SIGTERM && !l->term_ns) l->term_ns = now;
  if (number == SIGHUP) signal(SIGPIPE, SIG_IGN);
  if (number == SIGINT && !l->announced_ns) {
    fputs(PHX__STOP_HEARD, stderr);
    l->announced_ns = phx__now_ns();
  }
  signal_all(l, number);
  return true;
}

static void read_signals(struct launch *l) {
  struct signalfd_siginfo info;
  while (phx__sys.read(l->signals, &info, sizeof info) == (ssize_t)sizeof info) {
    if (l->interrupt || pass_on(l, (int)info.ssi_signo)) continue;
    l->interrupt = (int)info.ssi_signo;
    l->interrupt_ns = phx__now_ns();
  }
}

/* Sleeps until something happens, at most `ms`; then looks at everything. */
static uint64_t look(struct launch *l, int ms) {
  struct pollfd ready[PHX_RANKS_MAX + 1] = {{.fd = l->signals, .events = POLLIN}};
  nfds_t n = 1;
  for (int32_t r = 0; r < l->started; r++)
    if (l->ranks[r].running && l->ranks[r].pidfd >= 0)
      ready[n++] = (struct pollfd){.fd = l->ranks[r].pidfd, .events = POLLIN};
  poll(ready, n, ms);
  uint64_t now = phx__now_ns();
  if (now - l->last_ns > SUSPENDED_NS) { /* timers start anew */
    l->started_ns += now - l->last_ns;
    for (int32_t r = 0; r < l->started; r++) l->ranks[r].stopped_ns = l->ranks[r].moved_ns = now;
  }
  l->last_ns = now;
  __atomic_store_n(&l->segment->launcher_ns, now, __ATOMIC_RELAXED);
  reap(l, now);
  read_signals(l);
  return now;
}

/* ---- judging ---- */

static int32_t state_of(const struct launch *l, int32_t r) {
  return __atomic_load_n(&l->segment->pages[r].alive.state, __ATOMIC_ACQUIRE);
}

/* It saved and stopped as a signal asked; the word of a rank that says that it is done. */
static bool is_stopped_end(const struct launch *l, int32_t r) {
  const struct rank *rank = &l->ranks[r];
  return !rank->running && rank->end.condition == PHX__RANK_EXITED && rank->end.number == PHX__EXIT_STOPPED &&
         state_of(l, r) == PHX_RANK_DONE;
}

/* A rank says that it is done as the last thing it does: status 0 without that is a plugin's exit(). */
static bool left_early(const struct launch *l, int32_t r) {
  const struct rank *rank = &l->ranks[r];
  return !rank->running && rank->end.condition == PHX__RANK_EXITED && rank->end.number == 0 &&
         state_of(l, r) != PHX_RANK_DONE;
}

static bool is_bad_end(const struct launch *l, int32_t r) {
  const struct rank *rank = &l->ranks[r];
  if (rank->running || is_stopped_end(l, r)) return false;
  return rank->end.condition == PHX__RANK_KILLED || rank->end.number != 0 || left_early(l, r);
}

/* A rank that was killed comes first: its peers may have found it missing, and said so, before we looked.  Then who
 * said first that it failed, then whoever left with a status. */
static void judge_ends(struct launch *l) {
  for (int32_t r = 0; r < l->started; r++)
    if (is_bad_end(l, r) && l->ranks[r].end.condition == PHX__RANK_KILLED)
      set_cause(l, r, "rank %d (pid %d) was killed", r, (int)l->ranks[r].pid);
  uint32_t failed = __atomic_load_n(&l->segment->failed, __ATOMIC_ACQUIRE);
  if (failed >= 1 && failed <= (uint32_t)l->asked->ranks)
    set_cause(l, (int32_t)failed - 1, "rank %u (pid %d) failed", failed - 1, (int)l->ranks[failed - 1].pid);
  for (int32_t r = 0; r < l->started; r++)
    if (is_bad_end(l, r))
      set_cause(l, r, "rank %d (pid %d) exited with status %d", r, (int)l->ranks[r].pid, l->ranks[r].end.number);
}

static void judge_time(struct launch *l, uint64_t now) {
  char name[32];
  double timeout = l->asked->timeout_s;
  uint64_t limit = timeout > 0 ? (uint64_t)(timeout * 1e9) : UINT64_MAX;
  for (int32_t r = 0; r < l->started; r++) {
    struct rank *rank = &l->ranks[r];
    if (!rank->running) continue;
    const bool stopped = rank->stop_signal && now - rank->stopped_ns >= PHX__STOPPED_NS;
    const bool missing = now - l->started_ns > limit && state_of(l, r) == 0;
    rank->lost = stopped || missing;
    if (stopped)
      set_cause(l, -1, "rank %d (pid %d) has been stopped (%s) for %.1f s", r, (int)rank->pid,
                phx__signal_name(rank->stop_signal, name, sizeof name), (double)(now - rank->stopped_ns) * 1e-9);
    if (missing)
      set_cause(l, -1, "rank %d (pid %d) did not join the job within %g s", r, (int)rank->pid, timeout);
  }
}

/* Somebody left and is content, and the others wait.  They have a timeout of their own, so they get a second more. */
static void judge_progress(struct launch *l, uint64_t now) {
  int32_t left = -1, waiting = -1;
  uint64_t moved = 0;
  for (int32_t r = 0; r < l->started; r++) {
    struct rank *rank = &l->ranks[r];
    if (!rank->running) {
      left = r;
      continue;
    }
    const phx_liveness *page = &l->segment->pages[r].alive;
    uint64_t beat =
        __atomic_load_n(&page->heartbeat_ns, __ATOMIC_RELAXED) + __atomic_load_n(&page->n_flights, __ATOMIC_RELAXED);
    if (beat != rank->beat) rank->moved_ns = now;
    rank->beat = beat;
    if (rank->moved_ns > moved) moved = rank->moved_ns;
    if (state_of(l, r) == 1 || state_of(l, r) == 2) waiting = r;
  }
  if (l->asked->timeout_s <= 0 || left < 0 || waiting < 0) return;
  if (now - moved > (uint64_t)((l->asked->timeout_s + 1) * 1e9))
    set_cause(l, -1, "rank %d (pid %d) has left with status %d, and rank %d (pid %d) makes no progress for %.1f s",
              left, (int)l->ranks[left].pid, l->ranks[left].end.number, waiting, (int)l->ranks[waiting].pid,
              (double)(now - moved) * 1e-9);
}

/* ---- starting and ending ---- */

static phx_status start(struct launch *l, const phx__spawn *spawn, phx_error *err) {
  for (int32_t r = 0; r < l->asked->ranks; r++) {
    struct rank *rank = &l->ranks[r];
    PHX_TRY(phx__spawn_rank(spawn, r, &rank->pid, err));
    rank->running = true;
    rank->moved_ns = phx__now_ns();
    /* Without pidfds (a kernel before 5.3) the tick finds the death. */
    rank->pidfd = phx__sys.pidfd_open(rank->pid);
    l->started++;
    l->running++;
  }
  return PHX_OK;
}

static void take_pictures(struct launch *l, uint64_t now) {
  l->failed_ns = now;
  for (int32_t r = 0; r < l->asked->ranks; r++) {
    const struct rank *rank = &l->ranks[r];
    memcpy(&l->pages[r], &l->segment->pages[r].alive, sizeof l->pages[r]);
    l->ends[r] = rank->end;
    if (rank->running || r >= l->started) {
      l->ends[r].condition = state_of(l, r) == PHX_RANK_ABSENT ? PHX__RANK_NEVER : PHX__RANK_ALIVE;
      if (rank->stop_signal) l->ends[r].condition = PHX__RANK_STOPPED;
      l->ends[r].number = rank->stop_signal;
    }
    l->ends[r].pid = (int32_t)rank->pid;
  }
}

/* Wakes the waiters, gives them time to report unless the user is waiting, asks, kills, reaps. */
static void end_all(struct launch *l) {
  uint64_t begin = phx__now_ns(), grace = l->interrupt ? 0 : REPORT_NS, now = begin;
  bool killed = false;
  snprintf(l->segment->message, sizeof l->segment->message, "%s", l->cause);
  phx__segment_fail(l->segment, PHX__FAILED_BY_LAUNCHER);
  while (l->running > 0 && now - begin < GIVE_UP_NS) {
    if (!l->asked_to_end && now - begin >= grace) {
      l->asked_to_end = true;
      signal_all(l, SIGTERM);
    }
    if (!killed && now - begin >= grace + TERM_NS) {
      killed = true;
      signal_all(l, SIGKILL);
    }
    now = look(l, 10);
  }
  for (int32_t r = 0; r < l->started; r++)
    if (l->ranks[r].running)
      phx__complain("rank %d (pid %d) does not end even when killed: it is stuck inside the kernel", r,
              (int)l->ranks[r].pid);
}

static void watch(struct launch *l) {
  while (l->running > 0) {
    uint64_t now = look(l, TICK_MS);
    phx_error lost = PHX_ERROR_INIT;
    judge_ends(l);
    if (phx__run_lock_seen(&lost)) set_cause(l, -1, "%s", lost.message);
    if (!l->cause[0] && l->running > 0) {
      judge_time(l, now);
      judge_progress(l, now);
    }
    if (l->interrupt && !l->cause[0]) {
      char name[32];
      set_cause(l, -1, "stopped by %s", phx__signal_name(l->interrupt, name, sizeof name));
    }
    if (l->cause[0]) {
      take_pictures(l, now);
      end_all(l);
      return;
    }
  }
}

/* ---- the result ---- */

/* What failed, better than when it was first seen: a process that ended by itself says how. */
static void final_cause(struct launch *l, char *cause, size_t bytes) {
  char end[64];
  const int32_t r = l->cause_rank;
  snprintf(cause, bytes, "%s", l->cause);
  if (r < 0 || l->ranks[r].running || l->ranks[r].was_asked) return;
  l->ends[r] = l->ranks[r].end;
  l->ends[r].pid = (int32_t)l->ranks[r].pid;
  phx__rank_end_text(&l->ends[r], end, sizeof end);
  const int used = snprintf(cause, bytes, "rank %d (pid %d) %s%s", r, (int)l->ranks[r].pid, end,
                            left_early(l, r) ? " before it was done" : "");
  l->no_memory = l->ends[r].condition == PHX__RANK_KILLED && l->ends[r].number == SIGKILL && l->oom_kills >= 0 &&
                 phx__oom_kills("") > l->oom_kills;
  if (!l->no_memory || used <= 0 || (size_t)used >= bytes) return;
  const char *plan = l->asked->memory;
  snprintf(cause + used, bytes - (size_t)used, ", out of memory by the kernel's count%s%s%s",
           plan ? " (before the start: " : "", plan ? plan : "", plan ? ")" : "");
}

static void fill_outcome(const struct launch *l, const char *cause) {
  phx__outcome *out = l->asked->outcome;
  char where[160];
  const int32_t r = l->cause_rank;
  if (!out) return;
  *out = (phx__outcome){.failed = true, .no_memory = l->no_memory};
  for (int32_t i = 0; i < l->started; i++) {
    const struct rank *rank = &l->ranks[i];
    out->lost += rank->lost || (!rank->running && !rank->was_asked && rank->end.condition == PHX__RANK_KILLED);
  }
  if (r < 0) {
    snprintf(out->cause, sizeof out->cause, "%s", cause);
    return;
  }
  const phx_liveness *page = &l->pages[r];
  const bool inside = phx__where_text(page, where, sizeof where);
  snprintf(out->cause, sizeof out->cause, "%s, in step %lld%s%s%s%.200s", cause, (long long)page->step,
           inside ? ", in " : "", where, page->message[0] ? ": " : "", page->message);
}

static void report(struct launch *l) {
  char cause[sizeof l->cause + 400];
  int32_t r = l->cause_rank;
  final_cause(l, cause, sizeof cause);
  /* A rank that computed when the job failed has since come to the collective where it missed the others; what the
   * ranks said counts from the end anyway. */
  for (int32_t i = 0; i < l->asked->ranks; i++) {
    const phx_liveness *page = &l->segment->pages[i].alive;
    if (!phx__flight_is_in(&l->pages[i])) memcpy(&l->pages[i], page, sizeof *page);
    memcpy(l->pages[i].message, page->message, sizeof page->message);
    phx__clean(l->pages[i].message, sizeof page->message); /* a plugin's words, perhaps */
  }
  phx__flight_report flight = {.size = l->asked->ranks,
                               .ends = l->ends,
                               .pages = l->pages,
                               .now_ns = l->failed_ns,
                               .cause = cause,
                               .first_failed = r,
                               .run_dir = l->asked->run_dir};
  fill_outcome(l, cause);
  char *text = phx__flight_text(&flight);
  fputs(text ? text : "phalanx: the job failed, and there is no memory for the report\n", stderr);
  fflush(stderr);
  phx__free(text);
}

static int finish(struct launch *l) {
  char name[32];
  if (!l->cause[0]) return is_stopped_end(l, 0) ? PHX__EXIT_STOPPED : PHX__EXIT_OK;
  const struct rank *cause = l->cause_rank >= 0 ? &l->ranks[l->cause_rank] : NULL;
  /* Ctrl-C reaches the ranks too, and may be seen there first.  One that comes after a failure hides no report. */
  if (l->interrupt && l->interrupt_ns < l->failed_ns + 50 * MS) {
    phx__complain("stopped by %s; all ranks have ended",
            phx__signal_name(l->interrupt, name, sizeof name));
    return PHX__EXIT_RANK;
  }
  if (cause && !cause->running && cause->end.condition == PHX__RANK_EXITED &&
      (cause->end.number == PHX__EXIT_REFUSED || cause->end.number == PHX__EXIT_DAMAGED)) {
    if (l->ranks[0].running || l->ranks[0].end.number != cause->end.number) /* else rank 0 has said it on stderr */
      phx__complain("rank %d exited with status %d; its reason is in %s/rank-%d.log", l->cause_rank,
              cause->end.number, l->asked->run_dir, l->cause_rank);
    return cause->end.number;
  }
  report(l);
  return PHX__EXIT_RANK;
}

static phx_status check(const phx__launch *asked, phx_error *err) {
  if (asked->ranks < 1 || asked->ranks > PHX_RANKS_MAX)
    return phx_fail(err, PHX_INVALID, "ranks = %d; expected 1 to %d", asked->ranks, PHX_RANKS_MAX);
  if (!asked->argv || !asked->argv[0]) return phx_fail(err, PHX_INVALID, "no command to start the ranks with");
  if (asked->ranks > 1 && !asked->run_dir)
    return phx_fail(err, PHX_INVALID, "no run directory for the logs of %d ranks", asked->ranks - 1);
  if (asked->threads < 0 || !(asked->timeout_s >= 0) || asked->timeout_s > 1e9)
    return phx_fail(err, PHX_INVALID, "threads = %d, timeout = %g; expected neither negative", asked->threads,
                    asked->timeout_s);
  return PHX_OK;
}

/* Blocks the signals that end us and reads them from a file; what somebody chose to ignore (nohup) stays ignored. */
static phx_status take_signals(struct launch *l, sigset_t *before, phx_error *err) {
  static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
  struct sigaction action;
  sigset_t taken;
  sigemptyset(&taken);
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers - !l->asked->saves; i++) /* SIGUSR1 is last */
    if (sigaction(numbers[i], NULL, &action) == 0 && action.sa_handler != SIG_IGN) sigaddset(&taken, numbers[i]);
  if (sigprocmask(SIG_BLOCK, &taken, before) != 0)
    return phx_fail_errno(err, PHX_INTERNAL, errno, "cannot block signals");
  l->signals = signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
  if (l->signals >= 0) return PHX_OK;
  phx_status status = phx_fail_errno(err, PHX_NOMEM, errno, "cannot watch for signals (signalfd)");
  sigprocmask(SIG_SETMASK, before, NULL);
  return status;
}

static phx_status prepare(struct launch *l, phx_error *err) {
  size_t n = (size_t)l->asked->ranks;
  l->pages = phx__calloc(n, sizeof *l->pages);
  l->ends = phx__calloc(n, sizeof *l->ends);
  if (!l->pages || !l->ends) return phx_fail(err, PHX_NOMEM, "no memory for the launcher's records");
  l->memfd = phx__job_create_segment(l->asked->ranks, err);
  if (l->memfd < 0) return PHX_NOMEM;
  phx_status status = phx__segment_map(l->memfd, l->asked->ranks, &l->segment, err);
  if (status == PHX_OK) l->segment->launcher_pid = (int32_t)getpid();
  return status;
}

int phx__launch_run(const phx__launch *asked) {
  phx_error err = PHX_ERROR_INIT;
  struct launch l = {.asked = asked, .memfd = -1, .signals = -1, .cause_rank = -1};
  struct sigaction child = {.sa_handler = SIG_DFL}, child_before;
  phx__cpus cpus;
  phx__spawn spawn = {.argv = asked->argv, .run_dir = asked->run_dir, .ranks = asked->ranks,
                      .threads = asked->threads};
  sigset_t before, heeded;
  int result = PHX__EXIT_RANK;
  if (asked->outcome) *asked->outcome = (phx__outcome){0};
  phx_status status = check(asked, &err);
  if (status == PHX_OK) status = prepare(&l, &err);
  sigemptyset(&before);
  if (status == PHX_OK) status = take_signals(&l, &before, &err);
  if (status != PHX_OK) {
    phx__complain("%s", err.message);
    result = status == PHX_INVALID ? PHX__EXIT_REFUSED : PHX__EXIT_RANK;
    goto done;
  }
  sigaction(SIGCHLD, &child, &child_before); /* ignored, it would let dead ranks vanish unseen */
  phx__cpus_read(&cpus);
  spawn.mask = before;
  if (asked->saves) { /* a rank hears them when it has its handler */
    phx__stop_signals(&heeded);
    sigorset(&spawn.mask, &spawn.mask, &heeded);
  }
  spawn.segment = l.segment;
  spawn.memfd = l.memfd;
  spawn.cpus = asked->threads > 0 && asked->threads <= cpus.count / asked->ranks ? &cpus : NULL;
  l.segment->pinned = spawn.cpus != NULL;
  l.started_ns = l.last_ns = phx__now_ns();
  l.oom_kills = phx__oom_kills("");
  status = start(&l, &spawn, &err);
  if (status == PHX_OK) {
    watch(&l);
    result = finish(&l);
  } else {
    set_cause(&l, -1, "%s", err.message);
    end_all(&l);
    phx__complain("%s", err.message);
    result = status == PHX_IO ? PHX__EXIT_REFUSED : PHX__EXIT_RANK;
  }
  sigaction(SIGCHLD, &child_before, NULL);
  sigprocmask(SIG_SETMASK, &before, NULL);
done:
  if (l.signals >= 0) phx__sys.close(l.signals);
  phx__segment_unmap(l.segment);
  if (l.memfd >= 0) phx__sys.close(l.memfd);
  phx__free(l.ends);
  phx__free(l.pages);
  return result;
}
