/* core/base/clock.h - time on CLOCK_MONOTONIC.  [any] */
#ifndef PHX__CLOCK_H
#define PHX__CLOCK_H
#include <stdint.h>

uint64_t phx__now_ns(void);
double phx__now(void); /* seconds */
#endif
