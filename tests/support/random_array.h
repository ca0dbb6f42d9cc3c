/* tests/support/random_array.h - random numbers, the same on every machine, and arrays to compute with. */
#ifndef PHX__RANDOM_ARRAY_H
#define PHX__RANDOM_ARRAY_H
#include <stdint.h>

/* (-1, 1), the same sequence for the same state on every machine */
static inline float random_float(uint64_t *state) {
  *state = *state * 6364136223846793005ull + 1442695040888963407ull;
  return (float)((double)(*state >> 40) / 8388608.0 - 1.0);
}
/* n floats from malloc, random times `by` */
float *random_array(int64_t n, float by, uint64_t *state);
/* n floats, each NaN: what is not written shows */
float *poisoned_array(int64_t n);
#endif
