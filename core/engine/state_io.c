/* core/engine/state_io.c - see state_io.h.
 *
 * Copies are issued on the compute stream, behind what the strategy gave it, and waited for: one chunk, no overlap,
 * since what is done with the bytes (hashing, writing files) takes longer than the copy.  No memory is taken after
 * open. */
#include "engine/state_io.h"

#include "base/job_calls.h"
#include "base/status.h"
#include "engine/handed.h"
#include "plugin/where.h"

int64_t phx__state_io_bytes(const phx_device *device) {
  return device->caps & PHX_DEVICE_HOST_MEMORY ? 0 : PHX__STATE_CHUNK;
}

static int64_t part_at(int64_t at, int64_t bytes) {
  return bytes - at < PHX__STATE_CHUNK ? bytes - at : PHX__STATE_CHUNK;
}

phx_status phx__state_read(phx__runtime *rt, int32_t space, const void *from, int64_t bytes, phx__state_use *use,
                           void *ctx, phx_error *err) {
  const phx_device *d = rt->device;
  phx_status status = d->stream_synchronize(d->ctx, NULL, err);
  if (phx__state_near(rt, space)) return status ? status : use(ctx, from, 0, bytes, err);
  for (int64_t at = 0; at < bytes && !status; at += PHX__STATE_CHUNK) {
    status = d->copy(d->ctx, rt->chunk, (const char *)from + at, part_at(at, bytes), NULL, err);
    if (!status) status = d->stream_synchronize(d->ctx, NULL, err);
    if (!status) status = use(ctx, rt->chunk, at, part_at(at, bytes), err);
  }
  return status;
}

phx_status phx__state_write(phx__runtime *rt, int32_t space, void *to, int64_t bytes, phx__state_fill *fill, void *ctx,
                            phx_error *err) {
  const phx_device *d = rt->device;
  phx_status status = d->stream_synchronize(d->ctx, NULL, err);
  if (phx__state_near(rt, space)) return status ? status : fill(ctx, to, 0, bytes, err);
  for (int64_t at = 0; at < bytes && !status; at += PHX__STATE_CHUNK) {
    status = fill(ctx, rt->chunk, at, part_at(at, bytes), err);
    if (!status) status = d->copy(d->ctx, (char *)to + at, rt->chunk, part_at(at, bytes), NULL, err);
    if (!status) status = d->stream_synchronize(d->ctx, NULL, err);
  }
  return status;
}

static int64_t slice_bytes(const phx_slice *slice) {
  return slice->blocks * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype);
}

static phx_status unmap(phx__runtime *rt, const phx_slice *slice, int32_t mode, void *data, phx_status status,
                        phx_error *err) {
  const phx_status unmapped =
      PHX__IN_STRATEGY(rt->job, PHX_IN_STATE, -1,
                       rt->prepared->strategy->unmap(rt->strategy, slice, mode, data, status ? NULL : err));
  return status ? status : unmapped;
}

static phx_status map(phx__runtime *rt, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  const phx_status status = PHX__IN_STRATEGY(rt->job, PHX_IN_STATE, -1,
                                             rt->prepared->strategy->map(rt->strategy, slice, mode, out, err));
  return status ? status : phx__handed_map(rt, slice, *out, err);
}

phx_status phx__slice_read(phx__runtime *rt, const phx_slice *slice, phx__state_use *use, void *ctx, phx_error *err) {
  void *data = NULL;
  phx__job_heartbeat(rt->job); /* within one call of the strategy, visit_state */
  PHX_TRY(map(rt, slice, PHX_MAP_READ, &data, err));
  phx_status status = phx__state_read(rt, slice->place, data, slice_bytes(slice), use, ctx, err);
  return unmap(rt, slice, PHX_MAP_READ, data, status, err);
}

phx_status phx__slice_write(phx__runtime *rt, const phx_slice *slice, phx__state_fill *fill, void *ctx,
                            phx_error *err) {
  void *data = NULL;
  phx__job_heartbeat(rt->job);
  PHX_TRY(map(rt, slice, PHX_MAP_WRITE, &data, err));
  phx_status status = phx__state_write(rt, slice->place, data, slice_bytes(slice), fill, ctx, err);
  return unmap(rt, slice, PHX_MAP_WRITE, data, status, err);
}

phx_slice phx__slice_part(const phx_slice *slice, int64_t at, int64_t bytes) {
  const int64_t block = PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype);
  phx_slice part = *slice;
  part.first_block += at / block;
  part.blocks = bytes / block;
  return part;
}
