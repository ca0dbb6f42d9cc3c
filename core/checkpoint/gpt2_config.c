/* core/checkpoint/gpt2_config.c - see gpt2.h: reading a config.json.
 *
 * The table below is all that is known of the keys, from transformers' GPT2Config and PretrainedConfig.  A key that is
 * not in it may change what the model computes in a way nobody here knows, so it is refused.  Any thread. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/gpt2.h"

enum { TEXT_MOST = 1 << 20, SIZE_MOST = 1 << 24 };

typedef struct reading {
  const char *path;
  const cJSON *root;
  phx__gpt2 *out;
  phx_error *err;
} reading;

/* ---- what a key may say ---- */
typedef phx_status rule(reading *r, const cJSON *item);

static phx_status refuse(const reading *r, const cJSON *item, const char *why) {
  char *text = cJSON_PrintUnformatted(item);
  const phx_status status =
      phx_fail(r->err, PHX_UNSUPPORTED, "%s: %.64s is %.64s, and %s", r->path, item->string, text ? text : "?", why);
  cJSON_free(text);
  return status;
}

static phx_status changes_nothing(reading *r, const cJSON *item) {
  (void)r;
  (void)item;
  return PHX_OK;
}

static phx_status model_type(reading *r, const cJSON *item) {
  const char *type = cJSON_GetStringValue(item);
  return type && !strcmp(type, "gpt2") ? PHX_OK : refuse(r, item, "only gpt2 is read");
}

/* The same function under each of its names. */
static phx_status activation(reading *r, const cJSON *item) {
  static const char *const same[] = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"};
  const char *name = cJSON_GetStringValue(item);
  for (int i = 0; name && i < 4; i++)
    if (!strcmp(name, same[i])) return PHX_OK;
  return refuse(r, item, "the model computes gelu_new (also called gelu_pytorch_tanh, gelu_fast, gelu_accurate)");
}

static phx_status epsilon(reading *r, const cJSON *item) {
  const double value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
  if (!(value >= 1e-12 && value <= 1)) return refuse(r, item, "must be a number from 1e-12 to 1");
  r->out->eps = value;
  return PHX_OK;
}

static phx_status always(reading *r, const cJSON *item) {
  return cJSON_IsTrue(item) ? PHX_OK : refuse(r, item, "the model computes as with true");
}

static phx_status never(reading *r, const cJSON *item) {
  return cJSON_IsFalse(item) || cJSON_IsNull(item) ? PHX_OK : refuse(r, item, "the model computes as with false");
}

static phx_status nothing_in_it(reading *r, const cJSON *item) {
  const bool list = cJSON_IsArray(item) || cJSON_IsObject(item);
  return cJSON_IsNull(item) || (list && !item->child) ? PHX_OK : refuse(r, item, "the model knows nothing like it");
}

static phx_status inner(reading *r, const cJSON *item) {
  int64_t value = 0;
  if (cJSON_IsNull(item)) return PHX_OK;
  if (phx__json_integer(item, 1, INT64_C(1) << 40, &value) && value == 4 * r->out->width) return PHX_OK;
  return refuse(r, item, "the model's MLP has 4 x n_embd channels");
}

static phx_status same_context(reading *r, const cJSON *item) {
  int64_t value = 0;
  if (phx__json_integer(item, 1, SIZE_MOST, &value) && value == r->out->context) return PHX_OK;
  return refuse(r, item, "n_positions is another number");
}

static phx_status dropout(reading *r, const cJSON *item) {
  const double value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
  const size_t used = strlen(r->out->dropout);
  if (!(value >= 0 && value <= 1)) return refuse(r, item, "must be a probability");
  if (value > 0)
    snprintf(r->out->dropout + used, sizeof r->out->dropout - used, "%s%s = %g", used ? ", " : "", item->string, value);
  return PHX_OK;
}

/* ---- the keys ---- */
static const struct {
  const char *name;
  size_t offset; /* in phx__gpt2 */
} sizes[] = {{"n_layer", offsetof(phx__gpt2, layers)},
             {"n_head", offsetof(phx__gpt2, heads)},
             {"n_embd", offsetof(phx__gpt2, width)},
             {"n_positions", offsetof(phx__gpt2, context)},
             {"vocab_size", offsetof(phx__gpt2, vocab)}};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static const struct {
  const char *name;
  rule *rule;
} keys[] = {
    {"model_type", model_type},
    {"activation_function", activation},
    {"layer_norm_epsilon", epsilon},
    {"scale_attn_weights", always},
    {"tie_word_embeddings", always}, /* the head is wte.weight */
    {"scale_attn_by_inverse_layer_idx", never},
    {"add_cross_attention", never},
    {"is_encoder_decoder", never},
    {"tie_encoder_decoder", never},
    {"pruned_heads", nothing_in_it},
    {"quantization_config", nothing_in_it},
    {"n_inner", inner},
    {"n_ctx", same_context},
    {"attn_pdrop", dropout},
    {"embd_pdrop", dropout},
    {"resid_pdrop", dropout},
    /* the order of operations in attention and its type: rounding in half precision, nothing else */
    {"reorder_and_upcast_attn", changes_nothing},
    /* other heads than the language model's; their weights are refused by name */
    {"summary_type", changes_nothing},
    {"summary_use_proj", changes_nothing},
    {"summary_activation", changes_nothing},
    {"summary_first_dropout", changes_nothing},
    {"summary_proj_to_labels", changes_nothing},
    {"num_labels", changes_nothing},
    {"id2label", changes_nothing},
    {"label2id", changes_nothing},
    {"problem_type", changes_nothing},
    {"finetuning_task", changes_nothing},
    {"architectures", changes_nothing},
    {"initializer_range", changes_nothing}, /* of weights that nobody trained yet */
    /* what a Python program does around the model */
    {"_name_or_path", changes_nothing},
    {"_attn_implementation_autoset", changes_nothing},
    {"attn_implementation", changes_nothing},
    {"transformers_version", changes_nothing},
    {"torch_dtype", changes_nothing}, /* the tensors say their own */
    {"dtype", changes_nothing},
    {"use_bfloat16", changes_nothing},
    {"torchscript", changes_nothing},
    {"tf_legacy_loss", changes_nothing},
    {"gradient_checkpointing", changes_nothing},
    {"use_cache", changes_nothing},
    {"return_dict", changes_nothing},
    {"output_attentions", changes_nothing},
    {"output_hidden_states", changes_nothing},
    {"output_past", changes_nothing},
    {"output_scores", changes_nothing},
    {"return_dict_in_generate", changes_nothing},
    {"keys_to_ignore_at_inference", changes_nothing},
    {"is_decoder", changes_nothing},                  /* GPT-2 always is one */
    {"cross_attention_hidden_size", changes_nothing}, /* without cross attention */
    {"chunk_size_feed_forward", changes_nothing},     /* the same sums in parts */
    /* tokens, and how text is generated */
    {"tokenizer_class", changes_nothing},
    {"prefix", changes_nothing},
    {"bos_token_id", changes_nothing},
    {"eos_token_id", changes_nothing},
    {"pad_token_id", changes_nothing},
    {"sep_token_id", changes_nothing},
    {"decoder_start_token_id", changes_nothing},
    {"forced_bos_token_id", changes_nothing},
    {"forced_eos_token_id", changes_nothing},
    {"suppress_tokens", changes_nothing},
    {"begin_suppress_tokens", changes_nothing},
    {"bad_words_ids", changes_nothing},
    {"task_specific_params", changes_nothing},
    {"max_length", changes_nothing},
    {"min_length", changes_nothing},
    {"do_sample", changes_nothing},
    {"early_stopping", changes_nothing},
    {"num_beams", changes_nothing},
    {"num_beam_groups", changes_nothing},
    {"diversity_penalty", changes_nothing},
    {"temperature", changes_nothing},
    {"top_k", changes_nothing},
    {"top_p", changes_nothing},
    {"typical_p", changes_nothing},
    {"repetition_penalty", changes_nothing},
    {"length_penalty", changes_nothing},
    {"exponential_decay_length_penalty", changes_nothing},
    {"no_repeat_ngram_size", changes_nothing},
    {"encoder_no_repeat_ngram_size", changes_nothing},
    {"num_return_sequences", changes_nothing},
    {"remove_invalid_values", changes_nothing},
};
enum { KEYS = sizeof keys / sizeof keys[0] };

static phx_status read_sizes(reading *r) {
  for (int i = 0; i < SIZES; i++) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(r->root, sizes[i].name);
    int64_t value = 0;
    if (!item) return phx_fail(r->err, PHX_INVALID, "%s: %s is missing", r->path, sizes[i].name);
    if (!phx__json_integer(item, 1, SIZE_MOST, &value))
      return phx_fail(r->err, PHX_INVALID, "%s: %s is no whole number from 1 to %d", r->path, sizes[i].name, SIZE_MOST);
    memcpy((char *)r->out + sizes[i].offset, &value, sizeof value);
  }
  if (!cJSON_GetObjectItemCaseSensitive(r->root, "model_type"))
    return phx_fail(r->err, PHX_UNSUPPORTED, "%s: model_type is missing, and only gpt2 is read", r->path);
  return PHX_OK;
}

static phx_status read_key(reading *r, const cJSON *item) {
  for (int i = 0; i < SIZES; i++)
    if (!strcmp(item->string, sizes[i].name)) return PHX_OK;
  for (int i = 0; i < KEYS; i++)
    if (!strcmp(item->string, keys[i].name)) return keys[i].rule(r, item);
  return phx_fail(r->err, PHX_UNSUPPORTED,
                  "%s: the key %.64s is not known, and may change what the model computes: take it out if it does not",
                  r->path, item->string);
}

phx_status phx__gpt2_parse(const char *path, const char *text, size_t bytes, phx__gpt2 *out, phx_error *err) {
  static const phx__json_limits limits = {.depth = 8, .values = 1u << 16, .fractions = true};
  cJSON *root = NULL;
  const cJSON *item;
  *out = (phx__gpt2){.eps = 1e-5};
  PHX_TRY(phx__json_read(path, text, bytes, &limits, &root, err));
  reading r = {path, root, out, err};
  phx_status status = read_sizes(&r);
  cJSON_ArrayForEach(item, root) {
    if (!status) status = read_key(&r, item);
  }
  if (!status && out->width % out->heads)
    status = phx_fail(err, PHX_INVALID, "%s: n_embd = %" PRId64 " is no multiple of n_head = %" PRId64, path,
                      out->width, out->heads);
  cJSON_Delete(root);
  return status;
}

phx_status phx__gpt2_read(const char *dir, phx__gpt2 *out, phx_error *err) {
  char path[4200], *text = NULL;
  int fd = -1;
  int64_t bytes = 0;
  if (snprintf(path, sizeof path, "%s/" PHX__GPT2_CONFIG, dir) >= (int)sizeof path)
    return phx_fail(err, PHX_INVALID, "%s is too long for a path", dir);
  if (access(path, F_OK)) return phx_fail(err, PHX_INVALID, "%s has no " PHX__GPT2_CONFIG, dir);
  phx_status status = phx__file_open(path, &fd, &bytes, err);
  if (status) return status;
  if (bytes > TEXT_MOST)
    status = phx_fail(err, PHX_IO, "%s has %" PRId64 " bytes; %d are the most", path, bytes, TEXT_MOST);
  else if (!(text = phx__calloc(1, (size_t)bytes + 1)))
    status = phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  else status = phx__file_read(fd, path, text, bytes, 0, err);
  phx__sys.close(fd);
  if (!status) status = phx__gpt2_parse(path, text, (size_t)bytes, out, err);
  phx__free(text);
  return status;
}
