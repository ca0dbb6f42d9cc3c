/* core/progress.h - what rank 0 says while training: a bar on a terminal, plain lines elsewhere; metrics.jsonl. [main]
 */
#ifndef PHX__PROGRESS_H
#define PHX__PROGRESS_H
#include "engine.h"

typedef struct phx__progress {
  const phx__runtime *rt;
  FILE *metrics;       /* metrics.jsonl, or NULL on other ranks */
  bool terminal;
  bool open_line;      /* the bar stands on a line that is not ended */
  int64_t tokens_per_step, first, last; /* the step that this run began after; of the last line */
  double started;      /* seconds, monotonic */
  char extra[1536];    /* plugins' metrics of this step, as JSON members */
  bool holds_save;     /* extra has a save in it */
} phx__progress;

double phx__now(void); /* seconds, CLOCK_MONOTONIC */
/* first: the step of the checkpoint that the run goes on from, or 0.  Lines of later steps are cut from metrics.jsonl.
 */
phx_status phx__progress_open(phx__progress *p, phx__runtime *rt, int64_t first, phx_error *err);
/* One step; valid_loss NaN and hash NULL when not taken at this step. */
phx_status phx__progress_step(phx__progress *p, int64_t step, const phx__step_result *r, double seconds,
                              int64_t bytes_sent, double valid_loss, const char *hash, phx_error *err);
/* Members for the next line, with a comma before each; left out when there is no room. */
void phx__progress_add(phx__progress *p, const char *members);
/* What became of a save, as members for the next line; where another waits for that line, or no step comes any more,
 * it has a line of its own, with the last step done. */
void phx__progress_save(phx__progress *p, const char *members);
/* Writes what waits; ends the bar's line, so that what follows stands on its own. */
void phx__progress_close(phx__progress *p);
void phx__bytes_text(int64_t bytes, char text[24]); /* "123.4 MiB" */
#endif
