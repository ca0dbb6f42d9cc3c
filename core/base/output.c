/* core/base/output.c - see output.h.  Invariant: the final name never holds a part of a file. */
#include "base/output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "base/clean.h"
#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"

static phx_status write_all(int fd, const char *text, size_t bytes, const char *path, phx_error *err) {
  while (bytes > 0) {
    const ssize_t n = phx__sys.write(fd, text, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return phx_fail_errno(err, PHX_IO, n < 0 ? errno : ENOSPC, "cannot write %s", path);
    text += n;
    bytes -= (size_t)n;
  }
  return PHX_OK;
}

phx_status phx__text_write(const char *path, const char *text, phx_error *err) {
  char part[4400];
  if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part)
    return phx_fail(err, PHX_INVALID, "%s is too long for a path", path);
  const int fd = phx__sys.open(part, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot create %s", part);
  phx_status status = write_all(fd, text, strlen(text), path, err);
  if (!status && phx__sys.fsync(fd)) status = phx_fail_errno(err, PHX_IO, errno, "cannot write %s", path);
  if (phx__sys.close(fd) && !status) status = phx_fail_errno(err, PHX_IO, errno, "cannot write %s", path);
  if (!status && phx__sys.rename(part, path))
    status = phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", part, path);
  if (status) phx__sys.unlink(part);
  return status;
}

/* ---- text in memory ---- */
static ssize_t keep_bytes(void *cookie, const char *bytes, size_t n) {
  phx__text *t = cookie;
  phx__text_bytes(t, bytes, n);
  if (!t->failed) return (ssize_t)n;
  errno = ENOMEM;
  return 0;
}

FILE *phx__text_stream(phx__text *t) {
  *t = (phx__text){.bytes = 0};
  return fopencookie(t, "w", (cookie_io_functions_t){.write = keep_bytes});
}

char *phx__file_text(const char *path) {
  enum { PIECE = 1 << 16 };
  phx__text t = {.bytes = 0};
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  if (fd < 0) return NULL;
  char *piece = phx__calloc(1, PIECE);
  ssize_t n = piece ? 1 : -1;
  int cause = ENOMEM;
  while (n > 0) {
    n = phx__sys.read(fd, piece, PIECE);
    cause = errno;
    if (n >= 0) phx__text_bytes(&t, piece, (size_t)n);
    else if (cause == EINTR) n = 1;
  }
  phx__sys.close(fd);
  phx__free(piece);
  if (n == 0 && !t.failed) return t.data;
  phx__free(t.data);
  errno = t.failed ? ENOMEM : cause;
  return NULL;
}

/* ---- JSON ---- */
/* The longest that one character becomes is \u001f. */
size_t phx__json_quote(const char *text, char *out, size_t room) {
  char clean[256];
  const size_t n = strlen(text);
  size_t used = 0;
  if (n >= sizeof clean || room < 3) return 0;
  memcpy(clean, text, n + 1);
  phx__clean(clean, n);
  out[used++] = '"';
  for (size_t i = 0; i < n; i++) {
    if (room - used < 8) return 0;
    const unsigned char c = (unsigned char)text[i];
    if (c < ' ') {
      used += (size_t)snprintf(out + used, 8, "\\u%04x", c);
      continue;
    }
    if (c == '"' || c == '\\') out[used++] = '\\';
    out[used++] = clean[i];
  }
  out[used++] = '"';
  out[used] = 0;
  return used;
}

static bool lost;

static void *json_alloc(size_t bytes) {
  void *p = phx__calloc(1, bytes);
  if (!p) lost = true;
  return p;
}

void phx__json_begin(void) {
  cJSON_Hooks hooks = {json_alloc, phx__free};
  cJSON_InitHooks(&hooks);
  lost = false;
}

bool phx__json_lost(void) { return lost; }

void phx__json_append(cJSON *array, cJSON *item) {
  if (!cJSON_AddItemToArray(array, item)) cJSON_Delete(item);
}

phx_status phx__json_write(const char *path, const cJSON *root, phx_error *err) {
  char *text = cJSON_Print(root);
  const size_t bytes = text ? strlen(text) : 0;
  char *line = text && !lost ? phx__calloc(1, bytes + 2) : NULL;
  phx_status status = PHX_OK;
  if (!line) {
    status = phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
  } else {
    memcpy(line, text, bytes);
    line[bytes] = '\n';
    status = phx__text_write(path, line, err);
  }
  phx__free(line);
  cJSON_free(text);
  return status;
}
