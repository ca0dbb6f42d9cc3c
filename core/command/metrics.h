/* core/command/metrics.h - metrics.jsonl: one line a step, written as it comes.  A full disk does not stop the run:
 * lines wait in memory, and are written when there is room.  [main] of rank 0. */
#ifndef PHX__METRICS_H
#define PHX__METRICS_H
#include <phalanx/base.h>
#include <stdbool.h>
#include <stddef.h>

enum {
  PHX__METRICS_LINE = 8 << 10,   /* bytes of a line at most */
  PHX__METRICS_WAITING = 4 << 20 /* bytes of lines that wait at most: some ten thousand steps */
};

typedef struct phx__metrics_told { /* of one step */
  bool step, valid_loss, state_hash;
} phx__metrics_told;

typedef struct phx__metrics {
  int fd; /* -1: closed */
  phx__metrics_told told; /* of the step that the run goes on after, before it went on */
  char path[4200];
  char *waiting; /* what could not be written yet: the rest of a line, and whole ones */
  size_t used;
  bool failing; /* the last write failed, with `cause`, which was said */
  int cause;
  int64_t lost, first; /* lines that had no room to wait, and the step of the first */
} phx__metrics;

/* last > 0: the run goes on after that step.  The file stays the same one, for who reads it with `tail -f`; it is cut
 * where the first line of a later step, or a line that is not whole, begins.  0: a new file. */
phx_status phx__metrics_open(phx__metrics *m, const char *path, int64_t last, phx_error *err);
/* line: with its newline, PHX__METRICS_LINE bytes at most; step: said if it is lost.  What cannot be written is a
 * warning, said once, and waits. */
void phx__metrics_line(phx__metrics *m, const char *line, size_t bytes, int64_t step);
/* Tries once more what waits.  PHX_IO: lines are missing, and which; that is told once. */
phx_status phx__metrics_flush(phx__metrics *m, phx_error *err);
void phx__metrics_close(phx__metrics *m); /* one of zeros is fine: nothing was opened */
#endif
