/* core/engine/optim.h - the optimizers behind "phx.optim/1", and the learning rate's schedule.  [main]
 *
 * AdamW (decoupled decay, arXiv 1711.05101) and SGD; decay on parameters with PHX_PARAM_DECAY only. */
#ifndef PHX__OPTIM_H
#define PHX__OPTIM_H
#include <phalanx/provider.h>

#include "config/config.h"

typedef struct phx__optim {
  phx_optim table;
  const phx__settings *settings;
  const phx_model *model;
  const phx_ops *ops;
  int64_t step; /* of the update in progress, from 1; 0: none */
  double lr;    /* of that step */
  /* Told before state changes: the `bytes` at p (of a ticket), or all of it (p NULL).  NULL: nobody reads it meanwhile.
   * core/checkpoint/saver.c. */
  phx_status (*before_change)(void *arg, const void *p, int64_t bytes, phx_error *err);
  void *before_change_arg;
  float scale; /* of the update in progress */
  /* Looks at a ticket before it is used; NULL: nobody does.  core/engine/step_check.c. */
  phx_status (*on_ticket)(void *arg, const phx_ticket *ticket, float scale, phx_error *err);
  void *on_ticket_arg;
  /* Looks at what a ticket left, which may still be on its way; NULL: nobody does.  core/engine/drift.c. */
  phx_status (*after_ticket)(void *arg, const phx_ticket *ticket, phx_error *err);
  void *after_ticket_arg;
} phx__optim;

/* States and name, before any device exists: for the topology. */
void phx__optim_states(const phx__settings *settings, phx_optim *out);
void phx__optim_init(phx__optim *o, const phx__settings *settings, const phx_model *model, const phx_ops *ops);
/* [main] Before all of the state is written from outside of update: a load. */
phx_status phx__optim_state_changes(const phx__optim *optim, phx_error *err);
double phx__optim_lr(const phx__settings *settings, int64_t step); /* step from 1 to run.steps */
#endif
