/* core/engine/optim.h - "phx.optim/1": the learning rate's schedule, and tickets that become pieces for the optimizer's
 * plugin.  [main]
 *
 * Weight decay goes to parameters with PHX_PARAM_DECAY only. */
#ifndef PHX__OPTIM_H
#define PHX__OPTIM_H
#include <phalanx/job.h>

#include "engine/prepared.h"

typedef struct phx__optim {
  phx_optim table; /* what the strategy gets */
  const phx__prepared *prepared;
  const phx_job *job;
  phx_optimizer_self *self;
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

/* Pure: what the configured optimizer says of itself, before any device exists; refuses what this core cannot keep. */
phx_status phx__optim_describe(const phx__config *config, phx_optim *out, phx_error *err);
/* Pure: does the strategy's grain (phx_estimate.grain) serve the optimizer's?  Refused by name where it does not. */
phx_status phx__optim_check_grain(const phx__prepared *p, phx_error *err);
/* self: what the plugin's create gave; it and the others are [borrow]. */
void phx__optim_init(phx__optim *o, const phx__prepared *prepared, const phx_job *job, phx_optimizer_self *self);
/* [main] Before all of the state is written from outside of update: a load. */
phx_status phx__optim_state_changes(const phx__optim *optim, phx_error *err);
double phx__optim_lr(const phx__settings *settings, int64_t step); /* step from 1 to run.steps */
#endif
