/* The test-only device `far` itself: the CPU cannot touch its memory, the compute stream is asynchronous, misuse is
 * found. Ends by signals are Criterion's to see, so this is not for the thread sanitizer's build. */
#include <criterion/criterion.h>
#include <phalanx/provider.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fake_host.h"
#include "plugin_file.h"

typedef struct far_config {
  int64_t delay;
} far_config;

static fake_host fake;
static const phx_device_table *table;
static phx_device_self *self;
static const phx_device *d;
static phx_error err;

static void open_far(void) {
  static const far_config config = {30};
  err = (phx_error){.struct_size = sizeof err};
  const phx_plugin *plugin = plugin_file_open(PHX_TEST_ONLY_PLUGINS "/phx_device_far.so", &err);
  cr_assert_not_null(plugin, "%s", err.message);
  table = plugin->table;
  fake_host_init(&fake, 0, 1);
  cr_assert_eq(table->create(&fake.host, &config, 1, &self, &err), PHX_OK, "%s", err.message);
  d = table->device(self);
}
static void close_far(void) { table->destroy(self); }
TestSuite(far, .timeout = 60);

static void *take(int32_t space, int64_t bytes) {
  void *p = NULL;
  cr_assert_eq(table->alloc(self, space, bytes, &p, &err), PHX_OK, "%s", err.message);
  return p;
}
static void settle(void) { cr_assert_eq(d->stream_synchronize(d->ctx, NULL, &err), PHX_OK, "%s", err.message); }

Test(far, the_cpu_crashes_on_it, .signal = SIGSEGV) {
  open_far();
  signal(SIGSEGV, SIG_DFL); /* a sanitizer would report it instead */
  *(volatile char *)take(PHX_SPACE_DEVICE, 256) = 1;
}

Test(far, use_after_free_crashes, .signal = SIGSEGV) {
  open_far();
  char *p = take(PHX_SPACE_PINNED, 4096);
  table->free(self, PHX_SPACE_PINNED, p, 4096);
  signal(SIGSEGV, SIG_DFL);
  *(volatile char *)p = 1;
}

Test(far, a_leak_ends_the_process, .signal = SIGABRT) {
  open_far();
  take(PHX_SPACE_DEVICE, 256);
  close_far();
}

Test(far, free_with_work_pending_ends_the_process, .signal = SIGABRT) {
  open_far();
  void *p = take(PHX_SPACE_DEVICE, 256);
  d->zero(d->ctx, p, 256, NULL, &err);
  table->free(self, PHX_SPACE_DEVICE, p, 256);
}

Test(far, the_compute_stream_is_asynchronous_and_in_order) {
  open_far();
  char *p = take(PHX_SPACE_DEVICE, 1000), *host = take(PHX_SPACE_PINNED, 1000);
  struct timespec a, b;
  memset(host, 7, 1000);
  clock_gettime(CLOCK_MONOTONIC, &a);
  cr_assert_eq(d->copy(d->ctx, p, host, 1000, NULL, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(d->zero(d->ctx, p, 500, NULL, &err), PHX_OK);
  cr_assert_eq(d->copy(d->ctx, host, p, 1000, NULL, &err), PHX_OK);
  settle();
  clock_gettime(CLOCK_MONOTONIC, &b);
  cr_assert_geq((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec), 0.02);
  cr_assert(host[0] == 0 && host[499] == 0 && host[500] == 7 && host[999] == 7);
  table->free(self, PHX_SPACE_PINNED, host, 1000);
  table->free(self, PHX_SPACE_DEVICE, p, 1000);
  close_far();
}

Test(far, events_order_streams) {
  open_far();
  phx_stream *s = NULL;
  phx_event *e = NULL;
  float *p = take(PHX_SPACE_DEVICE, 4096), *host = take(PHX_SPACE_PINNED, 4096);
  for (int i = 0; i < 1024; i++) host[i] = (float)i;
  cr_assert_eq(d->stream_create(d->ctx, "other", &s, &err), PHX_OK);
  cr_assert_eq(d->event_create(d->ctx, &e, &err), PHX_OK);
  cr_assert_eq(d->event_done(d->ctx, e), 1, "never recorded is complete");
  d->copy(d->ctx, p, host, 4096, NULL, &err);
  d->event_record(d->ctx, e, NULL, &err);
  d->stream_wait(d->ctx, s, e, &err);
  d->scale(d->ctx, p, 2, 1024, s, &err);
  d->event_record(d->ctx, e, s, &err);
  d->stream_wait(d->ctx, NULL, e, &err);
  d->copy(d->ctx, host, p, 4096, NULL, &err);
  cr_assert_eq(d->event_synchronize(d->ctx, e, &err), PHX_OK);
  settle();
  for (int i = 0; i < 1024; i++) cr_assert_eq(host[i], 2 * (float)i);
  d->event_destroy(d->ctx, e);
  d->stream_destroy(d->ctx, s);
  table->free(self, PHX_SPACE_PINNED, host, 4096);
  table->free(self, PHX_SPACE_DEVICE, p, 4096);
  close_far();
}

static phx_status refuse(void *arg, phx_error *e) {
  snprintf(e->message, sizeof e->message, "%s", (const char *)arg);
  return PHX_IO;
}

Test(far, a_failure_is_kept_and_told_once) {
  open_far();
  char *p = take(PHX_SPACE_DEVICE, 256), *host = take(PHX_SPACE_PINNED, 256);
  d->enqueue(d->ctx, NULL, refuse, (void *)(uintptr_t)"no disk", &err);
  host[0] = 1;
  d->copy(d->ctx, host, p, 256, NULL, &err);
  cr_assert_eq(d->stream_synchronize(d->ctx, NULL, &err), PHX_IO);
  cr_assert_str_eq(err.message, "no disk");
  cr_assert_eq(host[0], 1, "what follows a failure is skipped");
  settle();
  table->free(self, PHX_SPACE_PINNED, host, 256);
  table->free(self, PHX_SPACE_DEVICE, p, 256);
  close_far();
}

Test(far, misuse_is_refused) {
  char ordinary[256];
  open_far();
  char *p = take(PHX_SPACE_DEVICE, 256);
  cr_assert_eq(d->copy(d->ctx, p, ordinary, 256, NULL, &err), PHX_DEVICE);
  cr_assert(strstr(err.message, "nor pinned"), "%s", err.message);
  cr_assert_eq(d->zero(d->ctx, p + 128, 256, NULL, &err), PHX_DEVICE);
  cr_assert(strstr(err.message, "ends after 128"), "%s", err.message);
  cr_assert_eq(table->ops(self)->add(table->ops(self)->ctx, PHX_F32, ordinary, p, p, 1, NULL, &err), PHX_DEVICE);
  cr_assert_eq(table->ops(self)->mean(table->ops(self)->ctx, (double *)(void *)p, (float *)(void *)p, 1, NULL, &err),
               PHX_DEVICE);
  cr_assert_eq(d->space(d->ctx, p), PHX_SPACE_DEVICE);
  cr_assert_eq(d->space(d->ctx, ordinary), PHX_SPACE_HOST);
  cr_assert_eq(d->pin(d->ctx, ordinary, 256, &err), PHX_OK);
  cr_assert_eq(d->space(d->ctx, ordinary), PHX_SPACE_PINNED);
  cr_assert_eq(d->copy(d->ctx, p, ordinary, 256, NULL, &err), PHX_OK);
  settle();
  d->unpin(d->ctx, ordinary);
  table->free(self, PHX_SPACE_DEVICE, p, 256);
  close_far();
}
