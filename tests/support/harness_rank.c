/* harness_rank.c - one rank of the harness: a strategy driven step by step, its stages run by the toy model, under the
 * strategy's own schedule where it has one.  Threads: one per rank. */
#include <stdlib.h>
#include <string.h>
#include "harness_inner.h"

/* ---- running stages ---- */
static void run_stage(rank_state *k, uint32_t stage, int32_t pass, int32_t mb, int32_t slot, const phx_view *view) {
  const toy *t = k->run->t;
  bool back = pass == PHX_PASS_BACKWARD;
  int32_t data_rank = k->layout.data_rank;
  float(*in)[TOY_BOUNDARY] = k->boundary[slot][stage], (*out)[TOY_BOUNDARY] = k->boundary[slot][stage + 1];
  if (stage == 0 && !back) toy_data(in[0], k->step, mb, data_rank);
  toy_call c = {.t = t,
                .stage = stage,
                .step = k->step,
                .micro_batch = mb,
                .data_rank = data_rank,
                .params = view->params,
                .n_params = view->n_params,
                .param_stride = view->param_stride,
                .input = in[0],
                .output = out[0],
                .d_output = stage + 1 < t->model.n_stages ? out[1] : NULL,
                .d_input = stage ? in[1] : NULL};
  bool runs = !t->runs || t->runs(stage, k->step, mb, data_rank);
  if (runs && back) toy_backward(&c);
  if (runs && !back) toy_forward(&c);
  if (!runs && back && stage) memcpy(in[1], out[1], sizeof in[1]);
  if (!runs && !back) memcpy(out[0], in[0], sizeof in[0]);
}

static int64_t count_in_flight(const rank_state *k) {
  phx_comm_stats stats = {.struct_size = sizeof stats};
  int64_t n = (int64_t)k->out->n_trace;
  k->comm->stats(k->comm->ctx, &stats);
  for (int i = 0; i < PHX_OPS; i++) n -= stats.calls[i];
  return n;
}

static phx_status pass_stage(rank_state *k, uint32_t stage, int32_t pass, int32_t mb, phx_error *err) {
  run *r = k->run;
  const phx_view *view = NULL;
  phx_status status = PHX_OK;
  bool runs = !r->t->runs || r->t->runs(stage, k->step, mb, k->layout.data_rank);
  uint32_t flags = pass != PHX_PASS_BACKWARD ? 0 : PHX_RELEASE_LAST_USE | (runs ? 0 : PHX_RELEASE_NO_GRADIENT);
  k->pass = pass, k->stage = (int32_t)stage, k->in_acquire = true;
  PHX_TRY_GOTO(r->table->acquire(k->strategy, stage, pass, mb, NULL, &view, err), status, done);
  k->in_acquire = false;
  if (!view) {
    status = phx_fail(err, PHX_INTERNAL, "acquire of stage %u gave no view", stage);
    goto done;
  }
  if (runs || pass == PHX_PASS_EVALUATE) { /* a stage that does not run waits for nothing and reads nothing */
    if (view->ready) PHX_TRY_GOTO(k->device->stream_wait(k->device->ctx, NULL, view->ready, err), status, done);
    if (pass == PHX_PASS_FORWARD) k->out->forward_in_flight[stage] = count_in_flight(k);
    harness__check_view(k, stage, pass, view);
  }
  if (pass != PHX_PASS_RECOMPUTE) run_stage(k, stage, pass, mb, 0, view);
  PHX_TRY_GOTO(r->table->release(k->strategy, stage, pass, mb, flags, NULL, err), status, done);
  int64_t in_flight = pass == PHX_PASS_BACKWARD ? count_in_flight(k) : 0;
  if (in_flight > k->out->most_in_flight) k->out->most_in_flight = in_flight;
done:
  k->pass = k->stage = -1;
  return status;
}

/* A stage is worth recomputing when its backward pass reads what its forward pass reads (not an embedding). */
static bool recomputes(const run *r, uint32_t stage) {
  const phx_stage *s = &r->t->stages[stage];
  for (uint32_t i = 0; i < s->n_uses; i++) {
    uint32_t flags = r->t->uses[s->first_use + i].flags;
    if ((flags & PHX_USE_FORWARD) && !(flags & PHX_USE_BACKWARD)) return false;
  }
  return r->c->recompute;
}

static phx_status micro_batches(rank_state *k, phx_error *err) {
  run *r = k->run;
  uint32_t n = r->t->model.n_stages;
  for (int32_t mb = 0; mb < r->what.accumulate; mb++) {
    PHX_TRY(r->table->begin_micro_batch(k->strategy, mb, mb + 1 == r->what.accumulate, err));
    for (uint32_t s = 0; s < n; s++) PHX_TRY(pass_stage(k, s, PHX_PASS_FORWARD, mb, err));
    for (uint32_t s = n; s-- > 0;) {
      if (recomputes(r, s)) PHX_TRY(pass_stage(k, s, PHX_PASS_RECOMPUTE, mb, err));
      PHX_TRY(pass_stage(k, s, PHX_PASS_BACKWARD, mb, err));
    }
  }
  return PHX_OK;
}

/* ---- executor of run_step ---- */
static int64_t x_boundary_bytes(void *ctx, uint32_t stage) {
  (void)ctx, (void)stage;
  return TOY_BOUNDARY * 4;
}
static void *x_boundary(void *ctx, uint32_t stage, int32_t slot, int32_t gradient) {
  return ((rank_state *)ctx)->boundary[slot][stage + 1][gradient];
}
static phx_status x_run(rank_state *k, uint32_t stage, int32_t pass, int32_t mb, int32_t slot, const phx_view *view,
                        phx_error *err) {
  if (slot < 0 || slot >= SLOTS || slot >= k->layout.activation_slots || !k->stage_owned[stage])
    return phx_fail(err, PHX_INVALID, "stage %u in slot %d", stage, slot);
  if (view->ready) PHX_TRY(k->device->stream_wait(k->device->ctx, NULL, view->ready, err));
  harness__check_view(k, stage, pass, view);
  run_stage(k, stage, pass, mb, slot, view);
  return PHX_OK;
}
static phx_status x_forward(void *ctx, uint32_t stage, int32_t mb, int32_t slot, const phx_view *view, phx_error *err) {
  return x_run(ctx, stage, PHX_PASS_FORWARD, mb, slot, view, err);
}
static phx_status x_backward(void *ctx, uint32_t stage, int32_t mb, int32_t slot, const phx_view *view,
                             phx_error *err) {
  return x_run(ctx, stage, PHX_PASS_BACKWARD, mb, slot, view, err);
}

static int32_t x_runs(void *ctx, uint32_t stage, int32_t mb) {
  const rank_state *k = ctx;
  return !k->run->t->runs || k->run->t->runs(stage, k->step, mb, k->layout.data_rank);
}

/* ---- a rank ---- */
static phx_status one_step(rank_state *k, phx_error *err) {
  run *r = k->run;
  const phx_strategy_table *t = r->table;
  phx_status status = PHX_OK;
  bool discard = k->step == r->c->discard_step;
  phx_accumulator acc = {sizeof acc, k, harness__norm_add};
  int64_t calls[PHX_OPS], sent[PHX_OPS];
  memcpy(calls, k->out->calls, sizeof calls), memcpy(sent, k->out->sent, sizeof sent);
  memset(k->out->calls, 0, sizeof calls), memset(k->out->sent, 0, sizeof sent);
  k->out->norm_blocks = 0;
  if (t->run_step) {
    phx_executor x = {.struct_size = sizeof x,
                      .ctx = k,
                      .micro_batches = r->what.accumulate,
                      .n_stages = r->t->model.n_stages,
                      .boundary_bytes = x_boundary_bytes,
                      .boundary = x_boundary,
                      .forward = x_forward,
                      .backward = x_backward,
                      .runs = x_runs};
    PHX_TRY_GOTO(t->run_step(k->strategy, &x, err), status, done);
  } else {
    PHX_TRY_GOTO(micro_batches(k, err), status, done);
  }
  if (discard && r->c->discard_early) {
    PHX_TRY_GOTO(t->discard_gradients(k->strategy, err), status, done);
  } else {
    PHX_TRY_GOTO(t->finish_gradients(k->strategy, err), status, done);
    PHX_TRY_GOTO(t->gradient_norm(k->strategy, &acc, err), status, done);
    if (discard) PHX_TRY_GOTO(t->discard_gradients(k->strategy, err), status, done);
  }
  if (discard) goto done;
  PHX_TRY_GOTO(t->update(k->strategy, k->step, (float)(1.0 / ((double)r->what.data_ranks * r->what.accumulate)), err),
               status, done);
  harness__check_traffic(k);
done:
  if (discard) memcpy(k->out->calls, calls, sizeof calls), memcpy(k->out->sent, sent, sizeof sent);
  return status;
}

static phx_status evaluate(rank_state *k, phx_error *err) {
  int64_t calls[PHX_OPS], sent[PHX_OPS];
  memcpy(calls, k->out->calls, sizeof calls), memcpy(sent, k->out->sent, sizeof sent);
  for (uint32_t s = 0; s < k->run->t->model.n_stages; s++) PHX_TRY(pass_stage(k, s, PHX_PASS_EVALUATE, 0, err));
  memcpy(k->out->calls, calls, sizeof calls), memcpy(k->out->sent, sent, sizeof sent);
  return PHX_OK;
}

#define SIX TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4
static const int64_t boundary_bytes[TOY_STAGES] = {SIX, SIX, SIX, SIX};

phx_status harness__topology(run *r, int32_t rank, phx_topology *t, phx_layout *l, uint8_t *stages, uint8_t *units,
                             phx_error *err) {
  const harness_config *c = r->c;
  *t = (phx_topology){.struct_size = sizeof *t,
                      .rank = rank,
                      .world_size = c->ranks,
                      .local_rank = rank,
                      .local_size = c->ranks,
                      .accumulate = c->accumulate ? c->accumulate : 1,
                      .reduce = c->reduce,
                      .compute_dtype = c->compute_dtype ? c->compute_dtype : PHX_F32,
                      .reduce_dtype = c->reduce_dtype ? c->reduce_dtype : PHX_F32,
                      .overlaps = 1,
                      .n_optim_states = c->sgd ? 0 : 2,
                      .optim_dtype = {PHX_F32, PHX_F32},
                      .payload = loopback_payload,
                      .boundary_bytes = boundary_bytes};
  *l = (phx_layout){.struct_size = sizeof *l,
                    .data_rank = rank,
                    .data_size = c->ranks,
                    .activation_slots = 1,
                    .n_axes = 1,
                    .axes = {{"data", c->ranks, rank}},
                    .stage_owned = stages,
                    .unit_owned = units};
  memset(stages, 1, r->t->model.n_stages);
  memset(units, 1, r->t->model.n_units);
  return r->table->layout ? r->table->layout(r->config, t, &r->t->model, l, err) : PHX_OK;
}

static phx_status rank_body(rank_state *k, phx_error *err) {
  run *r = k->run;
  const phx_strategy_table *t = r->table;
  PHX_TRY(harness__topology(r, k->rank, &k->topology, &k->layout, k->stage_owned, k->unit_owned, err));
  k->out->planned.struct_size = sizeof k->out->planned;
  PHX_TRY(t->estimate(r->config, &k->topology, &r->t->model, &k->out->planned, err));
  PHX_TRY(t->create(&k->host, r->config, &k->topology, &r->t->model, &k->strategy, err));
  PHX_TRY(harness__visit_state(k, true, err));
  PHX_TRY(t->state_changed(k->strategy, err));
  k->steady = true;
  for (k->step = 1; k->step <= r->what.steps; k->step++) {
    PHX_TRY(one_step(k, err));
    if (r->c->evaluate) PHX_TRY(evaluate(k, err));
  }
  k->step = r->what.steps;
  PHX_TRY(harness__visit_state(k, false, err));
  if (count_in_flight(k) != 0)
    harness__note(r, "rank %d: %lld collectives were in flight while state was visited", k->rank,
                  (long long)count_in_flight(k));
  return PHX_OK;
}

void *harness__rank(void *arg) {
  rank_state *k = arg;
  run *r = k->run;
  phx_error err = PHX_ERROR_INIT;
  k->device = loopback_device_create(r->c->stream_mode);
  harness__host(k);
  k->comm = loopback_comm(r->world, k->rank, k->device, &k->watch);
  k->pass = k->stage = -1;
  k->out->status = rank_body(k, &err);
  k->out->error = err;
  if (k->out->status != PHX_OK) loopback_abort(r->world, err.message);
  r->table->destroy(k->strategy);
  for (int i = 0; i < k->n_live; i++) k->out->leaked_bytes += k->live[i].bytes, free(k->live[i].p);
  k->comm->destroy(k->comm);
  loopback_device_destroy(k->device);
  return NULL;
}
