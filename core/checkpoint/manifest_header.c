/* core/checkpoint/manifest_header.c - see manifest.h: the header of a shard and the manifest name the same tensors.
 *
 * Checksums alone do not show a file whose header was exchanged together with its sums: other tools go by the header,
 * and we go by the manifest.  Reads no tensor.  No state, any thread. */
#include <inttypes.h>
#include <stdio.h>

#include "base/status.h"
#include "checkpoint/manifest.h"

static phx_status check_place(const phx__safetensors *st, const char *name, int32_t dtype, int64_t offset,
                              int64_t blocks, phx_error *err) {
  const phx__tensor *t = phx__safetensors_find(st, name);
  if (t && t->dtype == dtype && t->begin == offset && t->numel == blocks * PHX_BLOCK) return PHX_OK;
  return phx_fail(err, PHX_IO, "%s: tensor %s is not where the manifest says", st->path, name);
}

phx_status phx__manifest_header_fits(const phx__manifest *m, uint32_t file, const phx__safetensors *st,
                                     phx_error *err) {
  char name[160];
  phx_status status = PHX_OK;
  for (uint32_t i = 0; i < m->n_slices && !status; i++) {
    const phx__manifest_slice *s = &m->slices[i];
    if (s->file != file) continue;
    phx__manifest_tensor_name(m, s->kind, s->index, s->unit, s->flat, s->first_block, name);
    status = check_place(st, name, s->dtype, s->offset, s->blocks, err);
  }
  for (uint32_t i = 0; i < m->n_privates && !status; i++) {
    const phx__manifest_private *p = &m->privates[i];
    if (p->file != file) continue;
    snprintf(name, sizeof name, "private.%s/%" PRIu32 "/%" PRIu32 "/%" PRId64, p->name, p->unit, p->flat,
             p->first_block);
    status = check_place(st, name, p->dtype, p->offset, p->blocks, err);
  }
  return status;
}

phx_status phx__checkpoint_reader_header(const phx__checkpoint_reader *r, uint32_t file, phx_error *err) {
  char path[4200];
  phx__safetensors *st = NULL;
  snprintf(path, sizeof path, "%s/%s", r->dir, r->manifest->files[file].name);
  phx_status status = phx__safetensors_open(path, &st, err);
  if (!status) status = phx__manifest_header_fits(r->manifest, file, st, err);
  phx__safetensors_close(st);
  return status;
}
