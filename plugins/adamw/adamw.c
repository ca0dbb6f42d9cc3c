/* plugins/adamw/adamw.c - Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).
 *
 * Two states per element, the moments m and v.  The formula is the device's kernel (phx_ops.adamw); scalars are
 * computed in double and rounded once, so that the bits depend neither on slicing nor on the strategy.  [main] only. */
#include <math.h>
#include <phalanx/error.h>
#include <phalanx/provider.h>
#include <stdlib.h>

typedef struct adamw_config {
  double beta1, beta2, eps;
} adamw_config;

static const phx_option options[] = {
    PHX_REAL(adamw_config, beta1, "0.9", 0, 0.999999, "Decay of the first moment."),
    PHX_REAL(adamw_config, beta2, "0.95", 0, 0.999999, "Decay of the second moment."),
    PHX_REAL(adamw_config, eps, "1e-8", 1e-30, 1, "Added to the root of the second moment."),
};

struct phx_optimizer_self {
  const adamw_config *config;
  const phx_ops *ops;
};

static phx_status adamw_describe(const void *config, phx_optimizer_facts *out, phx_error *err) {
  const phx_optimizer_facts facts = {.struct_size = sizeof facts, .grain = PHX_GRAIN_ELEMENT, .n_states = 2,
                                     .states = {{"m", PHX_F32, PHX_PER_ELEMENT}, {"v", PHX_F32, PHX_PER_ELEMENT}}};
  (void)config, (void)err;
  phx_struct_give(out, &facts);
  return PHX_OK;
}

static phx_status adamw_create(const phx_host *host, const void *config, const phx_model *model,
                               phx_optimizer_self **out, phx_error *err) {
  (void)model;
  phx_optimizer_self *self = malloc(sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the optimizer");
  *self = (phx_optimizer_self){.config = config, .ops = host->extension(host->ctx, PHX_EXT_OPS)};
  *out = self;
  return PHX_OK;
}

static void adamw_destroy(phx_optimizer_self *self) { free(self); }

static phx_status adamw_update(phx_optimizer_self *self, const phx_piece *p, phx_error *err) {
  const adamw_config *c = self->config;
  const float c1 = (float)(1.0 - pow(c->beta1, (double)p->step));
  const float c2 = (float)(1.0 - pow(c->beta2, (double)p->step));
  return self->ops->adamw(self->ops->ctx, p->weight, p->gradient, p->states[0], p->states[1], p->low, p->low_dtype,
                          p->numel, p->scale, (float)p->lr, (float)c->beta1, (float)c->beta2, c1, c2, (float)c->eps,
                          (float)p->decay, p->stream, err);
}

static const phx_optimizer_table table = {
    .struct_size = sizeof table,
    .describe = adamw_describe,
    .create = adamw_create,
    .destroy = adamw_destroy,
    .update = adamw_update,
};

static const char *const extensions[] = {PHX_EXT_OPS, NULL};

const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin,
      .kind = PHX_KIND_OPTIMIZER,
      .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR,
      .id = "adamw",
      .version = "0.1.0",
      .summary = "Adam with decoupled weight decay: two fp32 states per element",
      .vendor = "Phalanx",
      .license = "unspecified",
      .build = __VERSION__,
      .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16,
      .extensions = extensions,
      .options = options,
      .n_options = sizeof options / sizeof *options,
      .option_stride = sizeof *options,
      .config_size = sizeof(adamw_config),
      .table = &table,
  };
  return &plugin;
}
