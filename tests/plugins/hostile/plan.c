/* plan.c - see hostile.h: estimates and layouts that are not true, and memory that goes past the host. */
#include "hostile.h"

static void meddle(phx_estimate *e) {
  const int32_t weights = PHX_MEM_WEIGHT, op = e->calls[PHX_OP_ALL_REDUCE] ? PHX_OP_ALL_REDUCE : PHX_OP_ALL_GATHER;
  if (is(HOSTILE_plan_half)) e->bytes[PHX_MEM_OPTIMIZER] /= 2;
  if (is(HOSTILE_plan_triple)) e->bytes[PHX_MEM_OPTIMIZER] *= 3;
  if (is(HOSTILE_plan_negative)) e->bytes[weights] = -1;
  if (is(HOSTILE_plan_most)) e->bytes[weights] = INT64_MAX;
  if (is(HOSTILE_plan_arena)) e->arena_bytes = -4096;
  if (is(HOSTILE_plan_state)) e->state_bytes = -1;
  if (is(HOSTILE_sent_half)) e->sent[op] /= 2;
  if (is(HOSTILE_sent_negative)) e->sent[op] = -5;
  if (is(HOSTILE_sent_most)) e->sent[op] = INT64_MAX;
  if (is(HOSTILE_sent_uncalled)) e->sent[PHX_OP_ALL_TO_ALL] = 4096;
  if (is(HOSTILE_calls_seven)) e->calls[op] = 7;
  if (is(HOSTILE_plan_kind)) e->bytes[PHX_MEM_KINDS] = 4096;
  if (is(HOSTILE_calls_unknown)) e->calls[PHX_OP_ALL_GATHER_V] = 2;
  if (is(HOSTILE_plan_period)) e->period = 4;
  if (is(HOSTILE_calls_negative)) e->calls[op] = INT64_MIN;
}

static phx_status estimate(const void *config, const phx_topology *topology, const phx_model *model, phx_estimate *out,
                           phx_error *err) {
  const phx_status status = hostile.base->estimate(config, topology, model, out, err);
  if (status == PHX_OK) meddle(out);
  return status;
}

static phx_status layout(const void *config, const phx_topology *topology, const phx_model *model, phx_layout *out,
                         phx_error *err) {
  if (hostile.base->layout) PHX_TRY(hostile.base->layout(config, topology, model, out, err));
  if (is(HOSTILE_layout_rank)) out->data_rank = -1;
  if (is(HOSTILE_layout_size)) out->data_size = INT32_MAX;
  if (is(HOSTILE_layout_slots)) out->activation_slots = 0;
  if (is(HOSTILE_layout_axes)) out->n_axes = 1000;
  if (is(HOSTILE_layout_flag)) out->flags = 1ull << 40;
  if (is(HOSTILE_layout_norm)) out->flags = PHX_LAYOUT_NORM_PER_REPLICA;
  if (is(HOSTILE_layout_differ)) out->flags = PHX_LAYOUT_REPLICAS_DIFFER;
  if (is(HOSTILE_layout_terms)) out->gradient_terms = -3;
  if (is(HOSTILE_called_mean) || is(HOSTILE_is_mean)) out->gradient_terms = 1;
  return PHX_OK;
}

static phx_status create(const phx_host *host, const void *config, const phx_topology *topology,
                         const phx_model *model, phx_strategy **out, phx_error *err) {
  hostile.real = host;
  hostile.model = model;
  hostile.topology = topology;
  hostile_step_open();
  if (is(HOSTILE_hidden_create)) hostile_take_memory((size_t)64 << 20);
  const phx_status status = hostile.base->create(&hostile.host, config, topology, model, out, err);
  if (status == PHX_OK && is(HOSTILE_null_out)) *out = NULL;
  return status;
}

void hostile_plan_calls(phx_strategy_table *t) {
  t->estimate = estimate;
  t->layout = layout;
  t->create = create;
}
