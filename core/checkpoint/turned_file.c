/* core/checkpoint/turned_file.c - see turned_file.h. */
#include "checkpoint/turned_file.h"

#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/safetensors.h"

enum { ROOM = 2 << 20 /* elements: 8 MiB */ };

phx_status phx__turned_open(phx__turned_file *t, int fd, const char *path, phx_error *err) {
  *t = (phx__turned_file){.fd = fd, .path = path};
  t->band = phx__calloc(ROOM, sizeof *t->band);
  t->line = phx__calloc(ROOM, sizeof *t->line);
  if (t->band && t->line) return PHX_OK;
  phx__turned_close(t);
  return phx_fail(err, PHX_NOMEM, "no memory to turn the matrices of %s", path);
}

void phx__turned_close(phx__turned_file *t) {
  phx__free(t->band);
  phx__free(t->line);
  t->band = t->line = NULL;
}

/* Of column c: the rows whose element is kept. */
static phx_status write_column(const phx__turned_file *t, int64_t c, phx_error *err) {
  const int64_t first_row = t->first / t->columns, end = t->first + t->n;
  const int64_t from = c >= t->first % t->columns ? first_row : first_row + 1;
  const int64_t last_row = (end - 1) / t->columns;
  const int64_t to = c <= (end - 1) % t->columns ? last_row + 1 : last_row;
  if (from >= to) return PHX_OK;
  for (int64_t r = from; r < to; r++) t->line[r - from] = t->band[r * t->columns + c - t->first];
  return phx__file_write(t->fd, t->path, t->line, (to - from) * 4, t->place + (c * t->rows + from) * 4, err);
}

phx_status phx__turned_flush(phx__turned_file *t, phx_error *err) {
  phx_status status = PHX_OK;
  for (int64_t c = 0; t->n > 0 && c < t->columns && !status; c++) status = write_column(t, c, err);
  t->n = 0;
  return status;
}

phx_status phx__turned_write(phx__turned_file *t, const int64_t shape[2], int64_t place, int64_t first, int64_t n,
                             const float *data, phx_error *err) {
  phx_status status = PHX_OK;
  if (place != t->place || first != t->first + t->n) status = phx__turned_flush(t, err);
  while (n > 0 && !status) {
    if (!t->n) {
      t->rows = shape[0];
      t->columns = shape[1];
      t->place = place;
      t->first = first;
    }
    const int64_t part = n < ROOM - t->n ? n : ROOM - t->n;
    memcpy(t->band + t->n, data, (size_t)part * sizeof *data);
    t->n += part;
    data += part;
    first += part;
    n -= part;
    if (t->n == ROOM) status = phx__turned_flush(t, err);
  }
  return status;
}
