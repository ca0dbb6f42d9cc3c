/* plugins/fsdp/fsdp.c - fully sharded data parallelism: a unit's weights, gradients and states are cut in equal shards,
 * weights are gathered when a stage comes, gradients are reduced and scattered when a unit's last stage has gone.
 * Zhao et al., "PyTorch FSDP", VLDB 2023 (arXiv 2304.11277).
 *
 * The order of a micro-batch is written down in a program (kit: program.c): each acquire and each release is a position
 * of it, with the gathers, drops and reductions to issue there.  So all ranks issue the same collectives in the same
 * order, whatever a rank skips, and every window has its fixed place in the pool.
 *
 *   acquire   [gather what the stage needs, and the next `prefetch` units]  [open windows for gradients]  -> view
 *   release   [drop what the next position does not want]  [reduce what is complete]  [close windows of the one before]
 *
 * Two streams.  The host computes on its stream; gathers and reductions run on the communication stream in the order of
 * issue.  Before a batch of them it waits for what the compute stream has been given so far; the compute stream waits
 * for a gather through view->ready, and for a reduction only when its window is opened for another unit.
 *
 * sharding = none keeps everything whole on every rank, in the same structure: nothing is gathered, and a reduction is
 * an all_reduce.  With one rank all is whole anyway and is run so, unless gather_alone asks for the copies.
 *
 * With [precision] compute = bf16 the held weights are bf16, and so is what is gathered; fp32 masters of the same
 * blocks stand behind them.  [main] only.  Does not: offload, shard within groups (fsdp_plan.group is where it comes).
 * Reading order: fsdp.h, plan.c, state.c (what a rank holds), and here what moves in a step. */
#include "fsdp.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- life ---- */

static void fsdp_destroy(phx_strategy *self) {
  if (!self) return;
  uint32_t n = self->model->n_units;
  phx_kit_events_destroy(&self->s, n, self->gathered);
  phx_kit_events_destroy(&self->s, n, self->reduced);
  phx_kit_events_destroy(&self->s, 1, self->mark);
  phx_kit_regions_release(&self->s, self->plan.regions, FSDP_REGIONS);
  phx_kit_services_close(&self->s);
  phx_kit_views_destroy(&self->views);
  fsdp_plan_destroy(&self->plan);
  free(self->gather_number);
  free(self->reduce_number);
  free(self->reduce_offset);
  free(self);
}

/* Everything that is not in a window is where it always is. */
static void place_at_rest(phx_strategy *self) {
  for (uint32_t u = 0; u < self->model->n_units; u++) {
    const phx_unit *unit = phx_model_unit(self->model, u);
    phx_kit_place *place = &self->views.places[u];
    *place = (phx_kit_place){{NULL, NULL}, NULL};
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
      if (!self->plan.sharded && unit->blocks[flat] > 0) place->weight[flat] = fsdp_held_weight(self, u, flat);
    if (!self->plan.windows && unit->blocks[PHX_FLAT_TRAINABLE] > 0) place->gradient = fsdp_kept_gradient(self, u);
    self->gather_number[u] = self->reduce_number[u] = 0;
  }
}

static void say_what_accumulation_costs(const phx_strategy *self) {
  const phx_topology *t = self->topology;
  char text[320];
  if (t->rank != 0 || t->accumulate == 1 || !self->plan.sharded) return;
  if (self->plan.adds)
    snprintf(text, sizeof text,
             "[batch] reduce = micro_batch: gradients stay sharded, and are sent %d times a step; reduce = step would "
             "send them once, and keep whole gradients on every rank",
             t->accumulate);
  else
    snprintf(text, sizeof text,
             "[batch] reduce = step with accumulate = %d: every rank keeps whole gradients, %.1f MiB (4 bytes a "
             "parameter); reduce = micro_batch would keep them sharded, and send %d times as much",
             t->accumulate, (double)self->plan.regions[FSDP_GRADIENT].bytes / (1 << 20), t->accumulate);
  self->s.host->log(self->s.host->ctx, PHX_LOG_INFO, text);
}

static phx_status fsdp_create(const phx_host *host, const void *config, const phx_topology *topology,
                              const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the strategy");
  *self = (phx_strategy){.topology = topology, .model = model};
  size_t n = model->n_units + 1u;
  phx_status status;
  PHX_TRY_GOTO(fsdp_plan_create(config, topology, model, &self->plan, err), status, done);
  PHX_TRY_GOTO(phx_kit_services_open(host, &self->s, err), status, done);
  PHX_TRY_GOTO(phx_kit_views_create(model, &self->views, err), status, done);
  self->views.weight_dtype = topology->compute_dtype;
  PHX_TRY_GOTO(phx_kit_events_create(&self->s, model->n_units, &self->gathered, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&self->s, model->n_units, &self->reduced, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&self->s, 1, &self->mark, err), status, done);
  PHX_TRY_GOTO(phx_kit_regions_alloc(&self->s, self->plan.regions, FSDP_REGIONS, err), status, done);
  self->gather_number = calloc(n, sizeof *self->gather_number);
  self->reduce_number = calloc(n, sizeof *self->reduce_number);
  self->reduce_offset = calloc(n, sizeof *self->reduce_offset);
  if (!self->gather_number || !self->reduce_number || !self->reduce_offset) {
    status = phx_fail(err, PHX_NOMEM, "no memory for %u units", model->n_units);
    goto done;
  }
  place_at_rest(self);
  say_what_accumulation_costs(self);
  *out = self;
  return PHX_OK;
done:
  fsdp_destroy(self);
  return status;
}

phx_status fsdp_forget_windows(phx_strategy *self, phx_error *err) {
  self->program = NULL;
  self->open = false;
  place_at_rest(self);
  return self->s.device->stream_synchronize(self->s.device->ctx, self->s.stream, err);
}

/* ---- actions ---- */

static phx_status gather(phx_strategy *self, const phx_kit_action *a, phx_error *err) {
  const phx_comm *c = self->s.comm;
  char *window = (char *)self->plan.regions[FSDP_POOL].at + a->offset * 4;
  int32_t dtype = self->topology->compute_dtype;
  c->annotate(c->ctx, (int32_t)a->unit);
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
    int64_t numel = fsdp_part(self, a->unit, flat).per * PHX_BLOCK;
    if (numel == 0) continue;
    PHX_TRY(c->all_gather(c->ctx, fsdp_held_weight(self, a->unit, flat), window, numel, dtype, self->s.stream, err));
    self->views.places[a->unit].weight[flat] = window;
    window += numel * self->plan.group * phx_kit_weight_bytes(self->topology);
  }
  self->gather_number[a->unit] = ++self->issued;
  return self->s.device->event_record(self->s.device->ctx, self->gathered[a->unit], self->s.stream, err);
}

/* The window may still be on its way to peers for another unit: the stream waits for the latest such reduction. */
static phx_status open_gradient(phx_strategy *self, const phx_kit_action *a, phx_stream *stream, phx_error *err) {
  int64_t end = a->offset + self->plan.gradient_numel[a->unit];
  uint32_t latest = a->unit;
  for (uint32_t u = 0; u < self->model->n_units; u++)
    if (self->reduce_number[u] > self->reduce_number[latest] && self->reduce_offset[u] < end &&
        self->reduce_offset[u] + self->plan.gradient_numel[u] > a->offset)
      latest = u;
  if (self->reduce_number[latest] > 0)
    PHX_TRY(self->s.device->stream_wait(self->s.device->ctx, stream, self->reduced[latest], err));
  float *window = (float *)self->plan.regions[FSDP_POOL].at + a->offset;
  self->views.places[a->unit].gradient = window;
  return phx_kit_zero_gaps(self->s.device, self->model, a->unit, window, stream, err);
}

/* Nothing of the stream may touch the window before the gather has: a stage that was skipped did not wait for it. */
static phx_status drop(phx_strategy *self, const phx_kit_action *a, phx_stream *stream, phx_error *err) {
  phx_kit_place *place = &self->views.places[a->unit];
  place->weight[0] = place->weight[1] = NULL;
  self->gather_number[a->unit] = 0;
  return self->s.device->stream_wait(self->s.device->ctx, stream, self->gathered[a->unit], err);
}

/* A unit's gradients: `source` (numel of every rank's part) to the sum in `target`, through the wire's type. */
static phx_status reduce_through(phx_strategy *self, float *source, float *target, int64_t numel, phx_error *err) {
  const phx_comm *c = self->s.comm;
  const phx_device *d = self->s.device;
  phx_stream *s = self->s.stream;
  int32_t dtype = self->topology->reduce_dtype, group = self->plan.group;
  char *wire = self->plan.regions[FSDP_WIRE].at;
  void *src = wire ? (void *)wire : source, *dst = target;
  if (wire) {
    dst = wire + (self->plan.sharded ? c->rank * numel * (int64_t)phx_dtype_bytes(dtype) : 0);
    PHX_TRY(d->cast(d->ctx, wire, dtype, source, PHX_F32, numel * group, s, err));
  }
  PHX_TRY(self->plan.sharded ? c->reduce_scatter(c->ctx, src, dst, numel, dtype, PHX_SUM, s, err)
                             : c->all_reduce(c->ctx, src, dst, numel, dtype, PHX_SUM, s, err));
  if (wire) PHX_TRY(d->cast(d->ctx, target, PHX_F32, dst, dtype, numel, s, err));
  return PHX_OK;
}

static phx_status reduce(phx_strategy *self, const phx_kit_action *a, phx_error *err) {
  const phx_comm *c = self->s.comm;
  const phx_device *d = self->s.device;
  float *source = self->views.places[a->unit].gradient, *total = fsdp_held_gradient(self, a->unit), *target = total;
  bool adds = self->plan.adds && self->micro_batch > 0;
  phx_kit_shard part = fsdp_part(self, a->unit, PHX_FLAT_TRAINABLE);
  int64_t numel = (self->plan.sharded ? part.per : part.blocks) * PHX_BLOCK;
  c->annotate(c->ctx, (int32_t)a->unit);
  if (adds) target = self->plan.sharded ? self->plan.regions[FSDP_REDUCED].at : source;
  PHX_TRY(reduce_through(self, source, target, numel, err));
  if (adds) PHX_TRY(d->add(d->ctx, total, target, numel, self->s.stream, err));
  PHX_TRY(d->event_record(d->ctx, self->reduced[a->unit], self->s.stream, err));
  if (self->plan.windows) {
    self->reduce_number[a->unit] = ++self->issued;
    self->reduce_offset[a->unit] = a->offset;
  }
  return PHX_OK;
}

/* All actions of one acquire or release.  skipped: the host passed the stage over. */
static phx_status run_actions(phx_strategy *self, uint32_t index, bool skipped, phx_stream *stream, phx_error *err) {
  const phx_kit_program *p = self->program;
  bool marked = false;
  phx_status status = PHX_OK;
  for (uint32_t i = p->first[index]; status == PHX_OK && i < p->first[index + 1]; i++) {
    const phx_kit_action *a = &p->actions[i];
    if (a->what == PHX_KIT_REDUCE && !self->reducing) continue;
    if (a->what == PHX_KIT_REDUCE && skipped)
      return phx_fail(err, PHX_STATE,
                      "the gradient of unit '%s' is not complete: its last backward stage was not released with "
                      "LAST_USE",
                      phx_model_unit(self->model, a->unit)->name);
    if (!marked && (a->what == PHX_KIT_GATHER || a->what == PHX_KIT_REDUCE)) {
      PHX_TRY(phx_kit_after(&self->s, self->mark[0], stream, self->s.stream, err));
      marked = true;
    }
    switch (a->what) {
      case PHX_KIT_GATHER:
        status = gather(self, a, err);
        break;
      case PHX_KIT_OPEN:
        status = open_gradient(self, a, stream, err);
        break;
      case PHX_KIT_DROP:
        status = drop(self, a, stream, err);
        break;
      case PHX_KIT_REDUCE:
        status = reduce(self, a, err);
        break;
      case PHX_KIT_CLOSE:
        self->views.places[a->unit].gradient = NULL;
        break;
    }
  }
  return status;
}

/* ---- the step ---- */

/* Brings the program to a position: what the host passes over is still done, so that all ranks stay in step. */
static phx_status go_to(phx_strategy *self, uint32_t position, phx_stream *stream, phx_error *err) {
  phx_status status = PHX_OK;
  for (; status == PHX_OK && self->position < position; self->position++) {
    if (!self->open) status = run_actions(self, 2 * self->position, true, stream, err);
    if (status == PHX_OK) status = run_actions(self, 2 * self->position + 1, true, stream, err);
    self->open = false;
  }
  return status;
}

static phx_status open_position(phx_strategy *self, uint32_t stage, int32_t pass, phx_stream *stream, phx_error *err) {
  uint32_t position = phx_kit_position(self->model, stage, pass);
  if (pass == PHX_PASS_EVALUATE && (self->program != &self->plan.evaluate || position < self->position)) {
    PHX_TRY(fsdp_forget_windows(self, err));
    self->program = &self->plan.evaluate;
    self->position = 0;
  }
  if (!self->program || position < self->position || (pass != PHX_PASS_EVALUATE && self->program != &self->plan.train))
    return phx_fail(err, PHX_STATE, "stage '%s' comes out of order: forward goes up, backward comes down",
                    phx_model_stage(self->model, stage)->name);
  PHX_TRY(go_to(self, position, stream, err));
  if (!self->open) PHX_TRY(run_actions(self, 2 * position, false, stream, err));
  self->open = true;
  return PHX_OK;
}

static phx_status fsdp_begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  if (self->program == &self->plan.train)
    PHX_TRY(go_to(self, self->program->n_positions, NULL, err));
  else if (self->program)
    PHX_TRY(fsdp_forget_windows(self, err)); /* an evaluation, maybe not to its end */
  self->program = &self->plan.train;
  self->position = 0;
  self->micro_batch = index;
  self->reducing = self->plan.adds || last;
  phx_kit_views_begin(&self->views, self->plan.adds || index == 0);
  return PHX_OK;
}

/* The pass may run after the last issued gather among those it reads; earlier ones are complete before it. */
static phx_status last_gather(phx_strategy *self, uint32_t s, int32_t pass, phx_event **out, phx_error *err) {
  const phx_stage *stage = phx_model_stage(self->model, s);
  uint32_t reads = pass == PHX_PASS_BACKWARD ? PHX_USE_BACKWARD : PHX_USE_FORWARD;
  int64_t number = 0;
  *out = NULL;
  for (uint32_t i = 0; self->plan.sharded && i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(self->model, stage->first_use + i);
    if (!(use->flags & reads)) continue;
    if (self->gather_number[use->unit] == 0 && self->plan.weight_numel[use->unit] > 0)
      return phx_fail(err, PHX_UNSUPPORTED,
                      "stage '%s' is recomputed, but declares no backward use of unit '%s', so nothing gathers its "
                      "weights then; do not checkpoint this stage",
                      phx_model_stage(self->model, s)->name, phx_model_unit(self->model, use->unit)->name);
    if (self->gather_number[use->unit] > number) {
      number = self->gather_number[use->unit];
      *out = self->gathered[use->unit];
    }
  }
  return PHX_OK;
}

static phx_status fsdp_acquire(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                               phx_stream *stream, const phx_view **out, phx_error *err) {
  (void)micro_batch;
  phx_event *ready;
  PHX_TRY(open_position(self, stage, pass, stream, err));
  PHX_TRY(last_gather(self, stage, pass, &ready, err));
  *out = phx_kit_view(&self->views, stage, pass, ready);
  return PHX_OK;
}

static phx_status fsdp_release(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                               phx_stream *stream, phx_error *err) {
  (void)micro_batch;
  if (pass == PHX_PASS_RECOMPUTE) return PHX_OK; /* backward of the same stage follows */
  PHX_TRY(open_position(self, stage, pass, stream, err));
  bool backward = pass == PHX_PASS_BACKWARD;
  if (backward && (flags & PHX_RELEASE_NO_GRADIENT))
    PHX_TRY(phx_kit_view_unused(&self->views, self->s.device, stage, stream, err));
  bool incomplete = backward && !(flags & PHX_RELEASE_LAST_USE);
  PHX_TRY(run_actions(self, 2 * self->position + 1, incomplete, stream, err));
  self->position++;
  self->open = false;
  return PHX_OK;
}

static phx_status fsdp_finish_gradients(phx_strategy *self, phx_error *err) {
  if (self->program != &self->plan.train)
    return phx_fail(err, PHX_STATE, "gradients are to be finished, but no micro-batch was begun");
  phx_status status = go_to(self, self->program->n_positions, NULL, err);
  return status == PHX_OK ? fsdp_forget_windows(self, err) : status;
}

static phx_status fsdp_discard_gradients(phx_strategy *self, phx_error *err) {
  return fsdp_forget_windows(self, err);
}

static phx_status fsdp_gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t u = 0; status == PHX_OK && u < self->model->n_units; u++) {
    phx_kit_shard part = fsdp_mine(self, u, PHX_FLAT_TRAINABLE);
    int64_t before = part.first - fsdp_part(self, u, PHX_FLAT_TRAINABLE).first;
    if (part.blocks > 0)
      status = acc->add(acc->ctx, u, part.first, part.blocks, fsdp_held_gradient(self, u) + before * PHX_BLOCK, NULL,
                        err);
  }
  return status;
}

static phx_status fsdp_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  (void)step;
  phx_status status = PHX_OK;
  for (uint32_t u = 0; status == PHX_OK && u < self->model->n_units; u++) {
    phx_kit_shard part = fsdp_part(self, u, PHX_FLAT_TRAINABLE);
    if (part.blocks == 0) continue;
    phx_kit_slice slice = {.unit = u,
                           .place = PHX_SPACE_DEVICE,
                           .first = part.first,
                           .blocks = part.blocks,
                           .weight = fsdp_held_weight(self, u, PHX_FLAT_TRAINABLE),
                           .master = fsdp_held_master(self, u, PHX_FLAT_TRAINABLE),
                           .weight_dtype = self->topology->compute_dtype,
                           .gradient = fsdp_held_gradient(self, u)};
    for (uint32_t k = 0; k < self->topology->n_optim_states; k++) slice.states[k] = fsdp_held_state(self, u, k);
    status = phx_kit_update(self->s.optim, &slice, scale, NULL, err);
  }
  return status;
}

const phx_strategy_table fsdp_table = {
    .struct_size = sizeof fsdp_table,
    .estimate = fsdp_estimate,
    .create = fsdp_create,
    .destroy = fsdp_destroy,
    .visit_state = fsdp_visit_state,
    .map = fsdp_map,
    .unmap = fsdp_unmap,
    .state_changed = fsdp_state_changed,
    .begin_micro_batch = fsdp_begin_micro_batch,
    .acquire = fsdp_acquire,
    .release = fsdp_release,
    .finish_gradients = fsdp_finish_gradients,
    .discard_gradients = fsdp_discard_gradients,
    .gradient_norm = fsdp_gradient_norm,
    .update = fsdp_update,
};
