/* fsdp on the harness: the reference's bits under every sharding, planned = measured, and what each option does. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "harness.h"

static void expect_good(const harness_config *c) {
  harness_result r;
  bool good = harness_run(c, &r);
  cr_assert(good, "fsdp %s ranks %d accumulate %d reduce %d deferred %d: %s", c->options ? c->options : "", c->ranks,
            c->accumulate, c->reduce, c->stream_mode, r.message);
  harness_free(&r);
}

static const int all_ranks[] = {1, 2, 3, 4, 5, 7};
static const char *const all_options[] = {"sharding=full", "sharding=grad_op", "sharding=none",
                                          "sharding=full prefetch=0", "sharding=full prefetch=4 max_gathered=3",
                                          "sharding=full reshard_after_forward=no prefetch=16"};

Test(fsdp, bits_equal_the_reference, .timeout = 120) {
  toy *t = toy_odd();
  for (size_t i = 0; i < sizeof all_ranks / sizeof *all_ranks; i++)
    for (size_t o = 0; o < sizeof all_options / sizeof *all_options; o++)
      for (int mode = 0; mode < 3; mode++)
        for (int deferred = 0; deferred < 2; deferred++)
          expect_good(&(harness_config){.strategy = "fsdp", .options = all_options[o], .toy = t,
                                        .ranks = all_ranks[i], .steps = 2, .accumulate = mode ? 3 : 1,
                                        .reduce = mode == 2, .evaluate = mode == 0,
                                        .replicas = o == 2,
                                        .stream_mode = deferred ? LOOPBACK_DEFERRED : LOOPBACK_THREADS});
  toy_free(t);
}
