/* core/engine/drift.c - see drift.h.
 *
 * Each rank hashes the weights of every stage's forward view, and in the update the masters and states of every ticket;
 * one all_reduce of the hashes and of their complements gives least and greatest, and only a difference costs a second
 * exchange, which says whose it is.  A tensor that a rank does not hold whole takes no part there: of a shard there is
 * one.  An update that was skipped hands nothing over, and then the next one's states are compared.
 * Does not: repair, or look at gradients.  A parameter that no forward pass reads is passed over, of weights. */
#include "engine/drift.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/rng.h"
#include "base/status.h"
#include "base/sys.h"
#include "engine/layout.h"
#include "engine/stage_view.h"
#include "engine/state.h"
#include "engine/state_io.h"
#include "plugin/where.h"

struct phx__drift {
  phx__runtime *rt;
  uint32_t n_params, n; /* n: tensors, the weights of all parameters, then masters if there are, then each state */
  bool masters;
  uint64_t *own;        /* (n) this rank's hashes */
  int64_t *updated;     /* (n_params) elements that this rank's tickets had */
  uint64_t *spread;     /* (2, n) least, and the complement of the greatest */
  /* while a ticket is read */
  const phx_ticket *ticket;
  uint64_t *hashes; /* (n_params) */
  int64_t size;     /* bytes of an element */
};

phx_status phx__drift_supported(const phx__prepared *p, phx_error *err) {
  if (p->layout.flags & PHX_LAYOUT_REPLICAS_DIFFER)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "run.drift_every: the replicas of strategy %s differ by design, so there is nothing to compare: "
                    "use 0",
                    p->config->strategy.plugin->descriptor->id);
  for (uint32_t s = 0; s < p->model->n_stages; s++)
    if (!p->layout.stage_owned[s])
      return phx_fail(err, PHX_UNSUPPORTED,
                      "run.drift_every: strategy %s holds stage %u on other ranks only, so there is nothing to "
                      "compare: use 0",
                      p->config->strategy.plugin->descriptor->id, s);
  return PHX_OK;
}

bool phx__drift_at_start(const phx__prepared *p) {
  if (p->layout.flags & PHX_LAYOUT_REPLICAS_DIFFER) return false;
  for (uint32_t s = 0; s < p->model->n_stages; s++)
    if (!p->layout.stage_owned[s]) return false;
  return !(p->config->strategy.plugin->descriptor->provides & PHX_CAP_SHARDS_WEIGHTS);
}

phx_status phx__drift_open(phx__runtime *rt, phx__drift **out, phx_error *err) {
  const uint32_t n_params = rt->prepared->model->n_params;
  phx__drift *d = phx__calloc(1, sizeof *d);
  if (!d) return phx_fail(err, PHX_NOMEM, "no memory for the check of replicas");
  *d = (phx__drift){.rt = rt, .n_params = n_params, .masters = rt->prepared->topology.compute_dtype != PHX_F32};
  d->n = n_params * (1 + d->masters + rt->optim.table.n_states);
  d->own = phx__calloc(d->n, sizeof *d->own);
  d->updated = phx__calloc(n_params, sizeof *d->updated);
  d->spread = phx__calloc(2 * (size_t)d->n, sizeof *d->spread);
  if (!d->own || !d->updated || !d->spread) {
    phx__drift_close(d);
    return phx_fail(err, PHX_NOMEM, "no memory for the hashes of %u tensors", d->n);
  }
  *out = d;
  return PHX_OK;
}

void phx__drift_close(phx__drift *d) {
  if (!d) return;
  if (d->rt->optim.after_ticket_arg == d) d->rt->optim.after_ticket = NULL;
  phx__free(d->spread);
  phx__free(d->updated);
  phx__free(d->own);
  phx__free(d);
}

/* ---- weights, as a stage would compute with them ---- */

static phx_status hash_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  (void)at, (void)err;
  XXH3_64bits_update(ctx, data, (size_t)bytes);
  return PHX_OK;
}

static phx_status hash_view(phx__drift *d, const phx_view *view, phx_error *err) {
  const phx_model *m = d->rt->prepared->model;
  for (uint32_t i = 0; i < view->n_params; i++) {
    const phx_param_view *p = phx_view_param(view, i);
    XXH3_state_t state;
    if (!p->weight) continue;
    XXH3_64bits_reset(&state);
    const int64_t bytes = phx_model_param(m, p->param)->numel * (int64_t)phx_dtype_bytes(p->weight_dtype);
    PHX_TRY(phx__state_read(d->rt, PHX_SPACE_DEVICE, p->weight, bytes, hash_part, &state, err));
    d->own[p->param] = XXH3_64bits_digest(&state);
  }
  return PHX_OK;
}

static phx_status hash_stage(phx__drift *d, uint32_t stage, phx_error *err) {
  const phx_view *view = NULL;
  phx_status status = phx__stage_acquire(d->rt, stage, PHX_PASS_EVALUATE, 0, &view, err);
  if (!status) status = phx__stage_ready(d->rt, view, err);
  if (!status) status = hash_view(d, view, err);
  return status ? status : phx__stage_release(d->rt, stage, PHX_PASS_EVALUATE, 0, 0, err);
}

/* ---- masters and optimizer states, as an update leaves them ---- */

static uint64_t bits_at(const char *element, int64_t size) {
  uint64_t bits = 0;
  uint32_t usual;
  if (size == sizeof usual) {
    memcpy(&usual, element, sizeof usual);
    return usual;
  }
  memcpy(&bits, element, (size_t)size);
  return bits;
}

/* A sum over elements, so that it is the same however the tickets cut a parameter. */
static uint64_t hash_elements(const char *data, int64_t size, int64_t numel, int64_t in_param) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < numel; i++) {
    const uint64_t bits = bits_at(data + i * size, size);
    sum += phx__splitmix64(bits + (uint64_t)(in_param + i) * UINT64_C(0x9E3779B97F4A7C15));
  }
  return sum;
}

static phx_status hash_ticket_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  phx__drift *d = ctx;
  const phx_model *m = d->rt->prepared->model;
  const int64_t first = d->ticket->first + at / d->size;
  phx__range r = {0};
  (void)err;
  while (phx__layout_next(m, d->ticket->unit, PHX_FLAT_TRAINABLE, first, bytes / d->size, &r))
    d->hashes[r.param - m->params] +=
        hash_elements((const char *)data + (r.first - first) * d->size, d->size, r.numel, r.in_param);
  return PHX_OK;
}

/* kind: 1 for the first behind the weights. */
static phx_status hash_tensor(phx__drift *d, uint32_t kind, const void *from, int32_t dtype, phx_error *err) {
  d->hashes = d->own + (size_t)kind * d->n_params;
  d->size = (int64_t)phx_dtype_bytes(dtype);
  return phx__state_read(d->rt, d->ticket->place, from, d->ticket->numel * d->size, hash_ticket_part, d, err);
}

static phx_status look_at_ticket(void *arg, const phx_ticket *t, phx_error *err) {
  phx__drift *d = arg;
  const phx_device *device = d->rt->device;
  const phx_model *m = d->rt->prepared->model;
  const phx_optim *o = &d->rt->optim.table;
  phx__range r = {0};
  phx_status status = device->stream_synchronize(device->ctx, t->stream, err);
  d->ticket = t;
  if (!status && d->masters) status = hash_tensor(d, 1, t->master, PHX_F32, err);
  for (uint32_t k = 0; k < o->n_states && !status; k++)
    status = hash_tensor(d, 1 + d->masters + k, t->states[k], o->states[k].dtype, err);
  while (phx__layout_next(m, t->unit, PHX_FLAT_TRAINABLE, t->first, t->numel, &r))
    d->updated[r.param - m->params] += r.numel;
  return status;
}

void phx__drift_watch(phx__drift *d) {
  memset(d->own, 0, d->n * sizeof *d->own);
  memset(d->updated, 0, d->n_params * sizeof *d->updated);
  d->rt->optim.after_ticket = look_at_ticket;
  d->rt->optim.after_ticket_arg = d;
}

/* ---- what differs ---- */

/* Has this rank all of tensor i? */
static bool whole(const phx__drift *d, uint32_t i) {
  const uint32_t param = i % d->n_params;
  return i < d->n_params || d->updated[param] == phx_model_param(d->rt->prepared->model, param)->numel;
}

/* "rank 2": those whose hash is not what most have, of the ranks that have the tensor. */
static void name_ranks(uint64_t (*all)[2], int32_t size, char *text, size_t bytes) {
  int32_t usual = 0, most = 0, named = 0;
  size_t used = 0;
  for (int32_t r = 0; r < size; r++) {
    int32_t count = 0;
    for (int32_t s = 0; s < size && all[r][1]; s++) count += all[s][1] && all[s][0] == all[r][0];
    if (count > most) {
      most = count;
      usual = r;
    }
  }
  for (int32_t r = 0; r < size && used + 24 < bytes; r++)
    if (all[r][1] && all[r][0] != all[usual][0])
      used += (size_t)snprintf(text + used, bytes - used, named++ ? ", %d" : "rank %d", r);
  snprintf(text + used, bytes - used, " against rank %d%s", usual, most > 1 ? " and those that agree with it" : "");
}

/* "weights", "masters", "optimizer states v" */
static void name_kind(const phx__drift *d, uint32_t kind, char *text, size_t bytes) {
  const uint32_t states = 1 + d->masters;
  if (kind >= states)
    snprintf(text, bytes, "optimizer states %s", d->rt->optim.table.states[kind - states].name);
  else
    snprintf(text, bytes, "%s", kind ? "masters" : "weights");
}

static phx_status say_drift(phx__drift *d, int64_t step, uint32_t first, uint32_t different, phx_error *err) {
  const phx_comm *c = d->rt->core;
  const uint64_t mine[2] = {d->own[first], whole(d, first)};
  uint64_t all[PHX_RANKS_MAX][2];
  char ranks[160], kind[64], when[48] = "at the start";
  PHX_TRY(PHX__IN_COMM(d->rt->job, c->all_gather(c->ctx, mine, all, 2, PHX_U64, NULL, err)));
  name_ranks(all, c->size, ranks, sizeof ranks);
  name_kind(d, first / d->n_params, kind, sizeof kind);
  if (step > 0) snprintf(when, sizeof when, "step %" PRId64, step);
  return phx_fail(err, PHX_COMM,
                  "%s: the ranks' %s have drifted apart: '%s' is the first of %u tensors that differ, %s; a rank's "
                  "memory or its arithmetic is wrong: do not go on from this state",
                  when, kind, phx_model_param(d->rt->prepared->model, first % d->n_params)->name, different, ranks);
}

/* After the exchange: who has the tensor has the same, or nobody has it. */
static bool equal(const phx__drift *d, uint32_t i) {
  const uint64_t least = d->spread[i], complement = d->spread[d->n + i];
  return least == ~complement || (least == UINT64_MAX && complement == UINT64_MAX);
}

phx_status phx__drift_check(phx__drift *d, int64_t step, phx_error *err) {
  const phx__runtime *rt = d->rt;
  uint32_t different = 0, first = 0;
  d->rt->optim.after_ticket = NULL;
  memset(d->own, 0, d->n_params * sizeof *d->own);
  phx_status status = phx__state_prepare(d->rt, PHX_PREPARE_COMPARE, err);
  for (uint32_t s = 0; s < rt->prepared->model->n_stages && !status; s++) status = hash_stage(d, s, err);
  if (status) return status;
  for (uint32_t i = 0; i < d->n; i++) {
    d->spread[i] = whole(d, i) ? d->own[i] : UINT64_MAX;
    d->spread[d->n + i] = whole(d, i) ? ~d->own[i] : UINT64_MAX;
  }
  PHX_TRY(PHX__IN_COMM(rt->job, rt->core->all_reduce(rt->core->ctx, d->spread, d->spread, 2 * (int64_t)d->n, PHX_U64,
                                                     PHX_MIN, NULL, err)));
  for (uint32_t i = d->n; i-- > 0;)
    if (!equal(d, i)) {
      different++;
      first = i;
    }
  return different ? say_drift(d, step, first, different, err) : PHX_OK;
}
