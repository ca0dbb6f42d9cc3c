/* ddp on the harness: the reference's bits, planned = measured, and what each option does. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "harness.h"

static void expect_good(const harness_config *c) {
  harness_result r;
  bool good = harness_run(c, &r);
  cr_assert(good, "ddp %s ranks %d accumulate %d reduce %d: %s", c->options ? c->options : "", c->ranks,
            c->accumulate, c->reduce, r.message);
  harness_free(&r);
}

static const int all_ranks[] = {1, 2, 3, 4, 5, 7};

/* At least 5 buckets over 30 blocks, with borders inside units; accumulation 1 and 3 in both modes. */
Test(ddp, bits_equal_the_reference, .timeout = 120) {
  toy *t = toy_odd();
  for (size_t i = 0; i < sizeof all_ranks / sizeof *all_ranks; i++)
    for (int mode = 0; mode < 3; mode++)
      for (int deferred = 0; deferred < 2; deferred++)
        expect_good(&(harness_config){.strategy = "ddp", .replicas = true, .toy = t, .ranks = all_ranks[i], .steps = 2,
                                      .options = "bucket_bytes=20000 first_bucket_bytes=4096",
                                      .accumulate = mode ? 3 : 1, .reduce = mode == 2, .evaluate = mode == 0,
                                      .recompute = mode == 1,
                                      .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
  toy_free(t);
}
