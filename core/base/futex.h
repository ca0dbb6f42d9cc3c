/* core/base/futex.h - sleeping on a word, which may be shared between processes.  [any], and in signal handlers. */
#ifndef PHX__FUTEX_H
#define PHX__FUTEX_H
#include <stdint.h>

/* Sleeps while *word holds `seen`, at most `ns`. */
void phx__futex_wait(const uint32_t *word, uint32_t seen, uint64_t ns);
void phx__futex_wake(const uint32_t *word); /* all of them */
#endif
