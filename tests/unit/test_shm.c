/* The communicator "shm" on forked ranks: every collective against a plain reference, bit for bit; order, faults,
 * traffic. Each rank generates every rank's data itself, so the reference needs no communication. */
#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "comm_suite.h"
#include "sanitizer.h"

typedef struct config { int64_t staging, spin, communicators; int32_t huge_pages, reserved0; } config; /* as shm.h */

static const phx_plugin *plugin;
static const phx_comm_table *table;
static config cfg;

static void load(void) {
  plugin = fake_plugin_load(PHX_TEST_PLUGINS "/phx_comm_shm.so", &cfg, sizeof cfg);
  cr_assert_not_null(plugin);
  cr_assert_eq(plugin->config_size, sizeof cfg);
  table = plugin->table;
  cfg.huge_pages = 0;
  comm_suite = (comm_suite_setup){.table = table, .config = &cfg, .communicators = cfg.communicators};
}

static void run_limited(int n, int64_t share, double timeout_s, double limit_s, fake_body *body, void *arg,
                        fake_result *result) {
  fake_setup s = {.n = n, .may_spin = 0, .timeout_s = timeout_s, .limit_s = limit_s, .share_bytes = share, .arg = arg};
  if (!plugin) load();
  cr_assert(fake_job_run(&s, body, result));
}
static void run(int n, double limit_s, fake_body *body, void *arg) {
  static fake_result result;
  run_limited(n, (int64_t)COMM_SUITE_ARENA + (32 << 20), 30, limit_s, body, arg, &result);
  const char *report = fake_job_report(&result, n);
  cr_assert_eq(result.late, 0, "%d of %d ranks were late; %s", result.late, n, report);
  cr_assert_eq(report[0], 0, "%d ranks: %s", n, report);
}

static void battery_at(int n) { run(n, 100, comm_suite_battery, NULL); }
Test(shm, battery_1, .timeout = 120) { battery_at(1); }
Test(shm, battery_3, .timeout = 120) { battery_at(3); }
#if !UNDER_TSAN /* there, what is in one process is the same */
Test(shm, battery_2, .timeout = 120) { battery_at(2); }
Test(shm, battery_4, .timeout = 120) { battery_at(4); }
Test(shm, battery_5, .timeout = 120) { battery_at(5); }
Test(shm, battery_7, .timeout = 120) { battery_at(7); }
Test(shm, battery_16, .timeout = 120) { battery_at(16); }
#endif

/* Negative control: the battery can see the order of a sum. */
Test(shm, left_to_right_differs_at_4_ranks) {
  const int64_t differ = comm_suite_order_shows();
  cr_expect_gt(differ, 50, "%lld of 1000", (long long)differ);
}

Test(shm, send_recv_ring, .timeout = 60) {
  run(2, 50, comm_suite_pairs, NULL);
  run(5, 50, comm_suite_pairs, NULL);
}

Test(shm, streams_and_events, .timeout = 60) {
  run(1, 50, comm_suite_streams, NULL);
  run(3, 50, comm_suite_streams, NULL);
}

/* Two streams that no event orders are refused, not raced: the call on the compute stream finds one pending. */
static void no_order(fake_rank *rank) {
  rig g;
  phx_stream *s;
  const phx_device *d = rank->device;
  float one = 1, two = 2;
  if (!comm_suite_rig_open(&g, rank, COMM_SUITE_ARENA)) return;
  phx_comm *c = g.comm;
  d->stream_create(d->ctx, "comm", &s, &g.err);
  if (rank->job.rank == 0) {
    phx_status a = c->all_reduce(c->ctx, &one, &one, 1, PHX_F32, PHX_SUM, s, &g.err);
    phx_status b = c->all_reduce(c->ctx, &two, &two, 1, PHX_F32, PHX_SUM, NULL, &g.err);
    if (a != PHX_OK || b != PHX_STATE || !strstr(g.err.message, "order the streams"))
      COMM_SUITE_BAD(&g, "%d %s", b, g.err.message);
    c->abort(c->ctx);
    if (d->stream_synchronize(d->ctx, s, &g.err) != PHX_COMM) COMM_SUITE_BAD(&g, "the aborted call did not fail");
  }
  d->stream_destroy(d->ctx, s);
  comm_suite_rig_close(&g);
}
Test(shm, unordered_streams_are_refused_and_abort_wakes, .timeout = 20) { run(2, 10, no_order, NULL); }

Test(shm, split_and_two_orders_at_once, .timeout = 60) {
  run(2, 50, comm_suite_splits, NULL);
  run(5, 50, comm_suite_splits, NULL);
}

Test(shm, split_beyond_the_pool_is_refused, .timeout = 30) { run(3, 20, comm_suite_pool_empty, NULL); }

Test(shm, mismatch_names_both_ranks_and_calls, .timeout = 60) {
  static fake_result result;
  for (int kind = 0; kind < 8; kind++) {
    run_limited(2, (int64_t)32 << 20, 30, 8, comm_suite_mismatch, &kind, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "%s", report);
    cr_expect_lt(result.seconds, 2.0, "kind %d took %g s", kind, result.seconds);
  }
}

Test(shm, absent_rank_is_named_within_the_timeout, .timeout = 30) {
  static fake_result result;
  run_limited(3, (int64_t)32 << 20, 0.6, 10, comm_suite_absent, NULL, &result);
  const char *report = fake_job_report(&result, 3);
  cr_expect_eq(report[0], 0, "%s", report);
  cr_expect(result.seconds > 0.5 && result.seconds < 2.0, "%g s", result.seconds);
}

Test(shm, late_is_not_absent, .timeout = 30) {
  static fake_result result;
  for (int k = 0; k < 2; k++) {
    run_limited(2, (int64_t)32 << 20, k ? 0 : 0.5, 10, comm_suite_late, NULL, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "%s", report);
  }
}

Test(shm, time_in_which_a_rank_was_suspended_is_nobodys_absence, .timeout = 30) {
  static fake_result result;
  run_limited(2, (int64_t)32 << 20, 2, 20, comm_suite_suspended, NULL, &result);
  const char *report = fake_job_report(&result, 2);
  cr_expect_eq(report[0], 0, "%s", report);
  cr_expect_eq(result.late, 0);
}

Test(shm, killed_peer_ends_waits_quickly, .timeout = 30) {
  static fake_result result;
  run_limited(3, (int64_t)32 << 20, 60, 10, comm_suite_killed, NULL, &result);
  cr_expect_eq(result.late, 0, "%d ranks hung", result.late);
  cr_expect(result.report[0][0] == 0 && result.report[2][0] == 0, "%s %s", result.report[0], result.report[2]);
  cr_expect_lt(result.seconds, 3.0);
}

Test(shm, wrong_arguments_are_refused_and_harmless, .timeout = 20) { run(2, 10, comm_suite_arguments, NULL); }

Test(shm, payload_adds_up) {
  load();
  for (int32_t n = 1; n <= 64; n++) {
    for (int64_t numel = 0; numel < 200000; numel = numel * 3 + 1031) {
      int64_t sum = 0, bytes = numel * 4;
      for (int32_t r = 0; r < n; r++) sum += table->payload(NULL, PHX_OP_ALL_REDUCE, numel, PHX_F32, r, n, 0);
      cr_assert_eq(sum, bytes <= 512 ? n * (n - 1) * bytes : 2 * (n - 1) * bytes, "%d ranks, %lld", n,
                   (long long)numel);
      sum = 0;
      for (int32_t r = 0; r < n; r++) sum += table->payload(NULL, PHX_OP_BROADCAST, numel, PHX_F32, r, n, n / 2);
      cr_assert_eq(sum, (n - 1) * bytes);
    }
  }
  config small = cfg;
  small.communicators = 2;
  cr_assert_eq(table->buffer_bytes(&cfg, 4) / cfg.communicators * 2, table->buffer_bytes(&small, 4));
  small.staging *= 2;
  cr_assert_gt(table->buffer_bytes(&small, 4), table->buffer_bytes(&cfg, 4) / cfg.communicators * 2);
  cr_assert_eq(table->probe(NULL), PHX_OK);
}

Test(shm, comm_suite_tiny_staging, .timeout = 60) {
  load();
  cfg.staging = 64 << 10;
  run(3, 50, comm_suite_tiny_staging, NULL);
  run(16, 50, comm_suite_tiny_staging, NULL);
}

Test(shm, ranks_as_threads, .timeout = 120) {
  static fake_result result;
  load();
  fake_setup s = {.n = 3, .threads = 1, .timeout_s = 60, .share_bytes = 4 * ((int64_t)COMM_SUITE_ARENA + (32 << 20))};
  cr_assert(fake_job_run(&s, comm_suite_as_threads, &result));
  const char *report = fake_job_report(&result, 3);
  cr_assert_eq(report[0], 0, "%s", report);
}
