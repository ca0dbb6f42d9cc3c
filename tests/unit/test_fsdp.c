/* fsdp on the harness: the reference's bits under every sharding, planned = measured, and what each option does. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "harness.h"
#include "meddle.h"
#include "sanitizer.h"
#include "base/status.h"

static void expect_good(const harness_config *c) {
  harness_result r;
  bool good = harness_run(c, &r);
  cr_assert(good, "fsdp %s ranks %d accumulate %d reduce %d deferred %d: %s", c->options ? c->options : "", c->ranks,
            c->accumulate, c->reduce, c->stream_mode, r.message);
  harness_free(&r);
}

static const int all_ranks[] = {1, 2, 3, 4, 5, 7};
static const char *const all_options[] = {"sharding=full",
                                          "sharding=grad_op",
                                          "sharding=none",
                                          "sharding=full prefetch=0",
                                          "sharding=full prefetch=4 max_gathered=3",
                                          "sharding=full reshard_after_forward=no prefetch=16"};

Test(fsdp, bits_equal_the_reference, .timeout = 120) {
  toy *t = toy_odd();
  const size_t first_ranks = UNDER_TSAN ? 2 : 0, ends_ranks = UNDER_TSAN ? 3 : sizeof all_ranks / sizeof *all_ranks;
  const int streams = UNDER_TSAN ? 1 : 2; /* deferred work has no thread */
  for (size_t i = first_ranks; i < ends_ranks; i++)
    for (size_t o = 0; o < sizeof all_options / sizeof *all_options; o++)
      for (int mode = 0; mode < 3; mode++)
        for (int deferred = 0; deferred < streams; deferred++)
          expect_good(&(harness_config){.strategy = "fsdp",
                                        .options = all_options[o],
                                        .toy = t,
                                        .ranks = all_ranks[i],
                                        .steps = 2,
                                        .accumulate = mode ? 3 : 1,
                                        .reduce = mode == 2,
                                        .evaluate = mode == 0,
                                        .replicas = o == 2,
                                        .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
  toy_free(t);
}

static void run_good(const harness_config *c, harness_result *r) {
  cr_assert(harness_run(c, r), "fsdp %s ranks %d: %s", c->options ? c->options : "", c->ranks, r->message);
}

/* Shards of a unit with fewer blocks than ranks are empty on some of them; models all frozen, and of one stage. */
Test(fsdp, empty_shards_frozen_models_sgd, .timeout = 60) {
  static const char *const shardings[] = {"sharding=full", "sharding=grad_op", "sharding=none"};
  toy *tiny = toy_new();
  uint32_t u = toy_unit(tiny, "one");
  toy_param(tiny, 1, 3, 0);
  toy_stage(tiny, "only"), toy_use(tiny, u, TOY_RW);
  toy_finish(tiny);
  toy *ice = toy_new();
  u = toy_unit(ice, "ice");
  toy_param(ice, 9, 301, PHX_PARAM_FROZEN);
  toy_stage(ice, "only"), toy_use(ice, u, PHX_USE_FORWARD | PHX_USE_BACKWARD);
  toy_finish(ice);
  for (int s = 0; s < 3; s++)
    for (int mode = 0; mode < 3; mode++) {
      harness_config c = {.strategy = "fsdp",
                          .options = shardings[s],
                          .toy = tiny,
                          .ranks = 7,
                          .replicas = s == 2,
                          .accumulate = mode ? 2 : 1,
                          .reduce = mode == 2,
                          .sgd = mode == 1};
      expect_good(&c);
      c.toy = ice;
      expect_good(&c);
    }
  toy_free(tiny);
  toy_free(ice);
}

Test(fsdp, skipped_steps_leave_nothing_behind, .timeout = 60) {
  toy *t = toy_odd();
  for (size_t o = 0; o < 3; o++)
    for (int early = 0; early < 2; early++)
      for (int mode = 0; mode < 3; mode++)
        expect_good(&(harness_config){.strategy = "fsdp",
                                      .options = all_options[o],
                                      .replicas = o == 2,
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

/* Recomputation reads what backward will read; a stage whose backward reads nothing cannot be recomputed. */
Test(fsdp, recompute, .timeout = 60) {
  toy *t = toy_new();
  for (int i = 0; i < 4; i++) {
    uint32_t u = toy_unit(t, "layer");
    toy_param(t, 30, 77, 0);
    toy_stage(t, "layer"), toy_use(t, u, TOY_RW);
  }
  toy_finish(t);
  for (size_t o = 0; o < sizeof all_options / sizeof *all_options; o++)
    expect_good(&(harness_config){.strategy = "fsdp",
                                  .options = all_options[o],
                                  .replicas = o == 2,
                                  .toy = t,
                                  .ranks = 3,
                                  .recompute = true,
                                  .stream_mode = LOOPBACK_DEFERRED});
  toy_free(t);
  t = toy_plain(3, 40);
  harness_result r;
  meddle how = {.recompute_all = true, .lost_stage = -1};
  harness_config c = {.plugin = meddle_plugin("fsdp", &how), .toy = t, .ranks = 2};
  cr_assert_not(harness_run(&c, &r));
  cr_assert_eq(r.status, PHX_UNSUPPORTED);
  cr_assert(strstr(r.message, "'embed'"), "%s", r.message);
  harness_free(&r);
  toy_free(t);
}

/* ---- options: toy_plain(6) has 8 units of 2 blocks; backward reads all but the embedding ---- */

/* Gathers of step 1, as "pass:stage" of the acquire that issued each; the most that one acquire issued. */
static int gathers(const harness_rank *k, int pass, int stage) {
  int n = 0;
  for (size_t i = 0; i < k->n_trace; i++) {
    const harness_call *call = &k->trace[i];
    if (call->step != 1 || call->op != PHX_OP_ALL_GATHER) continue;
    cr_assert(call->on_stream && call->in_acquire);
    if (call->pass == pass && call->stage == stage) n++;
  }
  return n;
}

Test(fsdp, prefetch_gathers_ahead, .timeout = 60) {
  toy *t = toy_plain(6, 40);
  for (int prefetch = 0; prefetch < 5; prefetch++) {
    char options[32];
    harness_result r;
    snprintf(options, sizeof options, "prefetch=%d", prefetch);
    run_good(&(harness_config){.strategy = "fsdp", .options = options, .toy = t, .ranks = 2}, &r);
    const harness_rank *k = &r.rank[0];
    cr_assert_eq(gathers(k, PHX_PASS_FORWARD, 0), 1 + prefetch);
    for (int s = 1; s < 8; s++) /* from then on one each: unit s + prefetch; near the end backward's units are there */
      cr_assert_eq(gathers(k, PHX_PASS_FORWARD, s), s + prefetch < 8, "prefetch %d stage %d", prefetch, s);
    cr_assert_eq(gathers(k, PHX_PASS_BACKWARD, 7), 0, "the last stage stays gathered between its passes");
    for (int s = 6; s > 0; s--) /* unit s - prefetch, if it is not the embedding */
      cr_assert_eq(gathers(k, PHX_PASS_BACKWARD, s), s - prefetch > 0, "prefetch %d stage %d", prefetch, s);
    cr_assert_eq(gathers(k, PHX_PASS_BACKWARD, 0), 0, "the embedding's backward gathers nothing");
    /* windows: the running unit, those ahead, and two gradients; returned to the pool */
    cr_assert_eq(k->planned.bytes[PHX_MEM_GATHERED], (1 + prefetch + 2) * 2 * 4096);
    harness_free(&r);
  }
  toy_free(t);
}

Test(fsdp, reductions_start_during_backward, .timeout = 60) {
  toy *t = toy_plain(6, 40);
  harness_result r;
  run_good(&(harness_config){.strategy = "fsdp", .toy = t, .ranks = 2}, &r);
  int n = 0;
  for (size_t i = 0; i < r.rank[0].n_trace; i++) {
    const harness_call *call = &r.rank[0].trace[i];
    if (call->step != 1 || call->op != PHX_OP_REDUCE_SCATTER) continue;
    cr_assert(call->on_stream && !call->in_acquire && call->pass == PHX_PASS_BACKWARD);
    cr_assert_eq(call->stage, 7 - n++);
  }
  cr_assert_eq(n, 8);
  harness_free(&r);
  toy_free(t);
}

Test(fsdp, sharding_and_reshard_after_forward_set_gathers_and_memory, .timeout = 60) {
  toy *t = toy_plain(6, 40);
  static const struct {
    const char *options;
    int64_t all_gather, reduce_scatter, all_reduce, units_gathered, share;
  } want[] = {{"sharding=full", 8 + 5, 8, 0, 2, 2},  // the last two are still there when backward begins
              {"sharding=full reshard_after_forward=no", 8, 8, 0, 8, 2},
              {"sharding=grad_op", 8, 8, 0, 8, 2},
              {"sharding=grad_op prefetch=0", 8, 8, 0, 7, 2},
              {"sharding=none", 0, 0, 8, 0, 1}};
  for (size_t i = 0; i < sizeof want / sizeof *want; i++)
    for (int accumulate = 1; accumulate < 4; accumulate += 2)
      for (int reduce = 0; reduce < 2; reduce++) {
        harness_config c = {.strategy = "fsdp",
                            .options = want[i].options,
                            .toy = t,
                            .ranks = 2,
                            .accumulate = accumulate,
                            .reduce = reduce,
                            .replicas = want[i].share == 1};
        harness_result r;
        run_good(&c, &r);
        const phx_estimate *e = &r.rank[1].planned;
        int64_t whole = 16 * 4096, reductions = reduce ? accumulate : 1;
        bool windows = want[i].share > 1 ? accumulate == 1 || reduce : accumulate > 1 && reduce;
        cr_assert_eq(e->calls[PHX_OP_ALL_GATHER], want[i].all_gather * accumulate, "%s", want[i].options);
        cr_assert_eq(e->calls[PHX_OP_REDUCE_SCATTER], want[i].reduce_scatter * reductions);
        cr_assert_eq(e->calls[PHX_OP_ALL_REDUCE], want[i].all_reduce * reductions);
        cr_assert_eq(e->bytes[PHX_MEM_WEIGHT], whole / want[i].share);
        cr_assert_eq(e->bytes[PHX_MEM_OPTIMIZER], 2 * whole / want[i].share);
        cr_assert_eq(e->bytes[PHX_MEM_GRADIENT], windows ? whole / want[i].share : whole);
        if (accumulate == 1 && want[i].share > 1)
          cr_assert(e->bytes[PHX_MEM_GATHERED] >= want[i].units_gathered * 8192);
        harness_free(&r);
      }
  toy_free(t);
}

Test(fsdp, max_gathered_bounds_what_is_in_flight, .timeout = 60) {
  toy *t = toy_plain(6, 40);
  for (int most = 1; most < 6; most++) {
    char options[64];
    harness_result r;
    snprintf(options, sizeof options, "prefetch=16 max_gathered=%d", most);
    run_good(
        &(harness_config){
            .strategy = "fsdp", .options = options, .toy = t, .ranks = 2, .stream_mode = LOOPBACK_DEFERRED},
        &r);
    cr_assert_eq(r.rank[0].planned.bytes[PHX_MEM_GATHERED], (most + 2) * 2 * 4096);
    cr_assert_eq(gathers(&r.rank[0], PHX_PASS_FORWARD, 0), most);
    harness_free(&r);
  }
  toy_free(t);
}

static void expect_refused(const toy *t, const char *options, int32_t dtype, phx_status code, const char *what) {
  harness_config c = {.strategy = "fsdp", .options = options, .toy = t, .ranks = 3, .compute_dtype = dtype};
  for (c.ranks = 1; c.ranks < 4; c.ranks += 2) {
    phx_estimate e = {.struct_size = sizeof e};
    phx_error err = PHX_ERROR_INIT;
    cr_assert_eq(harness_estimate(&c, 0, &e, &err), code, "%s at %d ranks: %s", options, c.ranks, err.message);
    cr_assert(strstr(err.message, what), "%s", err.message);
  }
}

Test(fsdp, what_does_not_fit_is_refused) {
  toy *t = toy_odd();
  expect_refused(t, "max_gathered=1", 0, PHX_INVALID, "needs 2 units"); /* stages big and head use two */
  expect_refused(t, "sharding=grad_op max_gathered=6", 0, PHX_INVALID, "needs 8 units");
  expect_refused(t, "sharding=none max_gathered=4", 0, PHX_INVALID, "gathers nothing");
  expect_refused(t, "sharding=none reshard_after_forward=no", 0, PHX_INVALID, "shards nothing");
  expect_refused(t, "", PHX_F16, PHX_UNSUPPORTED, "compute");
  toy_free(t);
}

Test(fsdp, one_rank_gathers_nothing, .timeout = 60) {
  toy *t = toy_plain(6, 40);
  phx_estimate e = {.struct_size = sizeof e};
  harness_config c = {.strategy = "fsdp", .toy = t, .ranks = 1};
  cr_assert_eq(harness_estimate(&c, 0, &e, NULL), PHX_OK);
  cr_assert_eq(e.bytes[PHX_MEM_GATHERED], 0);
  cr_assert_eq(e.calls[PHX_OP_ALL_GATHER], 0);
  toy_free(t);
}

Test(fsdp, what_accumulation_costs_is_said_once, .timeout = 60) {
  toy *t = toy_plain(6, 40); /* 64 KiB of gradients */
  meddle how = {.lost_stage = -1};
  static const char *const want[2] = {"keeps whole gradients, 0.1 MiB (4 bytes a parameter)",
                                      "are sent 3 times a step"};
  for (int reduce = 0; reduce < 2; reduce++) {
    harness_config c = {.plugin = meddle_plugin("fsdp", &how), .toy = t, .ranks = 3, .accumulate = 3, .reduce = reduce};
    expect_good(&c);
    cr_assert(strstr(meddle_log(), want[reduce]), "%s", meddle_log());
    cr_assert_eq(strchr(meddle_log(), '\n')[1], 0, "more than one line: %s", meddle_log());
  }
  harness_config quiet = {.plugin = meddle_plugin("fsdp", &how), .toy = t, .ranks = 3};
  expect_good(&quiet);
  cr_assert_str_eq(meddle_log(), "");
  toy_free(t);
}

/* ---- hosts that break the rules, and one that does not pass frozen stages in backward ---- */

Test(fsdp, frozen_stages_may_be_passed_over_in_backward, .timeout = 60) {
  toy *t = toy_new();
  for (int i = 0; i < 5; i++) {
    bool ice = i == 0 || i == 2;
    uint32_t u = toy_unit(t, ice ? "ice" : "layer");
    toy_param(t, 20, 77, ice ? PHX_PARAM_FROZEN : 0);
    toy_stage(t, "stage"), toy_use(t, u, ice ? PHX_USE_FORWARD : TOY_RW);
  }
  toy_finish(t);
  meddle how = {.skip_backward = true, .lost_stage = -1};
  for (size_t o = 0; o < sizeof all_options / sizeof *all_options; o++)
    expect_good(&(harness_config){.plugin = meddle_plugin("fsdp", &how),
                                  .options = all_options[o],
                                  .replicas = o == 2,
                                  .toy = t,
                                  .ranks = 3,
                                  .accumulate = 2,
                                  .reduce = PHX_REDUCE_MICRO_BATCH,
                                  .stream_mode = LOOPBACK_DEFERRED});
  toy_free(t);
}

static void expect_broken(const meddle *how, const char *what) {
  toy *t = toy_odd();
  harness_result r;
  harness_config c = {.plugin = meddle_plugin("fsdp", how), .toy = t, .ranks = 2};
  cr_assert_not(harness_run(&c, &r));
  cr_assert_eq(r.status, PHX_STATE, "%s", r.message);
  cr_assert(strstr(r.message, what), "%s", r.message);
  for (int k = 0; k < 2; k++) cr_assert_eq(r.rank[k].leaked_bytes, 0);
  harness_free(&r);
  toy_free(t);
}

Test(fsdp, broken_call_orders_are_refused_by_name, .timeout = 60) {
  expect_broken(&(meddle){.lost_flags = PHX_RELEASE_LAST_USE, .lost_stage = 3}, "'half'");
  expect_broken(&(meddle){.swap_forward = true, .lost_stage = -1}, "stage 'embed' comes out of order");
}

Test(fsdp, a_failing_allocation_leaks_nothing, .timeout = 60) {
  toy *t = toy_odd();
  char message[640];
  harness_config c = {
      .strategy = "fsdp", .toy = t, .ranks = 2, .accumulate = 2, .reduce = PHX_REDUCE_MICRO_BATCH};
  cr_assert_eq(harness_fail_allocations(c, -1, 1, message), 8, "seven regions, then nothing fails: %s", message);
  toy_free(t);
}
