/* core/command/metrics.c - see metrics.h.
 *
 * What it does not do: make the lines (progress.c), or flush them to the disk.
 * Invariant: bytes reach the file in the order of the lines, each once; what a failed or short write left over stands
 * first in `waiting`.  A line is lost whole or not at all, and what is lost is said.  Threads: [main]. */
#include "command/metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "plugin/host.h"

/* ---- where the file is cut ---- */
enum { READ_BYTES = 1 << 16 };

typedef struct scan {
  int64_t last;                 /* lines of later steps go */
  off_t at, line;               /* bytes seen; where the line begins */
  char text[PHX__METRICS_LINE]; /* of the line so far */
  size_t n;
  phx__metrics_told told;
} scan;

/* {"step":N,...  or, of what came behind a step, {"after_step":N,... */
static int64_t step_of(const char *line) {
  static const char *const names[] = {"{\"step\":", "{\"after_step\":"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!strncmp(line, names[i], strlen(names[i]))) return strtoll(line + strlen(names[i]), NULL, 10);
  return 0;
}

/* Plugins' names have the plugin's before them: none is one of these. */
static void note_told(phx__metrics_told *told, const char *line) {
  told->step = true;
  told->valid_loss = told->valid_loss || strstr(line, ",\"valid_loss\":");
  told->state_hash = told->state_hash || strstr(line, ",\"state_hash\":");
}

/* True when the line of a later step has ended: its beginning is where the file is cut. */
static bool scan_bytes(scan *s, const char *bytes, size_t n) {
  for (size_t i = 0; i < n; i++) {
    s->at++;
    if (bytes[i] != '\n') {
      if (s->n < sizeof s->text - 1) s->text[s->n++] = bytes[i];
      continue;
    }
    s->text[s->n] = 0;
    const int64_t step = step_of(s->text);
    if (step > s->last) return true;
    if (step == s->last) note_told(&s->told, s->text);
    s->line = s->at;
    s->n = 0;
  }
  return false;
}

/* At its end, a line without an end is cut as well: the one before it is the last. */
static phx_status cut(int fd, const char *path, int64_t last, phx__metrics_told *told, phx_error *err) {
  scan s = {.last = last};
  char *buffer = phx__calloc(1, READ_BYTES);
  ssize_t n = 1;
  if (!buffer) return phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  for (bool found = false; n > 0 && !found;) {
    n = phx__sys.read(fd, buffer, READ_BYTES);
    if (n < 0 && errno == EINTR) n = 1;
    else if (n > 0) found = scan_bytes(&s, buffer, (size_t)n);
  }
  phx__free(buffer);
  *told = s.told;
  if (n < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot read %s", path);
  if (s.at == s.line || !phx__sys.ftruncate(fd, s.line)) return PHX_OK;
  return phx_fail_errno(err, PHX_IO, errno, "cannot cut %s to the lines up to step %" PRId64, path, last);
}

/* ---- writing ---- */
/* As far as it goes; returns how many bytes are in the file. */
static size_t put(phx__metrics *m, const char *bytes, size_t n) {
  size_t done = 0;
  while (done < n) {
    const ssize_t wrote = phx__sys.write(m->fd, bytes + done, n - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote == 0) errno = ENOSPC;
    if (wrote <= 0) break;
    done += (size_t)wrote;
  }
  return done;
}

static void say(int32_t level, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(int32_t level, const char *format, ...) {
  char text[600];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  phx__log(0, "core", level, text);
}

static void say_failing(phx__metrics *m, int cause) {
  m->cause = cause;
  if (!m->failing)
    say(PHX_LOG_WARN, "%.300s cannot be written: %s; its lines wait in memory, %d MiB at most, until they can", m->path,
        strerror(cause), PHX__METRICS_WAITING >> 20);
  m->failing = true;
}

static void say_caught_up(phx__metrics *m) {
  if (m->failing && m->lost)
    say(PHX_LOG_WARN, "%.300s is written again; %" PRId64 " lines from step %" PRId64 " on are lost", m->path, m->lost,
        m->first);
  else if (m->failing)
    say(PHX_LOG_INFO, "%.300s is written again, and nothing is missing", m->path);
  m->failing = false;
}

/* Writes what waits; true when nothing does any more. */
static bool catch_up(phx__metrics *m) {
  if (m->used == 0) return true;
  const size_t done = put(m, m->waiting, m->used);
  const int cause = errno;
  memmove(m->waiting, m->waiting + done, m->used - done);
  m->used -= done;
  if (m->used > 0) say_failing(m, cause);
  return m->used == 0;
}

/* The rest of a line that has begun always has room: what is lost is whole lines. */
static void keep(phx__metrics *m, const char *line, size_t bytes, bool begun, int64_t step) {
  const size_t room = PHX__METRICS_WAITING + (begun ? PHX__METRICS_LINE : 0);
  if (m->used + bytes <= room) {
    memcpy(m->waiting + m->used, line, bytes);
    m->used += bytes;
    return;
  }
  if (m->lost++ == 0) m->first = step;
}

phx_status phx__metrics_open(phx__metrics *m, const char *path, int64_t last, phx_error *err) {
  *m = (phx__metrics){.fd = -1};
  if (snprintf(m->path, sizeof m->path, "%s", path) >= (int)sizeof m->path)
    return phx_fail(err, PHX_INVALID, "%.200s...: the path is too long", path);
  m->waiting = phx__calloc(1, PHX__METRICS_WAITING + PHX__METRICS_LINE);
  if (!m->waiting) return phx_fail(err, PHX_NOMEM, "no memory for the lines of %s", path);
  const int how = last > 0 ? O_RDWR : O_WRONLY | O_TRUNC;
  m->fd = phx__sys.open(path, how | O_CREAT | O_APPEND, 0644);
  phx_status status = PHX_OK;
  if (m->fd < 0) status = phx_fail_errno(err, PHX_IO, errno, "cannot write %s", path);
  if (!status && last > 0) status = cut(m->fd, path, last, &m->told, err);
  if (status) phx__metrics_close(m);
  return status;
}

void phx__metrics_line(phx__metrics *m, const char *line, size_t bytes, int64_t step) {
  if (!catch_up(m)) {
    keep(m, line, bytes, false, step);
    return;
  }
  const size_t done = put(m, line, bytes);
  if (done == bytes) {
    say_caught_up(m);
    return;
  }
  say_failing(m, errno);
  keep(m, line + done, bytes - done, done > 0, step);
}

phx_status phx__metrics_flush(phx__metrics *m, phx_error *err) {
  if (m->used > 0 && catch_up(m)) say_caught_up(m);
  const size_t waiting = m->used;
  const int64_t lost = m->lost;
  m->used = 0;
  m->lost = 0;
  if (waiting > 0)
    return phx_fail_errno(err, PHX_IO, m->cause, "%.300s cannot be written: its last lines (%zu bytes) are missing",
                          m->path, waiting);
  if (lost > 0)
    return phx_fail(err, PHX_IO, "%.300s lacks %" PRId64 " lines from step %" PRId64 " on: it could not be written",
                    m->path, lost, m->first);
  return PHX_OK;
}

void phx__metrics_close(phx__metrics *m) {
  if (m->path[0] && m->fd >= 0) phx__sys.close(m->fd);
  phx__free(m->waiting);
  *m = (phx__metrics){.fd = -1};
}
