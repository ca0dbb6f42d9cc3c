/* core/job/stop.c - see stop.h.  The handler stores one word; a rank that no launcher of ours watches also says, by
 * write, that it heard a Ctrl-C, and ends the process at a second one.
 *
 * It runs on a stack of its own: code that libraries generate for products keeps the stack pointer in a buffer of the
 * heap, and a signal's frame would be written in front of it. */
#include "job/stop.h"

#include <errno.h>
#include <stddef.h>
#include <unistd.h>

#include "base/clock.h"

static volatile sig_atomic_t asked;
static int answering; /* a thread has the first Ctrl-C */
static volatile uint64_t announced_ns, term_ns; /* when the first Ctrl-C was answered, the first SIGTERM came; or 0 */
static const int heeded[] = {SIGTERM, SIGUSR1, SIGINT, SIGHUP};
static char stack[64 << 10];
enum { HEEDED = sizeof heeded / sizeof *heeded };

static void leave_note(int number) {
  if (number == SIGHUP) signal(SIGPIPE, SIG_IGN); /* who read what is said may be gone, and the save is not done */
  if (!asked) asked = number;
}

bool phx__stop_twice(uint64_t announced, uint64_t now) { return announced && now - announced >= PHX__STOP_TWICE_NS; }
bool phx__stop_term_twice(uint64_t first, uint64_t now) { return first && now - first >= PHX__STOP_PATIENCE_NS; }

/* It ends the process when this handler returns. */
static void end_by(int number) {
  signal(number, SIG_DFL);
  raise(number);
}

/* The time is taken when the text is out, so that nobody's second press comes before they could read it. */
static void leave_note_and_say(int number) {
  const int saved = errno;
  leave_note(number);
  if (!__atomic_exchange_n(&answering, 1, __ATOMIC_ACQ_REL)) {
    if (write(STDERR_FILENO, PHX__STOP_HEARD, sizeof PHX__STOP_HEARD - 1) < 0) errno = saved; /* nobody reads it */
    announced_ns = phx__now_ns();
  } else if (phx__stop_twice(announced_ns, phx__now_ns())) {
    end_by(number);
  }
  errno = saved;
}

static void leave_note_once(int number) {
  leave_note(number);
  if (phx__stop_term_twice(term_ns, phx__now_ns())) end_by(number);
  if (!term_ns) term_ns = phx__now_ns();
}

static void (*handler_of(int number, phx__stop_watch watch))(int) {
  if (number == SIGINT && watch != PHX__STOP_LAUNCHED) return leave_note_and_say;
  if (number == SIGTERM && watch == PHX__STOP_ALONE) return leave_note_once;
  return leave_note;
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

void phx__stop_install(phx__stop_watch watch) {
  sigset_t all;
  stack_t now, own = {.ss_sp = stack, .ss_size = sizeof stack};
  if (!sigaltstack(NULL, &now) && (now.ss_flags & SS_DISABLE)) sigaltstack(&own, NULL);
  for (int i = 0; i < HEEDED; i++) {
    struct sigaction action = {.sa_handler = handler_of(heeded[i], watch), .sa_flags = SA_RESTART | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    if (!ignored(heeded[i])) sigaction(heeded[i], &action, NULL);
  }
  phx__stop_signals(&all);
  pthread_sigmask(SIG_UNBLOCK, &all, NULL);
}

int phx__stop_asked(void) { return asked; }

const char *phx__stop_name(int number) {
  switch (number) {
    case SIGUSR1:
      return "SIGUSR1";
    case SIGINT:
      return "SIGINT";
    case SIGHUP:
      return "SIGHUP";
    default:
      return "SIGTERM";
  }
}
