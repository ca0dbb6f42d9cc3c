/* Mixed precision in every strategy: bf16 weights beside fp32 masters, and gradients that are bf16 on the wire.  What
 * the harness compares bit by bit is a plain fp32 run whose stages read rounded weights and whose reductions round. */
#include <criterion/criterion.h>
#include <string.h>
#include "harness.h"
#include "sanitizer.h"

typedef struct subject {
  const char *strategy, *options;
  bool replicas;
} subject;
static const subject subjects[] = {
    {"ddp", "bucket_bytes=8192 first_bucket_bytes=4096", true},
    {"fsdp", "sharding=full", false},
    {"fsdp", "sharding=full prefetch=4 max_gathered=3", false},
    {"fsdp", "sharding=grad_op", false},
    {"fsdp", "sharding=none", true},
    {"zero", "stage=1 reduce_bucket_size=4000", false},
    {"zero", "stage=2 reduce_bucket_size=2000 allgather_bucket_size=3000", false},
    {"zero", "stage=2 overlap_comm=no", false},
    {"zero", "stage=3 stage3_param_persistence_threshold=0 reduce_bucket_size=3000", false},
    {"zero", "stage=3 stage3_param_persistence_threshold=1100 stage3_prefetch_bucket_size=9000", false},
};
enum { SUBJECTS = sizeof subjects / sizeof *subjects };
static const struct {
  int32_t compute, reduce;
} precisions[] = {{PHX_BF16, PHX_F32}, {PHX_F32, PHX_BF16}, {PHX_BF16, PHX_BF16}};

static void run(const subject *s, const harness_config *base, harness_result *r) {
  harness_config c = *base;
  c.strategy = s->strategy;
  c.options = s->options;
  c.replicas = s->replicas;
  cr_assert(harness_run(&c, r), "%s %s ranks %d accumulate %d reduce %d mode %d compute %d reduce %d: %s", s->strategy,
            s->options, c.ranks, c.accumulate, c.reduce, c.stream_mode, c.compute_dtype, c.reduce_dtype, r->message);
}

/* Every strategy has the reference's bits, so all have ddp's. */
Test(precision, bits_equal_a_plain_mixed_run, .timeout = 240) {
  toy *t = toy_odd();
  for (size_t s = 0; s < SUBJECTS; s++)
    for (int p = 0; p < 3; p++)
      for (int ranks = 1; ranks <= 3; ranks++)
        for (int mode = 0; mode < 3; mode++)
          for (int deferred = 0; deferred < 2; deferred++) {
            harness_result r;
            if (UNDER_ASAN && deferred != (ranks + mode) % 2) continue; /* the same memory in both */
            run(&subjects[s],
                &(harness_config){.toy = t,
                                  .ranks = ranks,
                                  .steps = 3,
                                  .accumulate = mode ? 3 : 1,
                                  .reduce = mode == 2,
                                  .evaluate = mode == 0,
                                  .sgd = mode == 1,
                                  .discard_step = mode == 2 ? 2 : 0,
                                  .compute_dtype = precisions[p].compute,
                                  .reduce_dtype = precisions[p].reduce,
                                  .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS},
                &r);
            harness_free(&r);
          }
  toy_free(t);
}

/* What overhead is measured against, too. */
Test(precision, the_bare_loop, .timeout = 60) {
  toy *t = toy_plain(3, 50);
  const subject bare = {PHX_TEST_ONLY_PLUGINS "/phx_strategy_bare.so", "", true};
  harness_result r;
  run(&bare, &(harness_config){.toy = t, .ranks = 1, .compute_dtype = PHX_BF16}, &r);
  harness_free(&r);
  toy_free(t);
}

/* More ranks than blocks in some units. */
Test(precision, empty_shards_and_frozen_models, .timeout = 120) {
  toy *t = toy_odd(), *ice = toy_new();
  uint32_t u = toy_unit(ice, "ice");
  toy_param(ice, 9, 301, PHX_PARAM_FROZEN);
  toy_stage(ice, "only"), toy_use(ice, u, PHX_USE_FORWARD | PHX_USE_BACKWARD);
  toy_finish(ice);
  for (size_t s = 0; s < SUBJECTS; s++)
    for (int i = 0; i < 2; i++) {
      harness_result r;
      run(&subjects[s],
          &(harness_config){.toy = i ? ice : t, .ranks = 7, .compute_dtype = PHX_BF16, .reduce_dtype = PHX_BF16}, &r);
      harness_free(&r);
    }
  toy_free(t);
  toy_free(ice);
}

static void plan(const subject *s, const toy *t, int32_t compute, int32_t reduce, phx_estimate *e) {
  phx_error err = {.struct_size = sizeof err};
  harness_config c = {.strategy = s->strategy,
                      .options = s->options,
                      .toy = t,
                      .ranks = 3,
                      .compute_dtype = compute,
                      .reduce_dtype = reduce};
  cr_assert_eq(harness_estimate(&c, 1, e, &err), PHX_OK, "%s", err.message);
}

/* That the plan is what is measured, the harness has compared. */
Test(precision, halves_what_is_gathered_and_what_is_reduced) {
  toy *t = toy_plain(4, 64);
  for (size_t s = 0; s < SUBJECTS; s++) {
    phx_estimate full, low, wire;
    plan(&subjects[s], t, PHX_F32, PHX_F32, &full);
    plan(&subjects[s], t, PHX_BF16, PHX_F32, &low);
    plan(&subjects[s], t, PHX_F32, PHX_BF16, &wire);
    for (int op = 0; op < PHX_OPS; op++) {
      bool gathers = op == PHX_OP_ALL_GATHER || op == PHX_OP_BROADCAST;
      bool reduces = op == PHX_OP_REDUCE || op == PHX_OP_REDUCE_SCATTER || op == PHX_OP_ALL_REDUCE;
      if (gathers) cr_expect_eq(low.sent[op] * 2, full.sent[op], "%s %s", subjects[s].options, phx_op_name(op));
      if (reduces && full.sent[op])
        cr_expect_eq(wire.sent[op] * 2, full.sent[op], "%s %s", subjects[s].options, phx_op_name(op));
      cr_expect_eq(low.calls[op], full.calls[op]);
      cr_expect_eq(wire.calls[op], full.calls[op]);
    }
    cr_expect_eq(low.bytes[PHX_MEM_WEIGHT] * 2, full.bytes[PHX_MEM_WEIGHT], "%s", subjects[s].options);
    cr_expect(low.bytes[PHX_MEM_MASTER] > 0 && low.bytes[PHX_MEM_MASTER] <= full.bytes[PHX_MEM_WEIGHT]);
    cr_expect_eq(full.bytes[PHX_MEM_MASTER], 0);
    cr_expect_eq(low.bytes[PHX_MEM_GRADIENT], full.bytes[PHX_MEM_GRADIENT], "gradients stay fp32");
    cr_expect_eq(low.bytes[PHX_MEM_OPTIMIZER], full.bytes[PHX_MEM_OPTIMIZER]);
    cr_expect_eq(wire.bytes[PHX_MEM_WEIGHT], full.bytes[PHX_MEM_WEIGHT]);
    cr_expect_gt(wire.bytes[PHX_MEM_BUFFER], full.bytes[PHX_MEM_BUFFER], "staging is planned");
  }
  toy_free(t);
}

Test(precision, other_types_are_refused_by_name) {
  toy *t = toy_plain(1, 8);
  for (size_t s = 0; s < SUBJECTS; s++)
    for (int i = 0; i < 2; i++) {
      phx_estimate e;
      phx_error err = {.struct_size = sizeof err};
      harness_config c = {.strategy = subjects[s].strategy,
                          .options = subjects[s].options,
                          .toy = t,
                          .ranks = 2,
                          .compute_dtype = i ? PHX_F32 : PHX_F16,
                          .reduce_dtype = i ? PHX_F16 : PHX_F32};
      cr_assert_eq(harness_estimate(&c, 0, &e, &err), PHX_UNSUPPORTED);
      cr_assert(strstr(err.message, i ? "reduce has dtype 2" : "compute has dtype 2"), "%s", err.message);
    }
  toy_free(t);
}

static const phx_strategy_table *good; /* of the real plugin */
static phx_strategy_table stale;
static phx_status no_change(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}
/* The tests above can fail: low-precision weights that are not rounded again from their masters are found. */
Test(precision, stale_copies_are_found, .timeout = 60) {
  phx_error err = {.struct_size = sizeof err};
  toy *t = toy_plain(2, 30);
  for (size_t s = 0; s < SUBJECTS; s++) {
    const phx_plugin *p = harness_plugin(subjects[s].strategy, &err);
    cr_assert(p, "%s", err.message);
    phx_plugin descriptor = *p;
    good = p->table;
    stale = *good;
    stale.state_changed = no_change;
    descriptor.table = &stale;
    harness_result r;
    harness_config c = {.plugin = &descriptor,
                        .options = subjects[s].options,
                        .replicas = subjects[s].replicas,
                        .toy = t,
                        .ranks = 1,
                        .compute_dtype = PHX_BF16};
    cr_assert_not(harness_run(&c, &r));
    cr_assert(strstr(r.message, "low-precision weight"), "%s", r.message);
    harness_free(&r);
  }
  toy_free(t);
}
