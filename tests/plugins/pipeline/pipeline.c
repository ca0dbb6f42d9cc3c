/* tests/plugins/pipeline - a pipeline of two ranks through layout and run_step: proof that a strategy may own the
 * schedule.
 *
 * The stages are cut in two halves.  Rank 0 runs the first, rank 1 the second; the activations at the cut are sent
 * forward and their gradients back, in the order 1F1B (PipeDream, arXiv 1806.03377) with two slots: while rank 1 works
 * on a micro-batch, rank 0 runs the next.  A unit that both halves use (a tied weight) is held by both: rank 0 writes
 * it; the gradients of both meet there, and its new weights are sent back by broadcast.
 * Invariants: both ranks send and receive in one order that needs no buffering (a0 a1 g0 a2 g1 ...); memory that is
 * reached by the other rank has the same size on both.  Does not: data parallelism, overlap.  [main] only. */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

/* OWN: units of one rank alone; TIED: units of both, reached by the other rank. */
enum {
  OWN = 0,
  OWN_FROZEN = 1,
  TIED = 2,
  TIED_FROZEN = 3,
  OWN_GRADIENT = 4,
  TIED_GRADIENT = 5,
  STATES = 6,
  REGIONS = 6 + PHX_OPTIM_STATES_MAX
};

typedef struct pipeline_config {
  int64_t cut;
} pipeline_config;
static const phx_option options[] = {
    PHX_INT(pipeline_config, cut, "auto", 1, 1 << 20, "stages", PHX_OPTF_AUTO,
            "Stages that rank 0 runs; auto: half of them."),
};

typedef struct pipeline_plan {
  uint32_t cut;           /* stages [0, cut) are rank 0's */
  uint8_t *users;         /* (n_units) bit r: rank r uses it; 1 where nobody does */
  int64_t *at[PHX_FLATS]; /* (n_units) first block in its region */
  int64_t *state_at;      /* (n_units) first block of the states that this rank keeps */
  phx_kit_region regions[REGIONS];
} pipeline_plan;

struct phx_strategy {
  const phx_topology *topology;
  const phx_model *model;
  pipeline_plan plan;
  phx_kit_services s;
  phx_kit_views views;
};

static void plan_destroy(pipeline_plan *p) {
  free(p->users);
  free(p->at[0]), free(p->at[1]);
  free(p->state_at);
}

static bool holds(const pipeline_plan *p, uint32_t unit, int32_t rank) {
  return p->users[unit] >> rank & 1;
}
static bool tied(const pipeline_plan *p, uint32_t unit) {
  return p->users[unit] == 3;
}
static bool writes(const pipeline_plan *p, uint32_t unit, int32_t rank) {
  return tied(p, unit) ? rank == 0 : holds(p, unit, rank);
}

static phx_status find_cut(const pipeline_config *config, const phx_topology *t, const phx_model *m, uint32_t *cut,
                           phx_error *err) {
  if (t->world_size != 2)
    return phx_fail(err, PHX_UNSUPPORTED, "pipeline runs on 2 ranks, not on %d", t->world_size);
  if (phx_kit_adds_reduced(t))
    return phx_fail(err, PHX_UNSUPPORTED, "pipeline adds micro-batches where they are: set reduce = step");
  *cut = config->cut < 0 ? m->n_stages / 2 : (uint32_t)config->cut;
  if (*cut >= 1 && *cut < m->n_stages) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "cut = %u leaves a rank without a stage: the model has %u", *cut, m->n_stages);
}

static phx_status plan_create(const pipeline_config *config, const phx_topology *t, const phx_model *m,
                              pipeline_plan *out, phx_error *err) {
  pipeline_plan p = {0};
  int64_t blocks[6] = {0}, mine = 0;
  phx_status status = PHX_OK;
  PHX_TRY_GOTO(phx_kit_check_topology(t, err), status, done);
  PHX_TRY_GOTO(find_cut(config, t, m, &p.cut, err), status, done);
  p.users = calloc(m->n_units + 1u, 1);
  p.state_at = calloc(m->n_units + 1u, sizeof *p.state_at);
  for (int f = 0; f < PHX_FLATS; f++) p.at[f] = calloc(m->n_units + 1u, sizeof *p.at[f]);
  if (!p.users || !p.state_at || !p.at[0] || !p.at[1]) {
    status = phx_fail(err, PHX_NOMEM, "no memory to plan %u units", m->n_units);
    goto done;
  }
  for (uint32_t s = 0; s < m->n_stages; s++)
    for (uint32_t i = 0; i < phx_model_stage(m, s)->n_uses; i++)
      p.users[phx_model_use(m, phx_model_stage(m, s)->first_use + i)->unit] |= s < p.cut ? 1 : 2;
  for (uint32_t u = 0; u < m->n_units; u++) {
    if (p.users[u] == 0) p.users[u] = 1;
    if (!holds(&p, u, t->rank)) continue;
    for (int f = 0; f < PHX_FLATS; f++) {
      int64_t *at = &blocks[(tied(&p, u) ? TIED : OWN) + f];
      p.at[f][u] = *at;
      *at += phx_model_unit(m, u)->blocks[f];
    }
    p.state_at[u] = mine;
    if (writes(&p, u, t->rank)) mine += phx_model_unit(m, u)->blocks[PHX_FLAT_TRAINABLE];
  }
  for (int r = OWN; r <= TIED_FROZEN; r++)
    p.regions[r] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = r >= TIED, .bytes = blocks[r] * PHX_BLOCK * 4};
  p.regions[OWN_GRADIENT] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .bytes = p.regions[OWN].bytes};
  p.regions[TIED_GRADIENT] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .shared = 1, .bytes = p.regions[TIED].bytes};
  for (uint32_t k = 0; k < t->n_optim_states; k++)
    p.regions[STATES + k] = (phx_kit_region){.kind = PHX_MEM_OPTIMIZER,
                                             .bytes = mine * PHX_BLOCK * (int64_t)phx_dtype_bytes(t->optim_dtype[k])};
  *out = p;
  return PHX_OK;
done:
  plan_destroy(&p);
  return status;
}

static phx_status pipeline_layout(const void *config, const phx_topology *t, const phx_model *m, phx_layout *out,
                                  phx_error *err) {
  pipeline_plan p;
  PHX_TRY(plan_create(config, t, m, &p, err));
  out->data_rank = 0;
  out->data_size = 1;
  out->activation_slots = t->accumulate < 2 ? 1 : 2;
  out->n_axes = 1;
  out->axes[0] = (phx_axis){.name = "pipeline", .size = 2, .index = t->rank};
  for (uint32_t s = 0; s < m->n_stages; s++) out->stage_owned[s] = (s >= p.cut) == (t->rank == 1);
  for (uint32_t u = 0; u < m->n_units; u++) out->unit_owned[u] = holds(&p, u, t->rank);
  plan_destroy(&p);
  return PHX_OK;
}

static phx_status pipeline_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                                    phx_error *err) {
  pipeline_plan p;
  PHX_TRY(plan_create(config, t, m, &p, err));
  phx_kit_regions_estimate(p.regions, REGIONS, out);
  phx_kit_estimate_grain(out, PHX_GRAIN_TENSOR);
  phx_kit_estimate_call(out, t, PHX_OP_SEND, t->boundary_bytes[p.cut - 1], PHX_U8, 0, t->accumulate);
  phx_kit_estimate_call(out, t, PHX_OP_RECV, t->boundary_bytes[p.cut - 1], PHX_U8, 0, t->accumulate);
  if (p.regions[TIED].bytes > 0) {
    phx_kit_estimate_call(out, t, PHX_OP_REDUCE, p.regions[TIED].bytes / 4, PHX_F32, 0, 1);
    phx_kit_estimate_call(out, t, PHX_OP_BROADCAST, p.regions[TIED].bytes / 4, PHX_F32, 0, 1);
  }
  plan_destroy(&p);
  return PHX_OK;
}

/* ---- life and state ---- */

static void pipeline_destroy(phx_strategy *self) {
  if (!self) return;
  phx_kit_regions_release(&self->s, self->plan.regions, REGIONS);
  phx_kit_services_close(&self->s);
  phx_kit_views_destroy(&self->views);
  plan_destroy(&self->plan);
  free(self);
}

static float *weight(const phx_strategy *self, uint32_t u, uint32_t flat) {
  const phx_kit_region *r = &self->plan.regions[(tied(&self->plan, u) ? TIED : OWN) + (int)flat];
  return (float *)r->at + self->plan.at[flat][u] * PHX_BLOCK;
}
static float *gradient(const phx_strategy *self, uint32_t u) {
  const phx_kit_region *r = &self->plan.regions[tied(&self->plan, u) ? TIED_GRADIENT : OWN_GRADIENT];
  return (float *)r->at + self->plan.at[PHX_FLAT_TRAINABLE][u] * PHX_BLOCK;
}
static void *state(const phx_strategy *self, uint32_t u, uint32_t k) {
  return (char *)self->plan.regions[STATES + k].at +
         self->plan.state_at[u] * PHX_BLOCK * (int64_t)phx_dtype_bytes(self->topology->optim_dtype[k]);
}

static phx_status pipeline_create(const phx_host *host, const void *config, const phx_topology *topology,
                                  const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the strategy");
  *self = (phx_strategy){.topology = topology, .model = model};
  phx_status status;
  PHX_TRY_GOTO(plan_create(config, topology, model, &self->plan, err), status, done);
  PHX_TRY_GOTO(phx_kit_services_open(host, &self->s, err), status, done);
  PHX_TRY_GOTO(phx_kit_views_create(model, &self->views, err), status, done);
  PHX_TRY_GOTO(phx_kit_regions_alloc(&self->s, self->plan.regions, REGIONS, err), status, done);
  for (uint32_t u = 0; u < model->n_units; u++) {
    if (!holds(&self->plan, u, topology->rank)) continue;
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
      if (phx_model_unit(model, u)->blocks[flat] > 0) self->views.places[u].weight[flat] = weight(self, u, flat);
    if (phx_model_unit(model, u)->blocks[PHX_FLAT_TRAINABLE] > 0) self->views.places[u].gradient = gradient(self, u);
  }
  *out = self;
  return PHX_OK;
done:
  pipeline_destroy(self);
  return status;
}

static phx_status pipeline_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  for (uint32_t u = 0; u < self->model->n_units; u++) {
    if (!writes(&self->plan, u, self->topology->rank)) continue;
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
      int64_t blocks = phx_model_unit(self->model, u)->blocks[flat];
      PHX_TRY(phx_kit_visit(visitor, self->s.optim, PHX_F32, u, flat, 0, blocks, err));
    }
  }
  return PHX_OK;
}

static phx_status pipeline_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  (void)mode;
  if (slice->kind != PHX_STATE_WEIGHT && slice->kind != PHX_STATE_OPTIM)
    return phx_fail(err, PHX_INVALID, "pipeline keeps no state of kind %d", slice->kind);
  if (slice->kind == PHX_STATE_WEIGHT) {
    *out = weight(self, slice->unit, slice->flat) + slice->first_block * PHX_BLOCK;
    return PHX_OK;
  }
  *out = (char *)state(self, slice->unit, slice->state_index) +
         slice->first_block * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype);
  return PHX_OK;
}
static phx_status pipeline_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)p, (void)err;
  return PHX_OK;
}

/* Rank 0's tied weights become rank 1's. */
static phx_status copy_tied(phx_strategy *self, int region, phx_error *err) {
  const phx_comm *c = self->s.comm;
  const phx_kit_region *r = &self->plan.regions[region];
  return r->bytes ? c->broadcast(c->ctx, r->at, r->bytes / 4, PHX_F32, 0, NULL, err) : PHX_OK;
}

static phx_status pipeline_state_changed(phx_strategy *self, phx_error *err) {
  phx_status status = copy_tied(self, TIED, err);
  return status == PHX_OK ? copy_tied(self, TIED_FROZEN, err) : status;
}

/* ---- stages ---- */

static phx_status pipeline_begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  (void)last, (void)err;
  phx_kit_views_begin(&self->views, index == 0);
  return PHX_OK;
}

static phx_status pipeline_acquire(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                                   phx_stream *stream, const phx_view **out, phx_error *err) {
  (void)micro_batch, (void)stream;
  if ((stage >= self->plan.cut) != (self->topology->rank == 1))
    return phx_fail(err, PHX_STATE, "stage %u is not run by rank %d", stage, self->topology->rank);
  *out = phx_kit_view(&self->views, stage, pass, NULL);
  return PHX_OK;
}

static phx_status pipeline_release(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                                   uint32_t flags, phx_stream *stream, phx_error *err) {
  (void)micro_batch;
  if (pass != PHX_PASS_BACKWARD || !(flags & PHX_RELEASE_NO_GRADIENT)) return PHX_OK;
  return phx_kit_view_unused(&self->views, self->s.device, stage, stream, err);
}

static phx_status run_stage(phx_strategy *self, const phx_executor *x, uint32_t stage, int32_t pass, int32_t mb,
                            int32_t slot, phx_error *err) {
  const phx_view *view = NULL;
  phx_status status = pipeline_acquire(self, stage, pass, mb, NULL, &view, err);
  if (status == PHX_OK)
    status = (pass == PHX_PASS_FORWARD ? x->forward : x->backward)(x->ctx, stage, mb, slot, view, err);
  const uint32_t flags = x->runs(x->ctx, stage, mb) ? 0 : PHX_RELEASE_NO_GRADIENT;
  if (status == PHX_OK) status = pipeline_release(self, stage, pass, mb, flags, NULL, err);
  return status;
}

/* This rank's stages of one micro-batch. */
static phx_status run_half(phx_strategy *self, const phx_executor *x, int32_t pass, int32_t mb, int32_t slot,
                           phx_error *err) {
  uint32_t first = self->topology->rank ? self->plan.cut : 0, end = self->topology->rank ? x->n_stages : self->plan.cut;
  phx_status status = PHX_OK;
  for (uint32_t i = 0; i < end - first && status == PHX_OK; i++)
    status = run_stage(self, x, pass == PHX_PASS_FORWARD ? first + i : end - 1 - i, pass, mb, slot, err);
  return status;
}

/* The tensor at the cut, or its gradient, to or from the other rank. */
static phx_status pass_on(phx_strategy *self, const phx_executor *x, bool send, int32_t slot, int32_t is_gradient,
                          phx_error *err) {
  const phx_comm *c = self->s.comm;
  uint32_t stage = self->plan.cut - 1;
  void *p = x->boundary(x->ctx, stage, slot, is_gradient);
  int64_t bytes = x->boundary_bytes(x->ctx, stage);
  int32_t other = 1 - self->topology->rank;
  return send ? c->send(c->ctx, p, bytes, PHX_U8, other, NULL, err)
              : c->recv(c->ctx, p, bytes, PHX_U8, other, NULL, err);
}

static phx_status first_half(phx_strategy *self, const phx_executor *x, phx_error *err) {
  for (int32_t i = 0; i <= x->micro_batches; i++) { /* forward of i, then backward of i - 1 */
    if (i < x->micro_batches) {
      PHX_TRY(run_half(self, x, PHX_PASS_FORWARD, i, i % 2, err));
      PHX_TRY(pass_on(self, x, true, i % 2, 0, err));
    }
    if (i == 0) continue;
    PHX_TRY(pipeline_begin_micro_batch(self, i - 1, i == x->micro_batches, err));
    PHX_TRY(pass_on(self, x, false, (i - 1) % 2, 1, err));
    PHX_TRY(run_half(self, x, PHX_PASS_BACKWARD, i - 1, (i - 1) % 2, err));
  }
  return PHX_OK;
}

static phx_status second_half(phx_strategy *self, const phx_executor *x, phx_error *err) {
  PHX_TRY(pass_on(self, x, false, 0, 0, err));
  for (int32_t i = 0; i < x->micro_batches; i++) {
    if (i + 1 < x->micro_batches) PHX_TRY(pass_on(self, x, false, (i + 1) % 2, 0, err));
    PHX_TRY(pipeline_begin_micro_batch(self, i, i + 1 == x->micro_batches, err));
    PHX_TRY(run_half(self, x, PHX_PASS_FORWARD, i, i % 2, err));
    PHX_TRY(run_half(self, x, PHX_PASS_BACKWARD, i, i % 2, err));
    PHX_TRY(pass_on(self, x, true, i % 2, 1, err));
  }
  return PHX_OK;
}

static phx_status pipeline_run_step(phx_strategy *self, const phx_executor *x, phx_error *err) {
  const phx_comm *c = self->s.comm;
  const phx_kit_region *r = &self->plan.regions[TIED_GRADIENT];
  phx_status status = self->topology->rank == 0 ? first_half(self, x, err) : second_half(self, x, err);
  if (status != PHX_OK || r->bytes == 0) return status;
  return c->reduce(c->ctx, r->at, r->at, r->bytes / 4, PHX_F32, PHX_SUM, 0, NULL, err);
}

static phx_status pipeline_finish_gradients(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}
static phx_status pipeline_discard_gradients(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}

static phx_status pipeline_gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t u = 0; u < self->model->n_units && status == PHX_OK; u++) {
    int64_t blocks = phx_model_unit(self->model, u)->blocks[PHX_FLAT_TRAINABLE];
    if (blocks > 0 && writes(&self->plan, u, self->topology->rank))
      status = acc->add(acc->ctx, u, 0, blocks, gradient(self, u), NULL, err);
  }
  return status;
}

static phx_status pipeline_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  (void)step;
  for (uint32_t u = 0; u < self->model->n_units; u++) {
    if (!writes(&self->plan, u, self->topology->rank)) continue;
    phx_kit_slice slice = {.unit = u,
                           .blocks = phx_model_unit(self->model, u)->blocks[PHX_FLAT_TRAINABLE],
                           .weight = weight(self, u, PHX_FLAT_TRAINABLE),
                           .gradient = gradient(self, u)};
    for (uint32_t k = 0; k < self->topology->n_optim_states; k++) slice.states[k] = state(self, u, k);
    PHX_TRY(phx_kit_update(self->s.optim, &slice, scale, NULL, err));
  }
  return copy_tied(self, TIED, err);
}

static const phx_strategy_table table = {
    .struct_size = sizeof table,
    .layout = pipeline_layout,
    .estimate = pipeline_estimate,
    .create = pipeline_create,
    .destroy = pipeline_destroy,
    .visit_state = pipeline_visit_state,
    .map = pipeline_map,
    .unmap = pipeline_unmap,
    .state_changed = pipeline_state_changed,
    .begin_micro_batch = pipeline_begin_micro_batch,
    .acquire = pipeline_acquire,
    .release = pipeline_release,
    .finish_gradients = pipeline_finish_gradients,
    .discard_gradients = pipeline_discard_gradients,
    .gradient_norm = pipeline_gradient_norm,
    .update = pipeline_update,
    .run_step = pipeline_run_step,
};
static const phx_plugin plugin = {
    .struct_size = sizeof plugin,
    .kind = PHX_KIND_STRATEGY,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "pipeline",
    .version = "0.1.0",
    .summary = "For tests: two ranks, each with half of the stages",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .needs = PHX_NEED_TWO_RANKS,
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .option_stride = sizeof *options,
    .config_size = sizeof(pipeline_config),
    .table = &table,
};
const phx_plugin *phx_plugin_v1(void) {
  return &plugin;
}
