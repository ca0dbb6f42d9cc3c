/* core/command/balance.h - how unequal the ranks are: each one's own time in a step, which is the step less what it
 * waited for its peers, and who is the slowest by that.
 *
 * A communicator counts the waiting; nccl only that of [main], not what its kernels wait on the device.  [main] */
#ifndef PHX__BALANCE_H
#define PHX__BALANCE_H
#include "command/progress.h"
#include "command/run_result.h"

typedef struct phx__balance {
  int64_t from;                    /* the first step since the last line */
  int64_t steps, own_ns, wait_ns;  /* since then */
  int64_t all_steps, all_own, all_wait; /* of the run, without its first step where there are others */
} phx__balance;

/* [collective] counts a step; every run.balance_every steps rank 0 says how unequal the ranks were, and the next line
 * of metrics.jsonl has it as the member "balance". */
phx_status phx__balance_step(phx__balance *b, const phx__runtime *rt, phx__progress *progress, int64_t step,
                             double seconds, int64_t wait_ns, phx_error *err);
/* The means of all steps, for gather_reports. */
void phx__balance_report(const phx__balance *b, phx__rank_report *mine);
/* Rank 0: one line of all steps. */
void phx__balance_say(const phx__run_result *result, int64_t steps);
/* The slowest rank by its own time, and that time in parts of the mean of the others; 1 rank, or no step: -1. */
int32_t phx__balance_slowest(const phx__rank_report *ranks, int32_t n, double *ratio);
#endif
