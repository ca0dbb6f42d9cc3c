/* A device whose memory the CPU cannot touch and whose streams are all asynchronous (tests/plugins/far): every strategy
 * gives the cpu device's bits on it, plans stay kept, checkpoints go from one to the other and back. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

#define FAR "--set", "device.plugin=far", "--set", "plugins.path=" PHX_TEST_ONLY_PLUGINS
#define STRATEGIES                                                                                             \
  "ddp.bucket_bytes=100000+first_bucket_bytes=30000,fsdp,fsdp.sharding=grad_op,"                               \
  "fsdp.sharding=none,fsdp.prefetch=3+reshard_after_forward=no,"                                               \
  "zero.stage=1+reduce_bucket_size=20000+allgather_bucket_size=17000,"                                         \
  "zero.stage=2+reduce_bucket_size=20000+overlap_comm=no,"                                                     \
  "zero.stage=3+reduce_bucket_size=20000+stage3_param_persistence_threshold=100+sub_group_size=5000"
enum { N_STRATEGIES = 8 };

static char *files(void) {
  char extra[1024];
  char *dir = command_temp_dir();
  snprintf(extra, sizeof extra, "%sfreeze = h.1.*,wpe.*,h.3.mlp.c_fc.bias\nlayer_drop = 0.2\n", training_odd_model);
  training_files(dir, extra);
  return dir;
}

static void text_of(const char *dir, const char *file, const char *path, char text[40]) {
  cJSON *json = training_json(dir, file);
  const cJSON *value = training_get(json, path);
  cr_assert_not_null(value, "%s: no %s", file, path);
  snprintf(text, 40, "%s", value->valuestring);
  cJSON_Delete(json);
}

#define PHALANX(dir, seconds, ...)                                         \
  do {                                                                     \
    command_result phalanx_r = RUN(dir, seconds, __VA_ARGS__);             \
    cr_assert_eq(phalanx_r.status, 0, "status %d:\n%s", phalanx_r.status, phalanx_r.out); \
    command_free(&phalanx_r);                                              \
  } while (0)

typedef struct far_case {
  char ranks[4], accumulate[24], reduce[28], delay[20], staging[24];
} far_case;

ParameterizedTestParameters(far_device, same_bits_as_on_the_cpu) {
  static far_case cases[] = {
      {"1", "batch.accumulate=1", "batch.reduce=step", "far.delay=0", "shm.staging=1MiB"},
      {"2", "batch.accumulate=3", "batch.reduce=step", "far.delay=1", "shm.staging=1MiB"},
      {"2", "batch.accumulate=3", "batch.reduce=micro_batch", "far.delay=0", "shm.staging=64KiB"},
      {"3", "batch.accumulate=1", "batch.reduce=step", "far.delay=0", "shm.staging=64KiB"},
      {"3", "batch.accumulate=3", "batch.reduce=micro_batch", "far.delay=1", "shm.staging=1MiB"}};
  return cr_make_param_array(far_case, cases, sizeof cases / sizeof *cases);
}

ParameterizedTest(far_case *c, far_device, same_bits_as_on_the_cpu, .timeout = 400) {
  char *dir = files(), hash[40];
  PHALANX(dir, 100, "train", "run.ini", "-n", c->ranks, "--set", "run.steps=4", "--set", c->accumulate, "--set",
          c->reduce, "--set", "run.out=cpu");
  text_of(dir, "cpu/run.json", "result.state_hash", hash);
  PHALANX(dir, 280, "compare", "run.ini", "-n", c->ranks, "--set", "run.steps=4", "--set", c->accumulate, "--set",
          c->reduce, "--set", c->delay, "--set", c->staging, "--set", "run.drift_every=2", FAR, "--strategies",
          STRATEGIES);
  cJSON *json = training_json(dir, "out/compare.json");
  cr_assert(cJSON_IsTrue(training_get(json, "equal_bits")));
  const cJSON *list = training_get(json, "strategies"), *s;
  cr_assert_eq(cJSON_GetArraySize(list), N_STRATEGIES);
  cJSON_ArrayForEach(s, list) {
    const char *name = training_get(s, "strategy")->valuestring;
    training_check_plan(s, name);
    cr_assert_str_eq(training_get(s, "state_hash")->valuestring, hash, "%s is not as on the cpu", name);
  }
  cJSON_Delete(json);
  command_remove_dir(dir);
}

Test(far_device, checkpoints_go_there_and_back, .timeout = 300) {
  char *dir = files(), hash[40], other[40];
  PHALANX(dir, 60, "train", "run.ini", "-n", "2", "--set", "run.steps=6", "--set", "run.out=whole");
  text_of(dir, "whole/run.json", "result.state_hash", hash);
  PHALANX(dir, 60, "train", "run.ini", "-n", "2", "--strategy", "fsdp", "--set", "run.steps=6", "--set",
          "checkpoint.every=2", "--set", "run.out=far", FAR);
  text_of(dir, "far/run.json", "result.state_hash", other);
  cr_assert_str_eq(other, hash);
  PHALANX(dir, 60, "checkpoint", "verify", "far/checkpoints/step-00000002");
  PHALANX(dir, 60, "train", "run.ini", "-n", "2", "--strategy", "zero", "--set", "run.steps=6", "--set",
          "checkpoint.every=2", "--set", "run.out=cpu", "--resume", "far/checkpoints/step-00000002");
  text_of(dir, "cpu/run.json", "result.state_hash", other);
  cr_assert_str_eq(other, hash, "saved on far, loaded on cpu");
  PHALANX(dir, 60, "train", "run.ini", "-n", "2", "--strategy", "zero", "--set", "zero.stage=3", "--set",
          "run.steps=6", "--set", "run.out=back", FAR, "--resume", "cpu/checkpoints/step-00000004");
  text_of(dir, "back/run.json", "result.state_hash", other);
  cr_assert_str_eq(other, hash, "saved on cpu, loaded on far");
  command_remove_dir(dir);
}

Test(far_device, weights_and_samples_are_equal, .timeout = 200) {
  char *dir = files();
  PHALANX(dir, 60, "train", "run.ini", "-n", "2", "--set", "run.steps=3", "--set", "run.out=cpu");
  PHALANX(dir, 60, "train", "run.ini", "-n", "2", "--strategy", "fsdp", "--set", "run.steps=3", "--set", "run.out=far",
          FAR);
  PHALANX(dir, 60, "checkpoint", "diff", "cpu/model.safetensors", "far/model.safetensors");
  command_result a = RUN(dir, 60, "sample", "cpu", "--tokens", "12", "--prompt", "abc");
  /* the run's own [plugins] path is not followed, and its plugin is found where the user says: one line tells of it */
  setenv("PHALANX_PLUGIN_PATH", PHX_TEST_ONLY_PLUGINS, 1);
  command_result b = RUN(dir, 60, "sample", "far", "--tokens", "12", "--prompt", "abc");
  cr_assert_eq(a.status, 0, "%s", a.out);
  cr_assert_eq(b.status, 0, "%s", b.out);
  const char *text = strstr(b.out, "is not followed");
  cr_assert(text && (text = strchr(text, '\n')), "%s", b.out);
  cr_assert_str_eq(a.out, text + 1);
  command_free(&b);
  command_free(&a);
  command_remove_dir(dir);
}

Test(far_device, what_needs_the_cpu_s_memory_is_refused, .timeout = 100) {
  char *dir = files();
  command_result r = RUN(dir, 60, "train", "run.ini", "-n", "2", "--set", "run.steps=1", FAR, "--strategy",
                         PHX_TEST_ONLY_PLUGINS "/phx_strategy_fileopt.so");
  cr_assert_neq(r.status, 0);
  cr_assert(strstr(r.out, "needs a device whose memory the CPU can read"), "%s", r.out);
  command_free(&r);
  command_remove_dir(dir);
}
