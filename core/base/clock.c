/* core/base/clock.c - see clock.h. */
#include "base/clock.h"

#include <time.h>

uint64_t phx__now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

double phx__now(void) { return 1e-9 * (double)phx__now_ns(); }
