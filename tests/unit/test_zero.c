/* zero on the harness: the reference's bits, planned = measured, and what each option does. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "harness.h"
#include "sanitizer.h"

static void expect_good(const harness_config *c) {
  harness_result r;
  bool good = harness_run(c, &r);
  cr_assert(good, "zero %s ranks %d accumulate %d reduce %d deferred %d: %s", c->options ? c->options : "", c->ranks,
            c->accumulate, c->reduce, c->stream_mode, r.message);
  harness_free(&r);
}

static const int all_ranks[] = {1, 2, 3, 4, 5, 7};
enum { N_RANKS = sizeof all_ranks / sizeof *all_ranks };

/* 31 blocks in 7 buckets or more, with borders inside units and units' shares across ranks; every oddity of toy_odd. */
static void expect_bits(int stage) {
  toy *t = toy_odd();
  char options[200];
  const int streams = UNDER_TSAN ? 1 : 2; /* deferred work has no thread */
  for (int i = 0; i < N_RANKS; i++)
    for (int mode = 0; mode < 3; mode++)
      for (int deferred = 0; deferred < streams; deferred++) {
        snprintf(options, sizeof options,
                 "stage=%d reduce_bucket_size=5000 allgather_bucket_size=%d overlap_comm=%s sub_group_size=3000 "
                 "stage3_param_persistence_threshold=%d stage3_prefetch_bucket_size=%d",
                 stage, i % 2 ? 6000 : 500000000, (i + deferred) % 2 ? "yes" : "no", i % 3 * 500, mode == 1 ? 0 : 8000);
        expect_good(&(harness_config){.strategy = "zero",
                                      .toy = t,
                                      .ranks = all_ranks[i],
                                      .steps = 2,
                                      .options = options,
                                      .accumulate = mode ? 3 : 1,
                                      .reduce = mode == 2,
                                      .evaluate = mode == 0,
                                      .recompute = mode == 1,
                                      .sgd = i == 3,
                                      .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
      }
  toy_free(t);
}
Test(zero, stage1_has_the_references_bits, .timeout = 120) {
  expect_bits(1);
}
Test(zero, stage2_has_the_references_bits, .timeout = 120) {
  expect_bits(2);
}
Test(zero, stage3_has_the_references_bits, .timeout = 120) {
  expect_bits(3);
}

/* At least 100 blocks, more ranks than blocks in places, a gradient thrown away before and after the norm. */
Test(zero, many_blocks_and_discarded_steps, .timeout = 120) {
  toy *t = toy_plain(12, 97);
  cr_assert_geq(t->model.total_blocks[0], 100);
  for (int stage = 1; stage <= 3; stage++)
    for (int early = 0; early < 2; early++)
      for (int mode = 0; mode < (UNDER_TSAN ? 1 : 2); mode++) { /* the second has no thread */
        char options[100];
        snprintf(options, sizeof options, "stage=%d reduce_bucket_size=12345 stage3_param_persistence_threshold=100",
                 stage);
        expect_good(&(harness_config){.strategy = "zero",
                                      .toy = t,
                                      .ranks = 3,
                                      .steps = 3,
                                      .options = options,
                                      .accumulate = 2,
                                      .reduce = mode,
                                      .discard_step = 2,
                                      .discard_early = early,
                                      .stream_mode = mode ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
      }
  toy_free(t);
}

Test(zero, an_empty_share, .timeout = 60) {
  toy *t = toy_new(); /* 3 blocks on 7 ranks */
  toy_unit(t, "a"), toy_param(t, 3, 500, PHX_PARAM_DECAY);
  toy_unit(t, "b"), toy_param(t, 1, 9, 0);
  toy_stage(t, "a"), toy_use(t, 0, TOY_RW);
  toy_stage(t, "b"), toy_use(t, 1, TOY_RW);
  toy_finish(t);
  for (int stage = 1; stage <= 3; stage++)
    for (int threshold = 0; threshold < 2; threshold++) {
      char options[100];
      snprintf(options, sizeof options, "stage=%d stage3_param_persistence_threshold=%d", stage, threshold * 100);
      expect_good(&(harness_config){.strategy = "zero", .toy = t, .ranks = 7, .options = options});
    }
  toy_free(t);
}

/* ---- the effect of each option, over what harness_run checks anyway ---- */

static harness_result measured(const toy *t, int ranks, const char *options, int mode) {
  harness_result r;
  harness_config c = {
      .strategy = "zero", .toy = t, .ranks = ranks, .options = options, .stream_mode = mode, .steps = 2};
  bool good = harness_run(&c, &r);
  cr_assert(good, "zero %s: %s", options, r.message);
  return r;
}

/* Elements of the broadcasts issued in a pass (PHX_PASS_*; -1: outside of passes) of step 1; stage -1: any. */
static int64_t gathered(const harness_rank *r, int pass, int stage) {
  int64_t numel = 0;
  for (size_t i = 0; i < r->n_trace; i++)
    if (r->trace[i].op == PHX_OP_BROADCAST && r->trace[i].step == 1 && r->trace[i].pass == pass &&
        (stage < 0 || r->trace[i].stage == stage))
      numel += r->trace[i].numel;
  return numel;
}

Test(zero, stage_decides_what_is_partitioned, .timeout = 60) {
  toy *t = toy_plain(4, 64);
  int64_t whole = t->elements[0] * 4, bytes[4][PHX_MEM_KINDS];
  for (int stage = 1; stage <= 3; stage++) {
    char options[100];
    snprintf(options, sizeof options, "stage=%d stage3_param_persistence_threshold=0 reduce_bucket_size=1", stage);
    harness_result r = measured(t, 4, options, LOOPBACK_THREADS);
    memcpy(bytes[stage], r.rank[0].peak, sizeof bytes[stage]);
    harness_free(&r);
    cr_assert_leq(bytes[stage][PHX_MEM_OPTIMIZER], 2 * (whole / 4 + PHX_BLOCK * 4));
  }
  cr_assert_geq(bytes[1][PHX_MEM_WEIGHT], whole);
  cr_assert_geq(bytes[2][PHX_MEM_WEIGHT], whole);
  cr_assert_leq(bytes[3][PHX_MEM_WEIGHT], whole / 4 + PHX_BLOCK * 4);
  cr_assert_geq(bytes[1][PHX_MEM_GRADIENT], whole);
  cr_assert_leq(bytes[2][PHX_MEM_GRADIENT], whole / 4 + PHX_BLOCK * 4);
  cr_assert_lt(bytes[2][PHX_MEM_GATHERED], whole / 2, "stage 2 holds a gradient only until it is reduced");
  cr_assert_eq(bytes[1][PHX_MEM_GATHERED], 0);
  toy_free(t);
}

Test(zero, reduce_bucket_size_decides_how_much_is_reduced_at_once, .timeout = 60) {
  toy *t = toy_odd();
  int64_t largest, few, many;
  harness_result r = measured(t, 2, "stage=2 reduce_bucket_size=1000000", LOOPBACK_THREADS);
  few = harness_count(&r.rank[0], PHX_OP_REDUCE, 1, &largest);
  int64_t window = r.rank[0].peak[PHX_MEM_GATHERED];
  cr_assert_gt(largest, 5120);
  harness_free(&r);
  r = measured(t, 2, "stage=2 reduce_bucket_size=5000", LOOPBACK_THREADS);
  many = harness_count(&r.rank[0], PHX_OP_REDUCE, 1, &largest);
  cr_assert_leq(largest, 5120); /* rounded up to blocks */
  cr_assert_gt(many, few);
  cr_assert_geq(many, t->elements[0] / 5120);
  cr_assert_lt(r.rank[0].peak[PHX_MEM_GATHERED], window, "small buckets give windows back sooner");
  harness_free(&r);
  /* stage 1 reduces across units: fewer calls than units when all fits one bucket, one per owner */
  r = measured(t, 2, "stage=1 reduce_bucket_size=1000000", LOOPBACK_THREADS);
  cr_assert_lt(harness_count(&r.rank[0], PHX_OP_REDUCE, 1, NULL), 7);
  harness_free(&r);
  toy_free(t);
}

/* toy_odd's forward pass reads units in the model's order: runs end at owners' borders and at the model's end only. */
Test(zero, allgather_bucket_size_decides_how_much_is_gathered_at_once, .timeout = 60) {
  toy *t = toy_odd();
  int64_t largest, calls = 0;
  for (int stage = 1; stage <= 2; stage++) {
    char options[100];
    snprintf(options, sizeof options, "stage=%d", stage);
    harness_result r = measured(t, 3, options, LOOPBACK_THREADS);
    cr_assert_eq(harness_count(&r.rank[1], PHX_OP_ALL_GATHER, 2, &largest), 1);
    cr_assert_eq(harness_count(&r.rank[1], PHX_OP_BROADCAST, 2, NULL), 0);
    int64_t share = largest;
    harness_free(&r);
    snprintf(options, sizeof options, "stage=%d allgather_bucket_size=3000", stage);
    r = measured(t, 3, options, LOOPBACK_THREADS);
    cr_assert_eq(harness_count(&r.rank[1], PHX_OP_ALL_GATHER, 2, NULL), 0);
    calls = 0;
    for (int64_t at = 0; at < t->elements[0]; at += share)
      calls += ((t->elements[0] - at < share ? t->elements[0] - at : share) + 2999) / 3000;
    cr_assert_eq(harness_count(&r.rank[1], PHX_OP_BROADCAST, 2, &largest), calls);
    cr_assert_eq(largest, 3000);
    harness_free(&r);
  }
  toy_free(t);
}

/* Deferred streams run nothing until they are waited for: what overlaps is what is still in flight. */
Test(zero, a_stage_waits_for_its_own_weights_only, .timeout = 60) {
  toy *t = toy_plain(6, 64); /* a stage a unit; with a bucket of one block a unit's blocks are as many calls */
  for (int stage = 1; stage <= 2; stage++) {
    char options[100];
    snprintf(options, sizeof options, "stage=%d allgather_bucket_size=1024", stage);
    harness_result r = measured(t, 3, options, LOOPBACK_DEFERRED);
    for (int i = 0; i < 3; i++) {
      int64_t later = t->elements[0] / PHX_BLOCK;
      for (uint32_t s = 0; s < t->model.n_stages; s++) {
        later -= t->units[s].blocks[0];
        cr_assert_eq(r.rank[i].forward_in_flight[s], later, "stage %u of %u: %lld in flight, expected %lld", s,
                     t->model.n_stages, (long long)r.rank[i].forward_in_flight[s], (long long)later);
      }
      cr_assert_eq(later, 0);
    }
    harness_free(&r);
    r = measured(t, 3, "stage=2 allgather_bucket_size=1000000", LOOPBACK_DEFERRED);
    cr_assert_eq(r.rank[0].forward_in_flight[0], 0, "one all_gather is waited for at once");
    harness_free(&r);
  }
  toy_free(t);
}

/* The last stages are read first, the tied unit by both ends: gathers follow the stages, not the model. */
Test(zero, weights_are_gathered_in_the_order_of_the_stages, .timeout = 60) {
  toy *t = toy_new();
  for (int u = 0; u < 5; u++) {
    static const char *const names[] = {"a", "b", "c", "d", "e"};
    toy_unit(t, names[u]), toy_param(t, 50, 40 + u, PHX_PARAM_DECAY), toy_param(t, 1, 600, 0);
  }
  static const uint32_t order[] = {3, 4, 1, 0, 2};
  for (int s = 0; s < 5; s++) {
    toy_stage(t, "s"), toy_use(t, order[s], TOY_RW);
    if (s == 4) toy_use(t, order[0], TOY_RW);
  }
  toy_finish(t);
  harness_result r = measured(t, 3, "stage=1 allgather_bucket_size=1024", LOOPBACK_DEFERRED);
  int64_t later = t->elements[0] / PHX_BLOCK;
  for (int s = 0; s < 5; s++) {
    later -= t->units[order[s]].blocks[0];
    cr_assert_eq(r.rank[1].forward_in_flight[s], later, "stage %d: %lld in flight", s,
                 (long long)r.rank[1].forward_in_flight[s]);
  }
  harness_free(&r);
  for (int stage = 1; stage <= 3; stage++)
    for (int bucket = 1024; bucket < 10000; bucket += 2500) {
      char options[120];
      snprintf(options, sizeof options, "stage=%d allgather_bucket_size=%d stage3_param_persistence_threshold=700",
               stage, bucket);
      expect_good(&(harness_config){.strategy = "zero",
                                    .toy = t,
                                    .ranks = 3,
                                    .options = options,
                                    .steps = 3,
                                    .discard_step = 2,
                                    .discard_early = bucket > 5000,
                                    .evaluate = true,
                                    .stream_mode = LOOPBACK_DEFERRED});
    }
  toy_free(t);
}

/* A window is taken over when its own last bucket was reduced, and nothing later is waited for: with buckets smaller
 * than a unit, a unit's reductions are still in flight when the next unit's backward pass ends. */
Test(zero, reductions_have_a_stage_to_hide_behind, .timeout = 60) {
  toy *t = toy_plain(6, 64); /* layers of 5 blocks */
  harness_result r = measured(t, 2, "stage=2 reduce_bucket_size=1024", LOOPBACK_DEFERRED);
  cr_assert_geq(r.rank[0].most_in_flight, 10, "%lld", (long long)r.rank[0].most_in_flight);
  cr_assert_leq(r.rank[0].peak[PHX_MEM_GATHERED], 3 * 5 * PHX_BLOCK * 4);
  harness_free(&r);
  toy_free(t);
}

Test(zero, overlap_comm_decides_whether_reductions_are_waited_for, .timeout = 60) {
  toy *t = toy_plain(6, 64);
  harness_result no = measured(t, 2, "stage=2 overlap_comm=no reduce_bucket_size=5000", LOOPBACK_DEFERRED);
  harness_result yes = measured(t, 2, "stage=2 overlap_comm=yes reduce_bucket_size=5000", LOOPBACK_DEFERRED);
  cr_assert_eq(no.rank[0].most_in_flight, 0);
  cr_assert_gt(yes.rank[0].most_in_flight, 0);
  cr_assert_lt(no.rank[0].peak[PHX_MEM_GATHERED], yes.rank[0].peak[PHX_MEM_GATHERED]);
  cr_assert_eq(no.hash[PHX_STATE_WEIGHT], yes.hash[PHX_STATE_WEIGHT]);
  harness_free(&no);
  harness_free(&yes);
  toy_free(t);
}

Test(zero, param_persistence_threshold_keeps_small_parameters_whole, .timeout = 60) {
  toy *t = toy_plain(4, 64); /* vectors of 64, matrices of 1856 and more */
  harness_result none = measured(t, 3, "stage=3 stage3_param_persistence_threshold=64", LOOPBACK_THREADS);
  harness_result small = measured(t, 3, "stage=3 stage3_param_persistence_threshold=65", LOOPBACK_THREADS);
  harness_result all = measured(t, 3, "stage=3", LOOPBACK_THREADS);
  cr_assert_eq(gathered(&none.rank[0], -1, -1), 0, "nothing to refresh");
  cr_assert_eq(gathered(&small.rank[0], -1, -1), 4 * 64, "the vectors are refreshed after the update");
  cr_assert_lt(gathered(&small.rank[0], PHX_PASS_FORWARD, -1), gathered(&none.rank[0], PHX_PASS_FORWARD, -1));
  cr_assert_gt(small.rank[0].peak[PHX_MEM_WEIGHT], none.rank[0].peak[PHX_MEM_WEIGHT]);
  for (int pass = PHX_PASS_FORWARD; pass <= PHX_PASS_BACKWARD; pass++)
    cr_assert_eq(gathered(&all.rank[0], pass, -1), 0);
  harness_free(&none), harness_free(&small), harness_free(&all);
  toy_free(t);
}

Test(zero, prefetch_bucket_size_decides_how_much_is_gathered_ahead, .timeout = 60) {
  toy *t = toy_plain(6, 64); /* embed 2368, layers 4096 + 64, head 1856; a unit is gathered as one run */
  static const struct {
    const char *options;
    int64_t first, second; /* gathered in the acquires of the first two stages */
  } cases[] = {
      {"stage=3 stage3_param_persistence_threshold=0 stage3_prefetch_bucket_size=0", 2368, 4160},
      {"stage=3 stage3_param_persistence_threshold=0 stage3_prefetch_bucket_size=1", 2368 + 4160, 4160},
      {"stage=3 stage3_param_persistence_threshold=0 stage3_prefetch_bucket_size=10000", 2368 + 2 * 4160, 4160},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    harness_result r = measured(t, 2, cases[i].options, LOOPBACK_DEFERRED);
    cr_assert_eq(gathered(&r.rank[0], PHX_PASS_FORWARD, 0), cases[i].first, "%s", cases[i].options);
    cr_assert_eq(gathered(&r.rank[0], PHX_PASS_FORWARD, 1), cases[i].second, "%s", cases[i].options);
    harness_free(&r);
  }
  toy_free(t);
}

Test(zero, max_live_parameters_bounds_what_is_gathered, .timeout = 60) {
  toy *t = toy_plain(6, 64); /* windows of 3, 6 x 5 and 2 blocks */
  static const char *const live[] = {"5120", "15360", "1000000"};
  int64_t sent[3], pool[3];
  char options[200];
  for (int i = 0; i < 3; i++) {
    snprintf(options, sizeof options,
             "stage=3 stage3_param_persistence_threshold=0 reduce_bucket_size=1 "
             "stage3_prefetch_bucket_size=0 overlap_comm=no stage3_max_live_parameters=%s",
             live[i]);
    harness_result r = measured(t, 2, options, LOOPBACK_THREADS);
    sent[i] = gathered(&r.rank[0], PHX_PASS_FORWARD, -1) + gathered(&r.rank[0], PHX_PASS_BACKWARD, -1);
    pool[i] = r.rank[0].peak[PHX_MEM_GATHERED];
    harness_free(&r);
  }
  int64_t numel = 2368 + 6 * 4160 + 1856;
  cr_assert_eq(sent[2], numel, "all fits: gathered once, kept from forward to backward");
  cr_assert_eq(sent[0], 2 * numel - 2368 - 1856,
               "room for one: the last stage stays, the embedding's backward reads none");
  cr_assert(sent[1] > sent[2] && sent[1] < sent[0]);
  cr_assert(pool[0] < pool[1] && pool[1] < pool[2]);
  cr_assert_leq(pool[0], (5120 + 2 * 5120) * 4, "one window of weights, and gradients");
  harness_result r;
  harness_config c = {.strategy = "zero",
                      .toy = t,
                      .ranks = 2,
                      .options = "stage=3 stage3_param_persistence_threshold=0 stage3_max_live_parameters=5119"};
  cr_assert_not(harness_run(&c, &r));
  cr_assert_eq(r.status, PHX_INVALID);
  cr_assert(strstr(r.message, "stage3_max_live_parameters = 5119 is too small: stage 'layer'"), "%s", r.message);
  harness_free(&r);
  toy_free(t);
}

Test(zero, sub_group_size_bounds_an_update, .timeout = 60) {
  toy *t = toy_plain(6, 64);
  for (int stage = 1; stage <= 3; stage++) {
    char options[100];
    snprintf(options, sizeof options, "stage=%d sub_group_size=3000", stage);
    harness_result r = measured(t, 2, options, LOOPBACK_THREADS);
    const harness_rank *k = &r.rank[0];
    int64_t end = 0;
    cr_assert_geq(k->n_tickets, 2 * (size_t)(t->elements[0] / 2 / 3000));
    for (size_t i = 0; i < k->n_tickets; i++) {
      int64_t at = toy_first(t, k->tickets[i].unit, 0) + k->tickets[i].first;
      if (i && k->tickets[i].step != k->tickets[i - 1].step) end = 0;
      cr_assert_leq(k->tickets[i].numel, 2048); /* rounded down to blocks */
      cr_assert_eq(at, end, "one group after the other");
      end = at + k->tickets[i].numel;
    }
    size_t many = k->n_tickets;
    harness_free(&r);
    snprintf(options, sizeof options, "stage=%d", stage);
    r = measured(t, 2, options, LOOPBACK_THREADS);
    cr_assert_lt(r.rank[0].n_tickets, many);
    harness_free(&r);
  }
  toy_free(t);
}

/* reduce = step sends once and keeps whole gradients; micro_batch sends each time and keeps shares. */
Test(zero, accumulation_is_planned, .timeout = 60) {
  toy *t = toy_plain(6, 64);
  int64_t sent[2], bytes[2];
  for (int mode = 0; mode < 2; mode++) {
    harness_config c = {
        .strategy = "zero", .toy = t, .ranks = 2, .options = "stage=2", .accumulate = 3, .reduce = mode};
    harness_result r;
    cr_assert(harness_run(&c, &r), "%s", r.message);
    sent[mode] = r.rank[0].sent[PHX_OP_REDUCE];
    bytes[mode] = r.rank[0].peak[PHX_MEM_GRADIENT];
    harness_free(&r);
  }
  cr_assert_eq(sent[1], 3 * sent[0]);
  cr_assert_geq(bytes[0], t->elements[0] * 4);
  cr_assert_leq(bytes[1], t->elements[0] * 4 / 2 + 4096);
  toy_free(t);
}

/* ---- faults and refusals ---- */

Test(zero, a_failed_allocation_leaves_nothing, .timeout = 120) {
  toy *t = toy_odd();
  for (int stage = 1; stage <= 3; stage++) {
    char options[100], message[640];
    snprintf(options, sizeof options, "stage=%d stage3_param_persistence_threshold=500", stage);
    harness_config c = {.strategy = "zero",
                        .toy = t,
                        .ranks = 3,
                        .options = options,
                        .accumulate = 2,
                        .reduce = PHX_REDUCE_MICRO_BATCH};
    int32_t n = harness_fail_allocations(c, 1, -1, message);
    cr_assert(n > 1 && n <= 20, "stage %d, %d: %s", stage, n, message);
  }
  toy_free(t);
}

static void expect_refused(harness_config c, phx_status status, const char *why) {
  harness_result r;
  cr_assert_not(harness_run(&c, &r), "%s", c.options);
  cr_assert_eq(r.status, status, "%s", r.message);
  cr_assert(strstr(r.message, why), "%s", r.message);
  for (int i = 0; i < c.ranks; i++) cr_assert_eq(r.rank[i].allocations, 0, "refused before anything is allocated");
  harness_free(&r);
}

Test(zero, what_does_not_fit_is_refused, .timeout = 60) {
  toy *t = toy_odd();
  harness_config c = {.strategy = "zero", .toy = t, .ranks = 2};
  c.options = "stage=4";
  expect_refused(c, PHX_INVALID, "stage = 4");
  c.options = "stage=0";
  expect_refused(c, PHX_INVALID, "stage = 0");
  c.options = "sub_group_size=1023";
  expect_refused(c, PHX_INVALID, "sub_group_size");
  c.options = "allgather_bucket_size=1023";
  expect_refused(c, PHX_INVALID, "allgather_bucket_size");
  c.options = "reduce_bucket_size=0";
  expect_refused(c, PHX_INVALID, "reduce_bucket_size");
  c.options = "stage=3 stage3_param_persistence_threshold=0 stage3_max_live_parameters=9000";
  expect_refused(c, PHX_INVALID, "stage3_max_live_parameters = 9000 is too small: stage 'big'");
  c.options = "stage=3";
  c.compute_dtype = PHX_F16;
  expect_refused(c, PHX_UNSUPPORTED, "compute has dtype 2");
  c.compute_dtype = PHX_F32;
  c.reduce_dtype = PHX_F16;
  expect_refused(c, PHX_UNSUPPORTED, "reduce has dtype 2");
  toy_free(t);
}
