/* core/checkpoint/gpt2.c - see gpt2.h: names and matrices, what a manifest says, and writing a config.json.
 *
 * Reading one is gpt2_config.c.  Any thread. */
#include "checkpoint/gpt2.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/output.h"
#include "base/status.h"
#include "base/sys.h"

/* ---- names ---- */
bool phx__gpt2_transposed(const char *name) {
  static const char *const ends[] = {".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight",
                                     ".mlp.c_proj.weight"};
  const size_t n = strlen(name);
  for (int i = 0; i < 4; i++)
    if (n > strlen(ends[i]) && !strcmp(name + n - strlen(ends[i]), ends[i])) return true;
  return false;
}

const char *phx__gpt2_bare(const char *name) { return strncmp(name, "transformer.", 12) ? name : name + 12; }

bool phx__gpt2_mask(const char *bare_name) {
  if (strncmp(bare_name, "h.", 2)) return false;
  const char *rest = bare_name + 2 + strspn(bare_name + 2, "0123456789");
  return rest > bare_name + 2 && (!strcmp(rest, ".attn.bias") || !strcmp(rest, ".attn.masked_bias"));
}

uint32_t phx__gpt2_n_params(const phx__gpt2 *g) { return (uint32_t)(4 + 12 * g->layers); }

phx__gpt2_param phx__gpt2_param_at(const phx__gpt2 *g, uint32_t i) {
  static const struct {
    const char *name;
    int rows, columns; /* in units of the width; 0 columns: a vector */
  } block[12] = {{"ln_1.weight", 1, 0},        {"ln_1.bias", 1, 0},        {"attn.c_attn.weight", 1, 3},
                 {"attn.c_attn.bias", 3, 0},   {"attn.c_proj.weight", 1, 1}, {"attn.c_proj.bias", 1, 0},
                 {"ln_2.weight", 1, 0},        {"ln_2.bias", 1, 0},        {"mlp.c_fc.weight", 1, 4},
                 {"mlp.c_fc.bias", 4, 0},      {"mlp.c_proj.weight", 4, 1}, {"mlp.c_proj.bias", 1, 0}};
  const int64_t c = g->width;
  const uint32_t last = phx__gpt2_n_params(g) - 2;
  if (i == 0) return (phx__gpt2_param){"wte.weight", 2, {g->vocab, c}};
  if (i == 1) return (phx__gpt2_param){"wpe.weight", 2, {g->context, c}};
  if (i == last) return (phx__gpt2_param){"ln_f.weight", 1, {c, 1}};
  if (i > last) return (phx__gpt2_param){"ln_f.bias", 1, {c, 1}};
  const uint32_t k = (i - 2) % 12;
  phx__gpt2_param p = {"", block[k].columns ? 2 : 1, {block[k].rows * c, block[k].columns ? block[k].columns * c : 1}};
  snprintf(p.name, sizeof p.name, "h.%" PRIu32 ".%s", (i - 2) / 12, block[k].name);
  return p;
}

/* ---- the model of a manifest ---- */
static const phx__manifest_param *param_of(const phx__manifest *m, const char *name) {
  for (uint32_t i = 0; i < m->n_params; i++)
    if (!strcmp(m->params[i].name, name)) return &m->params[i];
  return NULL;
}

/* Heads are the only size that no shape tells: from the configuration, by number or by the preset's name. */
static int64_t heads_of(const phx__manifest *m) {
  static const struct {
    const char *size;
    int64_t heads;
  } presets[] = {{"tiny", 4}, {"124M", 12}, {"355M", 16}, {"774M", 20}, {"1558M", 25}};
  const char *text = phx__manifest_config_of(m, "model", "heads");
  const int64_t heads = text ? strtoll(text, NULL, 10) : 0;
  if (heads > 0) return heads;
  text = phx__manifest_config_of(m, "model", "size");
  for (int i = 0; text && i < 5; i++)
    if (!strcmp(text, presets[i].size)) return presets[i].heads;
  return 0;
}

phx_status phx__gpt2_of_manifest(const char *where, const phx__manifest *m, phx__gpt2 *out, phx_error *err) {
  const char *plugin = phx__manifest_config_of(m, "model", "plugin");
  const char *eps = phx__manifest_config_of(m, "model", "norm_eps");
  const phx__manifest_param *wte = param_of(m, "wte.weight"), *wpe = param_of(m, "wpe.weight");
  if (!wte || !wpe || wte->ndim != 2 || wpe->ndim != 2 || wte->shape[1] != wpe->shape[1] || (m->n_params - 4) % 12 ||
      m->n_params < 16 || !param_of(m, "ln_f.bias") || !param_of(m, "h.0.attn.c_attn.weight"))
    return phx_fail(err, PHX_UNSUPPORTED, "%s holds a model of plugin %s, which is no GPT-2", where,
                    plugin ? plugin : "?");
  *out = (phx__gpt2){.layers = (m->n_params - 4) / 12, .heads = heads_of(m), .width = wte->shape[1],
                     .context = wpe->shape[0], .vocab = wte->shape[0], .eps = eps ? strtod(eps, NULL) : 1e-5};
  if (out->heads < 1 || out->width % out->heads)
    return phx_fail(err, PHX_INVALID,
                    "%s: its configuration does not say how many heads the model has ([model] heads)", where);
  for (uint32_t i = 0; i < m->n_params; i++)
    if (phx__gpt2_transposed(m->params[i].name) && m->params[i].ndim != 2)
      return phx_fail(err, PHX_UNSUPPORTED, "%s: parameter %s is no matrix", where, m->params[i].name);
  return PHX_OK;
}

phx_status phx__gpt2_same(const char *a_path, const phx__gpt2 *a, const char *b_path, const phx__gpt2 *b,
                          phx_error *err) {
  const struct {
    const char *name;
    int64_t a, b;
  } sizes[] = {{"n_layer (layers)", a->layers, b->layers},
               {"n_head (heads)", a->heads, b->heads},
               {"n_embd (width)", a->width, b->width},
               {"n_positions (context)", a->context, b->context},
               {"vocab_size (vocab)", a->vocab, b->vocab}};
  for (int i = 0; i < 5; i++)
    if (sizes[i].a != sizes[i].b)
      return phx_fail(err, PHX_INVALID, "%s is %" PRId64 " in %s and %" PRId64 " in %s", sizes[i].name, sizes[i].a,
                      a_path, sizes[i].b, b_path);
  if ((float)a->eps != (float)b->eps)
    return phx_fail(err, PHX_INVALID, "layer_norm_epsilon (norm_eps) is %g in %s and %g in %s", a->eps, a_path, b->eps,
                    b_path);
  return PHX_OK;
}

void phx__gpt2_ini(const phx__gpt2 *g, char ini[PHX__GPT2_INI]) {
  snprintf(ini, PHX__GPT2_INI,
           "[batch]\nmicro = 1\nsequence = %" PRId64 "\n[model]\nplugin = gpt\nlayers = %" PRId64 "\nheads = %" PRId64
           "\nwidth = %" PRId64 "\ncontext = %" PRId64 "\nvocab = %" PRId64 "\nnorm_eps = %.9g\n",
           g->context, g->layers, g->heads, g->width, g->context, g->vocab, g->eps);
}

/* ---- writing ---- */
phx_status phx__gpt2_write(const char *dir, const phx__gpt2 *g, phx_error *err) {
  char path[4200];
  phx__text t = {0};
  int64_t end = -1;
  if (g->vocab == 50257) end = 50256; /* GPT-2's end of text */
  if (g->vocab == 257) end = 256;     /* our bytes' */
  phx__text_add(&t, "{\n  \"architectures\": [\"GPT2LMHeadModel\"],\n  \"model_type\": \"gpt2\",\n"
                "  \"n_layer\": %" PRId64 ",\n  \"n_head\": %" PRId64 ",\n  \"n_embd\": %" PRId64 ",\n"
                "  \"n_positions\": %" PRId64 ",\n  \"n_ctx\": %" PRId64 ",\n  \"vocab_size\": %" PRId64 ",\n",
                g->layers, g->heads, g->width, g->context, g->context, g->vocab);
  phx__text_add(&t, "  \"activation_function\": \"gelu_new\",\n  \"layer_norm_epsilon\": %.9g,\n"
                "  \"attn_pdrop\": 0.0,\n  \"embd_pdrop\": 0.0,\n  \"resid_pdrop\": 0.0,\n"
                "  \"tie_word_embeddings\": true,\n  \"torch_dtype\": \"float32\"", g->eps);
  if (end >= 0)
    phx__text_add(&t, ",\n  \"bos_token_id\": %" PRId64 ",\n  \"eos_token_id\": %" PRId64, end, end);
  phx__text_add(&t, "\n}\n");
  if (t.failed) return phx_fail(err, PHX_NOMEM, "no memory for " PHX__GPT2_CONFIG);
  phx_status status = PHX_OK;
  if (snprintf(path, sizeof path, "%s/" PHX__GPT2_CONFIG, dir) >= (int)sizeof path)
    status = phx_fail(err, PHX_INVALID, "%s is too long for a path", dir);
  if (!status) status = phx__text_write(path, t.data, err);
  phx__free(t.data);
  return status;
}
