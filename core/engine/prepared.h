/* core/engine/prepared.h - a run as it is known before anything is allocated; prepare.h makes it. */
#ifndef PHX__PREPARED_H
#define PHX__PREPARED_H
#include <phalanx/provider.h>

#include "config/config.h"

typedef struct phx__stage_plan {
  phx_stage_memory memory;
  int64_t output, saved; /* bytes really held per slot on this rank; 0 when not owned (or no neighbour is) */
  int64_t window;        /* bytes of the output of one sequence alone */
} phx__stage_plan;

typedef struct phx__prepared {
  const phx__config *config;
  const struct phx__data *train; /* [borrow] for checkpoints: the data that a run goes through; NULL: not known */
  const phx_strategy_table *strategy;
  const phx_device_table *device;
  const phx_comm_table *comm;
  const phx_model_table *model_table;
  const phx_optimizer_table *optimizer;
  phx_optim optim;               /* what the optimizer says of itself; update is not there yet */
  phx_model *model;
  phx_model_facts facts;
  char computes[256];            /* facts.computes; "": the model does not say */
  phx_batch_shape shape;
  phx_topology topology;
  phx_layout layout;
  phx_estimate estimate;         /* of the strategy */
  phx__stage_plan *stages;       /* (n_stages) */
  int64_t *boundary;             /* (n_stages) what topology.boundary_bytes points at */
  int64_t boundary_bytes;        /* of one gradient boundary: the largest output */
  int64_t workspace_bytes;       /* of the model */
  int64_t norm_blocks;           /* sums of squares at once: PHX__NORM_BLOCKS, or the whole model's */
  int64_t token_bytes;           /* tokens and targets of all micro-batches of a step */
  int64_t loss_slots;            /* of a step's micro-batches, or of the sequences evaluated at once */
  int64_t copy_bytes;            /* for copies of saves in the background, in planned; 0: none, or not known yet */
  int64_t planned[PHX_MEM_KINDS];/* this rank, the device's scratch excluded (known when it is open) */
} phx__prepared;

/* What a finished gradient is to be divided by to be the mean over micro-batches and data ranks. */
static inline double phx__gradient_terms(const phx__prepared *p) {
  const double all = (double)p->topology.accumulate * p->layout.data_size;
  return p->layout.gradient_terms > 0 ? (double)p->layout.gradient_terms : all;
}
#endif
