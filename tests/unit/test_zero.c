/* zero on the harness: the reference's bits, planned = measured, and what each option does. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "harness.h"

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
  for (int i = 0; i < N_RANKS; i++)
    for (int mode = 0; mode < 3; mode++)
      for (int deferred = 0; deferred < 2; deferred++) {
        snprintf(options, sizeof options,
                 "stage=%d reduce_bucket_size=5000 allgather_bucket_size=%d overlap_comm=%s sub_group_size=3000 "
                 "stage3_param_persistence_threshold=%d stage3_prefetch_bucket_size=%d",
                 stage, i % 2 ? 6000 : 500000000, (i + deferred) % 2 ? "yes" : "no", i % 3 * 500,
                 mode == 1 ? 0 : 8000);
        expect_good(&(harness_config){.strategy = "zero", .toy = t, .ranks = all_ranks[i], .steps = 2,
                                      .options = options, .accumulate = mode ? 3 : 1, .reduce = mode == 2,
                                      .evaluate = mode == 0, .recompute = mode == 1, .sgd = i == 3,
                                      .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
      }
  toy_free(t);
}
Test(zero, stage1_has_the_references_bits, .timeout = 120) { expect_bits(1); }
Test(zero, stage2_has_the_references_bits, .timeout = 120) { expect_bits(2); }
Test(zero, stage3_has_the_references_bits, .timeout = 120) { expect_bits(3); }
