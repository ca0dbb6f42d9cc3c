/* core/engine/step_check.c - see step_check.h. */
#include "engine/step_check.h"

#include <stdlib.h>

#include "base/status.h"
#include "base/sys.h"
#include "engine/handed.h"
#include "plugin/where.h"

static const char *id_of(const phx__step_check *c) { return c->rt->config->strategy.plugin->descriptor->id; }

static phx_status keep_range(phx__step_check *c, const phx_ticket *t, phx_error *err) {
  if (c->n_ranges == c->room) {
    const size_t room = c->room ? 2 * c->room : 64;
    phx__update_range *more = phx__sys.realloc(c->ranges, room * sizeof *more);
    if (!more) return phx_fail(err, PHX_NOMEM, "no memory for the list of %zu tickets", room);
    c->ranges = more;
    c->room = room;
  }
  c->ranges[c->n_ranges++] = (phx__update_range){t->unit, t->first, t->first + t->numel};
  return PHX_OK;
}

static phx_status take_ticket(void *arg, const phx_ticket *t, float scale, phx_error *err) {
  phx__step_check *c = arg;
  PHX_TRY(phx__handed_ticket(c->rt, t, scale, err));
  phx__cover_add(&c->update, 0, t->unit, PHX_FLAT_TRAINABLE, t->first, t->numel);
  PHX_TRY(keep_range(c, t, err));
  if (!c->gradients || t->gradient_dtype != PHX_F32) return PHX_OK;
  return phx__gradient_check_given(c->gradients, "update", t->unit, t->first, t->numel, t->gradient, t->stream, err);
}

phx_status phx__step_check_open(phx__runtime *rt, phx__step_check *out, phx_error *err) {
  *out = (phx__step_check){.rt = rt};
  PHX_TRY(phx__cover_open(rt->prepared->model, 1, &out->norm, err));
  PHX_TRY(phx__cover_open(rt->prepared->model, 1, &out->update, err));
  if (rt->config->s.run.checked == 1) PHX_TRY(phx__gradient_check_open(rt, &out->gradients, err));
  out->update.logical = true;
  rt->optim.on_ticket = take_ticket;
  rt->optim.on_ticket_arg = out;
  return PHX_OK;
}

void phx__step_check_close(phx__step_check *c) {
  if (!c->rt) return;
  if (c->rt->optim.on_ticket_arg == c) c->rt->optim.on_ticket = NULL;
  phx__free(c->ranges);
  phx__gradient_check_close(c->gradients);
  phx__cover_close(&c->update);
  phx__cover_close(&c->norm);
  c->rt = NULL;
}

phx_status phx__step_check_norm(phx__step_check *c, uint32_t unit, int64_t first_block, int64_t blocks,
                                const float *gradient, phx_stream *stream, phx_error *err) {
  PHX_TRY(phx__handed_gradient(c->rt, unit, first_block, blocks, gradient, err));
  if (!phx__cover_add(&c->norm, 0, unit, PHX_FLAT_TRAINABLE, first_block * PHX_BLOCK, blocks * PHX_BLOCK))
    return phx_fail(err, PHX_INTERNAL,
                    "strategy %s: gradient_norm: this rank adds blocks of unit %u (%s) more than once", id_of(c), unit,
                    phx_model_unit(c->rt->prepared->model, unit)->name);
  if (!c->gradients) return PHX_OK;
  return phx__gradient_check_given(c->gradients, "gradient_norm", unit, first_block * PHX_BLOCK, blocks * PHX_BLOCK,
                                   gradient, stream, err);
}

int64_t phx__step_check_size(const phx__step_check *c) {
  return phx__cover_size(&c->norm) + phx__cover_size(&c->update);
}

void phx__step_check_words(const phx__step_check *c, int64_t *words) {
  phx__cover_words(&c->norm, words);
  phx__cover_words(&c->update, words + phx__cover_size(&c->norm));
}

static phx_status judge_update(phx__step_check *c, const int64_t *sums, phx_error *err) {
  static const char *const names[] = {"the weights"};
  phx_error why = PHX_ERROR_INIT;
  if (!c->updated) return PHX_OK;
  c->updated = false;
  if (phx__cover_judge(&c->update, sums, true, names, "updated", &why) == PHX_OK) return PHX_OK;
  return phx_fail(err, why.code, "strategy %s: update: %s", id_of(c), why.message);
}

phx_status phx__step_check_judge(phx__step_check *c, const int64_t *sums, phx_error *err) {
  static const char *const names[] = {"the gradients"};
  phx_error why = PHX_ERROR_INIT;
  const phx_status status = judge_update(c, sums + phx__cover_size(&c->norm), err);
  if (status || phx__cover_judge(&c->norm, sums, false, names, "added", &why) == PHX_OK) return status;
  return phx_fail(err, why.code, "strategy %s: gradient_norm: %s", id_of(c), why.message);
}

void phx__step_check_update(phx__step_check *c, float scale) {
  phx__cover_clear(&c->update);
  c->n_ranges = 0;
  c->updated = true;
  c->rt->optim.scale = scale;
}

static int by_place(const void *a, const void *b) {
  const phx__update_range *x = a, *y = b;
  if (x->unit != y->unit) return x->unit < y->unit ? -1 : 1;
  return (x->first > y->first) - (x->first < y->first);
}

phx_status phx__step_check_updated(phx__step_check *c, phx_error *err) {
  if (c->n_ranges > 1) qsort(c->ranges, c->n_ranges, sizeof *c->ranges, by_place);
  for (size_t i = 1; i < c->n_ranges; i++) {
    const phx__update_range *before = &c->ranges[i - 1], *r = &c->ranges[i];
    if (r->unit == before->unit && r->first < before->end && r->first < r->end)
      return phx_fail(err, PHX_INTERNAL,
                      "strategy %s: update: this rank updates element %lld of unit %u (%s) more than once", id_of(c),
                      (long long)r->first, r->unit, phx_model_unit(c->rt->prepared->model, r->unit)->name);
  }
  return PHX_OK;
}

phx_status phx__step_check_last(phx__step_check *c, int64_t *words, phx_error *err) {
  const phx_comm *core = c->rt->core;
  const int64_t n = phx__cover_size(&c->update);
  phx__cover_words(&c->update, words);
  const phx_status status =
      PHX__IN_COMM(c->rt->job, core->all_reduce(core->ctx, words, words, n, PHX_I64, PHX_SUM, NULL, err));
  return status ? status : judge_update(c, words, err);
}
