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

phx_status phx_kit_make_whole(const phx_kit_services *s, void *base, int64_t numel, int32_t dtype, phx_error *err) {
  int64_t at = s->comm->rank * numel * (int64_t)phx_dtype_bytes(dtype);
  if (s->comm->size == 1) return PHX_OK; /* it is everybody's */
  return s->comm->all_gather(s->comm->ctx, (char *)base + at, base, numel, dtype, s->stream, err);
}

/* Eight lanes, so that the multiplications overlap.  A step is one to one in the lane and in the word: a word that is
 * different is never lost in its lane.  splitmix64's multipliers. */
static uint64_t hash_step(uint64_t lane, const unsigned char *p) {
  uint64_t word;
  memcpy(&word, p, 8);
  lane ^= word;
  return (lane << 29 | lane >> 35) * 0xBF58476D1CE4E5B9u;
}

uint64_t phx_kit_hash(uint64_t seed, const void *data, size_t bytes) {
  const uint64_t odd = 0x9E3779B97F4A7C15u;
  const unsigned char *p = data;
  size_t left = bytes;
  uint64_t a = seed, b = a + odd, c = b + odd, d = c + odd, e = d + odd, f = e + odd, g = f + odd, h = g + odd;
  for (; left >= 64; left -= 64, p += 64) { /* in registers, which an array would not be */
    a = hash_step(a, p), b = hash_step(b, p + 8), c = hash_step(c, p + 16), d = hash_step(d, p + 24);
    e = hash_step(e, p + 32), f = hash_step(f, p + 40), g = hash_step(g, p + 48), h = hash_step(h, p + 56);
  }
  const uint64_t lanes[8] = {a, b, c, d, e, f, g, h};
  uint64_t all = bytes;
  for (; left > 0; left--) all = (all ^ *p++) * 0x100000001B3u;
  for (int i = 0; i < 8; i++) {
    all = (all ^ lanes[i]) * 0x94D049BB133111EBu;
    all ^= all >> 31;
  }
  return all;
}
