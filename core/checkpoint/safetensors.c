/* core/checkpoint/safetensors.c - see safetensors.h: reading.
 *
 * Does not look at the tensors' values.  After a successful open: every tensor lies inside the file, its bytes are its
 * shape's, tensors neither overlap nor leave holes, no name stands twice.  What costs more memory or time than a
 * header is worth is refused before it is done. */
#include "checkpoint/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"

static const struct {
  const char *name;
  int32_t dtype, bytes;
} dtypes[] = {{"F32", PHX_F32, 4}, {"F16", PHX_F16, 2}, {"BF16", PHX_BF16, 2}, {"F64", PHX_F64, 8}, {"I32", PHX_I32, 4},
              {"I64", PHX_I64, 8}, {"U8", PHX_U8, 1},   {"U16", PHX_U16, 2},   {"U32", PHX_U32, 4}, {"U64", PHX_U64, 8},
              {"BOOL", 0, 1},      {"I8", 0, 1},        {"I16", 0, 2},         {"F8_E4M3", 0, 1},   {"F8_E5M2", 0, 1},
              {"C64", 0, 8}};
enum { DTYPES = sizeof dtypes / sizeof dtypes[0] };

const char *phx__dtype_name(int32_t dtype) {
  for (int i = 0; i < DTYPES; i++)
    if (dtype && dtypes[i].dtype == dtype) return dtypes[i].name;
  return NULL;
}

int32_t phx__dtype_of(const char *name) {
  for (int i = 0; i < DTYPES; i++)
    if (!strcmp(dtypes[i].name, name)) return dtypes[i].dtype;
  return 0;
}

/* ---- transfers ---- */
phx_status phx__file_read(int fd, const char *path, void *data, int64_t bytes, int64_t at, phx_error *err) {
  for (char *p = data; bytes > 0;) {
    const ssize_t n = phx__sys.pread(fd, p, bytes > 1 << 30 ? 1u << 30 : (size_t)bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot read %s at byte %lld", path, (long long)at);
    if (n == 0) return phx_fail(err, PHX_IO, "%s ends too early, at byte %lld", path, (long long)at);
    p += n;
    at += n;
    bytes -= n;
  }
  return PHX_OK;
}

phx_status phx__file_write(int fd, const char *path, const void *data, int64_t bytes, int64_t at, phx_error *err) {
  for (const char *p = data; bytes > 0;) {
    const ssize_t n = phx__sys.pwrite(fd, p, bytes > 1 << 30 ? 1u << 30 : (size_t)bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot write %s at byte %lld", path, (long long)at);
    if (n == 0) return phx_fail(err, PHX_IO, "%s takes no more data, at byte %lld", path, (long long)at);
    p += n;
    at += n;
    bytes -= n;
  }
  return PHX_OK;
}

phx_status phx__file_open(const char *path, int *fd, int64_t *bytes, phx_error *err) {
  struct stat st;
  const int f = phx__sys.open(path, O_RDONLY | O_NONBLOCK, 0);
  if (f < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot open %s", path);
  phx_status status = PHX_OK;
  if (phx__sys.fstat(f, &st)) status = phx_fail_errno(err, PHX_IO, errno, "cannot look at %s", path);
  else if (!S_ISREG(st.st_mode)) status = phx_fail(err, PHX_IO, "%s is not a regular file", path);
  if (status) {
    phx__sys.close(f);
    return status;
  }
  *fd = f;
  *bytes = st.st_size;
  return PHX_OK;
}

/* ---- the header ---- */
static phx_status read_shape(const char *path, const cJSON *item, phx__tensor *t, int64_t width, phx_error *err) {
  const cJSON *shape = cJSON_GetObjectItemCaseSensitive(item, "shape"), *dim;
  t->numel = 1;
  if (!cJSON_IsArray(shape)) return phx_fail(err, PHX_IO, "%s: tensor %s has no shape", path, t->name);
  cJSON_ArrayForEach(dim, shape) {
    int64_t size = 0;
    if (t->ndim == PHX__TENSOR_DIMS)
      return phx_fail(err, PHX_IO, "%s: tensor %s has more than %d dimensions", path, t->name, PHX__TENSOR_DIMS);
    if (!phx__json_integer(dim, 0, PHX__JSON_INTEGER_MOST, &size))
      return phx_fail(err, PHX_IO, "%s: tensor %s: dimension %u is not a size", path, t->name, t->ndim);
    t->shape[t->ndim++] = size;
    if (__builtin_mul_overflow(t->numel, size, &t->numel))
      return phx_fail(err, PHX_IO, "%s: tensor %s: its shape overflows", path, t->name);
  }
  if (__builtin_mul_overflow(t->numel, width, &t->bytes))
    return phx_fail(err, PHX_IO, "%s: tensor %s: its shape overflows", path, t->name);
  return PHX_OK;
}

static phx_status read_tensor(phx__safetensors *st, const cJSON *item, int64_t data_bytes, phx_error *err) {
  phx__tensor *t = &st->tensors[st->n];
  int64_t begin, end, width = 0;
  const char *dtype = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "dtype"));
  const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
  const size_t length = strlen(item->string);
  if (length < 1 || length > PHX__SAFETENSORS_NAME_MOST)
    return phx_fail(err, PHX_IO, "%s: a tensor's name has %zu bytes: '%.64s'", st->path, length, item->string);
  t->name = phx__strdup(item->string);
  if (!t->name) return phx_fail(err, PHX_NOMEM, "no memory for the header of %s", st->path);
  st->n++; /* from here on the name is freed by close */
  for (int i = 0; dtype && i < DTYPES; i++)
    if (!strcmp(dtype, dtypes[i].name)) {
      t->dtype_name = dtypes[i].name;
      t->dtype = dtypes[i].dtype;
      width = dtypes[i].bytes;
    }
  if (!cJSON_IsObject(item) || cJSON_GetArraySize(item) != 3)
    return phx_fail(err, PHX_IO, "%s: tensor %s is not {dtype, shape, data_offsets}", st->path, t->name);
  if (!width) return phx_fail(err, PHX_IO, "%s: tensor %s has an unknown dtype '%.20s'", st->path, t->name,
                              dtype ? dtype : "");
  PHX_TRY(read_shape(st->path, item, t, width, err));
  if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
      !phx__json_integer(cJSON_GetArrayItem(offsets, 0), 0, PHX__JSON_INTEGER_MOST, &begin) ||
      !phx__json_integer(cJSON_GetArrayItem(offsets, 1), begin, PHX__JSON_INTEGER_MOST, &end))
    return phx_fail(err, PHX_IO, "%s: tensor %s has no place: data_offsets are wrong", st->path, t->name);
  if (end > data_bytes)
    return phx_fail(err, PHX_IO,
                    "%s: tensor %s lies outside the file: it ends at byte %lld of the data, which has %lld", st->path,
                    t->name, (long long)end, (long long)data_bytes);
  if (end - begin != t->bytes)
    return phx_fail(err, PHX_IO, "%s: tensor %s has %lld bytes, and its shape %lld", st->path, t->name,
                    (long long)(end - begin), (long long)t->bytes);
  t->begin = st->data_at + begin;
  return PHX_OK;
}

static phx_status read_metadata(phx__safetensors *st, const cJSON *object, phx_error *err) {
  const cJSON *item;
  if (!cJSON_IsObject(object)) return phx_fail(err, PHX_IO, "%s: __metadata__ is not an object", st->path);
  st->metadata = phx__calloc((size_t)cJSON_GetArraySize(object), sizeof *st->metadata);
  if (!st->metadata) return phx_fail(err, PHX_NOMEM, "no memory for the header of %s", st->path);
  cJSON_ArrayForEach(item, object) {
    if (!cJSON_IsString(item))
      return phx_fail(err, PHX_IO, "%s: __metadata__: '%.64s' is not a text", st->path, item->string);
    snprintf(st->metadata[st->n_metadata][0], sizeof st->metadata[0][0], "%s", item->string);
    snprintf(st->metadata[st->n_metadata++][1], sizeof st->metadata[0][1], "%s", item->valuestring);
  }
  return PHX_OK;
}

static int by_place(const void *a, const void *b) {
  const phx__tensor *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
  return strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b) {
  return strcmp((*(const phx__tensor *const *)a)->name, (*(const phx__tensor *const *)b)->name);
}

static phx_status check_places(phx__safetensors *st, phx_error *err) {
  int64_t at = st->data_at;
  if (st->n) qsort(st->tensors, st->n, sizeof *st->tensors, by_place);
  for (uint32_t i = 0; i < st->n; i++) {
    const phx__tensor *t = &st->tensors[i];
    if (t->begin != at)
      return phx_fail(err, PHX_IO, "%s: tensor %s begins at byte %lld, %s", st->path, t->name, (long long)t->begin,
                      t->begin < at ? "and overlaps the one before it" : "behind a hole");
    at += t->bytes;
  }
  if (at != st->file_bytes)
    return phx_fail(err, PHX_IO, "%s has %lld bytes behind its last tensor", st->path,
                    (long long)(st->file_bytes - at));
  st->by_name = phx__calloc(st->n, sizeof *st->by_name);
  if (!st->by_name) return phx_fail(err, PHX_NOMEM, "no memory for the header of %s", st->path);
  for (uint32_t i = 0; i < st->n; i++) st->by_name[i] = &st->tensors[i];
  if (st->n) qsort(st->by_name, st->n, sizeof *st->by_name, by_name);
  return PHX_OK;
}

phx_status phx__safetensors_parse(const char *path, const char *text, size_t bytes, int64_t data_bytes,
                                  phx__safetensors **out, phx_error *err) {
  static const phx__json_limits limits = {.depth = 4, .values = 1u << 21};
  phx_status status = PHX_OK;
  cJSON *root = NULL;
  const cJSON *item;
  char what[300];
  phx__safetensors *st = phx__calloc(1, sizeof *st);
  if (!st) return phx_fail(err, PHX_NOMEM, "no memory for the header of %s", path);
  st->fd = -1;
  st->data_at = 8 + (int64_t)bytes;
  st->file_bytes = st->data_at + data_bytes;
  st->path = phx__strdup(path);
  if (!st->path) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  snprintf(what, sizeof what, "%s: the header", path);
  PHX_TRY_GOTO(phx__json_read(what, text, bytes, &limits, &root, err), status, done);
  const int n = cJSON_GetArraySize(root);
  if (n > PHX__SAFETENSORS_TENSORS_MOST) {
    status = phx_fail(err, PHX_IO, "%s has %d tensors; %d are allowed", path, n, PHX__SAFETENSORS_TENSORS_MOST);
    goto done;
  }
  st->tensors = phx__calloc((size_t)n, sizeof *st->tensors);
  if (!st->tensors) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  cJSON_ArrayForEach(item, root) {
    if (!strcmp(item->string, "__metadata__")) PHX_TRY_GOTO(read_metadata(st, item, err), status, done);
    else PHX_TRY_GOTO(read_tensor(st, item, data_bytes, err), status, done);
  }
  PHX_TRY_GOTO(check_places(st, err), status, done);
  *out = st;
done:
  cJSON_Delete(root);
  if (status) phx__safetensors_close(st);
  return status;
}

phx_status phx__safetensors_open(const char *path, phx__safetensors **out, phx_error *err) {
  phx_status status = PHX_OK;
  int fd = -1;
  int64_t file_bytes = 0;
  unsigned char length[8];
  uint64_t bytes = 0;
  char *text = NULL;
  phx__safetensors *st = NULL;
  PHX_TRY_GOTO(phx__file_open(path, &fd, &file_bytes, err), status, done);
  PHX_TRY_GOTO(phx__file_read(fd, path, length, 8, 0, err), status, done);
  for (int i = 7; i >= 0; i--) bytes = bytes << 8 | length[i];
  if (bytes < 2 || bytes > PHX__SAFETENSORS_HEADER_MOST || (int64_t)bytes > file_bytes - 8) {
    status = phx_fail(err, PHX_IO, "%s is not a safetensors file (header of %llu bytes, file of %lld)", path,
                      (unsigned long long)bytes, (long long)file_bytes);
    goto done;
  }
  text = phx__calloc(1, bytes + 1);
  if (!text) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  PHX_TRY_GOTO(phx__file_read(fd, path, text, (int64_t)bytes, 8, err), status, done);
  PHX_TRY_GOTO(phx__safetensors_parse(path, text, bytes, file_bytes - 8 - (int64_t)bytes, &st, err), status, done);
  st->fd = fd;
  fd = -1;
  *out = st;
done:
  phx__free(text);
  if (fd >= 0) phx__sys.close(fd);
  return status;
}

void phx__safetensors_close(phx__safetensors *st) {
  if (!st) return;
  if (st->fd >= 0) phx__sys.close(st->fd);
  for (uint32_t i = 0; i < st->n; i++) phx__free((char *)(uintptr_t)st->tensors[i].name);
  phx__free(st->tensors);
  phx__free(st->metadata);
  phx__free(st->by_name);
  phx__free(st->path);
  phx__free(st);
}

const phx__tensor *phx__safetensors_find(const phx__safetensors *st, const char *name) {
  for (uint32_t lo = 0, hi = st->n; lo < hi;) {
    const uint32_t middle = lo + (hi - lo) / 2;
    const int order = strcmp(name, st->by_name[middle]->name);
    if (!order) return st->by_name[middle];
    if (order < 0) hi = middle;
    else lo = middle + 1;
  }
  return NULL;
}

const char *phx__safetensors_metadata(const phx__safetensors *st, const char *name) {
  for (uint32_t i = 0; i < st->n_metadata; i++)
    if (!strcmp(st->metadata[i][0], name)) return st->metadata[i][1];
  return NULL;
}

phx_status phx__safetensors_read(const phx__safetensors *st, const phx__tensor *tensor, int64_t at, int64_t bytes,
                                 void *out, phx_error *err) {
  if (at < 0 || bytes < 0 || at > tensor->bytes || bytes > tensor->bytes - at)
    return phx_fail(err, PHX_INTERNAL, "%s: tensor %s has no bytes %lld to %lld", st->path, tensor->name,
                    (long long)at, (long long)(at + bytes));
  return phx__file_read(st->fd, st->path, out, bytes, tensor->begin + at, err);
}
