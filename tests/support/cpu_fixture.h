/* tests/support/cpu_fixture.h - the cpu device under test: opened from the built plugin, forked for an instruction set,
 * and random numbers. */
#ifndef PHX__CPU_FIXTURE_H
#define PHX__CPU_FIXTURE_H
#include <phalanx/provider.h>
#include <stdint.h>
#include <stdlib.h>
#include "fake_host.h"

typedef struct cpu_fixture {
  fake_host fake;
  const phx_device_table *table;
  phx_device_self *self;
  const phx_device *device;
  const phx_ops *ops;
  phx_error err;
} cpu_fixture;

/* isa: PHALANX_ISA for this process, or NULL.  The status of create. */
phx_status cpu_fixture_open(cpu_fixture *f, const char *isa, int32_t threads);
void cpu_fixture_close(cpu_fixture *f);

/* (-1, 1), the same sequence for the same state on every machine */
static inline float random_float(uint64_t *state) {
  *state = *state * 6364136223846793005ull + 1442695040888963407ull;
  return (float)((double)(*state >> 40) / 8388608.0 - 1.0);
}
/* n floats from malloc, random times `by` */
float *random_array(int64_t n, float by, uint64_t *state);
/* n floats, each NaN: what is not written shows */
float *poisoned_array(int64_t n);
#endif
