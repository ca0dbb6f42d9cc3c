/* core/engine/drift.h - do all ranks compute with the same weights?  [main] [collective]
 *
 * Whatever a strategy replicates, it shows: acquire() gives every rank the weights that it would compute with, whole.
 * So the core hashes those, for any strategy, parameter by parameter. */
#ifndef PHX__DRIFT_H
#define PHX__DRIFT_H
#include "engine/runtime.h"

typedef struct phx__drift phx__drift;

/* Refuses a strategy that does not show every stage to every rank.  Pure. */
phx_status phx__drift_supported(const phx__prepared *p, phx_error *err);
phx_status phx__drift_open(phx__runtime *rt, phx__drift **out, phx_error *err);
void phx__drift_close(phx__drift *d); /* NULL is fine */
/* PHX_COMM, naming the first tensor that differs and the ranks, when some do. */
phx_status phx__drift_check(phx__drift *d, int64_t step, phx_error *err);
#endif
