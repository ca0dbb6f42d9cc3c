/* core/stop.c - see stop.h.  The handler stores one word and makes no call. */
#include "stop.h"

#include <stddef.h>

static volatile sig_atomic_t asked;

static void leave_note(int number) {
  if (!asked) asked = number;
}

void phx__stop_signals(sigset_t *out) {
  sigemptyset(out);
  sigaddset(out, SIGTERM);
  sigaddset(out, SIGUSR1);
}

void phx__stop_install(void) {
  struct sigaction action = {.sa_handler = leave_note, .sa_flags = SA_RESTART};
  sigset_t both;
  sigemptyset(&action.sa_mask);
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGUSR1, &action, NULL);
  phx__stop_signals(&both);
  pthread_sigmask(SIG_UNBLOCK, &both, NULL);
}

int phx__stop_asked(void) { return asked; }

const char *phx__stop_name(int number) { return number == SIGUSR1 ? "SIGUSR1" : "SIGTERM"; }
