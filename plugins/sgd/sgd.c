/* plugins/sgd/sgd.c - stochastic gradient descent with decoupled weight decay, without states.
 *
 * The formula is the device's kernel (phx_ops.sgd).  It is the smallest optimizer there is: a pattern for others.
 * [main] only. */
#include <phalanx/error.h>
#include <phalanx/provider.h>
#include <stdlib.h>

struct phx_optimizer_self {
  const phx_ops *ops;
};

static phx_status sgd_describe(const void *config, phx_optimizer_facts *out, phx_error *err) {
  const phx_optimizer_facts facts = {.struct_size = sizeof facts, .grain = PHX_GRAIN_ELEMENT};
  (void)config, (void)err;
  phx_struct_give(out, &facts);
  return PHX_OK;
}

static phx_status sgd_create(const phx_host *host, const void *config, const phx_model *model,
                             phx_optimizer_self **out, phx_error *err) {
  (void)config, (void)model;
  phx_optimizer_self *self = malloc(sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "no memory for the optimizer");
  *self = (phx_optimizer_self){.ops = host->extension(host->ctx, PHX_EXT_OPS)};
  *out = self;
  return PHX_OK;
}

static void sgd_destroy(phx_optimizer_self *self) { free(self); }

static phx_status sgd_update(phx_optimizer_self *self, const phx_piece *p, phx_error *err) {
  return self->ops->sgd(self->ops->ctx, p->weight, p->gradient, p->low, p->low_dtype, p->numel, p->scale, (float)p->lr,
                        (float)p->decay, p->stream, err);
}

static const phx_optimizer_table table = {
    .struct_size = sizeof table,
    .describe = sgd_describe,
    .create = sgd_create,
    .destroy = sgd_destroy,
    .update = sgd_update,
};

static const char *const extensions[] = {PHX_EXT_OPS, NULL};

const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin,
      .kind = PHX_KIND_OPTIMIZER,
      .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR,
      .id = "sgd",
      .version = "0.1.0",
      .summary = "Stochastic gradient descent with decoupled weight decay: no states",
      .vendor = "Phalanx",
      .license = "unspecified",
      .build = __VERSION__,
      .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16,
      .extensions = extensions,
      .table = &table,
  };
  return &plugin;
}
