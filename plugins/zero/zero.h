/* plugins/zero/zero.h - what the files of the strategy share.
 *
 * Coordinates: an element's place in the model is its place in the whole model's flat (trainable or frozen), units in
 * order.  Rank r owns elements [r * share, (r + 1) * share) of it.  A piece is a range of elements inside one unit (or,
 * where gradients are whole, across units) that has one owner: what one broadcast or one reduce moves. */
#ifndef ZERO_H
#define ZERO_H
#include <phalanx/kit.h>

typedef struct zero_config {
  int64_t stage;
  int64_t reduce_bucket_size, allgather_bucket_size;
  int64_t stage3_param_persistence_threshold, stage3_prefetch_bucket_size, stage3_max_live_parameters;
  int64_t sub_group_size;
  int32_t overlap_comm;
  int32_t gather_alone;
} zero_config;

typedef struct zero_piece {
  int64_t at, numel; /* elements of the whole model's flat */
  uint32_t unit, flat;
  int32_t owner;
  int32_t reserved0;
} zero_piece;
typedef struct zero_pieces { /* of many lists, one after the other: list i is of [first[i], first[i + 1]) */
  zero_piece *of;
  uint32_t *first;
  uint32_t n, room;
} zero_pieces;

enum {
  ZERO_WEIGHT = 0,   /* + flat; stages 1 and 2: whole; stage 3: the share */
  ZERO_PERSIST = 2,  /* + flat; stage 3: small parameters, whole on every rank */
  ZERO_GRADIENT = 4, /* whole gradients: stage 1, one rank, or micro-batches that are added before they are reduced */
  ZERO_SHARE = 5,    /* reduced gradients of the share, where they are not reduced in place */
  ZERO_STAGING = 6,  /* one reduced piece on its way to be added to the share */
  ZERO_POOL = 7,     /* stage 3: windows of gathered weights */
  ZERO_WINDOWS = 8,  /* stages 2 and 3: windows of gradients until they are reduced */
  ZERO_MASTER = 9,   /* + flat; compute = bf16: the share in fp32 */
  ZERO_WIRE = 11,    /* reduce = bf16: one piece of gradients on its way; the stream's order makes one enough */
  ZERO_STATES = 12,
  ZERO_REGIONS = 12 + PHX_OPTIM_STATES_MAX
};

typedef struct zero_plan {
  const zero_config *config;
  const phx_topology *topology;
  const phx_model *model;
  phx_kit_region regions[ZERO_REGIONS];
  phx_kit_shard shard[PHX_FLATS];
  bool several; /* collectives are issued: several ranks, or gather_alone */
  bool whole;   /* gradients are kept whole (ZERO_GRADIENT) */
  /* whole weights of stages 1 and 2 */
  uint32_t *forward;  /* (n_units) units in the order in which forward first reads them */
  uint32_t *turn;     /* (n_units) a unit's place in that order */
  zero_pieces spread; /* lists: by flat, then by place in that order; empty where one all_gather does it */
  /* weights of stage 3 */
  int64_t *persist;        /* (n_params) element of its flat's pack, or -1: partitioned */
  int64_t pack[PHX_FLATS]; /* elements of the packs */
  int64_t *window;         /* (n_units) elements of a gathered unit; 0: nothing to gather */
  zero_pieces gathers;     /* lists: by unit */
  phx_kit_program train, evaluate;
  /* gradients */
  phx_kit_order order;
  phx_kit_bucket *buckets;
  uint32_t n_buckets, reserved0;
  zero_pieces reduces;     /* lists: by bucket */
  int64_t *gradient_at;    /* (n_units) element of ZERO_WINDOWS */
  int32_t *gradient_after; /* (n_units) the bucket whose windows it takes over, -1: none */
  int64_t windows;         /* elements of ZERO_WINDOWS */
} zero_plan;

/* zero_plan.c */
phx_status zero_plan_create(const zero_config *config, const phx_topology *topology, const phx_model *model,
                            zero_plan *out, phx_error *err);
void zero_plan_destroy(zero_plan *p);
static inline int64_t zero_share(const zero_plan *p, uint32_t flat) {
  return p->shard[flat].per * PHX_BLOCK;
}
static inline int64_t zero_unit_first(const zero_plan *p, uint32_t unit, uint32_t flat) {
  return phx_model_unit(p->model, unit)->first_block[flat] * PHX_BLOCK;
}
/* Elements [*first, *first + n) of a flat's pack that a rank owns. */
int64_t zero_pack_part(const zero_plan *p, uint32_t flat, int32_t rank, int64_t *first);
/* Stages 1 and 2: the bucket holds the whole flat, which one all_gather makes whole. */
static inline bool zero_at_once(const zero_plan *p, uint32_t flat) {
  return zero_share(p, flat) * p->topology->world_size <= p->config->allgather_bucket_size;
}

/* What a rank has opened by its plan.  After create it is const for everybody: the files get it as `const zero_rank *`,
 * beside the one part of the state that is theirs to change. */
typedef struct zero_rank {
  zero_plan plan; /* its regions are allocated */
  phx_kit_services s;
  phx_event **mark;     /* (1) the compute stream's progress */
  phx_event **gathered; /* (n_units) its weights are here: for a pass (stage 3), since the last update (1 and 2) */
  phx_event **reduced;  /* (n_buckets) */
  phx_event **whole;    /* (1) all that the last update gathers is here */
} zero_rank;
static inline float *zero_region(const zero_rank *r, uint32_t region) {
  return r->plan.regions[region].at;
}
/* An element of a region of weights (ZERO_WEIGHT, ZERO_PERSIST, ZERO_POOL), which have the model's type. */
static inline char *zero_weights(const zero_rank *r, uint32_t region, int64_t element) {
  return (char *)r->plan.regions[region].at + element * phx_kit_weight_bytes(r->plan.topology);
}

/* The state, of a pass over the stages and of a micro-batch. */
typedef struct zero_gathering { /* zero_gather.c's */
  phx_kit_place *places;        /* [borrow:self] of the views; it sets their weights */
  const phx_kit_program *program;
  uint32_t next;      /* the position whose actions come next */
  uint32_t n_gathers; /* so far in this program; gives gathers their order */
  uint32_t *number;   /* (n_units) its place in that order; 0: not gathered */
} zero_gathering;
typedef struct zero_reducing { /* zero_reduce.c's */
  phx_kit_views *views;        /* [borrow:self] it sets the places of their gradients */
  int32_t micro_batch;
  uint32_t next_bucket;
  bool reducing;     /* buckets are reduced in this micro-batch */
  bool settled;      /* nothing of the micro-batch before is still being reduced */
  uint8_t *open;     /* (n_units) its gradient window is in use */
  uint8_t *complete; /* (n_units) */
} zero_reducing;

/* zero_whole.c: no state of its own */
phx_status zero_make_whole(const zero_rank *r, uint32_t flat, phx_error *err); /* begins; after init, load or update */
phx_status zero_settle(const zero_rank *r, phx_error *err); /* compute waits for all that was begun */
phx_event *zero_whole_ready(const zero_rank *r, uint32_t stage, int32_t pass); /* or NULL */
void zero_make_whole_traffic(const zero_plan *p, uint32_t flat, phx_estimate *out);

/* zero_gather.c */
phx_status zero_gathering_create(const zero_rank *r, phx_kit_place *places, zero_gathering *out, phx_error *err);
void zero_gathering_destroy(zero_gathering *now);
void zero_begin_program(const zero_rank *r, zero_gathering *now, const phx_kit_program *program);
/* The unit's weights for this pass; ready: what it must wait for, or NULL. */
phx_status zero_gather(const zero_rank *r, zero_gathering *now, uint32_t stage, int32_t pass, phx_stream *stream,
                       phx_event **ready, phx_error *err);
void zero_gather_traffic(const zero_plan *p, phx_estimate *out);

/* zero_reduce.c */
phx_status zero_reducing_create(const zero_rank *r, phx_kit_views *views, zero_reducing *out, phx_error *err);
void zero_reducing_destroy(zero_reducing *now);
void zero_begin_gradients(const zero_rank *r, zero_reducing *now, int32_t index, bool last);
phx_status zero_open_gradients(const zero_rank *r, zero_reducing *now, uint32_t stage, phx_stream *stream,
                               phx_error *err);
/* A stage's backward pass is over: reduces the buckets that are complete with it. */
phx_status zero_complete(const zero_rank *r, zero_reducing *now, uint32_t stage, phx_stream *stream, phx_error *err);
phx_status zero_finish(const zero_rank *r, const zero_reducing *now, phx_error *err);
phx_status zero_discard(const zero_rank *r, zero_reducing *now, phx_error *err);
void zero_reduce_traffic(const zero_plan *p, phx_estimate *out);
const float *zero_reduced(const zero_rank *r, int64_t at); /* an owned element's reduced gradient */
#endif
