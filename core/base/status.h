/* core/base/status.h - filling phx_error, and the checked-call macro.  [any] thread. */
#ifndef PHX__STATUS_H
#define PHX__STATUS_H
#include <phalanx/base.h>

#define PHX_ERROR_INIT {sizeof(phx_error), 0, 0, {0}}

/* Fills err (may be NULL) with a formatted message and returns code. */
phx_status phx__fail(phx_error *err, phx_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same, with errno's text appended and kept as cause. */
phx_status phx__fail_errno(phx_error *err, phx_status code, int error_number, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Adds to the message that err (may be NULL) holds, as far as there is room, and returns code. */
phx_status phx__fail_in(phx_error *err, phx_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* "INVALID", "COMM", ... */
const char *phx__status_name(phx_status code);

/* Goes to `done` with `status` set when a call fails. */
#define PHX__TRY(call)              \
  do {                              \
    status = (call);                \
    if (status != PHX_OK) goto done; \
  } while (0)

/* Exit statuses of the command. */
enum {
  PHX__EXIT_OK = 0,
  PHX__EXIT_REFUSED = 2,
  PHX__EXIT_RANK = 3,
  PHX__EXIT_DAMAGED = 4,
  PHX__EXIT_STOPPED = 5 /* a signal asked for it, and the state is saved */
};
#endif
