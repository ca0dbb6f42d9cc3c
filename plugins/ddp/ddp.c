/* plugins/ddp/ddp.c - distributed data parallelism: every rank holds everything, gradients are summed in buckets.
 *
 * Gradients are one flat memory in the order in which backward completes them, so that a bucket is a contiguous range
 * of it and every gradient is a view of its bucket.  A bucket's all_reduce starts on the communication stream as soon
 * as its last gradient is complete, and runs beside the rest of backward.  Li et al., "PyTorch Distributed", VLDB 2020
 * (arXiv 2006.15704), 3.2.
 *
 * Invariants: replicas are equal after state_changed and after every update; buckets are reduced in one fixed order on
 * all ranks.  Of state, rank r is the writer of the r-th part of the whole model's blocks.  [main] only; it owns one
 * stream.  With [precision] compute = bf16 the weights above are bf16 and stand beside whole fp32 masters, which the
 * optimizer updates; of frozen parameters each rank keeps its part's masters only.  Does not: shard anything else,
 * compare replicas (the core does: [run] drift_every). */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

typedef struct ddp_config {
  int64_t bucket_bytes, first_bucket_bytes;
} ddp_config;

static const phx_option options[] = {
    PHX_BYTES(ddp_config, bucket_bytes, "25MiB", 4096, (int64_t)1 << 40, 0,
              "Gradients are reduced in buckets of this size, rounded up to blocks of 4 KiB."),
    PHX_BYTES(ddp_config, first_bucket_bytes, "1MiB", 4096, (int64_t)1 << 40, 0,
              "The first bucket is smaller, so that communication starts early in backward."),
};

enum {
  WEIGHT, /* the whole model's trainable flat, units in order */
  FROZEN,
  GRADIENT, /* in the order of completion; between steps also the buffer that states are gathered through */
  REDUCED,       /* what later micro-batches are reduced in, when each is reduced on its own */
  MASTER,        /* compute = bf16: the trainable flat in fp32 */
  FROZEN_MASTER, /* compute = bf16: this rank's part of the frozen flat in fp32 */
  WIRE,          /* reduce = bf16: a bucket's gradients on their way; the stream's order makes one enough */
  STATES,
  N_REGIONS = STATES + PHX_OPTIM_STATES_MAX
};

/* What config, topology and model decide; the same code plans and allocates. */
typedef struct ddp_plan {
  phx_kit_order order;
  phx_kit_bucket *buckets;
  uint32_t n_buckets;
  phx_kit_region regions[N_REGIONS];
} ddp_plan;

struct phx_strategy {
  phx_kit_services s;
  const phx_topology *topology;
  const phx_model *model;
  ddp_plan plan;
  phx_kit_views views;
  phx_event **reduced;   /* (n_buckets) */
  phx_event **mark;      /* (1) a point of the compute stream */
  uint32_t *last_bucket; /* (n_units) the last that holds some of the unit's gradient */
  uint8_t *complete;     /* (n_units) in this micro-batch */
  int32_t micro_batch;
  bool reducing;        /* this micro-batch's gradients are reduced */
  uint32_t n_complete;  /* units at the head of the order that are all complete */
  uint32_t next_bucket; /* not yet started */
};

/* ---- plan ---- */

static void plan_destroy(ddp_plan *p) {
  phx_kit_order_destroy(&p->order);
  free(p->buckets);
  memset(p, 0, sizeof *p);
}

static phx_status plan_create(const ddp_config *c, const phx_topology *t, const phx_model *m, ddp_plan *out,
                              phx_error *err) {
  ddp_plan p = {0};
  phx_status status = phx_kit_check_precision(t, err);
  if (status != PHX_OK) return status;
  PHX_TRY_GOTO(phx_kit_order_create(m, &p.order, err), status, done);
  PHX_TRY_GOTO(phx_kit_buckets_create(m, &p.order, c->first_bucket_bytes / 4, c->bucket_bytes / 4, &p.buckets,
                                      &p.n_buckets, err), status, done);
  /* whole, and padded to equal parts per rank, so that the writers' parts are gathered in place */
  int64_t trainable = phx_kit_whole_numel(m->total_blocks[PHX_FLAT_TRAINABLE], t->world_size);
  int64_t frozen = phx_kit_whole_numel(m->total_blocks[PHX_FLAT_FROZEN], t->world_size);
  int64_t largest = 0, size = phx_kit_weight_bytes(t);
  for (uint32_t b = 0; b < p.n_buckets; b++)
    if (p.buckets[b].numel > largest) largest = p.buckets[b].numel;
  p.regions[WEIGHT] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = trainable * size};
  p.regions[FROZEN] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = frozen * size};
  if (phx_kit_masters(t)) {
    p.regions[MASTER] = (phx_kit_region){.kind = PHX_MEM_MASTER, .shared = 1, .bytes = trainable * 4};
    p.regions[FROZEN_MASTER] = (phx_kit_region){.kind = PHX_MEM_MASTER, .bytes = frozen / t->world_size * 4};
  }
  p.regions[WIRE] = (phx_kit_region){.kind = PHX_MEM_BUFFER, .shared = 1, .bytes = phx_kit_wire_bytes(t, largest)};
  p.regions[GRADIENT] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .shared = 1, .bytes = trainable * 4};
  if (phx_kit_adds_reduced(t))
    p.regions[REDUCED] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .shared = 1, .bytes = p.order.numel * 4};
  for (uint32_t k = 0; k < t->n_optim_states; k++)
    p.regions[STATES + k] =
        (phx_kit_region){.kind = PHX_MEM_OPTIMIZER, .bytes = trainable * (int64_t)phx_dtype_bytes(t->optim_dtype[k])};
  *out = p;
  return PHX_OK;
done:
  plan_destroy(&p);
  return status;
}

static phx_status ddp_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                               phx_error *err) {
  ddp_plan p;
  PHX_TRY(plan_create(config, t, m, &p, err));
  phx_kit_regions_estimate(p.regions, N_REGIONS, out);
  phx_kit_estimate_grain(out, PHX_GRAIN_TENSOR); /* a ticket is a unit */
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
    phx_kit_estimate_state(out, t, flat, phx_kit_shard_of(m->total_blocks[flat], t->rank, t->world_size).blocks);
  for (uint32_t b = 0; b < p.n_buckets; b++)
    phx_kit_estimate_call(out, t, PHX_OP_ALL_REDUCE, p.buckets[b].numel, t->reduce_dtype, 0,
                          phx_kit_adds_reduced(t) ? t->accumulate : 1);
  plan_destroy(&p);
  return PHX_OK;
}

/* ---- life ---- */

static void ddp_destroy(phx_strategy *self) {
  if (!self) return;
  phx_kit_events_destroy(&self->s, self->plan.n_buckets, self->reduced);
  phx_kit_events_destroy(&self->s, 1, self->mark);
  phx_kit_regions_release(&self->s, self->plan.regions, N_REGIONS);
  phx_kit_services_close(&self->s);
  phx_kit_views_destroy(&self->views);
  plan_destroy(&self->plan);
  free(self->last_bucket);
  free(self->complete);
  free(self);
}

/* The unit's gradient in this micro-batch: where buckets are summed up, or where later micro-batches are reduced. */
static void place_gradients(phx_strategy *self, float *base) {
  const phx_kit_order *order = &self->plan.order;
  for (uint32_t i = 0; i < order->n; i++)
    self->views.places[order->units[i]].gradient = base + order->offset[order->units[i]];
}

/* An element of a whole flat as the model reads it. */
static char *weight_at(const phx_strategy *self, int flat, int64_t element) {
  return (char *)self->plan.regions[WEIGHT + flat].at + element * phx_kit_weight_bytes(self->topology);
}

static void place_weights(phx_strategy *self) {
  self->views.weight_dtype = self->topology->compute_dtype;
  for (uint32_t u = 0; u < self->model->n_units; u++)
    for (int flat = 0; flat < PHX_FLATS; flat++) {
      const phx_unit *unit = phx_model_unit(self->model, u);
      if (unit->blocks[flat] > 0)
        self->views.places[u].weight[flat] = weight_at(self, flat, unit->first_block[flat] * PHX_BLOCK);
    }
}

static phx_status ddp_create(const phx_host *host, const void *config, const phx_topology *topology,
                             const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the strategy");
  *self = (phx_strategy){.topology = topology, .model = model};
  phx_status status;
  PHX_TRY_GOTO(plan_create(config, topology, model, &self->plan, err), status, done);
  PHX_TRY_GOTO(phx_kit_services_open(host, &self->s, err), status, done);
  PHX_TRY_GOTO(phx_kit_views_create(model, &self->views, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&self->s, 1, &self->mark, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&self->s, self->plan.n_buckets, &self->reduced, err), status, done);
  PHX_TRY_GOTO(phx_kit_regions_alloc(&self->s, self->plan.regions, N_REGIONS, err), status, done);
  self->last_bucket = calloc(model->n_units + 1u, sizeof *self->last_bucket);
  self->complete = calloc(model->n_units + 1u, 1);
  if (!self->last_bucket || !self->complete) {
    status = phx_fail(err, PHX_NOMEM, "no memory for %u units", model->n_units);
    goto done;
  }
  uint32_t b = 0;
  for (uint32_t i = 0; i < self->plan.order.n; i++) {
    uint32_t u = self->plan.order.units[i];
    int64_t end = self->plan.order.offset[u] + phx_model_unit(model, u)->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
    while (self->plan.buckets[b].first + self->plan.buckets[b].numel < end) b++;
    self->last_bucket[u] = b;
  }
  place_weights(self);
  place_gradients(self, self->plan.regions[GRADIENT].at);
  *out = self;
  return PHX_OK;
done:
  ddp_destroy(self);
  return status;
}

/* ---- state ---- */

static phx_kit_shard my_part(const phx_strategy *self, int flat) {
  return phx_kit_shard_of(self->model->total_blocks[flat], self->topology->rank, self->topology->world_size);
}

static phx_status ddp_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
    phx_kit_shard mine = my_part(self, (int)flat);
    for (phx_kit_part p = {0}; phx_kit_part_next(self->model, flat, mine.first, mine.blocks, &p);) {
      PHX_TRY(phx_kit_visit(visitor, self->s.optim, self->topology->compute_dtype, p.unit, flat, p.first,
                            p.blocks, err));
    }
  }
  return PHX_OK;
}

static phx_status ddp_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  (void)mode;
  bool master = slice->kind == PHX_STATE_MASTER && phx_kit_masters(self->topology);
  if (slice->kind != PHX_STATE_WEIGHT && slice->kind != PHX_STATE_OPTIM && !master)
    return phx_fail(err, PHX_INVALID, "ddp keeps no state of kind %d", slice->kind);
  uint32_t region = WEIGHT + slice->flat;
  if (master) region = MASTER + slice->flat;
  if (slice->kind == PHX_STATE_OPTIM) region = STATES + slice->state_index;
  int64_t block = phx_model_unit(self->model, slice->unit)->first_block[slice->flat] + slice->first_block;
  if (region == FROZEN_MASTER) block -= my_part(self, PHX_FLAT_FROZEN).first;
  *out = (char *)self->plan.regions[region].at + block * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype);
  return PHX_OK;
}

static phx_status ddp_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)p, (void)err;
  return PHX_OK;
}

static phx_status make_whole(phx_strategy *self, int flat, void *base, int32_t dtype, phx_error *err) {
  if (!base) return PHX_OK;
  return phx_kit_make_whole(&self->s, base, my_part(self, flat).per * PHX_BLOCK, dtype, err);
}

/* Masters become everybody's, and the low-precision weights are rounded from them. */
static phx_status derive_weights(phx_strategy *self, phx_error *err) {
  const phx_device *d = self->s.device;
  const phx_kit_region *r = self->plan.regions;
  int32_t dtype = self->topology->compute_dtype;
  phx_kit_shard part = my_part(self, PHX_FLAT_FROZEN);
  PHX_TRY(make_whole(self, PHX_FLAT_TRAINABLE, r[MASTER].at, PHX_F32, err));
  if (r[MASTER].at)
    PHX_TRY(d->cast(d->ctx, r[WEIGHT].at, dtype, r[MASTER].at, PHX_F32, r[MASTER].bytes / 4, self->s.stream, err));
  if (part.blocks > 0)
    PHX_TRY(d->cast(d->ctx, weight_at(self, PHX_FLAT_FROZEN, part.first * PHX_BLOCK), dtype, r[FROZEN_MASTER].at,
                    PHX_F32, part.blocks * PHX_BLOCK, self->s.stream, err));
  return PHX_OK;
}

static phx_status ddp_state_changed(phx_strategy *self, phx_error *err) {
  const phx_device *d = self->s.device;
  phx_kit_region *r = self->plan.regions;
  self->s.comm->annotate(self->s.comm->ctx, -1);
  PHX_TRY(phx_kit_after(&self->s, self->mark[0], NULL, self->s.stream, err));
  if (phx_kit_masters(self->topology))
    PHX_TRY(derive_weights(self, err));
  else
    PHX_TRY(make_whole(self, PHX_FLAT_TRAINABLE, r[WEIGHT].at, PHX_F32, err));
  PHX_TRY(make_whole(self, PHX_FLAT_FROZEN, r[FROZEN].at, self->topology->compute_dtype, err));
  for (uint32_t k = 0; k < self->topology->n_optim_states; k++)
    PHX_TRY(make_whole(self, PHX_FLAT_TRAINABLE, r[STATES + k].at, self->topology->optim_dtype[k], err));
  PHX_TRY(d->stream_synchronize(d->ctx, self->s.stream, err));
  return PHX_OK;
}

/* ---- the step ---- */

static phx_status ddp_begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  (void)err;
  bool adds = phx_kit_adds_reduced(self->topology);
  self->micro_batch = index;
  self->reducing = adds || last;
  self->next_bucket = self->n_complete = 0;
  memset(self->complete, 0, self->model->n_units);
  phx_kit_views_begin(&self->views, adds || index == 0);
  place_gradients(self, self->plan.regions[adds && index > 0 ? REDUCED : GRADIENT].at);
  return PHX_OK;
}

static phx_status ddp_acquire(phx_strategy *self, uint32_t s, int32_t pass, int32_t micro_batch, phx_stream *stream,
                              const phx_view **out, phx_error *err) {
  (void)micro_batch;
  const phx_stage *stage = phx_model_stage(self->model, s);
  /* From the third micro-batch that is reduced on its own, its memory may still be on its way from the one before. */
  bool busy = pass == PHX_PASS_BACKWARD && phx_kit_adds_reduced(self->topology) && self->micro_batch > 1;
  for (uint32_t i = 0; busy && i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(self->model, stage->first_use + i);
    if (!(use->flags & PHX_USE_GRADIENT) || !self->views.places[use->unit].gradient) continue;
    PHX_TRY(self->s.device->stream_wait(self->s.device->ctx, stream, self->reduced[self->last_bucket[use->unit]], err));
  }
  *out = phx_kit_view(&self->views, s, pass, NULL);
  return PHX_OK;
}

static phx_status reduce_bucket(phx_strategy *self, const phx_kit_bucket *bucket, phx_event *reduced, phx_error *err) {
  const phx_comm *c = self->s.comm;
  const phx_device *d = self->s.device;
  phx_stream *s = self->s.stream;
  int32_t dtype = self->topology->reduce_dtype;
  bool adds = phx_kit_adds_reduced(self->topology) && self->micro_batch > 0;
  float *total = (float *)self->plan.regions[GRADIENT].at + bucket->first;
  float *part = adds ? (float *)self->plan.regions[REDUCED].at + bucket->first : total;
  c->annotate(c->ctx, (int32_t)self->plan.order.units[bucket->last]);
  void *wire = self->plan.regions[WIRE].at ? self->plan.regions[WIRE].at : part;
  if (wire != part) PHX_TRY(d->cast(d->ctx, wire, dtype, part, PHX_F32, bucket->numel, s, err));
  PHX_TRY(c->all_reduce(c->ctx, wire, wire, bucket->numel, dtype, PHX_SUM, s, err));
  if (wire != part) PHX_TRY(d->cast(d->ctx, part, PHX_F32, wire, dtype, bucket->numel, s, err));
  if (adds) PHX_TRY(d->add(d->ctx, total, part, bucket->numel, s, err));
  PHX_TRY(d->event_record(d->ctx, reduced, s, err));
  return PHX_OK;
}

static phx_status ddp_release(phx_strategy *self, uint32_t s, int32_t pass, int32_t micro_batch, uint32_t flags,
                              phx_stream *stream, phx_error *err) {
  (void)micro_batch;
  if (pass != PHX_PASS_BACKWARD) return PHX_OK;
  if (flags & PHX_RELEASE_NO_GRADIENT) PHX_TRY(phx_kit_view_unused(&self->views, self->s.device, s, stream, err));
  if (!(flags & PHX_RELEASE_LAST_USE) || !self->reducing) return PHX_OK;
  const phx_stage *stage = phx_model_stage(self->model, s);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(self->model, stage->first_use + i);
    if (use->flags & PHX_USE_LAST) self->complete[use->unit] = 1;
  }
  while (self->n_complete < self->plan.order.n && self->complete[self->plan.order.units[self->n_complete]])
    self->n_complete++;
  bool marked = false;
  for (; self->next_bucket < self->plan.n_buckets; self->next_bucket++) {
    const phx_kit_bucket *bucket = &self->plan.buckets[self->next_bucket];
    if (bucket->last >= self->n_complete) break;
    if (!marked) PHX_TRY(phx_kit_after(&self->s, self->mark[0], stream, self->s.stream, err));
    marked = true;
    PHX_TRY(reduce_bucket(self, bucket, self->reduced[self->next_bucket], err));
  }
  return PHX_OK;
}

static phx_status ddp_finish_gradients(phx_strategy *self, phx_error *err) {
  if (self->next_bucket < self->plan.n_buckets)
    return phx_fail(err, PHX_STATE,
                    "gradients are to be finished, but that of unit '%s' is not complete: its last backward stage "
                    "was not released with LAST_USE in the step's last micro-batch",
                    phx_model_unit(self->model, self->plan.order.units[self->n_complete])->name);
  return self->s.device->stream_synchronize(self->s.device->ctx, self->s.stream, err);
}

static phx_status ddp_discard_gradients(phx_strategy *self, phx_error *err) {
  return self->s.device->stream_synchronize(self->s.device->ctx, self->s.stream, err);
}

/* Replicas share the work: rank r adds the r-th part of the blocks. */
static phx_status ddp_gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  const float *base = self->plan.regions[GRADIENT].at;
  phx_kit_shard mine = my_part(self, PHX_FLAT_TRAINABLE);
  for (phx_kit_part p = {0}; phx_kit_part_next(self->model, PHX_FLAT_TRAINABLE, mine.first, mine.blocks, &p);) {
    const float *gradient = base + self->plan.order.offset[p.unit] + p.first * PHX_BLOCK;
    PHX_TRY(acc->add(acc->ctx, p.unit, p.first, p.blocks, gradient, NULL, err));
  }
  return PHX_OK;
}

static phx_status ddp_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  (void)step;
  const phx_kit_region *r = self->plan.regions;
  for (uint32_t u = 0; u < self->model->n_units; u++) {
    const phx_unit *unit = phx_model_unit(self->model, u);
    int64_t first = unit->first_block[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
    phx_kit_slice slice = {.unit = u, .place = PHX_SPACE_DEVICE, .blocks = unit->blocks[PHX_FLAT_TRAINABLE]};
    if (slice.blocks == 0) continue;
    slice.weight = weight_at(self, PHX_FLAT_TRAINABLE, first);
    slice.weight_dtype = self->topology->compute_dtype;
    if (r[MASTER].at) slice.master = (float *)r[MASTER].at + first;
    slice.gradient = (const float *)r[GRADIENT].at + self->plan.order.offset[u];
    for (uint32_t k = 0; k < self->topology->n_optim_states; k++)
      slice.states[k] = (char *)r[STATES + k].at + first * (int64_t)phx_dtype_bytes(self->topology->optim_dtype[k]);
    PHX_TRY(phx_kit_update(self->s.optim, &slice, scale, NULL, err));
  }
  return PHX_OK;
}

static const phx_strategy_table table = {
    .struct_size = sizeof table,
    .estimate = ddp_estimate,
    .create = ddp_create,
    .destroy = ddp_destroy,
    .visit_state = ddp_visit_state,
    .map = ddp_map,
    .unmap = ddp_unmap,
    .state_changed = ddp_state_changed,
    .begin_micro_batch = ddp_begin_micro_batch,
    .acquire = ddp_acquire,
    .release = ddp_release,
    .finish_gradients = ddp_finish_gradients,
    .discard_gradients = ddp_discard_gradients,
    .gradient_norm = ddp_gradient_norm,
    .update = ddp_update,
};

static const char *const extensions[] = {PHX_EXT_DEVICE, PHX_EXT_COMM, PHX_EXT_OPTIM, NULL};

const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin,
      .kind = PHX_KIND_STRATEGY,
      .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR,
      .id = "ddp",
      .version = "0.1.0",
      .summary = "Whole replicas, gradients summed in buckets beside backward",
      .vendor = "Phalanx",
      .license = "unspecified",
      .build = __VERSION__,
      .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16 | PHX_CAP_LIVE_STATE,
      .extensions = extensions,
      .options = options,
      .n_options = sizeof options / sizeof *options,
      .option_stride = sizeof *options,
      .config_size = sizeof(ddp_config),
      .table = &table,
  };
  return &plugin;
}
