/* tests/plugins/frobenius - an optimizer that needs whole tensors: proof that such need no change of a table.
 *
 * The gradient of a matrix is divided by its Frobenius norm, each part of a packed matrix by its own, and goes into a
 * momentum; everything else is plain SGD.  The gradients are scaled in a workspace, which is part of the plan.  It
 * computes on the CPU, in the stream's order.  [main] only. */
#include <math.h>
#include <phalanx/device.h>
#include <phalanx/error.h>
#include <phalanx/provider.h>
#include <stdlib.h>

typedef struct frobenius_config {
  double momentum;
} frobenius_config;

static const phx_option options[] = {
    PHX_REAL(frobenius_config, momentum, "0.9", 0, 0.999999, "Decay of the momentum of matrices."),
};

struct phx_optimizer_self {
  const phx_host *host;
  const phx_device *device;
  const phx_model *model;
  const frobenius_config *config;
  float *scaled; /* of the largest matrix */
};

static phx_status describe(const void *config, phx_optimizer_facts *out, phx_error *err) {
  const phx_optimizer_facts facts = {.struct_size = sizeof facts, .grain = PHX_GRAIN_TENSOR, .n_states = 1,
                                     .states = {{"momentum", PHX_F32, PHX_PER_ELEMENT}}};
  (void)config, (void)err;
  phx_struct_give(out, &facts);
  return PHX_OK;
}

static int64_t workspace(const void *config, const phx_model *model) {
  int64_t most = 1;
  (void)config;
  for (uint32_t i = 0; i < model->n_params; i++) {
    const phx_param *p = phx_model_param(model, i);
    if (p->role == PHX_ROLE_MATRIX && p->numel > most) most = p->numel;
  }
  return phx_align_bytes(most * (int64_t)sizeof(float));
}

static void destroy(phx_optimizer_self *self) {
  if (self->scaled) self->host->release(self->host->ctx, self->scaled);
  free(self);
}

static phx_status create(const phx_host *host, const void *config, const phx_model *model, phx_optimizer_self **out,
                         phx_error *err) {
  void *scaled = NULL;
  const phx_memory what = {.struct_size = sizeof what, .bytes = workspace(config, model), .kind = PHX_MEM_WORKSPACE,
                           .space = PHX_SPACE_DEVICE};
  phx_optimizer_self *self = malloc(sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the optimizer");
  *self = (phx_optimizer_self){.host = host, .device = host->extension(host->ctx, PHX_EXT_DEVICE), .model = model,
                               .config = config};
  const phx_status status = host->alloc(host->ctx, &what, &scaled, err);
  if (status) {
    destroy(self);
    return status;
  }
  self->scaled = scaled;
  *out = self;
  return PHX_OK;
}

typedef struct work { /* of one update, in the stream's order */
  phx_optimizer_self *self;
  const phx_piece *piece;
  const phx_param *param;
} work;

static void plain_sgd(const phx_piece *p) {
  for (int64_t i = 0; i < p->numel; i++)
    p->weight[i] -= (float)p->lr * (p->gradient[i] * p->scale + (float)p->decay * p->weight[i]);
}

/* One part of a packed matrix: rows [row, row + rows), columns [column, column + columns). */
static void part(const work *w, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const phx_piece *p = w->piece;
  const int64_t stride = phx_param_row(w->param);
  float *momentum = p->states[0], *scaled = w->self->scaled;
  double sum = 0;
  for (int64_t i = 0; i < rows * columns; i++) {
    const int64_t at = (row + i / columns) * stride + column + i % columns;
    scaled[at] = p->gradient[at] * p->scale;
    sum += (double)scaled[at] * (double)scaled[at];
  }
  w->self->host->metric(w->self->host->ctx, "norm", sqrt(sum)); /* the last one of a step is kept */
  const float norm = (float)(sqrt(sum) + 1e-30), mu = (float)w->self->config->momentum;
  for (int64_t i = 0; i < rows * columns; i++) {
    const int64_t at = (row + i / columns) * stride + column + i % columns;
    momentum[at] = mu * momentum[at] + scaled[at] / norm;
    p->weight[at] -= (float)p->lr * (momentum[at] + (float)p->decay * p->weight[at]);
  }
}

static phx_status run(void *arg, phx_error *err) {
  const work *w = arg;
  const phx_param *p = w->param;
  (void)err;
  if (p->role != PHX_ROLE_MATRIX) {
    plain_sgd(w->piece);
    return PHX_OK;
  }
  const int64_t down = p->row_parts ? p->row_parts : 1, across = p->column_parts ? p->column_parts : 1;
  const int64_t rows = p->shape[0] / down, columns = phx_param_row(p) / across;
  for (int64_t i = 0; i < down * across; i++) part(w, i / across * rows, rows, i % across * columns, columns);
  return PHX_OK;
}

static phx_status update(phx_optimizer_self *self, const phx_piece *piece, phx_error *err) {
  const phx_device *d = self->device;
  work w = {.self = self, .piece = piece, .param = phx_model_param(self->model, piece->param)};
  if (piece->first != 0 || piece->numel != w.param->numel)
    return phx_fail(err, PHX_INTERNAL, "%lld elements from %lld on of %s: not whole", (long long)piece->numel,
                    (long long)piece->first, w.param->name);
  PHX_TRY(d->enqueue(d->ctx, piece->stream, run, &w, err));
  return d->stream_synchronize(d->ctx, piece->stream, err); /* the piece is borrowed */
}

static const phx_optimizer_table table = {.struct_size = sizeof table, .describe = describe, .workspace = workspace,
                                          .create = create, .destroy = destroy, .update = update};
static const char *const extensions[] = {PHX_EXT_DEVICE, NULL};

const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin,
      .kind = PHX_KIND_OPTIMIZER,
      .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR,
      .id = "frobenius",
      .version = "1.0",
      .summary = "For tests: gradients of whole matrices divided by their Frobenius norm, with momentum",
      .vendor = "phalanx",
      .license = "unspecified",
      .build = "test",
      .provides = PHX_CAP_DETERMINISTIC,
      .needs = PHX_NEED_HOST_MEMORY,
      .extensions = extensions,
      .options = options,
      .n_options = sizeof options / sizeof *options,
      .option_stride = sizeof *options,
      .config_size = sizeof(frobenius_config),
      .table = &table,
  };
  return &plugin;
}
