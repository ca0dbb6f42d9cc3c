/* tests/emulation/include/cuda_bf16.h - bf16 on the processor: the type and the conversions that kernels use. */
#ifndef PHX__EMULATED_CUDA_BF16_H
#define PHX__EMULATED_CUDA_BF16_H
#ifdef __cplusplus
#include <cuda_emulation.h>

struct __align__(2) __nv_bfloat16 { unsigned short bits; };
struct __align__(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return __nv_bfloat16{v}; }
static inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float((unsigned)v.bits << 16); }
/* Nearest even; every NaN becomes 0x7fff, as the device's instruction gives it. */
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const unsigned u = __float_as_uint(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return __nv_bfloat16{0x7fff};
  return __nv_bfloat16{(unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
static inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
#endif
#endif
