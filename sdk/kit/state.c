/* sdk/kit/state.c - naming state slices, handing out tickets, making replicas whole and hashing them. */
#include <phalanx/kit.h>
#include <string.h>

phx_status phx_kit_visit(const phx_visitor *visitor, const phx_optim *optim, int32_t weight_dtype, uint32_t unit,
                         uint32_t flat, int64_t first, int64_t blocks, phx_error *err) {
  if (blocks == 0) return PHX_OK;
  phx_slice slice = {.struct_size = sizeof slice,
                     .kind = weight_dtype == PHX_F32 ? PHX_STATE_WEIGHT : PHX_STATE_MASTER,
                     .unit = unit,
                     .flat = flat,
                     .first_block = first,
                     .blocks = blocks,
                     .dtype = PHX_F32,
                     .place = PHX_SPACE_DEVICE};
  phx_status status = visitor->slice(visitor->ctx, &slice, err);
  if (status == PHX_OK && slice.kind == PHX_STATE_MASTER) {
    slice.kind = PHX_STATE_WEIGHT;
    slice.dtype = weight_dtype;
    status = visitor->slice(visitor->ctx, &slice, err);
  }
  slice.kind = PHX_STATE_OPTIM;
  for (uint32_t k = 0; status == PHX_OK && flat == PHX_FLAT_TRAINABLE && k < optim->n_states; k++) {
    slice.state_index = k;
    slice.dtype = optim->states[k].dtype;
    status = visitor->slice(visitor->ctx, &slice, err);
  }
  return status;
}

phx_status phx_kit_update(const phx_optim *optim, const phx_kit_slice *s, float scale, phx_stream *stream,
                          phx_error *err) {
  if (s->blocks == 0) return PHX_OK;
  phx_ticket t = {.struct_size = sizeof t,
                  .unit = s->unit,
                  .place = s->place,
                  .first = s->first * PHX_BLOCK,
                  .numel = s->blocks * PHX_BLOCK,
                  .weight = s->weight,
                  .master = s->master,
                  .gradient = s->gradient,
                  .weight_dtype = s->master ? s->weight_dtype : PHX_F32,
                  .gradient_dtype = PHX_F32,
                  .stream = stream};
  memcpy(t.states, s->states, sizeof t.states);
  return optim->update(optim->ctx, &t, scale, err);
}

static phx_status copy_part(const phx_kit_services *s, char *to, const char *from, int64_t at, int64_t end,
                            phx_error *err) {
  const phx_device *d = s->device;
  return at < end ? d->copy(d->ctx, to + at, from + at, end - at, s->stream, err) : PHX_OK;
}

phx_status phx_kit_make_whole(const phx_kit_services *s, void *base, void *through, int64_t numel, int32_t dtype,
                              phx_error *err) {
  int64_t bytes = numel * (int64_t)phx_dtype_bytes(dtype), at = s->comm->rank * bytes, all = s->comm->size * bytes;
  phx_status status = PHX_OK;
  if (s->comm->size == 1) return PHX_OK; /* it is everybody's */
  if (through != base) PHX_KIT_TRY(copy_part(s, through, base, at, at + bytes, err));
  PHX_KIT_TRY(s->comm->all_gather(s->comm->ctx, (char *)through + at, through, numel, dtype, s->stream, err));
  if (through != base) {
    PHX_KIT_TRY(copy_part(s, base, through, 0, at, err));
    PHX_KIT_TRY(copy_part(s, base, through, at + bytes, all, err));
  }
done:
  return status;
}

/* Four lanes, so that the multiplications overlap; splitmix64's finish. */
uint64_t phx_kit_hash(uint64_t seed, const void *data, size_t bytes) {
  const uint64_t odd = 0x9E3779B97F4A7C15u;
  uint64_t lane[4] = {seed, seed + odd, seed ^ odd, seed - odd};
  const unsigned char *p = data;
  size_t left = bytes;
  for (; left >= 32; left -= 32, p += 32)
    for (int i = 0; i < 4; i++) {
      uint64_t word;
      memcpy(&word, p + 8 * i, 8);
      lane[i] = (lane[i] ^ word) * 0xBF58476D1CE4E5B9u;
      lane[i] ^= lane[i] >> 29;
    }
  uint64_t h = bytes;
  for (; left > 0; left--) h = (h ^ *p++) * 0x100000001B3u;
  for (int i = 0; i < 4; i++) {
    h = (h ^ lane[i]) * 0x94D049BB133111EBu;
    h ^= h >> 31;
  }
  return h;
}
