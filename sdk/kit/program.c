/* sdk/kit/program.c - the window planner.
 *
 * The order of stages is declared, so a micro-batch's gathers, gradient windows and drops are known before it runs.
 * This file plays it once and writes it down: which unit is gathered where in the pool, when it leaves, when a gradient
 * is reduced.  estimate() adds the program up, create() keeps it, the step only follows it.
 *
 *   action         one thing to do in the acquire or the release of a position: gather a unit into its window, drop it,
 *                  open a window for its gradient, reduce that, close the window
 *   pool           all windows of the program, first fit (pool.c); the strategy allocates pool_numel elements once, and
 *                  an action's offset is the place in them
 *   eviction rule  which gathered unit leaves, and when.  UNWANTED: after each pass, whatever the next position does
 *                  not want.  FARTHEST: whatever fits stays, so that backward finds what forward gathered; when room
 *                  is wanted, what is needed last leaves (Belady, IBM Systems Journal 5(2), 1966), and what is not
 *                  needed again leaves after its last pass
 *
 * The strategy owns the policy during create, the program and the pool's memory; the planner keeps nothing.
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
  uint8_t *ahead;                 /* (n_units) gathered ahead, and not used yet */
  int64_t ahead_units, ahead_numel;
} player;

static phx_status act(player *p, int32_t what, uint32_t unit, int64_t offset, phx_error *err) {
  if (p->out->n_actions == p->capacity) {
    uint32_t capacity = p->capacity ? 2 * p->capacity : 64;
    phx_kit_action *more = realloc(p->out->actions, capacity * sizeof *more);
    if (!more) return phx_fail(err, PHX_NOMEM, "no memory for the program of gathers");
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

static bool farthest_leaves(const player *p) {
  return p->policy->evict == PHX_KIT_EVICT_FARTHEST;
}

/* The first position from `position` on that reads the unit's weights; n_positions: none. */
static uint32_t next_use(const player *p, uint32_t unit, uint32_t position) {
  for (; position < p->out->n_positions; position++) {
    bool backward;
    const phx_stage *stage = stage_at(p, position, &backward);
    for (uint32_t i = 0; i < stage->n_uses; i++) {
      const phx_use *use = phx_model_use(p->m, stage->first_use + i);
      if (use->unit == unit && (use->flags & (backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD))) return position;
    }
  }
  return position;
}

/* ---- what should be gathered at a position ---- */

/* Units that the position reads and that must be gathered for it, appended to the list: in the order of its uses, where
 * the farthest leaves in the model's. */
static void list_position(player *p, uint32_t position, int64_t most_units, int64_t most_numel, int64_t *numel) {
  bool backward;
  const phx_stage *stage = stage_at(p, position, &backward);
  uint32_t first = farthest_leaves(p) ? p->n_list : UINT32_MAX;
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(p->m, stage->first_use + i);
    int64_t size = weight_numel(p, use->unit);
    if (!(use->flags & (backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD)) || size == 0 || p->listed[use->unit]) continue;
    if (p->n_list >= most_units || size > most_numel - *numel) {
      *numel = most_numel; /* nothing that is used later overtakes */
      return;
    }
    uint32_t at = p->n_list++;
    for (; at > first && p->list[at - 1] > use->unit; at--) p->list[at] = p->list[at - 1];
    p->list[at] = use->unit;
    p->listed[use->unit] = 1;
    *numel += size;
  }
}

/* What the position needs, then what comes next: as far as the policy allows, or to the end where the farthest leaves,
 * since there what is at hand already does not count as ahead. */
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
  if (most > (int64_t)p->m->n_units || farthest_leaves(p)) most = p->m->n_units;
  if (farthest_leaves(p)) most_numel = INT64_MAX;
  int64_t ahead = 0;
  for (uint32_t q = position + 1; q < p->out->n_positions && p->n_list < p->n_needed + most && ahead < most_numel; q++)
    list_position(p, q, (int64_t)p->n_needed + most, most_numel, &ahead);
}

/* Elements of what the list asks for, when nothing is at hand yet. */
static int64_t wanted_numel(const player *p) {
  int64_t needed = 0, ahead = 0;
  for (uint32_t i = 0; i < p->n_needed; i++) needed += weight_numel(p, p->list[i]);
  for (uint32_t i = p->n_needed; i < p->n_list && ahead < p->policy->ahead_numel; i++)
    if (i - p->n_needed < p->policy->ahead_units) ahead += weight_numel(p, p->list[i]);
  return needed + ahead;
}

/* ---- gathers and evictions ---- */

static void set_ahead(player *p, uint32_t unit, bool ahead) {
  int change = (int)ahead - (int)p->ahead[unit];
  p->ahead[unit] = ahead;
  p->ahead_units += change;
  p->ahead_numel += change * weight_numel(p, unit);
}

static phx_status gather(player *p, uint32_t unit, phx_error *err) {
  PHX_TRY(phx_kit_pool_take(&p->pool, weight_numel(p, unit), &p->weight[unit], err));
  p->live_numel += weight_numel(p, unit);
  if (++p->live_units > p->out->most_units) p->out->most_units = p->live_units;
  return act(p, PHX_KIT_GATHER, unit, p->weight[unit], err);
}

static phx_status drop(player *p, uint32_t unit, phx_error *err) {
  int64_t offset = p->weight[unit];
  phx_kit_pool_give_back(&p->pool, offset);
  p->weight[unit] = -1;
  p->live_units--;
  p->live_numel -= weight_numel(p, unit);
  set_ahead(p, unit, false);
  return act(p, PHX_KIT_DROP, unit, offset, err);
}

/* Where what is unwanted leaves, a stage gets as many elements as it needs. */
static bool fits(const player *p, uint32_t unit, bool needed) {
  if (p->live_units >= p->policy->live_units) return false;
  return (needed && !farthest_leaves(p)) || weight_numel(p, unit) <= p->policy->live_numel - p->live_numel;
}

/* The gathered unit that is needed last, later than at `use`, which is `position` or later; UINT32_MAX: none. */
static uint32_t farthest(const player *p, uint32_t position, uint32_t use) {
  uint32_t unit = UINT32_MAX;
  for (uint32_t u = 0; u < p->m->n_units; u++) {
    uint32_t next = p->weight[u] < 0 ? 0 : next_use(p, u, position);
    if (next <= use) continue;
    use = next;
    unit = u;
  }
  return unit;
}

/* Room for a unit whose next use is `use`, if the rule finds it. */
static phx_status make_room(player *p, uint32_t unit, uint32_t position, uint32_t use, phx_error *err) {
  while (!fits(p, unit, use == position) && farthest_leaves(p)) {
    uint32_t victim = farthest(p, position, use);
    if (victim == UINT32_MAX) return PHX_OK;
    PHX_TRY(drop(p, victim, err));
  }
  return PHX_OK;
}

static phx_status refuse(const player *p, uint32_t unit, uint32_t position, phx_error *err) {
  bool backward;
  if (p->live_units >= p->policy->live_units)
    return phx_fail(err, PHX_INVALID, "at most %lld units may be gathered at once, but unit '%s' is needed too",
                    (long long)p->policy->live_units, phx_model_unit(p->m, unit)->name);
  return phx_fail(err, PHX_INVALID, "stage '%s' alone gathers more than %lld elements at once",
                  stage_at(p, position, &backward)->name, (long long)p->policy->live_numel);
}

static bool enough_ahead(const player *p) {
  return farthest_leaves(p) &&
         (p->ahead_units >= p->policy->ahead_units || p->ahead_numel >= p->policy->ahead_numel);
}

static phx_status gather_wanted(player *p, uint32_t position, phx_error *err) {
  for (uint32_t i = 0; i < p->n_needed; i++) set_ahead(p, p->list[i], false);
  for (uint32_t i = 0; i < p->n_list; i++) {
    uint32_t u = p->list[i];
    bool needed = i < p->n_needed;
    if (p->weight[u] >= 0) continue;
    if (!needed && enough_ahead(p)) return PHX_OK;
    PHX_TRY(make_room(p, u, position, next_use(p, u, position), err));
    if (!fits(p, u, needed)) return needed ? refuse(p, u, position, err) : PHX_OK;
    PHX_TRY(gather(p, u, err));
    set_ahead(p, u, !needed);
  }
  return PHX_OK;
}

/* Does what is gathered stay after the position before `next`?  The list is the next position's. */
static bool stays(const player *p, uint32_t unit, uint32_t next) {
  uint32_t backward = next > p->m->n_stages ? next : p->m->n_stages, end = p->out->n_positions;
  if (farthest_leaves(p)) return next_use(p, unit, next) < end;
  return p->listed[unit] || (p->policy->keep && next_use(p, unit, backward) < end);
}

static phx_status drop_rest(player *p, uint32_t next, phx_error *err) {
  if (next < p->out->n_positions) {
    list_wanted(p, next);
  } else {
    memset(p->listed, 0, p->m->n_units);
  }
  for (uint32_t u = 0; u < p->m->n_units; u++)
    if (p->weight[u] >= 0 && !stays(p, u, next)) PHX_TRY(drop(p, u, err));
  return PHX_OK;
}

/* ---- gradients ---- */

static phx_status open_gradients(player *p, const phx_stage *stage, phx_error *err) {
  if (!p->policy->gradient_numel) return PHX_OK;
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(p->m, stage->first_use + i);
    int64_t numel = p->policy->gradient_numel[use->unit];
    if (!(use->flags & PHX_USE_GRADIENT) || numel == 0 || p->gradient[use->unit] >= 0) continue;
    PHX_TRY(phx_kit_pool_take(&p->pool, numel, &p->gradient[use->unit], err));
    PHX_TRY(act(p, PHX_KIT_OPEN, use->unit, p->gradient[use->unit], err));
  }
  return PHX_OK;
}

static phx_status close_pending(player *p, phx_error *err) {
  for (; p->n_pending > 0; p->n_pending--) {
    uint32_t u = p->pending[p->n_pending - 1];
    PHX_TRY(act(p, PHX_KIT_CLOSE, u, p->gradient[u], err));
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

/* ---- the whole ---- */

static phx_status play(player *p, phx_error *err) {
  phx_kit_program *out = p->out;
  phx_status status = PHX_OK;
  for (uint32_t position = 0; status == PHX_OK && position < out->n_positions; position++) {
    bool backward;
    const phx_stage *stage = stage_at(p, position, &backward);
    out->first[2 * position] = out->n_actions;
    list_wanted(p, position);
    int64_t wanted = wanted_numel(p);
    if (wanted > out->enough_numel) out->enough_numel = wanted;
    status = gather_wanted(p, position, err);
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
              .pending = calloc(units, sizeof *p.pending),
              .ahead = calloc(units, 1)};
  phx_status status = PHX_OK;
  if (!program.first || !p.weight || !p.gradient || !p.list || !p.listed || !p.pending || !p.ahead) {
    status = phx_fail(err, PHX_NOMEM, "no memory to plan the windows of %u units", m->n_units);
    goto done;
  }
  if (policy->keep && policy->evict == PHX_KIT_EVICT_FARTHEST) {
    status = phx_fail(err, PHX_INVALID, "what is needed last cannot leave and be kept for backward, too");
    goto done;
  }
  for (uint32_t u = 0; u < m->n_units; u++) p.weight[u] = p.gradient[u] = -1;
  PHX_TRY_GOTO(play(&p, err), status, done);
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
  free(p.ahead);
  return status;
}

void phx_kit_program_destroy(phx_kit_program *p) {
  free(p->first);
  free(p->actions);
  memset(p, 0, sizeof *p);
}
