/* plugins/gpt/declare.c - parameters, units and stages, before any weight exists.  [main] only.
 *
 * Names are Hugging Face's; linear weights are (out, in).  Initial values as in GPT-2 (and llm.c): weights normal with
 * std 0.02, positions included; the two projections that end in the residual stream 0.02 / sqrt(2 L); biases 0, layer
 * norm weights 1.  Weight decay for everything with two dimensions, embeddings included (nanoGPT).
 *
 * The arrays belong to this file until declare is called again. */
#include "gpt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 40 };

const char *const gpt_block_names[GPT_BLOCK_PARAMS] = {
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight",    "mlp.c_fc.bias",    "mlp.c_proj.weight",  "mlp.c_proj.bias",
};

/* Rows and columns in units of the width; 0 columns: a vector.  parts: matrices below one another. */
static const struct {
  int rows, columns, init, residual, role, parts;
} block_shapes[GPT_BLOCK_PARAMS] = {
    [GPT_LN1_W] = {1, 0, PHX_INIT_ONE, 0, PHX_ROLE_NORM, 0},
    [GPT_LN1_B] = {1, 0, PHX_INIT_ZERO, 0, PHX_ROLE_NORM, 0},
    [GPT_QKV_W] = {3, 1, PHX_INIT_NORMAL, 0, PHX_ROLE_MATRIX, 3},
    [GPT_QKV_B] = {3, 0, PHX_INIT_ZERO, 0, PHX_ROLE_VECTOR, 3},
    [GPT_ATT_W] = {1, 1, PHX_INIT_NORMAL, 1, PHX_ROLE_MATRIX, 0},
    [GPT_ATT_B] = {1, 0, PHX_INIT_ZERO, 0, PHX_ROLE_VECTOR, 0},
    [GPT_LN2_W] = {1, 0, PHX_INIT_ONE, 0, PHX_ROLE_NORM, 0},
    [GPT_LN2_B] = {1, 0, PHX_INIT_ZERO, 0, PHX_ROLE_NORM, 0},
    [GPT_FC_W] = {4, 1, PHX_INIT_NORMAL, 0, PHX_ROLE_MATRIX, 0},
    [GPT_FC_B] = {4, 0, PHX_INIT_ZERO, 0, PHX_ROLE_VECTOR, 0},
    [GPT_OUT_W] = {1, 4, PHX_INIT_NORMAL, 1, PHX_ROLE_MATRIX, 0},
    [GPT_OUT_B] = {1, 0, PHX_INIT_ZERO, 0, PHX_ROLE_VECTOR, 0},
};

typedef struct declaration {
  phx_param *params;
  phx_unit *units;
  phx_stage *stages;
  phx_use *uses;
  char (*names)[NAME_BYTES]; /* params, then blocks */
  uint32_t n_params, n_units, n_stages, n_uses;
} declaration;
static declaration last; /* what the previous declare gave out */
static char computes[80];

static void declaration_free(declaration *d) {
  free(d->names);
  free(d->uses);
  free(d->stages);
  free(d->units);
  free(d->params);
  memset(d, 0, sizeof *d);
}

static phx_status declaration_alloc(declaration *d, int64_t layers, phx_error *err) {
  const size_t l = (size_t)layers;
  d->params = calloc(GPT_BLOCK_PARAMS * l + 4, sizeof *d->params);
  d->units = calloc(l + 3, sizeof *d->units);
  d->stages = calloc(l + 2, sizeof *d->stages);
  d->uses = calloc(l + 4, sizeof *d->uses);
  d->names = calloc(GPT_BLOCK_PARAMS * l + 4 + l, sizeof *d->names);
  if (d->params && d->units && d->stages && d->uses && d->names) return PHX_OK;
  declaration_free(d);
  return phx_fail(err, PHX_NOMEM, "the declaration of a model with %lld layers does not fit in memory",
                  (long long)layers);
}

static void add_unit(declaration *d, const char *name) {
  d->units[d->n_units++] = (phx_unit){.name = name, .first_param = d->n_params};
}

/* columns 0: a vector.  The parameter joins the unit added last. */
static phx_param *add_param(declaration *d, const gpt_config *config, const char *name, int64_t rows, int64_t columns,
                            int32_t init, double init_std, int32_t role) {
  char *kept = d->names[d->n_params];
  snprintf(kept, NAME_BYTES, "%s", name);
  phx_param p = {.name = kept, .shape = {rows, columns ? columns : 1, 1, 1}, .ndim = columns ? 2 : 1,
                 .unit = d->n_units - 1, .init = init, .init_std = init == PHX_INIT_NORMAL ? init_std : 0,
                 .role = role};
  if (columns) p.flags |= PHX_PARAM_DECAY;
  if (gpt_frozen(config, kept)) p.flags |= PHX_PARAM_FROZEN;
  d->units[d->n_units - 1].n_params++;
  d->params[d->n_params] = p;
  return &d->params[d->n_params++];
}

static void add_stage(declaration *d, const char *name) {
  d->stages[d->n_stages++] = (phx_stage){.name = name, .first_use = d->n_uses};
}

/* Joins the stage added last.  A unit that is frozen whole gets no gradient. */
static void add_use(declaration *d, uint32_t unit, uint32_t flags) {
  const phx_unit *u = &d->units[unit];
  for (uint32_t i = 0; i < u->n_params; i++)
    if (!(d->params[u->first_param + i].flags & PHX_PARAM_FROZEN)) flags |= PHX_USE_GRADIENT;
  d->uses[d->n_uses++] = (phx_use){.unit = unit, .flags = flags};
  d->stages[d->n_stages - 1].n_uses++;
}

static void declare_units(declaration *d, const gpt_config *config, const gpt_sizes *s) {
  const double residual_std = 0.02 / sqrt(2.0 * (double)s->layers);
  add_unit(d, "wte");
  add_param(d, config, "wte.weight", s->vocab, s->width, PHX_INIT_NORMAL, 0.02, PHX_ROLE_EMBEDDING);
  add_unit(d, "wpe");
  add_param(d, config, "wpe.weight", s->context, s->width, PHX_INIT_NORMAL, 0.02, PHX_ROLE_EMBEDDING);
  for (int64_t l = 0; l < s->layers; l++) {
    char *unit_name = d->names[GPT_BLOCK_PARAMS * s->layers + 4 + l];
    snprintf(unit_name, NAME_BYTES, "h.%lld", (long long)l);
    add_unit(d, unit_name);
    for (int i = 0; i < GPT_BLOCK_PARAMS; i++) {
      char name[NAME_BYTES];
      snprintf(name, sizeof name, "h.%lld.%s", (long long)l, gpt_block_names[i]);
      phx_param *p =
          add_param(d, config, name, block_shapes[i].rows * s->width, block_shapes[i].columns * s->width,
                    block_shapes[i].init, block_shapes[i].residual ? residual_std : 0.02, block_shapes[i].role);
      p->row_parts = (uint32_t)block_shapes[i].parts;
    }
  }
  add_unit(d, "ln_f");
  add_param(d, config, "ln_f.weight", s->width, 0, PHX_INIT_ONE, 0, PHX_ROLE_NORM);
  add_param(d, config, "ln_f.bias", s->width, 0, PHX_INIT_ZERO, 0, PHX_ROLE_NORM);
}

static void declare_stages(declaration *d, const gpt_sizes *s) {
  const uint32_t reads = PHX_USE_FORWARD | PHX_USE_BACKWARD;
  add_stage(d, "embed"); /* its backward adds gradients but reads no weight: nothing is gathered for it */
  add_use(d, 0, PHX_USE_FORWARD);
  add_use(d, 1, PHX_USE_FORWARD);
  for (uint32_t l = 0; l < (uint32_t)s->layers; l++) {
    add_stage(d, d->units[2 + l].name);
    add_use(d, 2 + l, reads);
  }
  add_stage(d, "head");
  add_use(d, 2 + (uint32_t)s->layers, reads);
  add_use(d, 0, reads);
}

phx_status gpt_declare(const void *config, phx_model *out, phx_model_facts *facts, const phx_batch_shape *shape,
                       phx_error *err) {
  gpt_sizes s;
  PHX_TRY(gpt_resolve(config, &s, err));
  const int64_t t = shape ? shape->sequence : s.context;
  if (t < 1 || t > s.context)
    return phx_fail(err, PHX_INVALID,
                    "[batch] sequence = %lld does not fit the model's context of %lld tokens: lower sequence or raise "
                    "[model] context", (long long)t, (long long)s.context);
  declaration d = {0};
  PHX_TRY(declaration_alloc(&d, s.layers, err));
  declare_units(&d, config, &s);
  declare_stages(&d, &s);
  const phx_status status = gpt_check_freeze(config, d.params, d.n_params, err);
  if (status != PHX_OK) {
    declaration_free(&d);
    return status;
  }
  declaration_free(&last);
  last = d;
  const phx_model model = {.struct_size = sizeof model, .params = d.params, .units = d.units, .stages = d.stages,
                           .uses = d.uses, .n_params = d.n_params, .n_units = d.n_units, .n_stages = d.n_stages,
                           .n_uses = d.n_uses, .param_stride = sizeof *d.params, .unit_stride = sizeof *d.units,
                           .stage_stride = sizeof *d.stages, .use_stride = sizeof *d.uses};
  phx_struct_give(out, &model);
  snprintf(computes, sizeof computes, "heads %lld, norm_eps %.9g", (long long)s.heads,
           ((const gpt_config *)config)->norm_eps);
  const double l = (double)s.layers, c = (double)s.width, v = (double)s.vocab;
  const phx_model_facts known = {.struct_size = sizeof known, .vocabulary = s.vocab, .context = s.context,
                                 .flops_per_token = 6 * (12 * l * c * c + v * c) + 12 * l * c * (double)t,
                                 .computes = computes};
  phx_struct_give(facts, &known);
  return PHX_OK;
}
