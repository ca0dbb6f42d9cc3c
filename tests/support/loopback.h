/* tests/support/loopback.h - a communicator between threads of one process, and a device to go with it.
 *
 * Every collective checks that all ranks issue the same op, count, dtype, reduction and root, in the same order, per
 * communicator, and runs in the order it was issued; a rank that does not come ends the group after 30 s.
 *
 * Payload, by rank (es: element bytes; part(r): rank r's share [numel r / size, numel (r + 1) / size)):
 *   all_reduce 2 (size - 1) part(rank) es;  reduce: root (size - 1) numel es, others 0;
 *   reduce_scatter and all_gather and all_to_all (size - 1) numel es (numel per rank, as in the call);
 *   broadcast: root 0, others numel es;  send numel es, recv 0;  barrier and split 0. */
#ifndef LOOPBACK_H
#define LOOPBACK_H
#include <phalanx/comm.h>
#include <phalanx/device.h>
#include <stdbool.h>

/* THREADS: a stream is a thread.  DEFERRED: a stream does nothing until something waits for it, so that a missing wait
 * reads old data, and memory that is reused too early is seen by late readers. */
enum { LOOPBACK_THREADS = 0, LOOPBACK_DEFERRED = 1 };

phx_device *loopback_device_create(int mode);
void loopback_device_destroy(phx_device *d);
/* fn(copy of payload) in stream order. */
phx_status loopback_submit(phx_device *d, phx_stream *s, phx_stream_fn *fn, const void *payload, size_t bytes,
                           phx_error *err);

int64_t loopback_payload(const void *ctx, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                         int32_t root);

typedef struct loopback_watch { /* called on [main] when a collective is issued */
  void *ctx;
  void (*issued)(void *ctx, int32_t op, int64_t numel, int64_t payload, bool on_stream, const void *src,
                 const void *dst);
} loopback_watch;

typedef struct loopback_world loopback_world;
loopback_world *loopback_world_create(int32_t size);
/* [any] of the thread that is the rank */
phx_comm *loopback_comm(loopback_world *w, int32_t rank, phx_device *d, const loopback_watch *watch);
void loopback_abort(loopback_world *w, const char *why);
const char *loopback_why(loopback_world *w); /* why it was ended first; "" if it was not */
void loopback_world_destroy(loopback_world *w);
#endif
