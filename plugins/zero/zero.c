/* plugins/zero/zero.c - ZeRO: the whole model is one flat, cut in equal shares; stage 1 shares optimizer states, stage
 * 2 also gradients, stage 3 also weights.  Rajbhandari et al., arXiv 1910.02054; options named as DeepSpeed's.
 *
 *            weights                              gradients                         states
 *   stage 1  whole, gathered beside next forward  whole, reduced to their owners    share
 *   stage 2  whole, gathered beside next forward  until reduced, then the share     share
 *   stage 3  share, gathered for each pass        until reduced, then the share     share
 *
 * Reading order: zero.h (words), zero_plan.c (who owns what, what is gathered when), zero_whole.c, zero_gather.c,
 * zero_reduce.c, and here what the core calls.
 * Invariants: all memory is taken in create, from one table of regions that estimate adds up; every collective is on
 * the communication stream, in one order that every rank derives from the declared stages.  With [precision] compute =
 * bf16 the weights above are bf16, and the share has fp32 masters.  What create opens is const from then on
 * (zero_rank); what changes in a step has one file that may change it.  Does not: offload.  [main] only; the stream's
 * thread runs what is enqueued. */
#include "zero.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROW(f, dflt, low, high, flags, doc) PHX_INT(zero_config, f, dflt, low, high, "elements", flags, doc)
static const phx_option options[] = {
    PHX_INT(zero_config, stage, "2", 1, 3, NULL, 0,
            "What is partitioned: 1 optimizer states, 2 also gradients, 3 also weights."),
    ROW(reduce_bucket_size, "1000000", 1, INT64_MAX, 0,
        "Gradients are reduced in buckets of this many elements, rounded up to blocks of 1024; the last one runs "
        "beside "
        "nothing (DeepSpeed's 5e8 would leave little to overlap)."),
    ROW(allgather_bucket_size, "1000000", PHX_BLOCK, INT64_MAX, 0,
        "Stages 1 and 2: updated weights are gathered at most this many elements at a time, beside the next forward "
        "pass and in its order; by one all_gather where this holds the whole model."),
    PHX_BOOL(zero_config, overlap_comm, "yes",
             "Reduce buckets beside the backward pass; no: wait for each bucket, which needs less memory."),
    ROW(stage3_param_persistence_threshold, "100000", 0, INT64_MAX, 0,
        "Stage 3: parameters smaller than this stay whole on every rank and are refreshed after each update."),
    ROW(stage3_prefetch_bucket_size, "10000000", 0, INT64_MAX, 0,
        "Stage 3: units are gathered ahead of their use while fewer elements than this wait for theirs; 0: never."),
    ROW(stage3_max_live_parameters, "auto", 1, INT64_MAX, PHX_OPTF_AUTO,
        "Stage 3: at most this many gathered elements at once; what is needed last leaves first, and what fits stays "
        "from forward to backward; auto: a stage's own and its prefetch."),
    PHX_BOOL(zero_config, gather_alone, "no",
             "With one rank: gather and reduce all the same, to measure what it costs in copies and memory; no bit "
             "changes. Without it one rank computes with its weights where they are."),
    ROW(sub_group_size, "1000000000", PHX_BLOCK, INT64_MAX, 0,
        "The update works through the share in groups of this many elements, rounded down to blocks of 1024."),
};

struct phx_strategy {
  zero_rank rank; /* const after create */
  phx_kit_views views;
  zero_gathering gathering;
  zero_reducing reducing;
};

/* ---- life ---- */

static phx_status zero_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                                phx_error *err) {
  zero_plan p;
  PHX_TRY(zero_plan_create(config, t, m, &p, err));
  phx_kit_regions_estimate(p.regions, ZERO_REGIONS, out);
  phx_kit_estimate_grain(out, PHX_GRAIN_BLOCK);
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) phx_kit_estimate_state(out, t, flat, p.shard[flat].blocks);
  zero_gather_traffic(&p, out);
  zero_reduce_traffic(&p, out);
  zero_make_whole_traffic(&p, PHX_FLAT_TRAINABLE, out);
  zero_plan_destroy(&p);
  return PHX_OK;
}

static void zero_destroy(phx_strategy *self) {
  if (!self) return;
  zero_rank *r = &self->rank;
  if (r->s.stream) r->s.device->stream_synchronize(r->s.device->ctx, r->s.stream, NULL);
  phx_kit_events_destroy(&r->s, r->plan.n_buckets, r->reduced);
  if (r->gathered) phx_kit_events_destroy(&r->s, r->plan.model->n_units, r->gathered);
  phx_kit_events_destroy(&r->s, 1, r->whole);
  phx_kit_events_destroy(&r->s, 1, r->mark);
  phx_kit_regions_release(&r->s, r->plan.regions, ZERO_REGIONS);
  phx_kit_services_close(&r->s);
  zero_gathering_destroy(&self->gathering);
  zero_reducing_destroy(&self->reducing);
  phx_kit_views_destroy(&self->views);
  zero_plan_destroy(&r->plan);
  free(self);
}

/* A run that accumulates chooses between memory and traffic; say what it chose. */
static void tell_cost_of_accumulation(const zero_rank *r) {
  const phx_topology *t = r->plan.topology;
  const phx_host *h = r->s.host;
  char line[320];
  if (t->accumulate == 1 || r->plan.config->stage == 1 || !r->plan.several) return;
  if (r->plan.whole)
    snprintf(line, sizeof line,
             "accumulate = %d with reduce = step keeps whole gradients on every rank: %.1f MiB; reduce = micro_batch "
             "keeps shares, and sends %d times as much",
             t->accumulate, (double)r->plan.regions[ZERO_GRADIENT].bytes / (1 << 20), t->accumulate);
  else
    snprintf(line, sizeof line,
             "accumulate = %d with reduce = micro_batch reduces %d times a step; reduce = step sends once, and keeps "
             "whole gradients on every rank: %.1f MiB",
             t->accumulate, t->accumulate, (double)r->plan.order.numel * 4 / (1 << 20));
  h->log(h->ctx, PHX_LOG_INFO, line);
}

static phx_status zero_create(const phx_host *host, const void *config, const phx_topology *topology,
                              const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the strategy");
  zero_rank *r = &self->rank;
  phx_status status;
  PHX_TRY_GOTO(zero_plan_create(config, topology, model, &r->plan, err), status, done);
  PHX_TRY_GOTO(phx_kit_services_open(host, &r->s, err), status, done);
  PHX_TRY_GOTO(phx_kit_views_create(model, &self->views, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&r->s, 1, &r->mark, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&r->s, 1, &r->whole, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&r->s, model->n_units, &r->gathered, err), status, done);
  PHX_TRY_GOTO(phx_kit_events_create(&r->s, r->plan.n_buckets, &r->reduced, err), status, done);
  PHX_TRY_GOTO(phx_kit_regions_alloc(&r->s, r->plan.regions, ZERO_REGIONS, err), status, done);
  PHX_TRY_GOTO(zero_gathering_create(r, self->views.places, &self->gathering, err), status, done);
  PHX_TRY_GOTO(zero_reducing_create(r, &self->views, &self->reducing, err), status, done);
  self->views.weight_dtype = topology->compute_dtype;
  tell_cost_of_accumulation(r);
  *out = self;
  return PHX_OK;
done:
  zero_destroy(self);
  return status;
}

/* ---- state: this rank's share ---- */

static phx_status zero_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  const zero_rank *r = &self->rank;
  const zero_plan *p = &r->plan;
  PHX_TRY(zero_settle(r, err));
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
    for (phx_kit_part part = {0};
         phx_kit_part_next(p->model, flat, p->shard[flat].first, p->shard[flat].blocks, &part);) {
      PHX_TRY(phx_kit_visit(visitor, r->s.optim, p->topology->compute_dtype, part.unit, flat, part.first,
                            part.blocks, err));
    }
  return PHX_OK;
}

/* An owned element's place in a region of weights. */
static void *weight_at(const zero_rank *r, uint32_t flat, int64_t at) {
  const zero_plan *p = &r->plan;
  if (p->config->stage == 3) at -= zero_share(p, flat) * p->topology->rank;
  return zero_weights(r, ZERO_WEIGHT + flat, at);
}
/* Its master, or NULL in fp32. */
static float *master_at(const zero_rank *r, uint32_t flat, int64_t at) {
  float *masters = zero_region(r, ZERO_MASTER + flat);
  return masters ? masters + (at - zero_share(&r->plan, flat) * r->plan.topology->rank) : NULL;
}
static void *state_at(const zero_rank *r, uint32_t state, int64_t at) {
  int64_t inside = at - zero_share(&r->plan, PHX_FLAT_TRAINABLE) * r->plan.topology->rank;
  return (char *)r->plan.regions[ZERO_STATES + state].at +
         inside * (int64_t)phx_dtype_bytes(r->plan.topology->optim_dtype[state]);
}

static phx_status zero_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  const zero_rank *r = &self->rank;
  (void)mode;
  bool master = slice->kind == PHX_STATE_MASTER && phx_kit_masters(r->plan.topology);
  if (slice->kind != PHX_STATE_WEIGHT && slice->kind != PHX_STATE_OPTIM && !master)
    return phx_fail(err, PHX_INVALID, "zero keeps no state of kind %d", slice->kind);
  PHX_TRY(zero_settle(r, err));
  int64_t at = zero_unit_first(&r->plan, slice->unit, slice->flat) + slice->first_block * PHX_BLOCK;
  if (master) *out = master_at(r, slice->flat, at);
  else if (slice->kind == PHX_STATE_WEIGHT) *out = weight_at(r, slice->flat, at);
  else *out = state_at(r, slice->state_index, at);
  return PHX_OK;
}

static phx_status zero_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)p, (void)err;
  return PHX_OK;
}

/* The share's low-precision weights, from its masters. */
static phx_status derive_weights(const zero_rank *r, uint32_t flat, phx_error *err) {
  const zero_plan *p = &r->plan;
  const phx_device *d = r->s.device;
  int64_t at = p->shard[flat].first * PHX_BLOCK;
  if (p->shard[flat].blocks == 0 || !phx_kit_masters(p->topology)) return PHX_OK;
  return d->cast(d->ctx, weight_at(r, flat, at), p->topology->compute_dtype, master_at(r, flat, at), PHX_F32,
                 p->shard[flat].blocks * PHX_BLOCK, NULL, err);
}

static phx_status zero_state_changed(phx_strategy *self, phx_error *err) {
  const zero_rank *r = &self->rank;
  phx_status status = zero_settle(r, err);
  for (uint32_t flat = 0; flat < PHX_FLATS && status == PHX_OK; flat++) status = derive_weights(r, flat, err);
  if (status == PHX_OK) status = zero_make_whole(r, PHX_FLAT_TRAINABLE, err);
  if (status == PHX_OK) status = zero_make_whole(r, PHX_FLAT_FROZEN, err);
  return status == PHX_OK ? zero_settle(r, err) : status;
}

/* ---- the step ---- */

static phx_status zero_begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  const zero_rank *r = &self->rank;
  (void)err;
  zero_begin_program(r, &self->gathering, &r->plan.train);
  zero_begin_gradients(r, &self->reducing, index, last != 0);
  return PHX_OK;
}

/* Small parameters are read where they are whole. */
static void point_to_persistent(const zero_rank *r, phx_kit_views *views, uint32_t stage, int32_t pass) {
  const zero_plan *p = &r->plan;
  const phx_stage *s = phx_model_stage(p->model, stage);
  phx_param_view *view = views->params + (views->views[stage].params - views->params);
  for (uint32_t i = 0; i < s->n_uses; i++) {
    const phx_use *use = phx_model_use(p->model, s->first_use + i);
    bool reads = use->flags & (pass == PHX_PASS_BACKWARD ? PHX_USE_BACKWARD : PHX_USE_FORWARD);
    for (uint32_t k = 0; k < phx_model_unit(p->model, use->unit)->n_params; k++, view++) {
      uint32_t flat = phx_model_param(p->model, view->param)->flags & PHX_PARAM_FROZEN ? PHX_FLAT_FROZEN : 0;
      if (reads && p->persist[view->param] >= 0)
        view->weight = zero_weights(r, ZERO_PERSIST + flat, p->persist[view->param]);
    }
  }
}

static phx_status zero_acquire(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                               phx_stream *stream, const phx_view **out, phx_error *err) {
  const zero_rank *r = &self->rank;
  (void)micro_batch;
  phx_event *ready = NULL;
  PHX_TRY(zero_gather(r, &self->gathering, stage, pass, stream, &ready, err));
  if (pass == PHX_PASS_BACKWARD) PHX_TRY(zero_open_gradients(r, &self->reducing, stage, stream, err));
  *out = phx_kit_view(&self->views, stage, pass, ready);
  point_to_persistent(r, &self->views, stage, pass);
  return PHX_OK;
}

static phx_status zero_release(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                               phx_stream *stream, phx_error *err) {
  const zero_rank *r = &self->rank;
  (void)micro_batch;
  if (pass != PHX_PASS_BACKWARD) return PHX_OK;
  if (flags & PHX_RELEASE_NO_GRADIENT)
    PHX_TRY(phx_kit_view_unused(&self->views, r->s.device, stage, stream, err));
  if (flags & PHX_RELEASE_LAST_USE) PHX_TRY(zero_complete(r, &self->reducing, stage, stream, err));
  return PHX_OK;
}

static phx_status zero_finish_gradients(phx_strategy *self, phx_error *err) {
  return zero_finish(&self->rank, &self->reducing, err);
}

static phx_status zero_discard_gradients(phx_strategy *self, phx_error *err) {
  return zero_discard(&self->rank, &self->reducing, err);
}

static phx_status zero_gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  const zero_rank *r = &self->rank;
  const zero_plan *p = &r->plan;
  const phx_kit_shard *mine = &p->shard[PHX_FLAT_TRAINABLE];
  for (phx_kit_part part = {0}; phx_kit_part_next(p->model, PHX_FLAT_TRAINABLE, mine->first, mine->blocks, &part);) {
    PHX_TRY(acc->add(acc->ctx, part.unit, part.first, part.blocks,
                     zero_reduced(r, (mine->first + part.at) * PHX_BLOCK), NULL, err));
  }
  return PHX_OK;
}

/* Blocks [first, first + blocks) of the model: one group, cut at units. */
static phx_status update_group(const zero_rank *r, int64_t first, int64_t blocks, float scale, phx_error *err) {
  const zero_plan *p = &r->plan;
  for (phx_kit_part part = {0}; phx_kit_part_next(p->model, PHX_FLAT_TRAINABLE, first, blocks, &part);) {
    int64_t at = (first + part.at) * PHX_BLOCK;
    phx_kit_slice slice = {.unit = part.unit,
                           .place = PHX_SPACE_DEVICE,
                           .first = part.first,
                           .blocks = part.blocks,
                           .weight = weight_at(r, PHX_FLAT_TRAINABLE, at),
                           .master = master_at(r, PHX_FLAT_TRAINABLE, at),
                           .weight_dtype = p->topology->compute_dtype,
                           .gradient = zero_reduced(r, at)};
    for (uint32_t k = 0; k < p->topology->n_optim_states; k++) slice.states[k] = state_at(r, k, at);
    PHX_TRY(phx_kit_update(r->s.optim, &slice, scale, NULL, err));
  }
  return PHX_OK;
}

static phx_status zero_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  const zero_rank *r = &self->rank;
  (void)step;
  const phx_kit_shard *mine = &r->plan.shard[PHX_FLAT_TRAINABLE];
  int64_t group = r->plan.config->sub_group_size / PHX_BLOCK;
  phx_status settled = zero_settle(r, err); /* peers may still read the share, units that no stage waits for */
  if (settled != PHX_OK) return settled;
  for (int64_t at = 0; at < mine->blocks; at += group) {
    int64_t blocks = mine->blocks - at < group ? mine->blocks - at : group;
    PHX_TRY(update_group(r, mine->first + at, blocks, scale, err));
  }
  return zero_make_whole(r, PHX_FLAT_TRAINABLE, err);
}

static const phx_strategy_table table = {
    .struct_size = sizeof table,
    .estimate = zero_estimate,
    .create = zero_create,
    .destroy = zero_destroy,
    .visit_state = zero_visit_state,
    .map = zero_map,
    .unmap = zero_unmap,
    .state_changed = zero_state_changed,
    .begin_micro_batch = zero_begin_micro_batch,
    .acquire = zero_acquire,
    .release = zero_release,
    .finish_gradients = zero_finish_gradients,
    .discard_gradients = zero_discard_gradients,
    .gradient_norm = zero_gradient_norm,
    .update = zero_update,
};

static const char *const extensions[] = {PHX_EXT_DEVICE, PHX_EXT_COMM, PHX_EXT_OPTIM, NULL};
static const phx_plugin plugin = {
    .struct_size = sizeof plugin,
    .kind = PHX_KIND_STRATEGY,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "zero",
    .version = "0.1.0",
    .summary = "ZeRO stages 1, 2 and 3: the whole model's states, gradients, weights cut in equal shares",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .provides = PHX_CAP_SHARDS_WEIGHTS | PHX_CAP_DETERMINISTIC | PHX_CAP_BF16 | PHX_CAP_LIVE_STATE,
    .extensions = extensions,
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .option_stride = sizeof *options,
    .config_size = sizeof(zero_config),
    .table = &table,
};
const phx_plugin *phx_plugin_v1(void) {
  return &plugin;
}
