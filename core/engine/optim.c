/* core/engine/optim.c - see optim.h.
 *
 * A ticket is split at parameter borders; padding is skipped.  The device's kernels are elementwise, so slicing does
 * not change the bits.  Scalars are computed in double and rounded once. */
#include "engine/optim.h"

#include <math.h>

#include "base/status.h"
#include "engine/layout.h"

enum { ADAMW = 0, SGD = 1 };

double phx__optim_lr(const phx__settings *s, int64_t step) {
  const double peak = s->optimizer.lr, final = peak * s->optimizer.final;
  const int64_t warmup = s->optimizer.warmup, last = s->run.steps;
  if (step <= warmup) return peak * (double)step / (double)warmup;
  double done = last > warmup ? (double)(step - warmup) / (double)(last - warmup) : 1.0;
  if (done > 1.0) done = 1.0;
  switch (s->optimizer.schedule) {
    case 1: return peak + (final - peak) * done;
    case 2: return final + (peak - final) * 0.5 * (1.0 + cos(3.14159265358979323846 * done));
  }
  return peak;
}

static phx_status update_range(const phx__optim *o, const phx_ticket *t, const phx__range *r, float scale,
                               phx_error *err) {
  const phx__settings *s = o->settings;
  const int64_t skip = r->first - t->first;
  const size_t low_bytes = phx_dtype_bytes(t->weight_dtype);
  float *w = t->master ? t->master + skip : (float *)t->weight + skip;
  void *low = t->master && t->weight ? (char *)t->weight + (size_t)skip * low_bytes : NULL;
  const float *g = (const float *)t->gradient + skip;
  const float decay = r->param->flags & PHX_PARAM_DECAY ? (float)s->optimizer.weight_decay : 0.0f;
  const float lr = (float)o->lr;
  if (s->optimizer.name == SGD)
    return o->ops->sgd(o->ops->ctx, w, g, low, t->weight_dtype, r->numel, scale, lr, decay, t->stream, err);
  const float c1 = (float)(1.0 - pow(s->optimizer.beta1, (double)o->step));
  const float c2 = (float)(1.0 - pow(s->optimizer.beta2, (double)o->step));
  return o->ops->adamw(o->ops->ctx, w, g, (float *)t->states[0] + skip, (float *)t->states[1] + skip, low,
                       t->weight_dtype, r->numel, scale, lr, (float)s->optimizer.beta1, (float)s->optimizer.beta2, c1,
                       c2, (float)s->optimizer.eps, decay, t->stream, err);
}

phx_status phx__optim_state_changes(const phx__optim *o, phx_error *err) {
  return o->before_change ? o->before_change(o->before_change_arg, NULL, 0, err) : PHX_OK;
}

/* A save in the background may still have to read what the ticket changes. */
static phx_status warn_reader(const phx__optim *o, const phx_ticket *t, phx_error *err) {
  if (!o->before_change) return PHX_OK;
  const struct {
    const void *p;
    int32_t dtype;
  } parts[2] = {{t->weight, t->weight_dtype}, {t->master, PHX_F32}};
  for (int i = 0; i < 2; i++) {
    if (!parts[i].p) continue;
    const int64_t bytes = t->numel * (int64_t)phx_dtype_bytes(parts[i].dtype);
    PHX_TRY(o->before_change(o->before_change_arg, parts[i].p, bytes, err));
  }
  for (uint32_t k = 0; k < o->table.n_states; k++) {
    const int64_t bytes = t->numel * (int64_t)phx_dtype_bytes(o->table.states[k].dtype);
    PHX_TRY(o->before_change(o->before_change_arg, t->states[k], bytes, err));
  }
  return PHX_OK;
}

static phx_status optim_update(void *ctx, const phx_ticket *t, float scale, phx_error *err) {
  const phx__optim *o = ctx;
  if (o->step < 1) return phx_fail(err, PHX_STATE, "an optimizer ticket came outside update()");
  if (o->on_ticket) PHX_TRY(o->on_ticket(o->on_ticket_arg, t, scale, err));
  if (t->gradient_dtype != PHX_F32 || (!t->master && t->weight_dtype != PHX_F32))
    return phx_fail(err, PHX_UNSUPPORTED, "%s needs fp32 gradients and fp32 weights or masters (unit %u)",
                    o->table.name, t->unit);
  if (t->unit >= o->model->n_units || t->first < 0 || t->numel < 0 ||
      t->first + t->numel > phx_model_unit(o->model, t->unit)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK)
    return phx_fail(err, PHX_INVALID, "optimizer ticket for unit %u, elements %lld + %lld: out of range", t->unit,
                    (long long)t->first, (long long)t->numel);
  PHX_TRY(warn_reader(o, t, err));
  phx__range range = {0};
  while (phx__layout_next(o->model, t->unit, PHX_FLAT_TRAINABLE, t->first, t->numel, &range)) {
    const phx_status status = update_range(o, t, &range, scale, err);
    if (status)
      return phx_fail_more(err, status, "; in the update of unit %u (%s)", t->unit,
                           phx_model_unit(o->model, t->unit)->name);
  }
  return o->after_ticket ? o->after_ticket(o->after_ticket_arg, t, err) : PHX_OK;
}

void phx__optim_states(const phx__settings *settings, phx_optim *out) {
  *out = (phx_optim){.struct_size = sizeof *out, .name = settings->optimizer.name == SGD ? "sgd" : "adamw",
                     .grain = PHX_GRAIN_ELEMENT};
  if (settings->optimizer.name == SGD) return;
  out->n_states = 2;
  out->states[0] = (phx_optim_state){"m", PHX_F32, 0};
  out->states[1] = (phx_optim_state){"v", PHX_F32, 0};
}

void phx__optim_init(phx__optim *o, const phx__settings *settings, const phx_model *model, const phx_ops *ops) {
  *o = (phx__optim){.settings = settings, .model = model, .ops = ops};
  phx__optim_states(settings, &o->table);
  o->table.ctx = o;
  o->table.update = optim_update;
}
