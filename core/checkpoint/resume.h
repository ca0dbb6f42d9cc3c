/* core/checkpoint/resume.h - `train --resume`: where a run goes on from, and where it goes on.  [main]
 *
 * DIR is a run's directory or one checkpoint, or "" for run.out.  What lies in run.out goes on there: metrics are cut,
 * checkpoints of later steps are set aside.  From anywhere else the state is taken, and run.out becomes a new run.
 * `if-any` instead of DIR: run.out where it holds a checkpoint, else a new run: the same command line for the first
 * start of a job and for each one after it. */
#ifndef PHX__RESUME_H
#define PHX__RESUME_H
#include "checkpoint/checkpoint.h"

#define PHX__RESUME_IF_ANY "if-any"

typedef struct phx__resume {
  char dir[PHX__CHECKPOINT_PATH]; /* for phx__checkpoint_resume */
  bool continues;                 /* in run.out */
} phx__resume;

/* if-any: whether there is one to go on from, under the run's lock.  PHX_IO: all that there are are damaged. */
phx_status phx__resume_decide(const phx__config *config, bool *any, phx_error *err);
/* asked: what --resume was given.  PHX_INVALID: it is not there. */
phx_status phx__resume_locate(const phx__config *config, const char *asked, phx__resume *out, phx_error *err);
/* Before any rank exists: is there one that is whole as far as its manifest says, and does it fit?  PHX_IO: all are
 * damaged; PHX_INVALID: it does not fit, or there is none. */
phx_status phx__resume_check(const phx__resume *resume, const phx__prepared *prepared, phx_error *err);
/* [collective] Loads the state; statuses as phx__checkpoint_resume. */
phx_status phx__resume_load(const phx__resume *resume, phx__runtime *rt, phx__resumed *out, phx_error *err);
#endif
