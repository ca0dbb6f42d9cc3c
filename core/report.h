/* core/report.h - what a run measured, of every rank, and the files it leaves: run.json and metrics.jsonl.  [main] */
#ifndef PHX__REPORT_H
#define PHX__REPORT_H
#include "checkpoint.h"
#include "engine.h"

/* One rank's numbers, as plain int64 so that they travel by all_gather. */
typedef struct phx__rank_report {
  int64_t planned[PHX_MEM_KINDS], measured[PHX_MEM_KINDS]; /* bytes; measured: the peak of what was allocated */
  int64_t sent_planned[PHX_OPS], sent_measured[PHX_OPS];   /* payload bytes of one step */
  int64_t calls_planned[PHX_OPS], calls_measured[PHX_OPS];
  int64_t peak_pss;         /* bytes, sampled at stage boundaries of one step */
  int64_t peak_in[3];       /* bytes by PHX_SPACE_*, our own accounting */
  int64_t driver_bytes;     /* of the device, as its driver counts them when the run ends; -1: it does not say */
  int64_t steady_calls;     /* of the host's allocator during steps after the first */
  int64_t hidden_bytes, hidden_allowed; /* that the strategy took beside the host, until the first step was over */
  int64_t later_bytes, later_allowed;   /* that the process took after the first step */
  int64_t own_ns, wait_ns;  /* a step: without waiting for peers, and the waiting; see balance.h */
  int64_t traffic_counts;   /* 1: traffic was measured in a whole steady step, so that it can be compared */
} phx__rank_report;

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

/* Proportional set size of this process, or -1. */
int64_t phx__pss_bytes(void);
/* run.json; result NULL while the run goes on; resumed (or NULL) is added to its list of resumes, which stays.  Written
 * beside and renamed. */
phx_status phx__run_json_write(const phx__runtime *rt, const phx__run_result *result, const phx__resumed *resumed,
                               phx_error *err);
#endif
