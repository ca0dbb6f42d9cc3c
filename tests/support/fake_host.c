/* A host for unit tests of plugins: see fake_host.h.  One thread but for log, which any thread may call. */
#include "fake_host.h"
#include <phalanx/error.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin_file.h"
#include "root.h"

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

static void keep_log(void *ctx, int32_t level, const char *message) {
  fake_host *fake = ctx;
  (void)level;
  pthread_mutex_lock(&log_lock);
  snprintf(fake->last_log, sizeof fake->last_log, "%s", message);
  fake->logs++;
  pthread_mutex_unlock(&log_lock);
}

static phx_status take(void *ctx, const phx_memory *what, void **out, phx_error *err) {
  fake_host *fake = ctx;
  const size_t bytes = (size_t)phx_align_bytes(what->bytes);
  void *p = aligned_alloc(PHX_ALIGN, bytes);
  if (!p) return phx_fail(err, PHX_NOMEM, "out of memory: %zu bytes", bytes);
  memset(p, 0, bytes);
  fake->allocs++;
  *out = p;
  return PHX_OK;
}

static void give(void *ctx, void *p) {
  fake_host *fake = ctx;
  if (p) fake->frees++;
  free(p);
}

static const void *find_extension(void *ctx, const char *id) {
  const fake_host *fake = ctx;
  return fake->extension ? fake->extension(id) : NULL;
}

static void ignore_metric(void *ctx, const char *name, double value) {
  (void)ctx;
  (void)name;
  (void)value;
}

void fake_host_init(fake_host *fake, int32_t rank, int32_t world_size) {
  memset(fake, 0, sizeof *fake);
  fake->host = (phx_host){.struct_size = sizeof(phx_host),
                          .abi_major = PHX_ABI_MAJOR,
                          .abi_minor = PHX_ABI_MINOR,
                          .ctx = fake,
                          .rank = rank,
                          .world_size = world_size,
                          .local_rank = rank,
                          .local_size = world_size,
                          .log = keep_log,
                          .alloc = take,
                          .release = give,
                          .extension = find_extension,
                          .metric = ignore_metric};
}

const phx_plugin *fake_host_plugin(const char *file) {
  phx_error err = {.struct_size = sizeof err};
  char path[1024];
  snprintf(path, sizeof path, "%s/lib/phalanx/%s", test_root(), file);
  const phx_plugin *plugin = plugin_file_open(path, &err);
  if (!plugin) {
    fprintf(stderr, "%s\n", err.message);
    abort();
  }
  return plugin;
}
