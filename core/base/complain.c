/* core/base/complain.c - see complain.h. */
#include "base/complain.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/clean.h"
#include "base/screen.h"

void phx__complain(const char *format, ...) {
  char text[16384]; /* a report of ranks has many paths in it; what is longer is cut */
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  phx__clean(text, sizeof text);
  phx__screen_clear();
  fprintf(stderr, "phalanx: %s\n", text);
}
