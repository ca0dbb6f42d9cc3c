/* An optimizer with options that stand in [optimizer]. */
#include "../stub.h"

typedef struct settings {
  double beta1, beta2, eps;
} settings;
static const phx_option options[] = {
#ifdef STUB_BETAS
    PHX_REAL(settings, beta1, "0.9", 0, 0.999999, "A decay."),
    PHX_REAL(settings, beta2, "0.95", 0, 0.999999, "Another decay."),
#endif
    PHX_REAL(settings, eps, "1e-8", 1e-30, 1, "A small number."),
};

static phx_status describe(const void *config, phx_optimizer_facts *out, phx_error *err) {
  (void)config, (void)out;
  return stub_refuse(err);
}
static phx_status create(const phx_host *host, const void *config, const phx_model *model, phx_optimizer_self **out,
                         phx_error *err) {
  (void)host, (void)config, (void)model, (void)out;
  return stub_refuse(err);
}
static void destroy(phx_optimizer_self *self) { (void)self; }
static phx_status update(phx_optimizer_self *self, const phx_piece *piece, phx_error *err) {
  (void)self, (void)piece;
  return stub_refuse(err);
}

static const phx_optimizer_table table = {.struct_size = sizeof table, .describe = describe, .create = create,
                                          .destroy = destroy, .update = update};
static const phx_plugin plugin = {STUB_DESCRIPTOR(PHX_KIND_OPTIMIZER), .id = STUB_ID,
                                  .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16, .options = options,
                                  .n_options = sizeof options / sizeof *options,
                                  .option_stride = sizeof *options, .config_size = sizeof(settings),
                                  .table = &table};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
