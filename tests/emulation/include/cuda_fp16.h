/* tests/emulation/include/cuda_fp16.h - fp16 on the processor, as far as casts go. */
#ifndef PHX__EMULATED_CUDA_FP16_H
#define PHX__EMULATED_CUDA_FP16_H
#ifdef __cplusplus
#include <cuda_emulation.h>

struct __align__(2) __half { unsigned short bits; };
static inline unsigned short __half_as_ushort(__half v) { return v.bits; }
static inline __half __ushort_as_half(unsigned short v) { return __half{v}; }
static inline float __half2float(__half v) {
  const unsigned sign = (v.bits & 0x8000u) << 16, exponent = (v.bits >> 10) & 31u, fraction = v.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
  const float magnitude =
      exponent ? std::ldexp((float)(fraction | 0x400u), (int)exponent - 25) : std::ldexp((float)fraction, -24);
  return sign ? -magnitude : magnitude;
}
/* Nearest even; every NaN becomes 0x7fff, as the device's instruction gives it. */
static inline __half __float2half_rn(float f) {
  const unsigned u = __float_as_uint(f), sign = (u >> 16) & 0x8000u;
  if ((u & 0x7fffffffu) > 0x7f800000u) return __half{0x7fff};
  const double magnitude = std::fabs((double)f);
  if (magnitude >= 65520.0) return __half{(unsigned short)(sign | 0x7c00u)};
  int exponent = 0;
  (void)std::frexp(magnitude, &exponent);
  if (exponent < -13) exponent = -13; /* subnormal: the step stays at 2^-24 */
  const double steps = std::nearbyint(std::ldexp(magnitude, 11 - exponent)); /* of 2^(exponent - 11) */
  if (steps == 0) return __half{(unsigned short)sign};
  const unsigned value = (unsigned)steps; /* <= 2048, with carry into the exponent by addition */
  return __half{(unsigned short)(sign | (((unsigned)(exponent + 13) << 10) + value))};
}
#endif
#endif
