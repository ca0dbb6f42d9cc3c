/* The cpu device under test: see cpu_fixture.h. */
#include "cpu_fixture.h"
#include <math.h>
#include <string.h>

phx_status cpu_fixture_open(cpu_fixture *f, const char *isa, int32_t threads) {
  memset(f, 0, sizeof *f);
  f->err.struct_size = sizeof f->err;
  fake_host_init(&f->fake, 0, 1);
  f->table = fake_host_plugin("phx_device_cpu.so")->table;
  if (isa)
    setenv("PHALANX_ISA", isa, 1);
  else
    unsetenv("PHALANX_ISA");
  const phx_status status = f->table->create(&f->fake.host, NULL, threads, &f->self, &f->err);
  if (status != PHX_OK) return status;
  f->device = f->table->device(f->self);
  f->ops = f->table->ops(f->self);
  return PHX_OK;
}

void cpu_fixture_close(cpu_fixture *f) {
  if (f->self) f->table->destroy(f->self);
  f->self = NULL;
}

float *random_array(int64_t n, float by, uint64_t *state) {
  float *p = malloc((size_t)n * sizeof *p);
  if (!p) abort();
  for (int64_t i = 0; i < n; i++) p[i] = by * random_float(state);
  return p;
}

float *poisoned_array(int64_t n) {
  float *p = malloc((size_t)n * sizeof *p);
  if (!p) abort();
  for (int64_t i = 0; i < n; i++) p[i] = NAN;
  return p;
}
