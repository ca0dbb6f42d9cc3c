/* far.c - the plugin "far": test only; see far.h.  The cpu device does the work, and is loaded from the build's folder.
 */
#include "far.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void far_die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fputs("far: ", stderr);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  va_end(args);
  abort();
}

static phx_status load_cpu(const phx_device_table **out, phx_error *err) {
  void *library = dlopen(FAR_CPU_PLUGIN, RTLD_NOW | RTLD_LOCAL);
  void *symbol = library ? dlsym(library, PHX_ENTRY_SYMBOL) : NULL;
  phx_plugin_entry *entry;
  if (!symbol) return phx_fail(err, PHX_UNSUPPORTED, "far needs the cpu device: %s", dlerror());
  memcpy(&entry, &symbol, sizeof entry);
  *out = entry()->table;
  return PHX_OK;
}

static phx_status probe(phx_error *err) {
  const phx_device_table *cpu;
  return load_cpu(&cpu, err);
}

static void destroy(phx_device_self *self) {
  if (!self) return;
  far_stream_end(self->null);
  far_check_leaks(self);
  if (self->cpu_self) self->cpu->destroy(self->cpu_self);
  pthread_mutex_destroy(&self->compute);
  pthread_mutex_destroy(&self->lock);
  pthread_cond_destroy(&self->done);
  free(self);
}

static phx_status create(const phx_host *host, const void *config, int32_t threads, phx_device_self **out,
                         phx_error *err) {
  phx_device_self *self = calloc(1, sizeof *self);
  if (!self) return phx_fail(err, PHX_NOMEM, "far: no memory for the device");
  pthread_mutex_init(&self->lock, NULL);
  pthread_mutex_init(&self->compute, NULL);
  pthread_cond_init(&self->done, NULL);
  if (config) self->config = *(const far_config *)config;
  phx_status status = load_cpu(&self->cpu, err);
  if (!status) status = self->cpu->create(host, NULL, threads, &self->cpu_self, err);
  if (!status) status = far_stream_new(self, &self->null, err);
  if (status) {
    destroy(self);
    return status;
  }
  self->inner = self->cpu->device(self->cpu_self);
  self->inner_ops = self->cpu->ops(self->cpu_self);
  snprintf(self->name, sizeof self->name, "far from %s", self->inner->name);
  far_stream_calls(self);
  far_ops(self);
  *out = self;
  return PHX_OK;
}

static const phx_device *device(phx_device_self *self) { return &self->device; }
static const phx_ops *ops(phx_device_self *self) { return &self->ops; }
static int64_t driver_bytes(phx_device_self *self) {
  int64_t bytes = 0;
  pthread_mutex_lock(&self->lock);
  for (size_t i = 0; i < self->n_blocks; i++)
    if (self->blocks[i].space == PHX_SPACE_DEVICE) bytes += (int64_t)self->blocks[i].map_bytes;
  pthread_mutex_unlock(&self->lock);
  return bytes;
}

static const phx_device_table table = {.struct_size = sizeof table, .probe = probe, .create = create,
                                       .destroy = destroy, .device = device, .ops = ops, .alloc = far_alloc,
                                       .free = far_free, .driver_bytes = driver_bytes};
static const phx_option options[] = {
    PHX_INT(far_config, delay, "0", 0, 1000, "ms", 0, "A stream that was idle waits so long before it works."),
};
static const phx_plugin plugin = {.struct_size = sizeof(phx_plugin),
                                  .kind = PHX_KIND_DEVICE,
                                  .table_major = PHX_ABI_MAJOR,
                                  .table_minor = PHX_ABI_MINOR,
                                  .id = "far",
                                  .version = "1.0",
                                  .summary = "Test only: the cpu device behind memory that the CPU cannot touch.",
                                  .vendor = "Phalanx",
                                  .license = "unspecified",
                                  .build = __VERSION__,
                                  .provides = PHX_CAP_DETERMINISTIC,
                                  .options = options,
                                  .n_options = sizeof options / sizeof *options,
                                  .option_stride = sizeof(phx_option),
                                  .config_size = sizeof(far_config),
                                  .table = &table};
PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
