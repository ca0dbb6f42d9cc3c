/* phalanx/error.h - the one idiom for errors: fill one in, pass one on, clean up first.
 *
 * Header only, so that a plugin that links nothing has it.  C11 (and C++17).  [any] thread.
 *
 *   if (n < 1) return phx_fail(err, PHX_INVALID, "n is %d: it must be positive", n);
 *   PHX_TRY(open_file(&file, err));                            // nothing to clean up: a failure is returned
 *   PHX_TRY_GOTO(read_file(&file, text, err), status, done);   // `done:` closes the file and returns status
 *   if (close(file.fd) != 0) status = phx_fail_errno(err, PHX_IO, errno, "close %s", file.path);
 *
 * Who finds a fault fills err in; who passes it on does not touch it, or adds where it happened with phx_fail_more. */
#ifndef PHALANX_ERROR_H
#define PHALANX_ERROR_H
#include <phalanx/base.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PHX_FORMAT(at, first) __attribute__((format(printf, at, first)))
#else
#define PHX_FORMAT(at, first)
#endif

/* An error that nobody has filled in yet: phx_error err = PHX_ERROR_INIT; */
#define PHX_ERROR_INIT {sizeof(phx_error), 0, 0, {0}}

/* Returns from this function with the call's status when it is not PHX_OK.  Evaluates the call once. */
#define PHX_TRY(call)                                    \
  do {                                                   \
    const phx_status phx_try_status = (call);            \
    if (phx_try_status != PHX_OK) return phx_try_status; \
  } while (0)

/* Sets status, a variable, to the call's, and goes to label when it is not PHX_OK.  Evaluates the call once. */
#define PHX_TRY_GOTO(call, status, label) \
  do {                                    \
    (status) = (call);                    \
    if ((status) != PHX_OK) goto label;   \
  } while (0)

/* phx_fail_more for a function of your own that ends in "...". */
PHX_FORMAT(3, 0)
static inline phx_status phx_fail_more_args(phx_error *err, phx_status code, const char *format, va_list args) {
  size_t used = 0;
  if (!err) return code;
  while (used < sizeof err->message - 1 && err->message[used]) used++;
  vsnprintf(err->message + used, sizeof err->message - used, format, args);
  return code;
}

/* Adds to the message that err (may be NULL) holds, as far as there is room, and returns code. */
PHX_FORMAT(3, 4) static inline phx_status phx_fail_more(phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  phx_fail_more_args(err, code, format, args);
  va_end(args);
  return code;
}

/* phx_fail for a function of your own that ends in "...". */
PHX_FORMAT(3, 0)
static inline phx_status phx_fail_args(phx_error *err, phx_status code, const char *format, va_list args) {
  if (!err) return code;
  err->code = code;
  err->cause = 0;
  err->message[0] = 0;
  return phx_fail_more_args(err, code, format, args);
}

/* Fills err (may be NULL) with a formatted message and returns code. */
PHX_FORMAT(3, 4) static inline phx_status phx_fail(phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  phx_fail_args(err, code, format, args);
  va_end(args);
  return code;
}

/* The same, with the text of error_number (an errno) behind the message, and the number as cause. */
PHX_FORMAT(4, 5)
static inline phx_status phx_fail_errno(phx_error *err, phx_status code, int error_number, const char *format, ...) {
  va_list args;
  va_start(args, format);
  phx_fail_args(err, code, format, args);
  va_end(args);
  if (err) err->cause = error_number;
  return error_number ? phx_fail_more(err, code, ": %s", strerror(error_number)) : code;
}

#ifdef __cplusplus
}
#endif
#endif
