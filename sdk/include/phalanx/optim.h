/* phalanx/optim.h - the optimizer as a strategy sees it: it hands over slices, the host updates them.
 *
 * The host cuts a ticket at the borders of parameters and gives the pieces to the optimizer's plugin (provider.h).  An
 * optimizer says the finest part of a parameter that it can update on its own (its grain); within that, the bits do not
 * depend on the slicing. */
#ifndef PHALANX_OPTIM_H
#define PHALANX_OPTIM_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_EXT_OPTIM "phx.optim/1"
#define PHX_OPTIM_STATES_MAX 8 /* also the length of arrays by state in structs */

/* The finest part of a parameter that may be updated on its own, each coarser than the one before: elements, canonical
 * blocks (model.h), rows (of numel / shape[0] elements), whole tensors. */
enum { PHX_GRAIN_ELEMENT = 0, PHX_GRAIN_BLOCK = 1, PHX_GRAIN_ROW = 2, PHX_GRAIN_TENSOR = 3 };

/* What a state has one value of.  This version of the host keeps states per element, and refuses the others by name. */
enum { PHX_PER_ELEMENT = 0, PHX_PER_BLOCK = 1, PHX_PER_ROW = 2, PHX_PER_TENSOR = 3 };

typedef struct phx_optim_state {
  const char *name; /* "m", "v"; [a-z0-9_]{1,32}, in hashes and checkpoints [static] */
  int32_t dtype;
  int32_t per;      /* PHX_PER_* */
} phx_optim_state;

typedef struct phx_ticket {
  size_t struct_size;
  uint32_t unit;
  int32_t place;               /* PHX_SPACE_* of the pointers */
  int64_t first, numel;        /* elements [first, first + numel) of the unit's trainable flat */
  void *weight;                /* (numel) of weight_dtype; NULL if there is only a master */
  float *master;               /* (numel) or NULL: then weight is fp32 and is the master */
  const void *gradient;        /* (numel) of gradient_dtype, the unscaled sum over ranks and micro-batches */
  void *states[PHX_OPTIM_STATES_MAX]; /* (numel) each, in the order of phx_optim.states */
  int32_t weight_dtype, gradient_dtype;
  phx_stream *stream;
} phx_ticket;

typedef struct phx_optim {
  size_t struct_size;
  void *ctx;
  const char *name;   /* the plugin's id */
  int32_t grain;      /* PHX_GRAIN_* */
  uint32_t n_states;
  phx_optim_state states[PHX_OPTIM_STATES_MAX];
  /* [main] only inside phx_strategy_table.update, with the scale given there; asynchronous on the ticket's stream */
  phx_status (*update)(void *ctx, const phx_ticket *ticket, float scale, phx_error *err);
} phx_optim;

#ifdef __cplusplus
}
#endif
#endif
