/* core/command/progress.h - what rank 0 says while training: a bar on a terminal, plain lines elsewhere; metrics.jsonl.
 * [main] */
#ifndef PHX__PROGRESS_H
#define PHX__PROGRESS_H
#include "command/metrics.h"
#include "engine/engine.h"

typedef struct phx__progress {
  const phx__runtime *rt; /* NULL: never opened */
  phx__metrics metrics;   /* of rank 0 */
  bool mine;              /* this is rank 0 */
  bool bar;               /* else plain lines */
  int64_t tokens_per_step, first, last; /* the step that this run began after; of the last line */
  int64_t step;          /* the last that is done, and its numbers */
  phx__step_result done;
  double seconds;
  int64_t bytes_sent;
  double started;      /* seconds, monotonic */
  char extra[4096];    /* plugins' metrics of this step, as JSON members */
  bool holds_save;     /* extra has a save in it */
  bool left_out;       /* a plugin's metric had no room, which was said */
} phx__progress;

/* first: the step of the checkpoint that the run goes on from, or 0.  Lines of later steps are cut from metrics.jsonl.
 */
phx_status phx__progress_open(phx__progress *p, phx__runtime *rt, int64_t first, phx_error *err);
/* A step is done; its line comes with what is told of it, or before a save that training waits for. */
void phx__progress_done(phx__progress *p, int64_t step, const phx__step_result *r, double seconds, int64_t bytes_sent);
/* The line of the step that is done, if it is not written yet: a save holds no step that has none. */
void phx__progress_line(phx__progress *p);
/* What else there is to tell of it: in its line, or in one of its own behind it, {"after_step":N,...}.  valid_loss NaN
 * and hash NULL when not taken at this step.  Before the first step: of the one that the run goes on after.  A line
 * that cannot be written waits: see metrics.h. */
void phx__progress_tell(phx__progress *p, double valid_loss, const char *hash);
/* Members for the next line, with a comma before each; false: there is no room for them. */
bool phx__progress_add(phx__progress *p, const char *members);
/* What became of a save, as members for the next line; where another waits for that line, or no step comes any more,
 * it has a line of its own, {"after_step":N,...}, which is no step's. */
void phx__progress_save(phx__progress *p, const char *members);
/* Writes what waits; PHX_IO: lines of metrics.jsonl are missing, which is told once. */
phx_status phx__progress_flush(phx__progress *p, phx_error *err);
/* Ends the bar's line, so that what follows stands on its own; writes what waits, or warns. */
void phx__progress_close(phx__progress *p);
#endif
