/* The cpu device without the core: see device_ops.h. */
#include "device_ops.h"
#include <phalanx/error.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

phx_status device_ops_open(device_ops *d, int32_t threads, const char *isa, phx_error *err) {
  *d = (device_ops){.err = {.struct_size = sizeof d->err}};
  const phx_plugin *plugin = fake_host_plugin("phx_device_cpu.so");
  if (plugin->config_size) abort(); /* options came: fill a config here */
  fake_host_init(&d->fake, 0, 1);
  if (isa) setenv("PHALANX_ISA", isa, 1);
  d->table = plugin->table;
  PHX_TRY(d->table->create(&d->fake.host, NULL, threads, &d->self, err));
  d->device = d->table->device(d->self);
  d->ops = d->table->ops(d->self);
  return PHX_OK;
}

void device_ops_close(device_ops *d) {
  if (d->self) d->table->destroy(d->self);
  memset(d, 0, sizeof *d);
}

int device_ops_have(device_ops *d, int32_t threads, const char *isa) {
  const phx_status status = device_ops_open(d, threads, isa, &d->err);
  if (status == PHX_OK || status == PHX_UNSUPPORTED) return status == PHX_OK;
  fprintf(stderr, "%s\n", d->err.message);
  abort();
}

int device_ops_sets(void) {
  int status = 0;
  const pid_t child = fork();
  if (child == 0) {
    device_ops d;
    unsetenv("PHALANX_ISA");
    if (device_ops_open(&d, 1, NULL, &d.err) != PHX_OK) _exit(0);
    _exit(strstr(d.device->name, "avx512") ? 3 : strstr(d.device->name, "avx2") ? 2 : 1);
  }
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) == 0) abort();
  return WEXITSTATUS(status);
}
