/* core/plugin/host.c - see host.h.
 *
 * Memory with a communicator comes from the communicator's arena, all other from the device.  The arena is carved from
 * the bottom; a block goes back when everything above it was released: strategies allocate at create and release at
 * destroy, so no more is needed.  The book may be read from [main] only. */
#include "plugin/host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clean.h"
#include "base/screen.h"
#include "base/status.h"
#include "base/sys.h"

enum { LOG_LINE = 8192 }; /* what is longer is cut */

const char *phx__memory_name(int32_t kind) {
  static const char *const names[PHX_MEM_KINDS] = {"weights", "master",  "gradients",   "optimizer",
                                                   "gathered", "buffers", "activations", "workspace"};
  return kind >= 0 && kind < PHX_MEM_KINDS ? names[kind] : "unknown";
}

void phx__log(int32_t rank, const char *who, int32_t level, const char *message) {
  static const char *const names[] = {"error", "warn", "info", "debug"};
  int32_t limit = rank == 0 ? PHX_LOG_INFO : PHX_LOG_WARN; /* once is enough */
  const char *wanted = getenv("PHALANX_LOG");
  for (int32_t i = 0; wanted && i < 4; i++)
    if (!strcmp(wanted, names[i])) limit = i;
  if (level < 0 || level > limit || level > 3) return;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  struct tm tm;
  localtime_r(&now.tv_sec, &tm);
  const bool problem = level <= PHX_LOG_WARN;
  char line[LOG_LINE];
  snprintf(line, sizeof line, "[%02d:%02d:%02d.%03ld rank %d %s] %s%s%s", tm.tm_hour, tm.tm_min, tm.tm_sec,
           now.tv_nsec / 1000000, rank, who, problem ? names[level] : "", problem ? ": " : "", message);
  phx__screen_clear();
  phx__clean(line, sizeof line); /* a plugin's text, or a name of a file, moves no cursor */
  fprintf(stderr, "%s\n", line);
}

static void host_log(void *ctx, int32_t level, const char *message) {
  const phx__host *h = ctx;
  phx__log(h->table.rank, h->plugin, level, message);
}

static phx_status book_room(phx__memory_book *book, phx_error *err) {
  if (book->n < book->room) return PHX_OK;
  size_t room = book->room ? 2 * book->room : 64;
  phx__allocation *list = phx__sys.realloc(book->list, room * sizeof *list);
  if (!list) return phx_fail(err, PHX_NOMEM, "no memory for the memory book");
  book->list = list;
  book->room = room;
  return PHX_OK;
}

void phx__memory_book_hold(phx__memory_book *book, int32_t kind, int32_t space, int64_t bytes) {
  book->now_in[space] += bytes;
  if (book->now_in[space] > book->peak_in[space]) book->peak_in[space] = book->now_in[space];
  book->now[kind] += bytes;
  book->now_all += bytes;
  if (book->now[kind] > book->peak[kind]) book->peak[kind] = book->now[kind];
  if (book->now_all > book->peak_all) book->peak_all = book->now_all;
}

static phx_status zero(const phx__memory_book *book, void *p, int64_t bytes, phx_error *err) {
  const phx_device *d = book->device;
  if (!d || (d->caps & PHX_DEVICE_HOST_MEMORY)) {
    memset(p, 0, (size_t)bytes);
    return PHX_OK;
  }
  const phx_status status = d->zero(d->ctx, p, bytes, NULL, err);
  return status ? status : d->stream_synchronize(d->ctx, NULL, err);
}

static phx_status host_alloc(void *ctx, const phx_memory *what, void **out, phx_error *err) {
  phx__host *h = ctx;
  phx__memory_book *book = h->book;
  if (what->bytes <= 0 || what->bytes > INT64_MAX - PHX_ALIGN || what->kind < 0 || what->kind >= PHX_MEM_KINDS ||
      what->space < PHX_SPACE_DEVICE || what->space > PHX_SPACE_PINNED)
    return phx_fail(err, PHX_INVALID, "%s asked for %lld bytes of memory kind %d in space %d", h->plugin,
                    (long long)what->bytes, what->kind, what->space);
  PHX_TRY(book_room(book, err));
  const int64_t bytes = phx_align_bytes(what->bytes);
  void *p = NULL;
  const bool arena = what->comm && book->arena;
  if (arena) {
    if (bytes > book->arena_bytes - book->arena_used)
      return phx_fail(err, PHX_NOMEM,
                      "%s asked for %lld bytes of shared memory (%s), but its estimate left %lld: estimate() and "
                      "create() of the strategy disagree",
                      h->plugin, (long long)bytes, phx__memory_name(what->kind),
                      (long long)(book->arena_bytes - book->arena_used));
    p = book->arena + book->arena_used;
    PHX_TRY(zero(book, p, bytes, err));
    book->arena_used += bytes;
  } else {
    PHX_TRY(book->device_table->alloc(book->device_self, what->space, bytes, &p, err));
  }
  book->list[book->n++] = (phx__allocation){p, bytes, what->kind, what->space, arena, h};
  book->calls++;
  phx__memory_book_hold(book, what->kind, what->space, bytes);
  *out = p;
  return PHX_OK;
}

static void book_drop(phx__memory_book *book, size_t i) {
  phx__allocation a = book->list[i];
  book->list[i] = book->list[--book->n];
  book->now[a.kind] -= a.bytes;
  book->now_all -= a.bytes;
  book->now_in[a.space] -= a.bytes;
  if (!a.arena) {
    book->device_table->free(book->device_self, a.space, a.p, a.bytes);
    return;
  }
  int64_t top = 0; /* the arena shrinks to the end of the highest block still held */
  for (size_t k = 0; k < book->n; k++)
    if (book->list[k].arena) {
      int64_t end = (char *)book->list[k].p - book->arena + book->list[k].bytes;
      if (end > top) top = end;
    }
  book->arena_used = top;
}

static void host_release(void *ctx, void *p) {
  phx__host *h = ctx;
  if (!p) return;
  for (size_t i = h->book->n; i-- > 0;)
    if (h->book->list[i].p == p) {
      book_drop(h->book, i);
      return;
    }
  char text[96];
  snprintf(text, sizeof text, "released %p, which the host did not allocate", p);
  phx__log(h->table.rank, h->plugin, PHX_LOG_ERROR, text);
}

void phx__memory_book_clear(phx__memory_book *book) {
  while (book->n) book_drop(book, book->n - 1);
  phx__free(book->list);
  book->list = NULL;
  book->room = 0;
}

static const void *host_extension(void *ctx, const char *id) {
  const phx__host *h = ctx;
  if (!strcmp(id, PHX_EXT_DEVICE)) return h->device;
  if (!strcmp(id, PHX_EXT_COMM)) return h->comm;
  if (!strcmp(id, PHX_EXT_OPTIM)) return h->optim;
  if (!strcmp(id, PHX_EXT_OPS)) return h->ops;
  if (!strcmp(id, PHX_EXT_JOB)) return h->job;
  return NULL;
}

static void host_metric(void *ctx, const char *name, double value) {
  const phx__host *h = ctx;
  if (h->metric) h->metric(h->metric_arg, h->plugin, name, value);
}

void phx__host_init(phx__host *h, const char *plugin, const phx_job *job, phx__memory_book *book) {
  h->plugin = plugin;
  h->book = book;
  h->job = job;
  h->table = (phx_host){.struct_size = sizeof h->table, .abi_major = PHX_ABI_MAJOR, .abi_minor = PHX_ABI_MINOR,
                        .ctx = h, .rank = job->rank, .world_size = job->size, .local_rank = job->local_rank,
                        .local_size = job->local_size, .log = host_log, .alloc = host_alloc, .release = host_release,
                        .extension = host_extension, .metric = host_metric};
}

int64_t phx__host_held(const phx__host *h, char *text, size_t bytes) {
  int64_t kinds[PHX_MEM_KINDS] = {0}, held = 0;
  for (size_t i = 0; i < h->book->n; i++) {
    const phx__allocation *a = &h->book->list[i];
    if (a->owner != h) continue;
    kinds[a->kind] += a->bytes;
    held += a->bytes;
  }
  int used = snprintf(text, bytes, "destroy() left allocated:");
  for (int32_t k = 0; k < PHX_MEM_KINDS && used >= 0 && (size_t)used < bytes; k++)
    if (kinds[k])
      used +=
          snprintf(text + used, bytes - (size_t)used, " %lld bytes of %s", (long long)kinds[k], phx__memory_name(k));
  return held;
}
