/* sdk/kit/services.c - the host's services, planned memory, planned traffic.
 *
 * Invariant: a table of regions gives the same bytes to the plan and to the allocation.  [main] only. */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

phx_status phx_kit_services_open(const phx_host *host, phx_kit_services *out, phx_error *err) {
  phx_kit_services s = {.host = host,
                        .device = host->extension(host->ctx, PHX_EXT_DEVICE),
                        .comm = host->extension(host->ctx, PHX_EXT_COMM),
                        .optim = host->extension(host->ctx, PHX_EXT_OPTIM)};
  const char *missing = NULL;
  if (!s.optim) missing = PHX_EXT_OPTIM;
  if (!s.comm) missing = PHX_EXT_COMM;
  if (!s.device) missing = PHX_EXT_DEVICE;
  if (missing)
    return phx_fail(err, PHX_UNSUPPORTED, "the host offers no \"%s\", which the strategy needs", missing);
  phx_status status = s.device->stream_create(s.device->ctx, "communication", &s.stream, err);
  if (status == PHX_OK) *out = s;
  return status;
}

void phx_kit_services_close(phx_kit_services *s) {
  if (s->stream) s->device->stream_destroy(s->device->ctx, s->stream);
  memset(s, 0, sizeof *s);
}

phx_status phx_kit_events_create(const phx_kit_services *s, uint32_t n, phx_event ***out, phx_error *err) {
  phx_event **events = calloc(n + 1u, sizeof *events);
  if (!events) return phx_fail(err, PHX_NOMEM, "no memory for %u events", n);
  for (uint32_t i = 0; i < n; i++) {
    phx_status status = s->device->event_create(s->device->ctx, &events[i], err);
    if (status != PHX_OK) {
      phx_kit_events_destroy(s, i, events);
      return status;
    }
  }
  *out = events;
  return PHX_OK;
}

void phx_kit_events_destroy(const phx_kit_services *s, uint32_t n, phx_event **events) {
  if (!events) return;
  s->device->stream_synchronize(s->device->ctx, s->stream, NULL); /* no wait is pending after it */
  while (n--) s->device->event_destroy(s->device->ctx, events[n]);
  free(events);
}

phx_status phx_kit_after(const phx_kit_services *s, phx_event *event, phx_stream *first, phx_stream *then,
                         phx_error *err) {
  phx_status status = s->device->event_record(s->device->ctx, event, first, err);
  return status == PHX_OK ? s->device->stream_wait(s->device->ctx, then, event, err) : status;
}

phx_status phx_kit_check_topology(const phx_topology *t, phx_error *err) {
  if (t->compute_dtype != PHX_F32)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "[precision] compute is not fp32: this strategy keeps fp32 weights without master copies; "
                    "set compute = fp32");
  if (t->reduce_dtype != PHX_F32)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "[precision] reduce is not fp32: this strategy reduces gradients as they are; "
                    "set reduce = fp32");
  return PHX_OK;
}

phx_status phx_kit_check_precision(const phx_topology *t, phx_error *err) {
  const int32_t dtypes[] = {t->compute_dtype, t->reduce_dtype};
  for (int i = 0; i < 2; i++)
    if (dtypes[i] != PHX_F32 && dtypes[i] != PHX_BF16)
      return phx_fail(err, PHX_UNSUPPORTED, "[precision] %s has dtype %d: only fp32 and bf16 are known",
                      i ? "reduce" : "compute", dtypes[i]);
  return PHX_OK;
}

void phx_kit_regions_estimate(const phx_kit_region *regions, uint32_t n, phx_estimate *out) {
  for (uint32_t i = 0; i < n; i++) {
    int64_t bytes = phx_align_bytes(regions[i].bytes);
    out->bytes[regions[i].kind] += bytes;
    if (regions[i].shared) out->arena_bytes += bytes;
  }
}

void phx_kit_estimate_grain(phx_estimate *out, int32_t grain) {
  if (PHX_HAS(out, phx_estimate, grain)) out->grain = grain;
}

void phx_kit_estimate_state(phx_estimate *out, const phx_topology *t, uint32_t flat, int64_t blocks) {
  int64_t element = 4; /* the weight in fp32, or its master */
  if (!PHX_HAS(out, phx_estimate, state_bytes)) return;
  for (uint32_t k = 0; flat == PHX_FLAT_TRAINABLE && k < t->n_optim_states; k++)
    element += (int64_t)phx_dtype_bytes(t->optim_dtype[k]);
  out->state_bytes += blocks * PHX_BLOCK * element;
}

phx_status phx_kit_regions_alloc(const phx_kit_services *s, phx_kit_region *regions, uint32_t n, phx_error *err) {
  for (uint32_t i = 0; i < n; i++) {
    phx_kit_region *r = &regions[i];
    if (r->bytes == 0) continue;
    phx_memory what = {.struct_size = sizeof what,
                       .bytes = r->bytes,
                       .kind = r->kind,
                       .space = r->space,
                       .comm = r->shared ? (struct phx_comm *)(uintptr_t)s->comm : NULL};
    void *at = NULL;
    phx_status status = s->host->alloc(s->host->ctx, &what, &at, err);
    if (status != PHX_OK) {
      phx_kit_regions_release(s, regions, n);
      return status;
    }
    r->at = at;
  }
  return PHX_OK;
}

void phx_kit_regions_release(const phx_kit_services *s, phx_kit_region *regions, uint32_t n) {
  while (n--) {
    if (regions[n].at) s->host->release(s->host->ctx, regions[n].at);
    regions[n].at = NULL;
  }
}

void phx_kit_estimate_call(phx_estimate *out, const phx_topology *t, int32_t op, int64_t numel, int32_t dtype,
                           int32_t root, int64_t times) {
  out->calls[op] += times;
  out->sent[op] += times * t->payload(t->payload_ctx, op, numel, dtype, t->rank, t->world_size, root);
}
