/* core/base/slurm_list.h - the two kinds of lists that srun puts into the environment.  [any], no state. */
#ifndef PHX__SLURM_LIST_H
#define PHX__SLURM_LIST_H
#include <phalanx/base.h>
#include <stdbool.h>

/* The first machine of a list such as SLURM_STEP_NODELIST: "node[07-09,12]-ib,gpu1" is node07-ib.  false: it is none,
 * or its name does not fit. */
bool phx__slurm_first_host(const char *list, char *out, size_t bytes);
/* The number for `node` in a list such as SLURM_STEP_TASKS_PER_NODE: "2(x3),1" is 2, 2, 2, 1.  0: there is none, or it
 * is above `most`. */
int32_t phx__slurm_tasks(const char *list, int32_t node, int32_t most);
#endif
