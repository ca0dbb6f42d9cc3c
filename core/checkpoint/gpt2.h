/* core/checkpoint/gpt2.h - Hugging Face's GPT-2 as a format: its config.json, its names, and how its matrices stand.
 *
 * A file in this format has the names of our parameters, without "transformer." in front, and keeps the matrices of
 * linear layers as Conv1D does: (in, out) instead of our (out, in).  Every key of a config.json is honoured, known to
 * change nothing, or refused by name: what is read computes here what it computes there. */
#ifndef PHX__GPT2_H
#define PHX__GPT2_H
#include <stdbool.h>
#include <stddef.h>

#include "checkpoint/manifest.h"

#define PHX__GPT2_CONFIG "config.json"
#define PHX__GPT2_WEIGHTS "model.safetensors"

typedef struct phx__gpt2 {
  int64_t layers, heads, width, context, vocab;
  double eps;        /* of the layer norms */
  char dropout[160]; /* keys of dropout that are not 0, and their values: they change training only; "": none */
} phx__gpt2;

enum { PHX__GPT2_INI = 512 };

/* Of the text of a config.json; path is for messages.  PHX_IO: no JSON; PHX_UNSUPPORTED: a key that changes what is
 * computed, or that is unknown; PHX_INVALID: a value that cannot be. */
phx_status phx__gpt2_parse(const char *path, const char *text, size_t bytes, phx__gpt2 *out, phx_error *err);
/* DIR/config.json.  PHX_INVALID also: it is not there. */
phx_status phx__gpt2_read(const char *dir, phx__gpt2 *out, phx_error *err);
/* DIR/config.json is written. */
phx_status phx__gpt2_write(const char *dir, const phx__gpt2 *gpt2, phx_error *err);
/* The model of a manifest, if it is one; PHX_UNSUPPORTED: it is not.  `where` is for messages. */
phx_status phx__gpt2_of_manifest(const char *where, const phx__manifest *m, phx__gpt2 *out, phx_error *err);
/* PHX_INVALID names the first size that differs. */
phx_status phx__gpt2_same(const char *a_path, const phx__gpt2 *a, const char *b_path, const phx__gpt2 *b,
                          phx_error *err);
/* A [model] section, and [batch] sequence. */
void phx__gpt2_ini(const phx__gpt2 *gpt2, char ini[PHX__GPT2_INI]);

/* The parameters, as the format keeps them: wte, wpe, 12 of each block, ln_f. */
typedef struct phx__gpt2_param {
  char name[48];
  uint32_t ndim;
  int64_t shape[2];
} phx__gpt2_param;
uint32_t phx__gpt2_n_params(const phx__gpt2 *gpt2);
phx__gpt2_param phx__gpt2_param_at(const phx__gpt2 *gpt2, uint32_t i);

/* Is this parameter's matrix kept as (in, out)? */
bool phx__gpt2_transposed(const char *name);
/* The name without "transformer.". */
const char *phx__gpt2_bare(const char *name);
/* A mask of attention (h.3.attn.bias), which carries nothing. */
bool phx__gpt2_mask(const char *bare_name);
#endif
