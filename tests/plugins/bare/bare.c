/* bare.c - the barest strategy: what a training loop without a framework would do (tests and benchmarks only).
 *
 * World size 1, one micro-batch, every stage run, nothing reduced.  Weights (and masters, in bf16), gradients and
 * states are whole and private; all views are written once, at create, so that acquire hands out a pointer and release
 * does nothing.  No communicator, no stream, no event, no bucket.  What a strategy costs beyond this is its overhead
 * (tests/bench).  The same bits as ddp at 1 rank. */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

enum { WEIGHT, FROZEN, MASTER, FROZEN_MASTER, GRADIENT, STATES, N_REGIONS = STATES + PHX_OPTIM_STATES_MAX };

struct phx_strategy {
  phx_kit_services s; /* no stream */
  const phx_topology *topology;
  const phx_model *model;
  phx_kit_region regions[N_REGIONS];
  phx_param_view *params;
  phx_view *views; /* (2 * n_stages) forward of every stage, then backward */
};

static phx_status plan(const phx_topology *t, const phx_model *m, phx_kit_region *r, phx_error *err) {
  PHX_TRY(phx_kit_check_precision(t, err));
  if (t->reduce_dtype != PHX_F32)
    return phx_fail(err, PHX_UNSUPPORTED, "bare reduces nothing: set [precision] reduce = fp32");
  if (t->world_size != 1 || t->accumulate != 1)
    return phx_fail(err, PHX_UNSUPPORTED, "bare runs on 1 rank with accumulate = 1, not on %d with %d",
                    t->world_size, t->accumulate);
  const int64_t trainable = m->total_blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
  const int64_t frozen = m->total_blocks[PHX_FLAT_FROZEN] * PHX_BLOCK, size = phx_kit_weight_bytes(t);
  r[WEIGHT] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .bytes = trainable * size};
  r[FROZEN] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .bytes = frozen * size};
  if (phx_kit_masters(t)) {
    r[MASTER] = (phx_kit_region){.kind = PHX_MEM_MASTER, .bytes = trainable * 4};
    r[FROZEN_MASTER] = (phx_kit_region){.kind = PHX_MEM_MASTER, .bytes = frozen * 4};
  }
  r[GRADIENT] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .bytes = trainable * 4};
  for (uint32_t k = 0; k < t->n_optim_states; k++)
    r[STATES + k] = (phx_kit_region){
        .kind = PHX_MEM_OPTIMIZER, .bytes = trainable * (int64_t)phx_dtype_bytes(t->optim_dtype[k])};
  return PHX_OK;
}

static phx_status bare_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                                phx_error *err) {
  phx_kit_region regions[N_REGIONS] = {0};
  (void)config;
  phx_status status = plan(t, m, regions, err);
  if (status == PHX_OK) phx_kit_regions_estimate(regions, N_REGIONS, out);
  return status;
}

static void bare_destroy(phx_strategy *self) {
  if (!self) return;
  phx_kit_regions_release(&self->s, self->regions, N_REGIONS);
  free(self->params);
  free(self->views);
  free(self);
}

/* Where a unit's flat begins in a region of fp32; NULL: there is none. */
static float *at(const phx_strategy *self, int region, uint32_t unit, int flat) {
  float *base = self->regions[region].at;
  return base ? base + phx_model_unit(self->model, unit)->first_block[flat] * PHX_BLOCK : NULL;
}
/* An element of it as the model reads it. */
static void *weight(const phx_strategy *self, uint32_t unit, int flat, int64_t element) {
  return (char *)self->regions[WEIGHT + flat].at +
         (phx_model_unit(self->model, unit)->first_block[flat] * PHX_BLOCK + element) *
             phx_kit_weight_bytes(self->topology);
}

/* One pass of one stage; written: (n_units) whose gradient already has something. */
static void write_view(const phx_strategy *self, uint32_t s, bool backward, uint8_t *written, phx_param_view *out) {
  const phx_stage *stage = phx_model_stage(self->model, s);
  for (uint32_t i = 0; i < stage->n_uses; i++) {
    const phx_use *use = phx_model_use(self->model, stage->first_use + i);
    const phx_unit *unit = phx_model_unit(self->model, use->unit);
    const bool reads = use->flags & (backward ? PHX_USE_BACKWARD : PHX_USE_FORWARD);
    const bool gradient = backward && (use->flags & PHX_USE_GRADIENT);
    for (uint32_t k = 0; k < unit->n_params; k++, out++) {
      const phx_param *param = phx_model_param(self->model, unit->first_param + k);
      const bool frozen = (param->flags & PHX_PARAM_FROZEN) != 0;
      *out = (phx_param_view){.weight_dtype = self->topology->compute_dtype,
                              .gradient_dtype = PHX_F32,
                              .param = unit->first_param + k};
      if (reads) out->weight = weight(self, use->unit, frozen, param->offset);
      if (!gradient || frozen) continue;
      out->gradient = at(self, GRADIENT, use->unit, PHX_FLAT_TRAINABLE) + param->offset;
      out->gradient_mode = written[use->unit] ? PHX_GRAD_ADD : PHX_GRAD_WRITE;
    }
    if (gradient) written[use->unit] = 1;
  }
}

static phx_status write_views(phx_strategy *self, phx_error *err) {
  const phx_model *m = self->model;
  uint32_t n = 0;
  for (uint32_t i = 0; i < m->n_uses; i++) n += phx_model_unit(m, phx_model_use(m, i)->unit)->n_params;
  uint8_t *written = calloc(m->n_units + 1u, 1);
  self->params = calloc(2u * n + 1u, sizeof *self->params);
  self->views = calloc(2u * m->n_stages + 1u, sizeof *self->views);
  if (!written || !self->params || !self->views) {
    free(written);
    return phx_fail(err, PHX_NOMEM, "no memory for the views of %u stages", m->n_stages);
  }
  phx_param_view *next = self->params;
  for (uint32_t i = 0; i < 2 * m->n_stages; i++) { /* in the order in which they run */
    const bool backward = i >= m->n_stages;
    const uint32_t s = backward ? 2 * m->n_stages - 1 - i : i;
    const phx_stage *stage = phx_model_stage(m, s);
    phx_view *view = &self->views[s + (backward ? m->n_stages : 0)];
    *view = (phx_view){.struct_size = sizeof *view, .params = next, .param_stride = sizeof *next};
    for (uint32_t u = 0; u < stage->n_uses; u++)
      view->n_params += phx_model_unit(m, phx_model_use(m, stage->first_use + u)->unit)->n_params;
    write_view(self, s, backward, written, next);
    next += view->n_params;
  }
  free(written);
  return PHX_OK;
}

static phx_status bare_create(const phx_host *host, const void *config, const phx_topology *topology,
                              const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *self = calloc(1, sizeof *self);
  phx_status status;
  (void)config;
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the strategy");
  *self = (phx_strategy){.topology = topology, .model = model};
  self->s = (phx_kit_services){.host = host,
                               .device = host->extension(host->ctx, PHX_EXT_DEVICE),
                               .optim = host->extension(host->ctx, PHX_EXT_OPTIM)};
  PHX_TRY_GOTO(plan(topology, model, self->regions, err), status, done);
  PHX_TRY_GOTO(phx_kit_regions_alloc(&self->s, self->regions, N_REGIONS, err), status, done);
  PHX_TRY_GOTO(write_views(self, err), status, done);
  *out = self;
  return PHX_OK;
done:
  bare_destroy(self);
  return status;
}

static phx_status bare_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t u = 0; u < self->model->n_units; u++)
    for (uint32_t flat = 0; flat < PHX_FLATS && status == PHX_OK; flat++)
      status = phx_kit_visit(visitor, self->s.optim, self->topology->compute_dtype, u, flat, 0,
                             phx_model_unit(self->model, u)->blocks[flat], err);
  return status;
}

static phx_status bare_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  (void)mode;
  const bool master = slice->kind == PHX_STATE_MASTER && phx_kit_masters(self->topology);
  if (slice->kind != PHX_STATE_WEIGHT && slice->kind != PHX_STATE_OPTIM && !master)
    return phx_fail(err, PHX_INVALID, "bare keeps no state of kind %d", slice->kind);
  const uint32_t region = slice->kind == PHX_STATE_OPTIM ? STATES + slice->state_index
                          : master                       ? MASTER + slice->flat
                                                         : WEIGHT + slice->flat;
  const int64_t block = phx_model_unit(self->model, slice->unit)->first_block[slice->flat] + slice->first_block;
  *out = (char *)self->regions[region].at + block * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype);
  return PHX_OK;
}
static phx_status bare_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)p, (void)err;
  return PHX_OK;
}
static phx_status bare_state_changed(phx_strategy *self, phx_error *err) {
  const phx_device *d = self->s.device;
  phx_status status = PHX_OK;
  for (int flat = 0; flat < PHX_FLATS && status == PHX_OK; flat++) {
    const phx_kit_region *masters = &self->regions[MASTER + flat];
    if (masters->at)
      status = d->cast(d->ctx, self->regions[WEIGHT + flat].at, self->topology->compute_dtype, masters->at, PHX_F32,
                       masters->bytes / 4, NULL, err);
  }
  return status;
}
static phx_status nothing(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}

/* ---- the step ---- */

static phx_status bare_begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  (void)self, (void)index, (void)last, (void)err;
  return PHX_OK;
}

static phx_status bare_acquire(phx_strategy *self, uint32_t s, int32_t pass, int32_t micro_batch, phx_stream *stream,
                               const phx_view **out, phx_error *err) {
  (void)micro_batch, (void)stream, (void)err;
  *out = &self->views[s + (pass == PHX_PASS_BACKWARD ? self->model->n_stages : 0)];
  return PHX_OK;
}

static phx_status bare_release(phx_strategy *self, uint32_t s, int32_t pass, int32_t micro_batch, uint32_t flags,
                               phx_stream *stream, phx_error *err) {
  (void)self, (void)pass, (void)micro_batch, (void)stream;
  if (flags & PHX_RELEASE_NO_GRADIENT)
    return phx_fail(err, PHX_UNSUPPORTED, "bare runs every stage, but stage %u was skipped", s);
  return PHX_OK;
}

static phx_status bare_gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t u = 0; u < self->model->n_units && status == PHX_OK; u++) {
    const int64_t blocks = phx_model_unit(self->model, u)->blocks[PHX_FLAT_TRAINABLE];
    if (blocks > 0)
      status = acc->add(acc->ctx, u, 0, blocks, at(self, GRADIENT, u, PHX_FLAT_TRAINABLE), NULL, err);
  }
  return status;
}

static phx_status bare_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  phx_status status = PHX_OK;
  (void)step;
  for (uint32_t u = 0; u < self->model->n_units && status == PHX_OK; u++) {
    const phx_unit *unit = phx_model_unit(self->model, u);
    const int64_t first = unit->first_block[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
    phx_kit_slice slice = {.unit = u, .place = PHX_SPACE_DEVICE, .blocks = unit->blocks[PHX_FLAT_TRAINABLE]};
    if (slice.blocks == 0) continue;
    slice.weight = weight(self, u, PHX_FLAT_TRAINABLE, 0);
    slice.weight_dtype = self->topology->compute_dtype;
    slice.master = at(self, MASTER, u, PHX_FLAT_TRAINABLE);
    slice.gradient = at(self, GRADIENT, u, PHX_FLAT_TRAINABLE);
    for (uint32_t k = 0; k < self->topology->n_optim_states; k++)
      slice.states[k] =
          (char *)self->regions[STATES + k].at + first * (int64_t)phx_dtype_bytes(self->topology->optim_dtype[k]);
    status = phx_kit_update(self->s.optim, &slice, scale, NULL, err);
  }
  return status;
}

static const phx_strategy_table table = {
    .struct_size = sizeof table, .estimate = bare_estimate, .create = bare_create, .destroy = bare_destroy,
    .visit_state = bare_visit_state, .map = bare_map, .unmap = bare_unmap, .state_changed = bare_state_changed,
    .begin_micro_batch = bare_begin_micro_batch, .acquire = bare_acquire, .release = bare_release,
    .finish_gradients = nothing, .discard_gradients = nothing, .gradient_norm = bare_gradient_norm,
    .update = bare_update,
};
static const char *const extensions[] = {PHX_EXT_DEVICE, PHX_EXT_OPTIM, NULL};
const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin, .kind = PHX_KIND_STRATEGY, .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR, .id = "bare", .version = "1.0", .vendor = "Phalanx tests", .license = "see LICENSE",
      .summary = "Test only: a training loop without a framework, on one rank.", .build = __VERSION__,
      .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16, .extensions = extensions, .table = &table,
  };
  return &plugin;
}
