/* core/engine/weight_check.c - see weight_check.h.
 *
 * A parameter's hash is the sum of those of its pieces, cut at canonical blocks, since a slice of state may be any
 * blocks.  Rounding to bf16 is the device's: to nearest, ties to even.
 * Does not: look at optimizer states, at padding, or at weights that no forward pass reads. */
#include "engine/weight_check.h"

#include <string.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/status.h"
#include "base/sys.h"
#include "engine/layout.h"
#include "engine/stage_view.h"
#include "engine/state.h"
#include "engine/state_io.h"
#include "engine/state_visit.h"
#include "plugin/where.h"

typedef struct weight_check {
  phx__runtime *rt;
  const char *when;
  uint64_t *state;        /* (n_params) of the state, all ranks' sum */
  const phx_slice *slice; /* being read */
} weight_check;

static uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40u); /* NaN */
  return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

/* ---- what the state says ---- */
/* Elements [in_param, in_param + numel) of a parameter, within one block. */
static uint64_t hash_piece(const void *data, size_t bytes, int64_t in_param) {
  return XXH3_64bits_withSeed(data, bytes, (uint64_t)in_param);
}

static uint64_t hash_state_piece(const weight_check *w, const float *data, const phx__range *r) {
  uint16_t low[PHX_BLOCK];
  if (w->rt->prepared->topology.compute_dtype == PHX_F32)
    return hash_piece(data, (size_t)r->numel * sizeof *data, r->in_param);
  for (int64_t i = 0; i < r->numel; i++) low[i] = to_bf16(data[i]);
  return hash_piece(low, (size_t)r->numel * sizeof *low, r->in_param);
}

static phx_status hash_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  weight_check *w = ctx;
  const phx_model *m = w->rt->prepared->model;
  const phx_slice part = phx__slice_part(w->slice, at, bytes);
  (void)err;
  for (int64_t b = 0; b < part.blocks; b++) {
    const int64_t block = (part.first_block + b) * PHX_BLOCK;
    phx__range r = {0};
    while (phx__layout_next(m, part.unit, part.flat, block, PHX_BLOCK, &r)) {
      const float *piece = (const float *)data + (r.first - part.first_block * PHX_BLOCK);
      w->state[r.param - m->params] += hash_state_piece(w, piece, &r);
    }
  }
  return PHX_OK;
}

static phx_status hash_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  weight_check *w = ctx;
  w->slice = slice;
  if (slice->dtype != PHX_F32 || (slice->kind != PHX_STATE_WEIGHT && slice->kind != PHX_STATE_MASTER)) return PHX_OK;
  return phx__slice_read(w->rt, slice, hash_part, w, err);
}

/* ---- what a view shows ---- */
typedef struct walk { /* along one parameter, in parts of any size */
  const phx_param *param;
  size_t size;   /* bytes of an element */
  int64_t done;  /* elements */
  uint64_t sum;
  XXH3_state_t piece;
} walk;

/* The end of the piece that element `at` of the parameter is in. */
static int64_t piece_end(const phx_param *p, int64_t at) {
  const int64_t end = ((p->offset + at) / PHX_BLOCK + 1) * PHX_BLOCK - p->offset;
  return end < p->numel ? end : p->numel;
}

static phx_status hash_weights(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  walk *w = ctx;
  const char *from = data;
  int64_t left = bytes / (int64_t)w->size;
  (void)at, (void)err;
  while (left > 0) {
    const int64_t end = piece_end(w->param, w->done), n = end - w->done < left ? end - w->done : left;
    XXH3_64bits_update(&w->piece, from, (size_t)n * w->size);
    from += (size_t)n * w->size;
    w->done += n;
    left -= n;
    if (w->done < end) break;
    w->sum += XXH3_64bits_digest(&w->piece);
    XXH3_64bits_reset_withSeed(&w->piece, (uint64_t)w->done);
  }
  return PHX_OK;
}

static phx_status check_param(weight_check *c, const phx_param_view *v, phx_error *err) {
  walk w = {.param = phx_model_param(c->rt->prepared->model, v->param), .size = phx_dtype_bytes(v->weight_dtype)};
  XXH3_64bits_reset_withSeed(&w.piece, 0);
  const phx_status status = phx__state_read(c->rt, PHX_SPACE_DEVICE, v->weight, w.param->numel * (int64_t)w.size,
                                            hash_weights, &w, err);
  if (status || w.sum == c->state[v->param]) return status;
  return phx_fail(err, PHX_INTERNAL,
                  "strategy %s: acquire: %s this rank computes with another '%s' than the state that visit_state "
                  "names: its replica or its low-precision copy was not made anew",
                  c->rt->config->strategy.plugin->descriptor->id, c->when, w.param->name);
}

/* *found: what is wrong with a weight, and then the stage is acquired only because that is collective.  Returns how the
 * strategy's calls ended. */
static phx_status check_stage(weight_check *c, uint32_t stage, phx_status *found, phx_error *err) {
  const phx_view *view = NULL;
  PHX_TRY(phx__stage_acquire(c->rt, stage, PHX_PASS_EVALUATE, 0, &view, err));
  PHX_TRY(phx__stage_ready(c->rt, view, err));
  for (uint32_t i = 0; !*found && i < view->n_params; i++) {
    const phx_param_view *v = phx_view_param(view, i);
    if (v->weight) *found = check_param(c, v, err);
  }
  return phx__stage_release(c->rt, stage, PHX_PASS_EVALUATE, 0, 0, *found ? NULL : err);
}

phx_status phx__weight_check(phx__runtime *rt, const char *when, phx_error *err) {
  const phx_model *m = rt->prepared->model;
  weight_check c = {.rt = rt, .when = when, .state = phx__calloc(m->n_params, sizeof *c.state)};
  phx_status status = PHX_OK, found = PHX_OK;
  if (!c.state) return phx_fail(err, PHX_NOMEM, "no memory for the hashes of %u parameters", m->n_params);
  PHX_TRY_GOTO(phx__state_prepare(rt, PHX_PREPARE_COMPARE, err), status, done);
  PHX_TRY_GOTO(phx__state_visit(rt, hash_slice, &c, err), status, done);
  PHX_TRY_GOTO(PHX__IN_COMM(rt->job, rt->core->all_reduce(rt->core->ctx, c.state, c.state, m->n_params, PHX_U64,
                                                          PHX_SUM, NULL, err)), status, done);
  for (uint32_t s = 0; s < m->n_stages; s++)
    if (rt->prepared->layout.stage_owned[s]) PHX_TRY_GOTO(check_stage(&c, s, &found, found ? NULL : err), status, done);
done:
  phx__free(c.state);
  return found ? found : status;
}
