/* core/engine/state_visit.h - walking through the state that a strategy names: the only caller of visit_state.  [main]
 *
 * Every slice is checked before it is used, and counted; the counts of all ranks together must be the model's. */
#ifndef PHX__STATE_VISIT_H
#define PHX__STATE_VISIT_H
#include "engine/runtime.h"

typedef phx_status phx__slice_fn(void *ctx, const phx_slice *slice, phx_error *err);
/* use NULL: what an update left in flight is made to end, and slices are only counted. */
phx_status phx__state_visit(phx__runtime *rt, phx__slice_fn *use, void *ctx, phx_error *err);
/* [collective] Did the ranks' last visit name every block of every state exactly once? */
phx_status phx__state_covered(phx__runtime *rt, phx_error *err);
#endif
