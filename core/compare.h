/* core/compare.h - the same run under several strategies, one after the other, and the table of what differs.  [main] */
#ifndef PHX__COMPARE_H
#define PHX__COMPARE_H
#include <phalanx/base.h>

/* variants: "ddp,fsdp.sharding=grad_op,zero.stage=1": a strategy, and for it alone one or more keys (joined by '+').
 * common: the arguments every run gets (FILE.ini, -n, --set ...), NULL-terminated; base: the run directory.
 * Exit status: 0; 1 when deterministic runs differ in their bits; else that of the run that failed. */
int phx__compare(const char *command, char *const *common, const char *variants, const char *base, int deterministic);
#endif
