/* ddp on the harness: the reference's bits, planned = measured, and what each option does.  Replicas that differ are
 * the core's to find: tests/integration/test_hostile.c. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <phalanx/kit.h>
#include "harness.h"
#include "meddle.h"
#include "base/status.h"

static void expect_good(const harness_config *c) {
  harness_result r;
  bool good = harness_run(c, &r);
  cr_assert(good, "ddp %s ranks %d accumulate %d reduce %d: %s", c->options ? c->options : "", c->ranks, c->accumulate,
            c->reduce, r.message);
  harness_free(&r);
}

static const int all_ranks[] = {1, 2, 3, 4, 5, 7};

/* At least 5 buckets over 30 blocks, with borders inside units; accumulation 1 and 3 in both modes. */
Test(ddp, bits_equal_the_reference, .timeout = 120) {
  toy *t = toy_odd();
  for (size_t i = 0; i < sizeof all_ranks / sizeof *all_ranks; i++)
    for (int mode = 0; mode < 3; mode++)
      for (int deferred = 0; deferred < 2; deferred++)
        expect_good(&(harness_config){.strategy = "ddp",
                                      .replicas = true,
                                      .toy = t,
                                      .ranks = all_ranks[i],
                                      .steps = 2,
                                      .options = "bucket_bytes=20000 first_bucket_bytes=4096",
                                      .accumulate = mode ? 3 : 1,
                                      .reduce = mode == 2,
                                      .evaluate = mode == 0,
                                      .recompute = mode == 1,
                                      .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
  toy_free(t);
}

Test(ddp, sgd_one_bucket_and_frozen_models, .timeout = 60) {
  toy *t = toy_odd();
  expect_good(&(harness_config){.strategy = "ddp", .replicas = true, .toy = t, .ranks = 3, .sgd = true});
  expect_good(&(harness_config){.strategy = "ddp",
                                .replicas = true,
                                .toy = t,
                                .ranks = 4,
                                .accumulate = 4,
                                .reduce = PHX_REDUCE_MICRO_BATCH,
                                .stream_mode = LOOPBACK_DEFERRED});
  toy_free(t);
  t = toy_new();
  uint32_t u = toy_unit(t, "ice");
  toy_param(t, 9, 301, PHX_PARAM_FROZEN);
  toy_stage(t, "only"), toy_use(t, u, PHX_USE_FORWARD | PHX_USE_BACKWARD);
  toy_finish(t);
  expect_good(&(harness_config){.strategy = "ddp", .replicas = true, .toy = t, .ranks = 2});
  toy_free(t);
}

Test(ddp, skipped_steps_leave_nothing_behind, .timeout = 60) {
  toy *t = toy_odd();
  for (int early = 0; early < 2; early++)
    for (int mode = 0; mode < 3; mode++)
      expect_good(&(harness_config){.strategy = "ddp",
                                    .replicas = true,
                                    .toy = t,
                                    .ranks = 3,
                                    .steps = 3,
                                    .discard_step = 2,
                                    .discard_early = early,
                                    .accumulate = mode ? 2 : 1,
                                    .reduce = mode == 2,
                                    .stream_mode = LOOPBACK_DEFERRED});
  toy_free(t);
}

/* Calls follow the bucket sizes; the borders fall inside units, and the sums do not care (above). */
Test(ddp, bucket_sizes_set_the_calls, .timeout = 60) {
  toy *t = toy_odd();
  int64_t total = t->elements[0] * 4; /* bytes of gradients */
  static const int64_t first[] = {4096, 20480, 1 << 20}, each[] = {4096, 12288, 40960, 1 << 20};
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < 4; k++) {
      char options[96];
      harness_result r;
      snprintf(options, sizeof options, "first_bucket_bytes=%lld bucket_bytes=%lld", (long long)first[i],
               (long long)each[k]);
      harness_config c = {.strategy = "ddp", .replicas = true, .toy = t, .ranks = 2, .options = options};
      cr_assert(harness_run(&c, &r), "%s", r.message);
      int64_t want = first[i] >= total ? 1 : 1 + (total - first[i] + each[k] - 1) / each[k], largest;
      cr_assert_eq(harness_count(&r.rank[0], PHX_OP_ALL_REDUCE, 1, &largest), want, "%s", options);
      cr_assert_eq(r.rank[0].planned.calls[PHX_OP_ALL_REDUCE], want);
      cr_assert(largest * 4 <= (first[i] > each[k] ? first[i] : each[k]));
      harness_free(&r);
    }
  toy_free(t);
}

/* Each all_reduce is issued on the communication stream by the release that completes it, not at the end. */
Test(ddp, buckets_start_during_backward, .timeout = 60) {
  toy *t = toy_plain(6, 40);
  harness_result r;
  harness_config c = {.strategy = "ddp",
                      .replicas = true,
                      .toy = t,
                      .ranks = 2,
                      .options = "first_bucket_bytes=4096 bucket_bytes=8192"};
  cr_assert(harness_run(&c, &r), "%s", r.message);
  int early = 0;
  for (size_t i = 0; i < r.rank[0].n_trace; i++) {
    const harness_call *call = &r.rank[0].trace[i];
    if (call->step != 1) continue;
    cr_assert(call->op == PHX_OP_ALL_REDUCE && call->on_stream && call->pass == PHX_PASS_BACKWARD && !call->in_acquire);
    if (call->stage > 0) early++;
  }
  cr_assert_eq(early, 7, "all but the embedding's two start before stage 0");
  harness_free(&r);
  c.accumulate = 3; /* reduce = step: nothing is sent before the last micro-batch */
  cr_assert(harness_run(&c, &r), "%s", r.message);
  cr_assert_eq(harness_count(&r.rank[0], -1, 1, NULL), 9);
  harness_free(&r);
  c.reduce = PHX_REDUCE_MICRO_BATCH;
  cr_assert(harness_run(&c, &r), "%s", r.message);
  cr_assert_eq(harness_count(&r.rank[0], -1, 1, NULL), 27);
  harness_free(&r);
  toy_free(t);
}

Test(ddp, replicas_share_the_norm, .timeout = 60) {
  toy *t = toy_odd();
  harness_result r;
  harness_config c = {.strategy = "ddp", .replicas = true, .toy = t, .ranks = 3};
  cr_assert(harness_run(&c, &r), "%s", r.message);
  phx_kit_shard s;
  for (int k = 0; k < 3; k++) {
    s = phx_kit_shard_of(t->model.total_blocks[0], k, 3);
    cr_assert_eq(r.rank[k].norm_blocks, s.blocks);
  }
  harness_free(&r);
  toy_free(t);
}

/* ---- faults ---- */

Test(ddp, unfinished_gradients_are_refused_by_name, .timeout = 60) {
  toy *t = toy_odd();
  meddle how = {.lost_flags = PHX_RELEASE_LAST_USE, .lost_stage = 3};
  harness_result r;
  harness_config c = {.plugin = meddle_plugin("ddp", &how), .replicas = true, .toy = t, .ranks = 2};
  cr_assert_not(harness_run(&c, &r));
  cr_assert_eq(r.status, PHX_STATE);
  cr_assert(strstr(r.message, "'half'"), "%s", r.message);
  harness_free(&r);
  toy_free(t);
}

Test(ddp, a_failing_allocation_leaks_nothing, .timeout = 60) {
  toy *t = toy_odd();
  char message[640];
  harness_config c = {.strategy = "ddp",
                      .replicas = true,
                      .toy = t,
                      .ranks = 2,
                      .accumulate = 2,
                      .reduce = PHX_REDUCE_MICRO_BATCH};
  cr_assert_eq(harness_fail_allocations(c, -1, 1, message), 7, "six regions, then nothing fails: %s", message);
  toy_free(t);
}

Test(ddp, what_it_cannot_do_is_refused_before_anything_is_opened) {
  toy *t = toy_odd();
  harness_config c = {.strategy = "ddp", .toy = t, .ranks = 2, .compute_dtype = PHX_F16};
  phx_estimate e;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(harness_estimate(&c, 0, &e, &err), PHX_UNSUPPORTED);
  cr_assert(strstr(err.message, "compute"), "%s", err.message);
  toy_free(t);
}
