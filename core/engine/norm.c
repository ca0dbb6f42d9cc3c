/* core/engine/norm.c - see norm.h.  A long accumulator as in Kulisch's exact dot product.
 *
 * Invariant: the value is sum over i of limbs[i] * 2^(32 i - 1074), where limbs may be negative; they never overflow 63
 * bits within 2^31 adds. */
#include "engine/norm.h"

#include <math.h>
#include <stdbool.h>
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
  const int64_t sign = bits >> 63 ? -1 : 1;
  limb[0] += sign * (int64_t)(uint32_t)wide;
  limb[1] += sign * (int64_t)(uint32_t)(wide >> 32);
  limb[2] += sign * (int64_t)(uint32_t)(wide >> 64);
}

enum { DIGITS = PHX__SUM_LIMBS + 2 };

/* sign * the sum in digits of 32 bits; returns what is left over: below zero when that is negative. */
static int64_t carry_through(const phx__exact_sum *sum, int64_t sign, uint64_t digits[DIGITS]) {
  int64_t carry = 0;
  for (int i = 0; i < DIGITS; i++) {
    const int64_t t = carry + (i < PHX__SUM_LIMBS ? sign * sum->limbs[i] : 0);
    digits[i] = (uint64_t)t & 0xFFFFFFFFu;
    carry = t >> 32; /* rounded down, as gcc and clang shift */
  }
  return carry;
}

double phx__exact_sum_value(const phx__exact_sum *sum) {
  if (sum->not_finite) return NAN;
  uint64_t digits[DIGITS];
  const bool negative = carry_through(sum, 1, digits) < 0;
  if (negative) carry_through(sum, -1, digits);
  int top = DIGITS - 1;
  while (top > 0 && !digits[top]) top--;
  /* 96 leading bits: the conversion to double rounds once, the rest cannot matter beyond a tie. */
  wide_bits lead = digits[top];
  for (int i = 1; i <= 2; i++) lead = lead << 32 | (top - i >= 0 ? digits[top - i] : 0);
  const double size = ldexp((double)lead, 32 * (top - 2) - 1074);
  return negative ? -size : size;
}
