/* tests/support/training_check.c - the checks of training.h, which need Criterion. */
#include <criterion/criterion.h>

#include "training.h"

static void check_equal(const cJSON *group, const char *a, const char *b, const char *what) {
  const cJSON *item;
  cJSON_ArrayForEach(item, group) {
    const cJSON *x = cJSON_GetObjectItemCaseSensitive(item, a), *y = cJSON_GetObjectItemCaseSensitive(item, b);
    cr_assert_gt(cJSON_GetArraySize(x), 0);
    for (int r = 0; r < cJSON_GetArraySize(x); r++)
      cr_assert_eq(cJSON_GetArrayItem(x, r)->valuedouble, cJSON_GetArrayItem(y, r)->valuedouble,
                   "%s: rank %d, %s: %s %.0f, %s %.0f", what, r, item->string, a, cJSON_GetArrayItem(x, r)->valuedouble,
                   b, cJSON_GetArrayItem(y, r)->valuedouble);
  }
}

void training_check_plan(const cJSON *result, const char *what) {
  const cJSON *calls = training_get(result, "steady_allocator_calls"), *item;
  cr_assert_not_null(training_get(result, "bytes.weights"), "%s: no bytes in the result", what);
  check_equal(training_get(result, "bytes"), "planned", "measured", what);
  check_equal(training_get(result, "sent"), "planned", "measured", what);
  check_equal(training_get(result, "sent"), "calls_planned", "calls_measured", what);
  cr_assert_gt(cJSON_GetArraySize(calls), 0);
  cJSON_ArrayForEach(item, calls) cr_assert_eq(item->valuedouble, 0, "%s: the steady state allocates", what);
}
