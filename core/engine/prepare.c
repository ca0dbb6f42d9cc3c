/* core/engine/prepare.c - see prepare.h. */
#include "engine/prepare.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "engine/layout.h"
#include "engine/optim.h"
#include "engine/plan_kept.h"
#include "plugin/descriptor.h"
#include "plugin/suspect.h"

#define STEP_TOKENS_MAX (INT64_C(1) << 32) /* so that no size in bytes overflows */

static phx_status prepare_model(phx__prepared *p, phx_error *err) {
  phx_model declared = {.struct_size = sizeof declared};
  p->facts.struct_size = sizeof p->facts;
  PHX_TRY(PHX__SUSPECT(p->config->model.plugin->path, "in declare",
                       p->model_table->declare(p->config->model.config, &declared, &p->facts, &p->shape, err), err));
  if (PHX_HAS(&p->facts, phx_model_facts, computes) && p->facts.computes &&
      snprintf(p->computes, sizeof p->computes, "%s", p->facts.computes) >= (int)sizeof p->computes)
    return phx_fail(err, PHX_INVALID, "the model says in more than %zu characters what it computes",
                    sizeof p->computes - 1);
  p->facts.computes = p->computes;
  if (p->shape.sequence > p->facts.context)
    return phx_fail(err, PHX_INVALID,
                    "batch.sequence = %" PRId64 " is longer than the model's context of %" PRId64
                    " tokens: lower batch.sequence or raise model.context",
                    p->shape.sequence, p->facts.context);
  const int64_t tokens = p->config->s.batch.accumulate * p->shape.micro * p->shape.sequence; /* 2^60 at most */
  if (tokens > STEP_TOKENS_MAX)
    return phx_fail(err, PHX_INVALID,
                    "[batch] micro x accumulate x sequence = %" PRId64 " x %" PRId64 " x %" PRId64 " = %" PRId64
                    " tokens per rank and step: more than %" PRId64 " are refused",
                    p->shape.micro, p->config->s.batch.accumulate, p->shape.sequence, tokens, STEP_TOKENS_MAX);
  return phx__layout_build(&declared, &p->model, err);
}

static void prepare_topology(phx__prepared *p, int32_t rank, int32_t size, int32_t local_rank, int32_t local_size) {
  const phx__settings *s = &p->config->s;
  p->topology = (phx_topology){
      .struct_size = sizeof p->topology, .rank = rank, .world_size = size, .local_rank = local_rank,
      .local_size = local_size, .accumulate = (int32_t)s->batch.accumulate, .reduce = s->batch.reduce,
      .compute_dtype = s->precision.compute ? PHX_BF16 : PHX_F32,
      .reduce_dtype = s->precision.reduce ? PHX_BF16 : PHX_F32, .overlaps = 1, .n_optim_states = p->optim.n_states,
      .optim_grain = p->optim.grain, .payload = p->comm->payload,
      .payload_ctx = p->config->comm.config};
  for (uint32_t i = 0; i < p->optim.n_states; i++) {
    p->topology.optim_dtype[i] = p->optim.states[i].dtype;
    p->topology.optim_per[i] = p->optim.states[i].per;
  }
}

static phx_status prepare_layout(phx__prepared *p, phx_error *err) {
  phx_layout *l = &p->layout;
  *l = (phx_layout){.struct_size = sizeof *l, .data_rank = p->topology.rank, .data_size = p->topology.world_size,
                    .activation_slots = 1, .n_axes = 1};
  memcpy(l->axes[0].name, "data", sizeof "data");
  l->axes[0].size = l->data_size;
  l->axes[0].index = l->data_rank;
  l->stage_owned = phx__calloc(p->model->n_stages, 1);
  l->unit_owned = phx__calloc(p->model->n_units, 1);
  if (!l->stage_owned || !l->unit_owned) return phx_fail(err, PHX_NOMEM, "no memory for the layout");
  memset(l->stage_owned, 1, p->model->n_stages);
  memset(l->unit_owned, 1, p->model->n_units);
  if (!p->strategy->layout) return PHX_OK;
  PHX_TRY(PHX__SUSPECT(p->config->strategy.plugin->path, "in layout",
                       p->strategy->layout(p->config->strategy.config, &p->topology, p->model, l, err), err));
  return phx__plan_check_layout(p, err);
}

/* What the model needs at each stage; the strategy is told what passes between stages. */
static phx_status prepare_stages(phx__prepared *p, phx_error *err) {
  const uint32_t n = p->model->n_stages;
  phx_batch_shape one = p->shape;
  one.micro = 1;
  p->stages = phx__calloc(n, sizeof *p->stages);
  p->boundary = phx__calloc(n, sizeof *p->boundary);
  if (!p->stages || !p->boundary) return phx_fail(err, PHX_NOMEM, "no memory for the plan");
  for (uint32_t s = 0; s < n; s++) {
    phx_stage_memory *memory = &p->stages[s].memory;
    memory->struct_size = sizeof *memory;
    PHX_TRY(PHX__SUSPECT(p->config->model.plugin->path, "in stage_memory",
                         p->model_table->stage_memory(p->config->model.config, &p->shape, s, memory, err), err));
    PHX_TRY(phx__plan_check_stage(p, s, err));
    p->boundary[s] = memory->output;
    phx_stage_memory alone = {.struct_size = sizeof alone};
    PHX_TRY(p->model_table->stage_memory(p->config->model.config, &one, s, &alone, err));
    p->stages[s].window = phx_align_bytes(alone.output);
  }
  p->topology.boundary_bytes = p->boundary;
  return PHX_OK;
}

static void plan_activations(phx__prepared *p) {
  const uint32_t n = p->model->n_stages;
  const int64_t slots = p->layout.activation_slots;
  for (uint32_t s = 0; s < n; s++) {
    phx__stage_plan *plan = &p->stages[s];
    const int owned = p->layout.stage_owned[s], next_owned = s + 1 < n && p->layout.stage_owned[s + 1];
    plan->output = owned || next_owned ? phx_align_bytes(plan->memory.output) : 0;
    plan->saved = owned ? phx_align_bytes(plan->memory.saved) : 0;
    p->planned[PHX_MEM_ACTIVATION] += slots * (plan->output + plan->saved);
    if (plan->output > p->boundary_bytes) p->boundary_bytes = plan->output;
    if (owned && plan->memory.workspace > p->workspace_bytes) p->workspace_bytes = plan->memory.workspace;
  }
  p->workspace_bytes = phx_align_bytes(p->workspace_bytes);
  p->planned[PHX_MEM_ACTIVATION] += 2 * slots * p->boundary_bytes;
  p->planned[PHX_MEM_WORKSPACE] += p->workspace_bytes;
  p->token_bytes = phx_align_bytes(2 * (int64_t)sizeof(int32_t) * p->topology.accumulate * p->shape.micro *
                                   p->shape.sequence);
  p->planned[PHX_MEM_BUFFER] += 2 * p->token_bytes; /* on the device, and on their way to it */
  p->loss_slots = p->topology.accumulate > p->shape.micro ? p->topology.accumulate : p->shape.micro;
  p->planned[PHX_MEM_BUFFER] += phx_align_bytes(p->loss_slots * (int64_t)sizeof(double));
  const int64_t blocks = p->model->total_blocks[PHX_FLAT_TRAINABLE];
  p->norm_blocks = blocks < PHX__NORM_BLOCKS ? blocks : PHX__NORM_BLOCKS;
  if (p->norm_blocks < 1) p->norm_blocks = 1;
  p->planned[PHX_MEM_BUFFER] += phx_align_bytes(p->norm_blocks * (int64_t)sizeof(double));
}

int64_t phx__copy_pool(int64_t copy, int64_t all, int64_t *chunk) {
  enum { CHUNK = 1 << 20, GRAIN = PHX_BLOCK * 8 /* one block of the widest type */ };
  *chunk = CHUNK;
  if (copy < 0 || copy >= all) return all;
  if (copy >= GRAIN && copy < CHUNK) *chunk = copy / GRAIN * GRAIN;
  return copy / *chunk * *chunk;
}

bool phx__saves_overlap(const phx__settings *s, int64_t first) {
  const int64_t every = s->checkpoint.every;
  return s->checkpoint.background && every > 0 && (first / every + 1) * every < s->run.steps;
}

static void plan_copies(phx__prepared *p) {
  const phx__config *c = p->config;
  const bool can = (c->strategy.plugin->descriptor->provides & PHX_CAP_LIVE_STATE) &&
                   (c->device.plugin->descriptor->provides & PHX_CAP_HOST_MEMORY);
  int64_t chunk = 0;
  if (!can || !phx__saves_overlap(&c->s, 0)) return;
  p->copy_bytes = phx_align_bytes(phx__copy_pool(c->s.checkpoint.copy, p->estimate.state_bytes, &chunk));
  p->planned[PHX_MEM_BUFFER] += p->copy_bytes;
}

/* What the optimizer computes in. */
static phx_status plan_optimizer(phx__prepared *p, phx_error *err) {
  const phx__config *c = p->config;
  if (!PHX__OPTIONAL(p->optimizer, phx_optimizer_table, workspace)) return PHX_OK;
  phx__suspect_begin(c->optimizer.plugin->path, "in workspace", PHX__SUSPECT_CALL);
  const int64_t bytes = p->optimizer->workspace(c->optimizer.config, p->model);
  phx__suspect_end(PHX_OK, NULL);
  PHX_TRY(phx__plan_check_workspace(p, bytes, err));
  p->planned[PHX_MEM_WORKSPACE] += bytes;
  return PHX_OK;
}

phx_status phx__prepare(const phx__config *config, int32_t rank, int32_t size, int32_t local_rank, int32_t local_size,
                        int64_t micro, int64_t sequence, phx__prepared **out, phx_error *err) {
  phx_status status = PHX_OK;
  phx__prepared *p = phx__calloc(1, sizeof *p);
  if (!p) return phx_fail(err, PHX_NOMEM, "no memory to prepare the run");
  p->config = config;
  p->strategy = config->strategy.plugin->descriptor->table;
  p->device = config->device.plugin->descriptor->table;
  p->comm = config->comm.plugin->descriptor->table;
  p->model_table = config->model.plugin->descriptor->table;
  p->optimizer = config->optimizer.plugin->descriptor->table;
  p->shape = (phx_batch_shape){.struct_size = sizeof p->shape,
                               .micro = micro > 0 ? micro : config->s.batch.micro,
                               .sequence = sequence > 0 ? sequence : config->s.batch.sequence,
                               .compute_dtype = config->s.precision.compute ? PHX_BF16 : PHX_F32};
  if (size < 2 && (config->strategy.plugin->descriptor->needs & PHX_NEED_TWO_RANKS)) {
    status = phx_fail(err, PHX_UNSUPPORTED, "strategy %s needs at least two ranks; this run has %d",
                      config->strategy.plugin->descriptor->id, size);
    goto done;
  }
  if (local_size < size && (config->comm.plugin->descriptor->needs & PHX_NEED_ONE_MACHINE)) {
    status = phx_fail(err, PHX_UNSUPPORTED,
                      "%s joins ranks of one machine; %d of %d are on this one: choose another [comm] plugin, such as "
                      "nccl, or start all ranks on one machine", config->comm.plugin->descriptor->id, local_size,
                      size);
    goto done;
  }
  PHX_TRY_GOTO(phx__optim_describe(config, &p->optim, err), status, done);
  PHX_TRY_GOTO(prepare_model(p, err), status, done);
  prepare_topology(p, rank, size, local_rank, local_size);
  PHX_TRY_GOTO(prepare_stages(p, err), status, done);
  PHX_TRY_GOTO(prepare_layout(p, err), status, done);
  p->estimate.struct_size = sizeof p->estimate;
  PHX_TRY_GOTO(PHX__SUSPECT(config->strategy.plugin->path, "in estimate",
                            p->strategy->estimate(config->strategy.config, &p->topology, p->model, &p->estimate, err),
                            err), status, done);
  phx__suspect_begin(config->comm.plugin->path, "in buffer_bytes", PHX__SUSPECT_CALL);
  const int64_t comm_buffers = p->comm->buffer_bytes(config->comm.config, size);
  phx__suspect_end(PHX_OK, NULL);
  PHX_TRY_GOTO(phx__plan_check_estimate(p, comm_buffers, err), status, done);
  PHX_TRY_GOTO(phx__optim_check_grain(p, err), status, done);
  PHX_TRY_GOTO(plan_optimizer(p, err), status, done);
  for (int k = 0; k < PHX_MEM_KINDS; k++) p->planned[k] += p->estimate.bytes[k];
  p->planned[PHX_MEM_BUFFER] += comm_buffers;
  plan_activations(p);
  plan_copies(p);
  *out = p;
done:
  if (status) phx__prepared_free(p);
  return status;
}

void phx__prepared_free(phx__prepared *p) {
  if (!p) return;
  phx__layout_free(p->model);
  phx__free(p->layout.stage_owned);
  phx__free(p->layout.unit_owned);
  phx__free(p->boundary);
  phx__free(p->stages);
  phx__free(p);
}
