/* plugins/zero/zero_reduce.c - gradients: where they are written, when they are reduced, and to whom.
 *
 * Gradients become complete in the order of the backward pass; every reduce_bucket_size elements are a bucket, and a
 * bucket is reduced piece by piece to the owners of its pieces (reductions go to one rank: shares are cut across units,
 * so a bucket is rarely an equal part of everybody's).  Where gradients are whole they are reduced in place; else they
 * live in windows that are taken over once their bucket was reduced.
 * Invariant: buckets are reduced in one order on one stream, so waiting for one waits for all before it. */
#include "zero.h"
#include <stdlib.h>
#include <string.h>

phx_status zero_reducing_create(const zero_rank *r, phx_kit_views *views, zero_reducing *out, phx_error *err) {
  size_t n = r->plan.model->n_units + 1u;
  *out = (zero_reducing){.views = views, .open = calloc(n, 1), .complete = calloc(n, 1)};
  if (out->open && out->complete) return PHX_OK;
  return phx_fail(err, PHX_NOMEM, "no memory for the gradients of %u units", r->plan.model->n_units);
}

void zero_reducing_destroy(zero_reducing *now) {
  free(now->open);
  free(now->complete);
  memset(now, 0, sizeof *now);
}

void zero_begin_gradients(const zero_rank *r, zero_reducing *now, int32_t index, bool last) {
  const phx_model *m = r->plan.model;
  bool adds = phx_kit_adds_reduced(r->plan.topology);
  now->micro_batch = index;
  now->reducing = adds || last;
  now->settled = index == 0; /* a step begins after the one before was finished or discarded */
  now->next_bucket = 0;
  memset(now->complete, 0, m->n_units);
  memset(now->open, 0, m->n_units);
  phx_kit_views_begin(now->views, adds || index == 0);
  for (uint32_t u = 0; u < m->n_units; u++) {
    if (phx_model_unit(m, u)->blocks[PHX_FLAT_TRAINABLE] == 0) continue;
    now->views->places[u].gradient =
        r->plan.whole ? zero_region(r, ZERO_GRADIENT) + zero_unit_first(&r->plan, u, PHX_FLAT_TRAINABLE)
                      : zero_region(r, ZERO_WINDOWS) + r->plan.gradient_at[u];
  }
}

phx_status zero_open_gradients(const zero_rank *r, zero_reducing *now, uint32_t s, phx_stream *stream, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_device *d = r->s.device;
  const phx_stage *stage = phx_model_stage(p->model, s);
  if (!now->settled && p->n_buckets > 0 && phx_kit_adds_reduced(p->topology))
    PHX_TRY(d->stream_wait(d->ctx, stream, r->reduced[p->n_buckets - 1], err));
  now->settled = true;
  for (uint32_t i = 0; i < stage->n_uses && !p->whole; i++) {
    const phx_use *use = phx_model_use(p->model, stage->first_use + i);
    float *gradient = now->views->places[use->unit].gradient;
    if (!(use->flags & PHX_USE_GRADIENT) || !gradient || now->open[use->unit]) continue;
    if (p->gradient_after[use->unit] >= 0)
      PHX_TRY(d->stream_wait(d->ctx, stream, r->reduced[p->gradient_after[use->unit]], err));
    PHX_TRY(phx_kit_zero_gaps(d, p->model, use->unit, gradient, stream, err));
    now->open[use->unit] = 1;
  }
  return PHX_OK;
}

static float *share_at(const zero_rank *r, int64_t at) {
  return zero_region(r, ZERO_SHARE) + (at - zero_share(&r->plan, PHX_FLAT_TRAINABLE) * r->plan.topology->rank);
}

const float *zero_reduced(const zero_rank *r, int64_t at) {
  return zero_region(r, ZERO_SHARE) ? share_at(r, at) : zero_region(r, ZERO_GRADIENT) + at;
}

/* One piece's sum: from every rank's part to its owner; one rank rounds as many would. */
static phx_status reduce_through(const zero_rank *r, const zero_piece *piece, float *from, float *to, phx_error *err) {
  const phx_comm *c = r->s.comm;
  const phx_device *d = r->s.device;
  phx_stream *s = r->s.stream;
  int32_t dtype = r->plan.topology->reduce_dtype;
  void *wire = zero_region(r, ZERO_WIRE), *src = wire ? wire : from, *dst = wire ? wire : to;
  if (wire) PHX_TRY(d->cast(d->ctx, wire, dtype, from, PHX_F32, piece->numel, s, err));
  if (r->plan.several)
    PHX_TRY(c->reduce(c->ctx, src, dst, piece->numel, dtype, PHX_SUM, piece->owner, s, err));
  else if (src != dst)
    PHX_TRY(d->copy(d->ctx, dst, src, piece->numel * 4, s, err));
  if (wire && piece->owner == c->rank)
    PHX_TRY(d->cast(d->ctx, to, PHX_F32, wire, dtype, piece->numel, s, err));
  return PHX_OK;
}

/* The first sums of a step go where they stay; those of later micro-batches pass through memory of their own. */
static phx_status reduce_piece(const zero_rank *r, const zero_reducing *now, const zero_piece *piece, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_comm *c = r->s.comm;
  const phx_device *d = r->s.device;
  bool mine = piece->owner == c->rank, later = phx_kit_adds_reduced(p->topology) && now->micro_batch > 0;
  const phx_kit_place *place = &now->views->places[piece->unit];
  float *from = p->whole ? zero_region(r, ZERO_GRADIENT) + piece->at
                         : place->gradient + (piece->at - zero_unit_first(p, piece->unit, PHX_FLAT_TRAINABLE));
  float *stays = NULL;
  if (mine) stays = zero_region(r, ZERO_SHARE) ? share_at(r, piece->at) : from;
  float *to = stays;
  if (mine && later) to = p->whole ? from : zero_region(r, ZERO_STAGING);
  PHX_TRY(reduce_through(r, piece, from, to, err));
  if (mine && later) PHX_TRY(d->add(d->ctx, stays, to, piece->numel, r->s.stream, err));
  return PHX_OK;
}

static phx_status reduce_bucket(const zero_rank *r, const zero_reducing *now, uint32_t b,
                                phx_stream *stream, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_device *d = r->s.device;
  r->s.comm->annotate(r->s.comm->ctx, (int32_t)p->order.units[p->buckets[b].last]);
  for (uint32_t i = p->reduces.first[b]; i < p->reduces.first[b + 1]; i++)
    PHX_TRY(reduce_piece(r, now, &p->reduces.of[i], err));
  PHX_TRY(d->event_record(d->ctx, r->reduced[b], r->s.stream, err));
  if (!p->config->overlap_comm) PHX_TRY(d->stream_wait(d->ctx, stream, r->reduced[b], err));
  return PHX_OK;
}

phx_status zero_complete(const zero_rank *r, zero_reducing *now, uint32_t s, phx_stream *stream, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_stage *stage = phx_model_stage(p->model, s);
  bool marked = false;
  if (!now->reducing) return PHX_OK;
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(p->model, stage->first_use + i);
    if (use->flags & PHX_USE_LAST) now->complete[use->unit] = 1;
  }
  while (now->next_bucket < p->n_buckets && now->complete[p->order.units[p->buckets[now->next_bucket].last]]) {
    if (!marked) PHX_TRY(phx_kit_after(&r->s, r->mark[0], stream, r->s.stream, err));
    marked = true;
    PHX_TRY(reduce_bucket(r, now, now->next_bucket, stream, err));
    now->next_bucket++;
  }
  return PHX_OK;
}

phx_status zero_finish(const zero_rank *r, const zero_reducing *now, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_device *d = r->s.device;
  if (now->next_bucket < p->n_buckets)
    return phx_fail(err, PHX_STATE,
                    "gradients are to be finished, but bucket %u of %u waits for unit '%s': its last stage was not "
                    "released with LAST_USE in the step's last micro-batch",
                    now->next_bucket, p->n_buckets,
                    phx_model_unit(p->model, p->order.units[p->buckets[now->next_bucket].last])->name);
  return p->n_buckets > 0 ? d->stream_wait(d->ctx, NULL, r->reduced[p->n_buckets - 1], err) : PHX_OK;
}

phx_status zero_discard(const zero_rank *r, zero_reducing *now, phx_error *err) {
  now->next_bucket = 0;
  now->reducing = false;
  return r->s.device->stream_synchronize(r->s.device->ctx, r->s.stream, err);
}

void zero_reduce_traffic(const zero_plan *p, phx_estimate *out) {
  const phx_topology *t = p->topology;
  for (uint32_t i = 0; i < p->reduces.n && p->several; i++)
    phx_kit_estimate_call(out, t, PHX_OP_REDUCE, p->reduces.of[i].numel, t->reduce_dtype, p->reduces.of[i].owner,
                          phx_kit_adds_reduced(t) ? t->accumulate : 1);
}
