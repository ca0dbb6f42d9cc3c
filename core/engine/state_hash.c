/* core/engine/state_hash.c - see state_hash.h. */
#include "engine/state_hash.h"

#include <inttypes.h>
#include <stdio.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "engine/layout.h"

void phx__state_hash_add(phx__state_hash *sum, phx__state_hash other) {
  sum->low += other.low;
  sum->high += other.high + (sum->low < other.low);
}

void phx__state_hash_slice(phx__state_hash *sum, const phx_model *model, const phx_slice *slice, const void *data) {
  const size_t bytes = phx_dtype_bytes(slice->dtype);
  const int32_t kind = slice->kind == PHX_STATE_MASTER ? PHX_STATE_WEIGHT : slice->kind;
  for (int64_t b = 0; b < slice->blocks; b++) {
    const int64_t block = slice->first_block + b;
    const int64_t place[5] = {kind, slice->state_index, slice->unit, slice->flat, block};
    XXH3_state_t state;
    XXH3_128bits_reset(&state);
    XXH3_128bits_update(&state, place, sizeof place);
    phx__range range = {0};
    while (phx__layout_next(model, slice->unit, slice->flat, block * PHX_BLOCK, PHX_BLOCK, &range)) {
      const char *at = (const char *)data + (size_t)(range.first - slice->first_block * PHX_BLOCK) * bytes;
      XXH3_128bits_update(&state, at, (size_t)range.numel * bytes);
    }
    XXH128_hash_t h = XXH3_128bits_digest(&state);
    phx__state_hash_add(sum, (phx__state_hash){h.low64, h.high64});
  }
}

void phx__state_hash_text(phx__state_hash sum, char text[33]) {
  snprintf(text, 33, "%016" PRIx64 "%016" PRIx64, sum.high, sum.low);
}
