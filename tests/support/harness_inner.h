/* harness_inner.h - what the files of the harness share: a run, its ranks, and what they ask of each other. */
#ifndef HARNESS_INNER_H
#define HARNESS_INNER_H
#include <pthread.h>
#include "harness.h"
#include "base/status.h"

typedef struct allocation {
  void *p;
  int64_t bytes;
  int32_t kind;
  bool arena;
} allocation;
enum { ALLOCATIONS = 512, SLOTS = 16 };

typedef struct run run;
typedef struct rank_state {
  run *run;
  int32_t rank;
  harness_rank *out;
  phx_host host;
  phx_optim optim;
  phx_device *device;
  phx_comm *comm;
  phx_topology topology;
  phx_layout layout;
  uint8_t stage_owned[TOY_STAGES], unit_owned[TOY_UNITS];
  loopback_watch watch;
  allocation live[ALLOCATIONS];
  int n_live;
  int64_t bytes[PHX_MEM_KINDS], arena;
  bool steady;
  int64_t step; /* from 1 */
  int32_t pass, stage;
  bool in_acquire;
  size_t trace_room, ticket_room;
  float boundary[SLOTS][TOY_STAGES + 1][2][TOY_BOUNDARY]; /* [slot][stage + 1][gradient]; stage -1 is the data */
  phx_strategy *strategy;
  int32_t micro_batch;
} rank_state;

struct run {
  const harness_config *c;
  toy_run what;
  const toy *t;
  toy_reference *ref;
  const phx_plugin *plugin;
  const phx_strategy_table *table;
  void *config;
  loopback_world *world;
  pthread_mutex_t lock;
  harness_result *result;
  uint8_t *norm_cover, *update_cover; /* (steps, blocks), (steps, elements) */
  uint8_t *state_cover[7][PHX_FLATS]; /* by state: weight, master, four optimizer states, buffer */
  int64_t blocks;
  rank_state ranks[HARNESS_RANKS];
};

/* ---- harness_check.c ---- */
/* The first difference is kept. */
void harness__note(run *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static inline bool harness__masters(const run *r) {
  return r->c->compute_dtype == PHX_BF16;
}
/* Always when the configuration allows a tolerance. */
bool harness__same_bits(run *r, const float *got, const float *want, int64_t n);
int64_t harness__first_different(const float *got, const float *want, int64_t n);
/* The low-precision copy: always the master's value, rounded. */
void harness__check_low(rank_state *k, const uint16_t *low, const float *master, int64_t n, const char *where,
                        uint32_t unit);
void harness__check_view(rank_state *k, uint32_t stage, int32_t pass, const phx_view *view);
/* init: sets every state to its first value; else compares it with the reference's last. */
phx_status harness__visit_state(rank_state *k, bool init, phx_error *err);
void harness__check_traffic(rank_state *k); /* of a step: as planned? */
/* Over all ranks, at the end. */
void harness__check_coverage(run *r);
void harness__check_ranks(run *r);

/* ---- harness_host.c ---- */
void harness__host(rank_state *k); /* fills host, optim and watch */
/* A strategy's accumulator of the norm; ctx is the rank. */
phx_status harness__norm_add(void *ctx, uint32_t unit, int64_t first_block, int64_t blocks, const float *gradient,
                             phx_stream *stream, phx_error *err);

/* ---- harness_rank.c ---- */
phx_status harness__topology(run *r, int32_t rank, phx_topology *t, phx_layout *l, uint8_t *stages, uint8_t *units,
                             phx_error *err);
void *harness__rank(void *arg); /* a thread: one rank from its opening to its end; arg is a rank_state */
#endif
