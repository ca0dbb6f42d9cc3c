/* core/checkpoint/checked_file.c - see manifest.h: verified reading of a checkpoint's files.
 *
 * The bytes that are handed out are the very bytes that were hashed: they are copied out of the stream's buffer after
 * it was, or lie in the caller's memory, which nobody changes meanwhile.  After a failure nothing writes there.
 * One thread per reader. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/manifest.h"
#include "checkpoint/manifest_inner.h"

/* So many ranges of one file without a gap, and no other file between them: then more is read ahead than was asked for.
 * Ranges of another layout are rarely so many in a row, and what is read in vain is whole chunks. */
enum { IN_ORDER = 3 };

phx_status phx__checked_open(const char *dir, const phx__manifest_file *entry, phx__stream *stream,
                             phx__checked_file *out, phx_error *err) {
  char path[4200];
  int64_t bytes = 0;
  phx__checked_file f = {.at = {.fd = -1}, .stream = stream, .entry = entry, .next = -1, .until = -1};
  snprintf(path, sizeof path, "%s/%s", dir, entry->name);
  phx_status status = phx__file_open(path, &f.at.fd, &bytes, err);
  if (status) return status;
  f.at.path = phx__strdup(path);
  f.at.bytes = bytes;
  if (!f.at.path) status = phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  else if (bytes != entry->bytes)
    status = phx_fail(err, PHX_IO, "%s is damaged: it has %" PRId64 " bytes, and its checkpoint says %" PRId64, path,
                      bytes, entry->bytes);
  if (status) {
    phx__checked_close(&f);
    return status;
  }
  *out = f;
  phx__stream_direct(&out->at);
  return PHX_OK;
}

void phx__checked_close(phx__checked_file *f) {
  if (f->entry) { /* of zeros: nothing was opened */
    phx__stream_forget(f->stream, &f->at);
    phx__sys.close(f->at.fd);
  }
  phx__free(f->at.path);
  *f = (phx__checked_file){.at = {.fd = -1}};
}

/* The chunk, verified when it came; `until`: byte behind what is wanted next. */
static phx_status load_chunk(phx__checked_file *f, const char *what, int64_t chunk, int64_t until,
                             const unsigned char **out, phx_error *err) {
  phx__stream_data data;
  const int64_t at = chunk * PHX__CHUNK_BYTES, left = f->entry->bytes - at;
  const int64_t bytes = left < PHX__CHUNK_BYTES ? left : PHX__CHUNK_BYTES;
  const int64_t last = f->in_order >= IN_ORDER ? INT64_MAX : (until - 1) / PHX__CHUNK_BYTES;
  PHX_TRY(phx__stream_chunk(f->stream, &f->at, chunk, last, &data, err));
  *out = data.bytes;
  if (data.sum == f->entry->chunks[chunk]) return PHX_OK;
  return phx_fail(err, PHX_IO, "%s is damaged in bytes %" PRId64 " to %" PRId64 ", read for %s: their checksum is %016"
                  PRIx64 " and should be %016" PRIx64, f->at.path, at, at + bytes - 1, what, data.sum,
                  f->entry->chunks[chunk]);
}

phx_status phx__checked_read(phx__checked_file *f, const char *what, void *out, int64_t bytes, int64_t at,
                             int64_t ahead, phx_error *err) {
  if (at < 0 || bytes < 0 || at > f->entry->bytes || bytes > f->entry->bytes - at)
    return phx_fail(err, PHX_INTERNAL, "%s has no bytes %" PRId64 " to %" PRId64, f->at.path, at, at + bytes);
  const bool goes_on = at == f->next;
  if (!goes_on) f->in_order = 0;
  else if (at == f->until && f->in_order < IN_ORDER) f->in_order++;
  f->next = at + bytes;
  f->until = f->next + ahead;
  if (!goes_on || f->at.into.to + (at - f->at.into.at) != out) phx__stream_leave(f->stream, &f->at);
  f->at.into.at = at;
  f->at.into.bytes = f->in_place ? bytes + ahead : 0;
  f->at.into.to = out;
  phx_status status = PHX_OK;
  for (unsigned char *p = out; bytes > 0 && !status;) {
    const int64_t inside = at % PHX__CHUNK_BYTES;
    const int64_t part = bytes < PHX__CHUNK_BYTES - inside ? bytes : PHX__CHUNK_BYTES - inside;
    const unsigned char *data = NULL;
    status = load_chunk(f, what, at / PHX__CHUNK_BYTES, f->until, &data, err);
    if (!status && p != data + inside) memcpy(p, data + inside, (size_t)part);
    p += part;
    at += part;
    bytes -= part;
  }
  if (status) phx__stream_forget(f->stream, &f->at);
  return status;
}

/* ---- a whole checkpoint ---- */
void phx__manifest_tensor_name(const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit, uint32_t flat,
                               int64_t first_block, char name[96]) {
  const char *state = kind == PHX_STATE_OPTIM ? m->states[index].name : phx__state_kind_names[kind];
  snprintf(name, 96, "%s/%" PRIu32 "/%" PRIu32 "/%" PRId64, state, unit, flat, first_block);
}

phx_status phx__checkpoint_reader_open(const char *dir, phx__checkpoint_reader **out, phx_error *err) {
  phx__checkpoint_reader *r = phx__calloc(1, sizeof *r);
  if (!r) return phx_fail(err, PHX_NOMEM, "no memory to read %s", dir);
  phx_status status = phx__manifest_read(dir, &r->manifest, err);
  int64_t bytes = 0;
  for (uint32_t i = 0; !status && i < r->manifest->n_files && bytes < PHX__STREAM_MEMORY; i++)
    bytes += r->manifest->files[i].bytes < PHX__STREAM_MEMORY ? r->manifest->files[i].bytes : PHX__STREAM_MEMORY;
  if (!status) status = phx__stream_create(bytes, PHX__STREAM_READERS, &r->stream, err);
  if (!status) {
    r->dir = phx__strdup(dir);
    r->files = phx__calloc(r->manifest->n_files, sizeof *r->files);
    if (!r->dir || !r->files) status = phx_fail(err, PHX_NOMEM, "no memory to read %s", dir);
  }
  if (status) phx__checkpoint_reader_close(r);
  else *out = r;
  return status;
}

void phx__checkpoint_reader_close(phx__checkpoint_reader *r) {
  if (!r) return;
  for (uint32_t i = 0; r->files && i < r->manifest->n_files; i++) phx__checked_close(&r->files[i]);
  phx__stream_destroy(r->stream);
  phx__free(r->files);
  phx__free(r->dir);
  phx__manifest_free(r->manifest);
  phx__free(r);
}

static phx_status open_file(phx__checkpoint_reader *r, uint32_t file, phx__checked_file **out, phx_error *err) {
  phx_status status = PHX_OK;
  *out = &r->files[file];
  if (r->current && r->current != *out) r->current->in_order = 0; /* its buffers are wanted for another file */
  r->current = *out;
  if (!(*out)->at.path) status = phx__checked_open(r->dir, &r->manifest->files[file], r->stream, *out, err);
  return status;
}

static const char *state_name(const phx__manifest *m, int32_t kind, uint32_t index) {
  if (kind == PHX_STATE_OPTIM && index < m->n_states) return m->states[index].name;
  return kind >= 0 && kind < PHX__STATE_KINDS ? phx__state_kind_names[kind] : "?";
}

phx_status phx__checkpoint_reader_blocks(phx__checkpoint_reader *r, int32_t kind, uint32_t index, uint32_t unit,
                                         uint32_t flat, int64_t first_block, int64_t blocks, float *out,
                                         phx_error *err) {
  enum { BLOCK_BYTES = PHX_BLOCK * 4 };
  char name[96];
  const int64_t ahead = r->ahead;
  r->ahead = 0;
  while (blocks > 0) {
    phx__checked_file *file;
    const phx__manifest_slice *s = phx__manifest_find(r->manifest, kind, index, unit, flat, first_block);
    if (!s)
      return phx_fail(err, PHX_INVALID, "%s has no block %" PRId64 " of state %s of unit %u", r->dir, first_block,
                      state_name(r->manifest, kind, index), unit);
    const int64_t skip = first_block - s->first_block;
    const int64_t part = blocks < s->blocks - skip ? blocks : s->blocks - skip;
    PHX_TRY(open_file(r, s->file, &file, err));
    phx__manifest_tensor_name(r->manifest, s->kind, s->index, s->unit, s->flat, s->first_block, name);
    file->in_place = true;
    const int64_t behind = s->blocks - skip - part; /* of the slice: no more than `ahead` is wanted of it */
    PHX_TRY(phx__checked_read(file, name, out, part * BLOCK_BYTES, s->offset + skip * BLOCK_BYTES,
                              (ahead < behind ? ahead : behind) * BLOCK_BYTES, err));
    out += part * PHX_BLOCK;
    first_block += part;
    blocks -= part;
  }
  return PHX_OK;
}

phx_status phx__checkpoint_reader_private(phx__checkpoint_reader *r, const phx__manifest_private *slice, void *out,
                                          phx_error *err) {
  phx__checked_file *file;
  PHX_TRY(open_file(r, slice->file, &file, err));
  file->in_place = true;
  return phx__checked_read(file, slice->name, out, slice->blocks * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype),
                           slice->offset, 0, err);
}
