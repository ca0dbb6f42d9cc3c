/* tests/support/gpt_rig.h - runs a model plugin as the engine would, on one rank: buffers of exactly the announced
 * sizes between guard bytes, everything the model may not rely on filled with NaN.
 *
 * One rig at a time: the plugin's declaration is valid until the next one.  Ends the test program with a message on
 * anything that is not the model's own refusal. */
#ifndef PHX__GPT_RIG_H
#define PHX__GPT_RIG_H
#include <phalanx/provider.h>
#include "fake_host.h"
#include "reference_gpt.h"

typedef struct rig_config { /* a plugin's config struct filled from "key=value key=value"; the rest are the defaults */
  const phx_plugin *plugin;
  void *values;
  char *text;
} rig_config;
rig_config rig_config_make(const char *settings);
void rig_config_free(rig_config *config);

typedef struct rig_buffer {
  unsigned char *base; /* guard, bytes, guard */
  int64_t bytes;
} rig_buffer;

typedef struct gpt_rig {
  rig_config config;
  const phx_model_table *table;
  fake_host host;
  phx_model model; /* names and sizes; numel filled */
  phx_model_facts facts;
  phx_batch_shape shape;
  phx_model_self *self;
  phx_param *params;
  rig_buffer *weights, *gradients; /* per parameter */
  rig_buffer *low;                 /* bf16 weights, when the model computes in it */
  rig_buffer *outputs, *d_outputs, *saved; /* per stage */
  rig_buffer workspace;
  int64_t workspace_used; /* bytes up to the last that any stage wrote */
} gpt_rig;

/* extension: a fake host's, e.g. plain_extension */
gpt_rig *gpt_rig_open(const char *settings, int64_t micro, int64_t sequence, const void *(*extension)(const char *));
/* The same, computing in dtype.  In bf16 the model reads rounded copies of the weights, and gpt_rig_weight holds their
 * values in fp32: call gpt_rig_round after changing them. */
gpt_rig *gpt_rig_open_as(int32_t dtype, const char *settings, int64_t micro, int64_t sequence,
                         const void *(*extension)(const char *));
void gpt_rig_round(gpt_rig *rig);
void gpt_rig_close(gpt_rig *rig);
float *gpt_rig_weight(gpt_rig *rig, uint32_t param);
float *gpt_rig_gradient(gpt_rig *rig, uint32_t param); /* NULL when frozen */
/* Forward and backward of one micro-batch; first: gradients are written, else added.  runs[layer] 0: skipped; NULL:
 * all. */
phx_status gpt_rig_step(gpt_rig *rig, const int32_t *tokens, const int32_t *targets, int64_t batch, int64_t sequence,
                        int first, const int *runs, double *loss, phx_error *err);
/* 256-byte pieces of a stage's `saved` that the last step did not write; 0: all that was announced is used. */
int64_t gpt_rig_unused_saved(const gpt_rig *rig, uint32_t stage);
/* EVALUATE; loss with targets, logits (batch, vocab) or NULL */
phx_status gpt_rig_evaluate(gpt_rig *rig, const int32_t *tokens, const int32_t *targets, int64_t batch,
                            int64_t sequence, double *loss, float *logits, phx_error *err);
/* The value of element i of a parameter for tests: large enough that no part of the model is nearly linear.  A pure
 * function, the same in tests/golden/make_golden.py. */
double rig_value(int64_t param, int64_t i, const char *name);
int32_t rig_token(int64_t i, int64_t vocab);
#endif
