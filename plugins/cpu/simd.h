/* plugins/cpu/simd.h - vectors for kernel files: as wide as the instruction set, unaligned loads, exp and GELU.
 *
 * Sums use 16 lanes whatever the width (PHX__PARTS vectors), so that every instruction set adds in the same order.
 * Elementwise functions give an element the same bits in a vector and in a padded tail. */
#ifndef PHX__CPU_SIMD_H
#define PHX__CPU_SIMD_H
#include <stdint.h>
#include <string.h>

/* Before a loop whose arrays may be the same, but never overlap otherwise. */
#if defined(__clang__)
#define PHX__IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define PHX__IVDEP _Pragma("GCC ivdep")
#endif

#if defined(__AVX512F__)
#define PHX__LANES 16
#elif defined(__AVX2__)
#define PHX__LANES 8
#else
#define PHX__LANES 4
#endif
#define PHX__PARTS (16 / PHX__LANES)

typedef float phx__vf __attribute__((vector_size(4 * PHX__LANES)));
typedef int32_t phx__vi __attribute__((vector_size(4 * PHX__LANES)));
typedef float phx__vf_any __attribute__((vector_size(4 * PHX__LANES), aligned(4), may_alias));
typedef struct phx__v16 {
  phx__vf part[PHX__PARTS];
} phx__v16;

static inline phx__vf phx__load(const float *p) {
  return *(const phx__vf_any *)p;
}
static inline void phx__store(float *p, phx__vf v) {
  *(phx__vf_any *)p = v;
}
static inline phx__vf phx__splat(float x) {
  return (phx__vf){0} + x;
}
static inline phx__vf phx__choose(phx__vi mask, phx__vf yes, phx__vf no) {
  return (phx__vf)((mask & (phx__vi)yes) | (~mask & (phx__vi)no));
}
static inline phx__vf phx__load_part(const float *p, int64_t n) {
  float a[PHX__LANES] = {0};
  memcpy(a, p, (size_t)n * sizeof *a);
  return phx__load(a);
}
static inline void phx__store_part(float *p, phx__vf v, int64_t n) {
  float a[PHX__LANES];
  phx__store(a, v);
  memcpy(p, a, (size_t)n * sizeof *a);
}

/* e^x with a relative error below 2 ulp for -87.3 <= x <= 88.3; beyond, the value at the border (finite, never 0).
 * NaN stays NaN.  Cephes' reduction and polynomial: x = n ln 2 + r, ln 2 in two parts so that n * high is exact. */
static inline phx__vf phx__vexp(phx__vf x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  x = phx__choose(x > 88.3f, phx__splat(88.3f), x);
  x = phx__choose(x < -87.3f, phx__splat(-87.3f), x);
  const phx__vf shifted = x * 1.44269504088896341f + magic;
  const phx__vf n = shifted - magic;
  const phx__vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  phx__vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const phx__vi power = ((phx__vi)shifted << 23) + 0x3f800000; /* 2^n; the magic number's other bits leave at the top */
  return p * (phx__vf)power;
}

/* GELU with tanh, written as x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): no cancellation for x < 0. */
#define PHX__GELU_1 1.5957691216057308f /* 2 sqrt(2 / pi) */
#define PHX__GELU_3 0.07135481627159f   /* 0.044715 * 2 sqrt(2 / pi) */
static inline phx__vf phx__vgelu(phx__vf x) {
  const phx__vf u2 = x * (x * x * PHX__GELU_3 + PHX__GELU_1);
  return x / (phx__vexp(-u2) + 1.0f);
}
static inline phx__vf phx__vgelu_slope(phx__vf x) {
  const phx__vf xx = x * x;
  const phx__vf u2 = x * (xx * PHX__GELU_3 + PHX__GELU_1);
  const phx__vf e = phx__vexp(-u2);
  const phx__vf s = 1.0f / (e + 1.0f);
  return s + x * s * (e * s) * (xx * (3.0f * PHX__GELU_3) + PHX__GELU_1); /* e s = 1 - s, without cancellation */
}

/* The 16 lanes of a and a tail already added to `lane`, in one order. */
static inline void phx__lanes(float lane[16], const phx__v16 *a) {
  for (int i = 0; i < PHX__PARTS; i++) phx__store(lane + i * PHX__LANES, a->part[i]);
}
static inline float phx__sum_lanes(float lane[16]) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}
#endif
