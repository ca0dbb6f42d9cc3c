/* core/base/nearest.c - optimal string alignment distance (Damerau 1964, without repeated edits of one place).
 *
 * No state; any thread. */
#include "base/nearest.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { LONGEST = 64 };

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

size_t phx__edit_distance(const char *a, const char *b) {
  size_t n = strlen(a), m = strlen(b);
  if (n > LONGEST || m > LONGEST) return SIZE_MAX;
  size_t rows[3][LONGEST + 1]; /* rows[i % 3][j]: distance of a[0..i) and b[0..j) */
  for (size_t j = 0; j <= m; j++) rows[0][j] = j;
  for (size_t i = 1; i <= n; i++) {
    size_t *now = rows[i % 3], *up = rows[(i - 1) % 3], *up2 = rows[(i + 1) % 3];
    now[0] = i;
    for (size_t j = 1; j <= m; j++) {
      now[j] = least(least(up[j] + 1, now[j - 1] + 1), up[j - 1] + (a[i - 1] != b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) now[j] = least(now[j], up2[j - 2] + 1);
    }
  }
  return rows[n % 3][m];
}

void phx__nearest_offer(phx__nearest *nearest, const char *candidate) {
  size_t distance = phx__edit_distance(nearest->word, candidate);
  size_t near_enough = 1 + strlen(candidate) / 3;
  if (distance > near_enough || 2 * distance > strlen(candidate)) return; /* half of it is another word */
  if (nearest->best && nearest->distance <= distance) return;
  nearest->best = candidate;
  nearest->distance = distance;
}

const char *phx__nearest_hint(const phx__nearest *nearest, char *text, size_t size) {
  if (nearest->best)
    snprintf(text, size, ": did you mean '%s'?", nearest->best);
  else
    text[0] = 0;
  return text;
}
