/* tests/plugins/fileopt - data parallelism whose optimizer state lives in a file: proof that states need no memory.
 *
 * Weights and gradients are replicas; a rank keeps the states of its share of the model in a temporary file without a
 * name, and updates its share slice by slice: read the slice's states, hand the optimizer a ticket, write them back.
 * visit_state names the same slices; map and unmap move them through a few buffers of bounded size.
 * Invariant: at most SLOTS slices are in memory.  Does not: overlap anything.  [main] only. */
#include <errno.h>
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SLOTS = 4 }; /* a state of each kind, and two to spare */
enum { WEIGHT = 0, FROZEN = 1, GRADIENT = 2, REDUCED = 3, SLICES = 4, REGIONS = 5 };

typedef struct fileopt_config {
  int64_t slice_blocks;
} fileopt_config;
static const phx_option options[] = {
    PHX_INT(fileopt_config, slice_blocks, "4", 1, 1 << 20, "blocks", 0,
            "Blocks of a state that are in memory at once."),
};

struct phx_strategy {
  const fileopt_config *config;
  const phx_topology *topology;
  const phx_model *model;
  phx_kit_services s;
  phx_kit_views views;
  phx_kit_region regions[REGIONS];
  phx_kit_shard mine[PHX_FLATS];
  void *slots[SLOTS]; /* where each is, while in use; else NULL */
  int file;           /* state after state, each the share long */
  int32_t micro_batch;
  uint32_t final_stage; /* gradients are complete when its backward pass is released */
  bool reducing, reduced;
};

static void plan(const fileopt_config *config, const phx_topology *t, const phx_model *m, phx_kit_region *r) {
  int64_t whole = phx_kit_whole_numel(m->total_blocks[PHX_FLAT_TRAINABLE], t->world_size) * 4;
  int64_t frozen = phx_kit_whole_numel(m->total_blocks[PHX_FLAT_FROZEN], t->world_size) * 4;
  r[WEIGHT] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = whole};
  r[FROZEN] = (phx_kit_region){.kind = PHX_MEM_WEIGHT, .shared = 1, .bytes = frozen};
  r[GRADIENT] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .shared = 1, .bytes = whole};
  r[REDUCED] = (phx_kit_region){.kind = PHX_MEM_GRADIENT, .bytes = phx_kit_adds_reduced(t) ? whole : 0};
  r[SLICES] = (phx_kit_region){.kind = PHX_MEM_BUFFER,
                               .space = PHX_SPACE_HOST,
                               .bytes = t->n_optim_states ? SLOTS * config->slice_blocks * PHX_BLOCK * 4 : 0};
}

static phx_status fileopt_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                                   phx_error *err) {
  phx_kit_region regions[REGIONS];
  PHX_TRY(phx_kit_check_topology(t, err));
  plan(config, t, m, regions);
  phx_kit_regions_estimate(regions, REGIONS, out);
  phx_kit_estimate_grain(out, PHX_GRAIN_BLOCK);
  int64_t whole = phx_kit_whole_numel(m->total_blocks[PHX_FLAT_TRAINABLE], t->world_size);
  phx_kit_estimate_call(out, t, PHX_OP_ALL_REDUCE, whole, PHX_F32, 0, phx_kit_adds_reduced(t) ? t->accumulate : 1);
  phx_kit_estimate_call(out, t, PHX_OP_ALL_GATHER, whole / t->world_size, PHX_F32, 0, 1);
  return PHX_OK;
}

static void fileopt_destroy(phx_strategy *self) {
  if (!self) return;
  if (self->file >= 0) close(self->file);
  phx_kit_regions_release(&self->s, self->regions, REGIONS);
  phx_kit_services_close(&self->s);
  phx_kit_views_destroy(&self->views);
  free(self);
}

static int64_t share_bytes(const phx_strategy *self) {
  return self->mine[PHX_FLAT_TRAINABLE].per * PHX_BLOCK * 4;
}

static phx_status open_file(phx_strategy *self, phx_error *err) {
  const char *dir = getenv("TMPDIR");
  char path[512];
  if (!dir || strlen(dir) > 400) dir = "/tmp";
  strcpy(path, dir);
  strcat(path, "/phalanx-fileopt-XXXXXX");
  self->file = mkstemp(path);
  if (self->file < 0) return phx_fail(err, PHX_IO, "cannot make a file in %s: %s", dir, strerror(errno));
  unlink(path);
  if (ftruncate(self->file, share_bytes(self) * self->topology->n_optim_states) == 0) return PHX_OK;
  return phx_fail(err, PHX_IO, "cannot make the file of states in %s larger: %s", dir, strerror(errno));
}

static float *whole(const phx_strategy *self, int region, uint32_t unit, uint32_t flat) {
  return (float *)self->regions[region].at + phx_model_unit(self->model, unit)->first_block[flat] * PHX_BLOCK;
}

static phx_status fileopt_create(const phx_host *host, const void *config, const phx_topology *topology,
                                 const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the strategy");
  *self = (phx_strategy){.config = config, .topology = topology, .model = model, .file = -1};
  phx_status status;
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
    self->mine[flat] = phx_kit_shard_of(model->total_blocks[flat], topology->rank, topology->world_size);
  plan(config, topology, model, self->regions);
  PHX_TRY_GOTO(phx_kit_services_open(host, &self->s, err), status, done);
  PHX_TRY_GOTO(phx_kit_views_create(model, &self->views, err), status, done);
  PHX_TRY_GOTO(phx_kit_regions_alloc(&self->s, self->regions, REGIONS, err), status, done);
  PHX_TRY_GOTO(open_file(self, err), status, done);
  for (uint32_t i = model->n_stages; i-- > 0;)
    for (uint32_t k = 0; k < phx_model_stage(model, i)->n_uses; k++)
      if (phx_model_use(model, phx_model_stage(model, i)->first_use + k)->flags & PHX_USE_LAST) self->final_stage = i;
  for (uint32_t u = 0; u < model->n_units; u++) {
    phx_kit_place *place = &self->views.places[u];
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++)
      if (phx_model_unit(model, u)->blocks[flat] > 0) place->weight[flat] = whole(self, WEIGHT + (int)flat, u, flat);
    if (phx_model_unit(model, u)->blocks[PHX_FLAT_TRAINABLE] > 0)
      place->gradient = whole(self, GRADIENT, u, PHX_FLAT_TRAINABLE);
  }
  *out = self;
  return PHX_OK;
done:
  fileopt_destroy(self);
  return status;
}

/* ---- slices ---- */

/* All of the slice or an error; write: to the file. */
static phx_status transfer(phx_strategy *self, bool write, void *p, uint32_t state, int64_t block, int64_t blocks,
                           phx_error *err) {
  off_t at = state * share_bytes(self) + (block - self->mine[PHX_FLAT_TRAINABLE].first) * PHX_BLOCK * 4;
  size_t bytes = (size_t)blocks * PHX_BLOCK * 4;
  for (size_t done = 0; done < bytes;) {
    ssize_t n = write ? pwrite(self->file, (char *)p + done, bytes - done, at + (off_t)done)
                      : pread(self->file, (char *)p + done, bytes - done, at + (off_t)done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      return phx_fail(err, PHX_IO, "%s %zu bytes of optimizer state %u: %s", write ? "writing" : "reading", bytes,
                      state, n < 0 ? strerror(errno) : "the file ends early");
    done += (size_t)n;
  }
  return PHX_OK;
}

static void *slot_at(const phx_strategy *self, int i) {
  return (char *)self->regions[SLICES].at + i * self->config->slice_blocks * PHX_BLOCK * 4;
}

static phx_status slot_take(phx_strategy *self, void **out, phx_error *err) {
  for (int i = 0; i < SLOTS; i++) {
    if (self->slots[i]) continue;
    *out = self->slots[i] = slot_at(self, i);
    return PHX_OK;
  }
  return phx_fail(err, PHX_NOMEM, "%d slices are mapped, and no more may be", SLOTS);
}

static void slot_give(phx_strategy *self, const void *p) {
  for (int i = 0; i < SLOTS; i++)
    if (self->slots[i] == p) self->slots[i] = NULL;
}

static phx_status fileopt_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  const phx_optim *optim = self->s.optim;
  for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
    const phx_kit_shard *mine = &self->mine[flat];
    for (int64_t at = 0; at < mine->blocks; at += self->config->slice_blocks) {
      int64_t blocks = mine->blocks - at < self->config->slice_blocks ? mine->blocks - at : self->config->slice_blocks;
      for (phx_kit_part p = {0}; phx_kit_part_next(self->model, flat, mine->first + at, blocks, &p);) {
        phx_slice slice = {.struct_size = sizeof slice,
                           .kind = PHX_STATE_WEIGHT,
                           .unit = p.unit,
                           .flat = flat,
                           .first_block = p.first,
                           .blocks = p.blocks,
                           .dtype = PHX_F32};
        phx_status status = visitor->slice(visitor->ctx, &slice, err);
        slice.kind = PHX_STATE_OPTIM;
        slice.place = PHX_SPACE_HOST;
        for (uint32_t k = 0; status == PHX_OK && flat == PHX_FLAT_TRAINABLE && k < optim->n_states; k++) {
          slice.state_index = k;
          status = visitor->slice(visitor->ctx, &slice, err);
        }
        if (status != PHX_OK) return status;
      }
    }
  }
  return PHX_OK;
}

static int64_t first_of(const phx_strategy *self, const phx_slice *slice) {
  return phx_model_unit(self->model, slice->unit)->first_block[slice->flat] + slice->first_block;
}

static phx_status fileopt_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  void *p = NULL;
  if (slice->kind == PHX_STATE_WEIGHT) {
    *out = (float *)self->regions[WEIGHT + slice->flat].at + first_of(self, slice) * PHX_BLOCK;
    return PHX_OK;
  }
  if (slice->kind != PHX_STATE_OPTIM || slice->blocks > self->config->slice_blocks)
    return phx_fail(err, PHX_INVALID, "fileopt did not name a slice of kind %d and %lld blocks", slice->kind,
                    (long long)slice->blocks);
  phx_status status = slot_take(self, &p, err);
  if (status == PHX_OK && (mode & PHX_MAP_READ))
    status = transfer(self, false, p, slice->state_index, first_of(self, slice), slice->blocks, err);
  if (status == PHX_OK)
    *out = p;
  else
    slot_give(self, p);
  return status;
}

static phx_status fileopt_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  if (slice->kind != PHX_STATE_OPTIM) return PHX_OK;
  phx_status status = PHX_OK;
  if (mode & PHX_MAP_WRITE)
    status = transfer(self, true, p, slice->state_index, first_of(self, slice), slice->blocks, err);
  slot_give(self, p);
  return status;
}

/* ---- the step: everything on the compute stream ---- */

static phx_status make_whole(phx_strategy *self, uint32_t flat, phx_error *err) {
  const phx_comm *c = self->s.comm;
  int64_t share = self->mine[flat].per * PHX_BLOCK;
  float *base = self->regions[WEIGHT + flat].at;
  if (share == 0) return PHX_OK;
  return c->all_gather(c->ctx, base + c->rank * share, base, share, PHX_F32, NULL, err);
}

static phx_status fileopt_state_changed(phx_strategy *self, phx_error *err) {
  phx_status status = make_whole(self, PHX_FLAT_TRAINABLE, err);
  return status == PHX_OK ? make_whole(self, PHX_FLAT_FROZEN, err) : status;
}

static phx_status reduce(phx_strategy *self, phx_error *err) {
  const phx_comm *c = self->s.comm;
  const phx_device *d = self->s.device;
  int64_t numel = self->regions[GRADIENT].bytes / 4;
  float *g = self->regions[GRADIENT].at, *sum = self->regions[REDUCED].at;
  phx_status status = c->all_reduce(c->ctx, g, g, numel, PHX_F32, PHX_SUM, NULL, err);
  if (status != PHX_OK || !sum) return status;
  return self->micro_batch == 0 ? d->copy(d->ctx, sum, g, numel * 4, NULL, err)
                                : d->add(d->ctx, sum, g, numel, NULL, err);
}

static phx_status fileopt_begin_micro_batch(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  (void)err;
  bool adds = phx_kit_adds_reduced(self->topology);
  self->micro_batch = index;
  self->reducing = adds || last;
  self->reduced = false;
  phx_kit_views_begin(&self->views, adds || index == 0);
  return PHX_OK;
}

static phx_status fileopt_acquire(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                                  phx_stream *stream, const phx_view **out, phx_error *err) {
  (void)micro_batch, (void)stream, (void)err;
  *out = phx_kit_view(&self->views, stage, pass, NULL);
  return PHX_OK;
}

static phx_status fileopt_release(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                                  phx_stream *stream, phx_error *err) {
  (void)micro_batch;
  phx_status status = PHX_OK;
  if (pass != PHX_PASS_BACKWARD) return PHX_OK;
  if (flags & PHX_RELEASE_NO_GRADIENT) status = phx_kit_view_unused(&self->views, self->s.device, stage, stream, err);
  if (status != PHX_OK || stage != self->final_stage || !self->reducing) return status;
  self->reduced = true;
  return reduce(self, err);
}

static phx_status fileopt_finish_gradients(phx_strategy *self, phx_error *err) {
  if (!self->reduced)
    return phx_fail(err, PHX_STATE, "gradients are to be finished before the last stage was released");
  return PHX_OK;
}

static phx_status fileopt_discard_gradients(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}

static const float *reduced(const phx_strategy *self, int64_t block) {
  const phx_kit_region *r = &self->regions[phx_kit_adds_reduced(self->topology) ? REDUCED : GRADIENT];
  return (const float *)r->at + block * PHX_BLOCK;
}

static phx_status fileopt_gradient_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  const phx_kit_shard *mine = &self->mine[PHX_FLAT_TRAINABLE];
  for (phx_kit_part p = {0}; phx_kit_part_next(self->model, PHX_FLAT_TRAINABLE, mine->first, mine->blocks, &p);)
    PHX_TRY(acc->add(acc->ctx, p.unit, p.first, p.blocks, reduced(self, mine->first + p.at), NULL, err));
  return PHX_OK;
}

static phx_status update_slice(phx_strategy *self, const phx_kit_part *p, int64_t block, float scale, phx_error *err) {
  const phx_device *d = self->s.device;
  uint32_t n = self->s.optim->n_states;
  phx_kit_slice slice = {.unit = p->unit,
                         .first = p->first,
                         .blocks = p->blocks,
                         .gradient = reduced(self, block),
                         .weight = (float *)self->regions[WEIGHT].at + block * PHX_BLOCK};
  phx_status status = PHX_OK;
  for (uint32_t k = 0; k < n; k++) {
    PHX_TRY_GOTO(slot_take(self, &slice.states[k], err), status, done);
    PHX_TRY_GOTO(transfer(self, false, slice.states[k], k, block, p->blocks, err), status, done);
  }
  PHX_TRY_GOTO(phx_kit_update(self->s.optim, &slice, scale, NULL, err), status, done);
  PHX_TRY_GOTO(d->stream_synchronize(d->ctx, NULL, err), status, done);
  for (uint32_t k = 0; k < n; k++)
    PHX_TRY_GOTO(transfer(self, true, slice.states[k], k, block, p->blocks, err), status, done);
done:
  for (uint32_t k = 0; k < n; k++) slot_give(self, slice.states[k]);
  return status;
}

static phx_status fileopt_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  (void)step;
  const phx_kit_shard *mine = &self->mine[PHX_FLAT_TRAINABLE];
  int64_t most = self->config->slice_blocks;
  for (int64_t at = 0; at < mine->blocks; at += most) {
    int64_t first = mine->first + at, blocks = mine->blocks - at < most ? mine->blocks - at : most;
    for (phx_kit_part p = {0}; phx_kit_part_next(self->model, PHX_FLAT_TRAINABLE, first, blocks, &p);)
      PHX_TRY(update_slice(self, &p, first + p.at, scale, err));
  }
  return make_whole(self, PHX_FLAT_TRAINABLE, err);
}

static const phx_strategy_table table = {
    .struct_size = sizeof table,
    .estimate = fileopt_estimate,
    .create = fileopt_create,
    .destroy = fileopt_destroy,
    .visit_state = fileopt_visit_state,
    .map = fileopt_map,
    .unmap = fileopt_unmap,
    .state_changed = fileopt_state_changed,
    .begin_micro_batch = fileopt_begin_micro_batch,
    .acquire = fileopt_acquire,
    .release = fileopt_release,
    .finish_gradients = fileopt_finish_gradients,
    .discard_gradients = fileopt_discard_gradients,
    .gradient_norm = fileopt_gradient_norm,
    .update = fileopt_update,
};
static const phx_plugin plugin = {
    .struct_size = sizeof plugin,
    .kind = PHX_KIND_STRATEGY,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "fileopt",
    .version = "0.1.0",
    .summary = "For tests: data parallelism with optimizer states in a file",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .provides = PHX_CAP_DETERMINISTIC,
    .needs = PHX_NEED_HOST_MEMORY,
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .option_stride = sizeof *options,
    .config_size = sizeof(fileopt_config),
    .table = &table,
};
const phx_plugin *phx_plugin_v1(void) {
  return &plugin;
}
