/* sdk/kit/program.c - the window planner.
 *
 * The order of stages is declared, so a micro-batch's gathers, gradient windows and drops are known before it runs.
 * This file plays it once and writes it down: which unit is gathered where in the pool, when it leaves, when a gradient
 * is reduced.  estimate() adds the program up, create() keeps it, the step only follows it.
 *
 * Invariant: two windows that are live at the same action do not overlap; the program begins and ends empty; a reduced
 * gradient's window stays until the next reduction is started, so that one reduction always runs beside backward.
 * Does not: move data, know streams.  The order and the bound on what is gathered ahead follow FSDP (arXiv 2304.11277,
 * 3.3.2 prefetching, 3.4 rate limiter). */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

typedef struct player {
  const phx_model *m;
  const phx_kit_policy *policy;
  phx_kit_program *out;
  uint32_t capacity; /* of out->actions */
  phx_kit_pool pool;
  int64_t *weight;                /* (n_units) offset or -1 */
  int64_t *gradient;              /* (n_units) offset or -1 */
  uint32_t *list;                 /* (n_units) what is wanted at a position, in the order of use */
  uint8_t *listed;                /* (n_units) */
  uint32_t n_list, n_needed;      /* the first n_needed are needed now, the rest is ahead */
  uint32_t *pending, n_pending;   /* reduced, window still open */
  int64_t live_units, live_numel; /* gathered now */
} player;

static phx_status act(player *p, int32_t what, uint32_t unit, int64_t offset, phx_error *err) {
  if (p->out->n_actions == p->capacity) {
    uint32_t capacity = p->capacity ? 2 * p->capacity : 64;
    phx_kit_action *more = realloc(p->out->actions, capacity * sizeof *more);
    if (!more) return phx_kit_fail(err, PHX_NOMEM, "no memory for the program of gathers");
    p->out->actions = more;
    p->capacity = capacity;
  }
  p->out->actions[p->out->n_actions++] = (phx_kit_action){what, unit, offset};
  return PHX_OK;
}

static const phx_stage *stage_at(const player *p, uint32_t position, bool *backward) {
  uint32_t n = p->m->n_stages;
  *backward = position >= n;
  return phx_model_stage(p->m, *backward ? 2 * n - 1 - position : position);
}

static int64_t weight_numel(const player *p, uint32_t u) {
  return p->policy->weight_numel ? p->policy->weight_numel[u] : 0;
}

/* Units that the position reads and that must be gathered for it, appended to the list. */
static void list_position(player *p, uint32_t position, int64_t most_units, int64_t most_numel, int64_t *numel) {
  bool backward;
  const phx_stage *stage = stage_at(p, position, &backward);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(p->m, stage->first_use + i);
    int64_t size = weight_numel(p, use->unit);
    if (!(use->flags & (backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD)) || size == 0 || p->listed[use->unit]) continue;
    if (p->n_list >= most_units || size > most_numel - *numel) {
      *numel = most_numel; /* nothing that is used later overtakes */
      return;
    }
    p->listed[use->unit] = 1;
    p->list[p->n_list++] = use->unit;
    *numel += size;
  }
}

/* What should be gathered at a position: what it needs, then what comes next, as far as the policy allows. */
static void list_wanted(player *p, uint32_t position) {
  const phx_kit_policy *k = p->policy;
  memset(p->listed, 0, p->m->n_units);
  p->n_list = 0;
  int64_t needed = 0;
  list_position(p, position, INT64_MAX, INT64_MAX, &needed);
  p->n_needed = p->n_list;
  int64_t most = k->ahead_units < k->live_units - p->n_needed ? k->ahead_units : k->live_units - p->n_needed;
  int64_t room = k->live_numel > needed ? k->live_numel - needed : 0;
  int64_t most_numel = k->ahead_numel < room ? k->ahead_numel : room;
  if (most > (int64_t)p->m->n_units) most = p->m->n_units;
  int64_t ahead = 0;
  for (uint32_t q = position + 1; q < p->out->n_positions && p->n_list < p->n_needed + most && ahead < most_numel; q++)
    list_position(p, q, (int64_t)p->n_needed + most, most_numel, &ahead);
}

static phx_status gather_wanted(player *p, phx_error *err) {
  const phx_kit_policy *k = p->policy;
  for (uint32_t i = 0; i < p->n_list; i++) {
    uint32_t u = p->list[i];
    if (p->weight[u] >= 0) continue;
    bool full = p->live_units >= k->live_units;
    if (i < p->n_needed && full)
      return phx_kit_fail(err, PHX_INVALID, "at most %lld units may be gathered at once, but unit '%s' is needed too",
                          (long long)k->live_units, phx_model_unit(p->m, u)->name);
    if (i >= p->n_needed && (full || weight_numel(p, u) > k->live_numel - p->live_numel)) return PHX_OK;
    phx_status status = phx_kit_pool_take(&p->pool, weight_numel(p, u), &p->weight[u], err);
    if (status == PHX_OK) status = act(p, PHX_KIT_GATHER, u, p->weight[u], err);
    if (status != PHX_OK) return status;
    p->live_numel += weight_numel(p, u);
    if (++p->live_units > p->out->most_units) p->out->most_units = p->live_units;
  }
  return PHX_OK;
}

static phx_status open_gradients(player *p, const phx_stage *stage, phx_error *err) {
  if (!p->policy->gradient_numel) return PHX_OK;
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(p->m, stage->first_use + i);
    int64_t numel = p->policy->gradient_numel[use->unit];
    if (!(use->flags & PHX_USE_GRADIENT) || numel == 0 || p->gradient[use->unit] >= 0) continue;
    phx_status status = phx_kit_pool_take(&p->pool, numel, &p->gradient[use->unit], err);
    if (status == PHX_OK) status = act(p, PHX_KIT_OPEN, use->unit, p->gradient[use->unit], err);
    if (status != PHX_OK) return status;
  }
  return PHX_OK;
}

/* Does backward read the unit at or after a position? */
static bool backward_comes(const player *p, uint32_t unit, uint32_t position) {
  for (uint32_t q = position; q < p->out->n_positions; q++) {
    bool backward;
    const phx_stage *stage = stage_at(p, q, &backward);
    for (uint32_t i = 0; backward && i < stage->n_uses; i++) {
      const phx_use *use = phx_model_use(p->m, stage->first_use + i);
      if (use->unit == unit && (use->flags & PHX_USE_BACKWARD)) return true;
    }
  }
  return false;
}

/* Drops what the next position does not want. */
static phx_status drop_rest(player *p, uint32_t next, phx_error *err) {
  if (next < p->out->n_positions) {
    list_wanted(p, next);
  } else {
    memset(p->listed, 0, p->m->n_units);
  }
  for (uint32_t u = 0; u < p->m->n_units; u++) {
    if (p->weight[u] < 0 || p->listed[u] || (p->policy->keep && backward_comes(p, u, next))) continue;
    phx_status status = act(p, PHX_KIT_DROP, u, p->weight[u], err);
    if (status != PHX_OK) return status;
    phx_kit_pool_give_back(&p->pool, p->weight[u]);
    p->weight[u] = -1;
    p->live_units--;
    p->live_numel -= weight_numel(p, u);
  }
  return PHX_OK;
}

static phx_status close_pending(player *p, phx_error *err) {
  for (; p->n_pending > 0; p->n_pending--) {
    uint32_t u = p->pending[p->n_pending - 1];
    phx_status status = act(p, PHX_KIT_CLOSE, u, p->gradient[u], err);
    if (status != PHX_OK) return status;
    phx_kit_pool_give_back(&p->pool, p->gradient[u]);
    p->gradient[u] = -1;
  }
  return PHX_OK;
}

static phx_status reduce_complete(player *p, const phx_stage *stage, phx_error *err) {
  phx_status status = PHX_OK;
  bool closed = false;
  for (uint32_t i = stage->n_uses; status == PHX_OK && i-- > 0;) {
    const phx_use *use = phx_model_use(p->m, stage->first_use + i);
    if (!(use->flags & PHX_USE_LAST) || phx_model_unit(p->m, use->unit)->blocks[PHX_FLAT_TRAINABLE] == 0) continue;
    if (!closed) status = close_pending(p, err);
    closed = true;
    if (status == PHX_OK) status = act(p, PHX_KIT_REDUCE, use->unit, p->gradient[use->unit], err);
    if (p->gradient[use->unit] >= 0) p->pending[p->n_pending++] = use->unit;
  }
  return status;
}

static phx_status play(player *p, phx_error *err) {
  phx_kit_program *out = p->out;
  phx_status status = PHX_OK;
  for (uint32_t position = 0; status == PHX_OK && position < out->n_positions; position++) {
    bool backward;
    const phx_stage *stage = stage_at(p, position, &backward);
    out->first[2 * position] = out->n_actions;
    list_wanted(p, position);
    status = gather_wanted(p, err);
    if (status == PHX_OK && backward) status = open_gradients(p, stage, err);
    out->first[2 * position + 1] = out->n_actions;
    if (status == PHX_OK) status = drop_rest(p, position + 1, err);
    if (status == PHX_OK && backward) status = reduce_complete(p, stage, err);
    if (status == PHX_OK && position + 1 == out->n_positions) status = close_pending(p, err);
    out->first[2 * position + 2] = out->n_actions;
  }
  return status;
}

phx_status phx_kit_program_create(const phx_model *m, const phx_kit_policy *policy, phx_kit_program *out,
                                  phx_error *err) {
  uint32_t n = policy->evaluate ? m->n_stages : 2 * m->n_stages;
  phx_kit_program program = {.n_positions = n, .first = calloc(2u * n + 1u, sizeof *program.first)};
  size_t units = m->n_units + 1u;
  player p = {.m = m,
              .policy = policy,
              .out = &program,
              .weight = calloc(units, sizeof *p.weight),
              .gradient = calloc(units, sizeof *p.gradient),
              .list = calloc(units, sizeof *p.list),
              .listed = calloc(units, 1),
              .pending = calloc(units, sizeof *p.pending)};
  phx_status status = PHX_OK;
  if (!program.first || !p.weight || !p.gradient || !p.list || !p.listed || !p.pending) {
    status = phx_kit_fail(err, PHX_NOMEM, "no memory to plan the windows of %u units", m->n_units);
    goto done;
  }
  for (uint32_t u = 0; u < m->n_units; u++) p.weight[u] = p.gradient[u] = -1;
  PHX_KIT_TRY(play(&p, err));
  program.pool_numel = p.pool.numel;
  *out = program;
done:
  if (status != PHX_OK) phx_kit_program_destroy(&program);
  phx_kit_pool_destroy(&p.pool);
  free(p.weight);
  free(p.gradient);
  free(p.list);
  free(p.listed);
  free(p.pending);
  return status;
}

void phx_kit_program_destroy(phx_kit_program *p) {
  free(p->first);
  free(p->actions);
  memset(p, 0, sizeof *p);
}
