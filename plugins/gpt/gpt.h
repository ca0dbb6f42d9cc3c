/* plugins/gpt/gpt.h - the inner contract of the GPT-2 model: configuration, sizes, memory plan, stages.
 *
 * Letters as in phalanx/provider.h: B sequences of T tokens, N = B * T rows, C width, H heads, V vocabulary, Vp the row
 * length of the logits (V rounded up to vocab_pad; the extra columns are scratch, never state). */
#ifndef PHX__GPT_H
#define PHX__GPT_H
#include <phalanx/error.h>
#include <phalanx/provider.h>

typedef struct gpt_config { /* filled by the core from the option table of plugin.c */
  int64_t layers, heads, width, context, vocab; /* 0: from the preset */
  int64_t vocab_pad;
  double layer_drop;
  const char *freeze; /* comma separated patterns, or "" */
  int32_t size;       /* index into gpt_presets */
  int32_t reserved0;
  double norm_eps;
} gpt_config;

typedef struct gpt_sizes { /* preset and explicit values combined, checked */
  int64_t layers, heads, width, context, vocab, vp;
} gpt_sizes;

typedef struct gpt_preset {
  const char *name;
  int64_t layers, heads, width, context, vocab;
} gpt_preset;
extern const gpt_preset gpt_presets[]; /* [0] is "none"; ends with a NULL name */

phx_status gpt_resolve(const gpt_config *config, gpt_sizes *out, phx_error *err);
/* Does a pattern of `freeze` match this parameter's name? */
int32_t gpt_frozen(const gpt_config *config, const char *name);

/* Every pattern matches something, and something is left to train. */
phx_status gpt_check_freeze(const gpt_config *config, const phx_param *params, uint32_t n, phx_error *err);

/* The parameters of a block, in the order of its unit and its stage's view. */
enum {
  GPT_LN1_W, GPT_LN1_B, GPT_QKV_W, GPT_QKV_B, GPT_ATT_W, GPT_ATT_B,
  GPT_LN2_W, GPT_LN2_B, GPT_FC_W, GPT_FC_B, GPT_OUT_W, GPT_OUT_B, GPT_BLOCK_PARAMS
};
extern const char *const gpt_block_names[GPT_BLOCK_PARAMS]; /* without "h.N." */
/* The head's view: ln_f, then wte. */
enum { GPT_LNF_W, GPT_LNF_B, GPT_HEAD_WTE, GPT_HEAD_PARAMS };

phx_status gpt_declare(const void *config, phx_model *out, phx_model_facts *facts, const phx_batch_shape *shape,
                       phx_error *err);

/* Byte offsets into `saved` and `workspace`, each a multiple of PHX_ALIGN.  One function lays them out, for
 * stage_memory() and for the stages, so what is announced is what is used. */
typedef struct gpt_block_plan {
  /* saved: 13 C elements and H + 4 floats a token */
  int64_t mean1, rstd1, qkv, att, lse, res2, mean2, rstd2, pre, act;
  int64_t saved;
  int64_t a, b;                    /* workspace, forward: (N, C) each */
  int64_t wide, narrow, rows, drop; /* workspace, backward: (N, 4C), (N, C), (B, H, T), a discarded gradient */
  int64_t workspace;
} gpt_block_plan;
typedef struct gpt_head_plan {
  int64_t mean, rstd, logits, saved; /* (N), (N), (N, Vp): the logits become their own gradient in place */
  int64_t ln, losses, last, wide;    /* workspace, forward: (N, C), (N), (B, C), bf16 alone: (B, V) in fp32 */
  int64_t drop;                      /* workspace, backward, behind ln: a discarded gradient */
  int64_t workspace;
} gpt_head_plan;
/* Activations and their gradients are of dtype; means, deviations, log-sum-exps, losses and gradients of weights fp32.
 * drop: floats of the largest gradient that an operation writes though its parameter is frozen (0: none). */
void gpt_block_layout(const gpt_sizes *sizes, int32_t dtype, int64_t b, int64_t t, int64_t drop, gpt_block_plan *out);
void gpt_head_layout(const gpt_sizes *sizes, int32_t dtype, int64_t b, int64_t t, int64_t drop, gpt_head_plan *out);

struct phx_model_self {
  const phx_host *host;
  const phx_ops *ops;
  const phx_device *device;
  gpt_sizes sizes;
  phx_batch_shape shape;
  double layer_drop;
  int32_t dtype; /* of activations and of weights as they are read */
  float eps;     /* of the layer norms */
};

/* run.c: the rest of the table */
phx_status gpt_stage_memory(const void *config, const phx_batch_shape *shape, uint32_t stage, phx_stage_memory *out,
                            phx_error *err);
phx_status gpt_create(const phx_host *host, const void *config, const phx_model *model, const phx_batch_shape *shape,
                      phx_model_self **out, phx_error *err);
void gpt_destroy(phx_model_self *self);
int32_t gpt_stage_runs(phx_model_self *self, uint32_t stage, uint64_t seed, int64_t step, int32_t micro_batch,
                       int32_t data_rank);
phx_status gpt_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
phx_status gpt_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
/* block.c */
phx_status gpt_block_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
phx_status gpt_block_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
/* ends.c */
phx_status gpt_embed_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
phx_status gpt_embed_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
phx_status gpt_head_forward(phx_model_self *self, const phx_stage_call *call, phx_error *err);
phx_status gpt_head_backward(phx_model_self *self, const phx_stage_call *call, phx_error *err);

/* Gradient of a layer norm or a linear; what is frozen is skipped, or written to `drop` where the operation cannot. */
typedef struct gpt_gradient {
  float *w, *b;
  int32_t w_mode, b_mode;
} gpt_gradient;
gpt_gradient gpt_gradient_of(const phx_view *view, uint32_t weight, float *drop);

static inline const void *gpt_weight(const phx_view *view, uint32_t i) {
  return phx_view_param(view, i)->weight;
}
static inline void *gpt_at(void *base, int64_t offset) {
  return (char *)base + offset;
}
#endif
