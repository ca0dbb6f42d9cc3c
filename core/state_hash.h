/* core/state_hash.h - a hash of the training state that does not depend on who holds what.
 *
 * The sum modulo 2^128 of XXH3-128 of (kind, state index, unit, flat, block, the block's logical elements): padding is
 * left out.  Equal for equal states under every strategy and world size.  [main] */
#ifndef PHX__STATE_HASH_H
#define PHX__STATE_HASH_H
#include <phalanx/strategy.h>

typedef struct phx__state_hash {
  uint64_t low, high;
} phx__state_hash;

/* Adds the blocks of one mapped slice. */
void phx__state_hash_slice(phx__state_hash *sum, const phx_model *model, const phx_slice *slice, const void *data);
void phx__state_hash_add(phx__state_hash *sum, phx__state_hash other);
void phx__state_hash_text(phx__state_hash sum, char text[33]);
#endif
