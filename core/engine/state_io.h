/* core/engine/state_io.h - reading and writing state where the CPU cannot reach it: mapped slices, weights of a
 * view.  [main]
 *
 * Memory that the CPU can read is used in place; the device's own passes through one pinned chunk of the runtime, in
 * order of the compute stream.  `at` of the callbacks counts bytes from the start of what is read or written; every
 * part but the last is a multiple of PHX__STATE_CHUNK. */
#ifndef PHX__STATE_IO_H
#define PHX__STATE_IO_H
#include "engine/runtime.h"

enum { PHX__STATE_CHUNK = 1 << 20, PHX__STATE_CHUNK_BLOCKS = PHX__STATE_CHUNK / (PHX_BLOCK * 4) };

/* data: bytes [at, at + bytes), readable during the call. */
typedef phx_status phx__state_use(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err);
/* Fills bytes [at, at + bytes) of what is written; data's content is undefined before. */
typedef phx_status phx__state_fill(void *ctx, void *data, int64_t at, int64_t bytes, phx_error *err);

/* Can the CPU use memory of this PHX_SPACE_*? */
static inline bool phx__state_near(const phx__runtime *rt, int32_t space) {
  return space != PHX_SPACE_DEVICE || (rt->device->caps & PHX_DEVICE_HOST_MEMORY);
}
/* Bytes of pinned memory that the two below need; for the plan. */
int64_t phx__state_io_bytes(const phx_device *device);
/* `use` sees all bytes in order: at once where the CPU can read them, else a chunk at a time. */
phx_status phx__state_read(phx__runtime *rt, int32_t space, const void *from, int64_t bytes, phx__state_use *use,
                           void *ctx, phx_error *err);
/* The other way: what `fill` leaves is at `to` when this returns. */
phx_status phx__state_write(phx__runtime *rt, int32_t space, void *to, int64_t bytes, phx__state_fill *fill, void *ctx,
                            phx_error *err);
/* A slice of the strategy's: mapped, read or written, unmapped. */
phx_status phx__slice_read(phx__runtime *rt, const phx_slice *slice, phx__state_use *use, void *ctx, phx_error *err);
phx_status phx__slice_write(phx__runtime *rt, const phx_slice *slice, phx__state_fill *fill, void *ctx, phx_error *err);
/* The part of a slice that bytes [at, at + bytes) of it are. */
phx_slice phx__slice_part(const phx_slice *slice, int64_t at, int64_t bytes);
#endif
