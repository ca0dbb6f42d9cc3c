/* plugins/zero/zero_whole.c - weights that every rank keeps whole, after an update: all of them (stages 1 and 2), small
 * parameters (stage 3).
 *
 * Nothing waits here: gathers run on the communication stream beside the next forward pass, in the order in which it
 * reads units, and a stage waits for the last of its own.  So update's second half of the traffic hides behind compute
 * as the first does, which the paper leaves at the end of the step (arXiv 1910.02054, 5.2, 7.1).
 * Invariant: one stream, one order: a unit's event stands for all units before it.  Shares are read by peers until all
 * is done: whoever writes weights settles first. */
#include "zero.h"

static phx_status copy_owned_to_pack(const zero_rank *r, uint32_t flat, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_device *d = r->s.device;
  int64_t share = zero_share(p, flat), border = share * r->s.comm->rank;
  for (uint32_t i = 0; i < p->model->n_params; i++) {
    const phx_param *param = phx_model_param(p->model, i);
    if (p->persist[i] < 0 || ((param->flags & PHX_PARAM_FROZEN) != 0) != (flat == PHX_FLAT_FROZEN)) continue;
    int64_t begin = zero_unit_first(p, param->unit, flat) + param->offset, end = begin + param->numel;
    int64_t from = begin > border ? begin : border, to = end < border + share ? end : border + share;
    if (from >= to) continue;
    PHX_TRY(d->copy(d->ctx, zero_weights(r, ZERO_PERSIST + flat, p->persist[i] + from - begin),
                    zero_weights(r, ZERO_WEIGHT + flat, from - border),
                    (to - from) * phx_kit_weight_bytes(p->topology), r->s.stream, err));
  }
  return PHX_OK;
}

/* What a rank owns of a pack is contiguous in it: one broadcast from each. */
static phx_status refresh_pack(const zero_rank *r, uint32_t flat, phx_error *err) {
  const phx_comm *c = r->s.comm;
  phx_status status = copy_owned_to_pack(r, flat, err);
  for (int32_t owner = 0; owner < c->size && status == PHX_OK; owner++) {
    int64_t first, numel = zero_pack_part(&r->plan, flat, owner, &first);
    if (numel == 0) continue;
    status = c->broadcast(c->ctx, zero_weights(r, ZERO_PERSIST + flat, first), numel,
                          r->plan.topology->compute_dtype, owner, r->s.stream, err);
  }
  return status;
}

/* Either all at once, or unit after unit from their owners (a range of the model is nobody's equal part, so there is
 * nothing an all_gather could fill in place). */
static phx_status spread_flat(const zero_rank *r, uint32_t flat, phx_error *err) {
  const phx_comm *c = r->s.comm;
  const phx_device *d = r->s.device;
  const zero_plan *p = &r->plan;
  int32_t dtype = p->topology->compute_dtype;
  int64_t share = zero_share(p, flat);
  if (zero_at_once(p, flat))
    PHX_TRY(c->all_gather(c->ctx, zero_weights(r, ZERO_WEIGHT + flat, c->rank * share),
                          zero_weights(r, ZERO_WEIGHT + flat, 0), share, dtype, r->s.stream, err));
  for (uint32_t k = 0, list = flat * p->model->n_units; k < p->model->n_units; k++, list++) {
    uint32_t u = p->forward[k];
    if (phx_model_unit(p->model, u)->blocks[flat] == 0) continue;
    c->annotate(c->ctx, (int32_t)u);
    for (uint32_t i = p->spread.first[list]; i < p->spread.first[list + 1]; i++) {
      const zero_piece *piece = &p->spread.of[i];
      PHX_TRY(c->broadcast(c->ctx, zero_weights(r, ZERO_WEIGHT + flat, piece->at), piece->numel, dtype,
                           piece->owner, r->s.stream, err));
    }
    PHX_TRY(d->event_record(d->ctx, r->gathered[u], r->s.stream, err));
  }
  return PHX_OK;
}

phx_status zero_make_whole(const zero_rank *r, uint32_t flat, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_device *d = r->s.device;
  bool sharded = p->config->stage == 3;
  if (!p->several || p->model->total_blocks[flat] == 0 || (sharded && p->pack[flat] == 0)) return PHX_OK;
  r->s.comm->annotate(r->s.comm->ctx, -1);
  PHX_TRY(phx_kit_after(&r->s, r->mark[0], NULL, r->s.stream, err));
  PHX_TRY(sharded ? refresh_pack(r, flat, err) : spread_flat(r, flat, err));
  PHX_TRY(d->event_record(d->ctx, r->whole[0], r->s.stream, err));
  return PHX_OK;
}

phx_status zero_settle(const zero_rank *r, phx_error *err) {
  return r->s.device->stream_wait(r->s.device->ctx, NULL, r->whole[0], err);
}

/* Frozen weights never change in a step: state_changed has settled them. */
phx_event *zero_whole_ready(const zero_rank *r, uint32_t stage, int32_t pass) {
  const zero_plan *p = &r->plan;
  const phx_stage *s = phx_model_stage(p->model, stage);
  uint32_t reads = pass == PHX_PASS_BACKWARD ? PHX_USE_BACKWARD : PHX_USE_FORWARD, last = 0;
  if (!p->several) return NULL;
  if (p->config->stage == 3) return p->pack[PHX_FLAT_TRAINABLE] > 0 ? r->whole[0] : NULL;
  phx_event *ready = NULL;
  for (uint32_t i = 0; i < s->n_uses; i++) {
    const phx_use *use = phx_model_use(p->model, s->first_use + i);
    if (!(use->flags & reads) || phx_model_unit(p->model, use->unit)->blocks[PHX_FLAT_TRAINABLE] == 0) continue;
    if (ready && p->turn[use->unit] < last) continue;
    last = p->turn[use->unit];
    ready = r->gathered[use->unit];
  }
  return ready;
}

void zero_make_whole_traffic(const zero_plan *p, uint32_t flat, phx_estimate *out) {
  const phx_topology *t = p->topology;
  uint32_t n_units = p->model->n_units;
  if (!p->several || p->model->total_blocks[flat] == 0) return;
  if (p->config->stage < 3) {
    if (zero_at_once(p, flat))
      phx_kit_estimate_call(out, t, PHX_OP_ALL_GATHER, zero_share(p, flat), t->compute_dtype, 0, 1);
    for (uint32_t i = p->spread.first[flat * n_units]; i < p->spread.first[(flat + 1) * n_units]; i++)
      phx_kit_estimate_call(out, t, PHX_OP_BROADCAST, p->spread.of[i].numel, t->compute_dtype, p->spread.of[i].owner,
                            1);
    return;
  }
  for (int32_t owner = 0; owner < t->world_size; owner++) {
    int64_t first, numel = zero_pack_part(p, flat, owner, &first);
    if (numel > 0) phx_kit_estimate_call(out, t, PHX_OP_BROADCAST, numel, t->compute_dtype, owner, 1);
  }
}
