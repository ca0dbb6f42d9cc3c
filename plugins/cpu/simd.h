/* plugins/cpu/simd.h - vectors for kernel files: as wide as the instruction set, unaligned loads, exp and GELU.
 *
 * Arrays are fp32 or bf16 in memory (the functions with a dtype, which is a constant where they are called) and fp32 in
 * registers; a store rounds to nearest even, with integers, so that every instruction set gives the same bits.
 * Sums use 16 lanes whatever the width (PHX__PARTS vectors), so that every instruction set adds in the same order.
 * Elementwise functions give an element the same bits in a vector and in a padded tail. */
#ifndef PHX__CPU_SIMD_H
#define PHX__CPU_SIMD_H
#include <phalanx/base.h>
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
typedef uint32_t phx__vu __attribute__((vector_size(4 * PHX__LANES)));
typedef uint16_t phx__vh __attribute__((vector_size(2 * PHX__LANES)));
typedef uint16_t phx__vh_any __attribute__((vector_size(2 * PHX__LANES), aligned(2), may_alias));
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

/* ---- one element, of dtype F32 or BF16 ---- */
#define PHX__INLINE static inline __attribute__((always_inline))
PHX__INLINE uint32_t phx__bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
PHX__INLINE float phx__float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}
PHX__INLINE uint16_t phx__to_bf16(float x) {
  const uint32_t u = phx__bits_of(x);
  const uint32_t even = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : even); /* NaN stays NaN, quiet */
}
PHX__INLINE float phx__from_bf16(uint16_t h) {
  return phx__float_of((uint32_t)h << 16);
}
PHX__INLINE float phx__get(int32_t dtype, const void *p, int64_t i) {
  return dtype == PHX_BF16 ? phx__from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}
PHX__INLINE void phx__set(int32_t dtype, void *p, int64_t i, float x) {
  if (dtype == PHX_BF16)
    ((uint16_t *)p)[i] = phx__to_bf16(x);
  else
    ((float *)p)[i] = x;
}
/* Where element i is. */
PHX__INLINE const void *phx__at(int32_t dtype, const void *p, int64_t i) {
  return (const char *)p + i * (dtype == PHX_BF16 ? 2 : 4);
}
PHX__INLINE void *phx__out_at(int32_t dtype, void *p, int64_t i) {
  return (char *)p + i * (dtype == PHX_BF16 ? 2 : 4);
}

/* ---- one vector of elements i, i + 1, ... ---- */
PHX__INLINE phx__vf phx__widen(phx__vh h) {
  return (phx__vf)(__builtin_convertvector(h, phx__vu) << 16);
}
PHX__INLINE phx__vh phx__narrow(phx__vf v) {
  const phx__vu u = (phx__vu)v, nan = (phx__vu)((u & 0x7fffffffu) > 0x7f800000u);
  const phx__vu even = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return __builtin_convertvector((nan & (u >> 16 | 0x40u)) | (~nan & even), phx__vh);
}
PHX__INLINE phx__vf phx__load_as(int32_t dtype, const void *p, int64_t i) {
  if (dtype == PHX_BF16) return phx__widen(*(const phx__vh_any *)((const uint16_t *)p + i));
  return phx__load((const float *)p + i);
}
PHX__INLINE void phx__store_as(int32_t dtype, void *p, int64_t i, phx__vf v) {
  if (dtype == PHX_BF16)
    *(phx__vh_any *)((uint16_t *)p + i) = phx__narrow(v);
  else
    phx__store((float *)p + i, v);
}
/* The first n lanes, the others 0. */
PHX__INLINE phx__vf phx__load_part_as(int32_t dtype, const void *p, int64_t i, int64_t n) {
  float a[PHX__LANES] = {0};
  for (int64_t l = 0; l < n; l++) a[l] = phx__get(dtype, p, i + l);
  return phx__load(a);
}
PHX__INLINE void phx__store_part_as(int32_t dtype, void *p, int64_t i, phx__vf v, int64_t n) {
  float a[PHX__LANES];
  phx__store(a, v);
  for (int64_t l = 0; l < n; l++) phx__set(dtype, p, i + l, a[l]);
}
/* One source, compiled for each dtype: f(PHX_BF16, ...) or f(PHX_F32, ...). */
#define PHX__BY_DTYPE(dtype, f, ...) ((dtype) == PHX_BF16 ? f(PHX_BF16, __VA_ARGS__) : f(PHX_F32, __VA_ARGS__))

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
