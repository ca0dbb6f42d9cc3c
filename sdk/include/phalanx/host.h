/* phalanx/host.h - what the core offers to every plugin, from create() to destroy().
 *
 * The base table is small; everything else is an extension named by a string: the device ("phx.device/1"), the
 * communicator ("phx.comm/1"), the optimizer ("phx.optim/1"), the operations models are made of ("phx.ops/1"), the
 * job ("phx.job/1").  An unknown name gives NULL. */
#ifndef PHALANX_HOST_H
#define PHALANX_HOST_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

struct phx_comm;

typedef struct phx_memory {
  size_t struct_size;
  int64_t bytes;          /* > 0 */
  int32_t kind;           /* PHX_MEM_* */
  int32_t space;          /* PHX_SPACE_* */
  phx_stream *stream;     /* the stream that uses it first; NULL: the compute stream */
  struct phx_comm *comm;  /* peers of this communicator will reach it: it comes from the communicator's own memory
                             (a shared arena, registered buffers), collectives on it need no staging; NULL: private */
} phx_memory;

typedef struct phx_host {
  size_t struct_size;
  uint32_t abi_major, abi_minor;
  void *ctx; /* first argument of every call below */
  int32_t rank, world_size, local_rank, local_size;
  /* [any] one line; the host adds rank, plugin and time. [borrow:call] */
  void (*log)(void *ctx, int32_t level, const char *message);
  /* [main] 256-byte aligned, zero-filled, pre-faulted, accounted by kind as phx_align_bytes(bytes).  Memory with a comm
   * is [collective] in effect: every rank asks for the same sizes in the same order. */
  phx_status (*alloc)(void *ctx, const phx_memory *what, void **out, phx_error *err);
  void (*release)(void *ctx, void *p); /* [main] p may be NULL */
  const void *(*extension)(void *ctx, const char *id); /* [any] or NULL; [borrow:self] */
  /* [main] a number for this step's line of metrics.jsonl, under the plugin's id.  Rank 0's are kept, from when the
   * state is ready (before the first step) on, in a run that trains; elsewhere nothing happens.  [borrow:call] */
  void (*metric)(void *ctx, const char *name, double value);
  int32_t deterministic; /* [run] deterministic: results may not depend on anything but the run's identity */
  int32_t reserved0;
} phx_host;

#ifdef __cplusplus
}
#endif
#endif
