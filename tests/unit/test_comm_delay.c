/* The test communicator "delay": it takes the time it says, without the CPU, and moves what a world of one moves. */
#include <criterion/criterion.h>
#include <string.h>
#include <time.h>
#include "fake_job.h"

typedef struct config { double bandwidth, latency; } config;
static const phx_comm_table *table;
static config cfg;

static double clock_of(clockid_t id) {
  struct timespec t;
  clock_gettime(id, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void body(fake_rank *rank) {
  phx_error err = {.struct_size = sizeof err};
  phx_comm *c = NULL, *part = NULL;
  phx_stream *s = NULL;
  phx_comm_stats st;
  const phx_device *d = rank->device;
  static float x[25000], y[25000];
  for (int i = 0; i < 25000; i++) x[i] = (float)i;
  FAKE_CHECK(rank, table->create(&rank->host, &cfg, 4096, &c, &err) == PHX_OK, "%s", err.message);
  FAKE_CHECK(rank, d->stream_create(d->ctx, "comm", &s, &err) == PHX_OK, "stream");
  double wall = clock_of(CLOCK_MONOTONIC), cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID);
  for (int k = 0; k < 3; k++)
    FAKE_CHECK(rank, c->all_reduce(c->ctx, x, y, 25000, PHX_F32, PHX_SUM, s, &err) == PHX_OK, "%s", err.message);
  double issued = clock_of(CLOCK_MONOTONIC) - wall;
  FAKE_CHECK(rank, d->stream_synchronize(d->ctx, s, &err) == PHX_OK, "%s", err.message);
  wall = clock_of(CLOCK_MONOTONIC) - wall;
  cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  FAKE_CHECK(rank, issued < 0.05 && wall >= 0.33 && wall < 0.6 && cpu < 0.1, "%g %g %g", issued, wall, cpu);
  FAKE_CHECK(rank, memcmp(x, y, sizeof x) == 0, "data");
  FAKE_CHECK(rank, c->split(c->ctx, 0, 0, &part, &err) == PHX_OK && part->size == 1, "split");
  FAKE_CHECK(rank, part->all_gather(part->ctx, x, y, 1000, PHX_F32, NULL, &err) == PHX_OK, "%s", err.message);
  c->stats(c->ctx, &st);
  FAKE_CHECK(rank, st.calls[PHX_OP_ALL_REDUCE] == 3 &&
                       st.bytes[PHX_OP_ALL_REDUCE] == 3 * table->payload(PHX_OP_ALL_REDUCE, 25000, PHX_F32, 0, 1, 0) &&
                       st.bytes[PHX_OP_ALL_GATHER] == 4000, "stats");
  FAKE_CHECK(rank, c->send(c->ctx, x, 1, PHX_F32, 1, NULL, &err) == PHX_INVALID, "send");
  part->destroy(part);
  c->abort(c->ctx);
  FAKE_CHECK(rank, c->barrier(c->ctx, NULL, &err) == PHX_COMM && c->health(c->ctx, &err) == PHX_COMM, "abort");
  d->stream_destroy(d->ctx, s);
  table->destroy(c);
}
Test(comm_delay, takes_its_time_and_no_cpu, .timeout = 20) {
  static fake_result result;
  const phx_plugin *plugin = fake_plugin_load(PHX_TEST_ONLY_PLUGINS "/phx_comm_delay.so", &cfg, sizeof cfg);
  cr_assert_not_null(plugin);
  table = plugin->table;
  cfg.bandwidth = 1e6; /* 100000 bytes: 0.1 s */
  cfg.latency = 0.01;
  fake_setup s = {.n = 1, .timeout_s = 10, .limit_s = 15};
  cr_assert(fake_job_run(&s, body, &result));
  cr_assert_str_empty(fake_job_report(&result, 1), "%s", fake_job_report(&result, 1));
}
static void two(fake_rank *rank) {
  phx_error err = {.struct_size = sizeof err};
  phx_comm *c = NULL;
  FAKE_CHECK(rank, table->create(&rank->host, &cfg, 0, &c, &err) == PHX_UNSUPPORTED && !c, "%s", err.message);
}
Test(comm_delay, refuses_two_ranks, .timeout = 20) {
  static fake_result result;
  table = fake_plugin_load(PHX_TEST_ONLY_PLUGINS "/phx_comm_delay.so", &cfg, sizeof cfg)->table;
  fake_setup s = {.n = 2, .timeout_s = 10, .limit_s = 15};
  cr_assert(fake_job_run(&s, two, &result));
  cr_assert_str_empty(fake_job_report(&result, 2), "%s", fake_job_report(&result, 2));
}
