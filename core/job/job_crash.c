/* core/job/job_crash.c - a rank that crashes says where: signal and backtrace on stderr, a message in its liveness
 * page.
 *
 * Off under sanitizers, which report better.  The handler runs on a stack of its own (a stack overflow is a SIGSEGV),
 * uses only what is safe in a handler, and lets the signal take its course, so that the launcher sees the real one.
 * Threads: installed from [main]; the handler runs in whichever thread crashed. */
#include <execinfo.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/crash_text.h"
#include "base/sys.h"
#include "job/job_segment.h"
#include "plugin/comm_watch.h"
#include "plugin/where.h"

static const phx_job *crash_job;

static void on_crash(int number) {
  void *frames[64];
  char message[400], where[160];
  const bool in_plugin = phx__where_text(crash_job->mine, where, sizeof where);
  const bool in_main = (pid_t)syscall(SYS_gettid) == getpid();
  size_t used = phx__crash_append(message, 0, sizeof message, "crashed: ");
  used = phx__crash_append(message, used, sizeof message, phx__crash_text(number));
  const char *call = phx__comm_watch_inside();
  if (call) {
    used = phx__crash_append(message, used, sizeof message, ", in the communicator's ");
    used = phx__crash_append(message, used, sizeof message, call);
  } else if (!in_main) {
    used = phx__crash_append(message, used, sizeof message, ", on the thread of a stream");
  }
  if (in_plugin) {
    used = phx__crash_append(message, used, sizeof message, in_main ? ", in " : ", while [main] was in ");
    used = phx__crash_append(message, used, sizeof message, where);
  }
  used = phx__crash_append(message, used, sizeof message, "; the backtrace is on stderr or in the rank's log");
  /* Handlers may not print through stdio; a failed write changes nothing here. */
  if (write(STDERR_FILENO, "phalanx: this rank ", 19) < 0 || write(STDERR_FILENO, message, used) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0)
    used = 0;
  backtrace_symbols_fd(frames, backtrace(frames, 64), STDERR_FILENO);
  crash_job->fail(crash_job->ctx, message);
  raise(number); /* SA_RESETHAND: the default action now */
}

void phx__crash_install(const phx_job *job) {
  static char stack[64 * 1024];
  void *frame[1];
  if (PHX__SANITIZED || crash_job) return;
  crash_job = job;
  if (backtrace(frame, 1) < 0) return; /* the first call loads libgcc, which allocates: not in the handler */
  stack_t own = {.ss_sp = stack, .ss_size = sizeof stack};
  if (sigaltstack(&own, NULL) != 0) return;
  for (int i = 0; i < PHX__CRASHES; i++) {
    const int number = phx__crash_signals[i];
    struct sigaction old, action = {.sa_handler = on_crash, .sa_flags = (int)(SA_ONSTACK | SA_RESETHAND)};
    sigemptyset(&action.sa_mask);
    /* Somebody who has a handler already keeps it. */
    if (sigaction(number, NULL, &old) == 0 && old.sa_handler == SIG_DFL) sigaction(number, &action, NULL);
  }
}
