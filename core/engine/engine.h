/* core/engine/engine.h - the training step.  [main] [collective]
 *
 * data -> begin_micro_batch -> acquire, forward, release per stage -> loss -> acquire, backward, release per stage in
 * reverse -> finish_gradients -> norm, clip -> update.  A strategy with run_step takes over the middle part. */
#ifndef PHX__ENGINE_H
#define PHX__ENGINE_H
#include "engine/data.h"
#include "engine/norm.h"
#include "engine/runtime.h"
#include "engine/step_check.h"

typedef struct phx__step_result {
  double loss;      /* mean over the global batch, nats per token */
  double grad_norm; /* of the mean gradient, before clipping */
  double lr;
  bool skipped;     /* not finite: no update (run.on_nonfinite = skip) */
} phx__step_result;

typedef struct phx__engine {
  phx__runtime *rt;
  int32_t *host_tokens, *tokens; /* (accumulate, 2, B, T): tokens, then targets; pinned, and on the device */
  void **outputs, **saved;       /* (slots, n_stages), or NULL where not owned */
  void **gradients;              /* (slots, 2): boundary gradients, by the stage's parity */
  void *workspace;
  double *losses;      /* (max(accumulate, micro)) of this rank; pinned, complete when the stream is synchronized */
  double *norm_blocks; /* sums of squares on their way from the device; pinned */
  float *logits;       /* (vocabulary), pinned; NULL before the first phx__engine_logits */
  int64_t *sums;       /* the norm, then the counts of the step check */
  phx__step_check check;
  int64_t step;                  /* in progress, from 1 */
  int64_t skipped;               /* steps in a row, up to the last whole one */
  bool not_finite;               /* the step was stopped before its update, on all ranks (run.on_nonfinite = stop) */
  int64_t samples_ahead;         /* step k begins with sample (k - 1) * global batch + this: not 0 after a resume with
                                  * another batch size */
  void (*at_stage)(void *arg);   /* called at every stage boundary, or NULL */
  void *at_stage_arg;
  int (*stop_asked)(void); /* not 0 on any rank: a validation ends; or NULL */
} phx__engine;

phx_status phx__engine_create(phx__runtime *rt, phx__engine **out, phx_error *err);
void phx__engine_destroy(phx__engine *e);
/* Sequences consumed by all ranks together when `steps` steps are done. */
int64_t phx__engine_samples(const phx__engine *e, int64_t steps);
/* One optimizer step on the batch of `step` (from 1). */
phx_status phx__engine_step(phx__engine *e, phx__data *data, int64_t step, phx__step_result *out, phx_error *err);
/* [collective] after the last step: was everything updated? */
phx_status phx__engine_updated(phx__engine *e, phx_error *err);
/* Mean loss over the tokens of the first `windows` windows of held-out data, or of all where that is 0 or more than
 * there are: the same digits however ranks and micro-batches divide them.  INFINITY: a loss was not finite.
 * NAN: e->stop_asked ended it, at the same window on all ranks. */
phx_status phx__engine_validate(phx__engine *e, phx__data *data, int64_t windows, double *loss, phx_error *err);
/* One sequence of `length` tokens forward; logits (vocabulary) of the last position, the engine's until the next call.
 */
phx_status phx__engine_logits(phx__engine *e, const int32_t *tokens, int64_t length, const float **logits,
                              phx_error *err);
#endif
