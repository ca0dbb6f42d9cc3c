/* core/base/rng.c - Philox4x32-10 and normals by Box-Muller, so that a shard can make its own part of any tensor.
 *
 * Invariant: number i depends on (seed, stream, i) only.  One Philox call gives four normals.  No state, any thread. */
#include "base/rng.h"

#include <math.h>
#include <string.h>
#include <xxhash.h>

void phx__philox(uint32_t out[4], uint64_t key, uint64_t stream, uint64_t counter) {
  uint32_t c[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t n[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
    memcpy(c, n, sizeof c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  memcpy(out, c, sizeof c);
}

static void four_normals(double out[4], uint64_t seed, uint64_t stream, uint64_t counter) {
  uint32_t u[4];
  phx__philox(u, seed, stream, counter);
  for (int i = 0; i < 4; i += 2) {
    double radius = sqrt(-2.0 * log((u[i] + 0.5) * 0x1p-32));
    double angle = 6.283185307179586476925 * (u[i + 1] * 0x1p-32);
    out[i] = radius * cos(angle);
    out[i + 1] = radius * sin(angle);
  }
}

void phx__rng_normal(float *out, int64_t first, int64_t numel, uint64_t seed, uint64_t stream, double std) {
  double four[4];
  int64_t have = -1;
  for (int64_t i = 0; i < numel; i++) {
    int64_t element = first + i;
    if (element / 4 != have) {
      have = element / 4;
      four_normals(four, seed, stream, (uint64_t)have);
    }
    out[i] = (float)(four[element % 4] * std);
  }
}

double phx__rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t u[4];
  phx__philox(u, seed, stream, index);
  return (double)(((uint64_t)u[0] << 32 | u[1]) >> 11) * 0x1p-53;
}

uint64_t phx__rng_stream(const char *name) { return XXH64(name, strlen(name), 0); }
