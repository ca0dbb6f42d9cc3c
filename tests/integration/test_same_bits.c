/* The promise: the same bits under every strategy, at every world size, with accumulation in both reduce modes, and
 * with a model that divides by nothing.  Memory and traffic are as planned in every one of these runs. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <stdio.h>
#include <string.h>

#include "training.h"

/* Buckets so small that every run has at least five, some of them crossing units. */
#define STRATEGIES                                                                                             \
  "ddp.bucket_bytes=100000+first_bucket_bytes=30000,fsdp,fsdp.sharding=grad_op,fsdp.sharding=none,"            \
  "fsdp.prefetch=3+reshard_after_forward=no,zero.stage=1+reduce_bucket_size=20000+allgather_bucket_size=17000," \
  "zero.stage=2+reduce_bucket_size=20000+allgather_bucket_size=17000+overlap_comm=no,"                         \
  "zero.stage=3+reduce_bucket_size=20000+stage3_param_persistence_threshold=100+stage3_prefetch_bucket_size=30000+" \
  "sub_group_size=5000"
/* One rank that gathers and reduces as several do. */
#define ALONE                                                                                                  \
  "ddp.bucket_bytes=100000+first_bucket_bytes=30000,fsdp.gather_alone=yes,"                                    \
  "fsdp.sharding=grad_op+gather_alone=yes+prefetch=3,zero.stage=1+gather_alone=yes,"                           \
  "zero.stage=2+reduce_bucket_size=20000+allgather_bucket_size=17000+gather_alone=yes,"                        \
  "zero.stage=3+reduce_bucket_size=20000+stage3_param_persistence_threshold=100+gather_alone=yes"
enum { N_STRATEGIES = 8, N_ALONE = 6 };

typedef struct bits_case {
  int ranks, accumulate;
  char reduce[16];
  char compute[8]; /* of the runs with gather_alone; "": without */
} bits_case;

ParameterizedTestParameters(same_bits, every_strategy) {
  static bits_case cases[] = {{1, 1, "step", ""},     {1, 1, "step", "bf16"}, {1, 3, "step", "fp32"},
                              {1, 3, "micro_batch", "bf16"}, {2, 1, "step"}, {2, 3, "step"}, {2, 3, "micro_batch"},
                              {3, 1, "step"},        {3, 3, "step"}, {3, 3, "micro_batch"},
                              {4, 1, "step"},        {4, 3, "step"}, {4, 3, "micro_batch"},
                              {5, 1, "step"},        {5, 3, "step"}, {5, 3, "micro_batch"},
                              {7, 1, "step"},        {7, 3, "step"}, {7, 3, "micro_batch"}};
  return cr_make_param_array(bits_case, cases, sizeof cases / sizeof *cases);
}

ParameterizedTest(bits_case *c, same_bits, every_strategy, .timeout = 400) {
  char ranks[8], sets[3][64];
  const int alone = c->compute[0] != 0;
  char *dir = command_temp_dir();
  char extra[1024];
  /* a frozen unit, a frozen parameter in a trainable unit, blocks that some ranks skip in some micro-batches */
  snprintf(extra, sizeof extra, "%sfreeze = h.1.*,wpe.*,h.3.mlp.c_fc.bias\nlayer_drop = 0.2\n", training_odd_model);
  training_files(dir, extra);
  snprintf(ranks, sizeof ranks, "%d", c->ranks);
  snprintf(sets[0], sizeof sets[0], "batch.accumulate=%d", c->accumulate);
  snprintf(sets[1], sizeof sets[1], "batch.reduce=%s", c->reduce);
  snprintf(sets[2], sizeof sets[2], "precision.compute=%s", alone ? c->compute : "fp32");
  command_result r = RUN(dir, 380, "compare", "run.ini", "-n", ranks, "--set", sets[0], "--set", sets[1], "--set",
                         sets[2], "--strategies", alone ? ALONE : STRATEGIES);
  cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
  cJSON *json = training_json(dir, "out/compare.json");
  cr_assert(cJSON_IsTrue(training_get(json, "equal_bits")), "%s", r.out);
  const cJSON *list = training_get(json, "strategies"), *s;
  cr_assert_eq(cJSON_GetArraySize(list), alone ? N_ALONE : N_STRATEGIES);
  cJSON_ArrayForEach(s, list) {
    const char *name = training_get(s, "strategy")->valuestring;
    training_check_plan(s, name);
    const double windows = training_get(s, "bytes.gathered.measured")->child->valuedouble;
    if (alone && (strncmp(name, "fsdp", 4) == 0 || strstr(name, "stage=3"))) cr_assert_gt(windows, 0, "%s", name);
  }
  cJSON_Delete(json);
  command_free(&r);
  command_remove_dir(dir);
}
