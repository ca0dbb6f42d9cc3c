/* core/engine/optim.c - see optim.h.
 *
 * A ticket is cut at the borders of parameters; padding is skipped.  What a piece must keep together is promised by the
 * strategy before the run, and checked here on every piece. */
#include "engine/optim.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/status.h"
#include "config/option.h"
#include "engine/layout.h"
#include "plugin/suspect.h"
#include "plugin/where.h"

enum { CONSTANT = 0, LINEAR = 1, COSINE = 2 }; /* optimizer.schedule */

static const char *const grain_names[] = {"single elements", "whole blocks", "whole rows", "whole tensors"};

double phx__optim_lr(const phx__settings *s, int64_t step) {
  const double peak = s->optimizer.lr, final = peak * s->optimizer.final;
  const int64_t warmup = s->optimizer.warmup, last = s->run.steps;
  if (step <= warmup) return peak * (double)step / (double)warmup;
  double done = last > warmup ? (double)(step - warmup) / (double)(last - warmup) : 1.0;
  if (done > 1.0) done = 1.0;
  switch (s->optimizer.schedule) {
    case LINEAR: return peak + (final - peak) * done;
    case COSINE: return final + (peak - final) * 0.5 * (1.0 + cos(3.14159265358979323846 * done));
  }
  return peak;
}

/* ---- what an optimizer says of itself ---- */
static const char *id_of(const phx__config *c) { return c->optimizer.plugin->descriptor->id; }

/* A state's name stands beside these in checkpoints and hashes. */
static bool is_taken(const phx_optimizer_facts *facts, uint32_t state) {
  static const char *const kinds[] = {"weight", "master", "optim", "buffer", "private"};
  const char *name = facts->states[state].name;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (!strcmp(name, kinds[i])) return true;
  for (uint32_t i = 0; i < state; i++)
    if (!strcmp(name, facts->states[i].name)) return true;
  return false;
}

static phx_status check_state(const char *id, const phx_optimizer_facts *facts, uint32_t i, phx_error *err) {
  static const char *const pers[] = {"element", "block", "row", "tensor"};
  const phx_optim_state *s = &facts->states[i];
  if (!s->name || !phx__name_is_plain(s->name, 32))
    return phx_fail(err, PHX_INVALID, "optimizer %s: the name of state %u is not of the form [a-z0-9_]{1,32}", id, i);
  if (is_taken(facts, i))
    return phx_fail(err, PHX_INVALID, "optimizer %s: state %u is called '%s', which is the name of another state", id,
                     i, s->name);
  if (phx_dtype_bytes(s->dtype) == 0 || s->per < PHX_PER_ELEMENT || s->per > PHX_PER_TENSOR)
    return phx_fail(err, PHX_INVALID, "optimizer %s: state '%s' has dtype %d, and one value per %d: not known", id,
                     s->name, s->dtype, s->per);
  if (s->dtype == PHX_F32 && s->per == PHX_PER_ELEMENT) return PHX_OK;
  return phx_fail(err, PHX_UNSUPPORTED,
                   "optimizer %s: state '%s' has dtype %d and one value per %s: checkpoints and state hashes of this "
                   "version hold fp32, one value per element",
                   id, s->name, s->dtype, pers[s->per]);
}

phx_status phx__optim_describe(const phx__config *c, phx_optim *out, phx_error *err) {
  const phx_optimizer_table *table = c->optimizer.plugin->descriptor->table;
  phx_optimizer_facts facts = {.struct_size = sizeof facts};
  PHX_TRY(PHX__SUSPECT(c->optimizer.plugin->path, "in describe", table->describe(c->optimizer.config, &facts, err),
                       err));
  if (facts.struct_size != sizeof facts || facts.n_states > PHX_OPTIM_STATES_MAX || facts.grain < PHX_GRAIN_ELEMENT ||
      facts.grain > PHX_GRAIN_TENSOR)
    return phx_fail(err, PHX_INVALID,
                     "optimizer %s: describe gave %u states and grain %d, and struct_size %zu of %zu: %d states and "
                     "grain %d are the most",
                     id_of(c), facts.n_states, facts.grain, facts.struct_size, sizeof facts, PHX_OPTIM_STATES_MAX,
                     PHX_GRAIN_TENSOR);
  for (uint32_t i = 0; i < facts.n_states; i++) PHX_TRY(check_state(id_of(c), &facts, i, err));
  *out = (phx_optim){.struct_size = sizeof *out, .name = id_of(c), .grain = facts.grain, .n_states = facts.n_states};
  memcpy(out->states, facts.states, facts.n_states * sizeof *facts.states);
  return PHX_OK;
}

phx_status phx__optim_check_grain(const phx__prepared *p, phx_error *err) {
  const char *strategy = p->config->strategy.plugin->descriptor->id;
  const int32_t gives = p->estimate.grain, needs = p->optim.grain;
  if (gives < PHX_GRAIN_ELEMENT || gives > PHX_GRAIN_TENSOR)
    return phx_fail(err, PHX_INVALID, "strategy %s plans with grain %d: expected 0 to %d", strategy, gives,
                     PHX_GRAIN_TENSOR);
  /* a row need not end where a block ends */
  if (needs == PHX_GRAIN_ELEMENT || gives == needs || gives == PHX_GRAIN_TENSOR) return PHX_OK;
  return phx_fail(err, PHX_UNSUPPORTED,
                   "optimizer %s needs %s, and strategy %s cuts to %s here: choose a strategy that keeps whole tensors "
                   "on a rank, such as ddp, or another optimizer",
                   p->optim.name, grain_names[needs], strategy, grain_names[gives]);
}

/* ---- update ---- */
phx_status phx__optim_state_changes(const phx__optim *o, phx_error *err) {
  return o->before_change ? o->before_change(o->before_change_arg, NULL, 0, err) : PHX_OK;
}

/* Does the range keep together what the optimizer needs? */
static bool is_whole(const phx__range *r, int32_t grain) {
  const int64_t end = r->in_param + r->numel, row = phx_param_row(r->param);
  const bool begins = r->in_param == 0, ends = end == r->param->numel;
  switch (grain) {
    case PHX_GRAIN_TENSOR: return begins && ends;
    case PHX_GRAIN_ROW: return r->in_param % row == 0 && end % row == 0;
    case PHX_GRAIN_BLOCK:
      return (begins || r->first % PHX_BLOCK == 0) && (ends || (r->first + r->numel) % PHX_BLOCK == 0);
  }
  return true;
}

static phx_status update_range(const phx__optim *o, const phx_ticket *t, const phx__range *r, float scale,
                               phx_error *err) {
  const phx__config *c = o->prepared->config;
  const int64_t skip = r->first - t->first;
  if (!is_whole(r, o->table.grain))
    return phx_fail(err, PHX_INTERNAL,
                     "strategy %s: update: a ticket has elements %" PRId64 " to %" PRId64 " of parameter %s, which has "
                     "%" PRId64 "; optimizer %s needs %s, and the strategy's estimate promises them",
                     c->strategy.plugin->descriptor->id, r->in_param, r->in_param + r->numel, r->param->name,
                     r->param->numel, o->table.name, grain_names[o->table.grain]);
  const phx_model *m = o->prepared->model;
  phx_piece piece = {.struct_size = sizeof piece,
                     .param = phx_model_unit(m, t->unit)->first_param + r->next - 1, /* next: behind this one */
                     .place = t->place, .first = r->in_param, .numel = r->numel, .scale = scale, .lr = o->lr,
                     .step = o->step, .stream = t->stream};
  piece.weight = (t->master ? t->master : (float *)t->weight) + skip;
  if (t->master && t->weight) {
    piece.low = (char *)t->weight + skip * (int64_t)phx_dtype_bytes(t->weight_dtype);
    piece.low_dtype = t->weight_dtype;
  }
  piece.gradient = (const float *)t->gradient + skip;
  for (uint32_t k = 0; k < o->table.n_states; k++)
    piece.states[k] = (char *)t->states[k] + skip * (int64_t)phx_dtype_bytes(o->table.states[k].dtype);
  if (r->param->flags & PHX_PARAM_DECAY) piece.decay = c->s.optimizer.weight_decay;
  PHX_TRY(PHX__IN(o->job, PHX_KIND_OPTIMIZER, PHX_IN_UPDATE, -1,
                  o->prepared->optimizer->update(o->self, &piece, err)));
  phx__enter(o->job, PHX_KIND_STRATEGY, PHX_IN_UPDATE, -1); /* its call goes on */
  return PHX_OK;
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
  const phx_model *m = o->prepared->model;
  if (o->step < 1) return phx_fail(err, PHX_STATE, "an optimizer ticket came outside update()");
  if (o->on_ticket) PHX_TRY(o->on_ticket(o->on_ticket_arg, t, scale, err));
  if (t->gradient_dtype != PHX_F32 || (!t->master && t->weight_dtype != PHX_F32))
    return phx_fail(err, PHX_UNSUPPORTED, "%s needs fp32 gradients and fp32 weights or masters (unit %u)",
                     o->table.name, t->unit);
  if (t->unit >= m->n_units || t->first < 0 || t->numel < 0 ||
      t->first + t->numel > phx_model_unit(m, t->unit)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK)
    return phx_fail(err, PHX_INVALID, "optimizer ticket for unit %u, elements %lld + %lld: out of range", t->unit,
                     (long long)t->first, (long long)t->numel);
  PHX_TRY(warn_reader(o, t, err));
  phx__range range = {0};
  while (phx__layout_next(m, t->unit, PHX_FLAT_TRAINABLE, t->first, t->numel, &range)) {
    const phx_status status = update_range(o, t, &range, scale, err);
    phx__where_reason(o->job, status, err);
    if (status)
      return phx_fail_more(err, status, "; in the update of unit %u (%s)", t->unit, phx_model_unit(m, t->unit)->name);
  }
  return o->after_ticket ? o->after_ticket(o->after_ticket_arg, t, err) : PHX_OK;
}

void phx__optim_init(phx__optim *o, const phx__prepared *prepared, const phx_job *job, phx_optimizer_self *self) {
  *o = (phx__optim){.table = prepared->optim, .prepared = prepared, .job = job, .self = self};
  o->table.ctx = o;
  o->table.update = optim_update;
}
