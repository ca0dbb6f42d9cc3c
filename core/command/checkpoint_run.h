/* core/command/checkpoint_run.h - the checkpoints of one run: when they are saved and how, what is said and counted.
 * [main] [collective] */
#ifndef PHX__CHECKPOINT_RUN_H
#define PHX__CHECKPOINT_RUN_H
#include "checkpoint/saver.h"
#include "command/progress.h"
#include "command/run_result.h"

typedef struct phx__checkpoints {
  phx__runtime *rt; /* NULL: never opened */
  phx__progress *progress;
  phx__saver *saver; /* NULL: training waits for every save */
  phx__retention retention;
  phx__position at; /* of the save in flight */
  int64_t saved;    /* the step of the newest checkpoint, or 0 */
  int64_t failures; /* saves in a row that failed */
  phx_error why;    /* the last of them did */
  phx__save_totals totals;
} phx__checkpoints;

/* saved: the step of the run's own checkpoint that it goes on from, or 0.  first: the step it begins after. */
phx_status phx__checkpoints_open(phx__checkpoints *c, phx__runtime *rt, phx__progress *progress, int64_t first,
                                 int64_t saved, phx_error *err);
void phx__checkpoints_close(phx__checkpoints *c); /* without the other ranks; of zeros is fine */

/* Between two steps, with checkpoint.every > 0: what is in flight goes on.  *stop: the signal that any rank heard, or
 * 0; all ranks stop at the same step. */
phx_status phx__checkpoints_meet(phx__checkpoints *c, int *stop, phx_error *err);
/* After a whole step: saved in the background where that can be, and waited for when it is the `last` thing this run
 * does.  A failure is a warning while training goes on, and an error where nothing comes after it. */
phx_status phx__checkpoints_save(phx__checkpoints *c, const phx__position *at, bool last, phx_error *err);
/* PHX_IO: checkpoint.max_failures saves in a row failed, and the run stops.  The same on all ranks. */
phx_status phx__checkpoints_given_up(const phx__checkpoints *c, phx_error *err);
/* One line on rank 0's screen. */
void phx__checkpoints_say(int32_t rank, int32_t level, const char *format, ...) __attribute__((format(printf, 3, 4)));
#endif
