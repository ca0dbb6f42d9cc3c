/* core/weights.c - see weights.h.
 *
 * The file's rules are safetensors.c's; here are the ranks: who writes which part of which tensor. */
#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "layout.h"
#include "run_lock.h"
#include "safetensors.h"
#include "state_io.h"
#include "state_visit.h"
#include "status.h"
#include "sys.h"

typedef struct weights_file {
  phx__runtime *rt;
  const char *path;
  int fd;
  int64_t *place; /* (n_params) byte of each tensor in the file */
} weights_file;

/* ---- the slices this rank owns ---- */
typedef struct slice_walk {
  const weights_file *file;
  bool out;
  bool weights; /* this slice's kind; what is none becomes zero when weights are read */
  const phx_slice *slice;
} slice_walk;

static phx_status walk_part(const slice_walk *walk, float *data, int64_t at, int64_t bytes, phx_error *err) {
  const weights_file *f = walk->file;
  const phx_model *model = f->rt->prepared->model;
  const phx_slice part = phx__slice_part(walk->slice, at, bytes);
  const int64_t first = part.first_block * PHX_BLOCK;
  phx_status status = PHX_OK;
  phx__range r = {0};
  while (walk->weights && !status &&
         phx__layout_next(model, part.unit, part.flat, first, part.blocks * PHX_BLOCK, &r)) {
    const size_t param = (size_t)(r.param - phx_model_param(model, 0));
    float *const here = data + (r.first - first);
    const int64_t length = r.numel * 4, place = f->place[param] + r.in_param * 4;
    status = walk->out ? phx__file_write(f->fd, f->path, here, length, place, err)
                       : phx__file_read(f->fd, f->path, here, length, place, err);
  }
  return status;
}

static phx_status write_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  return walk_part(ctx, (float *)(uintptr_t)data, at, bytes, err);
}
static phx_status read_part(void *ctx, void *data, int64_t at, int64_t bytes, phx_error *err) {
  memset(data, 0, (size_t)bytes);
  return walk_part(ctx, data, at, bytes, err);
}

static phx_status walk_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  slice_walk *walk = ctx;
  walk->slice = slice;
  walk->weights = slice->dtype == PHX_F32 && (slice->kind == PHX_STATE_WEIGHT || slice->kind == PHX_STATE_MASTER);
  if ((walk->out && !walk->weights) || slice->kind == PHX_STATE_PRIVATE || phx__state_derived(slice)) return PHX_OK;
  return walk->out ? phx__slice_read(walk->file->rt, slice, write_part, walk, err)
                   : phx__slice_write(walk->file->rt, slice, read_part, walk, err);
}

static phx_status walk_slices(const weights_file *f, bool out, phx_error *err) {
  slice_walk walk = {.file = f, .out = out};
  return phx__state_visit(f->rt, walk_slice, &walk, err);
}

/* ---- writing ---- */
static phx_status barrier(phx__runtime *rt, phx_error *err) { return rt->core->barrier(rt->core->ctx, NULL, err); }

/* Every rank lays the file out alike; rank 0 writes the header. */
static phx_status lay_out(const weights_file *f, char **head, int64_t *head_bytes, phx_error *err) {
  const phx_model *model = f->rt->prepared->model;
  int64_t file_bytes;
  phx__tensor *tensors = phx__calloc(model->n_params, sizeof *tensors);
  if (!tensors) return phx__fail(err, PHX_NOMEM, "no memory for the header of %s", f->path);
  for (uint32_t i = 0; i < model->n_params; i++) {
    const phx_param *p = phx_model_param(model, i);
    tensors[i] = (phx__tensor){.name = p->name, .dtype = PHX_F32, .ndim = p->ndim};
    for (uint32_t d = 0; d < p->ndim; d++) tensors[i].shape[d] = p->shape[d];
  }
  phx_status status = phx__safetensors_layout(f->path, tensors, model->n_params, NULL, head, head_bytes, &file_bytes,
                                              err);
  for (uint32_t i = 0; i < model->n_params && !status; i++) f->place[i] = tensors[i].begin;
  phx__free(tensors);
  return status;
}

phx_status phx__weights_write(phx__runtime *rt, const char *path, phx_error *err) {
  phx_status status = PHX_OK;
  char part[4200];
  weights_file f = {.rt = rt, .path = part, .fd = -1};
  char *head = NULL;
  int64_t head_bytes = 0;
  const bool first = rt->job->rank == 0;
  if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part)
    return phx__fail(err, PHX_INVALID, "%s is too long for a path", path);
  f.place = phx__calloc(rt->prepared->model->n_params, sizeof *f.place);
  if (!f.place) {
    status = phx__fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  PHX__TRY(lay_out(&f, &head, &head_bytes, err));
  if (first) PHX__TRY(phx__run_lock_check(err));
  if (first && (f.fd = phx__sys.open(part, O_RDWR | O_CREAT | O_TRUNC, 0644)) < 0) {
    status = phx__fail_errno(err, PHX_IO, errno, "cannot create %s", part);
    goto done;
  }
  if (first) PHX__TRY(phx__file_write(f.fd, part, head, head_bytes, 0, err));
  PHX__TRY(barrier(rt, err));
  if (!first && (f.fd = phx__sys.open(part, O_RDWR, 0)) < 0) {
    status = phx__fail_errno(err, PHX_IO, errno, "cannot open %s", part);
    goto done;
  }
  PHX__TRY(walk_slices(&f, true, err));
  if (phx__sys.fsync(f.fd)) {
    status = phx__fail_errno(err, PHX_IO, errno, "cannot flush %s", part);
    goto done;
  }
  PHX__TRY(barrier(rt, err));
  if (first) PHX__TRY(phx__run_lock_check(err));
  if (first && phx__sys.rename(part, path))
    status = phx__fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", part, path);
done:
  if (status && first && f.fd >= 0) phx__sys.unlink(part);
  if (f.fd >= 0) phx__sys.close(f.fd);
  phx__free(head);
  phx__free(f.place);
  return status;
}

/* ---- reading ---- */
static phx_status find_tensor(const weights_file *f, const phx__safetensors *st, uint32_t i, phx_error *err) {
  const phx_param *p = phx_model_param(f->rt->prepared->model, i);
  const phx__tensor *t = phx__safetensors_find(st, p->name);
  if (!t) return phx__fail(err, PHX_IO, "%s has no tensor %s: not weights of this model", f->path, p->name);
  bool same = t->dtype == PHX_F32 && t->ndim == p->ndim;
  for (uint32_t d = 0; same && d < p->ndim; d++) same = t->shape[d] == p->shape[d];
  if (!same) return phx__fail(err, PHX_IO, "%s: tensor %s is not F32 of the model's shape", f->path, p->name);
  f->place[i] = t->begin;
  return PHX_OK;
}

phx_status phx__weights_read(phx__runtime *rt, const char *path, phx_error *err) {
  phx_status status = PHX_OK;
  weights_file f = {.rt = rt, .path = path, .fd = -1};
  phx__safetensors *st = NULL;
  if (access(path, F_OK)) return phx__fail_errno(err, PHX_INVALID, errno, "cannot open the weights %s", path);
  f.place = phx__calloc(rt->prepared->model->n_params, sizeof *f.place);
  if (!f.place) {
    status = phx__fail(err, PHX_NOMEM, "no memory to read %s", path);
    goto done;
  }
  PHX__TRY(phx__safetensors_open(path, &st, err));
  f.fd = st->fd;
  for (uint32_t i = 0; i < rt->prepared->model->n_params; i++) PHX__TRY(find_tensor(&f, st, i, err));
  PHX__TRY(phx__optim_state_changes(&rt->optim, err));
  PHX__TRY(walk_slices(&f, false, err));
  PHX__TRY(rt->prepared->strategy->state_changed(rt->strategy, err));
done:
  phx__safetensors_close(st);
  phx__free(f.place);
  return status;
}
