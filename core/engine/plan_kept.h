/* core/engine/plan_kept.h - are the plan's numbers possible, and was the plan kept?  [main]
 *
 * A plan is what plugins promise before a run: bytes by kind, payload and calls by collective.  It is believed by
 * schedulers, by the arena and by people, so numbers that cannot be are refused, and after the run planned and measured
 * numbers are compared, rank by rank.  Memory beside the plan: memory_watch.h. */
#ifndef PHX__PLAN_KEPT_H
#define PHX__PLAN_KEPT_H
#include "engine/prepared.h"
#include "engine/rank_report.h"

/* Refuses a strategy's estimate, a layout, or a size of another plugin that no machine can have.  Pure. */
phx_status phx__plan_check_layout(const phx__prepared *p, phx_error *err);
phx_status phx__plan_check_stage(const phx__prepared *p, uint32_t stage, phx_error *err);
phx_status phx__plan_check_workspace(const phx__prepared *p, int64_t bytes, phx_error *err); /* of the optimizer */
phx_status phx__plan_check_estimate(const phx__prepared *p, int64_t comm_buffers, phx_error *err);

/* One line for each number that is not as planned, of every rank: "rank 1: gradients: 3.3 MiB planned, 6.6 MiB
 * measured".  Returns their number. */
typedef void phx__plan_say_fn(void *arg, const char *line);
int32_t phx__plan_differences(const phx__rank_report *ranks, int32_t n, phx__plan_say_fn *say, void *arg);
#endif
