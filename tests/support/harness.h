/* tests/support/harness.h - drives a strategy plugin without the core: ranks as threads, a loopback communicator, a toy
 * model, and the single-threaded reference to compare with.
 *
 *   toy *model = toy_odd();
 *   harness_config c = {.strategy = "zero", .options = "stage=3 sub_group_size=2000", .toy = model, .ranks = 3,
 *                       .accumulate = 2, .steps = 3};
 *   harness_result r;
 *   cr_assert(harness_run(&c, &r), "%s", r.message);    // true: everything below held
 *   harness_free(&r);
 *
 * harness_run returns true when: the run ended well; every weight read through a view, every gradient given to the norm
 * and the optimizer, and every state at the end have the reference's bits, padding zero; over the ranks each block of
 * each state was visited once (and nothing was in flight then), each block of gradients added to the norm once, each
 * element updated once a step; planned bytes by kind, arena bytes, calls and bytes by collective equal the measured
 * ones on every rank; the steady state allocated nothing; nothing leaked; no collective used memory that was not
 * allocated with its communicator; ranks asked for the same arena memory in the same order.  Otherwise `message` says
 * what differed first. */
#ifndef HARNESS_H
#define HARNESS_H
#include <phalanx/strategy.h>
#include <stdbool.h>
#include "loopback.h"
#include "toy.h"

enum { HARNESS_RANKS = 16, HARNESS_PHASE_SETUP = -1 };

typedef struct harness_config {
  const char *strategy;     /* "zero": PHX_TEST_PLUGINS/phx_strategy_zero.so; with a '/': a path; or */
  const phx_plugin *plugin; /* a descriptor in this process */
  const char *options;      /* "key=value key=value"; the rest default */
  const toy *toy;
  int32_t ranks;
  int32_t accumulate;                  /* 0 means 1 */
  int32_t reduce;                      /* PHX_REDUCE_* */
  int32_t steps;                       /* 0 means 2 */
  bool sgd;                            /* else AdamW (two states) */
  int stream_mode;                     /* LOOPBACK_THREADS, LOOPBACK_DEFERRED */
  int32_t compute_dtype, reduce_dtype; /* 0 means PHX_F32 */
  int32_t fail_alloc;                  /* the n-th allocation (from 1) of fail_rank fails; 0: none */
  int32_t fail_rank;                   /* -1: every rank */
  int32_t discard_step;                /* from 1: that step is discarded; 0: none */
  bool discard_early;                  /* instead of finish_gradients, else after the norm */
  bool evaluate;                       /* an evaluation after each step */
  bool recompute;                      /* acquire and release with PHX_PASS_RECOMPUTE before each backward stage */
  bool replicas;                       /* every rank updates every element, instead of one rank each */
  double tolerance; /* 0: bits; else weights may differ so much (absolute), and gradients are not compared */
  bool ignore_plan; /* do not compare planned with measured */
  uint64_t seed;
} harness_config;

typedef struct harness_call { /* one collective as issued */
  int32_t op;
  int64_t numel, payload;
  bool on_stream; /* not on the compute stream */
  int32_t step;   /* from 1; 0 before the first */
  int32_t pass;   /* PHX_PASS_* of the acquire or release it was issued in, -1 elsewhere */
  int32_t stage;  /* of that acquire or release */
  bool in_acquire;
} harness_call;

typedef struct harness_ticket {
  int32_t step;
  uint32_t unit;
  int64_t first, numel;
  const void *gradient;
} harness_ticket;

typedef struct harness_rank {
  phx_estimate planned;
  int64_t peak[PHX_MEM_KINDS], arena_peak; /* measured */
  int64_t calls[PHX_OPS], sent[PHX_OPS];   /* of one step (the last that was not discarded) */
  int64_t allocations, steady_allocations, leaked_bytes;
  int64_t staged_calls; /* collectives on memory that peers cannot reach in place, once steps began */
  harness_call *trace;
  size_t n_trace;
  harness_ticket *tickets;
  size_t n_tickets;
  int64_t most_in_flight; /* collectives issued and not yet run when a backward release returned; sure if DEFERRED */
  int64_t forward_in_flight[TOY_STAGES]; /* the same when the stage's forward pass had waited for its view; last step */
  int64_t norm_blocks;    /* blocks this rank added in the last step */
  uint64_t arena_order;   /* hash of the sizes asked for with a communicator */
  phx_status status;
  phx_error error;
} harness_rank;

typedef struct harness_result {
  bool ok;
  phx_status status; /* of the first rank that failed by itself */
  char message[640];
  uint64_t hash[5 + PHX_OPTIM_STATES_MAX]; /* by PHX_STATE_*; optimizer states from 5 on; independent of placement */
  double max_difference;                   /* of weights, absolute */
  int32_t ranks;
  harness_rank rank[HARNESS_RANKS];
} harness_result;

bool harness_run(const harness_config *c, harness_result *out);
void harness_free(harness_result *r);
/* Runs with allocation 1, 2, ... failing on rank `one` (-1: on every rank) until a run is good, and then the same on
 * `other`: all before must end with PHX_NOMEM and leak nothing.  The larger number of a good run; 0: message says what
 * was otherwise. */
int32_t harness_fail_allocations(harness_config c, int32_t one, int32_t other, char message[640]);
/* The plan alone: estimate of one rank. */
phx_status harness_estimate(const harness_config *c, int32_t rank, phx_estimate *out, phx_error *err);
const phx_plugin *harness_plugin(const char *strategy, phx_error *err);
/* Calls of `op` in `step` on this rank (op -1: all; step 0: all), and the largest numel among them. */
int64_t harness_count(const harness_rank *r, int32_t op, int32_t step, int64_t *largest);
#endif
