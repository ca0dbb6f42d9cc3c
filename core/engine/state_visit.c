/* core/engine/state_visit.c - see state_visit.h. */
#include "engine/state_visit.h"

#include "base/status.h"
#include "engine/handed.h"
#include "plugin/where.h"

typedef struct visit {
  phx__runtime *rt;
  phx__slice_fn *use;
  void *ctx;
} visit;

/* 0: weights, or the masters they stand behind; 1 and on: states of the optimizer. */
static uint32_t counted_as(const phx_slice *s) { return s->kind == PHX_STATE_OPTIM ? 1 + s->state_index : 0; }

/* From here on a slice has our size: it is copied and kept, and the strategy may know more fields than this core. */
static phx_status see(void *ctx, const phx_slice *given, phx_error *err) {
  const visit *v = ctx;
  phx__runtime *rt = v->rt;
  phx_slice known = {.struct_size = sizeof known};
  const phx_slice *const s = &known;
  phx_status status = phx__handed_slice(rt, given, err);
  if (status) return status;
  phx_struct_take(&known, given);
  const bool counts = s->kind < PHX_STATE_BUFFER && !phx__state_derived(s);
  if (counts && !phx__cover_add(&rt->state_cover, counted_as(s), s->unit, s->flat, s->first_block * PHX_BLOCK,
                                s->blocks * PHX_BLOCK))
    return phx_fail(err, PHX_INTERNAL,
                    "strategy %s: visit_state: this rank names blocks of unit %u (%s), state %d, more than once",
                    rt->config->strategy.plugin->descriptor->id, s->unit,
                    phx_model_unit(rt->prepared->model, s->unit)->name, s->kind);
  if (v->use) status = v->use(v->ctx, s, err);
  phx__enter(rt->job, PHX_KIND_STRATEGY, PHX_IN_STATE, -1); /* its call goes on */
  return status;
}

phx_status phx__state_visit(phx__runtime *rt, phx__slice_fn *use, void *ctx, phx_error *err) {
  visit v = {rt, use, ctx};
  const phx_visitor visitor = {.struct_size = sizeof visitor, .ctx = &v, .slice = see};
  phx__cover_clear(&rt->state_cover);
  return PHX__IN_STRATEGY(rt->job, PHX_IN_STATE, -1,
                          rt->prepared->strategy->visit_state(rt->strategy, &visitor, err));
}

phx_status phx__state_covered(phx__runtime *rt, phx_error *err) {
  const char *names[1 + PHX_OPTIM_STATES_MAX] = {"the weights"};
  const int64_t n = phx__cover_size(&rt->state_cover);
  const phx_comm *c = rt->core;
  phx_error why = PHX_ERROR_INIT;
  for (uint32_t k = 0; k < rt->optim.table.n_states; k++) names[1 + k] = rt->optim.table.states[k].name;
  int64_t *words = rt->state_words;
  phx__cover_words(&rt->state_cover, words);
  phx_status status = PHX__IN_COMM(rt->job, c->all_reduce(c->ctx, words, words, n, PHX_I64, PHX_SUM, NULL, err));
  if (!status && phx__cover_judge(&rt->state_cover, words, false, names, "named", &why))
    status = phx_fail(err, why.code, "strategy %s: visit_state: %s", rt->config->strategy.plugin->descriptor->id,
                      why.message);
  return status;
}
