/* core/engine/gradient_check.c - see gradient_check.h.
 *
 * The sums are made in double on each rank and travel as floats, in whatever order; so what is compared may differ by
 * rounding, relative to the sum of absolute values that were added: the order of additions is the strategy's.
 * Invariant: samples are in order of their place in the model; what they hold belongs to the step in progress. */
#include "engine/gradient_check.h"

#include <math.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "engine/layout.h"
#include "engine/state_io.h"
#include "plugin/where.h"

enum { SAMPLES = 128 };

typedef struct sample {
  uint32_t unit;
  int64_t first; /* element of the unit's flat */
} sample;

struct phx__gradient_check {
  phx__runtime *rt;
  int64_t n;
  double tolerance;
  sample samples[SAMPLES];
  double (*own)[PHX_BLOCK];  /* (n) what this rank's passes added */
  float (*part)[PHX_BLOCK];  /* (n) what was there before the pass in progress; then what is handed over */
  float (*sums)[PHX_BLOCK];  /* (2, n) of all ranks; of absolute values */
};

phx_status phx__gradient_check_open(phx__runtime *rt, phx__gradient_check **out, phx_error *err) {
  const int64_t blocks = rt->prepared->model->total_blocks[PHX_FLAT_TRAINABLE];
  phx__gradient_check *c = phx__calloc(1, sizeof *c);
  if (!c) return phx_fail(err, PHX_NOMEM, "no memory to check gradients");
  c->rt = rt;
  c->n = blocks < SAMPLES ? blocks : SAMPLES;
  c->tolerance = rt->prepared->topology.reduce_dtype == PHX_BF16 ? 0x1p-6 : 1e-4;
  c->own = phx__calloc((size_t)c->n, sizeof *c->own);
  c->part = phx__calloc((size_t)c->n, sizeof *c->part);
  c->sums = phx__calloc(2 * (size_t)c->n, sizeof *c->sums);
  if (c->own && c->part && c->sums) {
    *out = c;
    return PHX_OK;
  }
  phx__gradient_check_close(c);
  return phx_fail(err, PHX_NOMEM, "no memory to check gradients");
}

void phx__gradient_check_close(phx__gradient_check *c) {
  if (!c) return;
  phx__free(c->sums);
  phx__free(c->part);
  phx__free(c->own);
  phx__free(c);
}

/* Block number `block` of the whole model. */
static sample sample_at(const phx_model *m, int64_t block) {
  uint32_t unit = 0;
  while (block >= phx_model_unit(m, unit)->first_block[PHX_FLAT_TRAINABLE] +
                      phx_model_unit(m, unit)->blocks[PHX_FLAT_TRAINABLE])
    unit++;
  return (sample){unit, (block - phx_model_unit(m, unit)->first_block[PHX_FLAT_TRAINABLE]) * PHX_BLOCK};
}

void phx__gradient_check_begin(phx__gradient_check *c, int64_t step) {
  const phx_model *m = c->rt->prepared->model;
  const int64_t all = m->total_blocks[PHX_FLAT_TRAINABLE];
  for (int64_t i = 0; i < c->n; i++) { /* one of each part of the model, another in each step */
    const int64_t begin = i * all / c->n, end = (i + 1) * all / c->n;
    c->samples[i] = sample_at(m, begin + (step * 7919 + i) % (end - begin));
  }
  memset(c->own, 0, (size_t)c->n * sizeof *c->own);
  memset(c->sums, 0, 2 * (size_t)c->n * sizeof *c->sums);
}

/* ---- what passes add ---- */
static phx_status copy_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  (void)err;
  memcpy((char *)ctx + at, data, (size_t)bytes);
  return PHX_OK;
}

/* The part of a parameter that lies in a sample: elements [*first, *first + numel) of the flat; 0: none. */
static int64_t overlap(const sample *s, const phx_param *param, int64_t *first) {
  const int64_t begin = param->offset > s->first ? param->offset : s->first;
  const int64_t end = param->offset + param->numel < s->first + PHX_BLOCK ? param->offset + param->numel
                                                                         : s->first + PHX_BLOCK;
  *first = begin;
  return end > begin ? end - begin : 0;
}

/* Reads the samples of one parameter's gradient into part. */
static phx_status read_param(phx__gradient_check *c, const phx_param_view *v, phx_error *err) {
  const phx_param *param = phx_model_param(c->rt->prepared->model, v->param);
  phx_status status = PHX_OK;
  for (int64_t i = 0; i < c->n && !status; i++) {
    int64_t first;
    const int64_t numel = c->samples[i].unit == param->unit ? overlap(&c->samples[i], param, &first) : 0;
    if (numel == 0) continue;
    status = phx__state_read(c->rt, PHX_SPACE_DEVICE, (const float *)v->gradient + (first - param->offset),
                             numel * (int64_t)sizeof(float), copy_part, c->part[i] + (first - c->samples[i].first),
                             err);
  }
  return status;
}

/* own += sign * part, and absolute values once. */
static void add_param(phx__gradient_check *c, const phx_param_view *v, double sign) {
  const phx_param *param = phx_model_param(c->rt->prepared->model, v->param);
  for (int64_t i = 0; i < c->n; i++) {
    int64_t first;
    const int64_t numel = c->samples[i].unit == param->unit ? overlap(&c->samples[i], param, &first) : 0;
    for (int64_t k = 0; k < numel; k++) {
      const int64_t at = first - c->samples[i].first + k;
      c->own[i][at] += sign * (double)c->part[i][at];
      if (sign > 0) c->sums[c->n + i][at] += fabsf(c->part[i][at]);
    }
  }
}

static phx_status each_gradient(phx__gradient_check *c, const phx_view *view, bool before, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t i = 0; i < view->n_params && !status; i++) {
    const phx_param_view *v = phx_view_param(view, i);
    if (!v->gradient || (before && v->gradient_mode != PHX_GRAD_ADD)) continue;
    status = read_param(c, v, err);
    if (!status) add_param(c, v, before ? -1.0 : 1.0);
  }
  return status;
}

phx_status phx__gradient_check_before(phx__gradient_check *c, const phx_view *view, phx_error *err) {
  return each_gradient(c, view, true, err);
}

phx_status phx__gradient_check_after(phx__gradient_check *c, const phx_view *view, phx_error *err) {
  return each_gradient(c, view, false, err);
}

phx_status phx__gradient_check_sum(phx__gradient_check *c, phx_error *err) {
  const phx_comm *core = c->rt->core;
  const phx__prepared *p = c->rt->prepared;
  const double share = phx__gradient_terms(p) / ((double)p->topology.accumulate * p->layout.data_size);
  for (int64_t i = 0; i < c->n; i++)
    for (int64_t k = 0; k < PHX_BLOCK; k++) {
      c->sums[i][k] = (float)(c->own[i][k] * share);
      c->sums[c->n + i][k] *= (float)share;
    }
  return PHX__IN_COMM(c->rt->job, core->all_reduce(core->ctx, c->sums, c->sums, 2 * c->n * PHX_BLOCK, PHX_F32, PHX_SUM,
                                                   NULL, err));
}

/* ---- what is handed over ---- */
static phx_status compare(phx__gradient_check *c, const char *call, int64_t i, const phx__range *r, phx_error *err) {
  const int64_t from = r->first - c->samples[i].first;
  for (int64_t k = 0; k < r->numel; k++) {
    const float expected = c->sums[i][from + k], scale = c->sums[c->n + i][from + k], given = c->part[i][from + k];
    if (!isfinite(expected) || !isfinite(scale) || !isfinite(given)) continue; /* [run] on_nonfinite's business */
    if (fabs((double)given - (double)expected) <= c->tolerance * (double)scale + 1e-30) continue;
    return phx_fail(err, PHX_INTERNAL,
                    "strategy %s: %s: the gradient of %s, element %lld, is %.9g; what the ranks computed adds up to "
                    "%.9g",
                    c->rt->config->strategy.plugin->descriptor->id, call, r->param->name,
                    (long long)(r->in_param + k), (double)given, (double)expected);
  }
  return PHX_OK;
}

phx_status phx__gradient_check_given(phx__gradient_check *c, const char *call, uint32_t unit, int64_t first,
                                     int64_t numel, const float *gradient, phx_stream *stream, phx_error *err) {
  const phx_device *d = c->rt->device;
  phx_status status = d->stream_synchronize(d->ctx, stream, err);
  for (int64_t i = 0; i < c->n && !status; i++) {
    const sample *s = &c->samples[i];
    if (s->unit != unit) continue;
    const int64_t begin = first > s->first ? first : s->first;
    const int64_t end = first + numel < s->first + PHX_BLOCK ? first + numel : s->first + PHX_BLOCK;
    if (begin >= end) continue;
    status = phx__state_read(c->rt, PHX_SPACE_DEVICE, gradient + (begin - first),
                             (end - begin) * (int64_t)sizeof *gradient, copy_part, c->part[i] + (begin - s->first),
                             err);
    phx__range r = {0};
    while (!status && phx__layout_next(c->rt->prepared->model, unit, PHX_FLAT_TRAINABLE, begin, end - begin, &r))
      status = compare(c, call, i, &r, err);
  }
  return status;
}
