/* See gpt_rig.h.  One thread. */
#include "gpt_rig.h"

#include <math.h>
#include <phalanx/error.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plain_ops.h"
#include "plugin_file.h"

enum { GUARD = 256 };

#define MUST(condition, ...)        \
  do {                              \
    if (!(condition)) {             \
      fprintf(stderr, __VA_ARGS__); \
      fprintf(stderr, "\n");        \
      abort();                      \
    }                               \
  } while (0)

rig_config rig_config_make(const char *settings) {
  phx_error err = {.struct_size = sizeof err};
  rig_config c = {.plugin = fake_host_plugin("phx_model_gpt.so")};
  c.values = calloc(1, c.plugin->config_size);
  c.text = strdup(settings);
  MUST(c.values && c.text, "out of memory");
  MUST(plugin_file_config(c.plugin, c.text, c.values, &err) == PHX_OK, "%s", err.message);
  return c;
}

void rig_config_free(rig_config *config) {
  free(config->text);
  free(config->values);
}

static rig_buffer buffer_make(int64_t bytes) {
  rig_buffer b = {NULL, bytes};
  MUST(bytes % PHX_ALIGN == 0, "%lld bytes are not aligned", (long long)bytes);
  b.base = aligned_alloc(PHX_ALIGN, (size_t)bytes + 2 * GUARD);
  MUST(b.base, "out of memory");
  memset(b.base, 0xa5, (size_t)bytes + 2 * GUARD);
  return b;
}

static void *buffer_data(const rig_buffer *b) { return b->base ? b->base + GUARD : NULL; }

static void buffer_poison(rig_buffer *b) { /* all ones is a NaN */
  if (b->base) memset(b->base + GUARD, 0xff, (size_t)b->bytes);
}

static void buffer_check(const rig_buffer *b, const char *what, uint32_t index) {
  for (int64_t i = 0; b->base && i < GUARD; i++)
    MUST(b->base[i] == 0xa5 && b->base[GUARD + b->bytes + i] == 0xa5, "%s %u: written outside of its %lld bytes", what,
         index, (long long)b->bytes);
}

gpt_rig *gpt_rig_open(const char *settings, int64_t micro, int64_t sequence, const void *(*extension)(const char *)) {
  return gpt_rig_open_as(PHX_F32, settings, micro, sequence, extension);
}

void gpt_rig_round(gpt_rig *r) {
  for (uint32_t i = 0; i < r->model.n_params; i++) {
    const phx_device *d = &plain_device;
    float *w = gpt_rig_weight(r, i);
    MUST(!d->cast(NULL, buffer_data(&r->low[i]), PHX_BF16, w, PHX_F32, r->params[i].numel, NULL, NULL), "no cast");
    MUST(!d->cast(NULL, w, PHX_F32, buffer_data(&r->low[i]), PHX_BF16, r->params[i].numel, NULL, NULL), "no cast");
  }
}

gpt_rig *gpt_rig_open_as(int32_t dtype, const char *settings, int64_t micro, int64_t sequence,
                         const void *(*extension)(const char *)) {
  gpt_rig *r = calloc(1, sizeof *r);
  MUST(r, "out of memory");
  phx_error err = {.struct_size = sizeof err};
  r->config = rig_config_make(settings);
  r->table = r->config.plugin->table;
  r->shape = (phx_batch_shape){sizeof r->shape, micro, sequence, dtype, 0};
  fake_host_init(&r->host, 0, 1);
  r->host.extension = extension;
  r->model.struct_size = sizeof r->model;
  r->facts.struct_size = sizeof r->facts;
  MUST(!r->table->declare(r->config.values, &r->model, &r->facts, &r->shape, &err), "declare: %s", err.message);
  r->params = calloc(r->model.n_params, sizeof *r->params);
  r->weights = calloc(r->model.n_params, sizeof *r->weights);
  r->gradients = calloc(r->model.n_params, sizeof *r->gradients);
  r->low = calloc(r->model.n_params, sizeof *r->low);
  r->outputs = calloc(r->model.n_stages, sizeof *r->outputs);
  r->d_outputs = calloc(r->model.n_stages, sizeof *r->d_outputs);
  r->saved = calloc(r->model.n_stages, sizeof *r->saved);
  MUST(r->params && r->weights && r->low && r->gradients && r->outputs && r->d_outputs && r->saved, "out of memory");
  for (uint32_t i = 0; i < r->model.n_params; i++) {
    phx_param *p = &r->params[i];
    *p = *phx_model_param(&r->model, i);
    p->numel = p->shape[0] * p->shape[1] * p->shape[2] * p->shape[3];
    const int64_t bytes = phx_align_bytes(p->numel * (int64_t)sizeof(float));
    r->weights[i] = buffer_make(bytes);
    if (dtype == PHX_BF16) r->low[i] = buffer_make(phx_align_bytes(p->numel * 2));
    if (!(p->flags & PHX_PARAM_FROZEN)) r->gradients[i] = buffer_make(bytes);
    for (int64_t k = 0; k < p->numel; k++) gpt_rig_weight(r, i)[k] = (float)rig_value(i, k, p->name);
  }
  if (dtype == PHX_BF16) gpt_rig_round(r);
  int64_t workspace = 0;
  for (uint32_t i = 0; i < r->model.n_stages; i++) {
    phx_stage_memory m = {.struct_size = sizeof m};
    MUST(!r->table->stage_memory(r->config.values, &r->shape, i, &m, &err), "stage_memory: %s", err.message);
    if (m.output) r->outputs[i] = buffer_make(m.output), r->d_outputs[i] = buffer_make(m.output);
    if (m.saved) r->saved[i] = buffer_make(m.saved);
    if (m.workspace > workspace) workspace = m.workspace;
  }
  r->workspace = buffer_make(workspace);
  MUST(!r->table->create(&r->host.host, r->config.values, &r->model, &r->shape, &r->self, &err), "create: %s",
       err.message);
  return r;
}

void gpt_rig_close(gpt_rig *r) {
  r->table->destroy(r->self);
  MUST(r->host.allocs == r->host.frees, "%lld allocations, %lld releases", (long long)r->host.allocs,
       (long long)r->host.frees);
  for (uint32_t i = 0; i < r->model.n_params; i++)
    free(r->weights[i].base), free(r->low[i].base), free(r->gradients[i].base);
  for (uint32_t i = 0; i < r->model.n_stages; i++)
    free(r->outputs[i].base), free(r->d_outputs[i].base), free(r->saved[i].base);
  free(r->workspace.base);
  free(r->saved), free(r->d_outputs), free(r->outputs), free(r->gradients), free(r->low), free(r->weights),
      free(r->params);
  rig_config_free(&r->config);
  free(r);
}

float *gpt_rig_weight(gpt_rig *r, uint32_t param) { return buffer_data(&r->weights[param]); }
float *gpt_rig_gradient(gpt_rig *r, uint32_t param) { return buffer_data(&r->gradients[param]); }

static void check_all(gpt_rig *r) {
  for (uint32_t i = 0; i < r->model.n_params; i++) {
    buffer_check(&r->weights[i], "weight", i);
    buffer_check(&r->low[i], "bf16 weight", i);
    buffer_check(&r->gradients[i], "gradient", i);
  }
  for (uint32_t i = 0; i < r->model.n_stages; i++) {
    buffer_check(&r->outputs[i], "output", i);
    buffer_check(&r->d_outputs[i], "d_output", i);
    buffer_check(&r->saved[i], "saved", i);
  }
  buffer_check(&r->workspace, "workspace", 0);
}

/* The stage's view for a pass.  written[unit]: a gradient of this unit was written in this step. */
static uint32_t make_view(gpt_rig *r, uint32_t stage, int32_t pass, const int *written, phx_param_view *out) {
  const phx_stage *s = phx_model_stage(&r->model, stage);
  uint32_t n = 0;
  for (uint32_t u = 0; u < s->n_uses; u++) {
    const phx_use *use = phx_model_use(&r->model, s->first_use + u);
    const phx_unit *unit = phx_model_unit(&r->model, use->unit);
    const uint32_t reads = pass == PHX_PASS_BACKWARD ? PHX_USE_BACKWARD : PHX_USE_FORWARD;
    for (uint32_t i = 0; i < unit->n_params; i++) {
      const uint32_t p = unit->first_param + i;
      const int32_t dtype = r->shape.compute_dtype;
      phx_param_view v = {.weight_dtype = dtype, .gradient_dtype = PHX_F32, .param = p};
      if (use->flags & reads) v.weight = dtype == PHX_BF16 ? buffer_data(&r->low[p]) : gpt_rig_weight(r, p);
      if (pass == PHX_PASS_BACKWARD && use->flags & PHX_USE_GRADIENT) v.gradient = gpt_rig_gradient(r, p);
      if (v.gradient) v.gradient_mode = written[use->unit] ? PHX_GRAD_ADD : PHX_GRAD_WRITE;
      out[n++] = v;
    }
  }
  return n;
}

static int untouched(const unsigned char *piece) {
  for (int i = 0; i < PHX_ALIGN; i++)
    if (piece[i] != 0xff) return 0;
  return 1;
}

int64_t gpt_rig_unused_saved(const gpt_rig *r, uint32_t stage) {
  const rig_buffer *b = &r->saved[stage];
  int64_t n = 0;
  for (int64_t at = 0; b->base && at < b->bytes; at += PHX_ALIGN) n += untouched(b->base + GUARD + at);
  return n;
}

static phx_status run_stage(gpt_rig *r, phx_stage_call *call, const int *written, phx_error *err) {
  phx_param_view params[16];
  phx_view view = {.struct_size = sizeof view, .params = params, .param_stride = sizeof *params};
  view.n_params = make_view(r, call->stage, call->pass, written, params);
  call->struct_size = sizeof *call;
  call->view = &view;
  call->workspace = buffer_data(&r->workspace);
  call->saved = buffer_data(&r->saved[call->stage]);
  buffer_poison(&r->workspace);
  const phx_status status = call->pass == PHX_PASS_BACKWARD ? r->table->backward(r->self, call, err)
                                                            : r->table->forward(r->self, call, err);
  check_all(r);
  for (int64_t at = r->workspace.bytes; at > r->workspace_used; at -= PHX_ALIGN)
    if (!untouched(r->workspace.base + GUARD + at - PHX_ALIGN)) r->workspace_used = at;
  return status;
}

static int skipped(const gpt_rig *r, const int *runs, uint32_t stage) {
  return runs && stage > 0 && stage + 1 < r->model.n_stages && !runs[stage - 1];
}

phx_status gpt_rig_step(gpt_rig *r, const int32_t *tokens, const int32_t *targets, int64_t batch, int64_t sequence,
                        int first, const int *runs, double *loss, phx_error *err) {
  const uint32_t last = r->model.n_stages - 1;
  const void *inputs[64] = {NULL};
  int written[64] = {0};
  MUST(last < 63, "the rig holds 64 stages");
  const phx_stage_call base = {.tokens = tokens, .targets = targets, .batch = batch, .sequence = sequence};
  for (uint32_t i = 0; i <= last; i++) {
    buffer_poison(&r->outputs[i]), buffer_poison(&r->d_outputs[i]), buffer_poison(&r->saved[i]);
    inputs[i + 1] = buffer_data(&r->outputs[i]);
    if (skipped(r, runs, i)) {
      inputs[i + 1] = inputs[i];
      continue;
    }
    phx_stage_call call = base;
    call.stage = i, call.pass = PHX_PASS_FORWARD, call.input = inputs[i], call.output = buffer_data(&r->outputs[i]);
    call.loss = i == last ? loss : NULL;
    PHX_TRY(run_stage(r, &call, written, err));
  }
  for (uint32_t p = 0; first && p < r->model.n_params; p++) buffer_poison(&r->gradients[p]);
  for (uint32_t u = 0; !first && u < r->model.n_units; u++) written[u] = 1;
  const void *d = NULL;
  for (uint32_t i = last + 1; i-- > 0;) {
    const phx_stage *s = phx_model_stage(&r->model, i);
    if (!skipped(r, runs, i)) {
      phx_stage_call call = base;
      call.stage = i, call.pass = PHX_PASS_BACKWARD, call.input = inputs[i], call.d_output = d;
      call.d_input = i ? buffer_data(&r->d_outputs[i - 1]) : NULL;
      PHX_TRY(run_stage(r, &call, written, err));
      d = call.d_input;
    }
    for (uint32_t u = 0; u < s->n_uses; u++) {
      const uint32_t unit = phx_model_use(&r->model, s->first_use + u)->unit;
      const phx_unit *un = phx_model_unit(&r->model, unit);
      for (uint32_t p = un->first_param; skipped(r, runs, i) && !written[unit] && p < un->first_param + un->n_params;
           p++)
        if (r->gradients[p].base) memset(buffer_data(&r->gradients[p]), 0, (size_t)r->gradients[p].bytes);
      written[unit] = 1;
    }
  }
  return PHX_OK;
}

phx_status gpt_rig_evaluate(gpt_rig *r, const int32_t *tokens, const int32_t *targets, int64_t batch, int64_t sequence,
                            double *loss, float *logits, phx_error *err) {
  const uint32_t last = r->model.n_stages - 1;
  const void *input = NULL;
  for (uint32_t i = 0; i <= last; i++) {
    phx_stage_call call = {.stage = i, .pass = PHX_PASS_EVALUATE, .input = input, .tokens = tokens, .targets = targets,
                           .batch = batch, .sequence = sequence, .output = buffer_data(&r->outputs[i])};
    if (i == last) call.loss = loss, call.logits = logits;
    buffer_poison(&r->saved[i]);
    PHX_TRY(run_stage(r, &call, NULL, err));
    input = call.output;
  }
  return PHX_OK;
}

/* A fraction in [-1, 1) from a linear congruence in 31 bits: exact in every language. */
static double fraction(int64_t seed, int64_t i) {
  int64_t x = (seed * 7919 + i * 104729 + 12345) % 2147483647;
  x = x * 16807 % 2147483647;
  x = x * 48271 % 2147483647;
  return (double)(x % 65536) / 32768 - 1;
}

double rig_value(int64_t param, int64_t i, const char *name) {
  const double f = fraction(param + 1, i);
  if (strstr(name, "ln_") && strstr(name, ".weight")) return 1 + 0.25 * f;
  if (strstr(name, ".bias")) return 0.25 * f;
  if (strstr(name, "wte") || strstr(name, "wpe")) return 0.5 * f;
  return 0.375 * f;
}

int32_t rig_token(int64_t i, int64_t vocab) { return (int32_t)((i * 7919 + i * i % 101 * 31 + 5) % vocab); }
