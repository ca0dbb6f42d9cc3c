/* core/command/plan.h - memory and traffic of every rank, as they are known before a run.  [main] */
#ifndef PHX__PLAN_H
#define PHX__PLAN_H
#include <stdio.h>

#include "config/config.h"

/* A table in lines that begin with ';'.  Prepares every rank; nothing is allocated for the run, no data is read.
 * The last line compares all ranks together with the memory of this machine (room.h). */
phx_status phx__plan_print(const phx__config *config, FILE *out, phx_error *err);
#endif
