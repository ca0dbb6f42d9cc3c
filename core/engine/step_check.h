/* core/engine/step_check.h - what a strategy hands over in a training step: checked, counted, and with [run] checked
 * compared with what the ranks computed.  [main]
 *
 * Counts of the norm and of the update travel with the norm's own exchange, those of an update with the next step's, so
 * that they cost no exchange of their own. */
#ifndef PHX__STEP_CHECK_H
#define PHX__STEP_CHECK_H
#include "engine/gradient_check.h"

typedef struct phx__update_range {
  uint32_t unit;
  int64_t first, end; /* elements */
} phx__update_range;

typedef struct phx__step_check {
  phx__runtime *rt;
  phx__update_range *ranges; /* (n_ranges) of this rank's tickets in the update in progress */
  size_t n_ranges, room;
  phx__cover norm, update;
  bool updated;                   /* the last update's counts were not judged yet */
  phx__gradient_check *gradients; /* NULL: not checked */
} phx__step_check;

/* The optimizer asks about every ticket from now on. */
phx_status phx__step_check_open(phx__runtime *rt, phx__step_check *out, phx_error *err);
void phx__step_check_close(phx__step_check *c);
/* Blocks for the norm of this step. */
phx_status phx__step_check_norm(phx__step_check *c, uint32_t unit, int64_t first_block, int64_t blocks,
                                const float *gradient, phx_stream *stream, phx_error *err);
/* int64 words to add up over the ranks when a step's norm is complete, and their judgement. */
int64_t phx__step_check_size(const phx__step_check *c);
void phx__step_check_words(const phx__step_check *c, int64_t *words);
phx_status phx__step_check_judge(phx__step_check *c, const int64_t *sums, phx_error *err);
/* A step's update begins, after its norm was judged; and it has ended: did this rank update anything twice? */
void phx__step_check_update(phx__step_check *c, float scale);
phx_status phx__step_check_updated(phx__step_check *c, phx_error *err);
/* [collective] judges the last update without waiting for the next step. */
phx_status phx__step_check_last(phx__step_check *c, int64_t *words, phx_error *err);
#endif
