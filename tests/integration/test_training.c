/* Whole runs through the command: N ranks against one, the control that must fail, strategies that take over the
 * schedule or keep their state in a file, sampling, and what a run leaves behind. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

enum { STEPS = 20 };

/* The losses of a run, from metrics.jsonl. */
static void read_losses(const char *dir, const char *out, double losses[STEPS]) {
  char name[256];
  snprintf(name, sizeof name, "%s/metrics.jsonl", out);
  char *text = command_read_file(dir, name), *at = text;
  cr_assert_not_null(text, "%s is missing", name);
  for (int i = 0; i < STEPS; i++) {
    at = strstr(at, "\"loss\":");
    cr_assert_not_null(at, "%s has fewer than %d steps", name, STEPS);
    losses[i] = strtod(at += 7, NULL);
  }
  free(text);
}

static void train(const char *dir, const char *out, const char *const *more) {
  const char *argv[40] = {"phalanx", "train", "run.ini", "--set", NULL};
  char set[256];
  int n = 4;
  snprintf(set, sizeof set, "run.out=%s", out);
  argv[n++] = set;
  for (; *more; more++) argv[n++] = *more;
  argv[n] = NULL;
  command_result r = command_run(dir, 120, argv);
  cr_assert_eq(r.status, 0, "%s: status %d:\n%s", out, r.status, r.out);
  command_free(&r);
}
#define TRAIN(dir, out, ...) train(dir, out, (const char *const[]){__VA_ARGS__, NULL})

static char *hash_of(const char *dir, const char *out) {
  char name[256];
  snprintf(name, sizeof name, "%s/run.json", out);
  cJSON *json = training_json(dir, name);
  const cJSON *hash = training_get(json, "result.state_hash");
  cr_assert_not_null(hash, "%s has no result", name);
  char *copy = strdup(hash->valuestring);
  cJSON_Delete(json);
  return copy;
}

Test(training, ranks_equal_one_rank, .timeout = 300) {
  char *dir = command_temp_dir();
  double one[STEPS], other[STEPS];
  training_files(dir, training_odd_model);
  const char *const sgd[] = {"--set", "optimizer.name=sgd", "--set", "optimizer.lr=3", "--set", "optimizer.clip=5"};
#define SGD sgd[0], sgd[1], sgd[2], sgd[3], sgd[4], sgd[5]
  TRAIN(dir, "one", SGD, "--set", "batch.micro=12");
  read_losses(dir, "one", one);
  cr_assert_lt(one[STEPS - 1], one[0] - 0.005, "nothing was learned: %g to %g", one[0], one[STEPS - 1]);
  const struct {
    const char *out, *ranks, *micro, *accumulate, *strategy;
  } cases[] = {{"accumulated", "1", "batch.micro=3", "batch.accumulate=4", "ddp"},
               {"two", "2", "batch.micro=6", "batch.accumulate=1", "ddp"},
               {"three", "3", "batch.micro=2", "batch.accumulate=2", "fsdp"},
               {"four", "4", "batch.micro=3", "batch.accumulate=1", "zero"}};
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    TRAIN(dir, cases[c].out, SGD, "-n", cases[c].ranks, "--strategy", cases[c].strategy, "--set", cases[c].micro,
          "--set", cases[c].accumulate);
    read_losses(dir, cases[c].out, other);
    for (int i = 0; i < STEPS; i++)
      cr_assert_float_eq(one[i], other[i], 1e-5, "%s, step %d: %.9f against %.9f", cases[c].out, i + 1, other[i],
                         one[i]);
  }
  command_remove_dir(dir);
}

/* Left-to-right reduction is the same at 2 ranks, and must not be at 4: else the equality tests see nothing. */
Test(training, left_to_right_reduction_shows_at_four_ranks, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  for (int ranks = 2; ranks <= 4; ranks += 2) {
    char n[8];
    snprintf(n, sizeof n, "%d", ranks);
    TRAIN(dir, "tree", "-n", n);
    TRAIN(dir, "line", "-n", n, "--set", "comm.plugin=leftright", "--set", "plugins.path=" PHX_TEST_ONLY_PLUGINS);
    char *tree = hash_of(dir, "tree"), *line = hash_of(dir, "line");
    if (ranks == 2) cr_assert_str_eq(tree, line);
    else cr_assert_str_neq(tree, line);
    free(tree);
    free(line);
  }
  command_remove_dir(dir);
}

/* A strategy that runs the step itself: two pipeline stages see the data of one rank. */
Test(training, pipeline_matches_one_rank, .timeout = 120) {
  char *dir = command_temp_dir();
  double one[STEPS], two[STEPS];
  training_files(dir, training_odd_model);
  TRAIN(dir, "one", "--set", "batch.accumulate=3", "--set", "optimizer.lr=1e-3", "--set", "model.layer_drop=0.2");
  TRAIN(dir, "two", "-n", "2", "--set", "batch.accumulate=3", "--set", "optimizer.lr=1e-3", "--set",
        "model.layer_drop=0.2", "--strategy", PHX_TEST_ONLY_PLUGINS "/phx_strategy_pipeline.so");
  cJSON *json = training_json(dir, "two/run.json");
  training_check_plan(training_get(json, "result"), "pipeline");
  cJSON_Delete(json);
  read_losses(dir, "one", one);
  read_losses(dir, "two", two);
  for (int i = 0; i < STEPS; i++)
    cr_assert_float_eq(one[i], two[i], 1e-5, "step %d: %.9f against %.9f", i + 1, two[i], one[i]);
  command_remove_dir(dir);
}

/* Optimizer state in a file, mapped slice by slice: bit for bit what ddp does. */
Test(training, state_in_a_file_matches_ddp, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  TRAIN(dir, "ddp", "-n", "2");
  TRAIN(dir, "file", "-n", "2", "--strategy", PHX_TEST_ONLY_PLUGINS "/phx_strategy_fileopt.so");
  char *a = hash_of(dir, "ddp"), *b = hash_of(dir, "file");
  cr_assert_str_eq(a, b);
  free(a);
  free(b);
  command_remove_dir(dir);
}

Test(training, a_run_leaves_its_files_and_sampling_reads_them, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  TRAIN(dir, "out", "-n", "3", "--strategy", "zero", "--set", "zero.stage=3", "--set", "data.valid=valid.bin", "--set",
        "run.valid_every=10", "--set", "run.hash_every=7");
  char *metrics = command_read_file(dir, "out/metrics.jsonl");
  int lines = 0, hashes = 0, valid = 0;
  for (char *line = strtok(metrics, "\n"); line; line = strtok(NULL, "\n"), lines++) {
    cJSON *o = cJSON_Parse(line);
    static const char *const members[] = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "step_ms", "bytes",
                                          "bytes_sent"};
    for (size_t i = 0; i < sizeof members / sizeof *members; i++)
      cr_assert_not_null(cJSON_GetObjectItemCaseSensitive(o, members[i]), "%s in %s", members[i], line);
    hashes += cJSON_HasObjectItem(o, "state_hash");
    valid += cJSON_HasObjectItem(o, "valid_loss");
    cJSON_Delete(o);
  }
  free(metrics);
  cr_assert_eq(lines, STEPS);
  cr_assert_eq(hashes, 3); /* 7, 14, 20 */
  cr_assert_eq(valid, 2);
  command_result a = RUN(dir, 60, "sample", "out", "--prompt", "ab", "--tokens", "50");
  command_result b = RUN(dir, 60, "sample", "out", "--prompt", "ab", "--tokens", "50");
  cr_assert_eq(a.status, 0, "%s", a.out);
  cr_assert_str_eq(a.out, b.out);
  cr_assert_eq(strncmp(a.out, "ab", 2), 0);
  command_result other = RUN(dir, 60, "sample", "out", "--prompt", "ab", "--tokens", "50", "--seed", "2");
  cr_assert_str_neq(a.out, other.out);
  command_result missing = RUN(dir, 60, "sample", "nowhere");
  cr_assert_eq(missing.status, 2);
  command_free(&a);
  command_free(&b);
  command_free(&other);
  command_free(&missing);
  /* a second run moves the first aside */
  TRAIN(dir, "out", "--steps", "2");
  char *old = command_read_file(dir, "out.1/run.json");
  cr_assert_not_null(old);
  free(old);
  command_remove_dir(dir);
}

Test(training, divergence_stops_with_a_report, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  command_result r = RUN(dir, 50, "train", "run.ini", "-n", "2", "--set", "optimizer.name=sgd", "--set",
                         "optimizer.lr=1000", "--set", "optimizer.clip=0");
  cr_assert_eq(r.status, 3, "status %d:\n%s", r.status, r.out);
  cr_assert(strstr(r.out, "not finite"), "%s", r.out);
  command_free(&r);
  command_remove_dir(dir);
}
