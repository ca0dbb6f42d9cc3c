/* pipeline: two ranks with half of the stages each give what one rank gives. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "harness.h"

static const char plugin[] = PHX_TEST_ONLY_PLUGINS "/phx_strategy_pipeline.so";

/* With one micro-batch every sum has two terms at most, so even the tied weight has one rank's bits. */
Test(pipeline, one_micro_batch_has_the_bits_of_one_rank, .timeout = 60) {
  toy *models[] = {toy_odd(), toy_plain(4, 65)};
  static const char *const options[] = {"", "cut=1", "cut=5"};
  for (int m = 0; m < 2; m++) {
    for (int i = 0; i < 3; i++) {
      harness_result r;
      harness_config c = {
          .strategy = plugin, .toy = models[m], .ranks = 2, .steps = 3, .options = options[i], .sgd = i == 2};
      cr_assert(harness_run(&c, &r), "model %d %s: %s", m, options[i], r.message);
      cr_assert_eq(harness_count(&r.rank[0], PHX_OP_SEND, 2, NULL), 1);
      cr_assert_eq(harness_count(&r.rank[0], PHX_OP_REDUCE, 2, NULL), m == 0, "the tied unit's gradient");
      if (i == 0) cr_assert_lt(r.rank[1].peak[PHX_MEM_WEIGHT], (models[m]->elements[0] + models[m]->elements[1]) * 4);
      harness_free(&r);
    }
    toy_free(models[m]);
  }
}

/* Several: the tied weight's two gradients are summed over micro-batches first; all others keep their bits. */
Test(pipeline, many_micro_batches_match_one_rank, .timeout = 60) {
  toy *t = toy_plain(4, 65);
  harness_result r;
  harness_config c = {.strategy = plugin, .toy = t, .ranks = 2, .accumulate = 5, .steps = 3};
  cr_assert(harness_run(&c, &r), "%s", r.message);
  cr_assert_eq(harness_count(&r.rank[1], PHX_OP_SEND, 1, NULL), 5);
  harness_free(&r);
  toy_free(t);
  t = toy_odd();
  c = (harness_config){
      .strategy = plugin, .toy = t, .ranks = 2, .accumulate = 4, .steps = 3, .sgd = false, .tolerance = 1e-6};
  cr_assert(harness_run(&c, &r), "%s", r.message);
  harness_free(&r);
  toy_free(t);
}

Test(pipeline, what_it_cannot_do_is_refused, .timeout = 60) {
  toy *t = toy_plain(2, 64);
  static const struct {
    int ranks, accumulate, reduce;
    const char *options, *why;
  } cases[] = {{3, 1, 0, "", "runs on 2 ranks"},
               {2, 3, 1, "", "set reduce = step"},
               {2, 1, 0, "cut=4", "leaves a rank without a stage"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    harness_result r;
    harness_config c = {.strategy = plugin,
                        .toy = t,
                        .ranks = cases[i].ranks,
                        .accumulate = cases[i].accumulate,
                        .reduce = cases[i].reduce,
                        .options = cases[i].options};
    cr_assert_not(harness_run(&c, &r));
    cr_assert(strstr(r.message, cases[i].why), "%s", r.message);
    harness_free(&r);
  }
  toy_free(t);
}

Test(pipeline, a_failed_allocation_leaves_nothing, .timeout = 60) {
  toy *t = toy_odd();
  char message[640];
  harness_config c = {.strategy = plugin, .toy = t, .ranks = 2};
  int32_t n = harness_fail_allocations(c, 0, 1, message);
  cr_assert(n > 1 && n < 20, "%d: %s", n, message);
  toy_free(t);
}
