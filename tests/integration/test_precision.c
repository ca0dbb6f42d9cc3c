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
  "ddp.bucket_bytes=100000+first_bucket_bytes=30000+broadcast_check=5,fsdp,fsdp.sharding=grad_op,"             \
  "fsdp.sharding=none,zero.stage=1+reduce_bucket_size=20000+allgather_bucket_size=17000,"                      \
  "zero.stage=2+reduce_bucket_size=20000,"                                                                     \
  "zero.stage=3+reduce_bucket_size=20000+stage3_param_persistence_threshold=100+sub_group_size=5000"
enum { N_STRATEGIES = 7 };

typedef struct precision_case {
  int ranks, accumulate;
  char reduce[16], compute[8], wire[8];
} precision_case;

ParameterizedTestParameters(precision, the_same_bits_under_every_strategy) {
  static precision_case cases[] = {{1, 1, "step", "fp32", "bf16"},        {2, 3, "step", "fp32", "bf16"},
                                   {3, 1, "step", "fp32", "bf16"},        {3, 2, "micro_batch", "fp32", "bf16"},
                                   {1, 2, "step", "bf16", "fp32"},        {2, 1, "step", "bf16", "fp32"},
                                   {3, 2, "micro_batch", "bf16", "fp32"}, {2, 2, "step", "bf16", "bf16"}};
  return cr_make_param_array(precision_case, cases, sizeof cases / sizeof *cases);
}

ParameterizedTest(precision_case *c, precision, the_same_bits_under_every_strategy, .timeout = 400) {
  char *dir = command_temp_dir(), extra[2048], ranks[8];
  snprintf(extra, sizeof extra,
           "[precision]\ncompute = %s\nreduce = %s\n%saccumulate = %d\nreduce = %s\n%sfreeze = h.1.*,wpe.*\n", c->compute,
           c->wire, "[batch]\n", c->accumulate, c->reduce, strchr(training_odd_model, '\n') + 1);
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
  double loss, sent;
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

/* Forty steps in both: bf16 rounds every activation, so the losses part, but by less than 0.02 nats of about 3. */
Test(precision, bf16_learns_what_fp32_learns, .timeout = 200) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  const trained full = train(dir, "precision.compute=fp32", "run.steps=40");
  const trained low = train(dir, "precision.compute=bf16", "run.steps=40");
  cr_assert_str_neq(low.hash, full.hash);
  cr_assert(low.loss != full.loss && fabs(low.loss - full.loss) < 0.02, "loss %.6f, in fp32 %.6f", low.loss, full.loss);
  command_remove_dir(dir);
}

/* A checkpoint holds the masters: it goes on in either precision, and what one wrote the other reads. */
Test(precision, checkpoints_go_on_in_either, .timeout = 300) {
  static const char *const kinds[] = {"fp32", "bf16"};
  char *dir = command_temp_dir();
  double losses[2][2];
  training_files(dir, training_odd_model);
  for (int from = 0; from < 2; from++) {
    char compute[64], out[32];
    snprintf(compute, sizeof compute, "precision.compute=%s", kinds[from]);
    snprintf(out, sizeof out, "run.out=from%d", from);
    command_result r = RUN(dir, 120, "train", "run.ini", "-n", "2", "--set", "run.steps=4", "--set",
                           "optimizer.schedule=constant", "--set", "checkpoint.every=4", "--set", compute, "--set", out);
    cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
    command_free(&r);
    for (int to = 0; to < 2; to++) {
      char again[64], resume[64], name[64];
      snprintf(compute, sizeof compute, "precision.compute=%s", kinds[to]);
      snprintf(again, sizeof again, "run.out=from%dto%d", from, to);
      snprintf(resume, sizeof resume, "from%d/checkpoints/step-00000004", from);
      r = RUN(dir, 120, "train", "run.ini", "-n", "2", "--strategy", "fsdp", "--set", "run.steps=6", "--set",
              "optimizer.schedule=constant", "--set", compute, "--set", again, "--resume", resume);
      cr_assert_eq(r.status, 0, "from %s to %s: status %d:\n%s", kinds[from], kinds[to], r.status, r.out);
      command_free(&r);
      snprintf(name, sizeof name, "from%dto%d/run.json", from, to);
      cJSON *json = training_json(dir, name);
      losses[from][to] = training_get(json, "result.loss")->valuedouble;
      cJSON_Delete(json);
    }
  }
  for (int from = 0; from < 2; from++)
    cr_expect(losses[from][0] != losses[from][1] && fabs(losses[from][0] - losses[from][1]) < 0.02,
              "from %s: %.6f in fp32, %.6f in bf16", kinds[from], losses[from][0], losses[from][1]);
  command_remove_dir(dir);
}

/* Strategies that were not written for it are told by name, before any rank starts. */
Test(precision, strategies_without_masters_are_refused, .timeout = 60) {
  static const char *const keys[] = {"compute", "reduce"}, *const names[] = {"bare", "fileopt", "pipeline"};
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int k = 0; k < 2; k++)
    for (int n = 0; n < 3; n++) {
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
