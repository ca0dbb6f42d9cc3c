/* core/engine/state.c - see state.h. */
#include "engine/state.h"

#include <string.h>

#include "base/rng.h"
#include "base/status.h"
#include "engine/layout.h"
#include "engine/state_io.h"
#include "engine/state_visit.h"
#include "plugin/where.h"

typedef struct state_walk {
  phx__runtime *rt;
  phx__state_hash hash;
} state_walk;

void phx__initial_values(const phx_param *p, uint64_t seed, int64_t in_param, int64_t numel, float *out) {
  if (p->init == PHX_INIT_NORMAL) {
    phx__rng_normal(out, in_param, numel, seed, phx__rng_stream(p->name), p->init_std);
    return;
  }
  for (int64_t i = 0; i < numel; i++) out[i] = p->init == PHX_INIT_ONE ? 1.0f : 0.0f;
}

typedef struct slice_walk {
  state_walk *walk;
  const phx_slice *slice;
} slice_walk;

static phx_status initialise_part(void *ctx, void *data, int64_t at, int64_t bytes, phx_error *err) {
  const slice_walk *w = ctx;
  const phx__runtime *rt = w->walk->rt;
  const phx_slice part = phx__slice_part(w->slice, at, bytes);
  (void)err;
  memset(data, 0, (size_t)bytes);
  if (part.kind == PHX_STATE_WEIGHT || part.kind == PHX_STATE_MASTER) {
    phx__range r = {0};
    const int64_t first = part.first_block * PHX_BLOCK;
    while (phx__layout_next(rt->prepared->model, part.unit, part.flat, first, part.blocks * PHX_BLOCK, &r))
      phx__initial_values(r.param, (uint64_t)rt->config->s.run.seed, r.in_param, r.numel,
                          (float *)data + (r.first - first));
  }
  return PHX_OK;
}

static phx_status initialise_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  state_walk *walk = ctx;
  slice_walk w = {walk, slice};
  if (slice->kind == PHX_STATE_PRIVATE || phx__state_derived(slice)) return PHX_OK; /* the strategy's own business */
  if (slice->dtype != PHX_F32)
    return phx_fail(err, PHX_UNSUPPORTED, "state of unit %u has dtype %d; only fp32 is initialised", slice->unit,
                    slice->dtype);
  return phx__slice_write(walk->rt, slice, initialise_part, &w, err);
}

phx_status phx__state_prepare(phx__runtime *rt, int32_t purpose, phx_error *err) {
  const phx_strategy_table *t = rt->prepared->strategy;
  if (!PHX_HAS(t, phx_strategy_table, prepare_state) || !t->prepare_state) return PHX_OK;
  return PHX__IN_STRATEGY(rt->job, PHX_IN_PREPARE, -1, t->prepare_state(rt->strategy, purpose, err));
}

phx_status phx__state_filled(phx__runtime *rt, const phx_restored *what, phx_error *err) {
  const phx_strategy_table *t = rt->prepared->strategy;
  phx_status status = PHX_OK;
  if (PHX_HAS(t, phx_strategy_table, state_restored) && t->state_restored)
    status = PHX__IN_STRATEGY(rt->job, PHX_IN_RESTORED, -1, t->state_restored(rt->strategy, what, err));
  if (status) return status;
  return PHX__IN_STRATEGY(rt->job, PHX_IN_STATE, -1, t->state_changed(rt->strategy, err));
}

phx_status phx__runtime_initialise(phx__runtime *rt, phx_error *err) {
  state_walk walk = {.rt = rt};
  const phx_restored nothing = {.struct_size = sizeof nothing, .what = PHX_RESTORED_INITIAL};
  PHX_TRY(phx__state_prepare(rt, PHX_PREPARE_INIT, err));
  PHX_TRY(phx__optim_state_changes(&rt->optim, err));
  PHX_TRY(phx__state_visit(rt, initialise_slice, &walk, err));
  PHX_TRY(phx__state_covered(rt, err));
  return phx__state_filled(rt, &nothing, err);
}

static phx_status hash_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  const slice_walk *w = ctx;
  state_walk *walk = w->walk;
  const phx_slice part = phx__slice_part(w->slice, at, bytes);
  (void)err;
  phx__state_hash_slice(&walk->hash, walk->rt->prepared->model, &part, data);
  return PHX_OK;
}

static phx_status hash_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  state_walk *walk = ctx;
  slice_walk w = {walk, slice};
  if (slice->kind == PHX_STATE_PRIVATE || phx__state_derived(slice)) return PHX_OK;
  return phx__slice_read(walk->rt, slice, hash_part, &w, err);
}

phx_status phx__runtime_state_hash(phx__runtime *rt, phx__state_hash *out, phx_error *err) {
  state_walk walk = {.rt = rt};
  phx__state_hash all[PHX_RANKS_MAX];
  PHX_TRY(phx__state_prepare(rt, PHX_PREPARE_HASH, err));
  PHX_TRY(phx__state_visit(rt, hash_slice, &walk, err));
  PHX_TRY(phx__state_covered(rt, err));
  PHX_TRY(PHX__IN_COMM(rt->job, rt->core->all_gather(rt->core->ctx, &walk.hash, all, 2, PHX_U64, NULL, err)));
  phx__state_hash sum = {0, 0};
  for (int32_t r = 0; r < rt->core->size; r++) phx__state_hash_add(&sum, all[r]);
  *out = sum;
  return PHX_OK;
}
