/* tests/support/fake_host.h - a host small enough for a unit test: a plugin loaded from a file, log lines kept, memory
 * from the C library, extensions NULL unless the test sets them. */
#ifndef PHX__FAKE_HOST_H
#define PHX__FAKE_HOST_H
#include <phalanx/host.h>
#include <phalanx/plugin.h>

typedef struct fake_host {
  phx_host host; /* hand &fake.host to create() */
  char last_log[512];
  int32_t logs;                             /* lines */
  int64_t allocs, frees;                    /* calls */
  const void *(*extension)(const char *id); /* or NULL */
} fake_host;

/* One rank of `world_size` (all local). */
void fake_host_init(fake_host *fake, int32_t rank, int32_t world_size);
/* dlopen of FILE ("phx_device_cpu.so") in PHX_TEST_PLUGINS and its descriptor; ends the test program with a message
 * when that fails. */
const phx_plugin *fake_host_plugin(const char *file);
#endif
