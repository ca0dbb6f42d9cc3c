/* The cpu device without the core: see device_ops.h. */
#include "device_ops.h"
#include <stdlib.h>
#include <string.h>

phx_status device_ops_open(device_ops *d, int32_t threads, const char *isa, phx_error *err) {
  memset(d, 0, sizeof *d);
  const phx_plugin *plugin = fake_host_plugin("phx_device_cpu.so");
  if (plugin->config_size) abort(); /* options came: fill a config here */
  fake_host_init(&d->fake, 0, 1);
  if (isa) setenv("PHALANX_ISA", isa, 1);
  d->table = plugin->table;
  const phx_status status = d->table->create(&d->fake.host, NULL, threads, &d->self, err);
  if (status != PHX_OK) return status;
  d->device = d->table->device(d->self);
  d->ops = d->table->ops(d->self);
  return PHX_OK;
}

void device_ops_close(device_ops *d) {
  if (d->self) d->table->destroy(d->self);
  memset(d, 0, sizeof *d);
}
