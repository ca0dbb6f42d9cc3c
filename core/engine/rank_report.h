/* core/engine/rank_report.h - what one rank planned and measured in a run. */
#ifndef PHX__RANK_REPORT_H
#define PHX__RANK_REPORT_H
#include <phalanx/provider.h>

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
#endif
