/* tests/support/device_ops.h - the cpu device's operations without the core: loads phx_device_cpu.so from
 * PHX_TEST_PLUGINS and creates it under a fake host. */
#ifndef PHX__DEVICE_OPS_H
#define PHX__DEVICE_OPS_H
#include <phalanx/provider.h>
#include "fake_host.h"

typedef struct device_ops {
  fake_host fake;
  const phx_device_table *table;
  phx_device_self *self;
  const phx_device *device;
  const phx_ops *ops;
  phx_error err; /* for the test's calls, device_ops_open among them */
} device_ops;

/* isa: "base", "avx2", "avx512", or NULL for what PHALANX_ISA or the machine says.  One instruction set per process:
 * oneDNN keeps its first.  PHX_UNSUPPORTED where the machine lacks it. */
phx_status device_ops_open(device_ops *d, int32_t threads, const char *isa, phx_error *err);
void device_ops_close(device_ops *d);
/* As open; 0: this machine lacks the instruction set.  Ends the test program with a message on any other failure. */
int device_ops_have(device_ops *d, int32_t threads, const char *isa);
/* How many of base, avx2 and avx512 this machine has.  Asked in a process of its own: a device settles oneDNN's limit
 * for its process, and for those that are forked from it. */
int device_ops_sets(void);
#endif
