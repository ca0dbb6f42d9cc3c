/* core/base/status.c - see status.h.  No state, any thread. */
#include "base/status.h"

const char *phx__status_name(phx_status code) {
  static const char *const names[] = {"OK", "INVALID", "UNSUPPORTED", "NOMEM", "COMM", "DEVICE", "IO", "STATE",
                                      "INTERNAL"};
  return code >= 0 && code <= PHX_INTERNAL ? names[code] : "unknown";
}
