/* core/command/run_result.h - what a run came to, with the numbers of every rank. */
#ifndef PHX__RUN_RESULT_H
#define PHX__RUN_RESULT_H
#include "engine/rank_report.h"

typedef struct phx__save_totals { /* of this process; the stall is of the rank where it is the longest */
  int64_t saves, failed, bytes;
  double stall, stall_most, seconds; /* seconds: from a save's begin until it was committed */
} phx__save_totals;

typedef struct phx__run_result {
  int64_t steps, skipped;   /* skipped: not finite, without an update */
  double loss, valid_loss;  /* valid_loss NaN: not asked for; infinite: not finite */
  double tokens_per_s, step_ms; /* median over the steps after the first */
  char state_hash[33];
  phx__rank_report ranks[PHX_RANKS_MAX];
  int32_t n_ranks;
  const char *stopped; /* the signal that ended the run at `steps`, or NULL: only steps and saves are filled then */
  phx__save_totals saves;
} phx__run_result;
#endif
