/* Known memory at GPT-2 124M: what the plan says, what is allocated, and what the kernel counts. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "training.h"

static double planned_total(const cJSON *result, int rank) {
  const cJSON *kind;
  double sum = 0;
  cJSON_ArrayForEach(kind, training_get(result, "bytes")) sum +=
      cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(kind, "planned"), rank)->valuedouble;
  return sum;
}

static double all_ranks(const cJSON *result) {
  double sum = 0;
  for (int r = 0; r < 4; r++) sum += planned_total(result, r);
  return sum;
}

Test(memory, planned_and_counted_at_124M, .timeout = 580) {
  char *dir = command_temp_dir();
  training_files(dir, "[batch]\nmicro = 1\nsequence = 64\n[model]\nplugin = gpt\nsize = 124M\n");
  command_result r = RUN(dir, 560, "compare", "run.ini", "-n", "4", "--steps", "2", "--set", "optimizer.warmup=0",
                         "--strategies", "ddp,fsdp,zero.stage=3");
  cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
  cJSON *json = training_json(dir, "out/compare.json");
  cr_assert(cJSON_IsTrue(training_get(json, "equal_bits")), "%s", r.out);
  const cJSON *list = training_get(json, "strategies"), *s;
  const double ddp = all_ranks(cJSON_GetArrayItem(list, 0));
  cJSON_ArrayForEach(s, list) {
    const char *name = training_get(s, "strategy")->valuestring;
    training_check_plan(s, name);
    for (int rank = 0; rank < 4; rank++) {
      const double plan = planned_total(s, rank),
                   pss = cJSON_GetArrayItem(training_get(s, "peak_pss"), rank)->valuedouble;
      cr_assert_leq(pss, 1.10 * plan + 96 * 1048576.0, "%s, rank %d: Pss %.0f, planned %.0f", name, rank, pss, plan);
      cr_assert_geq(pss, 0.5 * plan, "%s, rank %d: Pss %.0f was not sampled while memory was in use", name, rank, pss);
    }
    if (strcmp(name, "ddp")) cr_assert_leq(all_ranks(s), 0.55 * ddp, "%s: %.3f of ddp", name, all_ranks(s) / ddp);
  }
  cJSON_Delete(json);
  command_free(&r);
  command_remove_dir(dir);
}
