/* core/engine/drift.c - see drift.h.
 *
 * Each rank hashes the weights of every stage's forward view; one all_reduce of the hashes and of their complements
 * gives least and greatest, and only a difference costs a second exchange, which says whose it is.  Optimizer states
 * are not looked at: what is wrong in one shows in the weights after the next update.
 * Does not: repair, or look at gradients.  A parameter that no forward pass reads is passed over. */
#include "engine/drift.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "engine/handed.h"
#include "base/job_calls.h"
#include "engine/state_io.h"
#include "base/status.h"
#include "base/sys.h"
#include "plugin/where.h"

struct phx__drift {
  phx__runtime *rt;
  uint64_t *own;    /* (n_params) this rank's */
  uint64_t *spread; /* (2, n_params) least, and the complement of the greatest */
};

phx_status phx__drift_supported(const phx__prepared *p, phx_error *err) {
  for (uint32_t s = 0; s < p->model->n_stages; s++)
    if (!p->layout.stage_owned[s])
      return phx__fail(err, PHX_UNSUPPORTED,
                       "run.drift_every: strategy %s holds stage %u on other ranks only, so there is nothing to "
                       "compare: use 0",
                       p->config->strategy.plugin->descriptor->id, s);
  return PHX_OK;
}

phx_status phx__drift_open(phx__runtime *rt, phx__drift **out, phx_error *err) {
  const size_t n = rt->prepared->model->n_params;
  phx__drift *d = phx__calloc(1, sizeof *d);
  if (!d) return phx__fail(err, PHX_NOMEM, "no memory for the check of replicas");
  d->rt = rt;
  d->own = phx__calloc(n, sizeof *d->own);
  d->spread = phx__calloc(2 * n, sizeof *d->spread);
  if (!d->own || !d->spread) {
    phx__drift_close(d);
    return phx__fail(err, PHX_NOMEM, "no memory for the hashes of %zu parameters", n);
  }
  *out = d;
  return PHX_OK;
}

void phx__drift_close(phx__drift *d) {
  if (!d) return;
  phx__free(d->spread);
  phx__free(d->own);
  phx__free(d);
}

static phx_status hash_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  (void)at, (void)err;
  XXH3_64bits_update(ctx, data, (size_t)bytes);
  return PHX_OK;
}

static phx_status hash_view(phx__drift *d, const phx_view *view, phx_error *err) {
  const phx_model *m = d->rt->prepared->model;
  for (uint32_t i = 0; i < view->n_params; i++) {
    const phx_param_view *p = (const void *)((const char *)view->params + (size_t)i * view->param_stride);
    XXH3_state_t state;
    if (!p->weight) continue;
    XXH3_64bits_reset(&state);
    const phx_status status = phx__state_read(
        d->rt, PHX_SPACE_DEVICE, p->weight,
        phx_model_param(m, p->param)->numel * (int64_t)phx_dtype_bytes(p->weight_dtype), hash_part, &state, err);
    if (status) return status;
    d->own[p->param] = XXH3_64bits_digest(&state);
  }
  return PHX_OK;
}

static phx_status hash_stage(phx__drift *d, uint32_t stage, phx_error *err) {
  const phx__runtime *rt = d->rt;
  const phx_strategy_table *strategy = rt->prepared->strategy;
  const phx_device *device = rt->device;
  const phx_view *view = NULL;
  phx_status status =
      PHX__IN_STRATEGY(rt->job, PHX_IN_ACQUIRE, (int32_t)stage,
                       strategy->acquire(rt->strategy, stage, PHX_PASS_EVALUATE, 0, NULL, &view, err));
  phx__job_heartbeat(rt->job);
  if (!status) status = phx__handed_view(rt, stage, PHX_PASS_EVALUATE, view, err);
  if (!status && view->ready) status = device->stream_wait(device->ctx, NULL, view->ready, err);
  if (!status) status = hash_view(d, view, err);
  if (status) return status;
  return PHX__IN_STRATEGY(rt->job, PHX_IN_RELEASE, (int32_t)stage,
                          strategy->release(rt->strategy, stage, PHX_PASS_EVALUATE, 0, 0, NULL, err));
}

/* "rank 2": those whose hash is not what most have. */
static void name_ranks(const uint64_t *all, int32_t size, char *text, size_t bytes) {
  int32_t usual = 0, most = 0, named = 0;
  size_t used = 0;
  for (int32_t r = 0; r < size; r++) {
    int32_t count = 0;
    for (int32_t s = 0; s < size; s++) count += all[s] == all[r];
    if (count > most) {
      most = count;
      usual = r;
    }
  }
  for (int32_t r = 0; r < size && used + 24 < bytes; r++)
    if (all[r] != all[usual])
      used += (size_t)snprintf(text + used, bytes - used, named++ ? ", %d" : "rank %d", r);
  snprintf(text + used, bytes - used, " against rank %d%s", usual, most > 1 ? " and those that agree with it" : "");
}

static phx_status say_drift(phx__drift *d, int64_t step, uint32_t first, uint32_t different, phx_error *err) {
  const phx_comm *c = d->rt->core;
  uint64_t all[PHX_RANKS_MAX];
  char ranks[160];
  phx_status status = PHX__IN_COMM(d->rt->job, c->all_gather(c->ctx, &d->own[first], all, 1, PHX_U64, NULL, err));
  if (status) return status;
  name_ranks(all, c->size, ranks, sizeof ranks);
  return phx__fail(err, PHX_COMM,
                   "step %" PRId64 ": the ranks' weights have drifted apart: '%s' is the first of %u tensors that "
                   "differ, %s; a rank's memory or its arithmetic is wrong: do not go on from this state",
                   step, phx_model_param(d->rt->prepared->model, first)->name, different, ranks);
}

phx_status phx__drift_check(phx__drift *d, int64_t step, phx_error *err) {
  const phx__runtime *rt = d->rt;
  const phx_model *m = rt->prepared->model;
  const uint32_t n = m->n_params;
  uint32_t different = 0, first = 0;
  phx_status status = PHX_OK;
  memset(d->own, 0, n * sizeof *d->own);
  for (uint32_t s = 0; s < m->n_stages && !status; s++) status = hash_stage(d, s, err);
  if (status) return status;
  for (uint32_t i = 0; i < n; i++) {
    d->spread[i] = d->own[i];
    d->spread[n + i] = ~d->own[i];
  }
  status = PHX__IN_COMM(rt->job, rt->core->all_reduce(rt->core->ctx, d->spread, d->spread, 2 * (int64_t)n, PHX_U64,
                                                      PHX_MIN, NULL, err));
  if (status) return status;
  for (uint32_t i = n; i-- > 0;)
    if (d->spread[i] != ~d->spread[n + i]) {
      different++;
      first = i;
    }
  return different ? say_drift(d, step, first, different, err) : PHX_OK;
}
