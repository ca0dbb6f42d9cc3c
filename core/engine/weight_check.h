/* core/engine/weight_check.h - does every rank compute with the weights that the state says?  [main] [collective]
 *
 * With [run] checked, when a run begins and when it ends.  The state that visit_state names is hashed where it is, by
 * parameter, in the type that the model reads; every rank hashes the weights of the views that acquire gives it.  Both
 * must be equal, so a replica that is behind, a low-precision copy that was not made anew, and a state_changed that
 * does nothing are found under any strategy.  A rank looks at the stages that it runs. */
#ifndef PHX__WEIGHT_CHECK_H
#define PHX__WEIGHT_CHECK_H
#include "engine/runtime.h"

/* when: "at start", "after the last step"; in the message. */
phx_status phx__weight_check(phx__runtime *rt, const char *when, phx_error *err);
#endif
