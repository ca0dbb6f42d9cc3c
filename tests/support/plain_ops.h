/* tests/support/plain_ops.h - a device in plain C: "phx.ops/1" and what a model needs of "phx.device/1", written from
 * the contract alone, sums in double, one thread, no vector code.  It lets a model be tested without a device plugin,
 * and a device plugin be compared with something simple. */
#ifndef PHX__PLAIN_OPS_H
#define PHX__PLAIN_OPS_H
#include <phalanx/provider.h>

extern const phx_ops plain_ops;       /* every operation of the table */
extern const phx_device plain_device; /* copy, zero, synchronize; everything runs inline.  Other calls are NULL */
/* For a fake host: PHX_EXT_OPS and PHX_EXT_DEVICE. */
const void *plain_extension(const char *id);
#endif
