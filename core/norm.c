/* core/norm.c - see norm.h.  A long accumulator as in Kulisch's exact dot product.
 *
 * Invariant: the value is sum over i of limbs[i] * 2^(32 i - 1074); limbs never overflow 63 bits within 2^31 adds. */
#include "norm.h"

#include <math.h>
#include <string.h>

__extension__ typedef unsigned __int128 wide_bits;

void phx__exact_sum_add(phx__exact_sum *sum, double x) {
  if (!isfinite(x)) {
    sum->not_finite++;
    return;
  }
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint64_t mantissa = bits & 0xFFFFFFFFFFFFFull;
  unsigned exponent = (unsigned)(bits >> 52) & 0x7FFu;
  if (exponent) mantissa |= 1ull << 52;
  unsigned place = exponent ? exponent - 1 : 0; /* bit position of the mantissa's unit above 2^-1074 */
  wide_bits wide = (wide_bits)mantissa << (place % 32);
  int64_t *limb = sum->limbs + place / 32;
  limb[0] += (int64_t)(uint32_t)wide;
  limb[1] += (int64_t)(uint32_t)(wide >> 32);
  limb[2] += (int64_t)(uint32_t)(wide >> 64);
}

double phx__exact_sum_value(const phx__exact_sum *sum) {
  if (sum->not_finite) return NAN;
  uint64_t digits[PHX__SUM_LIMBS + 2] = {0}, carry = 0;
  for (int i = 0; i < PHX__SUM_LIMBS; i++) {
    uint64_t t = (uint64_t)sum->limbs[i] + carry;
    digits[i] = t & 0xFFFFFFFFu;
    carry = t >> 32;
  }
  digits[PHX__SUM_LIMBS] = carry & 0xFFFFFFFFu;
  digits[PHX__SUM_LIMBS + 1] = carry >> 32;
  int top = PHX__SUM_LIMBS + 1;
  while (top > 0 && !digits[top]) top--;
  /* 96 leading bits: the conversion to double rounds once, the rest cannot matter beyond a tie. */
  wide_bits lead = digits[top];
  for (int i = 1; i <= 2; i++) lead = lead << 32 | (top - i >= 0 ? digits[top - i] : 0);
  return ldexp((double)lead, 32 * (top - 2) - 1074);
}
