/* core/base/nearest.h - the known name nearest to a mistyped one, for "did you mean".  [any] thread.
 *
 * Offer every known name, then ask: best is NULL unless one is near enough to be a likely slip of the hand. */
#ifndef PHX__NEAREST_H
#define PHX__NEAREST_H
#include <stddef.h>

typedef struct phx__nearest {
  const char *word; /* as typed */
  const char *best; /* [borrow] of what was offered, or NULL */
  size_t distance;
} phx__nearest;

void phx__nearest_offer(phx__nearest *nearest, const char *candidate);
/* Insertions, deletions, replacements, and swaps of neighbours; words over 64 bytes are infinitely far. */
size_t phx__edit_distance(const char *a, const char *b);
/* ": did you mean 'x'?" or "" into text; returns text. */
const char *phx__nearest_hint(const phx__nearest *nearest, char *text, size_t size);
#endif
