/* plugins/fsdp/plan.c - what fsdp holds and what it does in a step, from config, topology and model alone. */
#include "fsdp.h"
#include <stdlib.h>
#include <string.h>

phx_kit_shard fsdp_held(const fsdp_plan *p, const phx_topology *t, const phx_unit *unit, uint32_t flat) {
  if (p->sharded) return phx_kit_shard_of(unit->blocks[flat], t->rank, p->group);
  phx_kit_shard whole = phx_kit_shard_of(unit->blocks[flat], 0, 1);
  whole.per = phx_kit_whole_numel(whole.blocks, t->world_size) / PHX_BLOCK; /* parts are gathered in place */
  return whole;
}

void fsdp_plan_destroy(fsdp_plan *p) {
  free(p->at[0]);
  free(p->at[1]);
  free(p->weight_numel);
  free(p->gradient_numel);
  phx_kit_program_destroy(&p->train);
  phx_kit_program_destroy(&p->evaluate);
  memset(p, 0, sizeof *p);
}

static phx_status check_options(const fsdp_config *c, phx_error *err) {
  if (c->sharding == FSDP_NONE && c->max_gathered > 0)
    return phx_fail(err, PHX_INVALID, "max_gathered = %lld, but sharding = none gathers nothing; leave it at 0",
                    (long long)c->max_gathered);
  if (c->sharding == FSDP_NONE && !c->reshard_after_forward)
    return phx_fail(err, PHX_INVALID,
                    "reshard_after_forward = no, but sharding = none shards nothing; leave it at yes");
  if (c->sharding == FSDP_NONE && c->gather_alone)
    return phx_fail(err, PHX_INVALID, "gather_alone = yes, but sharding = none gathers nothing; leave it at no");
  return PHX_OK;
}

/* What windows a unit needs, and where its held part is. */
static void place_units(const fsdp_config *c, const phx_topology *t, const phx_model *m, fsdp_plan *p,
                        int64_t held_numel[PHX_FLATS], int64_t *largest_shard) {
  for (uint32_t u = 0; u < m->n_units; u++) {
    const phx_unit *unit = phx_model_unit(m, u);
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
      int64_t numel = fsdp_held(p, t, unit, flat).per * PHX_BLOCK;
      p->at[flat][u] = held_numel[flat];
      held_numel[flat] += numel;
      if (flat == PHX_FLAT_TRAINABLE && numel > *largest_shard) *largest_shard = numel;
      if (c->sharding != FSDP_NONE)
        p->weight_numel[u] += phx_kit_whole_numel(unit->blocks[flat], t->world_size) * phx_kit_weight_bytes(t) / 4;
    }
    p->gradient_numel[u] = phx_kit_whole_numel(unit->blocks[PHX_FLAT_TRAINABLE], t->world_size);
  }
}

/* The programs, and the refusal of a bound that some stage cannot live with (at any world size). */
static phx_status plan_windows(const fsdp_config *c, const phx_model *m, fsdp_plan *p, phx_error *err) {
  phx_kit_policy policy = {.weight_numel = p->weight_numel,
                           .gradient_numel = p->windows ? p->gradient_numel : NULL,
                           .ahead_numel = INT64_MAX,
                           .live_units = INT64_MAX,
                           .live_numel = INT64_MAX,
                           .keep = c->sharding == FSDP_GRAD_OP || !c->reshard_after_forward};
  if (c->max_gathered > 0) {
    phx_kit_program least;
    PHX_TRY(phx_kit_program_create(m, &policy, &least, err));
    int64_t most = least.most_units;
    phx_kit_program_destroy(&least);
    if (c->max_gathered < most)
      return phx_fail(err, PHX_INVALID,
                      "max_gathered = %lld is too small: with these options the model needs %lld units gathered at "
                      "once; raise it, or leave it at 0",
                      (long long)c->max_gathered, (long long)most);
    policy.live_units = c->max_gathered;
  }
  policy.ahead_units = c->prefetch;
  if (!p->sharded) policy.weight_numel = NULL; /* one rank, or nothing sharded: weights are whole where they are */
  phx_status status = phx_kit_program_create(m, &policy, &p->train, err);
  policy.evaluate = 1;
  policy.gradient_numel = NULL;
  if (status == PHX_OK) status = phx_kit_program_create(m, &policy, &p->evaluate, err);
  return status;
}

static void plan_regions(const phx_topology *t, fsdp_plan *p, const int64_t held[PHX_FLATS], int64_t largest_shard) {
  phx_kit_region *r = p->regions;
  bool whole = !p->sharded || !p->windows; /* gradients that are reduced where they are kept */
  int64_t pool = p->train.pool_numel > p->evaluate.pool_numel ? p->train.pool_numel : p->evaluate.pool_numel;
  int64_t size = phx_kit_weight_bytes(t);
  r[FSDP_WEIGHT] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = held[PHX_FLAT_TRAINABLE] * size};
  r[FSDP_FROZEN] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = held[PHX_FLAT_FROZEN] * size};
  if (phx_kit_masters(t)) {
    int64_t part = held[PHX_FLAT_FROZEN] / (!p->sharded ? t->world_size : 1);
    r[FSDP_MASTER] = (phx_kit_region){.kind = PHX_MEM_MASTER, .shared = 1, .bytes = held[PHX_FLAT_TRAINABLE] * 4};
    r[FSDP_FROZEN_MASTER] = (phx_kit_region){.kind = PHX_MEM_MASTER, .bytes = part * 4};
  }
  r[FSDP_WIRE] = (phx_kit_region){
      .kind = PHX_MEM_BUFFER, .shared = 1, .bytes = phx_kit_wire_bytes(t, largest_shard * p->group)};
  r[FSDP_GRADIENT] = (phx_kit_region){
      .kind = PHX_MEM_GRADIENT, .shared = whole, .bytes = held[PHX_FLAT_TRAINABLE] * 4 * (p->windows ? 1 : p->group)};
  if (p->adds && p->sharded) r[FSDP_REDUCED] = (phx_kit_region){.kind = PHX_MEM_BUFFER, .bytes = largest_shard * 4};
  r[FSDP_POOL] = (phx_kit_region){.kind = PHX_MEM_GATHERED, .shared = 1, .bytes = pool * 4};
  for (uint32_t k = 0; k < t->n_optim_states; k++)
    r[FSDP_STATES + k] = (phx_kit_region){
        .kind = PHX_MEM_OPTIMIZER, .bytes = held[PHX_FLAT_TRAINABLE] * (int64_t)phx_dtype_bytes(t->optim_dtype[k])};
}

phx_status fsdp_plan_create(const fsdp_config *c, const phx_topology *t, const phx_model *m, fsdp_plan *out,
                            phx_error *err) {
  fsdp_plan p = {.group = c->sharding == FSDP_NONE ? 1 : t->world_size, .adds = phx_kit_adds_reduced(t)};
  int64_t held[PHX_FLATS] = {0, 0}, largest_shard = 0;
  p.sharded = p.group > 1 || (c->gather_alone && c->sharding != FSDP_NONE);
  phx_kit_order order = {0};
  phx_status status;
  /* Whole gradients are kept where nothing is sharded, and where micro-batches add up before the one reduction. */
  p.windows = p.adds || (p.sharded && t->accumulate == 1);
  for (int flat = 0; flat < PHX_FLATS; flat++) p.at[flat] = calloc(m->n_units + 1u, sizeof *p.at[flat]);
  p.weight_numel = calloc(m->n_units + 1u, sizeof *p.weight_numel);
  p.gradient_numel = calloc(m->n_units + 1u, sizeof *p.gradient_numel);
  if (!p.at[0] || !p.at[1] || !p.weight_numel || !p.gradient_numel) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the plan of %u units", m->n_units);
    goto done;
  }
  PHX_TRY_GOTO(phx_kit_check_precision(t, err), status, done);
  PHX_TRY_GOTO(check_options(c, err), status, done);
  PHX_TRY_GOTO(phx_kit_order_create(m, &order, err), status, done); /* every trainable unit is reduced once */
  place_units(c, t, m, &p, held, &largest_shard);
  PHX_TRY_GOTO(plan_windows(c, m, &p, err), status, done);
  plan_regions(t, &p, held, largest_shard);
done:
  phx_kit_order_destroy(&order);
  if (status == PHX_OK)
    *out = p;
  else
    fsdp_plan_destroy(&p);
  return status;
}

phx_status fsdp_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                         phx_error *err) {
  fsdp_plan p;
  PHX_TRY(fsdp_plan_create(config, t, m, &p, err));
  phx_kit_regions_estimate(p.regions, FSDP_REGIONS, out);
  phx_kit_estimate_grain(out, p.sharded ? PHX_GRAIN_BLOCK : PHX_GRAIN_TENSOR);
  for (uint32_t u = 0; u < m->n_units; u++)
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
      phx_kit_estimate_state(out, t, flat,
                             phx_kit_shard_of(phx_model_unit(m, u)->blocks[flat], t->rank, t->world_size).blocks);
  for (uint32_t i = 0; i < p.train.n_actions; i++) {
    const phx_kit_action *a = &p.train.actions[i];
    const phx_unit *unit = phx_model_unit(m, a->unit);
    for (uint32_t flat = 0; a->what == PHX_KIT_GATHER && flat < PHX_FLATS; flat++)
      if (unit->blocks[flat] > 0)
        phx_kit_estimate_call(out, t, PHX_OP_ALL_GATHER, fsdp_held(&p, t, unit, flat).per * PHX_BLOCK,
                              t->compute_dtype, 0, t->accumulate);
    int64_t numel = fsdp_held(&p, t, unit, PHX_FLAT_TRAINABLE).per * PHX_BLOCK;
    if (!p.sharded) numel = unit->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
    if (a->what == PHX_KIT_REDUCE)
      phx_kit_estimate_call(out, t, p.sharded ? PHX_OP_REDUCE_SCATTER : PHX_OP_ALL_REDUCE, numel,
                            t->reduce_dtype, 0, p.adds ? t->accumulate : 1);
  }
  fsdp_plan_destroy(&p);
  return PHX_OK;
}
