/* core/base/status.c - see status.h.  No state, any thread. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void fill(phx_error *err, phx_status code, int cause, const char *format, va_list args) {
  if (!err) return;
  err->code = code;
  err->cause = cause;
  int used = vsnprintf(err->message, sizeof err->message, format, args);
  if (cause && used >= 0 && (size_t)used < sizeof err->message) {
    char text[128];
    snprintf(err->message + used, sizeof err->message - (size_t)used, ": %s",
             strerror_r(cause, text, sizeof text));
  }
}

phx_status phx__fail(phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  fill(err, code, 0, format, args);
  va_end(args);
  return code;
}

phx_status phx__fail_errno(phx_error *err, phx_status code, int error_number, const char *format, ...) {
  va_list args;
  va_start(args, format);
  fill(err, code, error_number, format, args);
  va_end(args);
  return code;
}

phx_status phx__fail_in(phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  if (!err) return code;
  const size_t used = strnlen(err->message, sizeof err->message - 1);
  va_start(args, format);
  vsnprintf(err->message + used, sizeof err->message - used, format, args);
  va_end(args);
  return code;
}

const char *phx__status_name(phx_status code) {
  static const char *const names[] = {"OK", "INVALID", "UNSUPPORTED", "NOMEM", "COMM", "DEVICE", "IO", "STATE",
                                      "INTERNAL"};
  return code >= 0 && code <= PHX_INTERNAL ? names[code] : "unknown";
}
