/* core/engine/drift.h - do all ranks have the same weights, masters and optimizer states?  [main] [collective]
 *
 * Whatever a strategy replicates, it shows: acquire() gives every rank the weights that it would compute with, whole;
 * and whoever holds a tensor's master and states whole hands them over in an update.  So the core hashes those, for any
 * strategy, tensor by tensor. */
#ifndef PHX__DRIFT_H
#define PHX__DRIFT_H
#include "engine/runtime.h"

typedef struct phx__drift phx__drift;

/* Refuses a strategy that does not show every stage to every rank.  Pure. */
phx_status phx__drift_supported(const phx__prepared *p, phx_error *err);
/* Is the start of a run checked without being asked?  Where weights are replicas, every rank has them of its peers. */
bool phx__drift_at_start(const phx__prepared *p);
phx_status phx__drift_open(phx__runtime *rt, phx__drift **out, phx_error *err);
void phx__drift_close(phx__drift *d); /* NULL is fine */
/* The step that begins will be checked: what its update leaves of masters and states is looked at on the way. */
void phx__drift_watch(phx__drift *d);
/* After a step, 0: at the start, when only weights are looked at.  PHX_COMM, naming the first tensor that differs and
 * the ranks, when some do. */
phx_status phx__drift_check(phx__drift *d, int64_t step, phx_error *err);
#endif
