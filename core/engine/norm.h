/* core/engine/norm.h - an exact, order-independent sum of doubles.  [main]
 *
 * The sum is a fixed-point number wide enough for every double, in 64-bit limbs that carry 32 bits each, so that ranks
 * combine by an integer all_reduce and any order of additions gives the same bits.  At most 2^31 additions. */
#ifndef PHX__NORM_H
#define PHX__NORM_H
#include <stdint.h>

#define PHX__SUM_LIMBS 69 /* 2098 bits for values, 53 + 31 bits for the last mantissa */
typedef struct phx__exact_sum {
  int64_t limbs[PHX__SUM_LIMBS];
  int64_t not_finite; /* additions that were NaN or infinite: flagged, not summed */
} phx__exact_sum;
#define PHX__SUM_WORDS (PHX__SUM_LIMBS + 1) /* int64 words to all_reduce: sums of sums, word by word */

void phx__exact_sum_add(phx__exact_sum *sum, double x);
double phx__exact_sum_value(const phx__exact_sum *sum); /* NaN when something was not finite */
#endif
