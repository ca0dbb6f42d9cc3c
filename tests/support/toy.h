/* tests/support/toy.h - a model without mathematics: arbitrary units, stages and uses; gradients that are a
 * deterministic function of the weights as they were read, the data rank, the step, the micro-batch and the element.
 *
 * A stale, freed or half-gathered weight, a gradient reduced twice or too early: each changes bits.  The reference is
 * single-threaded, keeps the whole model in plain arrays, and reduces in the tree order of phalanx/comm.h. */
#ifndef TOY_H
#define TOY_H
#include <phalanx/model.h>
#include <phalanx/optim.h>
#include <phalanx/strategy.h>
#include <stdbool.h>

enum { TOY_UNITS = 24, TOY_PARAMS = 96, TOY_STAGES = 24, TOY_USES = 64, TOY_BOUNDARY = 4 };
enum { TOY_RW = PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT }; /* the usual use */

typedef struct toy {
  phx_model model;
  phx_param params[TOY_PARAMS];
  phx_unit units[TOY_UNITS];
  phx_stage stages[TOY_STAGES];
  phx_use uses[TOY_USES];
  char names[TOY_PARAMS][32];
  int64_t elements[PHX_FLATS]; /* of the whole model's flats */
  int32_t *owner[PHX_FLATS];   /* (elements) parameter of each element, -1: padding */
  bool (*runs)(uint32_t stage, int64_t step, int32_t micro_batch, int32_t data_rank); /* NULL: always */
} toy;

/* Building: unit, its params, ..., then stages with uses, then finish. */
toy *toy_new(void);
uint32_t toy_unit(toy *t, const char *name);
void toy_param(toy *t, int64_t rows, int64_t cols, uint32_t flags);
uint32_t toy_stage(toy *t, const char *name);
void toy_use(toy *t, uint32_t unit, uint32_t flags);
toy *toy_finish(toy *t);
void toy_free(toy *t);

/* Ready-made.  plain: an embedding, `layers` equal blocks, a head; nothing odd.
 * odd: tied embedding (whose backward reads no weights), a frozen unit, a half-frozen unit, a unit of one block, units
 * of odd and coprime numbers of blocks, a stage that does not run everywhere, a stage that uses two units. */
toy *toy_plain(int layers, int64_t width);
toy *toy_odd(void);

/* To nearest, ties to even; a NaN stays one. */
uint16_t toy_bf16(float x);
float toy_from_bf16(uint16_t h);
/* First element of a unit's flat in the whole model's flat. */
int64_t toy_first(const toy *t, uint32_t unit, uint32_t flat);
float toy_initial(const toy *t, uint64_t seed, uint32_t param, int64_t element);
/* The first element of stage 0's input: what the data rank read. */
void toy_data(float out[TOY_BOUNDARY], int64_t step, int32_t micro_batch, int32_t data_rank);

typedef struct toy_call {
  const toy *t;
  uint32_t stage;
  int64_t step; /* from 1 */
  int32_t micro_batch, data_rank;
  const phx_param_view *params; /* in the order of a view */
  uint32_t n_params, param_stride;
  const float *input;    /* (TOY_BOUNDARY) output of the stage before, or the data */
  float *output;         /* FORWARD: written; BACKWARD: read */
  const float *d_output; /* BACKWARD; NULL: the last stage */
  float *d_input;        /* BACKWARD: written; NULL: the first stage */
} toy_call;
void toy_forward(const toy_call *c);
void toy_backward(const toy_call *c);

/* ---- optimizer: elementwise, plain ---- */
typedef struct toy_optim {
  bool adamw; /* else SGD */
  float lr, decay;
} toy_optim;
void toy_optim_update(const toy_optim *o, int64_t step, bool decay, float scale, float *w, const float *g, float *m,
                      float *v, int64_t numel);

/* ---- the reference ---- */
typedef struct toy_run {
  int32_t data_ranks, accumulate, reduce, steps;
  int32_t discard_step; /* that step (from 1) is skipped; 0: none */
  bool low_weights;     /* stages read weights rounded to bf16; what is updated stays fp32 */
  bool low_gradients;   /* each reduction: every rank's part is rounded to bf16, and the fp32 sum once more */
  uint64_t seed;
  toy_optim optim;
} toy_run;
typedef struct toy_reference {
  float *frozen;     /* (elements of the frozen flat) */
  float **weights;   /* (steps + 1) of (trainable elements): before step s + 1 */
  float **gradients; /* (steps) reduced over ranks and micro-batches, unscaled */
  float *m, *v;      /* after the last step */
  double *losses;    /* (steps) mean over ranks and micro-batches */
} toy_reference;
toy_reference *toy_reference_run(const toy *t, const toy_run *run, int32_t tree /* 0: left to right (wrong) */);
void toy_reference_free(toy_reference *r, const toy_run *run);

/* out = T(n) of comm.h over src[lo .. lo + n) */
void toy_tree_f32(float *out, const float *const *src, int32_t lo, int32_t n, int64_t numel);
uint64_t toy_mix(uint64_t x);
#endif
