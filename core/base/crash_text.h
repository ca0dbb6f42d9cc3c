/* core/base/crash_text.h - what a crash is said to be.  [any]; safe in a handler of signals. */
#ifndef PHX__CRASH_TEXT_H
#define PHX__CRASH_TEXT_H
#include <stddef.h>

enum { PHX__CRASHES = 5 };
extern const int phx__crash_signals[PHX__CRASHES]; /* SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT */
const char *phx__crash_text(int number);           /* "SIGSEGV, a bad memory access" */
/* Adds a text to message[0, used), as much as there is room for, with an end; returns what is used then. */
size_t phx__crash_append(char *message, size_t used, size_t room, const char *text);
#endif
