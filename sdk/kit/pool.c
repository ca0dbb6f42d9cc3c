/* sdk/kit/pool.c - windows of a memory that is taken once.
 *
 * Invariant: the windows in use stand by offset and do not overlap.  First fit is what every rank computes alike, and
 * what leaves the high end of the pool free, which decides how large the pool is.  Does not: know what a window
 * holds. */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

phx_status phx_kit_pool_take(phx_kit_pool *p, int64_t numel, int64_t *out, phx_error *err) {
  uint32_t i = 0;
  int64_t at = 0;
  if (p->n == p->room) {
    uint32_t room = p->room ? 2 * p->room : 16;
    phx_kit_window *more = realloc(p->windows, room * sizeof *more);
    if (!more) return phx_fail(err, PHX_NOMEM, "no memory to plan %u windows", room);
    p->windows = more;
    p->room = room;
  }
  for (; i < p->n && p->windows[i].offset - at < numel; i++) at = p->windows[i].offset + p->windows[i].numel;
  memmove(p->windows + i + 1, p->windows + i, (p->n - i) * sizeof *p->windows);
  p->windows[i] = (phx_kit_window){at, numel};
  p->n++;
  if (at + numel > p->numel) p->numel = at + numel;
  *out = at;
  return PHX_OK;
}

void phx_kit_pool_give_back(phx_kit_pool *p, int64_t offset) {
  uint32_t i = 0;
  while (i < p->n && p->windows[i].offset != offset) i++;
  if (i == p->n) return;
  p->n--;
  memmove(p->windows + i, p->windows + i + 1, (p->n - i) * sizeof *p->windows);
}

void phx_kit_pool_destroy(phx_kit_pool *p) {
  free(p->windows);
  memset(p, 0, sizeof *p);
}
