/* core/command/step_times.c - see step_times.h.
 *
 * When the memory is full every other time is given up, and from then on half as many are kept: what is left stands at
 * equal distances over the whole run. */
#include "command/step_times.h"

#include <stdlib.h>

#include "base/status.h"
#include "base/sys.h"

phx_status phx__step_times_open(phx__step_times *t, int64_t steps, phx_error *err) {
  *t = (phx__step_times){.room = steps < PHX__STEP_TIMES ? steps : PHX__STEP_TIMES, .seen = -1, .stride = 1};
  t->kept = phx__calloc((size_t)t->room, sizeof *t->kept);
  return t->kept ? PHX_OK : phx_fail(err, PHX_NOMEM, "no memory for the step times");
}

static void thin_out(phx__step_times *t) {
  for (int64_t i = 0; 2 * i < t->n; i++) t->kept[i] = t->kept[2 * i];
  t->n = (t->n + 1) / 2;
  t->stride *= 2;
}

void phx__step_times_add(phx__step_times *t, double seconds) {
  const int64_t index = t->seen++;
  if (index < 0) {
    t->first = seconds;
    return;
  }
  if (index % t->stride) return;
  if (t->n == t->room) thin_out(t);
  if (index % t->stride == 0) t->kept[t->n++] = seconds;
}

static int by_value(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double phx__step_times_median(phx__step_times *t) {
  if (t->n == 0) return t->first;
  qsort(t->kept, (size_t)t->n, sizeof *t->kept, by_value);
  return t->n % 2 ? t->kept[t->n / 2] : 0.5 * (t->kept[t->n / 2 - 1] + t->kept[t->n / 2]);
}

void phx__step_times_close(phx__step_times *t) {
  phx__free(t->kept);
  t->kept = NULL;
}
