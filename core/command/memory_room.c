/* core/command/memory_room.c - see memory_room.h. */
#include "command/memory_room.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes_text.h"
#include "base/cgroup.h"
#include "base/status.h"
#include "base/sys.h"
#include "engine/prepare.h"
#include "plugin/host.h"

/* ---- what there is ---- */

/* The value of a line of /proc/meminfo in bytes, or 0. */
static int64_t line_of(const char *text, const char *name) {
  int64_t kib = 0;
  const char *at = strstr(text, name);
  return at && sscanf(at + strlen(name), "%" SCNd64, &kib) == 1 ? kib * 1024 : 0;
}

void phx__room_read(const char *root, phx__room *out) {
  char path[4096], text[8192];
  phx__cgroup group;
  *out = (phx__room){0};
  snprintf(path, sizeof path, "%s/proc/meminfo", root);
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  const ssize_t n = fd < 0 ? -1 : phx__sys.read(fd, text, sizeof text - 1);
  if (fd >= 0) phx__sys.close(fd);
  if (n > 0) {
    text[n] = 0;
    out->total = line_of(text, "MemTotal:");
    out->available = line_of(text, "MemAvailable:");
    if (out->available) out->available += line_of(text, "SwapFree:");
    else out->total = 0; /* a kernel that does not say */
  }
  phx__cgroup_read(root, &group);
  if (group.memory == 0 || (out->total && group.memory_free >= out->available)) return;
  *out = (phx__room){.total = group.memory, .available = group.memory_free, .of_cgroup = true};
}

/* ---- what is asked for ---- */
static bool compares(const phx__config *config) {
  return (config->device.plugin->descriptor->provides & PHX_CAP_HOST_MEMORY) != 0;
}

static int64_t bytes_of(const phx__prepared *p) {
  int64_t sum = 0;
  for (int k = 0; k < PHX_MEM_KINDS; k++)
    if (__builtin_add_overflow(sum, p->planned[k], &sum)) return INT64_MAX;
  return sum;
}

/* What a rank's process takes that is in no plan: itself, its libraries, the device's scratch. */
#define PROCESS_BYTES (INT64_C(32) << 20)

/* All ranks together. */
static phx_status needed(const phx__config *config, int64_t *out, phx_error *err) {
  const int32_t size = (int32_t)config->s.run.ranks;
  *out = 0;
  for (int32_t rank = 0; rank < size; rank++) {
    phx__prepared *p = NULL;
    PHX_TRY(phx__prepare(config, rank, size, rank, size, 0, 0, &p, err));
    if (__builtin_add_overflow(*out, bytes_of(p), out) || __builtin_add_overflow(*out, PROCESS_BYTES, out))
      *out = INT64_MAX;
    phx__prepared_free(p);
  }
  return PHX_OK;
}

/* ---- what would fit ---- */
typedef struct change {
  int64_t micro, ranks, accumulate;
  bool no_background;
} change;

static phx_status needed_with(const phx__config *config, const change *c, int64_t *out) {
  phx__config next = *config; /* a copy of the values; the rest stays the caller's */
  phx_error why = PHX_ERROR_INIT;
  next.s.batch.micro = c->micro;
  next.s.batch.accumulate = c->accumulate;
  next.s.run.ranks = c->ranks;
  if (c->no_background) next.s.checkpoint.background = false;
  return needed(&next, out, &why);
}

/* The largest micro-batch, then number of ranks, that fits; *bytes is what it takes.  The step's sequences stay as
 * many: accumulate takes up what is given away. */
static bool find_batch(const phx__config *config, int64_t ranks, bool no_background, int64_t available, change *out,
                       int64_t *bytes) {
  enum { ACCUMULATE_MOST = 1 << 20 };
  const int64_t micro = config->s.batch.micro, all = config->s.run.ranks * config->s.batch.accumulate;
  if (all % ranks) return false;
  *out = (change){1, ranks, all / ranks * micro, no_background};
  if (out->accumulate <= ACCUMULATE_MOST && (needed_with(config, out, bytes) || *bytes > available)) return false;
  for (int64_t parts = 1; parts <= micro; parts++) {
    if (micro % parts || all / ranks > ACCUMULATE_MOST / parts) continue;
    *out = (change){micro / parts, ranks, all / ranks * parts, no_background};
    if (needed_with(config, out, bytes)) return false; /* this strategy, or the data, cannot */
    if (*bytes <= available) return true;
  }
  return false;
}

static bool find_change(const phx__config *config, int64_t available, change *out, int64_t *bytes) {
  const int first = config->s.checkpoint.background && config->s.checkpoint.every > 0 ? 0 : 1;
  const int64_t ranks = config->s.run.ranks;
  if (!first) {
    *out = (change){config->s.batch.micro, ranks, config->s.batch.accumulate, true};
    if (!needed_with(config, out, bytes) && *bytes <= available) return true;
  }
  for (int64_t fewer = ranks; fewer >= 1; fewer--)
    for (int background = 0; background <= !first; background++)
      if (find_batch(config, fewer, background, available, out, bytes)) return true;
  return false;
}

static void describe(const phx__config *config, const change *c, char *out, size_t bytes) {
  int n = 0;
  if (c->ranks != config->s.run.ranks) n = snprintf(out, bytes, "run.ranks = %" PRId64 ", ", c->ranks);
  if (c->micro != config->s.batch.micro)
    n += snprintf(out + n, bytes - (size_t)n, "batch.micro = %" PRId64 ", ", c->micro);
  if (c->accumulate != config->s.batch.accumulate)
    n += snprintf(out + n, bytes - (size_t)n, "batch.accumulate = %" PRId64 ", ", c->accumulate);
  if (c->no_background) n += snprintf(out + n, bytes - (size_t)n, "checkpoint.background = no, ");
  out[n - 2] = 0; /* the last comma: there is a change, or the plan had fitted */
}

static void advise(const phx__config *config, int64_t available, char *out, size_t bytes) {
  char text[200], size[24];
  change c;
  int64_t least = 0;
  if (find_change(config, available, &c, &least)) {
    describe(config, &c, text, sizeof text);
    phx__bytes_text(least, size);
    snprintf(out, bytes, "%s takes %s, for the same sequences in a step", text, size);
  } else {
    snprintf(out, bytes, "no smaller micro-batch and no fewer ranks fit: take a smaller model, a shorter "
                         "batch.sequence, or a strategy that shards, on more machines");
  }
}

/* ---- together ---- */
static void say_room(const phx__room *room, char *out, size_t bytes) {
  char total[24], available[24];
  phx__bytes_text(room->total, total);
  phx__bytes_text(room->available, available);
  snprintf(out, bytes, "%s of the %s that %s are available", available, total,
           room->of_cgroup ? "the cgroup allows" : "this machine has");
}

static phx_status refuse(const phx__config *config, int64_t bytes, const phx__room *room, int32_t ranks,
                         const char *advice, phx_error *err) {
  char size[24], there[120], text[600];
  phx__bytes_text(bytes, size);
  say_room(room, there, sizeof there);
  snprintf(text, sizeof text, "%d rank%s take%s %s (the plan, and 32 MiB for each process), and %s%s%s", ranks,
           ranks == 1 ? "" : "s", ranks == 1 ? "s" : "", size, there, *advice ? "; " : "", advice);
  if (!config->s.run.overcommit)
    return phx_fail(err, PHX_INVALID, "%s (run.overcommit = yes starts it all the same)", text);
  phx__log(0, "core", PHX_LOG_WARN, text);
  return PHX_OK;
}

phx_status phx__room_check(const phx__config *config, const phx__room *room, phx_error *err) {
  char advice[400];
  int64_t bytes = 0;
  if (!compares(config) || room->total == 0) return PHX_OK;
  const phx_status status = needed(config, &bytes, err);
  if (status || bytes <= room->available) return status;
  advise(config, room->available, advice, sizeof advice);
  return refuse(config, bytes, room, (int32_t)config->s.run.ranks, advice, err);
}

phx_status phx__room_check_rank(const phx__prepared *mine, const phx__room *room, int32_t local_ranks, phx_error *err) {
  int64_t bytes = 0;
  if (!compares(mine->config) || room->total == 0) return PHX_OK;
  if (__builtin_add_overflow(bytes_of(mine), PROCESS_BYTES, &bytes) ||
      __builtin_mul_overflow(bytes, (int64_t)local_ranks, &bytes))
    bytes = INT64_MAX;
  return bytes <= room->available ? PHX_OK : refuse(mine->config, bytes, room, local_ranks, "", err);
}

phx_status phx__room_say(const phx__config *config, const phx__room *room, char *out, size_t bytes, phx_error *err) {
  char size[24], there[120];
  int64_t all = 0;
  *out = 0;
  if (!compares(config) || room->total == 0) return PHX_OK;
  PHX_TRY(needed(config, &all, err));
  phx__bytes_text(all, size);
  say_room(room, there, sizeof there);
  snprintf(out, bytes, "%" PRId64 " rank%s: %s, with 32 MiB for each process; %s: %s", config->s.run.ranks,
           config->s.run.ranks == 1 ? "" : "s", size, there, all <= room->available ? "it fits" : "it does not fit");
  return PHX_OK;
}
