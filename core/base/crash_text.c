/* core/base/crash_text.c - see crash_text.h. */
#include "base/crash_text.h"

#include <signal.h>

const int phx__crash_signals[PHX__CRASHES] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};

const char *phx__crash_text(int number) {
  switch (number) {
    case SIGSEGV:
      return "SIGSEGV, a bad memory access";
    case SIGBUS:
      return "SIGBUS, a mapped file became shorter or memory ran out";
    case SIGFPE:
      return "SIGFPE, an integer division";
    case SIGILL:
      return "SIGILL, an instruction this CPU lacks";
    default:
      return "SIGABRT, an assertion";
  }
}

size_t phx__crash_append(char *message, size_t used, size_t room, const char *text) {
  while (*text && used + 1 < room) message[used++] = *text++;
  message[used] = 0;
  return used;
}
