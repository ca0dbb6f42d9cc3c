/* plugins/fsdp/fsdp.h - options and plan of fully sharded data parallelism; see fsdp.c. */
#ifndef FSDP_H
#define FSDP_H
#include <phalanx/kit.h>

/* A hybrid (sharded in a group, replicated across groups) is a shard group smaller than the world: fsdp_plan.group. */
enum { FSDP_FULL = 0, FSDP_GRAD_OP = 1, FSDP_NONE = 2 };
typedef struct fsdp_config {
  int32_t sharding, reshard_after_forward;
  int64_t prefetch, max_gathered;
  int32_t gather_alone, reserved0;
} fsdp_config;

enum {
  FSDP_WEIGHT,        /* held weights of the trainable flats, unit after unit */
  FSDP_FROZEN,        /* the same of the frozen flats */
  FSDP_GRADIENT,      /* held gradients, or whole ones where they wait for the step's last micro-batch */
  FSDP_REDUCED,       /* one unit's reduced shard, before it is added to what earlier micro-batches gave */
  FSDP_POOL,          /* windows */
  FSDP_MASTER,        /* compute = bf16: held weights of the trainable flats in fp32 */
  FSDP_FROZEN_MASTER, /* the same of the frozen flats; where all is held, of this rank's part only */
  FSDP_WIRE,          /* reduce = bf16: one unit's gradients on their way; the stream's order makes one enough */
  FSDP_STATES,
  FSDP_REGIONS = FSDP_STATES + PHX_OPTIM_STATES_MAX
};

/* What config, topology and model decide; the same code plans and allocates.  A rank *holds* blocks [first, first +
 * blocks) of each flat, in `per` blocks of memory: its shard, or everything where nothing is sharded. */
typedef struct fsdp_plan {
  int32_t group;           /* ranks that share one copy: the world, or 1 */
  bool sharded;            /* weights are gathered; else they are whole where they are (one rank, or none is cut) */
  bool windows;            /* gradients pass through the pool; else they are whole and stay */
  bool adds;               /* reduced gradients of micro-batches are added up */
  int64_t *at[PHX_FLATS];  /* (n_units) elements from the start of the region to the unit's held part */
  int64_t *weight_numel;   /* (n_units) of a gather window, in elements of 4 bytes; 0: never gathered */
  int64_t *gradient_numel; /* (n_units) of a gradient window */
  phx_kit_program train, evaluate;
  phx_kit_region regions[FSDP_REGIONS];
} fsdp_plan;

phx_status fsdp_plan_create(const fsdp_config *c, const phx_topology *t, const phx_model *m, fsdp_plan *out,
                            phx_error *err);
void fsdp_plan_destroy(fsdp_plan *p);
phx_status fsdp_estimate(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                         phx_error *err);
/* Blocks of a unit's flat that this rank holds and updates, and their size in memory (per). */
phx_kit_shard fsdp_held(const fsdp_plan *p, const phx_topology *t, const phx_unit *unit, uint32_t flat);
extern const phx_strategy_table fsdp_table;

struct phx_strategy {
  phx_kit_services s;
  const phx_topology *topology;
  const phx_model *model;
  fsdp_plan plan;
  phx_kit_views views;
  phx_event **gathered, **reduced;        /* (n_units) each */
  phx_event **mark;                       /* (1) a point of the compute stream */
  int64_t *gather_number;                 /* (n_units) order of issue of the last gather; 0: not gathered */
  int64_t *reduce_number, *reduce_offset; /* (n_units) of the last reduction that ran in a window; number 0: none */
  int64_t issued;
  const phx_kit_program *program; /* NULL: between steps */
  uint32_t position;              /* next in the program */
  bool open;                      /* its acquire is done */
  int32_t micro_batch;
  bool reducing; /* this micro-batch's gradients are reduced */
};

/* state.c: of one unit's flat, what this rank holds, and of that the part that it is the writer of. */
static inline phx_kit_shard fsdp_part(const phx_strategy *self, uint32_t unit, uint32_t flat) {
  return fsdp_held(&self->plan, self->topology, phx_model_unit(self->model, unit), flat);
}
phx_kit_shard fsdp_mine(const phx_strategy *self, uint32_t unit, uint32_t flat);
/* Its first held element; of the master: the first that has one, NULL in fp32. */
void *fsdp_held_weight(const phx_strategy *self, uint32_t unit, uint32_t flat);
float *fsdp_held_master(const phx_strategy *self, uint32_t unit, uint32_t flat);
char *fsdp_held_state(const phx_strategy *self, uint32_t unit, uint32_t k);
float *fsdp_held_gradient(const phx_strategy *self, uint32_t unit);
/* The unit's gradients in the region: the held part, or the whole that it lies in. */
float *fsdp_kept_gradient(const phx_strategy *self, uint32_t unit);
phx_status fsdp_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err);
phx_status fsdp_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err);
phx_status fsdp_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err);
phx_status fsdp_state_changed(phx_strategy *self, phx_error *err);

/* fsdp.c: the program is over or given up, and all windows are free. */
phx_status fsdp_forget_windows(phx_strategy *self, phx_error *err);
#endif
