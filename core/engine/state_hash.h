/* core/engine/state_hash.h - a hash of the training state that does not depend on who holds what.
 *
 * The sum modulo 2^128 of XXH3-128 of (kind, state index, unit, flat, block, the block's logical elements): padding is
 * left out.  A master counts as the weight it stands behind, and what is derived from it is left out, so equal states
 * have equal hashes under every strategy, world size and precision.  [main] */
#ifndef PHX__STATE_HASH_H
#define PHX__STATE_HASH_H
#include <phalanx/strategy.h>
#include <stdbool.h>

typedef struct phx__state_hash {
  uint64_t low, high;
} phx__state_hash;

/* Low-precision weights: rounded from their masters by state_changed, so neither initialised, saved, loaded nor hashed.
 */
static inline bool phx__state_derived(const phx_slice *slice) {
  return slice->kind == PHX_STATE_WEIGHT && slice->dtype != PHX_F32;
}
/* Adds the blocks of one mapped slice. */
void phx__state_hash_slice(phx__state_hash *sum, const phx_model *model, const phx_slice *slice, const void *data);
void phx__state_hash_add(phx__state_hash *sum, phx__state_hash other);
void phx__state_hash_text(phx__state_hash sum, char text[33]);
#endif
