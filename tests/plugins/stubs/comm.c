/* A communicator with one option. */
#include "../stub.h"

typedef struct settings {
  int64_t spin;
} settings;
static const phx_option options[] = {
    PHX_INT(settings, spin, "100", 0, 10000, "us", 0, "Time to spin before sleeping.")};

static phx_status probe(phx_error *err) {
  (void)err;
  return PHX_OK;
}
static int64_t payload(const void *config, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                       int32_t root) {
  (void)config, (void)op, (void)numel, (void)dtype, (void)rank, (void)size, (void)root;
  return 0;
}
static int64_t buffer_bytes(const void *config, int32_t size) {
  (void)config, (void)size;
  return 0;
}
static phx_status create(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out,
                         phx_error *err) {
  (void)host, (void)config, (void)arena_bytes, (void)out;
  return stub_refuse(err);
}
static void destroy(phx_comm *world) { (void)world; }
static void *arena(phx_comm *world) {
  (void)world;
  return NULL;
}

static const phx_comm_table table = {.struct_size = sizeof table, .probe = probe, .payload = payload,
                                     .buffer_bytes = buffer_bytes, .create = create, .destroy = destroy,
                                     .arena = arena};
#ifdef STUB_FOR_DEVICE
#define STUB_NEEDS .needs = PHX_NEED_OWN_DEVICE, .device = STUB_FOR_DEVICE
#else
#define STUB_NEEDS .needs = 0
#endif
static const phx_plugin plugin = {STUB_DESCRIPTOR(PHX_KIND_COMM), STUB_NEEDS, .id = STUB_ID,
                                  .options = options, .n_options = 1,
                                  .option_stride = sizeof options[0], .config_size = sizeof(settings),
                                  .table = &table};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
