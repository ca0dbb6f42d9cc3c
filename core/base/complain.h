/* core/base/complain.h - what went wrong, on the screen: the one way that the core says it.  [any] */
#ifndef PHX__COMPLAIN_H
#define PHX__COMPLAIN_H

/* One line on stderr, `phalanx: ` before it; an unfinished bar is cleared, and control characters in it become '?'. */
void phx__complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
#endif
