/* plugins/gpt/run.c - the model's memory plan, its life, and which stage a call means.  [main] only.
 *
 * All computing goes through "phx.ops/1"; this plugin holds no weights and no memory.  Stage 0 is the embedding, 1..L
 * the blocks, L + 1 the head.
 *
 * What a block keeps for backward: qkv (3C), attention's output (C) and log-sum-exp (H), the second residual (C), the
 * MLP before and after GELU (8C), means and deviations.  Recomputed, since it is cheap: the two layer norms' outputs.
 * No product is computed twice. */
#include "gpt.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Room for `elements` of dtype, or for as many floats. */
static int64_t take_as(int64_t *cursor, int32_t dtype, int64_t elements) {
  const int64_t at = *cursor;
  *cursor += phx_align_bytes(elements * (int64_t)phx_dtype_bytes(dtype));
  return at;
}
static int64_t take(int64_t *cursor, int64_t floats) {
  return take_as(cursor, PHX_F32, floats);
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

void gpt_block_layout(const gpt_sizes *s, int32_t dtype, int64_t b, int64_t t, int64_t drop, gpt_block_plan *p) {
  const int64_t n = b * t, c = s->width;
  int64_t at = 0;
  p->mean1 = take(&at, n);
  p->rstd1 = take(&at, n);
  p->qkv = take_as(&at, dtype, n * 3 * c);
  p->att = take_as(&at, dtype, n * c);
  p->lse = take(&at, n * s->heads);
  p->res2 = take_as(&at, dtype, n * c);
  p->mean2 = take(&at, n);
  p->rstd2 = take(&at, n);
  p->pre = take_as(&at, dtype, n * 4 * c);
  p->act = take_as(&at, dtype, n * 4 * c);
  p->saved = at;
  at = 0;
  p->a = take_as(&at, dtype, n * c);
  p->b = take_as(&at, dtype, n * c);
  const int64_t forward = at;
  at = 0;
  p->wide = take_as(&at, dtype, n * 4 * c);
  p->narrow = take_as(&at, dtype, n * c);
  p->rows = take(&at, n * s->heads);
  p->drop = take(&at, drop);
  p->workspace = larger(forward, at);
}

void gpt_head_layout(const gpt_sizes *s, int32_t dtype, int64_t b, int64_t t, int64_t drop, gpt_head_plan *p) {
  const int64_t n = b * t;
  int64_t at = 0;
  p->mean = take(&at, n);
  p->rstd = take(&at, n);
  p->logits = take_as(&at, dtype, n * s->vp);
  p->saved = at;
  at = 0;
  p->ln = take_as(&at, dtype, n * s->width);
  p->losses = take(&at, n);
  p->last = take_as(&at, dtype, b * s->width);
  p->wide = dtype == PHX_F32 ? 0 : take(&at, b * s->vocab);
  const int64_t forward = at;
  at = p->losses; /* behind ln */
  p->drop = take(&at, drop);
  p->workspace = larger(forward, at);
}

/* Floats of the largest gradient that is written though frozen: an operation that gives a weight's gradient together
 * with a bias's cannot leave out the weight's alone, nor a layer norm's bias. */
static int64_t dropped(const gpt_config *config, const gpt_sizes *s, uint32_t stage) {
  static const struct {
    int weight, elements;
  } pairs[] = {{GPT_LN1_W, 0}, {GPT_QKV_W, 3}, {GPT_ATT_W, 1}, {GPT_LN2_W, 0}, {GPT_FC_W, 4}, {GPT_OUT_W, 4}};
  const int64_t c = s->width;
  if (stage == (uint32_t)s->layers + 1)
    return gpt_frozen(config, "ln_f.weight") != gpt_frozen(config, "ln_f.bias") ? c : 0;
  int64_t most = 0;
  for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
    int32_t frozen[2];
    for (int k = 0; k < 2; k++) {
      char name[40];
      snprintf(name, sizeof name, "h.%" PRIu32 ".%s", stage - 1, gpt_block_names[pairs[i].weight + k]);
      frozen[k] = gpt_frozen(config, name);
    }
    if (!pairs[i].elements && frozen[0] != frozen[1]) most = larger(most, c);
    if (pairs[i].elements && frozen[0] && !frozen[1]) most = larger(most, pairs[i].elements * c * c);
  }
  return most;
}

/* 0: a core that does not say computes in fp32. */
static int32_t gpt_dtype(const phx_batch_shape *shape) {
  return PHX_HAS(shape, phx_batch_shape, compute_dtype) && shape->compute_dtype ? shape->compute_dtype : PHX_F32;
}

static phx_status check_shape(const gpt_sizes *s, const phx_batch_shape *shape, phx_error *err) {
  if (shape->micro < 1 || shape->sequence < 1 || shape->sequence > s->context)
    return phx_fail(err, PHX_INVALID, "a micro-batch of %" PRId64 " x %" PRId64 " tokens does not fit a context of %"
                    PRId64, shape->micro, shape->sequence, s->context);
  if (gpt_dtype(shape) != PHX_F32 && gpt_dtype(shape) != PHX_BF16)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "the gpt model computes in fp32 or bf16: set [precision] compute to one of them");
  const double row = (double)larger(s->vp, 16 * s->width) * sizeof(float);
  if ((double)shape->micro * (double)shape->sequence * row > 0x1p62)
    return phx_fail(err, PHX_INVALID,
                    "micro = %" PRId64 " x sequence = %" PRId64 " x %.0f bytes a token is more than 64 bits can count",
                    shape->micro, shape->sequence, row);
  return PHX_OK;
}

phx_status gpt_stage_memory(const void *config, const phx_batch_shape *shape, uint32_t stage, phx_stage_memory *out,
                            phx_error *err) {
  gpt_sizes s;
  PHX_TRY(gpt_resolve(config, &s, err));
  PHX_TRY(check_shape(&s, shape, err));
  if (stage > (uint32_t)s.layers + 1)
    return phx_fail(err, PHX_INVALID, "stage %" PRIu32 " of %" PRId64, stage, s.layers + 2);
  const int32_t dtype = gpt_dtype(shape);
  phx_stage_memory m = {.struct_size = sizeof m};
  if (stage <= (uint32_t)s.layers)
    m.output = phx_align_bytes(shape->micro * shape->sequence * s.width * (int64_t)phx_dtype_bytes(dtype));
  if (stage == (uint32_t)s.layers + 1) {
    gpt_head_plan plan;
    gpt_head_layout(&s, dtype, shape->micro, shape->sequence, dropped(config, &s, stage), &plan);
    m.saved = plan.saved;
    m.workspace = plan.workspace;
  } else if (stage > 0) {
    gpt_block_plan plan;
    gpt_block_layout(&s, dtype, shape->micro, shape->sequence, dropped(config, &s, stage), &plan);
    m.saved = plan.saved;
    m.workspace = plan.workspace;
  }
  phx_struct_give(out, &m);
  return PHX_OK;
}

phx_status gpt_create(const phx_host *host, const void *config, const phx_model *model, const phx_batch_shape *shape,
                      phx_model_self **out, phx_error *err) {
  const gpt_config *c = config;
  gpt_sizes s;
  PHX_TRY(gpt_resolve(c, &s, err));
  PHX_TRY(check_shape(&s, shape, err));
  if (model->n_stages != (uint32_t)s.layers + 2)
    return phx_fail(err, PHX_INTERNAL, "the model has %" PRIu32 " stages, %" PRId64 " layers need %" PRId64,
                    model->n_stages, s.layers, s.layers + 2);
  const phx_ops *ops = host->extension(host->ctx, PHX_EXT_OPS);
  const phx_device *device = host->extension(host->ctx, PHX_EXT_DEVICE);
  if (!ops || !device)
    return phx_fail(err, PHX_UNSUPPORTED, "the gpt model needs the host's " PHX_EXT_OPS " and " PHX_EXT_DEVICE);
  phx_model_self *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the model's own %zu bytes", sizeof *self);
  self->host = host;
  self->ops = ops;
  self->device = device;
  self->sizes = s;
  self->shape = *shape;
  self->layer_drop = c->layer_drop;
  self->dtype = gpt_dtype(shape);
  self->eps = (float)c->norm_eps;
  *out = self;
  return PHX_OK;
}

void gpt_destroy(phx_model_self *self) {
  free(self);
}

static uint64_t mix(uint64_t x) { /* splitmix64's finisher */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/* LayerDrop: blocks only, each rank and micro-batch on its own; evaluation runs every block (the caller does not ask).
 */
int32_t gpt_stage_runs(phx_model_self *self, uint32_t stage, uint64_t seed, int64_t step, int32_t micro_batch,
                       int32_t data_rank) {
  if (self->layer_drop <= 0 || stage == 0 || stage > (uint32_t)self->sizes.layers) return 1;
  uint64_t h = mix(seed ^ 0x4c61796572447270u); /* "LayerDrp": a stream of its own */
  h = mix(h ^ (uint64_t)step);
  h = mix(h ^ ((uint64_t)(uint32_t)micro_batch << 32 | (uint32_t)data_rank));
  h = mix(h ^ stage);
  return (double)(h >> 11) * 0x1p-53 >= self->layer_drop;
}

static phx_status check_call(const phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const gpt_sizes *s = &self->sizes;
  if (call->stage > (uint32_t)s->layers + 1)
    return phx_fail(err, PHX_INTERNAL, "stage %" PRIu32 " of %" PRId64, call->stage, s->layers + 2);
  if (call->batch < 1 || call->batch > self->shape.micro || call->sequence < 1 ||
      call->sequence > self->shape.sequence)
    return phx_fail(err, PHX_INTERNAL,
                    "a batch of %" PRId64 " x %" PRId64 " exceeds the planned %" PRId64 " x %" PRId64, call->batch,
                    call->sequence, self->shape.micro, self->shape.sequence);
  uint32_t params = call->stage <= (uint32_t)s->layers ? GPT_BLOCK_PARAMS : GPT_HEAD_PARAMS;
  if (call->stage == 0) params = 2;
  if (call->view->n_params != params)
    return phx_fail(err, PHX_INTERNAL, "stage %" PRIu32 " got a view of %" PRIu32 " parameters, it has %" PRIu32,
                    call->stage, call->view->n_params, params);
  for (uint32_t i = 0; i < params; i++) {
    const phx_param_view *v = phx_view_param(call->view, i);
    if (v->weight && v->weight_dtype != self->dtype)
      return phx_fail(err, PHX_UNSUPPORTED,
                      "parameter %" PRIu32 " of stage %" PRIu32 " comes in dtype %" PRId32
                      ", but the model was created to compute in dtype %" PRId32,
                      i, call->stage, v->weight_dtype, self->dtype);
    if (v->gradient && v->gradient_dtype != PHX_F32)
      return phx_fail(err, PHX_UNSUPPORTED, "the gpt model writes fp32 gradients and was given another type");
  }
  return PHX_OK;
}

phx_status gpt_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  PHX_TRY(check_call(self, call, err));
  if (call->stage == 0) return gpt_embed_forward(self, call, err);
  if (call->stage <= (uint32_t)self->sizes.layers) return gpt_block_forward(self, call, err);
  return gpt_head_forward(self, call, err);
}

phx_status gpt_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  PHX_TRY(check_call(self, call, err));
  if (call->stage == 0) return gpt_embed_backward(self, call, err);
  if (call->stage <= (uint32_t)self->sizes.layers) return gpt_block_backward(self, call, err);
  return gpt_head_backward(self, call, err);
}

gpt_gradient gpt_gradient_of(const phx_view *view, uint32_t weight, float *drop) {
  const phx_param_view *w = phx_view_param(view, weight), *b = phx_view_param(view, weight + 1);
  gpt_gradient g = {w->gradient, b->gradient, w->gradient_mode, b->gradient_mode};
  if (!g.w && g.b) {
    g.w = drop;
    g.w_mode = PHX_GRAD_WRITE;
  }
  if (!g.w) g.w_mode = PHX_GRAD_NONE;
  if (!g.b) g.b_mode = PHX_GRAD_NONE;
  return g;
}
