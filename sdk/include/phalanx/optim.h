/* phalanx/optim.h - the optimizer as a strategy sees it: it hands over slices, the host updates them.
 *
 * The host splits a ticket at parameter borders (weight decay is for matrices only) and calls the device's elementwise
 * kernel; the bits do not depend on the slicing. */
#ifndef PHALANX_OPTIM_H
#define PHALANX_OPTIM_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_EXT_OPTIM "phx.optim/1"
#define PHX_OPTIM_STATES_MAX 8 /* also the length of arrays by state in structs */

/* The finest part that may be updated on its own. */
enum { PHX_GRAIN_ELEMENT = 0, PHX_GRAIN_BLOCK = 1, PHX_GRAIN_ROW = 2, PHX_GRAIN_TENSOR = 3 };

typedef struct phx_optim_state {
  const char *name; /* "m", "v"; in hashes and checkpoints [static] */
  int32_t dtype;
  int32_t reserved0;
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
  const char *name;   /* "adamw", "sgd" */
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
