/* plugins/gpt/config.c - presets, the checks of [model], and the freeze patterns.
 *
 * Pure; any thread.  Does not look at the data or the device.  What does not fit is refused with the arithmetic. */
#include "gpt.h"

#include <fnmatch.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

const gpt_preset gpt_presets[] = {
    {"none", 0, 0, 0, 0, 0},
    {"tiny", 4, 4, 128, 256, 257}, /* bytes and end of text */
    {"124M", 12, 12, 768, 1024, 50257},
    {"355M", 24, 16, 1024, 1024, 50257},
    {"774M", 36, 20, 1280, 1024, 50257},
    {"1558M", 48, 25, 1600, 1024, 50257},
    {NULL, 0, 0, 0, 0, 0},
};
enum { PRESETS = sizeof gpt_presets / sizeof gpt_presets[0] - 1 };

static int64_t pick(int64_t explicit_value, int64_t preset) { return explicit_value > 0 ? explicit_value : preset; }

phx_status gpt_resolve(const gpt_config *config, gpt_sizes *out, phx_error *err) {
  if (config->size < 0 || config->size >= PRESETS)
    return phx_fail(err, PHX_INVALID, "[model] size: there is no preset number %" PRId32, config->size);
  const gpt_preset *preset = &gpt_presets[config->size];
  gpt_sizes s = {
      .layers = pick(config->layers, preset->layers),
      .heads = pick(config->heads, preset->heads),
      .width = pick(config->width, preset->width),
      .context = pick(config->context, preset->context),
      .vocab = pick(config->vocab, preset->vocab),
  };
  const struct {
    const char *key;
    int64_t value;
  } keys[] = {{"layers", s.layers}, {"heads", s.heads}, {"width", s.width}, {"context", s.context}, {"vocab", s.vocab}};
  char missing[64] = "";
  for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
    if (keys[i].value > 0) continue;
    if (missing[0]) strncat(missing, ", ", sizeof missing - strlen(missing) - 1);
    strncat(missing, keys[i].key, sizeof missing - strlen(missing) - 1);
  }
  if (missing[0])
    return phx_fail(err, PHX_INVALID,
                    "[model] %s not set: give size = tiny, 124M, 355M, 774M or 1558M, or set all of layers, heads, "
                    "width, context, vocab", missing);
  if (s.width % s.heads)
    return phx_fail(err, PHX_INVALID,
                    "[model] width = %" PRId64 " is not a multiple of heads = %" PRId64 ": %" PRId64 " = %" PRId64
                    " x %" PRId64 " + %" PRId64 "; choose a width that heads divides",
                    s.width, s.heads, s.width, s.heads, s.width / s.heads, s.width % s.heads);
  const int64_t pad = config->vocab_pad > 0 ? config->vocab_pad : 1;
  s.vp = (s.vocab + pad - 1) / pad * pad;
  *out = s;
  return PHX_OK;
}

/* The next pattern of a comma separated list, blanks trimmed; 0 at the end. */
static int next_pattern(const char **list, char *out, size_t room) {
  for (;;) {
    while (**list == ' ' || **list == '\t' || **list == ',') (*list)++;
    if (!**list) return 0;
    size_t n = strcspn(*list, ",");
    const char *start = *list;
    *list += n;
    while (n && (start[n - 1] == ' ' || start[n - 1] == '\t')) n--;
    if (n >= room) n = room - 1;
    memcpy(out, start, n);
    out[n] = 0;
    return 1;
  }
}

int32_t gpt_frozen(const gpt_config *config, const char *name) {
  char pattern[256];
  for (const char *list = config->freeze ? config->freeze : ""; next_pattern(&list, pattern, sizeof pattern);)
    if (fnmatch(pattern, name, 0) == 0) return 1;
  return 0;
}

phx_status gpt_check_freeze(const gpt_config *config, const phx_param *params, uint32_t n, phx_error *err) {
  char pattern[256];
  for (const char *list = config->freeze ? config->freeze : ""; next_pattern(&list, pattern, sizeof pattern);) {
    if (strlen(pattern) == sizeof pattern - 1)
      return phx_fail(err, PHX_INVALID, "[model] freeze: a pattern is longer than %zu characters", sizeof pattern - 2);
    uint32_t matched = 0;
    for (uint32_t i = 0; i < n; i++) matched += fnmatch(pattern, params[i].name, 0) == 0;
    if (!matched)
      return phx_fail(err, PHX_INVALID,
                      "[model] freeze: '%s' matches no parameter; names are wte.weight, wpe.weight, "
                      "h.0.attn.c_attn.weight, ..., ln_f.bias", pattern);
  }
  uint32_t trainable = 0;
  for (uint32_t i = 0; i < n; i++) trainable += !(params[i].flags & PHX_PARAM_FROZEN);
  if (!trainable)
    return phx_fail(err, PHX_INVALID, "[model] freeze = %s leaves nothing to train: all %" PRIu32 " parameters match",
                    config->freeze, n);
  return PHX_OK;
}
