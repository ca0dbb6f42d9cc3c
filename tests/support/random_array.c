/* random_array.c - see random_array.h. */
#include "random_array.h"
#include <math.h>
#include <stdlib.h>

float *random_array(int64_t n, float by, uint64_t *state) {
  float *p = malloc((size_t)n * sizeof *p);
  if (!p) abort();
  for (int64_t i = 0; i < n; i++) p[i] = by * random_float(state);
  return p;
}

float *poisoned_array(int64_t n) {
  float *p = malloc((size_t)n * sizeof *p);
  if (!p) abort();
  for (int64_t i = 0; i < n; i++) p[i] = NAN;
  return p;
}
