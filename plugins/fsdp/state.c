/* plugins/fsdp/state.c - what a rank holds, where, and what it is the writer of.
 *
 * A rank holds its shard of each unit's flats, or everything where nothing is sharded; then the ranks share the
 * writing, and after a load the writers' parts go around. */
#include "fsdp.h"

void *fsdp_held_weight(const phx_strategy *self, uint32_t unit, uint32_t flat) {
  return (char *)self->plan.regions[FSDP_WEIGHT + flat].at +
         self->plan.at[flat][unit] * phx_kit_weight_bytes(self->topology);
}

/* Of the block that `mastered` begins with; NULL in fp32. */
float *fsdp_held_master(const phx_strategy *self, uint32_t unit, uint32_t flat) {
  const phx_kit_region *r = &self->plan.regions[FSDP_MASTER + flat];
  bool part = !self->plan.sharded && flat == PHX_FLAT_FROZEN;
  const int64_t ranks = part ? self->topology->world_size : 1;
  return r->at ? (float *)r->at + self->plan.at[flat][unit] / ranks : NULL;
}

/* The unit's gradients in the region: the held part, or the whole that it lies in. */
float *fsdp_kept_gradient(const phx_strategy *self, uint32_t unit) {
  int64_t copies = self->plan.windows ? 1 : self->plan.group;
  return (float *)self->plan.regions[FSDP_GRADIENT].at + self->plan.at[PHX_FLAT_TRAINABLE][unit] * copies;
}

float *fsdp_held_gradient(const phx_strategy *self, uint32_t unit) {
  int64_t before = !self->plan.windows && self->plan.sharded ? self->topology->rank : 0;
  return fsdp_kept_gradient(self, unit) + before * fsdp_part(self, unit, PHX_FLAT_TRAINABLE).per * PHX_BLOCK;
}

/* The part of a unit that this rank is the writer of: its shard; where all ranks hold all, its share of the work. */
phx_kit_shard fsdp_mine(const phx_strategy *self, uint32_t unit, uint32_t flat) {
  return phx_kit_shard_of(phx_model_unit(self->model, unit)->blocks[flat], self->topology->rank,
                          self->topology->world_size);
}

/* Blocks whose masters this rank keeps, in compute = bf16. */
static phx_kit_shard mastered(const phx_strategy *self, uint32_t unit, uint32_t flat) {
  return flat == PHX_FLAT_FROZEN ? fsdp_mine(self, unit, flat) : fsdp_part(self, unit, flat);
}

phx_status fsdp_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t u = 0; u < self->model->n_units; u++)
    for (uint32_t flat = 0; status == PHX_OK && flat < PHX_FLATS; flat++) {
      phx_kit_shard part = fsdp_mine(self, u, flat);
      status = phx_kit_visit(visitor, self->s.optim, self->topology->compute_dtype, u, flat, part.first, part.blocks,
                             err);
    }
  return status;
}

char *fsdp_held_state(const phx_strategy *self, uint32_t unit, uint32_t k) {
  int64_t size = (int64_t)phx_dtype_bytes(self->topology->optim_dtype[k]);
  return (char *)self->plan.regions[FSDP_STATES + k].at + self->plan.at[PHX_FLAT_TRAINABLE][unit] * size;
}

phx_status fsdp_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  (void)mode;
  bool master = slice->kind == PHX_STATE_MASTER && phx_kit_masters(self->topology);
  if (slice->kind != PHX_STATE_WEIGHT && slice->kind != PHX_STATE_OPTIM && !master)
    return phx_fail(err, PHX_INVALID, "fsdp keeps no state of kind %d", slice->kind);
  char *base = NULL;
  if (slice->kind == PHX_STATE_OPTIM) base = fsdp_held_state(self, slice->unit, slice->state_index);
  else if (master) base = (char *)fsdp_held_master(self, slice->unit, slice->flat);
  else base = fsdp_held_weight(self, slice->unit, slice->flat);
  phx_kit_shard part =
      master ? mastered(self, slice->unit, slice->flat) : fsdp_part(self, slice->unit, slice->flat);
  int64_t block = slice->first_block - part.first;
  *out = base + block * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype);
  return PHX_OK;
}

phx_status fsdp_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)p, (void)err;
  return PHX_OK;
}

/* The low-precision weights of the blocks whose masters are here. */
static phx_status derive_weights(phx_strategy *self, uint32_t unit, uint32_t flat, phx_error *err) {
  const phx_device *d = self->s.device;
  phx_kit_shard part = mastered(self, unit, flat);
  if (part.blocks == 0 || !phx_kit_masters(self->topology)) return PHX_OK;
  int64_t before = (part.first - fsdp_part(self, unit, flat).first) * PHX_BLOCK * phx_kit_weight_bytes(self->topology);
  return d->cast(d->ctx, (char *)fsdp_held_weight(self, unit, flat) + before, self->topology->compute_dtype,
                 fsdp_held_master(self, unit, flat), PHX_F32, part.blocks * PHX_BLOCK, self->s.stream, err);
}

/* Where all is held, the writers' parts go around: of masters, else of weights themselves. */
static phx_status share_weights(phx_strategy *self, uint32_t unit, uint32_t flat, phx_error *err) {
  bool masters = phx_kit_masters(self->topology);
  int64_t numel = fsdp_mine(self, unit, flat).per * PHX_BLOCK;
  if (masters && flat == PHX_FLAT_TRAINABLE) {
    float *master = fsdp_held_master(self, unit, flat);
    PHX_TRY(phx_kit_make_whole(&self->s, master, numel, PHX_F32, err));
    return derive_weights(self, unit, flat, err);
  }
  PHX_TRY(derive_weights(self, unit, flat, err));
  void *weight = fsdp_held_weight(self, unit, flat);
  PHX_TRY(phx_kit_make_whole(&self->s, weight, numel, self->topology->compute_dtype, err));
  return PHX_OK;
}

/* A shard is all there is. */
static phx_status derive_shards(phx_strategy *self, phx_error *err) {
  for (uint32_t u = 0; u < self->model->n_units; u++)
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++) PHX_TRY(derive_weights(self, u, flat, err));
  PHX_TRY(self->s.device->stream_synchronize(self->s.device->ctx, self->s.stream, err));
  return PHX_OK;
}

phx_status fsdp_state_changed(phx_strategy *self, phx_error *err) {
  PHX_TRY(fsdp_forget_windows(self, err));
  const phx_device *d = self->s.device;
  PHX_TRY(phx_kit_after(&self->s, self->mark[0], NULL, self->s.stream, err));
  if (self->plan.sharded) return derive_shards(self, err);
  for (uint32_t u = 0; u < self->model->n_units; u++) {
    self->s.comm->annotate(self->s.comm->ctx, (int32_t)u);
    for (uint32_t flat = 0; flat < PHX_FLATS; flat++) {
      phx_kit_shard part = fsdp_mine(self, u, flat);
      if (part.per == 0) continue;
      PHX_TRY(share_weights(self, u, flat, err));
      for (uint32_t k = 0; flat == PHX_FLAT_TRAINABLE && k < self->topology->n_optim_states; k++)
        PHX_TRY(phx_kit_make_whole(&self->s, fsdp_held_state(self, u, k), part.per * PHX_BLOCK,
                                   self->topology->optim_dtype[k], err));
    }
  }
  PHX_TRY(d->stream_synchronize(d->ctx, self->s.stream, err));
  return PHX_OK;
}
