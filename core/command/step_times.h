/* core/command/step_times.h - the median of the steps' times, in memory that does not grow with their number.
 * [main] */
#ifndef PHX__STEP_TIMES_H
#define PHX__STEP_TIMES_H
#include <phalanx/base.h>

enum { PHX__STEP_TIMES = 1 << 16 }; /* kept at most: of that many steps the median is exact */

typedef struct phx__step_times {
  double *kept;    /* (room) */
  int64_t room, n;
  int64_t seen;    /* steps behind the first */
  int64_t stride;  /* every so many steps one is kept */
  double first;    /* of the first step, which warms up: only where there is no other */
} phx__step_times;

phx_status phx__step_times_open(phx__step_times *t, int64_t steps, phx_error *err);
void phx__step_times_add(phx__step_times *t, double seconds);
double phx__step_times_median(phx__step_times *t); /* sorts what is kept; 0: no step */
void phx__step_times_close(phx__step_times *t);
#endif
