/* phalanx/model.h - what is trained: parameters, units (storage) and stages (execution).  "phx.model/1"
 *
 * A unit is storage: parameters that are gathered and freed together.  A stage is execution: a step of the forward
 * pass, with the units it uses.  A tied weight is one unit used by two stages.
 *
 * Coordinates, fixed by the host: per unit, its trainable parameters in order, each beginning at a 256-byte boundary
 * (64 elements, which are 128 bytes in a bf16 copy), form its flat; the flat is padded to canonical blocks of PHX_BLOCK
 * elements.  Frozen parameters form a flat of their own in the same way, without gradient or optimizer state.  Shards,
 * norms, state slices, checkpoints and hashes all speak (unit, flat, first block, blocks).  Padding is zero and stays
 * zero. */
#ifndef PHALANX_MODEL_H
#define PHALANX_MODEL_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_BLOCK 1024 /* elements of a canonical block */
#define PHX_PARAM_DIMS 8

enum { PHX_PARAM_FROZEN = 1u << 0, PHX_PARAM_DECAY = 1u << 1 /* weight decay applies */ };
/* What a parameter is for, so that an optimizer can treat kinds of parameters in different ways. */
enum {
  PHX_ROLE_UNKNOWN = 0,   /* the model does not say */
  PHX_ROLE_MATRIX = 1,    /* maps activations to activations; two dimensions or more, as all but the next three */
  PHX_ROLE_EMBEDDING = 2, /* one row per token or position, tied to the head or not */
  PHX_ROLE_HEAD = 3,      /* maps activations to logits, and is not tied to the embedding */
  PHX_ROLE_NORM = 4,      /* scale or shift of a normalisation */
  PHX_ROLE_VECTOR = 5,    /* a bias or another vector; one dimension */
  PHX_ROLES = 6
};
enum { PHX_INIT_ZERO = 0, PHX_INIT_ONE = 1, PHX_INIT_NORMAL = 2 /* mean 0, init_std */ };
enum { PHX_FLAT_TRAINABLE = 0, PHX_FLAT_FROZEN = 1, PHX_FLATS = 2 };
enum {
  PHX_USE_FORWARD = 1u << 0,  /* the stage's forward pass reads the unit's weights */
  PHX_USE_BACKWARD = 1u << 1, /* its backward pass reads them */
  PHX_USE_GRADIENT = 1u << 2, /* its backward pass writes or adds gradients */
  PHX_USE_LAST = 1u << 3 /* filled by the host: in backward order, the last stage that adds to this unit's gradient */
};

typedef struct phx_param {
  const char *name;  /* unique; Hugging Face's name where there is one */
  int64_t shape[PHX_PARAM_DIMS]; /* (ndim) row-major; the rest 1 */
  uint32_t ndim;
  uint32_t flags;    /* PHX_PARAM_* */
  uint32_t unit;
  int32_t init;      /* PHX_INIT_* */
  double init_std;
  int64_t numel;     /* filled by the host */
  int64_t offset;    /* elements from the start of its flat; filled by the host */
  int32_t role;      /* PHX_ROLE_* */
  /* Several matrices in one: equal parts along shape[0], and along a row; 0: one.  q, k and v packed as (3C, C) have 3
   * row parts. */
  uint32_t row_parts, column_parts;
  uint32_t reserved0;
} phx_param;
/* Elements of a row: a parameter is shape[0] rows, and a vector's have one element. */
static inline int64_t phx_param_row(const phx_param *p) { return p->numel / p->shape[0]; }

typedef struct phx_unit {
  const char *name;
  uint32_t first_param, n_params;  /* params of a unit stand together, in order */
  int64_t blocks[PHX_FLATS];       /* canonical blocks of each flat; filled by the host */
  int64_t first_block[PHX_FLATS];  /* of the whole model's flat, units in order; filled by the host */
} phx_unit;

typedef struct phx_use {
  uint32_t unit, flags; /* PHX_USE_* */
} phx_use;

typedef struct phx_stage {
  const char *name;
  uint32_t first_use, n_uses; /* in phx_model.uses */
} phx_stage;

typedef struct phx_model { /* [borrow:self] */
  size_t struct_size;
  const phx_param *params;
  const phx_unit *units;
  const phx_stage *stages; /* in forward order; backward is the reverse */
  const phx_use *uses;
  uint32_t n_params, n_units, n_stages, n_uses;
  uint32_t param_stride, unit_stride, stage_stride, use_stride; /* bytes between elements */
  int64_t total_blocks[PHX_FLATS]; /* filled by the host */
} phx_model;

static inline const phx_param *phx_model_param(const phx_model *m, uint32_t i) {
  return (const phx_param *)(const void *)((const char *)m->params + (size_t)i * m->param_stride);
}
static inline const phx_unit *phx_model_unit(const phx_model *m, uint32_t i) {
  return (const phx_unit *)(const void *)((const char *)m->units + (size_t)i * m->unit_stride);
}
static inline const phx_stage *phx_model_stage(const phx_model *m, uint32_t i) {
  return (const phx_stage *)(const void *)((const char *)m->stages + (size_t)i * m->stage_stride);
}
static inline const phx_use *phx_model_use(const phx_model *m, uint32_t i) {
  return (const phx_use *)(const void *)((const char *)m->uses + (size_t)i * m->use_stride);
}

#ifdef __cplusplus
}
#endif
#endif
