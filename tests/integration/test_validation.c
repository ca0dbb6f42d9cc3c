/* The held-out loss: every window once, however many ranks and whatever micro-batch take them, in the same digits.  The
 * number itself is that of the reference model, which computes in double precision from the same initial weights. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "reference_gpt.h"
#include "engine/runtime.h"
#include "engine/state.h"
#include "training.h"

enum { LAYERS = 2, HEADS = 2, WIDTH = 12, SEQUENCE = 9, VOCABULARY = 257, SEED = 1337 };
enum { WINDOWS = 7, TOKENS = WINDOWS * SEQUENCE + 1 + 5 }; /* five tokens more do not make a window */
static const char model[] = "[batch]\nmicro = 1\nsequence = 9\n"
                            "[model]\nplugin = gpt\nlayers = 2\nheads = 2\nwidth = 12\ncontext = 9\nvocab = 257\n";
static char *dir;

static void setup(void) {
  uint16_t tokens[TOKENS];
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, model);
  for (int i = 0; i < TOKENS; i++) tokens[i] = (uint16_t)((i * 37 + i * i * 5) % VOCABULARY);
  command_write_file(dir, "valid.bin", tokens, sizeof tokens);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(validation, .init = setup, .fini = teardown, .timeout = 240);

/* What the weights are before the first step, by name. */
static void initialise(reference_gpt *g) {
  for (int i = 0; i < g->n_tensors; i++) {
    reference_tensor *t = &g->tensors[i];
    const bool vector = strstr(t->name, ".bias") || strstr(t->name, "ln_");
    const bool residual = strstr(t->name, "c_proj.weight") != NULL;
    const bool one = vector && strstr(t->name, ".weight");
    phx_param p = {.name = t->name, .shape = {t->numel, 1, 1, 1}, .ndim = 1, .numel = t->numel};
    if (one) p.init = PHX_INIT_ONE;
    if (!vector) p.init = PHX_INIT_NORMAL, p.init_std = residual ? 0.02 / sqrt(2.0 * LAYERS) : 0.02;
    float *values = calloc((size_t)t->numel, sizeof *values);
    phx__initial_values(&p, SEED, 0, t->numel, values);
    for (int64_t k = 0; k < t->numel; k++) t->value[k] = values[k];
    free(values);
  }
}

/* Of the first windows of valid.bin, by the reference model. */
static double reference_loss(int windows) {
  reference_gpt *g = reference_gpt_create(LAYERS, HEADS, WIDTH, SEQUENCE, VOCABULARY);
  uint16_t raw[TOKENS];
  int32_t tokens[TOKENS];
  char path[300];
  snprintf(path, sizeof path, "%s/valid.bin", dir);
  FILE *f = fopen(path, "r");
  cr_assert(f && fread(raw, sizeof raw, 1, f) == 1);
  fclose(f);
  for (int i = 0; i < TOKENS; i++) tokens[i] = raw[i];
  initialise(g);
  const double loss = reference_gpt_run(g, tokens, tokens + 1, windows, SEQUENCE, NULL, 0, NULL);
  reference_gpt_destroy(g);
  return loss;
}

/* The digits in metrics.jsonl after a step that changes nothing. */
static char *digits(const char *const *more) {
  const char *argv[40] = {"phalanx", "train", "run.ini", "--steps", "1", "--set", "data.valid=valid.bin", "--set",
                          "optimizer.lr=0"};
  int n = 9;
  for (; *more; more++) argv[n++] = *more;
  argv[n] = NULL;
  command_result r = command_run(dir, 60, argv);
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  char *metrics = command_read_file(dir, "out/metrics.jsonl"), *at = strstr(metrics, "\"valid_loss\":");
  cr_assert_not_null(at, "%s", metrics);
  at += strlen("\"valid_loss\":");
  char *copy = strndup(at, strcspn(at, ",}"));
  free(metrics);
  return copy;
}
#define DIGITS(...) digits((const char *const[]){__VA_ARGS__, NULL})

static void expect_same(const char *expected, char *got, int ranks, const char *how) {
  cr_expect_str_eq(got, expected, "%d ranks, %s: %s instead of %s", ranks, how, got, expected);
  free(got);
}

Test(validation, the_same_digits_at_any_number_of_ranks) {
  char *one = DIGITS("-n", "1");
  cr_expect_float_eq(strtod(one, NULL), reference_loss(WINDOWS), 2e-6, "%s, and the reference has %.17g", one,
                     reference_loss(WINDOWS));
  cr_expect_gt(fabs(reference_loss(WINDOWS) - reference_loss(WINDOWS - 1)), 1e-5,
               "the last window would not be missed");
  expect_same(one, DIGITS("-n", "1", "--set", "batch.micro=2"), 1, "micro 2: the last micro-batch is half full");
  expect_same(one, DIGITS("-n", "1", "--set", "batch.micro=16"), 1, "micro 16: more than there is");
  expect_same(one, DIGITS("-n", "2", "--set", "batch.micro=2", "--set", "device.threads=2"), 2, "micro 2, ddp");
  expect_same(one, DIGITS("-n", "3", "--set", "batch.micro=2", "--strategy", "fsdp"), 3, "micro 2, fsdp");
  expect_same(one, DIGITS("-n", "4", "--set", "batch.micro=2", "--strategy", "zero", "--set", "zero.stage=3"), 4,
              "micro 2, zero: the last rank has nothing");
  expect_same(one, DIGITS("-n", "2", "--set", "batch.micro=3", "--set", "batch.accumulate=2"), 2,
              "micro 3, accumulate");
  expect_same(one, DIGITS("-n", "1", "--set", "run.valid_windows=1000"), 1, "more windows than there are");
  free(one);
}

Test(validation, the_first_windows_are_those_of_all_ranks_together) {
  char *one = DIGITS("-n", "1", "--set", "run.valid_windows=5", "--set", "batch.micro=4");
  cr_expect_float_eq(strtod(one, NULL), reference_loss(5), 2e-6, "%s, and the reference has %.17g", one,
                     reference_loss(5));
  expect_same(one, DIGITS("-n", "2", "--set", "run.valid_windows=5"), 2, "micro 1");
  expect_same(one, DIGITS("-n", "3", "--set", "run.valid_windows=5", "--set", "batch.micro=2"), 3, "micro 2");
  free(one);
}

Test(validation, the_same_digits_in_bf16) {
  char *one = DIGITS("-n", "1", "--set", "precision.compute=bf16");
  cr_expect_float_eq(strtod(one, NULL), reference_loss(WINDOWS), 5e-3, "%s, and the reference has %.17g", one,
                     reference_loss(WINDOWS));
  expect_same(one, DIGITS("-n", "2", "--set", "precision.compute=bf16", "--set", "batch.micro=3", "--strategy", "fsdp"),
              2, "micro 3, bf16");
  free(one);
}

/* The cuda device's own sources, emulated on the processor. */
Test(validation, the_same_digits_on_cuda) {
#define CUDA                                                                                      \
  "--set", "run.valid_windows=3", "--set", "device.plugin=cuda", "--set", "cuda.share=yes", "--set", \
      "comm.plugin=shm", "--set", "plugins.path=" PHX_TEST_BUILD "/lib/phalanx-emulated"
  char *one = DIGITS("-n", "1", CUDA);
  cr_expect_float_eq(strtod(one, NULL), reference_loss(3), 2e-5, "%s, and the reference has %.17g", one,
                     reference_loss(3));
  expect_same(one, DIGITS("-n", "2", CUDA, "--set", "batch.micro=2"), 2, "cuda");
  free(one);
}

Test(validation, the_key_of_before_is_refused_with_what_to_write) {
  command_result r = RUN(dir, 30, "check", "run.ini", "--set", "run.valid_batches=8");
  cr_expect_eq(r.status, 2);
  cr_expect(strstr(r.out, "[run] valid_batches is no key any more: write valid_windows"), "%s", r.out);
  command_free(&r);
}

/* A last update that ruins the weights shows in the only number that is taken after it. */
Test(validation, a_loss_that_is_not_finite_is_said) {
  command_result r = RUN(dir, 60, "train", "run.ini", "--steps", "3", "--set", "data.valid=valid.bin", "--set",
                         "optimizer.name=sgd", "--set", "optimizer.warmup=0", "--set", "optimizer.lr=1", "--set",
                         "optimizer.weight_decay=1000", "--set", "optimizer.clip=0", "--set", "optimizer.final=1",
                         "--set", "batch.micro=4");
  cr_expect(r.status == 0 && strstr(r.out, "held-out not finite"), "status %d:\n%s", r.status, r.out);
  cr_expect(strstr(r.out, "the held-out loss after step 3 is not finite"), "%s", r.out);
  command_free(&r);
  char *metrics = command_read_file(dir, "out/metrics.jsonl"), *json = command_read_file(dir, "out/run.json");
  cr_expect(metrics && strstr(metrics, "\"valid_loss\":null"), "%s", metrics);
  cr_expect(json && strstr(json, "\"valid_loss\":\tnull"), "%s", json);
  free(metrics);
  free(json);
}

/* ---- a loss that a kill has left out ---- */

static char *go_on(const char *strategy, const char *steps, const char *resume) {
  command_result r = RUN(dir, 60, "train", "run.ini", "-n", "2", "--set", "data.valid=valid.bin", "--set",
                         "run.valid_every=2", "--set", "run.hash_every=2", "--set", "checkpoint.every=2", "--set",
                         "checkpoint.background=no", "--strategy", strategy, "--steps", steps, resume);
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  char *metrics = command_read_file(dir, "out/metrics.jsonl");
  cr_assert_not_null(metrics);
  return metrics;
}

typedef struct what_was_told { /* of one step */
  char loss[32], hash[48];
  int times;        /* of the loss */
  const char *line; /* the last that tells it */
} what_was_told;

static what_was_told told(const char *metrics, int step) {
  what_was_told t = {.times = 0};
  for (const char *line = metrics; *line; line = strchr(line, '\n') + 1) {
    int of = 0;
    const char *loss = strstr(line, "\"valid_loss\":"), *hash = strstr(line, "\"state_hash\":");
    const char *const end = strchr(line, '\n');
    if ((!sscanf(line, "{\"step\":%d", &of) && !sscanf(line, "{\"after_step\":%d", &of)) || of != step) continue;
    if (!loss || loss > end || !hash || hash > end) continue;
    sscanf(loss, "\"valid_loss\":%31[^,}]", t.loss);
    sscanf(hash, "\"state_hash\":%47[^,}]", t.hash);
    t.line = line;
    t.times++;
  }
  return t;
}

/* As a kill leaves it that comes when the save of the step is whole: it has a line, without what is taken then. */
static what_was_told leave_out(const char *metrics, int step) {
  const what_was_told t = told(metrics, step);
  cr_assert_eq(t.times, 1, "%s", metrics);
  cr_assert(!strncmp(t.line, "{\"after_step\":", 14), "%s", t.line);
  command_write_file(dir, "out/metrics.jsonl", metrics, (size_t)(t.line - metrics));
  return t;
}

static void expect_told(const char *metrics, int step, const what_was_told *before) {
  const what_was_told t = told(metrics, step);
  cr_expect_eq(t.times, 1, "step %d: %d times\n%s", step, t.times, metrics);
  cr_expect_str_eq(t.loss, before->loss, "step %d", step);
  cr_expect_str_eq(t.hash, before->hash, "step %d", step);
}

static void expect_taken_at_the_resume(const char *strategy) {
  char *metrics = go_on(strategy, "4", NULL);
  const what_was_told four = leave_out(metrics, 4);
  free(metrics);
  metrics = go_on(strategy, "6", "--resume");
  expect_told(metrics, 4, &four);
  const what_was_told six = leave_out(metrics, 6);
  free(metrics);
  metrics = go_on(strategy, "6", "--resume"); /* nothing but that is left to do */
  expect_told(metrics, 6, &six);
  free(metrics);
  cJSON *json = training_json(dir, "out/run.json");
  const cJSON *loss = training_get(json, "result.valid_loss");
  cr_assert(cJSON_IsNumber(loss), "the result has no held-out loss");
  cr_expect_eq(loss->valuedouble, strtod(six.loss, NULL));
  cJSON_Delete(json);
  metrics = go_on(strategy, "8", "--resume"); /* nothing is missing */
  expect_told(metrics, 4, &four);
  expect_told(metrics, 6, &six);
  free(metrics);
}

Test(validation, what_a_kill_left_out_is_taken_at_the_resume) {
  expect_taken_at_the_resume("ddp");
  expect_taken_at_the_resume("fsdp");
}

/* After it has diverged, a run that skips what is not finite skips every step: it ends as failed, not as done. */
Test(validation, skipped_steps_in_a_row_end_the_run) {
#define DIVERGE \
  "train", "run.ini", "--steps", "20", "--set", "optimizer.name=sgd", "--set", "optimizer.warmup=0", "--set", \
  "optimizer.lr=1", "--set", "optimizer.weight_decay=1000", "--set", "optimizer.clip=0", "--set", \
  "optimizer.final=1", "--set", "batch.micro=4", "--set", "run.on_nonfinite=skip"
  command_result r = RUN(dir, 60, DIVERGE, "--set", "run.max_skipped=4", "-n", "2");
  cr_expect(r.status == 3 && strstr(r.out, "not finite, as in the 3 steps before: nothing has been learned since step"),
            "status %d:\n%s", r.status, r.out);
  command_free(&r);
  r = RUN(dir, 60, DIVERGE, "--set", "run.max_skipped=0");
  cr_expect_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  r = RUN(dir, 60, DIVERGE);
  cr_expect(r.status == 3 && strstr(r.out, "as in the 9 steps before"), "status %d:\n%s", r.status, r.out);
  command_free(&r);
}
