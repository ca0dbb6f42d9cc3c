/* core/command/restart.h - a run that is started again after a failure.  [main], in the launcher's process. */
#ifndef PHX__RESTART_H
#define PHX__RESTART_H
#include "config/config.h"

/* Starts the ranks with argv (a NULL-terminated command line of a rank), and again after a failure, run.max_restarts
 * times at most.  Returns the exit status of the last attempt; *restarted: it was not the first. */
int phx__restart_run(const phx__config *config, char *const *argv, bool *restarted);
/* batch.accumulate that keeps the global batch of `config` on `ranks` ranks; PHX_INVALID with the arithmetic when none
 * does.  Pure. */
phx_status phx__restart_accumulate(const phx__config *config, int32_t ranks, int64_t *out, phx_error *err);
#endif
