/* core/command/run_dir.h - the directory of a run, run.out: made, locked, an earlier run moved aside, config.ini; and
 * back.
 *
 * By the launcher, or by rank 0 under another launcher.  Order: open (nothing is moved or written yet, but the lock),
 * begin, at the end close.  A link is followed; a directory that cannot be moved is refused only when it holds an
 * earlier run.  [main] */
#ifndef PHX__RUN_DIR_H
#define PHX__RUN_DIR_H
#include <phalanx/job.h>

#include "config/config.h"

typedef struct phx__run_dir phx__run_dir;

/* Makes run.out and its parents where they are not there, and takes its lock.  PHX_INVALID: another run has it, or it
 * is not ours.  On failure no new directory is left. */
phx_status phx__run_dir_open(const phx__config *config, phx__run_dir **out, phx_error *err);
/* What open and begin of a new run would refuse, as far as looking tells: nothing is made, moved or locked. */
phx_status phx__run_dir_check(const phx__config *config, phx_error *err);
/* Writes config.ini.  continues: the run that lies there goes on; else an earlier run is moved aside to run.out.N.  On
 * failure everything is as before. */
phx_status phx__run_dir_begin(phx__run_dir *dir, const phx__config *config, bool continues, phx_error *err);
/* A run that could not begin (its checkpoint is damaged) leaves everything as it was; only while no rank has got past
 * loading.  NULL is fine; says what cannot be undone. */
void phx__run_dir_undo(phx__run_dir *dir);
/* Gives the lock back; what was opened and did not begin leaves no new directory.  NULL is fine. */
void phx__run_dir_close(phx__run_dir *dir);
/* open and begin for a new run whose lock stays until this process ends. */
phx_status phx__run_dir_create(const phx__config *config, phx_error *err);
/* In rank 0 of our launcher: its lock is this process's, too. */
phx_status phx__run_dir_inherit(const phx__config *config, phx_error *err);
/* [collective] every rank sees the directory that rank 0 has made; for ranks on several machines. */
phx_status phx__run_dir_shared(const phx__config *config, const phx_job *job, phx_error *err);
#endif
