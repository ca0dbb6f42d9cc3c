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
  int64_t traffic_counts;   /* 1: traffic was measured in a whole steady step, so that it can be compared */
} phx__rank_report;

typedef struct phx__save_totals { /* of this process; the stall is of the rank where it is the longest */
  int64_t saves, failed, bytes;
  double stall, stall_most, seconds; /* seconds: from a save's begin until it was committed */
} phx__save_totals;

typedef struct phx__run_result {
  int64_t steps, skipped;   /* skipped: not finite, without an update */
  double loss, valid_loss;  /* valid_loss NaN: not asked for */
  double tokens_per_s, step_ms; /* median over the steps after the first */
  char state_hash[33];
  phx__rank_report ranks[PHX_RANKS_MAX];
  int32_t n_ranks;
  const char *stopped; /* the signal that ended the run at `steps`, or NULL: only steps and saves are filled then */
  phx__save_totals saves;
} phx__run_result;

/* Proportional set size of this process, or -1. */
int64_t phx__pss_bytes(void);
/* Creates run.out (and parents); an earlier run there is moved aside to run.out.N; writes config.ini.  On failure no
 * new directory is left.  The launcher, or rank 0 under another launcher. */
phx_status phx__run_dir_create(const phx__config *config, phx_error *err);
/* [collective] every rank sees the directory that rank 0 has made; for ranks on several machines. */
phx_status phx__run_dir_shared(const phx__config *config, const phx_job *job, phx_error *err);
/* For a run that goes on there: only config.ini is written anew. */
phx_status phx__run_dir_resume(const phx__config *config, phx_error *err);
/* What run.out holds before one of the two above, so that a run that could not begin (its checkpoint is damaged) leaves
 * everything as it was.  undo: only while no rank has got past loading; continues: it was the second of the two. */
typedef struct phx__run_dir phx__run_dir;
phx_status phx__run_dir_remember(const phx__config *config, phx__run_dir **out, phx_error *err);
void phx__run_dir_undo(const phx__run_dir *before, bool continues); /* NULL is fine; says what cannot be undone */
void phx__run_dir_forget(phx__run_dir *before);                     /* NULL is fine */
/* run.json; result NULL while the run goes on; resumed (or NULL) is added to its list of resumes, which stays.  Written
 * beside and renamed. */
phx_status phx__run_json_write(const phx__runtime *rt, const phx__run_result *result, const phx__resumed *resumed,
                               phx_error *err);
#endif
