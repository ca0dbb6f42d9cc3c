/* core/command/compare.h - the same run under several strategies, one after the other, and the table of what
 * differs.  [main] */
#ifndef PHX__COMPARE_H
#define PHX__COMPARE_H
#include "command/cli.h"

typedef struct phx__compare_plan {
  const char *command;  /* the path of this command */
  const char *file;     /* FILE.ini */
  const char *variants; /* "ddp,fsdp.sharding=grad_op,/opt/mine.so:x=1": a strategy, and for it alone keys joined by
                           '+', behind a name at '.', behind a path at ':' */
  const phx__override *overrides; /* what every run gets */
  size_t n_overrides;
  bool checks;          /* [run] checked = auto: every run is checked; filled by phx__compare */
} phx__compare_plan;

/* Exit status: 0; 1 when deterministic runs differ in their bits, or a run did not keep its plan; 2 when any of the
 * runs would be refused, and then nothing was made; else that of the run that failed. */
int phx__compare(const phx__compare_plan *plan);
#endif
