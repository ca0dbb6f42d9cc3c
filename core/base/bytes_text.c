/* core/base/bytes_text.c - see bytes_text.h. */
#include "base/bytes_text.h"

#include <stdio.h>

void phx__bytes_text(int64_t bytes, char text[24]) {
  static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = (double)bytes;
  int u = 0;
  while (value >= 1024 && u < 4) {
    value /= 1024;
    u++;
  }
  snprintf(text, 24, u ? "%.1f %s" : "%.0f %s", value, units[u]);
}
