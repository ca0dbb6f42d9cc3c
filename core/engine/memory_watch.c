/* core/engine/memory_watch.c - see memory_watch.h.
 *
 * Reading /proc/self/status takes some 20 microseconds, so it is read around calls only until the first step is over.
 * It is read past phx__sys: where it cannot be read nothing is watched, and nothing else changes.
 * Invariant: `before` belongs to the call of the strategy that is under way, or to the end of the first step. */
#include "engine/memory_watch.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/sys.h"
#include "plugin/where.h"

/* Ordinary growth.  In a strategy's calls: its own tables, streams' threads and malloc's arenas; a stack or an arena
 * that is touched once may come as one huge page.  Later: buffers of files that are saved, of the validation, and what
 * libraries had reserved. */
#define HUGE_PAGE (INT64_C(2) << 20)
#define IN_CALLS (8 * HUGE_PAGE)
#define LATER (16 * HUGE_PAGE)
enum { PARTS = 256 }; /* and so small a part of the plan, with which tables grow */

static struct {
  const phx__memory_book *book; /* NULL: nothing is watched */
  bool in_strategy, steady;
  int64_t before, grown;
} watch;

/* What a device may have taken for an allocation: large ones come in huge pages. */
static int64_t rounded(int64_t bytes) {
  return bytes < HUGE_PAGE ? bytes : (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
}

/* RssAnon of this process without what the book knows; -1: not to be had. */
static int64_t unknown_bytes(void) {
  static const char name[] = "RssAnon:";
  char text[4096];
  const int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  if (n <= 0) return -1;
  text[n] = 0;
  const char *line = strstr(text, name);
  if (!line) return -1;
  int64_t bytes = 1024 * strtoll(line + sizeof name - 1, NULL, 10);
  const phx_device *device = watch.book->device;
  const bool in_host_memory = !device || (device->caps & PHX_DEVICE_HOST_MEMORY); /* a GPU's is not in RssAnon */
  for (size_t i = 0; i < watch.book->n; i++) {
    const phx__allocation *one = &watch.book->list[i];
    const bool anonymous = one->space == PHX_SPACE_HOST || in_host_memory;
    if (anonymous && !one->arena) bytes -= rounded(one->bytes);
  }
  return bytes;
}

static void on_call(int32_t kind) {
  const bool enters = kind == PHX_KIND_STRATEGY || kind == PHX_KIND_OPTIMIZER; /* its update is part of a strategy's */
  if (enters == watch.in_strategy) return;
  const int64_t now = unknown_bytes();
  if (!enters) watch.grown += now - watch.before;
  watch.before = now;
  watch.in_strategy = enters;
}

void phx__memory_watch_begin(const phx__memory_book *book) {
  memset(&watch, 0, sizeof watch);
  watch.book = book;
  if (PHX__SANITIZED || unknown_bytes() == -1) watch.book = NULL;
  else phx__where_watch = on_call;
}

void phx__memory_watch_steady(void) {
  if (!watch.book || watch.steady) return;
  phx__where_watch = NULL;
  watch.steady = true;
  watch.before = unknown_bytes();
}

void phx__memory_watch_note(int32_t threads, const int64_t planned[PHX_MEM_KINDS], phx__rank_report *mine) {
  int64_t ordinary = HUGE_PAGE * (threads > 0 ? threads : 1);
  if (!watch.book) return;
  for (int k = 0; k < PHX_MEM_KINDS; k++) ordinary += planned[k] / PARTS;
  mine->hidden_allowed = IN_CALLS + ordinary;
  mine->later_allowed = LATER + ordinary;
  if (watch.grown > mine->hidden_bytes) mine->hidden_bytes = watch.grown;
  const int64_t later = watch.steady ? unknown_bytes() - watch.before : 0;
  if (later > mine->later_bytes) mine->later_bytes = later;
}

void phx__memory_watch_end(void) {
  phx__where_watch = NULL;
  watch.book = NULL;
}
