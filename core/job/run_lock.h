/* core/job/run_lock.h - one run in one directory: the file RUN/lock, held from before anything there is touched to the
 * end.
 *
 * The process that takes it is the launcher, rank 0 where another launcher started the ranks, or `checkpoint import`
 * into a run; a process holds one lock at most.  What only reads a run (sample, export, verify) needs none.
 * [main] unless said otherwise. */
#ifndef PHX__RUN_LOCK_H
#define PHX__RUN_LOCK_H
#include <phalanx/base.h>
#include <stdbool.h>

#define PHX__LOCK_NAME "lock"            /* in the run's directory */
#define PHX__LOCK_VARIABLE "PHALANX_LOCK_FD" /* rank 0 of our launcher: the descriptor that it inherits */

/* How long a sign of life of a process on another machine is waited for; tests shorten it. */
extern int phx__run_lock_patience_ms;
/* How long the other ranks let this one wait; 0: for ever.  What cannot be told within it is refused. */
extern int phx__run_lock_limit_ms;

/* dir exists.  PHX_INVALID: another run has it, which the message names by host, process and start.  A lock that a dead
 * process has left is taken over. */
phx_status phx__run_lock_take(const char *dir, phx_error *err);
/* The lock that is held becomes one of `dir`, a new directory under the name of the old one, which is now `moved`. */
phx_status phx__run_lock_move(const char *dir, const char *moved, phx_error *err);
/* In rank 0 of our launcher: goes on with the launcher's lock of dir, by its descriptor. */
phx_status phx__run_lock_adopt(const char *dir, int fd, phx_error *err);
/* [any] Is the file still this run's own?  PHX_STATE: no, and the message says whose it is.  Without a lock: PHX_OK.
 * Before what would harm another run: a sweep, the name of a checkpoint, retention, the final files. */
phx_status phx__run_lock_check(phx_error *err);
/* The same without a system call: what was seen in the last seconds; in the process that took the lock. */
phx_status phx__run_lock_seen(phx_error *err);
/* -1: none is held. */
int phx__run_lock_fd(void);
/* Removes the file when it is still ours; none held is fine.  What adopted a lock leaves the file. */
void phx__run_lock_release(void);
#endif
