/* step.c - see hostile.h: views, gradients, norms and tickets that are wrong. */
#include "hostile.h"
#include <stdint.h>

/* ---- communication: gradients that are not reduced ---- */
static phx_status all_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                             phx_stream *s, phx_error *err) {
  (void)ctx;
  if (is(HOSTILE_reduce_nothing) && op == PHX_SUM) return PHX_OK; /* in place: each rank keeps its own */
  if (is(HOSTILE_reduce_half) && op == PHX_SUM) numel /= 2;
  const phx_status status = hostile.comm->all_reduce(hostile.comm->ctx, src, dst, numel, dtype, op, s, err);
  if (status != PHX_OK || op != PHX_SUM || !is(HOSTILE_is_mean)) return status;
  const phx_device *d = hostile.real->extension(hostile.real->ctx, PHX_EXT_DEVICE);
  return d->scale(d->ctx, dst, 1.0f / (float)(hostile.comm->size * hostile.topology->accumulate), numel, s, err);
}

static phx_status reduce_scatter(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                                 phx_stream *s, phx_error *err) {
  const phx_device *d = hostile.real->extension(hostile.real->ctx, PHX_EXT_DEVICE);
  const int64_t bytes = numel * (int64_t)phx_dtype_bytes(dtype);
  (void)ctx;
  if (is(HOSTILE_reduce_nothing) || is(HOSTILE_reduce_half))
    return d->copy(d->ctx, dst, (const char *)src + bytes * hostile.comm->rank, bytes, s, err);
  return hostile.comm->reduce_scatter(hostile.comm->ctx, src, dst, numel, dtype, op, s, err);
}

/* ---- views ---- */
enum { PARAMS_MOST = 64, STALE_BYTES = 1 << 22 };
static phx_view view;
static phx_param_view params[PARAMS_MOST + 1];
_Alignas(PHX_ALIGN) static char stale[STALE_BYTES];
static bool kept[PARAMS_MOST];

/* The weights of the first time, for ever: the update does not reach who computes. */
static void make_stale(phx_param_view *p) {
  const phx_param *param = phx_model_param(hostile.model, p->param);
  const size_t bytes = (size_t)param->numel * phx_dtype_bytes(p->weight_dtype);
  if (p->param >= PARAMS_MOST || p->param != 1 || bytes > STALE_BYTES) return;
  if (!kept[p->param]) memcpy(stale, p->weight, bytes);
  kept[p->param] = true;
  p->weight = stale;
}

static void meddle_view(int32_t pass, const phx_view *real, const phx_view **out) {
  if (real->n_params == 0 || real->n_params > PARAMS_MOST) return;
  view = *real;
  memcpy(params, real->params, real->n_params * sizeof *params);
  view.params = params;
  view.param_stride = sizeof *params;
  *out = &view;
  const uint32_t last = view.n_params - 1;
  const bool backward = pass == PHX_PASS_BACKWARD;
  if (is(HOSTILE_view_null)) *out = NULL;
  if (is(HOSTILE_view_size)) view.struct_size = 8;
  if (is(HOSTILE_view_params)) view.params = NULL;
  if (is(HOSTILE_view_count)) view.n_params--;
  if (is(HOSTILE_view_stride)) view.param_stride = 4;
  if (is(HOSTILE_view_param)) params[last].param = 9999;
  if (is(HOSTILE_view_weight)) params[last].weight = NULL;
  if (is(HOSTILE_view_gradient) && backward) params[last].gradient = NULL;
  if (is(HOSTILE_view_dtype)) params[last].weight_dtype = PHX_F64;
  if (is(HOSTILE_view_gradient_dtype) && backward) params[last].gradient_dtype = PHX_BF16;
  if (is(HOSTILE_view_mode) && backward) params[last].gradient_mode = 9;
  if (is(HOSTILE_view_unaligned)) params[last].weight = (const char *)params[last].weight + 2;
  if (is(HOSTILE_view_beyond) && params[0].weight && params[0].param == 0) /* the first of ddp's, 120 KiB of 136 on */
    params[0].weight = (const char *)params[0].weight + ((size_t)120 << 10);
  for (uint32_t i = 0; is(HOSTILE_view_write) && backward && i <= last; i++)
    if (params[i].gradient) params[i].gradient_mode = PHX_GRAD_WRITE; /* a tied weight's second use, too */
  if (is(HOSTILE_view_stale))
    for (uint32_t i = 0; i <= last; i++)
      if (params[i].weight) make_stale(&params[i]);
}

static void change_frozen(const phx_view *real) {
  for (uint32_t i = 0; i < real->n_params; i++) {
    const phx_param_view *p = &real->params[i];
    if (!p->weight || !(phx_model_param(hostile.model, p->param)->flags & PHX_PARAM_FROZEN)) continue;
    *((float *)(uintptr_t)p->weight + 7) += 1;
    hostile.broken = true;
  }
}

static phx_status acquire(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, phx_stream *stream,
                          const phx_view **out, phx_error *err) {
  const phx_status status = hostile.base->acquire(self, stage, pass, micro_batch, stream, out, err);
  if (status == PHX_OK && is(HOSTILE_frozen_drift) && !hostile.broken) change_frozen(*out);
  if (status == PHX_OK) meddle_view(pass, *out, out);
  return status;
}

static phx_status begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  if (index == 0) hostile.now++;
  if (is(HOSTILE_hidden_step) && !hostile.broken) {
    hostile.broken = true;
    hostile_take_memory((size_t)64 << 20);
  }
  return hostile.base->begin_micro_batch(self, index, last, err);
}

/* ---- the norm ---- */
static const phx_accumulator *inner;
static int64_t added;

static phx_status add(void *ctx, uint32_t unit, int64_t first, int64_t blocks, const float *gradient,
                      phx_stream *stream, phx_error *err) {
  static float other[64 * PHX_BLOCK];
  phx_status status = PHX_OK;
  (void)ctx;
  if (is(HOSTILE_norm_nothing)) return PHX_OK;
  if (added++ == 0) {
    if (is(HOSTILE_norm_missing)) return PHX_OK;
    if (is(HOSTILE_norm_twice)) status = inner->add(inner->ctx, unit, first, blocks, gradient, stream, err);
    if (status != PHX_OK) return status;
    if (is(HOSTILE_norm_beyond)) first += 1000;
    if (is(HOSTILE_norm_before)) first = -1;
    if (is(HOSTILE_norm_unit)) unit = 9999;
    if (is(HOSTILE_norm_empty)) blocks = 0;
    if (is(HOSTILE_norm_null)) gradient = NULL;
    if (is(HOSTILE_norm_unaligned)) gradient = (const float *)(const void *)((const char *)gradient + 1);
    if (is(HOSTILE_norm_other) && blocks <= 64) {
      memcpy(other, gradient, (size_t)blocks * PHX_BLOCK * sizeof *other);
      other[7] += 1;
      gradient = other;
    }
  }
  return inner->add(inner->ctx, unit, first, blocks, gradient, stream, err);
}

static phx_status gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  const phx_accumulator outer = {.struct_size = sizeof outer, .add = add};
  inner = acc;
  added = 0;
  return hostile.base->gradient_norm(self, &outer, err);
}

/* ---- the update ---- */
static int64_t tickets;

/* The first half alone, in the middle of a parameter; the ticket becomes the rest.  fp32 only. */
static phx_status cut(phx_ticket *t, float scale, phx_error *err) {
  const phx_optim *o = hostile.optim;
  phx_ticket head = *t;
  head.numel = t->numel / 2 + 3;
  PHX_TRY(o->update(o->ctx, &head, scale, err));
  t->first += head.numel;
  t->numel -= head.numel;
  t->weight = (float *)t->weight + head.numel;
  t->gradient = (const float *)t->gradient + head.numel;
  for (uint32_t k = 0; k < o->n_states; k++) t->states[k] = (float *)t->states[k] + head.numel;
  return PHX_OK;
}

static phx_status optim_update(void *ctx, const phx_ticket *ticket, float scale, phx_error *err) {
  static float other[64 * PHX_BLOCK];
  const phx_optim *o = hostile.optim;
  phx_ticket t = *ticket;
  (void)ctx;
  if (is(HOSTILE_ticket_nothing)) return PHX_OK;
  if (is(HOSTILE_ticket_overrun) && t.unit == hostile.model->n_units - 1) t.states[0] = (char *)t.states[0] + 2048;
  if (is(HOSTILE_state_drift) && t.unit == hostile.model->n_units - 1) ((float *)t.states[0])[3] += 1e-3f;
  if (tickets++ == 0) {
    if (is(HOSTILE_master_drift)) t.master[3] += 1e-6f;
    if (is(HOSTILE_master_jump)) t.master[3] += 1;
    if (is(HOSTILE_ticket_missing)) return PHX_OK;
    if (is(HOSTILE_ticket_cut)) PHX_TRY(cut(&t, scale, err));
    if (is(HOSTILE_ticket_twice)) PHX_TRY(o->update(o->ctx, &t, scale, err));
    if (is(HOSTILE_ticket_beyond)) t.numel += 1000 * PHX_BLOCK;
    if (is(HOSTILE_ticket_before)) t.first = -4;
    if (is(HOSTILE_ticket_negative)) t.numel = INT64_MIN;
    if (is(HOSTILE_ticket_unit)) t.unit = 9999;
    if (is(HOSTILE_ticket_size)) t.struct_size = 8;
    if (is(HOSTILE_ticket_null)) return o->update(o->ctx, NULL, scale, err);
    if (is(HOSTILE_ticket_weight)) t.weight = t.master = NULL;
    if (is(HOSTILE_ticket_gradient)) t.gradient = NULL;
    if (is(HOSTILE_ticket_state)) t.states[1] = NULL;
    if (is(HOSTILE_ticket_dtype)) t.weight_dtype = 99;
    if (is(HOSTILE_ticket_place)) t.place = 9;
    if (is(HOSTILE_ticket_unaligned)) t.states[0] = (char *)t.states[0] + 1;
    if (is(HOSTILE_ticket_other) && t.numel <= 64 * PHX_BLOCK) {
      memcpy(other, t.gradient, (size_t)t.numel * sizeof *other);
      other[7] += 1;
      t.gradient = other;
    }
    if (is(HOSTILE_ticket_scale)) scale *= 2;
  }
  const phx_status status = o->update(o->ctx, &t, scale, err);
  if (status == PHX_OK && is(HOSTILE_weights_drift) && tickets == 1) ((float *)t.weight)[3] += 1e-3f;
  return status;
}

static phx_status update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  tickets = 0;
  return hostile.base->update(self, step, scale, err);
}

/* ---- in front of the host's extensions ---- */
static const void *extension(void *ctx, const char *id) {
  const void *real = hostile.real->extension(hostile.real->ctx, id);
  (void)ctx;
  if (real && !strcmp(id, PHX_EXT_OPTIM)) {
    hostile.optim = real;
    hostile.own_optim = *hostile.optim;
    hostile.own_optim.update = optim_update;
    return &hostile.own_optim;
  }
  if (real && !strcmp(id, PHX_EXT_COMM)) {
    hostile.comm = real;
    hostile.own_comm = *hostile.comm;
    hostile.own_comm.all_reduce = all_reduce;
    hostile.own_comm.reduce_scatter = reduce_scatter;
    return &hostile.own_comm;
  }
  return real;
}

void hostile_step_open(void) {
  hostile.host = *hostile.real;
  hostile.host.extension = extension;
}

void hostile_step_calls(phx_strategy_table *t) {
  t->acquire = acquire;
  t->begin_micro_batch = begin_micro_batch;
  t->gradient_norm = gradient_norm;
  t->update = update;
}
