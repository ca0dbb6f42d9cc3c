/* tests/support/ops_suite.h - every operation of a device, in each dtype, against the same in double precision: one
 * table of cases for every device.
 *
 * Takes a created device plugin and nothing else: memory from its alloc, numbers in and out through pinned memory and
 * phx_device.copy.  The CPU never touches the device's memory.  Sizes fit no tile; inputs are fresh from the seed;
 * outputs are poisoned, with a guard behind each, so that what is not written, or written beside, shows.
 *
 * Bounds.  An element may differ from the reference by one rounding to its dtype (half a unit in the last place: at
 * most 2^-8 of it in bf16, 2^-24 in fp32) and by a floor relative to the array's largest element (or 1/4, if that is
 * larger): what sums in fp32, in any order, may lose, and in bf16 what is lost where an operation reads a tensor that
 * was rounded on its way (a norm its sum, attention's backward the output).  The floors stand with the cases. */
#ifndef PHX__OPS_SUITE_H
#define PHX__OPS_SUITE_H
#include <phalanx/provider.h>

typedef struct ops_suite {
  const phx_device_table *table;
  phx_device_self *self;
  uint64_t seed;
  double slack;  /* times every floor; 1 where products are exact in fp32 (TF32 needs more) */
  int32_t print; /* one line on stderr per case, with its worst error as a part of the bound */
} ops_suite;

/* Every case (PHX_TEST_CASE: those of this name) in one dtype, PHX_F32 or PHX_BF16.  Returns the number of outputs that
 * were wrong, each with a line on stderr: the case, what, where, how far, and the seed. */
int ops_suite_run(const ops_suite *suite, int32_t dtype);
/* A seed from PHX_TEST_SEED, else from the clock; printed on stderr. */
uint64_t ops_suite_seed(void);
#endif
