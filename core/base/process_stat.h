/* core/base/process_stat.h - what /proc says about another process.  [any] */
#ifndef PHX__PROCESS_STAT_H
#define PHX__PROCESS_STAT_H
#include <stdbool.h>
#include <stdint.h>

typedef struct phx__process_stat {
  char state;     /* R, S, D, T (stopped), t (by a debugger), Z, ... */
  uint64_t start; /* since boot, in ticks: tells it from a later process of that number */
} phx__process_stat;

/* False: there is no such process, or nothing can be read about it; *out is zero then. */
bool phx__process_stat_read(long pid, phx__process_stat *out);
/* True when it has surely ended: it is a zombie, or gone, or another one has its number.  start 0: not known. */
bool phx__process_has_ended(long pid, uint64_t start);
#endif
