/* core/checkpoint/saver.h - a checkpoint that is written while training goes on: one at most, by a thread of its own.
 *
 * State changes only by the optimizer's tickets (PHX_CAP_LIVE_STATE), and core/engine/optim.c says so before each: what
 * of it is still to be written is copied first, into memory that was planned, or waited for where that is too small.
 * The ranks go on together: when all are `ready` (one number in an all_reduce that is made anyway) they `advance`.
 * [main] but for the thread inside. */
#ifndef PHX__SAVER_H
#define PHX__SAVER_H
#include "checkpoint/checkpoint.h"

typedef struct phx__save_report {      /* of one save */
  int64_t step, bytes;                 /* bytes: of all ranks' files */
  double begin, copies, waits, commit; /* seconds that [main] stood still, of this rank */
  double stall;                        /* seconds: the sum of the four, of the rank where it is the largest */
  double seconds; /* from begin until it was renamed and flushed (other ranks than 0: until they knew) */
} phx__save_report;

typedef struct phx__saver phx__saver;

/* Can this strategy's state on this device be read while training goes on?  Else *why says why not. */
bool phx__saver_possible(const phx__runtime *rt, const char **why);
/* [main] copy: bytes for copies, -1: all that this rank writes.  Plans and takes them; starts the thread.  run_dir and
 * retention are [borrow:self]. */
phx_status phx__saver_open(phx__runtime *rt, const char *run_dir, const phx__retention *retention, int64_t copy,
                           phx__saver **out, phx_error *err);
/* [main] Ends the thread, gives up a save in flight without the other ranks (one that rank 0 is publishing may still be
 * committed); NULL is fine.  Before the runtime is closed. */
void phx__saver_close(phx__saver *v);

bool phx__saver_busy(const phx__saver *v); /* the same on all ranks */
/* [main][collective] Nothing is in flight.  The state is that of `at` until this returns. */
phx_status phx__saver_begin(phx__saver *v, const phx__position *at, phx_error *err);
bool phx__saver_ready(phx__saver *v); /* of this rank; true when nothing is in flight */
/* [main][collective] All ranks are ready, and one is in flight.  *ended: there is none any more, and *out tells of it
 * or, with a status, it failed (PHX_COMM: the ranks cannot meet). */
phx_status phx__saver_advance(phx__saver *v, bool *ended, phx__save_report *out, phx_error *err);
/* [main][collective] Waits for the one in flight: advances until it ended. */
phx_status phx__saver_finish(phx__saver *v, phx__save_report *out, phx_error *err);
#endif
