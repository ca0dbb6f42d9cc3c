/* core/base/rng.h - counter-based random numbers: a pure function of (seed, stream, index).  [any] */
#ifndef PHX__RNG_H
#define PHX__RNG_H
#include <stdint.h>

/* One step of splitmix64 from x (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
 * 2014). */
static inline uint64_t phx__splitmix64(uint64_t x) {
  x += UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
  return x ^ (x >> 31);
}

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). */
void phx__philox(uint32_t out[4], uint64_t key, uint64_t stream, uint64_t counter);
/* out[i] = standard normal number `first + i` of (seed, stream), times std; any slicing gives the same numbers. */
void phx__rng_normal(float *out, int64_t first, int64_t numel, uint64_t seed, uint64_t stream, double std);
/* Uniform in [0, 1) with 53 bits. */
double phx__rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);
/* A stream number for a name. */
uint64_t phx__rng_stream(const char *name);
#endif
