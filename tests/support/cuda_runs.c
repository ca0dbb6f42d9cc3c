/* tests/support/cuda_runs.c - see cuda_runs.h. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_runs.h"
#include "root.h"
#include "training.h"

enum { WORDS = 40 };

typedef struct words {
  const char *list[WORDS];
  int n;
} words;

static void say(words *w, const char *word) {
  cr_assert_lt(w->n, WORDS - 1);
  w->list[w->n++] = word;
}
static void set(words *w, const char *pair) {
  say(w, "--set");
  say(w, pair);
}

/* `cuda` adds the device, which two ranks may share. */
static words command(const cuda_where *where, const char *verb, const char *ranks, bool cuda) {
  static char path[4200];
  words w = {0};
  say(&w, "phalanx");
  say(&w, verb);
  say(&w, "run.ini");
  say(&w, "-n");
  say(&w, ranks);
  for (int i = 0; i < 4 && where->model[i]; i++) set(&w, where->model[i]);
  if (!cuda) return w;
  set(&w, "device.plugin=cuda");
  set(&w, where->comm);
  set(&w, "cuda.share=yes");
  set(&w, "run.deterministic=yes");
  if (where->plugins) {
    snprintf(path, sizeof path, "plugins.path=%s", test_path(where->plugins));
    set(&w, path);
  }
  return w;
}

static void must(const char *dir, const words *w) {
  command_result r = command_run(dir, 280, w->list);
  cr_assert_eq(r.status, 0, "%s: status %d:\n%s", w->list[1], r.status, r.out);
  command_free(&r);
}

static char *files(void) {
  char *dir = command_temp_dir();
  training_files(dir, training_odd_model);
  return dir;
}

char *cuda_runs_reason(const cuda_where *where) {
  char *dir = files(), *reason = NULL;
  words w = command(where, "check", "1", true);
  command_result r = command_run(dir, 60, w.list);
  if (r.status != 0) reason = strdup(r.out);
  if (reason) reason[strcspn(reason, "\n")] = 0;
  command_free(&r);
  command_remove_dir(dir);
  return reason;
}

static double number(const char *dir, const char *file, const char *path) {
  cJSON *json = training_json(dir, file);
  const cJSON *value = training_get(json, path);
  cr_assert_not_null(value, "%s: no %s", file, path);
  const double x = value->valuedouble;
  cJSON_Delete(json);
  return x;
}

void cuda_runs_compare(const cuda_where *where, const char *ranks, const char *compute, double near) {
  char *dir = files(), steps[32], precision[40], list[512] = "";
  snprintf(steps, sizeof steps, "run.steps=%d", where->steps);
  snprintf(precision, sizeof precision, "precision.compute=%s", compute);
  int n = 0;
  for (; where->strategies[n]; n++) {
    strncat(list, n ? "," : "", sizeof list - strlen(list) - 1);
    strncat(list, where->strategies[n], sizeof list - strlen(list) - 1);
  }
  words cpu = command(where, "train", ranks, false), cuda = command(where, "compare", ranks, true);
  set(&cpu, steps);
  set(&cpu, "run.out=cpu");
  must(dir, &cpu);
  set(&cuda, steps);
  set(&cuda, precision);
  say(&cuda, "--strategies");
  say(&cuda, list);
  must(dir, &cuda);
  const double loss = number(dir, "cpu/run.json", "result.loss");
  cJSON *json = training_json(dir, "out/compare.json");
  cr_assert(cJSON_IsTrue(training_get(json, "equal_bits")), "%s", list);
  const cJSON *all = training_get(json, "strategies"), *s;
  cr_assert_eq(cJSON_GetArraySize(all), n);
  cJSON_ArrayForEach(s, all) {
    const char *name = training_get(s, "strategy")->valuestring;
    training_check_plan(s, name);
    const double its = training_get(s, "loss")->valuedouble;
    cr_assert(fabs(its - loss) < near, "%s in %s: loss %.9f, on the cpu in fp32 %.9f", name, compute, its, loss);
  }
  cJSON_Delete(json);
  command_remove_dir(dir);
}

static void hash_of(const char *dir, const char *file, char text[40]) {
  cJSON *json = training_json(dir, file);
  const cJSON *value = training_get(json, "result.state_hash");
  cr_assert_not_null(value, "%s", file);
  snprintf(text, 40, "%s", value->valuestring);
  cJSON_Delete(json);
}

/* No step follows: what was loaded is hashed as it came. */
static void loads_alike(const cuda_where *where, const char *dir, const char *from, bool to_cuda, const char *hash) {
  char other[40];
  words w = command(where, "train", "2", to_cuda);
  set(&w, "run.steps=2");
  set(&w, "run.strategy=zero");
  set(&w, "run.out=loaded");
  say(&w, "--resume");
  say(&w, from);
  must(dir, &w);
  hash_of(dir, "loaded/run.json", other);
  cr_assert_str_eq(other, hash, "%s, loaded %s", from, to_cuda ? "on cuda" : "on the cpu");
}

void cuda_runs_checkpoints(const cuda_where *where) {
  char *dir = files(), hash[40];
  for (int cuda = 0; cuda < 2; cuda++) {
    words w = command(where, "train", "2", cuda);
    set(&w, "run.steps=2");
    set(&w, "run.strategy=fsdp");
    set(&w, "checkpoint.every=1");
    set(&w, cuda ? "run.out=cuda" : "run.out=cpu");
    must(dir, &w);
    hash_of(dir, cuda ? "cuda/run.json" : "cpu/run.json", hash);
    loads_alike(where, dir, cuda ? "cuda/checkpoints/step-00000002" : "cpu/checkpoints/step-00000002", !cuda, hash);
  }
  command_remove_dir(dir);
}

void cuda_runs_profile(const cuda_where *where) {
  static const char *const kinds[] = {"linear", "linear_backward_input", "linear_backward_weight", "embedding",
                                      "embedding_backward", "layer_norm", "layer_norm_backward", "attention",
                                      "attention_backward", "cross_entropy", "adamw", "copy", "block_norms"};
  char *dir = files(), line[80];
  words w = command(where, "train", "1", true);
  set(&w, "run.steps=2");
  set(&w, "cuda.profile=yes");
  command_result r = command_run(dir, 280, w.list);
  cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    snprintf(line, sizeof line, "profile: %s: ", kinds[i]);
    cr_assert(strstr(r.out, line), "no %s\n%s", line, r.out);
  }
  cr_expect(strstr(r.out, "device memory of rank 0: "), "%s", r.out);
  command_free(&r);
  command_remove_dir(dir);
}
