/* `phalanx checkpoint import` of Hugging Face's GPT-2: every key of config.json counts, is known to change nothing, or
 * is refused by name; several files and their index; weights that are no numbers. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint_fixture.h"
#include "command.h"
#include "hf_folder.h"
#include "training.h"

static char *dir;

static const char *at(const char *name) {
  static char paths[8][600];
  static int next;
  char *path = paths[next++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", dir, name);
  return path;
}

static void expect(int status, const char *says, const char *const *argv) {
  command_result r = command_run(dir, 60, argv);
  cr_expect(r.status == status && strstr(r.out, says), "%s %s: status %d, not %d, or not '%s':\n%s", argv[2], argv[3],
            r.status, status, says, r.out);
  command_free(&r);
}
#define EXPECT(status, says, ...) \
  expect(status, says, (const char *const[]){"phalanx", "checkpoint", __VA_ARGS__, NULL})

#define SIZES "\"n_layer\":2,\"n_head\":3,\"n_embd\":12,\"n_positions\":9,\"vocab_size\":257"
#define GPT2 "\"model_type\":\"gpt2\","

static void set_up(void) { /* hf: a folder with another model's values; run: what it was made of */
  dir = command_temp_dir();
  const checkpoint_fixture f = checkpoint_fixture_small();
  checkpoint_fixture_run(&f, at("run"));
  EXPECT(0, "28 tensors", "export", "run", "hf");
}
static void tear_down(void) { command_remove_dir(dir); }
TestSuite(import, .init = set_up, .fini = tear_down, .timeout = 120);

static void put_config(const char *text) { command_write_file(dir, "hf/config.json", text, strlen(text)); }

/* The import of a config.json; what it made is removed. */
static void import_of(const char *config, int status, const char *says) {
  put_config(config);
  command_result r = RUN(dir, 60, "checkpoint", "import", "hf", "-o", "step-1");
  cr_expect(r.status == status && strstr(r.out, says), "%s: status %d, not %d, or not '%s':\n%s", config, r.status,
            status, says, r.out);
  cr_expect_eq(access(at("step-1"), F_OK) == 0, status == 0, "%s", config);
  command_free(&r);
  if (status == 0) {
    r = command_run(dir, 10, (const char *const[]){"/bin/rm", "-r", "step-1", NULL});
    command_free(&r);
  }
}

Test(import, every_key_counts_or_is_refused) {
  static const struct {
    const char *key;
    int status;
    const char *says;
  } cases[] = {
      {"\"scale_attn_by_inverse_layer_idx\":true", 2, "scale_attn_by_inverse_layer_idx is true"},
      {"\"scale_attn_weights\":false", 2, "scale_attn_weights is false"},
      {"\"tie_word_embeddings\":false", 2, "tie_word_embeddings is false"},
      {"\"add_cross_attention\":true", 2, "add_cross_attention is true"},
      {"\"activation_function\":\"gelu\"", 2, "activation_function is \"gelu\""},
      {"\"activation_function\":\"relu\"", 2, "activation_function is \"relu\""},
      {"\"n_inner\":47", 2, "n_inner is 47"},
      {"\"n_ctx\":8", 2, "n_ctx is 8"},
      {"\"pruned_heads\":{\"0\":[1]}", 2, "pruned_heads is"},
      {"\"quantization_config\":{\"bits\":4}", 2, "quantization_config is"},
      {"\"rope_theta\":10000", 2, "the key rope_theta is not known"},
      {"\"layer_norm_epsilon\":\"1e-3\"", 2, "layer_norm_epsilon is \"1e-3\""},
      {"\"layer_norm_epsilon\":0", 2, "layer_norm_epsilon is 0"},
      {"\"resid_pdrop\":1.5", 2, "resid_pdrop is 1.5"},
      {"\"activation_function\":\"gelu_pytorch_tanh\",\"n_inner\":48,\"n_ctx\":9", 0, "28 parameters"},
      {"\"n_inner\":null,\"scale_attn_weights\":true,\"tie_word_embeddings\":true", 0, "28 parameters"},
      {"\"reorder_and_upcast_attn\":true,\"pruned_heads\":{},\"is_decoder\":true", 0, "28 parameters"},
      {"\"resid_pdrop\":0.1,\"embd_pdrop\":0.25,\"attn_pdrop\":0.0", 0,
       "trained with dropout (resid_pdrop = 0.1, embd_pdrop = 0.25)"},
      {"\"initializer_range\":0.02,\"task_specific_params\":{\"text\":{\"max_length\":50}},\"use_cache\":true", 0,
       "28 parameters"},
  };
  char text[512];
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    snprintf(text, sizeof text, "{" GPT2 SIZES ",%s}", cases[i].key);
    import_of(text, cases[i].status, cases[i].says);
  }
}

Test(import, config_is_read_strictly) {
  static const struct {
    const char *text;
    int status;
    const char *says;
  } cases[] = {
      {"{" GPT2 "\"n_layer\":2.7,\"n_head\":3,\"n_embd\":12,\"n_positions\":9,\"vocab_size\":257}", 2,
       "n_layer is no whole number"},
      {"{" GPT2 "\"n_layer\":\"2\",\"n_head\":3,\"n_embd\":12,\"n_positions\":9,\"vocab_size\":257}", 2,
       "n_layer is no whole number"},
      {"{" GPT2 "\"n_layer\":2,\"n_head\":3,\"n_embd\":12,\"n_positions\":1e300,\"vocab_size\":257}", 2,
       "n_positions is no whole number"},
      {"{" GPT2 "\"n_layer\":2,\"n_head\":5,\"n_embd\":12,\"n_positions\":9,\"vocab_size\":257}", 2,
       "n_embd = 12 is no multiple of n_head = 5"},
      {"{" GPT2 "\"n_layer\":2,\"n_head\":3,\"n_embd\":12,\"n_positions\":9}", 2, "vocab_size is missing"},
      {"{" SIZES "}", 2, "model_type is missing"},
      {"{\"model_type\":\"gpt_neo\"," SIZES "}", 2, "model_type is \"gpt_neo\""},
      {"{" GPT2 SIZES ",\"n_head\":4}", 4, "the name 'n_head' stands twice"},
      {"{" GPT2 SIZES ",}", 4, "is not JSON"},
      {"{" GPT2 SIZES ",\"use_cache\":NaN}", 4, "is not JSON"},
      {"{" GPT2 SIZES ",\"attn_pdrop\":.1}", 4, "is not JSON"},
      {"{" GPT2 SIZES ",\"attn_pdrop\":1.}", 4, "a number lacks a digit"},
      {"{" GPT2 SIZES ",\"attn_pdrop\":1e}", 4, "a number lacks a digit"},
      {"{" GPT2 SIZES "} {}", 4, "something follows"},
      {"", 4, "is not JSON"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    import_of(cases[i].text, cases[i].status, cases[i].says);
  unlink(at("hf/config.json"));
  EXPECT(2, "hf has no config.json", "import", "hf", "-o", "step-1");
}

/* The loss of what was imported, against the reference; then trained on with the same key, and refused without it. */
Test(import, layer_norm_epsilon_is_honoured) {
  uint16_t data[10];
  int32_t tokens[10];
  for (int i = 0; i < 10; i++) tokens[i] = data[i] = (uint16_t)(i * 37 % 257);
  put_config("{" GPT2 SIZES ",\"layer_norm_epsilon\":1e-3}");
  reference_gpt *g = hf_reference(at("hf"));
  const double right = reference_gpt_run(g, tokens, tokens + 1, 1, 9, NULL, 0, NULL);
  g->eps = 1e-5;
  const double wrong = reference_gpt_run(g, tokens, tokens + 1, 1, 9, NULL, 0, NULL);
  cr_assert(fabs(right - wrong) > 1e-4, "the test does not tell %.9g from %.9g", right, wrong);
  reference_gpt_destroy(g);
  EXPECT(0, "28 parameters", "import", "hf", "-o", "in");
  training_files(dir, "[batch]\nmicro = 1\nsequence = 9\n[model]\nplugin = gpt\nlayers = 2\nheads = 3\nwidth = 12\n"
                      "context = 9\nvocab = 257\nnorm_eps = 1e-3\n");
  command_write_file(dir, "train.bin", data, sizeof data);
  command_result r = RUN(dir, 60, "train", "run.ini", "--steps", "1", "-n", "1", "--resume", "in");
  cr_assert_eq(r.status, 0, "%s", r.out);
  cr_expect_null(strstr(r.out, " and is 0\n"), "a size that is left open is no change:\n%s", r.out);
  command_free(&r);
  cJSON *run = training_json(dir, "out/run.json");
  const double loss = training_get(run, "result.loss")->valuedouble;
  cr_expect(fabs(loss - right) < 2e-6 * right, "loss %.9g, reference %.9g, with 1e-5 %.9g", loss, right, wrong);
  cJSON_Delete(run);
}

/* A run's own configuration in the target does not stand in for config.json: the two must agree. */
Test(import, config_json_counts_beside_a_config_ini) {
  static const char ini[] = "[run]\nstrategy = ddp\n[data]\ntrain = train.bin\n[batch]\nmicro = 1\nsequence = 9\n"
                            "[optimizer]\nname = sgd\n[model]\nplugin = gpt\nlayers = 2\nheads = %d\nwidth = 12\n"
                            "context = 9\nvocab = 257\n";
  char text[512];
  for (int heads = 3; heads <= 4; heads++) {
    const int n = snprintf(text, sizeof text, ini, heads);
    mkdir(at("target"), 0755);
    command_write_file(dir, "target/config.ini", text, (size_t)n);
    if (heads == 4) {
      EXPECT(2, "n_head (heads) is 3 in hf/config.json and 4 in target/config.ini", "import", "hf", "-o", "target");
      cr_expect_neq(access(at("target/checkpoints"), F_OK), 0);
      continue;
    }
    put_config("{" GPT2 SIZES ",\"scale_attn_weights\":false}");
    EXPECT(2, "scale_attn_weights is false", "import", "hf", "-o", "target");
    put_config("{" GPT2 SIZES ",\"layer_norm_epsilon\":1e-3}");
    EXPECT(2, "layer_norm_epsilon (norm_eps) is 0.001 in hf/config.json", "import", "hf", "-o", "target");
    put_config("{" GPT2 SIZES "}");
    EXPECT(0, "28 parameters", "import", "hf", "-o", "target");
    EXPECT(0, "equal: 28 tensors", "diff", "run", "target", "--weights");
    command_result r = command_run(dir, 10, (const char *const[]){"/bin/rm", "-r", "target", NULL});
    command_free(&r);
  }
}

/* ---- several files ---- */
/* weight_map of the tensors: the first `n` in a.safetensors, the rest in b.safetensors; `more` is appended. */
static void put_index(const hf_file *f, int n, int left_out, const char *more) {
  char *text = calloc(1, 1 << 16);
  strcpy(text, "{\"metadata\":{\"total_size\":1.5e3},\"weight_map\":{");
  for (int i = 0; i < f->n; i++)
    if (i != left_out)
      sprintf(text + strlen(text), "\"%s\":\"%s.safetensors\",", f->tensors[i].name, i < n ? "a" : "b");
  text[strlen(text) - 1] = 0;
  strcat(strcat(text, more), "}}");
  command_write_file(dir, "hf/model.safetensors.index.json", text, strlen(text));
  free(text);
}

Test(import, several_files_are_read_by_their_index) {
  hf_file f = hf_read(at("hf/model.safetensors"));
  hf_write(&f, 0, 11, at("hf/a.safetensors"));
  hf_write(&f, 11, f.n, at("hf/b.safetensors"));
  put_index(&f, 11, -1, "");
  EXPECT(2, "are both there", "import", "hf", "-o", "in");
  unlink(at("hf/model.safetensors"));
  EXPECT(0, "28 parameters", "import", "hf", "-o", "in");
  EXPECT(0, "equal: 28 tensors", "diff", "run", "in", "--weights");
  put_index(&f, 12, -1, "");
  EXPECT(4, "index.json: tensor h.0.mlp", "import", "hf", "-o", "bad");
  put_index(&f, 11, 3, "");
  EXPECT(4, "index.json does not list tensor", "import", "hf", "-o", "bad");
  put_index(&f, 11, -1, ",\"more\":\"c.safetensors\"");
  EXPECT(4, "hf/c.safetensors", "import", "hf", "-o", "bad");
  put_index(&f, 11, -1, ",\"more\":\"../run/x\"");
  EXPECT(4, "tensor more is in no file of this directory", "import", "hf", "-o", "bad");
  put_index(&f, 11, -1, ",\"more\":\"a.safetensors\"");
  EXPECT(4, "tensor more is not in a.safetensors", "import", "hf", "-o", "bad");
  command_write_file(dir, "hf/model.safetensors.index.json", "{\"weight_map\":{}}", 17);
  EXPECT(4, "has no weight_map", "import", "hf", "-o", "bad");
  put_index(&f, 11, -1, "");
  unlink(at("hf/b.safetensors"));
  EXPECT(4, "hf/b.safetensors", "import", "hf", "-o", "bad");
  unlink(at("hf/model.safetensors.index.json"));
  EXPECT(2, "has neither model.safetensors nor model.safetensors.index.json", "import", "hf", "-o", "bad");
  hf_free(&f);
}

/* ---- weights that are no numbers ---- */
Test(import, weights_must_be_finite) {
  static const struct {
    const char *tensor;
    int64_t element;
    float value;
    const char *says;
  } cases[] = {{"wte.weight", 5 * 12 + 7, NAN, "tensor wte.weight: element [5, 7] is "},
               {"h.1.attn.c_attn.weight", 11 * 36 + 35, INFINITY,
                "tensor h.1.attn.c_attn.weight: element [11, 35] is inf"},
               {"ln_f.bias", 11, -INFINITY, "tensor ln_f.bias: element [11] is -inf"}};
  hf_file f = hf_read(at("hf/model.safetensors"));
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    float *x = &hf_find(&f, cases[i].tensor)->data[cases[i].element], kept = *x;
    *x = cases[i].value;
    hf_write(&f, 0, f.n, at("hf/model.safetensors"));
    EXPECT(2, cases[i].says, "import", "hf", "-o", "bad");
    cr_expect_neq(access(at("bad"), F_OK), 0, "a refused import left something");
    *x = kept;
  }
  hf_free(&f);
}

Test(import, tensors_are_the_models_and_no_others) {
  hf_file f = hf_read(at("hf/model.safetensors"));
  f.tensors = realloc(f.tensors, (size_t)(f.n + 1) * sizeof *f.tensors);
  f.tensors[f.n] = *hf_find(&f, "ln_f.bias");
  static const char *const cases[][2] = {
      {"ln_f.bias2", "tensor ln_f.bias2 is none of this model's"},
      {"transformer.ln_f.bias", "tensor ln_f.bias is there with and without 'transformer.'"},
      {"lm_head.bias", "tensor lm_head.bias is none of this model's"},
      {"lm_head.weight", "lm_head.weight differs from wte.weight"},
      {"h.x.attn.bias", "tensor h.x.attn.bias is none"},
      {"h.0.attn.bias", NULL},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    snprintf(f.tensors[f.n].name, sizeof f.tensors[f.n].name, "%s", cases[i][0]);
    hf_write(&f, 0, f.n + 1, at("hf/model.safetensors"));
    if (cases[i][1]) EXPECT(2, cases[i][1], "import", "hf", "-o", "bad");
    else EXPECT(0, "28 parameters", "import", "hf", "-o", "good");
  }
  hf_find(&f, "wte.weight")->shape[0]--;
  hf_find(&f, "wte.weight")->numel -= 12;
  hf_write(&f, 0, f.n, at("hf/model.safetensors"));
  EXPECT(2, "tensor wte.weight has another shape", "import", "hf", "-o", "bad");
  hf_write(&f, 1, f.n, at("hf/model.safetensors"));
  EXPECT(2, "has no tensor wte.weight", "import", "hf", "-o", "bad");
  hf_free(&f);
}
