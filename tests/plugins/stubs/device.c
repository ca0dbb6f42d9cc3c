/* A device that can be probed. */
#include "../stub.h"

#ifdef STUB_DEVICES
#define STUB_PROVIDES 0
#else
#define STUB_PROVIDES PHX_CAP_DETERMINISTIC /* as the cpu device; a GPU's does not promise it unasked */
#endif

#ifdef STUB_ABSENT
static phx_status probe(phx_error *err) { return stub_refuse(err); }
#else
static phx_status probe(phx_error *err) {
  (void)err;
  return PHX_OK;
}
#endif
static phx_status create(const phx_host *host, const void *config, int32_t threads, phx_device_self **out,
                         phx_error *err) {
  (void)host, (void)config, (void)threads, (void)out;
  return stub_refuse(err);
}
static void destroy(phx_device_self *self) { (void)self; }
static const phx_device *device(phx_device_self *self) {
  (void)self;
  return NULL;
}
static const phx_ops *ops(phx_device_self *self) {
  (void)self;
  return NULL;
}
static phx_status take(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err) {
  (void)self, (void)space, (void)bytes, (void)out;
  return stub_refuse(err);
}
static void give(phx_device_self *self, int32_t space, void *p, int64_t bytes) {
  (void)self, (void)space, (void)p, (void)bytes;
}

#ifdef STUB_DEVICES
typedef struct settings {
  int32_t share;
} settings;
static const phx_option options[] = {PHX_BOOL(settings, share, "no", "Ranks may share a device.")};
static int32_t stub_count(void) { return STUB_DEVICES; }
static int32_t stub_shared(const void *config) { return ((const settings *)config)->share; }
#define STUB_COUNT .count = stub_count, .shared = stub_shared
#define STUB_OPTIONS \
  .options = options, .n_options = 1, .option_stride = sizeof *options, .config_size = sizeof(settings)
#else
#define STUB_COUNT .count = NULL
#define STUB_OPTIONS .options = NULL
#endif

static const phx_device_table table = {.struct_size = sizeof table, .probe = probe, .create = create,
                                       .destroy = destroy, .device = device, .ops = ops, .alloc = take, .free = give,
                                       STUB_COUNT};
static const phx_plugin plugin = {STUB_DESCRIPTOR(PHX_KIND_DEVICE), .id = STUB_ID,
                                  .provides = STUB_PROVIDES, STUB_OPTIONS, .table = &table};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
