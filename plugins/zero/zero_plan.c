/* plugins/zero/zero_plan.c - who owns what, what is gathered when and where, which gradients are reduced together.
 *
 * Pure arithmetic over (model, topology, options): estimate() adds it up, create() allocates it, the step follows it.
 * Invariants: every rank makes the same plan; windows that are in use at once do not overlap; every block is in exactly
 * one bucket.  The partition is ZeRO's (Rajbhandari et al., arXiv 1910.02054, 5): the whole model as one flat, cut in
 * equal shares.  What stage 3 gathers when, the kit's planner says (kit: program.c). */
#include "zero.h"
#include <stdlib.h>
#include <string.h>

static phx_status piece_add(zero_pieces *p, zero_piece piece, phx_error *err) {
  if (p->n == p->room) {
    uint32_t room = p->room ? 2 * p->room : 64;
    zero_piece *more = realloc(p->of, room * sizeof *more);
    if (!more) return phx_fail(err, PHX_NOMEM, "no memory for %u pieces", room);
    p->of = more;
    p->room = room;
  }
  p->of[p->n++] = piece;
  return PHX_OK;
}

/* Cuts a range at the owners' borders.  With merge, a piece that ends where an earlier one of the list begins joins it.
 */
static phx_status pieces_cut(const zero_plan *plan, zero_pieces *p, uint32_t list_first, zero_piece range, bool merge,
                             phx_error *err) {
  int64_t share = zero_share(plan, range.flat), end = range.at + range.numel;
  while (end > range.at) { /* from the end down, as gradients become complete */
    zero_piece piece = range;
    piece.owner = (int32_t)((end - 1) / share);
    int64_t border = piece.owner * share;
    piece.at = border > range.at ? border : range.at;
    piece.numel = end - piece.at;
    end = piece.at;
    zero_piece *before = merge && p->n > list_first ? &p->of[p->n - 1] : NULL;
    if (before && before->owner == piece.owner && before->at == piece.at + piece.numel) {
      before->at = piece.at;
      before->numel += piece.numel;
      continue;
    }
    PHX_TRY(piece_add(p, piece, err));
  }
  return PHX_OK;
}

/* ---- whole weights of stages 1 and 2 ---- */

/* Units in the order in which forward first reads them; those it does not read come last. */
static void order_forward(zero_plan *p) {
  const phx_model *m = p->model;
  uint32_t n = 0;
  for (uint32_t u = 0; u < m->n_units; u++) p->turn[u] = UINT32_MAX;
  for (uint32_t i = 0; i < m->n_stages + m->n_units; i++) {
    bool rest = i >= m->n_stages;
    uint32_t n_uses = rest ? 1 : phx_model_stage(m, i)->n_uses;
    for (uint32_t k = 0; k < n_uses; k++) {
      const phx_use *use = rest ? NULL : phx_model_use(m, phx_model_stage(m, i)->first_use + k);
      uint32_t u = rest ? i - m->n_stages : use->unit;
      if ((use && !(use->flags & PHX_USE_FORWARD)) || p->turn[u] != UINT32_MAX) continue;
      p->turn[u] = n;
      p->forward[n++] = u;
    }
  }
}

/* A unit's flat, cut at owners' borders and buckets; what follows on the piece before fills its bucket first. */
static phx_status spread_unit(zero_plan *p, uint32_t list_first, uint32_t u, uint32_t flat, phx_error *err) {
  int64_t share = zero_share(p, flat), bucket = p->config->allgather_bucket_size, at = zero_unit_first(p, u, flat);
  int64_t end = at + phx_model_unit(p->model, u)->blocks[flat] * PHX_BLOCK;
  while (at < end) {
    zero_piece piece = {.at = at, .unit = u, .flat = flat, .owner = (int32_t)(at / share)};
    zero_piece *before = p->spread.n > list_first ? &p->spread.of[p->spread.n - 1] : NULL;
    bool joins = before && before->owner == piece.owner && before->at + before->numel == at && before->numel < bucket;
    int64_t border = (piece.owner + 1) * share, room = joins ? bucket - before->numel : bucket;
    piece.numel = (end < border ? end : border) - at;
    if (piece.numel > room) piece.numel = room;
    at += piece.numel;
    if (joins) {
      before->numel += piece.numel;
      continue;
    }
    PHX_TRY(piece_add(&p->spread, piece, err));
  }
  return PHX_OK;
}

static phx_status plan_spread(zero_plan *p, phx_error *err) {
  uint32_t n_units = p->model->n_units;
  order_forward(p);
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
    uint32_t list_first = p->spread.n;
    for (uint32_t k = 0; k < n_units; k++) {
      p->spread.first[flat * n_units + k] = p->spread.n;
      if (!zero_at_once(p, flat)) PHX_TRY(spread_unit(p, list_first, p->forward[k], flat, err));
    }
  }
  p->spread.first[PHX_FLATS * n_units] = p->spread.n;
  return PHX_OK;
}

/* ---- weights of stage 3 ---- */

static uint32_t param_flat(const phx_param *param) {
  return param->flags & PHX_PARAM_FROZEN ? PHX_FLAT_FROZEN : PHX_FLAT_TRAINABLE;
}

static void choose_persistent(zero_plan *p) {
  for (uint32_t i = 0; i < p->model->n_params; i++) {
    const phx_param *param = phx_model_param(p->model, i);
    int64_t *pack = &p->pack[param_flat(param)];
    p->persist[i] = -1;
    if (param->numel >= p->config->stage3_param_persistence_threshold) continue;
    p->persist[i] = *pack;
    *pack += (param->numel + 63) / 64 * 64;
  }
}

/* The runs of partitioned parameters of a unit's flat. */
static phx_status gather_flat(zero_plan *p, uint32_t u, uint32_t flat, phx_error *err) {
  const phx_unit *unit = phx_model_unit(p->model, u);
  int64_t base = zero_unit_first(p, u, flat);
  zero_piece run = {.unit = u, .flat = flat};
  for (uint32_t k = 0; k <= unit->n_params; k++) {
    const phx_param *param = k < unit->n_params ? phx_model_param(p->model, unit->first_param + k) : NULL;
    if (param && param_flat(param) != flat) continue;
    if (param && p->persist[unit->first_param + k] < 0) {
      if (run.numel == 0) run.at = base + param->offset;
      run.numel = base + param->offset + param->numel - run.at;
      continue;
    }
    if (run.numel == 0) continue;
    PHX_TRY(pieces_cut(p, &p->gathers, 0, run, false, err));
    run.numel = 0;
  }
  return PHX_OK;
}

static phx_status plan_gathers(zero_plan *p, phx_error *err) {
  const phx_model *m = p->model;
  for (uint32_t u = 0; u < m->n_units; u++) {
    const phx_unit *unit = phx_model_unit(m, u);
    p->gathers.first[u] = p->gathers.n;
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++) PHX_TRY(gather_flat(p, u, flat, err));
    p->gathers.first[u + 1] = p->gathers.n;
    if (p->gathers.n > p->gathers.first[u])
      p->window[u] = (unit->blocks[PHX_FLAT_TRAINABLE] + unit->blocks[PHX_FLAT_FROZEN]) * PHX_BLOCK;
  }
  return PHX_OK;
}

/* Whatever fits stays, and what is needed last leaves: DeepSpeed guesses the same by a reuse distance.  auto: as many
 * elements as make no gather ahead wait. */
static phx_status plan_programs(zero_plan *p, phx_error *err) {
  const zero_config *c = p->config;
  phx_kit_policy policy = {.weight_numel = p->window,
                           .ahead_units = INT64_MAX,
                           .ahead_numel = c->stage3_prefetch_bucket_size,
                           .live_units = INT64_MAX,
                           .live_numel = c->stage3_max_live_parameters,
                           .evict = PHX_KIT_EVICT_FARTHEST};
  phx_error why = {.struct_size = sizeof why};
  if (policy.live_numel < 0) {
    phx_kit_program free_of_bounds;
    policy.live_numel = INT64_MAX;
    PHX_TRY(phx_kit_program_create(p->model, &policy, &free_of_bounds, err));
    policy.live_numel = free_of_bounds.enough_numel;
    phx_kit_program_destroy(&free_of_bounds);
  }
  const phx_status status = phx_kit_program_create(p->model, &policy, &p->train, &why);
  if (status == PHX_INVALID)
    return phx_fail(err, status, "stage3_max_live_parameters = %lld is too small: %s; make it larger, or auto",
                    (long long)policy.live_numel, why.message);
  if (status != PHX_OK) return phx_fail(err, status, "%s", why.message);
  policy.evaluate = 1;
  return phx_kit_program_create(p->model, &policy, &p->evaluate, err);
}

/* ---- gradients ---- */

/* The elements of a bucket, cut by unit and owner.  A unit is taken from its end: what backward completes one after the
 * other then adjoins in the model, and where gradients are whole it is reduced as one. */
static phx_status plan_bucket(zero_plan *p, uint32_t b, phx_error *err) {
  const phx_kit_bucket *bucket = &p->buckets[b];
  uint32_t list = p->reduces.n;
  p->reduces.first[b] = list;
  for (uint32_t i = 0; i < p->order.n; i++) {
    uint32_t u = p->order.units[i];
    int64_t numel = phx_model_unit(p->model, u)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK, first = p->order.offset[u];
    int64_t from = bucket->first > first ? bucket->first : first;
    int64_t to = bucket->first + bucket->numel < first + numel ? bucket->first + bucket->numel : first + numel;
    if (from >= to) continue;
    zero_piece range = {.unit = u,
                        .flat = PHX_FLAT_TRAINABLE,
                        .numel = to - from,
                        .at = zero_unit_first(p, u, PHX_FLAT_TRAINABLE) + numel - (to - first)};
    PHX_TRY(pieces_cut(p, &p->reduces, list, range, p->whole, err));
  }
  p->reduces.first[b + 1] = p->reduces.n;
  return PHX_OK;
}

static int64_t trainable_numel(const zero_plan *p, uint32_t unit) {
  return phx_model_unit(p->model, unit)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
}

/* The last bucket that has elements of the unit. */
static int32_t last_bucket(const zero_plan *p, uint32_t unit) {
  int64_t end = p->order.offset[unit] + trainable_numel(p, unit);
  uint32_t b = 0;
  while (p->buckets[b].first + p->buckets[b].numel < end) b++;
  return (int32_t)b;
}

/* The last bucket of the windows that were where the unit's is now, -1: none. */
static int32_t taken_over(const zero_plan *p, const uint8_t *closed, uint32_t unit) {
  int64_t begin = p->gradient_at[unit], end = begin + trainable_numel(p, unit);
  int32_t after = -1;
  for (uint32_t u = 0; u < p->model->n_units; u++) {
    if (!closed[u] || p->gradient_at[u] >= end || p->gradient_at[u] + trainable_numel(p, u) <= begin) continue;
    if (last_bucket(p, u) > after) after = last_bucket(p, u);
  }
  return after;
}

/* Plays backward once.  A window is free when its last bucket was reduced: at once where reductions are waited for,
 * else when it was started before the last stage, so that every reduction has the backward pass of a stage to hide
 * behind before anything waits for it. */
static phx_status plan_windows(zero_plan *p, phx_error *err) {
  const phx_model *m = p->model;
  uint8_t *open = calloc(m->n_units + 1u, 1), *complete = calloc(m->n_units + 1u, 1);
  uint8_t *closed = calloc(m->n_units + 1u, 1);
  phx_kit_pool pool = {0};
  uint32_t next = 0;
  phx_status status = PHX_OK;
  if (!open || !complete || !closed) {
    status = phx_fail(err, PHX_NOMEM, "no memory to plan the gradients of %u units", m->n_units);
    goto done;
  }
  for (uint32_t s = m->n_stages; s-- > 0;) {
    const phx_stage *stage = phx_model_stage(m, s);
    for (uint32_t i = 0; i < stage->n_uses; i++) {
      const phx_use *use = phx_model_use(m, stage->first_use + i);
      int64_t numel = trainable_numel(p, use->unit);
      if (!(use->flags & PHX_USE_GRADIENT) || numel == 0 || open[use->unit]) continue;
      PHX_TRY_GOTO(phx_kit_pool_take(&pool, numel, &p->gradient_at[use->unit], err), status, done);
      p->gradient_after[use->unit] = taken_over(p, closed, use->unit);
      open[use->unit] = 1;
    }
    for (uint32_t i = 0; i < stage->n_uses; i++) {
      const phx_use *use = phx_model_use(m, stage->first_use + i);
      if (use->flags & PHX_USE_LAST) complete[use->unit] = 1;
    }
    uint32_t before = next;
    while (next < p->n_buckets && complete[p->order.units[p->buckets[next].last]]) next++;
    for (uint32_t u = 0; u < m->n_units; u++) {
      if (!open[u] || !complete[u] || last_bucket(p, u) >= (int32_t)(p->config->overlap_comm ? before : next)) continue;
      phx_kit_pool_give_back(&pool, p->gradient_at[u]);
      open[u] = 0;
      closed[u] = 1;
    }
  }
  p->windows = pool.numel;
done:
  phx_kit_pool_destroy(&pool);
  free(open), free(complete), free(closed);
  return status;
}

/* ---- the whole ---- */

int64_t zero_pack_part(const zero_plan *p, uint32_t flat, int32_t rank, int64_t *first) {
  int64_t low = p->pack[flat], high = 0, border = zero_share(p, flat) * rank;
  for (uint32_t i = 0; i < p->model->n_params; i++) {
    const phx_param *param = phx_model_param(p->model, i);
    if (p->persist[i] < 0 || param_flat(param) != flat) continue;
    int64_t begin = zero_unit_first(p, param->unit, flat) + param->offset, end = begin + param->numel;
    int64_t from = begin > border ? begin : border;
    int64_t to = end < border + zero_share(p, flat) ? end : border + zero_share(p, flat);
    if (from >= to) continue;
    if (p->persist[i] + from - begin < low) low = p->persist[i] + from - begin;
    if (p->persist[i] + to - begin > high) high = p->persist[i] + to - begin;
  }
  *first = low;
  return high > low ? high - low : 0;
}

static void plan_regions(zero_plan *p) {
  const phx_topology *t = p->topology;
  bool sharded = p->config->stage == 3, adds = phx_kit_adds_reduced(t);
  int64_t piece = 0, share = zero_share(p, PHX_FLAT_TRAINABLE), size = phx_kit_weight_bytes(t);
  int64_t pool = p->train.pool_numel > p->evaluate.pool_numel ? p->train.pool_numel : p->evaluate.pool_numel;
  for (uint32_t i = 0; i < p->reduces.n; i++)
    if (p->reduces.of[i].numel > piece) piece = p->reduces.of[i].numel;
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
    p->regions[ZERO_WEIGHT + flat] = (phx_kit_region){
        .kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = zero_share(p, flat) * (sharded ? 1 : t->world_size) * size};
    p->regions[ZERO_PERSIST + flat] =
        (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = p->pack[flat] * size};
    if (phx_kit_masters(t))
      p->regions[ZERO_MASTER + flat] =
          (phx_kit_region){.kind = PHX_MEM_MASTER, .bytes = p->shard[flat].blocks * PHX_BLOCK * 4};
  }
  p->regions[ZERO_WIRE] =
      (phx_kit_region){.kind = PHX_MEM_BUFFER, .shared = 1, .bytes = phx_kit_wire_bytes(t, piece)};
  p->regions[ZERO_GRADIENT] =
      (phx_kit_region){.kind = PHX_MEM_GRADIENT, .shared = 1, .bytes = p->whole ? share * t->world_size * 4 : 0};
  p->regions[ZERO_SHARE] =
      (phx_kit_region){.kind = PHX_MEM_GRADIENT, .shared = 1, .bytes = !p->whole || adds ? share * 4 : 0};
  p->regions[ZERO_STAGING] =
      (phx_kit_region){.kind = PHX_MEM_BUFFER, .shared = 1, .bytes = !p->whole && adds ? piece * 4 : 0};
  p->regions[ZERO_POOL] = (phx_kit_region){.kind = PHX_MEM_GATHERED, .shared = 1, .bytes = pool * size};
  p->regions[ZERO_WINDOWS] = (phx_kit_region){.kind = PHX_MEM_GATHERED, .shared = 1, .bytes = p->windows * 4};
  for (uint32_t k = 0; k < t->n_optim_states; k++)
    p->regions[ZERO_STATES + k] = (phx_kit_region){
        .kind = PHX_MEM_OPTIMIZER,
        .bytes = p->shard[PHX_FLAT_TRAINABLE].blocks * PHX_BLOCK * (int64_t)phx_dtype_bytes(t->optim_dtype[k])};
}

static phx_status plan_alloc(zero_plan *p, phx_error *err) {
  const phx_model *m = p->model;
  p->persist = calloc(m->n_params + 1u, sizeof *p->persist);
  p->window = calloc(m->n_units + 1u, sizeof *p->window);
  p->gathers.first = calloc(m->n_units + 1u, sizeof *p->gathers.first);
  p->reduces.first = calloc(p->n_buckets + 1u, sizeof *p->reduces.first);
  p->gradient_at = calloc(m->n_units + 1u, sizeof *p->gradient_at);
  p->gradient_after = calloc(m->n_units + 1u, sizeof *p->gradient_after);
  p->forward = calloc(m->n_units + 1u, sizeof *p->forward);
  p->turn = calloc(m->n_units + 1u, sizeof *p->turn);
  p->spread.first = calloc((size_t)PHX_FLATS * m->n_units + 1u, sizeof *p->spread.first);
  if (p->persist && p->window && p->gathers.first && p->reduces.first && p->gradient_at && p->gradient_after &&
      p->forward && p->turn && p->spread.first)
    return PHX_OK;
  return phx_fail(err, PHX_NOMEM, "no memory to plan %u units", m->n_units);
}

phx_status zero_plan_create(const zero_config *config, const phx_topology *t, const phx_model *m, zero_plan *out,
                            phx_error *err) {
  zero_plan p = {.config = config, .topology = t, .model = m};
  phx_status status = PHX_OK;
  PHX_TRY_GOTO(phx_kit_check_precision(t, err), status, done);
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
    p.shard[flat] = phx_kit_shard_of(m->total_blocks[flat], t->rank, t->world_size);
  p.several = t->world_size > 1 || config->gather_alone;
  p.whole = config->stage == 1 || !p.several || (t->accumulate > 1 && t->reduce == PHX_REDUCE_STEP);
  PHX_TRY_GOTO(phx_kit_order_create(m, &p.order, err), status, done);
  PHX_TRY_GOTO(phx_kit_buckets_create(m, &p.order, config->reduce_bucket_size, config->reduce_bucket_size, &p.buckets,
                                      &p.n_buckets, err), status, done);
  PHX_TRY_GOTO(plan_alloc(&p, err), status, done);
  for (uint32_t i = 0; i < m->n_params; i++) p.persist[i] = -1;
  if (config->stage < 3 && p.several) PHX_TRY_GOTO(plan_spread(&p, err), status, done);
  if (config->stage == 3 && p.several) {
    choose_persistent(&p);
    PHX_TRY_GOTO(plan_gathers(&p, err), status, done);
  }
  PHX_TRY_GOTO(plan_programs(&p, err), status, done);
  for (uint32_t b = 0; b < p.n_buckets; b++) PHX_TRY_GOTO(plan_bucket(&p, b, err), status, done);
  if (!p.whole) PHX_TRY_GOTO(plan_windows(&p, err), status, done);
  plan_regions(&p);
  *out = p;
  return PHX_OK;
done:
  zero_plan_destroy(&p);
  return status;
}

void zero_plan_destroy(zero_plan *p) {
  phx_kit_order_destroy(&p->order);
  free(p->buckets);
  free(p->persist);
  free(p->window);
  free(p->forward), free(p->turn);
  free(p->spread.of), free(p->spread.first);
  free(p->gathers.of), free(p->gathers.first);
  free(p->reduces.of), free(p->reduces.first);
  phx_kit_program_destroy(&p->train);
  phx_kit_program_destroy(&p->evaluate);
  free(p->gradient_at), free(p->gradient_after);
  memset(p, 0, sizeof *p);
}
