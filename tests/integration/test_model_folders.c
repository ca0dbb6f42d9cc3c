/* A run's directory is a folder that others load: its final weights, read by a plain reader, have the loss that the run
 * says, by the reference; and every command takes a run, a checkpoint, or such a folder. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hf_folder.h"
#include "training.h"

enum { LENGTH = 17 };
static char *dir;
static int32_t window[LENGTH + 1];

static const char *at(const char *name) {
  static char paths[8][600];
  static int next;
  char *path = paths[next++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", dir, name);
  return path;
}

static void set_up(void) { /* the held-out data is one window */
  uint16_t valid[LENGTH + 1];
  dir = command_temp_dir();
  training_files(dir, "[batch]\nmicro = 1\nsequence = 17\n[model]\nplugin = gpt\nlayers = 2\nheads = 3\nwidth = 30\n"
                      "context = 19\nvocab = 257\nnorm_eps = 1e-3\n");
  for (int i = 0; i <= LENGTH; i++) window[i] = valid[i] = (uint16_t)((i * 91 + 13) % 257);
  command_write_file(dir, "valid.bin", valid, sizeof valid);
}
static void tear_down(void) { command_remove_dir(dir); }
TestSuite(model_folders, .init = set_up, .fini = tear_down, .timeout = 120);

static char *expect(int status, const char *says, const char *const *argv) {
  command_result r = command_run(dir, 60, argv);
  cr_assert(r.status == status && strstr(r.out, says), "%s %s %s: status %d, not %d, or not '%s':\n%s", argv[1],
            argv[2], argv[3] ? argv[3] : "", r.status, status, says, r.out);
  return r.out; /* kept until the test ends */
}
#define EXPECT(status, says, ...) expect(status, says, (const char *const[]){"phalanx", __VA_ARGS__, NULL})
#define TRAIN(out, ...) \
  EXPECT(0, "", "train", "run.ini", "--set", "run.out=" out, "--set", "data.valid=valid.bin", __VA_ARGS__)

static double loss_of(const char *folder) {
  reference_gpt *g = hf_reference(at(folder));
  const double loss = reference_gpt_run(g, window, window + 1, 1, LENGTH, NULL, 0, NULL);
  reference_gpt_destroy(g);
  return loss;
}

static double valid_loss_of(const char *run) {
  char name[100];
  snprintf(name, sizeof name, "%s/run.json", run);
  cJSON *json = training_json(dir, name);
  const cJSON *value = training_get(json, "result.valid_loss");
  cr_assert_not_null(value, "%s", name);
  const double loss = value->valuedouble;
  cJSON_Delete(json);
  return loss;
}

Test(model_folders, a_run_leaves_what_others_load) {
  TRAIN("ddp", "--steps", "3", "-n", "2", "--strategy", "ddp");
  TRAIN("fsdp", "--steps", "3", "-n", "2", "--strategy", "fsdp");
  TRAIN("zero", "--steps", "3", "-n", "2", "--strategy", "zero", "--set", "zero.stage=3");
  static const char *const runs[] = {"ddp", "fsdp", "zero"};
  for (int i = 0; i < 3; i++) {
    const double said = valid_loss_of(runs[i]), right = loss_of(runs[i]);
    cr_expect(fabs(said - right) < 3e-6 * right, "%s: %.9g, reference %.9g", runs[i], said, right);
    EXPECT(0, "equal: 28 tensors, bit for bit (weights only)", "checkpoint", "diff", "ddp", runs[i]);
  }
  hf_file f = hf_read(at("zero/model.safetensors"));
  cr_expect_str_eq(f.metadata, "{\"format\":\"pt\",\"step\":\"3\"}");
  const hf_tensor *t = hf_find(&f, "h.1.mlp.c_proj.weight");
  cr_expect(t && t->shape[0] == 120 && t->shape[1] == 30);
  hf_free(&f);
}

/* Uneven shards: a rank's part begins and ends inside a row, and three ranks write one matrix. */
Test(model_folders, shards_that_cut_rows) {
  TRAIN("one", "--steps", "2", "-n", "1", "--set", "batch.accumulate=3");
  TRAIN("three", "--steps", "2", "-n", "3", "--strategy", "fsdp");
  const double said = valid_loss_of("three"), right = loss_of("three");
  cr_expect(fabs(said - right) < 3e-6 * right, "%.9g, reference %.9g", said, right);
}

/* The same weights, wherever they stand, give the same text. */
Test(model_folders, every_command_takes_all_of_them) {
  static const char *const all[] = {"out", "exported", "again", "in", "in/checkpoints/step-00000000",
                                    "saved/checkpoints/step-00000004", "saved", "stopped"};
  TRAIN("out", "--steps", "4", "-n", "2");
  EXPECT(0, "28 tensors of step 4", "checkpoint", "export", "out", "exported");
  EXPECT(0, "28 tensors of step 4", "checkpoint", "export", "exported", "again");
  EXPECT(0, "28 parameters", "checkpoint", "import", "out", "-o", "in");
  TRAIN("saved", "--steps", "4", "-n", "2", "--set", "checkpoint.every=2");
  EXPECT(0, "28 parameters", "checkpoint", "import", "saved", "-o", "in2");
  TRAIN("stopped", "--steps", "4", "-n", "2", "--set", "checkpoint.every=4");
  unlink(at("stopped/model.safetensors")); /* as a signal would have left it */
  unlink(at("stopped/config.json"));
  const char *text = NULL;
  for (int i = 0; i < 8; i++) {
    const char *one = EXPECT(0, "a", "sample", all[i], "--prompt", "a", "--tokens", "12", "--temperature", "0");
    if (text) cr_expect_str_eq(one, text, "%s: %s", all[i], one);
    else text = one;
    EXPECT(0, "whole", "checkpoint", "verify", all[i]);
    EXPECT(0, "\n", "checkpoint", "ls", all[i]);
    EXPECT(0, "equal: 28 tensors", "checkpoint", "diff", "out", all[i], "--weights");
  }
  EXPECT(0, "weights, in out/model.safetensors", "checkpoint", "ls", "out");
  EXPECT(0, "  latest\n         4  ", "checkpoint", "ls", "saved");
  EXPECT(0, "28 tensors that fit config.json", "checkpoint", "verify", "saved");
  EXPECT(2, "phalanx checkpoint import", "train", "run.ini", "--resume", "exported");
  EXPECT(2, "phalanx checkpoint import", "train", "run.ini", "--resume", "out");
  EXPECT(2, "holds no model", "sample", "valid");
}

/* A run that has both stands for the newer. */
Test(model_folders, the_newer_of_checkpoint_and_weights) {
  TRAIN("out", "--steps", "2", "-n", "1", "--set", "checkpoint.every=2");
  EXPECT(0, "84 tensors", "checkpoint", "diff", "out", "out/checkpoints/step-00000002");
  TRAIN("out", "--steps", "3", "-n", "1", "--resume");
  EXPECT(1, "28 of 28", "checkpoint", "diff", "out", "out/checkpoints/step-00000002");
  EXPECT(0, "of step 3", "checkpoint", "export", "out", "exported");
  TRAIN("out", "--steps", "5", "-n", "1", "--resume", "--set", "checkpoint.every=5");
  EXPECT(0, "equal: 84", "checkpoint", "diff", "out", "out/checkpoints/step-00000005");
}

Test(model_folders, damage_and_misfits_are_refused) {
  TRAIN("out", "--steps", "1", "-n", "1");
  hf_file f = hf_read(at("out/model.safetensors"));
  float *x = &hf_find(&f, "h.1.attn.c_proj.weight")->data[4 * 30 + 7], kept = *x;
  *x = NAN;
  hf_write(&f, 0, f.n, at("out/model.safetensors"));
  EXPECT(2, "tensor h.1.attn.c_proj.weight: element [4, 7] is ", "sample", "out");
  EXPECT(4, "tensor h.1.attn.c_proj.weight: element [4, 7] is ", "checkpoint", "verify", "out");
  *x = kept;
  hf_write(&f, 0, f.n - 1, at("out/model.safetensors"));
  EXPECT(4, "has no tensor ln_f.bias", "sample", "out");
  EXPECT(4, "has no tensor ln_f.bias", "checkpoint", "verify", "out");
  EXPECT(4, "has no tensor ln_f.bias", "checkpoint", "ls", "out");
  hf_free(&f);
}

static void spoil(const char *name, int64_t bytes) { cr_assert_eq(truncate(at(name), bytes), 0, "%s", name); }

/* What is damaged, or copied in part, hides nothing that is whole. */
Test(model_folders, checkpoints_serve_where_the_final_weights_cannot) {
  TRAIN("run", "--steps", "4", "--set", "checkpoint.every=2");
  EXPECT(0, "equal", "checkpoint", "diff", "run", "run/checkpoints/step-00000004");
  cr_assert_eq(unlink(at("run/checkpoints/latest")), 0);
  char *r = EXPECT(0, "run/checkpoints has no file `latest`: takes ", "sample", "run", "--tokens", "3");
  cr_expect(strstr(r, "step-00000004, the newest whole one"), "%s", r);
  EXPECT(0, "has no file `latest`", "checkpoint", "verify", "run");
  spoil("run/checkpoints/step-00000004/manifest.json", 100);
  r = EXPECT(0, "step-00000004 cannot be used", "checkpoint", "export", "run", "two"); /* its weights are newer */
  cr_expect(strstr(r, "takes ") && strstr(r, "step-00000002, the newest whole one"), "%s", r);
  EXPECT(0, "equal", "checkpoint", "diff", "two", "run/model.safetensors", "--weights");
  spoil("run/model.safetensors", 1000);
  r = EXPECT(0, "run/model.safetensors", "sample", "run", "--tokens", "3");
  cr_expect(strstr(r, "cannot be used") && strstr(r, "takes the checkpoint of step 2"), "%s", r);
  EXPECT(0, "takes the checkpoint of step 2", "checkpoint", "export", "run", "three");
  EXPECT(0, "equal", "checkpoint", "diff", "three", "run/checkpoints/step-00000002", "--weights");
  EXPECT(4, "run/model.safetensors", "checkpoint", "verify", "run"); /* which asks for damage */
}

/* ---- a model that is no GPT-2 (tests/plugins/bigram) ---- */

/* Its names and shapes, all of them and as they are, though one name ends as a matrix that GPT-2's files turn. */
static void expect_own_names(const char *file) {
  static const struct {
    const char *name;
    int64_t rows, columns;
  } tensors[] = {{"tokens.weight", 257, 12}, {"places.weight", 64, 12}, {"head.attn.c_proj.weight", 257, 12},
                 {"head.bias", 257, 0}};
  hf_file f = hf_read(at(file));
  cr_expect_eq(f.n, 4, "%s: %d tensors", file, f.n);
  for (int i = 0; i < 4; i++) {
    const hf_tensor *t = hf_find(&f, tensors[i].name);
    cr_expect(t && t->shape[0] == tensors[i].rows && (!tensors[i].columns || t->shape[1] == tensors[i].columns), "%s",
              tensors[i].name);
  }
  hf_free(&f);
}

static void expect_same_text(const char *a, const char *b) {
  const char *one = EXPECT(0, "\n", "sample", a, "--tokens", "12", "--temperature", "0");
  cr_expect_str_eq(EXPECT(0, "\n", "sample", b, "--tokens", "12", "--temperature", "0"), one, "%s and %s", a, b);
}

Test(model_folders, another_model_keeps_its_names_and_is_read_back) {
  static const char *const run[] = {"out", "saved", "saved/checkpoints/step-00000004"};
  setenv("PHALANX_PLUGIN_PATH", PHX_TEST_ONLY_PLUGINS, 1); /* where whoever opens the run says that plugins are */
  training_files(dir, "[batch]\nmicro = 2\nsequence = 16\n[comm]\nplugin = shm\n"
                      "[model]\nplugin = bigram\nwidth = 12\n");
  TRAIN("out", "--steps", "4", "-n", "2", "--strategy", "fsdp");
  TRAIN("saved", "--steps", "4", "-n", "3", "--strategy", "zero", "--set", "checkpoint.every=2");
  expect_own_names("out/model.safetensors");
  expect_own_names("saved/model.safetensors");
  cr_expect_neq(access(at("out/config.json"), F_OK), 0, "a config.json, which says that it is a GPT-2");
  EXPECT(0, "equal: 4 tensors", "checkpoint", "diff", "saved", run[2], "--weights");
  for (int i = 0; i < 3; i++) {
    char in[32];
    snprintf(in, sizeof in, "in-%d", i);
    EXPECT(0, "whole", "checkpoint", "verify", run[i]);
    EXPECT(0, "\n", "checkpoint", "ls", run[i]);
    EXPECT(2, "is no GPT-2, and only that is exported; the model.safetensors of a run that is done has the weights of "
           "any model", "checkpoint", "export", run[i], "exported");
    EXPECT(0, "4 parameters, optimizer states zero", "checkpoint", "import", run[i], "-o", in);
    EXPECT(0, "equal: 4 tensors", "checkpoint", "diff", run[i], in, "--weights");
    expect_same_text(run[i], in);
  }
  cr_expect_neq(access(at("exported"), F_OK), 0);
  EXPECT(2, "phalanx checkpoint import", "train", "run.ini", "--resume", "out");
  EXPECT(0, "step    5/5", "train", "run.ini", "--resume", "in-0", "--steps", "5", "--set", "run.out=on");
  EXPECT(2, "parameter tokens.weight has another shape", "train", "run.ini", "--resume", "in-0", "--set",
         "model.width=13", "--set", "run.out=on");
  EXPECT(2, "which is not compared with on/config.ini", "checkpoint", "import", "out", "-o", "on");
  EXPECT(2, "name the folder, which tells the model", "sample", "out/model.safetensors");
  unsetenv("PHALANX_PLUGIN_PATH");
  EXPECT(2, "there is no model plugin 'bigram'", "sample", "out");
  EXPECT(2, "there is no model plugin 'bigram'", "checkpoint", "import", "saved", "-o", "none");
}

Test(model_folders, a_file_of_another_kind_is_no_damage) {
  command_write_file(dir, "notes.txt", "no checkpoint at all\n", 21);
  static const char says[] = "notes.txt is a file, and none of safetensors: name a run";
  EXPECT(2, says, "sample", "notes.txt");
  EXPECT(2, says, "checkpoint", "export", "notes.txt", "out");
  EXPECT(2, says, "checkpoint", "diff", "notes.txt", "notes.txt");
  EXPECT(2, "notes.txt", "checkpoint", "verify", "notes.txt");
  EXPECT(2, "notes.txt", "checkpoint", "ls", "notes.txt");
  command_write_file(dir, "broken.safetensors", "no checkpoint at all\n", 21);
  EXPECT(4, "broken.safetensors", "checkpoint", "diff", "broken.safetensors", "broken.safetensors");
}
