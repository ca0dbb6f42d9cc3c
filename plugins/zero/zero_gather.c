/* plugins/zero/zero_gather.c - stage 3: weights for a pass, unit by unit.
 *
 * Every gather runs on the communication stream, after what compute was given before it (its memory may have been a
 * window that compute still reads), and compute waits for exactly the last gather that a pass needs.  A piece comes
 * from its owner by broadcast, straight from the owner's share; a unit that lies in one share is never copied there. */
#include "zero.h"
#include <stdlib.h>
#include <string.h>

/* Where the owner keeps the unit's flat, if all of it is this rank's; else NULL, also where copies are asked for. */
static char *owned(const zero_rank *r, uint32_t unit, uint32_t flat) {
  const zero_plan *p = &r->plan;
  const phx_kit_shard *mine = &p->shard[flat];
  const phx_unit *u = phx_model_unit(p->model, unit);
  int64_t first = u->first_block[flat] - mine->first;
  if (p->topology->world_size == 1 && p->several) return NULL;
  if (u->blocks[flat] == 0 || first < 0 || first + u->blocks[flat] > mine->blocks) return NULL;
  return zero_weights(r, ZERO_WEIGHT + flat, first * PHX_BLOCK);
}

static void place_weights(const zero_rank *r, zero_gathering *now) {
  const phx_model *m = r->plan.model;
  for (uint32_t u = 0; u < m->n_units; u++)
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
      if (phx_model_unit(m, u)->blocks[flat] == 0) continue;
      now->places[u].weight[flat] =
          r->plan.config->stage == 3
              ? owned(r, u, flat)
              : zero_weights(r, ZERO_WEIGHT + flat, zero_unit_first(&r->plan, u, flat));
    }
}

static phx_status gather_unit(const zero_rank *r, zero_gathering *now, uint32_t u, int64_t offset, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_comm *c = r->s.comm;
  const phx_device *d = r->s.device;
  char *window[PHX_FLATS], *home[PHX_FLATS];
  int64_t size = phx_kit_weight_bytes(p->topology);
  window[PHX_FLAT_TRAINABLE] = zero_weights(r, ZERO_POOL, offset);
  window[PHX_FLAT_FROZEN] =
      window[PHX_FLAT_TRAINABLE] + phx_model_unit(p->model, u)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK * size;
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) home[flat] = owned(r, u, flat);
  c->annotate(c->ctx, (int32_t)u);
  for (uint32_t i = p->gathers.first[u]; i < p->gathers.first[u + 1]; i++) {
    const zero_piece *piece = &p->gathers.of[i];
    char *here = window[piece->flat] + (piece->at - zero_unit_first(p, u, piece->flat)) * size, *from = here;
    if (piece->owner == c->rank) {
      from = zero_weights(r, ZERO_WEIGHT + piece->flat, piece->at - zero_share(p, piece->flat) * c->rank);
      if (!home[piece->flat]) PHX_TRY(d->copy(d->ctx, here, from, piece->numel * size, r->s.stream, err));
    }
    PHX_TRY(c->broadcast(c->ctx, from, piece->numel, p->topology->compute_dtype, piece->owner, r->s.stream, err));
  }
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
    now->places[u].weight[flat] = home[flat] ? home[flat] : window[flat];
  now->number[u] = ++now->n_gathers;
  PHX_TRY(d->event_record(d->ctx, r->gathered[u], r->s.stream, err));
  return PHX_OK;
}

static void drop_unit(const zero_rank *r, zero_gathering *now, uint32_t u) {
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) now->places[u].weight[flat] = owned(r, u, flat);
  now->number[u] = 0;
}

void zero_begin_program(const zero_rank *r, zero_gathering *now, const phx_kit_program *program) {
  now->program = program;
  now->next = now->n_gathers = 0;
  for (uint32_t u = 0; r->plan.config->stage == 3 && u < r->plan.model->n_units; u++) drop_unit(r, now, u);
}

phx_status zero_gathering_create(const zero_rank *r, phx_kit_place *places, zero_gathering *out, phx_error *err) {
  uint32_t n_units = r->plan.model->n_units;
  *out = (zero_gathering){.places = places, .number = calloc(n_units + 1u, sizeof *out->number)};
  if (!out->number) return phx_fail(err, PHX_NOMEM, "no memory to count the gathers of %u units", n_units);
  place_weights(r, out);
  zero_begin_program(r, out, &r->plan.train);
  return PHX_OK;
}

void zero_gathering_destroy(zero_gathering *now) {
  free(now->number);
  memset(now, 0, sizeof *now);
}

/* What left after the pass before, then what this one gathers, dropping what makes room.  Gradients are reduced by
 * bucket, and not where the program says REDUCE (zero_reduce.c). */
static phx_status run_actions(const zero_rank *r, zero_gathering *now, uint32_t position,
                              phx_stream *stream, phx_error *err) {
  const phx_kit_program *g = now->program;
  bool marked = false;
  for (uint32_t i = position > 0 ? g->first[2 * position - 1] : 0; i < g->first[2 * position + 1]; i++) {
    const phx_kit_action *a = &g->actions[i];
    if (a->what == PHX_KIT_DROP) drop_unit(r, now, a->unit);
    if (a->what != PHX_KIT_GATHER) continue;
    if (!marked) PHX_TRY(phx_kit_after(&r->s, r->mark[0], stream, r->s.stream, err));
    marked = true;
    PHX_TRY(gather_unit(r, now, a->unit, a->offset, err));
  }
  return PHX_OK;
}

phx_status zero_gather(const zero_rank *r, zero_gathering *now, uint32_t s, int32_t pass, phx_stream *stream,
                       phx_event **ready, phx_error *err) {
  const phx_model *m = r->plan.model;
  uint32_t position = phx_kit_position(m, s, pass), last = 0;
  *ready = zero_whole_ready(r, s, pass);
  if (r->plan.config->stage < 3) return PHX_OK;
  if (pass == PHX_PASS_EVALUATE && s == 0) zero_begin_program(r, now, &r->plan.evaluate);
  if (position > now->next || position + 1 < now->next || position >= now->program->n_positions)
    return phx_fail(err, PHX_STATE,
                    "stage '%s' came out of order: its weights are gathered in the declared order of stages",
                    phx_model_stage(m, s)->name);
  if (position == now->next) { /* else a recomputation has done it */
    PHX_TRY(run_actions(r, now, position, stream, err));
    now->next++;
  }
  const phx_stage *stage = phx_model_stage(m, s);
  for (uint32_t i = 0; i < stage->n_uses; i++) { /* one stream, one order: the latest gather stands for all */
    const phx_use *use = phx_model_use(m, stage->first_use + i);
    uint32_t reads = pass == PHX_PASS_BACKWARD ? PHX_USE_BACKWARD : PHX_USE_FORWARD;
    if (!(use->flags & reads) || r->plan.window[use->unit] == 0) continue;
    if (now->number[use->unit] == 0)
      return phx_fail(err, PHX_UNSUPPORTED,
                      "stage '%s' recomputes with unit '%s', which its backward pass does not read: do not "
                      "checkpoint this stage",
                      stage->name, phx_model_unit(m, use->unit)->name);
    if (now->number[use->unit] <= last) continue;
    last = now->number[use->unit];
    *ready = r->gathered[use->unit];
  }
  return PHX_OK;
}

void zero_gather_traffic(const zero_plan *p, phx_estimate *out) {
  for (uint32_t a = 0; a < p->train.n_actions; a++) {
    uint32_t u = p->train.actions[a].unit;
    if (p->train.actions[a].what != PHX_KIT_GATHER) continue;
    for (uint32_t i = p->gathers.first[u]; i < p->gathers.first[u + 1]; i++)
      phx_kit_estimate_call(out, p->topology, PHX_OP_BROADCAST, p->gathers.of[i].numel,
                            p->topology->compute_dtype, p->gathers.of[i].owner, p->topology->accumulate);
  }
}
