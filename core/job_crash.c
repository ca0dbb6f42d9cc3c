/* core/job_crash.c - a rank that crashes says where: signal and backtrace on stderr, a message in its liveness page.
 *
 * Off under sanitizers, which report better.  The handler runs on a stack of its own (a stack overflow is a SIGSEGV),
 * uses only what is safe in a handler, and lets the signal take its course, so that the launcher sees the real one.
 * Threads: installed from [main]; the handler runs in whichever thread crashed. */
#include <execinfo.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "job_segment.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static const phx_job *crash_job;

static const char *describe(int number) {
  switch (number) {
    case SIGSEGV:
      return "crashed: SIGSEGV, a bad memory access; the backtrace is on stderr or in the rank's log\n";
    case SIGBUS:
      return "crashed: SIGBUS, a mapped file became shorter or memory ran out; the backtrace is on stderr "
             "or in the rank's log\n";
    case SIGFPE:
      return "crashed: SIGFPE, an integer division; the backtrace is on stderr or in the rank's log\n";
    case SIGILL:
      return "crashed: SIGILL, an instruction this CPU lacks; the backtrace is on stderr or in the rank's "
             "log\n";
    default:
      return "crashed: SIGABRT, an assertion; the backtrace is on stderr or in the rank's log\n";
  }
}

static void on_crash(int number) {
  void *frames[64];
  const char *text = describe(number);
  char message[200];
  size_t length = strlen(text);
  /* Handlers may not print through stdio; a failed write changes nothing here. */
  if (write(STDERR_FILENO, "phalanx: this rank ", 19) < 0 || write(STDERR_FILENO, text, length) < 0)
    length = length + 0;
  backtrace_symbols_fd(frames, backtrace(frames, 64), STDERR_FILENO);
  memcpy(message, text, length - 1);
  message[length - 1] = 0;
  crash_job->fail(crash_job->ctx, message);
  raise(number); /* SA_RESETHAND: the default action now */
}

void phx__crash_install(const phx_job *job) {
  static char stack[64 * 1024];
  static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
  void *frame[1];
  if (SANITIZED || crash_job) return;
  crash_job = job;
  if (backtrace(frame, 1) < 0) return; /* the first call loads libgcc, which allocates: not in the handler */
  stack_t own = {.ss_sp = stack, .ss_size = sizeof stack};
  if (sigaltstack(&own, NULL) != 0) return;
  for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
    struct sigaction old, action = {.sa_handler = on_crash, .sa_flags = (int)(SA_ONSTACK | SA_RESETHAND)};
    sigemptyset(&action.sa_mask);
    /* Somebody who has a handler already keeps it. */
    if (sigaction(signals[i], NULL, &old) == 0 && old.sa_handler == SIG_DFL) sigaction(signals[i], &action, NULL);
  }
}
