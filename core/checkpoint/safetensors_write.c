/* core/checkpoint/safetensors_write.c - see safetensors.h: writing, and checksums on the way.
 *
 * No tensor is ever held: every part goes to its place in the file when it comes, through the few MiB of a stream. 
 * The sum of a chunk is of the bytes that were given, so that damage on the way to the disk is found; only a chunk
 * whose parts came out of order is read back. */
#include "checkpoint/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"

/* ---- the header ---- */
static phx_status place(const char *path, phx__tensor *t, int64_t *at, phx_error *err) {
  const size_t width = phx_dtype_bytes(t->dtype);
  const size_t length = t->name ? strlen(t->name) : 0;
  if (length < 1 || length > PHX__SAFETENSORS_NAME_MOST || !strcmp(t->name, "__metadata__") || !width ||
      t->ndim > PHX__TENSOR_DIMS)
    return phx_fail(err, PHX_INVALID, "%s: tensor '%.64s' cannot be written: its name has %zu bytes, dtype %d, %u "
                    "dimensions", path, t->name ? t->name : "", length, t->dtype, t->ndim);
  int64_t numel = 1, bytes = 0, end = 0;
  for (uint32_t d = 0; d < t->ndim; d++)
    if (t->shape[d] < 0 || __builtin_mul_overflow(numel, t->shape[d], &numel))
      return phx_fail(err, PHX_INVALID, "%s: tensor %s: its shape overflows", path, t->name);
  if (__builtin_mul_overflow(numel, (int64_t)width, &bytes) || __builtin_add_overflow(*at, bytes, &end) ||
      end > PHX__JSON_INTEGER_MOST)
    return phx_fail(err, PHX_INVALID, "%s: tensor %s is too large", path, t->name);
  t->dtype_name = phx__dtype_name(t->dtype);
  t->numel = numel;
  t->bytes = bytes;
  t->begin = *at;
  *at = end;
  return PHX_OK;
}

phx_status phx__safetensors_layout(const char *path, phx__tensor *tensors, uint32_t n, const char *const *metadata,
                                   char **head, int64_t *head_bytes, int64_t *file_bytes, phx_error *err) {
  phx_status status = PHX_OK;
  phx__text text = {0};
  int64_t data = 0;
  phx__text_bytes(&text, "\0\0\0\0\0\0\0\0{", 9);
  if (metadata && metadata[0]) {
    phx__text_add(&text, "\"__metadata__\":{");
    for (size_t i = 0; metadata[i] && metadata[i + 1]; i += 2) {
      if (i) phx__text_add(&text, ",");
      phx__text_json(&text, metadata[i]);
      phx__text_add(&text, ":");
      phx__text_json(&text, metadata[i + 1]);
    }
    phx__text_add(&text, n ? "}," : "}");
  }
  for (uint32_t i = 0; i < n; i++) {
    phx__tensor *t = &tensors[i];
    PHX_TRY_GOTO(place(path, t, &data, err), status, done);
    phx__text_add(&text, i ? "," : "");
    phx__text_json(&text, t->name);
    phx__text_add(&text, ":{\"dtype\":\"%s\",\"shape\":[", t->dtype_name);
    for (uint32_t d = 0; d < t->ndim; d++) phx__text_add(&text, d ? ",%lld" : "%lld", (long long)t->shape[d]);
    phx__text_add(&text, "],\"data_offsets\":[%lld,%lld]}", (long long)t->begin, (long long)(t->begin + t->bytes));
  }
  phx__text_add(&text, "}");
  while (!text.failed && text.bytes % PHX__SAFETENSORS_ALIGN) phx__text_bytes(&text, " ", 1);
  if (text.failed) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  if (text.bytes - 8 > PHX__SAFETENSORS_HEADER_MOST || n > PHX__SAFETENSORS_TENSORS_MOST) {
    status = phx_fail(err, PHX_INVALID, "%s: %u tensors need a header of %zu bytes; %d and %d are the most", path, n,
                      text.bytes, PHX__SAFETENSORS_TENSORS_MOST, PHX__SAFETENSORS_HEADER_MOST);
    goto done;
  }
  for (int i = 0; i < 8; i++) text.data[i] = (char)((text.bytes - 8) >> (8 * i));
  for (uint32_t i = 0; i < n; i++) tensors[i].begin += (int64_t)text.bytes;
  *head_bytes = (int64_t)text.bytes;
  *file_bytes = (int64_t)text.bytes + data;
  *head = text.data;
done:
  if (status) phx__free(text.data);
  return status;
}

/* ---- checksums ---- */
typedef struct chunk {
  int64_t given;       /* bytes so far */
  XXH3_state_t *state; /* while its bytes come in order */
  uint64_t sum;
  bool scattered;
} chunk;

struct phx__chunks {
  char *path;
  int64_t file_bytes, n;
  chunk list[];
};

int64_t phx__chunks_count(int64_t file_bytes) { return (file_bytes + PHX__CHUNK_BYTES - 1) / PHX__CHUNK_BYTES; }

uint64_t phx__chunk_sum(const void *data, size_t bytes) { return XXH3_64bits(data, bytes); }

static int64_t chunk_bytes(int64_t file_bytes, int64_t i) {
  const int64_t left = file_bytes - i * PHX__CHUNK_BYTES;
  return left < PHX__CHUNK_BYTES ? left : PHX__CHUNK_BYTES;
}

phx_status phx__chunks_create(const char *path, int64_t file_bytes, phx__chunks **out, phx_error *err) {
  const int64_t n = phx__chunks_count(file_bytes);
  phx__chunks *c = phx__calloc(1, sizeof *c + (size_t)n * sizeof *c->list);
  char *copy = phx__strdup(path);
  if (!c || !copy) {
    phx__free(c);
    phx__free(copy);
    return phx_fail(err, PHX_NOMEM, "no memory for the checksums of %s", path);
  }
  c->path = copy;
  c->file_bytes = file_bytes;
  c->n = n;
  *out = c;
  return PHX_OK;
}

static void scatter(chunk *k) {
  k->scattered = true;
  XXH3_freeState(k->state);
  k->state = NULL;
}

static void add_part(chunk *k, int64_t whole, const void *data, int64_t bytes, int64_t at) {
  if (k->scattered || at != k->given) {
    scatter(k);
  } else if (bytes == whole) {
    k->sum = XXH3_64bits(data, (size_t)bytes);
  } else {
    if (!k->state && (k->state = XXH3_createState())) XXH3_64bits_reset(k->state);
    if (!k->state) {
      scatter(k); /* no memory: read back at the end */
    } else {
      XXH3_64bits_update(k->state, data, (size_t)bytes);
      if (at + bytes == whole) {
        k->sum = XXH3_64bits_digest(k->state);
        XXH3_freeState(k->state);
        k->state = NULL;
      }
    }
  }
  k->given += bytes;
}

void phx__chunks_add(phx__chunks *c, const void *data, int64_t bytes, int64_t at) {
  for (const char *p = data; bytes > 0;) {
    const int64_t i = at / PHX__CHUNK_BYTES, inside = at % PHX__CHUNK_BYTES;
    if (i >= c->n) return;
    const int64_t part = bytes < PHX__CHUNK_BYTES - inside ? bytes : PHX__CHUNK_BYTES - inside;
    add_part(&c->list[i], chunk_bytes(c->file_bytes, i), p, part, inside);
    p += part;
    at += part;
    bytes -= part;
  }
}

phx_status phx__chunks_finish(phx__chunks *c, int fd, uint64_t *sums, phx_error *err) {
  phx_status status = PHX_OK;
  unsigned char *buffer = NULL;
  for (int64_t i = 0; i < c->n; i++) {
    const int64_t whole = chunk_bytes(c->file_bytes, i);
    if (c->list[i].given != whole) {
      status = phx_fail(err, PHX_INTERNAL, "%s: %lld of %lld bytes of MiB %lld were written", c->path,
                        (long long)c->list[i].given, (long long)whole, (long long)i);
      goto done;
    }
    if (c->list[i].scattered) {
      if (!buffer) buffer = phx__calloc(1, PHX__CHUNK_BYTES);
      if (!buffer) {
        status = phx_fail(err, PHX_NOMEM, "no memory for the checksums of %s", c->path);
        goto done;
      }
      PHX_TRY_GOTO(phx__file_read(fd, c->path, buffer, whole, i * PHX__CHUNK_BYTES, err), status, done);
      c->list[i].sum = XXH3_64bits(buffer, (size_t)whole);
    }
    sums[i] = c->list[i].sum;
  }
done:
  phx__free(buffer);
  return status;
}

void phx__chunks_destroy(phx__chunks *c) {
  if (!c) return;
  for (int64_t i = 0; i < c->n; i++) XXH3_freeState(c->list[i].state);
  phx__free(c->path);
  phx__free(c);
}

/* ---- the file ---- */
static phx_status create_file(phx__safetensors_writer *w, const char *head, int64_t head_bytes, phx_error *err) {
  w->file.fd = phx__sys.open(w->file.path, O_RDWR | O_CREAT | O_TRUNC, 0644);
  if (w->file.fd < 0 || phx__sys.ftruncate(w->file.fd, w->file.bytes))
    return phx_fail_errno(err, PHX_IO, errno, "cannot create %s", w->file.path);
  phx__stream_direct(&w->file);
  phx_status status = phx__stream_create(w->file.bytes, 1, &w->stream, err);
  return status ? status : phx__stream_write(w->stream, &w->file, head, head_bytes, 0, err);
}

phx_status phx__safetensors_create(const char *path, const phx__tensor *tensors, uint32_t n,
                                   const char *const *metadata, bool sums, phx__safetensors_writer **out,
                                   phx_error *err) {
  phx_status status = PHX_OK;
  char *head = NULL;
  int64_t head_bytes = 0;
  phx__safetensors_writer *w = phx__calloc(1, sizeof *w);
  if (!w) return phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
  w->file.fd = -1;
  w->n = n;
  w->file.path = phx__strdup(path);
  w->tensors = phx__calloc(n, sizeof *tensors);
  if (!w->file.path || !w->tensors) {
    status = phx_fail(err, PHX_NOMEM, "no memory to write %s", path);
    goto done;
  }
  if (n) memcpy(w->tensors, tensors, n * sizeof *tensors);
  PHX_TRY_GOTO(phx__safetensors_layout(path, w->tensors, n, metadata, &head, &head_bytes, &w->file.bytes, err), status,
               done);
  if (sums) PHX_TRY_GOTO(phx__chunks_create(path, w->file.bytes, &w->chunks, err), status, done);
  PHX_TRY_GOTO(create_file(w, head, head_bytes, err), status, done);
  if (sums) phx__chunks_add(w->chunks, head, head_bytes, 0);
  *out = w;
done:
  phx__free(head);
  if (status) phx__safetensors_writer_close(w);
  return status;
}

phx_status phx__safetensors_write(phx__safetensors_writer *w, uint32_t tensor, int64_t at, int64_t bytes,
                                  const void *data, phx_error *err) {
  const phx__tensor *t = &w->tensors[tensor];
  if (tensor >= w->n || at < 0 || bytes < 0 || at > t->bytes || bytes > t->bytes - at || !w->stream)
    return phx_fail(err, PHX_INTERNAL, "%s: tensor %u has no bytes %lld to %lld", w->file.path, tensor, (long long)at,
                    (long long)(at + bytes));
  phx_status status = phx__stream_write(w->stream, &w->file, data, bytes, t->begin + at, err);
  if (!status && w->chunks) phx__chunks_add(w->chunks, data, bytes, t->begin + at);
  return status;
}

phx_status phx__safetensors_finish(phx__safetensors_writer *w, uint64_t *out_sums, phx_error *err) {
  phx_status status = phx__stream_drain(w->stream, &w->file, err);
  phx__stream_destroy(w->stream);
  w->stream = NULL;
  if (!status && w->chunks && out_sums) status = phx__chunks_finish(w->chunks, w->file.fd, out_sums, err);
  if (!status && phx__sys.fsync(w->file.fd))
    status = phx_fail_errno(err, PHX_IO, errno, "cannot flush %s", w->file.path);
  return status;
}

void phx__safetensors_writer_close(phx__safetensors_writer *w) {
  if (!w) return;
  phx__stream_destroy(w->stream);
  if (w->file.fd >= 0) phx__sys.close(w->file.fd);
  phx__chunks_destroy(w->chunks);
  phx__free(w->tensors);
  phx__free(w->file.path);
  phx__free(w);
}
