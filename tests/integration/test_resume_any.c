/* --resume=if-any: the same command line begins a run where there is no checkpoint, and goes on where there is one,
 * under our launcher and under torchrun's variables. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "root.h"
#include "base/status.h"
#include "expect.h"
#include "training.h"

static const char tiny[] = "[checkpoint]\nevery = 2\n[batch]\nmicro = 1\nsequence = 9\n"
                           "[model]\nplugin = gpt\nlayers = 1\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

static void hash_of(const char *dir, const char *name, char hash[40]) {
  cJSON *json = training_json(dir, name);
  const cJSON *value = training_get(json, "result.state_hash");
  cr_assert_not_null(value, "%s has no result", name);
  snprintf(hash, 40, "%s", value->valuestring);
  cJSON_Delete(json);
}

/* As two parts with one command line but for the number of steps, which stands for a limit of time. */
static void check_parts(const char *dir, command_result (*run)(const char *dir, const char *steps, const char *port)) {
  char whole[40], parts[40];
  expect(RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "6", "--set", "run.out=whole", "--set",
             "optimizer.schedule=constant"), 0, NULL);
  hash_of(dir, "whole/run.json", whole);
  expect(run(dir, "4", "29517"), 0, "holds no checkpoint: a new run begins");
  expect(run(dir, "6", "29518"), 0, NULL);
  hash_of(dir, "out/run.json", parts);
  cr_assert_str_eq(parts, whole);
  cJSON *json = training_json(dir, "out/run.json");
  cr_assert_eq(cJSON_GetArraySize(training_get(json, "resumed")), 1);
  cr_assert_eq(training_get(cJSON_GetArrayItem(training_get(json, "resumed"), 0), "step")->valueint, 4);
  cJSON_Delete(json);
}

static command_result ours(const char *dir, const char *steps, const char *port) {
  (void)port;
  return RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", steps, "--set", "optimizer.schedule=constant",
             "--resume=if-any");
}

static command_result torchrun(const char *dir, const char *steps, const char *port) {
  char line[1024];
  snprintf(line, sizeof line,
           "export WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=%s TORCHELASTIC_RUN_ID=any%s; "
           "P='%s train run.ini -n 2 --steps %s --set optimizer.schedule=constant --resume if-any'; "
           "RANK=1 LOCAL_RANK=1 $P & RANK=0 LOCAL_RANK=0 $P; a=$?; wait $!; b=$?; exit $((a + b))",
           port, port, test_path("bin/phalanx"), steps);
  return command_run(dir, 60, (const char *const[]){"/bin/sh", "-c", line, NULL});
}

Test(resume_any, under_our_launcher, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, tiny);
  check_parts(dir, ours);
  expect(RUN(dir, 60, "train", "--resume=if-any"), PHX__EXIT_REFUSED, "needs a FILE.ini");
  expect(RUN(dir, 60, "train", "run.ini", "--resume="), PHX__EXIT_REFUSED, "needs a directory, or if-any");
  command_remove_dir(dir);
}

Test(resume_any, under_torchrun, .timeout = 120) {
  char *dir = command_temp_dir();
  training_files(dir, tiny);
  check_parts(dir, torchrun);
  command_remove_dir(dir);
}

/* An earlier run without a checkpoint is moved aside; one whose checkpoints are all damaged is not begun anew. */
Test(resume_any, nothing_is_lost, .timeout = 120) {
  char *dir = command_temp_dir(), line[1024];
  training_files(dir, tiny);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "1", "--steps", "2", "--set", "checkpoint.every=0"), 0, NULL);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "1", "--steps", "2", "--resume", "if-any"), 0, "it is now out.1");
  snprintf(line, sizeof line, "cd %s/out/checkpoints && for d in step-*; do echo x > $d/manifest.json; done", dir);
  cr_assert_eq(system(line), 0);
  expect(RUN(dir, 60, "train", "run.ini", "-n", "1", "--steps", "4", "--resume", "if-any"), PHX__EXIT_DAMAGED,
         "holds no whole checkpoint");
  command_remove_dir(dir);
}

/* A run whose last part kept no checkpoint goes on from an older one: its final weights stay, under another name, and
 * nothing is imported over them. */
Test(resume_any, newer_final_weights_stay, .timeout = 100) {
  char *dir = command_temp_dir();
  training_files(dir, tiny);
  expect(RUN(dir, 60, "train", "run.ini", "--steps", "4"), 0, NULL);
  expect(RUN(dir, 60, "train", "run.ini", "--steps", "9", "--resume", "--set", "checkpoint.every=0"), 0, NULL);
  expect(RUN(dir, 60, "checkpoint", "import", "out", "-o", "out"), 2, "of its own");
  expect(RUN(dir, 60, "train", "run.ini", "--steps", "6", "--resume"), 0, "has the final weights of step 9");
  expect(command_run(dir, 10, (const char *const[]){"/usr/bin/test", "-s", "out/aside-00000009.1.safetensors", NULL}),
         0, NULL);
  expect(RUN(dir, 60, "checkpoint", "export", "out/checkpoints/step-00000004", "hf"), 0, NULL);
  expect(RUN(dir, 60, "train", "run.ini", "--steps", "3", "--set", "run.out=weights", "--set", "checkpoint.every=0"), 0,
         NULL);
  expect(RUN(dir, 60, "checkpoint", "import", "hf", "-o", "weights"), 2, "has final weights of its own");
  command_remove_dir(dir);
}
