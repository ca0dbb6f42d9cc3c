/* [precision] through whole runs: the same bits under every strategy, planned memory and traffic, what is announced and
 * what is refused. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

#define STRATEGIES                                                                                             \
  "ddp.bucket_bytes=100000+first_bucket_bytes=30000,fsdp,fsdp.sharding=grad_op,"                               \
  "fsdp.sharding=none,zero.stage=1+reduce_bucket_size=20000+allgather_bucket_size=17000,"                      \
  "zero.stage=2+reduce_bucket_size=20000,"                                                                     \
  "zero.stage=3+reduce_bucket_size=20000+stage3_param_persistence_threshold=100+sub_group_size=5000"
enum { N_STRATEGIES = 7 };

typedef struct precision_case {
  int ranks, accumulate;
  char reduce[16], compute[8], wire[8];
} precision_case;

ParameterizedTestParameters(precision, the_same_bits_under_every_strategy) {
  static precision_case cases[] = {{1, 1, "step", "fp32", "bf16"},
                                   {2, 3, "step", "fp32", "bf16"},
                                   {3, 1, "step", "fp32", "bf16"},
                                   {3, 2, "micro_batch", "fp32", "bf16"},
                                   {1, 2, "step", "bf16", "fp32"},
                                   {2, 1, "step", "bf16", "fp32"},
                                   {2, 3, "micro_batch", "bf16", "fp32"},
                                   {3, 3, "step", "bf16", "fp32"},
                                   {3, 1, "step", "bf16", "bf16"}};
  return cr_make_param_array(precision_case, cases, sizeof cases / sizeof *cases);
}

ParameterizedTest(precision_case *c, precision, the_same_bits_under_every_strategy, .timeout = 400) {
  char *dir = command_temp_dir(), extra[2048], ranks[8];
  snprintf(extra, sizeof extra,
           "[precision]\ncompute = %s\nreduce = %s\n%saccumulate = %d\nreduce = %s\n%sfreeze = h.1.*,wpe.*\n",
           c->compute, c->wire, "[batch]\n", c->accumulate, c->reduce, strchr(training_odd_model, '\n') + 1);
  training_files(dir, extra);
  snprintf(ranks, sizeof ranks, "%d", c->ranks);
  command_result r = RUN(dir, 380, "compare", "run.ini", "-n", ranks, "--strategies", STRATEGIES);
  cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
  cr_assert(strcmp(c->wire, "bf16") || strstr(r.out, "warning: [precision] reduce = bf16: each rank's gradients"), "%s",
            r.out);
  cJSON *json = training_json(dir, "out/compare.json");
  cr_assert(cJSON_IsTrue(training_get(json, "equal_bits")), "%s", r.out);
  const cJSON *list = training_get(json, "strategies"), *s;
  cr_assert_eq(cJSON_GetArraySize(list), N_STRATEGIES);
  cJSON_ArrayForEach(s, list) training_check_plan(s, training_get(s, "strategy")->valuestring);
  cJSON_Delete(json);
  command_free(&r);
  command_remove_dir(dir);
}

typedef struct trained {
  double loss, sent, weights, masters;
  char hash[40];
} trained;

/* A run of two ranks under ddp; sent: bytes of all_reduce in a step of rank 0. */
static trained train(const char *dir, const char *a, const char *b) {
  trained t;
  command_result r = RUN(dir, 120, "train", "run.ini", "-n", "2", "--set", "optimizer.lr=1e-3", "--set", a,
                         "--set", b);
  cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
  cJSON *json = training_json(dir, "out/run.json");
  t.loss = training_get(json, "result.loss")->valuedouble;
  t.sent = cJSON_GetArrayItem(training_get(json, "result.sent.all_reduce.measured"), 0)->valuedouble;
  t.weights = cJSON_GetArrayItem(training_get(json, "result.bytes.weights.measured"), 0)->valuedouble;
  t.masters = cJSON_GetArrayItem(training_get(json, "result.bytes.master.measured"), 0)->valuedouble;
  snprintf(t.hash, sizeof t.hash, "%s", training_get(json, "result.state_hash")->valuestring);
  cJSON_Delete(json);
  command_free(&r);
  return t;
}

Test(precision, a_bf16_wire_halves_the_traffic_and_changes_the_numbers_little, .timeout = 200) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  const trained full = train(dir, "precision.compute=fp32", "precision.reduce=fp32");
  const trained wire = train(dir, "precision.compute=fp32", "precision.reduce=bf16");
  cr_assert_eq(wire.sent * 2, full.sent, "%.0f and %.0f bytes", wire.sent, full.sent);
  cr_assert_str_neq(wire.hash, full.hash);
  cr_assert(wire.loss != full.loss && fabs(wire.loss - full.loss) < 0.002,
            "loss %.6f, in fp32 %.6f", wire.loss, full.loss);
  command_remove_dir(dir);
}

/* Weights are half, what is gathered is half, masters come to it; the loss stays with fp32's. */
Test(precision, bf16_trains_as_fp32_does, .timeout = 200) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  const trained full = train(dir, "precision.compute=fp32", "run.steps=60");
  const trained low = train(dir, "precision.compute=bf16", "run.steps=60");
  cr_assert_eq(low.sent, full.sent, "gradients are fp32");
  cr_assert_eq(low.weights * 2, full.weights, "%.0f and %.0f bytes", low.weights, full.weights);
  cr_assert_eq(low.masters, full.weights);
  cr_assert_eq(full.masters, 0);
  cr_assert_str_neq(low.hash, full.hash);
  cr_assert(low.loss != full.loss && fabs(low.loss - full.loss) < 0.005, "loss %.6f, in fp32 %.6f", low.loss,
            full.loss);
  command_remove_dir(dir);
}

/* ---- state is the masters', and they are fp32 ---- */

/* A run of 2 ranks with checkpoints; its state hash. */
static void train_and_hash(const char *dir, const char *out, const char *strategy, const char *compute,
                           const char *steps, const char *resume, char hash[40]) {
  char sets[3][128], name[256];
  snprintf(sets[0], sizeof sets[0], "run.out=%s", out);
  snprintf(sets[1], sizeof sets[1], "precision.compute=%s", compute);
  snprintf(sets[2], sizeof sets[2], "run.steps=%s", steps);
  const char *const argv[] = {"phalanx", "train",  "run.ini", "-n",    "2",     "--strategy",
                              strategy,  "--set",  sets[0],   "--set", sets[1], "--set",
                              sets[2],   "--set",  "run.drift_every=4", resume ? "--resume" : NULL, resume, NULL};
  command_result r = command_run(dir, 120, argv);
  cr_assert_eq(r.status, 0, "%s %s %s: status %d:\n%s", out, strategy, compute, r.status, r.out);
  snprintf(name, sizeof name, "%s/run.json", out);
  cJSON *json = training_json(dir, name);
  snprintf(hash, 40, "%s", training_get(json, "result.state_hash")->valuestring);
  cJSON_Delete(json);
  command_free(&r);
}

static void expect(const char *dir, int status, const char *text, const char *const *argv) {
  command_result r = command_run(dir, 60, argv);
  cr_assert_eq(r.status, status, "status %d:\n%s", r.status, r.out);
  cr_assert(strstr(r.out, text), "no '%s' in:\n%s", text, r.out);
  command_free(&r);
}
#define EXPECT(dir, status, text, ...) \
  expect(dir, status, text, (const char *const[]){"phalanx", __VA_ARGS__, NULL})

static char *checkpointed(void) {
  char *dir = command_temp_dir();
  static char extra[1024];
  snprintf(extra, sizeof extra, "schedule = constant\n[checkpoint]\nevery = 5\nkeep = 0\n%s", training_odd_model);
  training_files(dir, extra);
  return dir;
}

Test(precision, resumed_is_uninterrupted_across_strategies, .timeout = 300) {
  static const char *const strategies[] = {"ddp", "fsdp", "zero"};
  char *dir = checkpointed(), whole[40], again[40], out[32];
  train_and_hash(dir, "whole", "ddp", "bf16", "10", NULL, whole);
  for (int s = 0; s < 3; s++) {
    snprintf(out, sizeof out, "again%d", s);
    train_and_hash(dir, out, strategies[s], "bf16", "10", "whole/checkpoints/step-00000005", again);
    cr_assert_str_eq(again, whole, "%s", strategies[s]);
  }
  command_remove_dir(dir);
}

Test(precision, checkpoints_go_from_one_to_the_other, .timeout = 300) {
  char *dir = checkpointed(), low[40], full[40], there[40], back[40];
  train_and_hash(dir, "low", "zero", "bf16", "5", NULL, low);
  train_and_hash(dir, "full", "fsdp", "fp32", "5", NULL, full);
  cr_assert_str_neq(low, full);
  /* Nothing is left to do: the state that was read. */
  train_and_hash(dir, "there", "fsdp", "fp32", "5", "low", there);
  cr_assert_str_eq(there, low, "masters are what an fp32 run's weights are");
  train_and_hash(dir, "back", "ddp", "bf16", "5", "full", back);
  cr_assert_str_eq(back, full);
  /* And they train on. */
  train_and_hash(dir, "on32", "ddp", "fp32", "10", "low", there);
  train_and_hash(dir, "on16", "fsdp", "bf16", "10", "full", back);
  cr_assert(strcmp(there, low) && strcmp(back, full));
  EXPECT(dir, 0, "whole", "checkpoint", "verify", "low");
  EXPECT(dir, 0, "  5  zero", "checkpoint", "ls", "low");
  EXPECT(dir, 0, "equal:", "checkpoint", "diff", "there/checkpoints/step-00000005", "low");
  EXPECT(dir, 0, "tensors of step 5", "checkpoint", "export", "low", "hf");
  EXPECT(dir, 0, "tensors of step 5", "checkpoint", "export", "there", "hf32");
  EXPECT(dir, 0, "equal:", "checkpoint", "diff", "hf/model.safetensors", "hf32/model.safetensors");
  EXPECT(dir, 0, "equal:", "checkpoint", "diff", "low/model.safetensors", "low", "--weights");
  EXPECT(dir, 0, "\n", "sample", "low", "--tokens", "3");
  command_remove_dir(dir);
}

/* Strategies that were not written for it are told by name, before any rank starts. */
Test(precision, strategies_without_masters_are_refused, .timeout = 60) {
  static const char *const keys[] = {"compute", "reduce"}, *const names[] = {"fileopt", "pipeline"};
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int k = 0; k < 2; k++)
    for (int n = 0; n < 2; n++) {
      char set[64], want[160], strategy[4200];
      snprintf(set, sizeof set, "precision.%s=bf16", keys[k]);
      snprintf(want, sizeof want, "[precision] %s = bf16: strategy %s keeps and reduces fp32 only: use fp32", keys[k],
               names[n]);
      snprintf(strategy, sizeof strategy, "%s/phx_strategy_%s.so", PHX_TEST_ONLY_PLUGINS, names[n]);
      command_result r = RUN(dir, 60, "train", "run.ini", "-n", "2", "--strategy", strategy, "--set",
                             "run.deterministic=no", "--set", set);
      cr_assert_neq(r.status, 0);
      cr_assert(strstr(r.out, want), "no '%s' in:\n%s", want, r.out);
      command_free(&r);
    }
  command_remove_dir(dir);
}

static void expect_cost(const char *dir, const char *command, const char *compute, const char *message) {
  char set[64];
  snprintf(set, sizeof set, "precision.compute=%s", compute);
  command_result r = RUN(dir, 60, command, "run.ini", "-n", "2", "--set", "run.steps=1", "--set", set);
  cr_expect_eq(r.status, 0, "%s", r.out);
  const char *said = strstr(r.out, "bf16 instructions: products are widened to fp32: it saves memory and no time");
  cr_expect_eq(said != NULL, message != NULL, "%s: %s", command, r.out);
  cr_expect(!said || (strstr(r.out, message) && !strstr(said + 1, "bf16 instructions")), "%s", r.out);
  command_free(&r);
}

/* Where the processor cannot multiply bf16, start-up says what it costs: once for all ranks, before a step. */
Test(precision, start_up_says_what_bf16_costs, .timeout = 200) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16")) expect_cost(dir, "check", "bf16", NULL);
  setenv("PHALANX_ISA", "base", 1);
  expect_cost(dir, "check", "bf16", "warning: [precision] compute = bf16: ");
  expect_cost(dir, "train", "bf16", "warning: [precision] compute = bf16: ");
  expect_cost(dir, "check", "fp32", NULL);
  command_remove_dir(dir);
}
