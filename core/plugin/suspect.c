/* core/plugin/suspect.c - see suspect.h.
 *
 * The handlers stand only while a suspect's code runs, and where nobody else has one: a rank's own (job_crash.c) and a
 * sanitizer's stay.  They use only what is safe in a handler.  Invariant: suspect is NULL outside begin and end. */
#include "plugin/suspect.h"

#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
enum { SIGNALS = sizeof signals / sizeof *signals };

static const char *volatile suspect; /* the file */
static const char *volatile doing;
static bool off, taken[SIGNALS];

static size_t append(char *message, size_t used, size_t room, const char *text) {
  while (*text && used + 1 < room) message[used++] = *text++;
  return used;
}

static void say(const char *verb, const char *how) {
  char message[4600];
  const char *const parts[] = {"phalanx: ", suspect, verb, doing, how, "\n"};
  size_t used = 0;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) used = append(message, used, sizeof message, parts[i]);
  if (write(STDERR_FILENO, message, used) < 0) used = 0; /* nothing can be done about it */
}

static void on_crash(int number) {
  const char *how = ": SIGABRT, an assertion";
  if (number == SIGSEGV) how = ": SIGSEGV, a bad memory access";
  if (number == SIGBUS) how = ": SIGBUS, a mapped file became shorter or memory ran out";
  if (number == SIGFPE) how = ": SIGFPE, an integer division";
  if (number == SIGILL) how = ": SIGILL, an instruction this CPU lacks";
  if (!suspect) raise(number); /* SA_RESETHAND: the default action now */
  say(" crashed ", how);
  _exit(PHX__EXIT_REFUSED);
}

static void on_exit_call(void) {
  if (!suspect) return;
  say(" ended the process ", "");
  _exit(PHX__EXIT_REFUSED);
}

void phx__suspect_begin(const char *path, const char *what) {
  static bool registered;
  if (off) return;
  if (!registered) registered = atexit(on_exit_call) == 0;
  doing = what;
  suspect = path;
  for (int i = 0; i < SIGNALS; i++) {
    struct sigaction old, action = {.sa_handler = on_crash, .sa_flags = (int)SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    taken[i] = !PHX__SANITIZED && sigaction(signals[i], NULL, &old) == 0 && old.sa_handler == SIG_DFL &&
               sigaction(signals[i], &action, NULL) == 0;
  }
}

phx_status phx__suspect_end(phx_status status, phx_error *err) {
  for (int i = 0; i < SIGNALS; i++)
    if (taken[i]) signal(signals[i], SIG_DFL);
  memset(taken, 0, sizeof taken);
  if (status && err && suspect) {
    err->message[sizeof err->message - 1] = 0;
    if (!err->message[0])
      phx__fail(err, status, "%s failed %s with %s (status %d) and gave no reason", suspect, doing,
                phx__status_name(status), status);
  }
  suspect = NULL;
  return status;
}

void phx__suspect_off(void) { off = true; }
