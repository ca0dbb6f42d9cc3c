/* Optimizers through whole runs of the command: one that needs whole tensors, what is refused by name, keys of
 * [optimizer] that another optimizer has, checkpoints, and optimizers that are wrong. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

#define FROBENIUS PHX_TEST_ONLY_PLUGINS "/phx_optimizer_frobenius.so"
#define WRONG PHX_TEST_ONLY_PLUGINS "/phx_optimizer_wrong_optimizer.so"

static char *dir;
static void set_up(void) { cr_assert_not_null(dir = command_temp_dir()); }
static void tear_down(void) { command_remove_dir(dir); }
TestSuite(optimizer_runs, .init = set_up, .fini = tear_down, .timeout = 300);

static void files(const char *optimizer) {
  char extra[2048];
  snprintf(extra, sizeof extra, "%s\n%s", optimizer, training_odd_model);
  training_files(dir, extra);
}

static void expect(command_result r, int status, const char *message) {
  cr_expect_eq(r.status, status, "status %d, expected %d:\n%s", r.status, status, r.out);
  if (message) cr_expect(strstr(r.out, message), "it lacks '%s':\n%s", message, r.out);
  command_free(&r);
}

/* Weights, states, the plan (with the optimizer's workspace) and the traffic. */
Test(optimizer_runs, whole_tensors_have_the_same_bits_wherever_they_are_whole) {
  files("name = " FROBENIUS);
  for (int ranks = 1; ranks <= 3; ranks++) {
    char n[8], out[32];
    snprintf(n, sizeof n, "%d", ranks);
    snprintf(out, sizeof out, "run.out=out%d", ranks);
    command_result r = RUN(dir, 200, "compare", "run.ini", "-n", n, "--steps", "6", "--set", out, "--strategies",
                           "ddp,ddp.bucket_bytes=100000+first_bucket_bytes=30000,fsdp.sharding=none");
    cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
    cr_expect(strstr(r.out, "equal bits: 3 strategies"), "%s", r.out);
    cr_expect(strstr(r.out, "plan kept"), "%s", r.out);
    command_free(&r);
  }
}

Test(optimizer_runs, what_is_not_kept_whole_is_refused_before_a_rank_starts) {
  static const char *const cutting[][2] = {{"fsdp", "run.ranks=2"}, {"fsdp", "fsdp.sharding=grad_op"},
                                           {"zero", "zero.stage=1"}, {"zero", "zero.stage=3"}};
  files("name = " FROBENIUS);
  for (size_t i = 0; i < sizeof cutting / sizeof *cutting; i++) {
    char message[200];
    snprintf(message, sizeof message,
             "optimizer frobenius needs whole tensors, and strategy %s cuts to whole blocks here: choose a strategy "
             "that keeps whole tensors on a rank, such as ddp", cutting[i][0]);
    expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--strategy", cutting[i][0], "--set", cutting[i][1]), 2,
           message);
    expect(RUN(dir, 60, "check", "run.ini", "-n", "2", "--strategy", cutting[i][0], "--set", cutting[i][1]), 2,
           message);
  }
  cr_expect_null(training_json(dir, "out/run.json"), "a run was begun");
  expect(RUN(dir, 60, "train", "run.ini", "--strategy", PHX_TEST_ONLY_PLUGINS "/phx_strategy_bare.so"), 2,
         "optimizer frobenius needs whole tensors, and strategy bare cuts to single elements here");
  expect(RUN(dir, 60, "train", "run.ini", "--set", "precision.compute=bf16"), 2,
         "[precision] compute = bf16: optimizer frobenius updates fp32 weights only: use fp32");
}

/* hostile is ddp, and promises whole tensors. */
Test(optimizer_runs, a_promise_that_is_not_kept_is_found) {
  files("name = " FROBENIUS "\n[plugins]\npath = " PHX_TEST_ONLY_PLUGINS);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "1", "--strategy", "hostile", "--set",
             "hostile.misuse=none"), 0, NULL);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "1", "--strategy", "hostile", "--set",
             "hostile.misuse=ticket_cut", "--set", "run.out=cut"), 3,
         "strategy hostile: update: a ticket has elements 0 to 4099 of parameter wte.weight, which has 7710; optimizer "
         "frobenius needs whole tensors, and the strategy's estimate promises them");
}

Test(optimizer_runs, a_checkpoint_is_the_optimizers) {
  files("name = " FROBENIUS "\n[checkpoint]\nevery = 2\n");
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "4", "--set", "optimizer.schedule=constant"), 0, NULL);
  cJSON *json = training_json(dir, "out/run.json");
  cr_assert_str_eq(training_get(json, "plugins.optimizer.id")->valuestring, "frobenius");
  cJSON_Delete(json);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "6", "--resume", "--set",
             "optimizer.schedule=constant", "--set", "run.out=out"), 0, NULL);
  json = training_json(dir, "out/run.json");
  char *metrics = command_read_file(dir, "out/metrics.jsonl");
  cr_expect(metrics && strstr(metrics, "\"frobenius.norm\":"), "no number of the optimizer's in:\n%s", metrics);
  free(metrics);
  char *resumed = strdup(training_get(json, "result.state_hash")->valuestring);
  cJSON_Delete(json);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "6", "--set", "run.out=at_once", "--set",
             "optimizer.schedule=constant"), 0, NULL);
  json = training_json(dir, "at_once/run.json");
  cr_expect_str_eq(training_get(json, "result.state_hash")->valuestring, resumed);
  cJSON_Delete(json);
  free(resumed);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "8", "--resume", "--set", "optimizer.name=adamw"), 2,
         "was saved with optimizer.name = frobenius, and this run has adamw");
  expect(RUN(dir, 60, "sample", "out", "--tokens", "3"), 0, NULL); /* it needs no optimizer, and runs no code of one */
}

/* A file serves several optimizers: what another one has is checked, and not used. */
Test(optimizer_runs, keys_of_another_optimizer) {
  files("beta1 = 0.8\neps = 1e-8");
  expect(RUN(dir, 60, "train", "run.ini", "--steps", "1"), 0, NULL);
  expect(RUN(dir, 60, "train", "run.ini", "--steps", "1", "--set", "run.out=sgd", "--set", "optimizer.name=sgd"), 0,
         "warning: [optimizer] beta1 is an option of adamw; sgd, which is chosen, does not use it");
  expect(RUN(dir, 60, "check", "run.ini", "--set", "optimizer.name=sgd", "--set", "optimizer.beta2=2"), 2,
         "[optimizer] '2' is not valid for beta2");
  expect(RUN(dir, 60, "check", "run.ini", "--set", "optimizer.beta3=0.5"), 2,
         "[optimizer] has no key 'beta3': did you mean 'beta1'?");
  expect(RUN(dir, 60, "check", "run.ini", "--set", "optimizer.momentum=0.5"), 2, "[optimizer] has no key 'momentum'");
  expect(RUN(dir, 60, "check", "run.ini", "--set", "optimizer.name=adam"), 2,
         "[optimizer] name: there is no optimizer plugin 'adam' (found: adamw, sgd): did you mean 'adamw'?");
  expect(RUN(dir, 60, "help", "adamw"), 0, "[optimizer]");
  expect(RUN(dir, 60, "help", FROBENIUS), 0, "momentum");
  expect(RUN(dir, 60, "plugins"), 0, "optimizer  adamw");
}

Test(optimizer_runs, wrong_ones_are_refused_by_name) {
  static const struct {
    const char *wrong, *message;
    int status;
  } cases[] = {
      {"nothing", "", 0},
      {"grain", "optimizer wrong_optimizer: describe gave 1 states and grain 4", 2},
      {"states", "optimizer wrong_optimizer: describe gave 9 states and grain 0", 2},
      {"name", "optimizer wrong_optimizer: the name of state 0 is not of the form [a-z0-9_]{1,32}", 2},
      {"twice", "optimizer wrong_optimizer: state 1 is called 'm', which is the name of another state", 2},
      {"taken", "optimizer wrong_optimizer: state 0 is called 'weight', which is the name of another state", 2},
      {"dtype", "optimizer wrong_optimizer: state 'm' has dtype 77, and one value per 0: not known", 2},
      {"bytes", "optimizer wrong_optimizer: state 'm' has dtype 7 and one value per element: checkpoints and state "
                "hashes of this version hold fp32", 2},
      {"blocks", "optimizer wrong_optimizer: state 'm' has dtype 1 and one value per block", 2},
      {"grown", "and struct_size 152 of 144", 2},
      {"refuses", "the value of wrong is wrong", 2},
      {"crashes", "in describe", 2},
      {"workspace", "optimizer wrong_optimizer plans -5 bytes of workspace", 2},
      {"whole_blocks", "", 0}, /* as zero cuts them */
      {"rows", "optimizer wrong_optimizer needs whole rows, and strategy zero cuts to whole blocks here", 2},
      {"no_self", "optimizer wrong_optimizer: create gave nothing (*out is NULL) and PHX_OK", 3},
      {"plan", "warn: the plan was not kept: rank 0: workspace: ", 0},
      {"update_fails", "optimizer wrong_optimizer: update failed with", 3},
      {"update_crashes", "optimizer wrong_optimizer: update", 3},
  };
  files("name = " WRONG);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char wrong[64], out[64];
    snprintf(wrong, sizeof wrong, "optimizer.wrong=%s", cases[i].wrong);
    snprintf(out, sizeof out, "run.out=%s", cases[i].wrong);
    expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "2", "--strategy", "zero", "--set", wrong, "--set",
               out), cases[i].status, cases[i].message);
  }
}
