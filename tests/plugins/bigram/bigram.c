/* bigram.c - a model that is no GPT-2: the next token from this one and its place, by one product.
 *
 * Two units and two stages, in fp32.  One name ends as a matrix of GPT-2 does that other tools store the other way
 * round: what is done to GPT-2's files must not be done to this one's. */
#include <phalanx/provider.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

enum { VOCABULARY = 257, ROW = 320 /* of logits */, CONTEXT = 64 };
enum { EMBEDDING, HEAD, STAGES };
enum { TOKENS, PLACES, HEAD_WEIGHT = 0, HEAD_BIAS };

typedef struct bigram_config {
  int64_t width;
} bigram_config;
static const phx_option options[] = {PHX_INT(bigram_config, width, "16", 1, 1024, NULL, 0, "Channels.")};

struct phx_model_self {
  const phx_ops *ops;
  const phx_device *device;
  phx_batch_shape shape;
  int64_t width;
};

static phx_status fail(phx_error *err, phx_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static phx_status fail(phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  if (err) vsnprintf(err->message, sizeof err->message, format, args);
  va_end(args);
  if (err) err->code = code;
  return code;
}

static phx_param params[] = {
    {.name = "tokens.weight", .ndim = 2, .unit = 0, .init = PHX_INIT_NORMAL, .init_std = 0.1},
    {.name = "places.weight", .ndim = 2, .unit = 0, .init = PHX_INIT_NORMAL, .init_std = 0.1},
    {.name = "head.attn.c_proj.weight", .ndim = 2, .unit = 1, .init = PHX_INIT_NORMAL, .init_std = 0.1},
    {.name = "head.bias", .ndim = 1, .unit = 1, .init = PHX_INIT_ZERO},
};
static const phx_unit units[] = {{.name = "embedding", .first_param = 0, .n_params = 2},
                                 {.name = "head", .first_param = 2, .n_params = 2}};
static const phx_use uses[] = {{0, PHX_USE_FORWARD | PHX_USE_GRADIENT},
                               {1, PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT}};
static const phx_stage stages[] = {{.name = "embed", .first_use = 0, .n_uses = 1},
                                   {.name = "head", .first_use = 1, .n_uses = 1}};

static phx_status bigram_declare(const void *config, phx_model *out, phx_model_facts *facts,
                                 const phx_batch_shape *shape, phx_error *err) {
  const int64_t c = ((const bigram_config *)config)->width;
  const int64_t shapes[][2] = {{VOCABULARY, c}, {CONTEXT, c}, {VOCABULARY, c}, {VOCABULARY, 1}};
  if (shape && shape->sequence > CONTEXT)
    return fail(err, PHX_INVALID, "[batch] sequence = %lld, and bigram has %d places", (long long)shape->sequence,
                CONTEXT);
  for (int i = 0; i < 4; i++) {
    for (int d = 0; d < PHX_PARAM_DIMS; d++) params[i].shape[d] = d < 2 ? shapes[i][d] : 1;
    params[i].flags = params[i].ndim == 2 ? PHX_PARAM_DECAY : 0;
  }
  const phx_model model = {.struct_size = sizeof model, .params = params, .units = units, .stages = stages,
                           .uses = uses, .n_params = 4, .n_units = 2, .n_stages = STAGES, .n_uses = 2,
                           .param_stride = sizeof *params, .unit_stride = sizeof *units,
                           .stage_stride = sizeof *stages, .use_stride = sizeof *uses};
  const phx_model_facts known = {.struct_size = sizeof known, .vocabulary = VOCABULARY, .context = CONTEXT,
                                 .flops_per_token = 6.0 * VOCABULARY * (double)c, .computes = "bigram"};
  phx_struct_give(out, &model);
  phx_struct_give(facts, &known);
  return PHX_OK;
}

/* The head keeps its logits; losses are scratch. */
static phx_status bigram_stage_memory(const void *config, const phx_batch_shape *shape, uint32_t stage,
                                      phx_stage_memory *out, phx_error *err) {
  const int64_t n = shape->micro * shape->sequence, c = ((const bigram_config *)config)->width;
  phx_stage_memory m = {.struct_size = sizeof m};
  if (shape->compute_dtype && shape->compute_dtype != PHX_F32)
    return fail(err, PHX_UNSUPPORTED, "bigram computes in fp32: set [precision] compute = fp32");
  if (stage == EMBEDDING) m.output = phx_align_bytes(n * c * 4);
  if (stage == HEAD) m.saved = phx_align_bytes(n * ROW * 4);
  if (stage == HEAD) m.workspace = phx_align_bytes(n * 4);
  phx_struct_give(out, &m);
  return PHX_OK;
}

static phx_status bigram_create(const phx_host *host, const void *config, const phx_model *model,
                                const phx_batch_shape *shape, phx_model_self **out, phx_error *err) {
  (void)model;
  phx_model_self *self = calloc(1, sizeof *self);
  if (!self) return fail(err, PHX_NOMEM, "no memory for bigram");
  self->ops = host->extension(host->ctx, PHX_EXT_OPS);
  self->device = host->extension(host->ctx, PHX_EXT_DEVICE);
  self->shape = *shape;
  self->width = ((const bigram_config *)config)->width;
  *out = self;
  return PHX_OK;
}
static void bigram_destroy(phx_model_self *self) { free(self); }

static const void *weight(const phx_stage_call *call, uint32_t i) { return phx_view_param(call->view, i)->weight; }

/* Of the last position of each sequence. */
static phx_status last_logits(const phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const int64_t bytes = VOCABULARY * (int64_t)sizeof(float);
  phx_status status = PHX_OK;
  for (int64_t i = 0; i < call->batch && !status; i++) {
    const float *from = (const float *)call->saved + ((i + 1) * call->sequence - 1) * ROW;
    status = self->device->copy(self->device->ctx, call->logits + i * VOCABULARY, from, bytes, call->stream, err);
  }
  return status;
}

static phx_status bigram_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  const int64_t n = call->batch * call->sequence;
  const bool evaluate = call->pass == PHX_PASS_EVALUATE;
  if (call->stage == EMBEDDING)
    return o->embedding(o->ctx, PHX_F32, call->output, call->tokens, weight(call, TOKENS), weight(call, PLACES),
                        call->batch, call->sequence, self->width, call->stream, err);
  phx_status status = o->linear(o->ctx, PHX_F32, call->saved, ROW, NULL, call->input, weight(call, HEAD_WEIGHT),
                                weight(call, HEAD_BIAS), n, self->width, VOCABULARY, 0, call->stream, err);
  if (!status && evaluate && call->logits) status = last_logits(self, call, err);
  if (status || !call->targets) return status;
  status = o->cross_entropy(o->ctx, PHX_F32, call->saved, call->workspace, call->targets, n, VOCABULARY, ROW,
                            !evaluate, (float)(1.0 / (double)n), call->stream, err);
  if (status || !call->loss) return status;
  return o->mean(o->ctx, call->loss, call->workspace, n, call->stream, err);
}

static phx_status bigram_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  const phx_ops *o = self->ops;
  const int64_t n = call->batch * call->sequence, c = self->width;
  const phx_param_view *a = phx_view_param(call->view, 0), *b = phx_view_param(call->view, 1);
  if (call->stage == EMBEDDING)
    return o->embedding_backward(o->ctx, PHX_F32, a->gradient, a->gradient_mode, b->gradient, b->gradient_mode,
                                 call->d_output, call->tokens, call->batch, call->sequence, c, VOCABULARY, CONTEXT,
                                 call->stream, err);
  const phx_status status =
      o->linear_backward_weight(o->ctx, PHX_F32, a->gradient, b->gradient, call->saved, ROW, call->input, n, c,
                                VOCABULARY, a->gradient_mode, b->gradient_mode, call->stream, err);
  if (status) return status;
  return o->linear_backward_input(o->ctx, PHX_F32, call->d_input, call->saved, ROW, a->weight, NULL, n, c, VOCABULARY,
                                  PHX_GRAD_WRITE, call->stream, err);
}

static const char *const extensions[] = {PHX_EXT_OPS, PHX_EXT_DEVICE, NULL};
static const phx_model_table table = {.struct_size = sizeof table, .declare = bigram_declare,
                                      .stage_memory = bigram_stage_memory, .create = bigram_create,
                                      .destroy = bigram_destroy, .forward = bigram_forward,
                                      .backward = bigram_backward};
static const phx_plugin plugin = {
    .struct_size = sizeof plugin, .kind = PHX_KIND_MODEL, .table_major = PHX_ABI_MAJOR, .table_minor = PHX_ABI_MINOR,
    .id = "bigram", .version = "1.0", .vendor = "Phalanx tests", .license = "see LICENSE",
    .summary = "Test only: a model that is no GPT-2.", .build = __VERSION__, .provides = PHX_CAP_DETERMINISTIC,
    .extensions = extensions, .options = options, .n_options = 1, .option_stride = sizeof options[0],
    .config_size = sizeof(bigram_config), .table = &table,
};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
