/* core/plugin/suspect.c - see suspect.h.
 *
 * While a suspect's code runs, a thread counts ticks, so that time in which this process is stopped or debugged counts
 * as one.  The handlers stand only while a suspect's code runs, and where nobody else has one: a rank's own
 * (job_crash.c) and a sanitizer's stay.  They use only what is safe in a handler.  Invariant: suspect is NULL outside
 * begin and end. */
#include "plugin/suspect.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/crash_text.h"
#include "base/futex.h"
#include "base/status.h"
#include "base/sys.h"

static const char *volatile suspect; /* the file */
static const char *volatile doing;
static bool off, taken[PHX__CRASHES];

enum { TICKS = 20 /* of one patience */, READING = 10 /* patiences, where files are read all the time */ };
int phx__suspect_patience_ms = 20000;
static struct {
  pthread_t thread;
  pid_t pid; /* whose plugin it is */
  bool runs;
  uint32_t end;    /* a futex: nonzero when the call has come back */
  int patience_ms; /* of this call */
} guard;

/* how: NULL where there is no more to say. */
static void say(const char *verb, const char *how) {
  char message[4600];
  const char *const parts[] = {"phalanx: ", suspect, verb, doing, how ? ": " : "", how ? how : "", "\n"};
  size_t used = 0;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
    used = phx__crash_append(message, used, sizeof message, parts[i]);
  if (write(STDERR_FILENO, message, used) < 0) used = 0; /* nothing can be done about it */
}

static void on_crash(int number) {
  if (!suspect) raise(number); /* SA_RESETHAND: the default action now */
  say(" crashed ", phx__crash_text(number));
  phx__exit_now(PHX__EXIT_REFUSED);
}

void phx__suspect_exits(void) {
  if (!suspect || getpid() != guard.pid) return; /* a child that a plugin forked may end as it likes */
  say(" ended the process ", NULL);
  phx__exit_now(PHX__EXIT_REFUSED);
}

/* ---- a call that does not come back ---- */

/* By the whole process: a plugin's libraries may come slowly from a file system. */
static int64_t reads_now(void) {
  struct rusage r;
  return getrusage(RUSAGE_SELF, &r) ? 0 : (int64_t)r.ru_majflt + r.ru_inblock;
}

static _Noreturn void end_hanging(void) {
  char how[80];
  snprintf(how, sizeof how, "it has not come back for %g s", 1e-3 * guard.patience_ms);
  say(" hangs ", how);
  phx__exit_now(PHX__EXIT_REFUSED); /* not exit: [main] may hold the locks of the dynamic loader */
}

static void *watch(void *arg) {
  int64_t reads = reads_now();
  (void)arg;
  for (int ticks = 0, quiet = 0; ticks < READING * TICKS && quiet < TICKS; ticks++) {
    phx__futex_wait(&guard.end, 0, UINT64_C(1000000) * (uint64_t)guard.patience_ms / TICKS);
    if (__atomic_load_n(&guard.end, __ATOMIC_ACQUIRE)) return NULL;
    const int64_t now = reads_now();
    quiet = now == reads ? quiet + 1 : 0;
    reads = now;
  }
  end_hanging();
}

static void start_watching(int patience) {
  sigset_t all, before;
  guard.end = 0;
  guard.patience_ms = patience * phx__suspect_patience_ms;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are [main]'s */
  guard.runs = pthread_create(&guard.thread, NULL, watch, NULL) == 0; /* without it, a hang is the user's to see */
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_watching(void) {
  if (!guard.runs) return;
  __atomic_store_n(&guard.end, 1, __ATOMIC_RELEASE);
  phx__futex_wake(&guard.end);
  pthread_join(guard.thread, NULL);
  guard.runs = false;
}

void phx__suspect_begin(const char *path, const char *what, int patience) {
  static bool registered;
  if (off) return;
  if (!registered) registered = atexit(phx__suspect_exits) == 0;
  guard.pid = getpid();
  doing = what;
  suspect = path;
  for (int i = 0; i < PHX__CRASHES; i++) {
    struct sigaction old, action = {.sa_handler = on_crash, .sa_flags = (int)SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    taken[i] = !PHX__SANITIZED && sigaction(phx__crash_signals[i], NULL, &old) == 0 && old.sa_handler == SIG_DFL &&
               sigaction(phx__crash_signals[i], &action, NULL) == 0;
  }
  start_watching(patience);
}

phx_status phx__suspect_end(phx_status status, phx_error *err) {
  stop_watching();
  for (int i = 0; i < PHX__CRASHES; i++)
    if (taken[i]) signal(phx__crash_signals[i], SIG_DFL);
  memset(taken, 0, sizeof taken);
  if (status && err && suspect) {
    err->message[sizeof err->message - 1] = 0;
    if (!err->message[0])
      phx_fail(err, status, "%s failed %s with %s (status %d) and gave no reason", suspect, doing,
               phx__status_name(status), status);
  }
  suspect = NULL;
  return status;
}

void phx__suspect_off(void) { off = true; }
