/* A model with options that stand in [model]. */
#include "../stub.h"

typedef struct settings {
  int64_t layers;
  const char *size;
} settings;
static const phx_option options[] = {
    PHX_INT(settings, layers, "auto", 1, 1000, NULL, PHX_OPTF_AUTO, "Blocks; auto is what size says."),
    PHX_STRING(settings, size, "tiny", 0, "A preset."),
};

static phx_status declare(const void *config, phx_model *out, phx_model_facts *facts, const phx_batch_shape *shape,
                          phx_error *err) {
  (void)config, (void)out, (void)facts, (void)shape;
  return stub_refuse(err);
}
static phx_status stage_memory(const void *config, const phx_batch_shape *shape, uint32_t stage,
                               phx_stage_memory *out, phx_error *err) {
  (void)config, (void)shape, (void)stage, (void)out;
  return stub_refuse(err);
}
static phx_status create(const phx_host *host, const void *config, const phx_model *model,
                         const phx_batch_shape *shape, phx_model_self **out, phx_error *err) {
  (void)host, (void)config, (void)model, (void)shape, (void)out;
  return stub_refuse(err);
}
static void destroy(phx_model_self *self) { (void)self; }
static phx_status run(phx_model_self *self, const phx_stage_call *call, phx_error *err) {
  (void)self, (void)call;
  return stub_refuse(err);
}

static const phx_model_table table = {.struct_size = sizeof table, .declare = declare, .stage_memory = stage_memory,
                                      .create = create, .destroy = destroy, .forward = run, .backward = run};
static const phx_plugin plugin = {STUB_DESCRIPTOR(PHX_KIND_MODEL), .id = STUB_ID, .options = options, .n_options = 2,
                                  .option_stride = sizeof options[0], .config_size = sizeof(settings),
                                  .table = &table};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
