/* core/checked_file.c - see manifest.h: verified reading of a checkpoint's files.
 *
 * The bytes that are handed out are the very bytes that were hashed: whole chunks go straight to the caller and are hashed
 * there, a chunk of which only a part is wanted passes through one buffer per file.  One thread per reader. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "manifest.h"
#include "manifest_inner.h"
#include "status.h"
#include "sys.h"

phx_status phx__checked_open(const char *dir, const phx__manifest_file *entry, phx__checked_file *out, phx_error *err) {
  char path[4200];
  int64_t bytes = 0;
  phx__checked_file f = {.fd = -1, .entry = entry, .buffered = -1};
  snprintf(path, sizeof path, "%s/%s", dir, entry->name);
  phx_status status = phx__file_open(path, &f.fd, &bytes, err);
  if (status) return status;
  f.path = phx__strdup(path);
  f.buffer = phx__calloc(1, PHX__CHUNK_BYTES);
  if (!f.path || !f.buffer) status = phx__fail(err, PHX_NOMEM, "no memory to read %s", path);
  else if (bytes != entry->bytes)
    status = phx__fail(err, PHX_IO, "%s is damaged: it has %" PRId64 " bytes, and its checkpoint says %" PRId64, path,
                       bytes, entry->bytes);
  if (status) phx__checked_close(&f);
  else *out = f;
  return status;
}

void phx__checked_close(phx__checked_file *f) {
  if (f->entry) phx__sys.close(f->fd); /* of zeros: nothing was opened */
  phx__free(f->path);
  phx__free(f->buffer);
  *f = (phx__checked_file){.fd = -1};
}

static phx_status load_chunk(phx__checked_file *f, const char *what, int64_t chunk, void *out, phx_error *err) {
  const int64_t at = chunk * PHX__CHUNK_BYTES, left = f->entry->bytes - at;
  const int64_t bytes = left < PHX__CHUNK_BYTES ? left : PHX__CHUNK_BYTES;
  phx_status status = phx__file_read(f->fd, f->path, out, bytes, at, err);
  if (status) return status;
  const uint64_t sum = phx__chunk_sum(out, (size_t)bytes);
  if (sum == f->entry->chunks[chunk]) return PHX_OK;
  return phx__fail(err, PHX_IO, "%s is damaged in bytes %" PRId64 " to %" PRId64 ", read for %s: their checksum is %016"
                   PRIx64 " and should be %016" PRIx64, f->path, at, at + bytes - 1, what, sum, f->entry->chunks[chunk]);
}

phx_status phx__checked_read(phx__checked_file *f, const char *what, void *out, int64_t bytes, int64_t at,
                             phx_error *err) {
  if (at < 0 || bytes < 0 || at > f->entry->bytes || bytes > f->entry->bytes - at)
    return phx__fail(err, PHX_INTERNAL, "%s has no bytes %" PRId64 " to %" PRId64, f->path, at, at + bytes);
  for (char *p = out; bytes > 0;) {
    const int64_t chunk = at / PHX__CHUNK_BYTES, inside = at % PHX__CHUNK_BYTES;
    const int64_t left = f->entry->bytes - chunk * PHX__CHUNK_BYTES;
    const int64_t whole = left < PHX__CHUNK_BYTES ? left : PHX__CHUNK_BYTES;
    const int64_t part = bytes < whole - inside ? bytes : whole - inside;
    phx_status status = PHX_OK;
    if (part == whole && chunk != f->buffered) {
      status = load_chunk(f, what, chunk, p, err);
    } else if (chunk != f->buffered) {
      f->buffered = -1;
      status = load_chunk(f, what, chunk, f->buffer, err);
      if (!status) f->buffered = chunk;
    }
    if (status) return status;
    if (chunk == f->buffered) memcpy(p, f->buffer + inside, (size_t)part);
    p += part;
    at += part;
    bytes -= part;
  }
  return PHX_OK;
}

/* ---- a whole checkpoint ---- */
void phx__manifest_tensor_name(const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit, uint32_t flat,
                               int64_t first_block, char name[96]) {
  const char *state = kind == PHX_STATE_OPTIM ? m->states[index].name : phx__state_kind_names[kind];
  snprintf(name, 96, "%s/%" PRIu32 "/%" PRIu32 "/%" PRId64, state, unit, flat, first_block);
}

phx_status phx__checkpoint_reader_open(const char *dir, phx__checkpoint_reader **out, phx_error *err) {
  phx__checkpoint_reader *r = phx__calloc(1, sizeof *r);
  if (!r) return phx__fail(err, PHX_NOMEM, "no memory to read %s", dir);
  phx_status status = phx__manifest_read(dir, &r->manifest, err);
  if (!status) {
    r->dir = phx__strdup(dir);
    r->files = phx__calloc(r->manifest->n_files, sizeof *r->files);
    if (!r->dir || !r->files) status = phx__fail(err, PHX_NOMEM, "no memory to read %s", dir);
  }
  if (status) phx__checkpoint_reader_close(r);
  else *out = r;
  return status;
}

void phx__checkpoint_reader_close(phx__checkpoint_reader *r) {
  if (!r) return;
  for (uint32_t i = 0; r->files && i < r->manifest->n_files; i++) phx__checked_close(&r->files[i]);
  phx__free(r->files);
  phx__free(r->dir);
  phx__manifest_free(r->manifest);
  phx__free(r);
}

static phx_status open_file(phx__checkpoint_reader *r, uint32_t file, phx__checked_file **out, phx_error *err) {
  phx_status status = PHX_OK;
  *out = &r->files[file];
  if (!(*out)->path) status = phx__checked_open(r->dir, &r->manifest->files[file], *out, err);
  return status;
}

phx_status phx__checkpoint_reader_blocks(phx__checkpoint_reader *r, int32_t kind, uint32_t index, uint32_t unit,
                                         uint32_t flat, int64_t first_block, int64_t blocks, float *out,
                                         phx_error *err) {
  enum { BLOCK_BYTES = PHX_BLOCK * 4 };
  char name[96];
  while (blocks > 0) {
    phx__checked_file *file;
    const phx__manifest_slice *s = phx__manifest_find(r->manifest, kind, index, unit, flat, first_block);
    if (!s) return phx__fail(err, PHX_INVALID, "%s has no block %" PRId64 " of state %s of unit %u", r->dir, first_block,
                             kind == PHX_STATE_OPTIM && index < r->manifest->n_states ? r->manifest->states[index].name
                             : kind >= 0 && kind < PHX__STATE_KINDS ? phx__state_kind_names[kind] : "?", unit);
    const int64_t skip = first_block - s->first_block;
    const int64_t part = blocks < s->blocks - skip ? blocks : s->blocks - skip;
    phx_status status = open_file(r, s->file, &file, err);
    if (status) return status;
    phx__manifest_tensor_name(r->manifest, s->kind, s->index, s->unit, s->flat, s->first_block, name);
    status = phx__checked_read(file, name, out, part * BLOCK_BYTES, s->offset + skip * BLOCK_BYTES, err);
    if (status) return status;
    out += part * PHX_BLOCK;
    first_block += part;
    blocks -= part;
  }
  return PHX_OK;
}

phx_status phx__checkpoint_reader_private(phx__checkpoint_reader *r, const phx__manifest_private *slice, void *out,
                                          phx_error *err) {
  phx__checked_file *file;
  phx_status status = open_file(r, slice->file, &file, err);
  if (status) return status;
  return phx__checked_read(file, slice->name, out, slice->blocks * PHX_BLOCK * (int64_t)phx_dtype_bytes(slice->dtype),
                           slice->offset, err);
}
