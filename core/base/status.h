/* core/base/status.h - names of statuses, and what the command ends with.  Errors: <phalanx/error.h>.  [any] thread. */
#ifndef PHX__STATUS_H
#define PHX__STATUS_H
#include <phalanx/error.h>

/* "INVALID", "COMM", ... */
const char *phx__status_name(phx_status code);

/* Exit statuses of the command. */
enum {
  PHX__EXIT_OK = 0,
  PHX__EXIT_REFUSED = 2,
  PHX__EXIT_RANK = 3,
  PHX__EXIT_DAMAGED = 4,
  PHX__EXIT_STOPPED = 5 /* a signal asked for it, and the state is saved */
};
#endif
