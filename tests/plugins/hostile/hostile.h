/* hostile.h - a strategy that misuses the core, in one way of choice (tests only).
 *
 * The table of an in-tree strategy is wrapped: each call does what the strategy does, but for the misuse that the
 * option `misuse` names, on rank `rank` (-1: on all), from step `step` on where it is one of a step.  One strategy per
 * process. */
#ifndef HOSTILE_H
#define HOSTILE_H
#include <phalanx/kit.h>
#include <phalanx/provider.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* name: what is wrong */
#define HOSTILE_MISUSES(X)                                                                                            \
  X(none)                                                                                                             \
  /* plan.c: estimate and layout */                                                                                   \
  X(plan_half) X(plan_triple) X(plan_negative) X(plan_most) X(plan_arena) X(plan_state) X(sent_half)                  \
  X(sent_negative) X(sent_most) X(sent_uncalled) X(calls_seven) X(calls_negative) X(hidden_create) X(hidden_step)      \
  X(plan_kind) X(calls_unknown) X(plan_period)                                                                        \
  X(layout_rank) X(layout_size) X(layout_slots) X(layout_axes) X(layout_flag) X(layout_norm) X(layout_differ)         \
  X(layout_terms) X(called_mean) X(is_mean)                                                                           \
  /* state.c: visit_state, map, state_changed */                                                                      \
  X(visit_nothing) X(visit_missing) X(visit_twice) X(visit_beyond) X(visit_before) X(visit_unit) X(visit_flat)        \
  X(visit_kind) X(visit_index) X(visit_dtype) X(visit_place) X(visit_empty) X(visit_size) X(visit_null)               \
  X(visit_nameless) X(visit_numel) X(visit_moved) X(map_null) X(map_unaligned) X(map_beyond)                  \
  X(changed_nothing) X(changed_one)                                                                                   \
  /* step.c: views, gradients, the norm, tickets */                                                                   \
  X(view_null) X(view_size) X(view_params) X(view_count) X(view_stride) X(view_param) X(view_weight)                  \
  X(view_gradient) X(view_dtype) X(view_gradient_dtype) X(view_mode) X(view_write) X(view_unaligned)                  \
  X(view_beyond) X(view_stale) X(reduce_nothing) X(reduce_half) X(norm_nothing) X(norm_missing) X(norm_twice)         \
  X(norm_beyond) X(norm_before) X(norm_unit) X(norm_empty) X(norm_null) X(norm_unaligned) X(norm_other)               \
  X(ticket_nothing) X(ticket_missing) X(ticket_twice) X(ticket_beyond) X(ticket_before) X(ticket_negative)            \
  X(ticket_unit) X(ticket_size) X(ticket_null) X(ticket_weight) X(ticket_gradient) X(ticket_state) X(ticket_dtype)    \
  X(ticket_place) X(ticket_unaligned) X(ticket_overrun) X(ticket_other) X(ticket_scale) X(weights_drift)              \
  X(state_drift) X(master_drift) X(master_jump) X(frozen_drift) X(ticket_cut)                                         \
  /* calls.c: how a call ends */                                                                                      \
  X(crash) X(silent) X(odd_code) X(null_out)

enum hostile_misuse {
#define X(name) HOSTILE_##name,
  HOSTILE_MISUSES(X)
#undef X
};

/* Calls that `crash`, `silent` and `odd_code` are in; the first two are before there is a configuration. */
#define HOSTILE_CALLS(X)                                                                                          \
  X(none) X(layout) X(estimate) X(create) X(destroy) X(visit_state) X(map) X(unmap) X(state_changed)               \
  X(begin_micro_batch) X(acquire) X(release) X(finish_gradients) X(discard_gradients) X(gradient_norm) X(update)

enum hostile_call {
#define X(name) HOSTILE_IN_##name,
  HOSTILE_CALLS(X)
#undef X
};

typedef struct hostile_config {
  int64_t rank, step;
  int32_t misuse, call;
} hostile_config;

typedef struct hostile_run { /* of this process */
  hostile_config c;
  const phx_strategy_table *base;
  phx_host host; /* what the strategy gets: extensions of ours in front */
  const phx_host *real;
  const phx_model *model;
  const phx_topology *topology;
  const phx_optim *optim;
  phx_optim own_optim;
  const phx_comm *comm;
  phx_comm own_comm;
  int64_t now; /* the step in progress, from 1 */
  bool broken; /* the misuse was done once, where once is enough */
} hostile_run;
extern hostile_run hostile;
extern int32_t hostile_rank; /* of estimate and layout, before there is a run */

/* Is it this misuse, on this rank, in this step? */
static inline bool is(enum hostile_misuse misuse) {
  return hostile.c.misuse == (int32_t)misuse && (hostile.c.rank < 0 || hostile.c.rank == hostile_rank) &&
         hostile.now >= hostile.c.step;
}

/* What the table's call does instead: each file fills its own. */
void hostile_plan_calls(phx_strategy_table *t);
void hostile_state_calls(phx_strategy_table *t);
void hostile_step_calls(phx_strategy_table *t);
void hostile_end_calls(phx_strategy_table *t); /* last: around all the others */
void hostile_step_open(void);                  /* own_optim and own_comm */
void hostile_take_memory(size_t bytes);        /* touched, and kept */
void hostile_configure(const void *config, const phx_topology *topology);
#endif
