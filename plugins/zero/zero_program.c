/* plugins/zero/zero_program.c - stage 3: which unit is gathered, and which is dropped, before each pass of a
 * micro-batch.
 *
 * The declared order of stages is played once: what a pass needs is gathered, then what comes next while
 * stage3_prefetch_bucket_size allows, and never more than stage3_max_live_parameters are live.  Whatever fits stays, so
 * that backward finds what forward gathered; when room is wanted, what is needed last leaves (Belady, IBM Systems
 * Journal 5(2), 1966; DeepSpeed guesses the same by a reuse distance). Invariant: windows that are live together do not
 * overlap; every rank makes the same program. */
#include "zero.h"
#include <stdlib.h>
#include <string.h>

typedef struct player {
  const zero_plan *plan;
  zero_program *out;
  int64_t *offset; /* (n_units) in the pool, -1: not gathered */
  uint8_t *ahead;  /* (n_units) gathered ahead and not yet used */
  int64_t live, ahead_numel;
  phx_kit_pool pool;
} player;

static bool needs(const zero_plan *p, const zero_program *out, uint32_t position, uint32_t unit) {
  uint32_t n = p->model->n_stages;
  bool backward = position >= n;
  if (position >= out->n_positions || p->window[unit] == 0) return false;
  const phx_stage *stage = phx_model_stage(p->model, backward ? 2 * n - 1 - position : position);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(p->model, stage->first_use + i);
    if (use->unit == unit && (use->flags & (backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD))) return true;
  }
  return false;
}

static uint32_t next_use(const player *p, uint32_t unit, uint32_t position) {
  while (position < p->out->n_positions && !needs(p->plan, p->out, position, unit)) position++;
  return position;
}

static phx_status act(player *p, uint32_t unit, bool gather, phx_error *err) {
  zero_program *out = p->out;
  int64_t offset = -1;
  if (out->n_actions == out->room) {
    uint32_t room = out->room ? 2 * out->room : 64;
    zero_action *more = realloc(out->actions, room * sizeof *more);
    if (!more) return phx_kit_fail(err, PHX_NOMEM, "no memory for the program of gathers");
    out->actions = more;
    out->room = room;
  }
  if (!gather) phx_kit_pool_give_back(&p->pool, p->offset[unit]);
  if (gather) {
    phx_status status = phx_kit_pool_take(&p->pool, p->plan->window[unit], &offset, err);
    if (status != PHX_OK) return status;
  }
  out->actions[out->n_actions++] = (zero_action){.unit = unit, .offset = offset};
  p->live += offset < 0 ? -p->plan->window[unit] : p->plan->window[unit];
  p->offset[unit] = offset;
  return PHX_OK;
}

/* Drops what is needed last until `numel` elements may be gathered; only what is needed after position `before`. */
static phx_status make_room(player *p, int64_t numel, uint32_t position, uint32_t before, bool *made, phx_error *err) {
  *made = false;
  while (p->live > p->plan->max_live - numel) {
    uint32_t victim = UINT32_MAX, farthest = before;
    for (uint32_t u = 0; u < p->plan->model->n_units; u++) {
      if (p->offset[u] < 0 || needs(p->plan, p->out, position, u)) continue;
      uint32_t use = next_use(p, u, position);
      if (use > farthest) farthest = use, victim = u;
    }
    if (victim == UINT32_MAX) return PHX_OK;
    if (p->ahead[victim]) p->ahead_numel -= p->plan->window[victim];
    p->ahead[victim] = 0;
    phx_status status = act(p, victim, false, err);
    if (status != PHX_OK) return status;
  }
  *made = true;
  return PHX_OK;
}

static phx_status play_position(player *p, uint32_t position, phx_error *err) {
  const zero_plan *plan = p->plan;
  uint32_t n_units = plan->model->n_units, end = p->out->n_positions;
  phx_status status = PHX_OK;
  bool made = true;
  for (uint32_t u = 0; u < n_units; u++)
    if (p->offset[u] >= 0 && next_use(p, u, position) == end) PHX_KIT_TRY(act(p, u, false, err));
  for (uint32_t u = 0; u < n_units; u++) {
    if (!needs(plan, p->out, position, u)) continue;
    if (p->ahead[u]) p->ahead_numel -= plan->window[u];
    p->ahead[u] = 0;
    if (p->offset[u] >= 0) continue;
    PHX_KIT_TRY(make_room(p, plan->window[u], position, position, &made, err));
    if (!made)
      return phx_kit_fail(
          err, PHX_INVALID,
          "stage3_max_live_parameters = %lld is too small: stage '%s' alone gathers more elements at "
          "once; make it larger, or auto",
          (long long)plan->max_live,
          phx_model_stage(plan->model,
                          position < plan->model->n_stages ? position : 2 * plan->model->n_stages - 1 - position)
              ->name);
    PHX_KIT_TRY(act(p, u, true, err));
  }
  for (uint32_t q = position + 1; q < end; q++)
    for (uint32_t u = 0; u < n_units; u++) {
      if (!needs(plan, p->out, q, u) || p->offset[u] >= 0) continue;
      if (p->ahead_numel >= plan->config->stage3_prefetch_bucket_size) return PHX_OK;
      PHX_KIT_TRY(make_room(p, plan->window[u], position, q, &made, err));
      if (!made) return PHX_OK; /* nothing that is used later overtakes */
      PHX_KIT_TRY(act(p, u, true, err));
      p->ahead[u] = 1;
      p->ahead_numel += plan->window[u];
    }
done:
  return status;
}

phx_status zero_program_create(zero_plan *plan, uint32_t n_positions, zero_program *out, phx_error *err) {
  uint32_t n_units = plan->model->n_units;
  player p = {
      .plan = plan, .out = out, .offset = calloc(n_units + 1u, sizeof *p.offset), .ahead = calloc(n_units + 1u, 1)};
  phx_status status = PHX_OK;
  out->n_positions = n_positions;
  out->first = calloc(n_positions + 1u, sizeof *out->first);
  if (!p.offset || !p.ahead || !out->first) {
    status = phx_kit_fail(err, PHX_NOMEM, "no memory to plan the gathers of %u units", n_units);
    goto done;
  }
  for (uint32_t u = 0; u < n_units; u++) p.offset[u] = -1;
  for (uint32_t position = 0; position < n_positions; position++) {
    out->first[position] = out->n_actions;
    PHX_KIT_TRY(play_position(&p, position, err));
  }
  out->first[n_positions] = out->n_actions;
  if (p.pool.numel > plan->pool) plan->pool = p.pool.numel;
done:
  phx_kit_pool_destroy(&p.pool);
  free(p.offset);
  free(p.ahead);
  return status;
}

int64_t zero_enough_live(const zero_plan *p) {
  const zero_program all = {.n_positions = 2 * p->model->n_stages};
  int64_t most = 0;
  for (uint32_t position = 0; position < all.n_positions; position++) {
    int64_t own = 0, ahead = 0;
    for (uint32_t u = 0; u < p->model->n_units; u++)
      if (needs(p, &all, position, u)) own += p->window[u];
    for (uint32_t q = position + 1; q < all.n_positions; q++)
      for (uint32_t u = 0; u < p->model->n_units && ahead < p->config->stage3_prefetch_bucket_size; u++) {
        bool seen = !needs(p, &all, q, u);
        for (uint32_t before = position; before < q && !seen; before++) seen = needs(p, &all, before, u);
        if (!seen) ahead += p->window[u];
      }
    if (own + ahead > most) most = own + ahead;
  }
  return most;
}

void zero_program_destroy(zero_program *p) {
  free(p->actions);
  free(p->first);
  memset(p, 0, sizeof *p);
}
