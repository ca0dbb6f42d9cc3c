/* phalanx/kit.h - what strategies have in common: shards, views, buckets, gather windows, memory that is planned once.
 *
 * A static library (phalanx_kit) for strategy writers; nothing here is needed to speak the ABI, and the core does not
 * know it.  Everything is pure arithmetic over (model, topology) or a thin call into the host; no function keeps state
 * of its own.  All [main] where nothing else is said.
 *
 * The idea that carries the rest: what a strategy holds is a table of *regions*, and what it does in a step is a
 * *program* of actions.  estimate() adds them up, create() allocates them and the step executes them, so that the plan
 * equals the run by construction. */
#ifndef PHALANX_KIT_H
#define PHALANX_KIT_H
#include <phalanx/error.h>
#include <phalanx/strategy.h>
#include <stdbool.h>
#ifdef __cplusplus
extern "C" {
#endif

/* ---- the host's services ---- */
typedef struct phx_kit_services {
  const phx_host *host;
  const phx_device *device;
  const phx_comm *comm;
  const phx_optim *optim;
  phx_stream *stream; /* the communication stream: every gather and every reduction, in one order */
} phx_kit_services;
/* Looks the extensions up and creates the stream. */
phx_status phx_kit_services_open(const phx_host *host, phx_kit_services *out, phx_error *err);
/* Says what tickets keep together (PHX_GRAIN_*), to a host that asks. */
void phx_kit_estimate_grain(phx_estimate *out, int32_t grain);
void phx_kit_services_close(phx_kit_services *s);
/* n events, and what must be done before they go: the stream's work is over (a failure of it is not told again). */
phx_status phx_kit_events_create(const phx_kit_services *s, uint32_t n, phx_event ***out, phx_error *err);
void phx_kit_events_destroy(const phx_kit_services *s, uint32_t n, phx_event **events);
/* Later work of `then` runs after all that `first` has been given; through the event, which may be used again. */
phx_status phx_kit_after(const phx_kit_services *s, phx_event *event, phx_stream *first, phx_stream *then,
                         phx_error *err);
/* For a strategy that keeps and reduces fp32 only: compute and reduce other than that are refused with the reason. */
phx_status phx_kit_check_topology(const phx_topology *topology, phx_error *err);
/* For one that keeps masters and casts what it reduces: fp32 and bf16, each. */
phx_status phx_kit_check_precision(const phx_topology *topology, phx_error *err);
/* Weights are low precision, and fp32 masters stand behind them (arXiv 1710.03740): what is updated, saved and hashed.
 */
static inline bool phx_kit_masters(const phx_topology *t) {
  return t->compute_dtype != PHX_F32;
}
/* Bytes of a weight as the model reads it, and as it is gathered. */
static inline int64_t phx_kit_weight_bytes(const phx_topology *t) {
  return (int64_t)phx_dtype_bytes(t->compute_dtype);
}
/* Bytes of a buffer that `numel` gradients are cast to before they are reduced; 0: they are reduced as they are.
 * Every rank rounds its own sum once, the communicator adds in fp32 and rounds once; one rank alone does the same. */
static inline int64_t phx_kit_wire_bytes(const phx_topology *t, int64_t numel) {
  return t->reduce_dtype == PHX_F32 ? 0 : numel * (int64_t)phx_dtype_bytes(t->reduce_dtype);
}
/* True when gradients are reduced more than once a step and the sums are added up. */
static inline bool phx_kit_adds_reduced(const phx_topology *t) {
  return t->accumulate > 1 && t->reduce == PHX_REDUCE_MICRO_BATCH;
}

/* ---- regions: one table for the plan and for the allocation ---- */
typedef struct phx_kit_region {
  int32_t kind, space; /* PHX_MEM_*, PHX_SPACE_* */
  int32_t shared;      /* 1: with the communicator (peers read it, or it is reduced) */
  int32_t reserved0;
  int64_t bytes; /* 0: nothing is allocated, at stays NULL */
  void *at;
} phx_kit_region;
void phx_kit_regions_estimate(const phx_kit_region *regions, uint32_t n, phx_estimate *out); /* adds */
/* In the order of the table, all or nothing. */
phx_status phx_kit_regions_alloc(const phx_kit_services *s, phx_kit_region *regions, uint32_t n, phx_error *err);
void phx_kit_regions_release(const phx_kit_services *s, phx_kit_region *regions, uint32_t n);
/* Adds what phx_kit_visit names of `blocks` blocks of a flat to state_bytes. */
void phx_kit_estimate_state(phx_estimate *out, const phx_topology *t, uint32_t flat, int64_t blocks);
/* Adds `times` calls of a collective to the traffic of a step (payload of this rank in the world). */
void phx_kit_estimate_call(phx_estimate *out, const phx_topology *t, int32_t op, int64_t numel, int32_t dtype,
                           int32_t root, int64_t times);

/* ---- shards ---- */
typedef struct phx_kit_shard {
  int64_t per;           /* blocks of every rank's shard, padding included: ceil(blocks / ranks) */
  int64_t first, blocks; /* this rank's blocks that are not padding (blocks may be 0) */
} phx_kit_shard;
phx_kit_shard phx_kit_shard_of(int64_t blocks, int32_t rank, int32_t ranks);
/* Elements of a flat of `blocks` blocks, padded so that every rank's shard has the same size. */
int64_t phx_kit_whole_numel(int64_t blocks, int32_t ranks);

/* Cuts blocks [first, first + blocks) of the whole model's flat at unit borders.  Begin with a zeroed part:
 *   for (phx_kit_part p = {0}; phx_kit_part_next(model, flat, first, blocks, &p);) ... */
typedef struct phx_kit_part {
  uint32_t unit, reserved0;
  int64_t first, blocks; /* within the unit's flat */
  int64_t at;            /* blocks from the start of the range that was cut */
  int64_t next;          /* the iterator's own */
} phx_kit_part;
bool phx_kit_part_next(const phx_model *model, uint32_t flat, int64_t first, int64_t blocks, phx_kit_part *part);

/* ---- views of stages ---- */
typedef struct phx_kit_place {    /* where a unit is now; NULL: nowhere */
  const void *weight[PHX_FLATS]; /* its first element */
  float *gradient;               /* of the trainable flat */
} phx_kit_place;
typedef struct phx_kit_views {
  const phx_model *model;
  phx_kit_place *places;  /* (n_units) set by the strategy before phx_kit_view */
  uint8_t *written;       /* (n_units) 1: the gradient has something, the next use adds */
  uint8_t *told;          /* (n_uses) in this micro-batch: 0 not asked, else the PHX_GRAD_* it was told */
  phx_param_view *params; /* all stages' */
  phx_view *views;        /* (n_stages) */
  int32_t weight_dtype;   /* PHX_F32, or what the strategy sets after create */
  int32_t reserved0;
} phx_kit_views;
phx_status phx_kit_views_create(const phx_model *model, phx_kit_views *out, phx_error *err);
void phx_kit_views_destroy(phx_kit_views *v);
/* A micro-batch begins; anew: its first uses write (the first of a step, or each where each is reduced). */
void phx_kit_views_begin(phx_kit_views *v, bool anew);
/* The stage's view for a pass, from the places; ready is NULL or what the pass must wait for. */
const phx_view *phx_kit_view(phx_kit_views *v, uint32_t stage, int32_t pass, phx_event *ready);
/* A backward pass that was not run (PHX_RELEASE_NO_GRADIENT): what it would have written becomes zero.  Works whether
 * or not the view was asked for in this micro-batch. */
phx_status phx_kit_view_unused(phx_kit_views *v, const phx_device *device, uint32_t stage, phx_stream *stream,
                               phx_error *err);
/* Zeroes the padding inside a unit's gradient: recycled memory, of which the model writes the parameters only. */
phx_status phx_kit_zero_gaps(const phx_device *device, const phx_model *model, uint32_t unit, float *gradient,
                             phx_stream *stream, phx_error *err);

/* ---- the order in which gradients become complete, and buckets over it ---- */
typedef struct phx_kit_order {
  uint32_t n;      /* units with trainable blocks */
  uint32_t *units; /* (n) first complete first */
  int64_t *offset; /* (n_units) elements from the start of a gradient flat laid out in this order */
  int64_t numel;   /* of that flat; a unit takes blocks * PHX_BLOCK */
} phx_kit_order;
/* Refuses a unit with trainable parameters whose gradient no stage writes, by name. */
phx_status phx_kit_order_create(const phx_model *model, phx_kit_order *out, phx_error *err);
void phx_kit_order_destroy(phx_kit_order *o);

typedef struct phx_kit_bucket {
  int64_t first, numel; /* elements of the flat in the order above: contiguous, may begin and end inside a unit */
  uint32_t last;        /* index in order.units: the bucket is complete when this unit is */
  uint32_t reserved0;
} phx_kit_bucket;
/* The first bucket has first_numel elements, the others numel (both rounded up to blocks).  *out is free()d. */
phx_status phx_kit_buckets_create(const phx_model *model, const phx_kit_order *order, int64_t first_numel,
                                  int64_t numel, phx_kit_bucket **out, uint32_t *n_out, phx_error *err);

/* ---- a pool: windows of a memory that is taken once ---- */
typedef struct phx_kit_window {
  int64_t offset, numel;
} phx_kit_window;
typedef struct phx_kit_pool { /* begin with a zeroed one: nothing is in use */
  phx_kit_window *windows;    /* (n) in use, by offset */
  uint32_t n, room;
  int64_t numel; /* elements that all windows so far fit in, at their offsets */
} phx_kit_pool;
/* First fit: *out is the lowest offset from which numel (> 0) elements are free. */
phx_status phx_kit_pool_take(phx_kit_pool *p, int64_t numel, int64_t *out, phx_error *err);
void phx_kit_pool_give_back(phx_kit_pool *p, int64_t offset); /* of a window that was taken */
void phx_kit_pool_destroy(phx_kit_pool *p);

/* ---- windows: gathers and gradients that pass through one pool, as a fixed program ---- */
enum {
  PHX_KIT_GATHER = 1, /* acquire: the unit's weights go to pool + offset */
  PHX_KIT_OPEN = 2,   /* acquire: its gradient lives at pool + offset */
  PHX_KIT_DROP = 3,   /* release, or acquire to make room: its weights are no longer there */
  PHX_KIT_REDUCE = 4, /* release: its gradient is complete */
  PHX_KIT_CLOSE = 5   /* release: the gradient's window returns to the pool (one reduction after it was reduced) */
};
typedef struct phx_kit_action {
  int32_t what; /* PHX_KIT_GATHER, ... */
  uint32_t unit;
  int64_t offset; /* elements from the start of the pool */
} phx_kit_action;
/* Which gathered unit leaves, and when. */
enum {
  PHX_KIT_EVICT_UNWANTED = 0, /* after each pass: whatever the next position does not want */
  PHX_KIT_EVICT_FARTHEST = 1  /* whatever fits stays; when room is wanted, what is needed last leaves */
};
typedef struct phx_kit_policy {
  const int64_t *weight_numel;   /* (n_units) elements of a gathered unit, multiples of 64; 0: needs no gather;
                                    NULL: none does */
  const int64_t *gradient_numel; /* (n_units) elements of its gradient window; 0: its gradient lives elsewhere;
                                    NULL: all do (REDUCE is still listed, OPEN and CLOSE are not) */
  /* The next units in the order of use are gathered ahead.  UNWANTED: at most ahead_units of them with at most
   * ahead_numel elements together.  FARTHEST: while fewer units and fewer elements than these were gathered ahead and
   * wait for their use; what is still there from an earlier use does not count.  INT64_MAX: no bound. */
  int64_t ahead_units, ahead_numel;
  int64_t live_units; /* units gathered at once, at most (INT64_MAX: no bound); too small for a stage is refused */
  int64_t live_numel; /* elements gathered at once, at most.  UNWANTED: for gathers ahead only, what a stage needs, it
                         gets; FARTHEST: for all, and too small for a stage is refused */
  int32_t keep;       /* 1: what forward gathered stays until backward has used it; UNWANTED only */
  int32_t evaluate;   /* 1: a program of forward passes only */
  int32_t evict;      /* PHX_KIT_EVICT_* */
  int32_t reserved0;
} phx_kit_policy;
/* Positions: forward passes of the stages in order, then backward passes in reverse: one micro-batch. */
typedef struct phx_kit_program {
  uint32_t n_positions, n_actions;
  uint32_t *first; /* (2 * n_positions + 1) acquire of p: actions [first[2p], first[2p+1]);
                      release of p: [first[2p+1], first[2p+2]) */
  phx_kit_action *actions;
  int64_t pool_numel;   /* elements of the pool that all windows fit in, at their offsets */
  int64_t most_units;   /* units gathered at once */
  int64_t enough_numel; /* the least live_numel with which no gather ahead waits for room: what a position needs, and
                           what is gathered ahead there */
} phx_kit_program;
phx_status phx_kit_program_create(const phx_model *model, const phx_kit_policy *policy, phx_kit_program *out,
                                  phx_error *err);
void phx_kit_program_destroy(phx_kit_program *p);
static inline uint32_t phx_kit_position(const phx_model *m, uint32_t stage, int32_t pass) {
  return pass == PHX_PASS_FORWARD || pass == PHX_PASS_EVALUATE ? stage : 2 * m->n_stages - 1 - stage;
}

/* ---- state, norm, update: blocks [first, first + blocks) of one unit's flat ---- */
/* Names the weights, before them their masters where weight_dtype is not fp32, and for the trainable flat every
 * optimizer state.  Nothing when blocks is 0. */
phx_status phx_kit_visit(const phx_visitor *visitor, const phx_optim *optim, int32_t weight_dtype, uint32_t unit,
                         uint32_t flat, int64_t first, int64_t blocks, phx_error *err);
/* One ticket.  The pointers are those of the first block; states in the optimizer's order. */
typedef struct phx_kit_slice {
  uint32_t unit;
  int32_t place;
  int64_t first, blocks;
  void *weight;
  float *master;        /* NULL: weight is fp32 */
  int32_t weight_dtype; /* with a master */
  int32_t reserved0;
  const float *gradient;
  void *states[PHX_OPTIM_STATES_MAX];
} phx_kit_slice;
phx_status phx_kit_update(const phx_optim *optim, const phx_kit_slice *slice, float scale, phx_stream *stream,
                          phx_error *err);

/* [collective] Replicas from their writers: the rank's part (numel elements, at rank * numel) of `base` becomes
 * everybody's, on the communication stream. */
phx_status phx_kit_make_whole(const phx_kit_services *s, void *base, int64_t numel, int32_t dtype, phx_error *err);

/* ---- a hash of bytes, for comparing replicas; not the state hash ---- */
uint64_t phx_kit_hash(uint64_t seed, const void *data, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
