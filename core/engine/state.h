/* core/engine/state.h - the whole training state: its first values, and its hash.  [main] */
#ifndef PHX__STATE_H
#define PHX__STATE_H
#include "engine/runtime.h"

/* [collective] Tells the strategy what comes next with the state (PHX_PREPARE_*), where it wants to know. */
phx_status phx__state_prepare(phx__runtime *rt, int32_t purpose, phx_error *err);
/* [collective] After all of the state was written: the strategy hears with what, and rebuilds what it derives. */
phx_status phx__state_filled(phx__runtime *rt, const phx_restored *what, phx_error *err);
/* [collective] every slice gets its initial values: weights from the counter-based generator, states zero. */
phx_status phx__runtime_initialise(phx__runtime *rt, phx_error *err);
/* [collective] the hash of the whole training state. */
phx_status phx__runtime_state_hash(phx__runtime *rt, phx__state_hash *out, phx_error *err);
/* Initial values of logical elements [in_param, in_param + numel) of a parameter. */
void phx__initial_values(const phx_param *p, uint64_t seed, int64_t in_param, int64_t numel, float *out);
#endif
