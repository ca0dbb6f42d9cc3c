/* fileopt: optimizer states in a file, mapped slice by slice, give the reference's bits. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include "harness.h"

static const char plugin[] = PHX_TEST_ONLY_PLUGINS "/phx_strategy_fileopt.so";

Test(fileopt, bits_equal_the_reference, .timeout = 60) {
  toy *t = toy_odd();
  static const int ranks[] = {1, 2, 3, 5, 7};
  for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++)
    for (int mode = 0; mode < 3; mode++) {
      harness_result r;
      harness_config c = {.strategy = plugin,
                          .toy = t,
                          .ranks = ranks[i],
                          .accumulate = mode ? 3 : 1,
                          .reduce = mode == 2,
                          .evaluate = true,
                          .sgd = i == 2,
                          .discard_step = i == 1 ? 2 : 0,
                          .steps = 3,
                          .options = mode ? "slice_blocks=1" : "slice_blocks=3"};
      cr_assert(harness_run(&c, &r), "ranks %d mode %d: %s", ranks[i], mode, r.message);
      cr_assert_eq(r.rank[0].peak[PHX_MEM_OPTIMIZER], 0, "states are in the file");
      cr_assert_leq(r.rank[0].peak[PHX_MEM_BUFFER], 4 * 3 * PHX_BLOCK * 4, "and pass through bounded memory");
      for (size_t k = 0; k < r.rank[0].n_tickets; k++)
        cr_assert_leq(r.rank[0].tickets[k].numel, (mode ? 1 : 3) * PHX_BLOCK);
      harness_free(&r);
    }
  toy_free(t);
}

Test(fileopt, a_failed_allocation_leaves_nothing, .timeout = 60) {
  toy *t = toy_plain(2, 64);
  char message[640];
  harness_config c = {.strategy = plugin, .toy = t, .ranks = 2};
  int32_t n = harness_fail_allocations(c, 1, 1, message);
  cr_assert(n > 1 && n < 10, "%d: %s", n, message);
  toy_free(t);
}

Test(fileopt, a_directory_that_cannot_be_written, .timeout = 60) {
  toy *t = toy_plain(2, 64);
  harness_result r;
  harness_config c = {.strategy = plugin, .toy = t, .ranks = 2};
  setenv("TMPDIR", "/proc/nowhere", 1);
  bool good = harness_run(&c, &r);
  unsetenv("TMPDIR");
  cr_assert_not(good);
  cr_assert_eq(r.status, PHX_IO, "%s", r.message);
  cr_assert(strstr(r.message, "cannot make a file in /proc/nowhere"), "%s", r.message);
  harness_free(&r);
  toy_free(t);
}
