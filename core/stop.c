/* core/stop.c - see stop.h.  The handler stores one word; alone it also says, by write, that it heard a Ctrl-C.
 *
 * It runs on a stack of its own: code that libraries generate for products keeps the stack pointer in a buffer of the
 * heap, and a signal's frame would be written in front of it. */
#include "stop.h"

#include <stddef.h>
#include <unistd.h>

static volatile sig_atomic_t asked;
static const int heeded[] = {SIGTERM, SIGUSR1, SIGINT, SIGHUP};
static char stack[64 << 10];
enum { HEEDED = sizeof heeded / sizeof *heeded };

static void leave_note(int number) {
  if (number == SIGHUP) signal(SIGPIPE, SIG_IGN); /* who read what is said may be gone, and the save is not done */
  if (!asked) asked = number;
}

static void leave_note_and_say(int number) {
  leave_note(number);
  if (write(STDERR_FILENO, PHX__STOP_HEARD, sizeof PHX__STOP_HEARD - 1) < 0) return;
}

void phx__stop_signals(sigset_t *out) {
  sigemptyset(out);
  for (int i = 0; i < HEEDED; i++) sigaddset(out, heeded[i]);
}

/* nohup, or a shell that starts a job in the background */
static bool ignored(int number) {
  struct sigaction now;
  return (number == SIGINT || number == SIGHUP) && !sigaction(number, NULL, &now) && now.sa_handler == SIG_IGN;
}

void phx__stop_install(bool launched) {
  sigset_t all;
  stack_t now, own = {.ss_sp = stack, .ss_size = sizeof stack};
  if (!sigaltstack(NULL, &now) && (now.ss_flags & SS_DISABLE)) sigaltstack(&own, NULL);
  for (int i = 0; i < HEEDED; i++) {
    struct sigaction action = {.sa_handler = leave_note, .sa_flags = SA_RESTART | SA_ONSTACK};
    if (!launched && heeded[i] == SIGINT) {
      action.sa_handler = leave_note_and_say;
      action.sa_flags |= (int)SA_RESETHAND;
    }
    sigemptyset(&action.sa_mask);
    if (!ignored(heeded[i])) sigaction(heeded[i], &action, NULL);
  }
  phx__stop_signals(&all);
  pthread_sigmask(SIG_UNBLOCK, &all, NULL);
}

int phx__stop_asked(void) { return asked; }

const char *phx__stop_name(int number) {
  return number == SIGUSR1 ? "SIGUSR1" : number == SIGINT ? "SIGINT" : number == SIGHUP ? "SIGHUP" : "SIGTERM";
}
