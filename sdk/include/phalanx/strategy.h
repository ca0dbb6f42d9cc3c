/* phalanx/strategy.h - what a strategy implements: where weights, gradients and states live, and when they move.
 *
 * Call order (docs/call-order.md draws it):
 *     layout, estimate            pure, any number of times, before anything is opened
 *     create, prepare_state, visit_state (the core fills the state), state_restored, state_changed
 *     each step:  for each micro-batch: begin_micro_batch,
 *                   acquire, release of each stage, forward, then of each stage in reverse order, backward;
 *                 finish_gradients, gradient_norm, then update, or discard_gradients where the step is skipped
 *     between steps: prepare_state, visit_state, map, unmap; acquire, release with PHX_PASS_EVALUATE
 *     destroy
 * A strategy with run_step replaces the part from begin_micro_batch to the last release.
 */
#ifndef PHALANX_STRATEGY_H
#define PHALANX_STRATEGY_H
#include <phalanx/comm.h>
#include <phalanx/device.h>
#include <phalanx/host.h>
#include <phalanx/model.h>
#include <phalanx/optim.h>
#include <phalanx/plugin.h>
#ifdef __cplusplus
extern "C" {
#endif

/* ---- the run, as a strategy must know it before anything is opened ---- */
enum { PHX_REDUCE_STEP = 0, PHX_REDUCE_MICRO_BATCH = 1 };

typedef struct phx_topology {
  size_t struct_size;
  int32_t rank, world_size, local_rank, local_size;
  int32_t accumulate;            /* micro-batches per step, >= 1 */
  int32_t reduce;                /* PHX_REDUCE_* */
  int32_t compute_dtype;         /* of weights as the model reads them: PHX_F32 or PHX_BF16 */
  int32_t reduce_dtype;          /* of gradients on the wire */
  int32_t overlaps;              /* 1: the communicator works beside the compute stream */
  uint32_t n_optim_states;
  int32_t optim_dtype[PHX_OPTIM_STATES_MAX];
  /* Pure: payload bytes that `rank` of `size` moves for one call (see phx_comm_stats.bytes); numel as in the call.
   * root is for reduce and broadcast; ctx is payload_ctx. */
  int64_t (*payload)(const void *ctx, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                     int32_t root);
  /* (n_stages) bytes of the tensor between a stage and the next for one micro-batch; 0 after the last.  [borrow:self]
   */
  const int64_t *boundary_bytes;
  const void *payload_ctx; /* the communicator's own; or NULL */
  int32_t optim_per[PHX_OPTIM_STATES_MAX]; /* PHX_PER_*: what each state of the optimizer has one value of */
  int32_t optim_grain;                     /* PHX_GRAIN_*: what the optimizer needs */
  int32_t reserved0;
} phx_topology;

enum { PHX_AXES_ROOM = 8 };
/* Replicas differ between updates by design (local steps, averaging with some ranks).  The core compares none then:
 * [run] drift_every, checked and deterministic are refused.  What visit_state names is still the one state. */
#define PHX_LAYOUT_REPLICAS_DIFFER (1ull << 0)
#define PHX_LAYOUT_NORM_PER_REPLICA (1ull << 1) /* reserved: a norm of its own per replica, instead of the world's */
typedef struct phx_axis {
  char name[24]; /* "data", "pipeline", ... */
  int32_t size, index;
} phx_axis;

/* Prefilled by the host with plain data parallelism: one axis "data", data_rank = rank, data_size = world_size, one
 * activation slot, everything owned.  The arrays belong to the host. */
typedef struct phx_layout {
  size_t struct_size;
  int32_t data_rank, data_size;   /* which part of each step's batch this rank reads */
  int32_t activation_slots;       /* micro-batches whose activations live at once, >= 1 */
  uint32_t n_axes;
  phx_axis axes[PHX_AXES_ROOM];
  uint8_t *stage_owned;           /* (n_stages) 1: this rank runs the stage */
  uint8_t *unit_owned;            /* (n_units) 1: this rank holds (part of) the unit */
  uint64_t flags;                 /* PHX_LAYOUT_*; what is reserved or not known is refused */
  /* A gradient, once finished, is the sum of the ranks' and micro-batches' divided by (accumulate x data_size) /
   * gradient_terms: 1 for a mean.  0: the plain sum. */
  int64_t gradient_terms;
} phx_layout;

typedef struct phx_estimate {
  size_t struct_size;
  int64_t bytes[PHX_MEM_KINDS_ROOM]; /* what create() will hold through host->alloc, aligned as accounted */
  int64_t arena_bytes;            /* the part of the above that is allocated with a communicator */
  int64_t sent[PHX_OPS_ROOM];     /* payload bytes of this rank in one period, by collective, norm excluded */
  int64_t calls[PHX_OPS_ROOM];    /* collective calls in one period */
  /* Of the slices that visit_state names on this rank, low-precision weights left out: what a checkpoint holds of it.
   * With PHX_CAP_LIVE_STATE memory for copies is planned from it; 0: not said, and that is known when the run begins */
  int64_t state_bytes;
  int64_t period; /* training steps that sent and calls are of.  0: one; more than 1 is reserved, and refused */
  /* PHX_GRAIN_*: the finest whole that every ticket keeps together, so that no parameter is cut finer.  An optimizer
   * that needs more is refused.  0: a ticket may begin and end anywhere */
  int32_t grain;
  int32_t reserved0;
} phx_estimate;

/* ---- state: who holds what, in canonical coordinates ---- */
enum {
  PHX_STATE_WEIGHT = 0,  /* fp32 weights where there is no master, else the low-precision ones (derived: not saved) */
  PHX_STATE_MASTER = 1,
  PHX_STATE_OPTIM = 2,   /* state_index says which optimizer state */
  PHX_STATE_BUFFER = 3,  /* state without gradient */
  PHX_STATE_PRIVATE = 4  /* the strategy's own, under names of this rank; restored at equal strategy and world size */
};
enum { PHX_MAP_READ = 1, PHX_MAP_WRITE = 2 };

typedef struct phx_slice {
  size_t struct_size;
  int32_t kind;         /* PHX_STATE_* */
  uint32_t state_index; /* with PHX_STATE_OPTIM */
  const char *name;     /* with PHX_STATE_PRIVATE, else NULL */
  uint32_t unit;
  uint32_t flat;        /* PHX_FLAT_* */
  int64_t first_block, blocks; /* within the unit's flat; blocks > 0 */
  int32_t dtype;
  int32_t place;        /* PHX_SPACE_* of the mapped pointer */
  void *where;          /* the strategy's own, for map and unmap; or NULL */
  /* Reserved, 0: elements of private state that fill no whole blocks.  Until then one number takes a block. */
  int64_t numel;
} phx_slice;

typedef struct phx_visitor {
  size_t struct_size;
  void *ctx;
  phx_status (*slice)(void *ctx, const phx_slice *slice, phx_error *err); /* [main] [borrow:call] */
} phx_visitor;

/* What the core is about to do with the state. */
enum {
  PHX_PREPARE_INIT = 0,   /* write initial values */
  PHX_PREPARE_LOAD = 1,   /* write what a checkpoint, or a model's file, holds */
  PHX_PREPARE_HASH = 2,
  PHX_PREPARE_SAVE = 3,   /* read it for a checkpoint; a save in the background reads on during the next steps */
  PHX_PREPARE_FINAL = 4,  /* read the weights that the run leaves behind */
  PHX_PREPARE_COMPARE = 5 /* compare what ranks compute with: [run] drift_every, checked */
};

/* What the state was filled with.  A strategy whose private state was left out has it as create made it. */
enum {
  PHX_RESTORED_INITIAL = 0, /* initial values: a new run */
  PHX_RESTORED_WEIGHTS = 1, /* weights of a model's file, and nothing else */
  PHX_RESTORED_STATE = 2,   /* a checkpoint, private state left out: another strategy or world size has saved it */
  PHX_RESTORED_PRIVATE = 3  /* a checkpoint, private state with it */
};
typedef struct phx_restored {
  size_t struct_size;
  int32_t what;       /* PHX_RESTORED_* */
  int32_t world_size; /* of the ranks that saved the checkpoint; 0 without one */
  int64_t step;       /* the last step that is in the state; 0 without a checkpoint */
  int64_t privates;   /* slices of this rank's private state that were restored */
} phx_restored;

/* ---- what a stage computes with ---- */
/* RECOMPUTE: the forward pass once more, right before the stage's BACKWARD, where its activations were not kept.  Sent
 * by the core's engine once it recomputes activations; it keeps all so far, and a strategy must be ready for it. */
enum { PHX_PASS_FORWARD = 0, PHX_PASS_RECOMPUTE = 1, PHX_PASS_BACKWARD = 2, PHX_PASS_EVALUATE = 3 };
enum { PHX_GRAD_NONE = 0, PHX_GRAD_WRITE = 1, PHX_GRAD_ADD = 2 };
enum {
  /* BACKWARD, in every micro-batch: what this micro-batch adds to the gradients of the units whose use has PHX_USE_LAST
   * is complete */
  PHX_RELEASE_LAST_USE = 1u << 0,
  PHX_RELEASE_NO_GRADIENT = 1u << 1 /* BACKWARD: the stage was not run; what it would write is zero, still reduced */
};

typedef struct phx_param_view {
  const void *weight;   /* (shape) of weight_dtype; NULL where the pass does not read it */
  void *gradient;       /* (shape) of gradient_dtype; NULL without PHX_USE_GRADIENT, when frozen, or not BACKWARD */
  int32_t weight_dtype, gradient_dtype;
  int32_t gradient_mode; /* PHX_GRAD_*: the first use in a step writes, later ones add */
  uint32_t param;       /* index into phx_model.params */
} phx_param_view;

typedef struct phx_view { /* [borrow:self] until release of the same stage */
  size_t struct_size;
  const phx_param_view *params; /* per use of the stage in order, the unit's params in order */
  uint32_t n_params, param_stride;
  phx_event *ready; /* what the pass reads is valid after it; NULL: now.  The host makes its stream wait. */
} phx_view;
static inline const phx_param_view *phx_view_param(const phx_view *view, uint32_t i) {
  return (const phx_param_view *)(const void *)((const char *)view->params + (size_t)i * view->param_stride);
}

/* ---- the norm: each canonical block of gradients is added by exactly one rank of the world ---- */
typedef struct phx_accumulator {
  size_t struct_size;
  void *ctx;
  /* [main] blocks [first_block, first_block + blocks) of the unit's trainable flat; gradient (blocks * PHX_BLOCK) fp32,
   * in the device's space, complete on the stream */
  phx_status (*add)(void *ctx, uint32_t unit, int64_t first_block, int64_t blocks, const float *gradient,
                    phx_stream *stream, phx_error *err);
} phx_accumulator;

/* ---- taking over the schedule ---- */
typedef struct phx_executor { /* [borrow:call] of run_step */
  size_t struct_size;
  void *ctx;
  int32_t micro_batches;
  uint32_t n_stages;
  /* Bytes of the tensor between stage and stage + 1 for one micro-batch (residual stream), and its place in a slot.
   * gradient = 0: the stage's output; 1: the loss gradient with respect to it. */
  int64_t (*boundary_bytes)(void *ctx, uint32_t stage);
  void *(*boundary)(void *ctx, uint32_t stage, int32_t slot, int32_t gradient);
  /* [main] run one stage of one micro-batch with the activations of a slot, on the compute stream.  The caller
   * acquires and releases itself.  The last stage's forward adds the micro-batch's loss. */
  phx_status (*forward)(void *ctx, uint32_t stage, int32_t micro_batch, int32_t slot, const phx_view *view,
                        phx_error *err);
  phx_status (*backward)(void *ctx, uint32_t stage, int32_t micro_batch, int32_t slot, const phx_view *view,
                         phx_error *err);
  /* [main] 0: the stage is passed over in this micro-batch (layer drop).  forward and backward are called all the same
   * and hand their input on; the backward pass is released with PHX_RELEASE_NO_GRADIENT. */
  int32_t (*runs)(void *ctx, uint32_t stage, int32_t micro_batch);
} phx_executor;

/* ---- the table ---- */
typedef struct phx_strategy phx_strategy; /* opaque to the core */

typedef struct phx_strategy_table {
  size_t struct_size;
  /* [main] pure.  NULL: plain data parallelism. */
  phx_status (*layout)(const void *config, const phx_topology *topology, const phx_model *model, phx_layout *out,
                       phx_error *err);
  /* [main] pure: bytes and traffic, following the declared order of stages; options that do not fit are refused here.
   * out is zero-filled. */
  phx_status (*estimate)(const void *config, const phx_topology *topology, const phx_model *model, phx_estimate *out,
                         phx_error *err);
  /* [main][collective] allocates this rank's part only; config, topology and model are [borrow:self] */
  phx_status (*create)(const phx_host *host, const void *config, const phx_topology *topology, const phx_model *model,
                       phx_strategy **out, phx_error *err);
  void (*destroy)(phx_strategy *self); /* [main] from any state after create; NULL is fine; never fails */
  /* [main] names every slice this rank is the writer of: over the world, each block of each state exactly once.  What
   * an update left in flight is first made to end, on the compute stream */
  phx_status (*visit_state)(phx_strategy *self, const phx_visitor *visitor, phx_error *err);
  /* [main] a slice's (blocks * PHX_BLOCK) elements, in slice->place, until unmap; several may be mapped at once */
  phx_status (*map)(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err);
  phx_status (*unmap)(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err);
  /* [main][collective] after initialisation or load: rebuild what is derived (whole weights, low-precision copies) */
  phx_status (*state_changed)(phx_strategy *self, phx_error *err);
  /* [main] index from 0; last = 1 on the step's last micro-batch */
  phx_status (*begin_micro_batch)(phx_strategy *self, int32_t index, int32_t last, phx_error *err);
  /* [main][collective] the stage's view for a pass (PHX_PASS_*) on a stream */
  phx_status (*acquire)(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, phx_stream *stream,
                        const phx_view **out, phx_error *err);
  phx_status (*release)(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                        phx_stream *stream, phx_error *err); /* [main][collective] */
  phx_status (*finish_gradients)(phx_strategy *self,
                                 phx_error *err); /* [main][collective] waits for what is in flight */
  /* [main][collective] in the place of update, after finish_gradients and gradient_norm: the step is skipped, and its
   * gradients are dropped */
  phx_status (*discard_gradients)(phx_strategy *self, phx_error *err);
  phx_status (*gradient_norm)(phx_strategy *self, const phx_accumulator *acc, phx_error *err); /* [main] */
  /* [main][collective] one ticket per owned slice, then weights whole where they are kept whole: that may go on beside
   * the next passes, whose views wait for it (ready).  step from 1 */
  phx_status (*update)(phx_strategy *self, int64_t step, float scale, phx_error *err);
  /* [main][collective] optional: run the micro-batches of a step; gradients complete when it returns */
  phx_status (*run_step)(phx_strategy *self, const phx_executor *executor, phx_error *err);
  /* [main][collective] optional: what comes next with the state (PHX_PREPARE_*).  A strategy whose state is not always
   * as visit_state would name it makes it so here: it may communicate, which visit_state and map may not */
  phx_status (*prepare_state)(phx_strategy *self, int32_t purpose, phx_error *err);
  /* [main][collective] optional: after the core has filled the state, before state_changed. what is [borrow:call] */
  phx_status (*state_restored)(phx_strategy *self, const phx_restored *what, phx_error *err);
} phx_strategy_table;

#ifdef __cplusplus
}
#endif
#endif
