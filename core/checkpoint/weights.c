/* core/checkpoint/weights.c - see weights.h.
 *
 * The file's rules are safetensors.c's; here are the ranks: who writes which part of which tensor. */
#include "checkpoint/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/turned_file.h"
#include "engine/layout.h"
#include "engine/state.h"
#include "engine/state_io.h"
#include "engine/state_visit.h"
#include "job/run_lock.h"

typedef struct weights_file {
  phx__runtime *rt;
  const char *path;
  int fd;
  bool is_gpt2; /* its names, and its matrices turned */
  phx__gpt2 gpt2;
  int64_t *place; /* (n_params) byte of each tensor in the file */
  phx__turned_file turned;
} weights_file;

/* ---- the slices this rank owns ---- */
typedef struct slice_walk {
  weights_file *file;              /* writing, or */
  phx__source *source;             /* filling from, and */
  const phx__source_param *params; /* (n_params) */
  phx__runtime *rt;
  bool weights; /* this slice's kind; what is none becomes zero when weights are read */
  const phx_slice *slice;
} slice_walk;

static bool is_turned(const weights_file *f, const phx_param *p) {
  return f->is_gpt2 && phx__gpt2_transposed(p->name);
}

static phx_status write_range(weights_file *f, const phx__range *r, const float *data, phx_error *err) {
  const size_t param = (size_t)(r->param - phx_model_param(f->rt->prepared->model, 0));
  if (is_turned(f, r->param))
    return phx__turned_write(&f->turned, r->param->shape, f->place[param], r->in_param, r->numel, data, err);
  return phx__file_write(f->fd, f->path, data, r->numel * 4, f->place[param] + r->in_param * 4, err);
}

static phx_status walk_part(const slice_walk *walk, float *data, int64_t at, int64_t bytes, phx_error *err) {
  const phx_model *model = walk->rt->prepared->model;
  const phx_slice part = phx__slice_part(walk->slice, at, bytes);
  const int64_t first = part.first_block * PHX_BLOCK;
  phx_status status = PHX_OK;
  phx__range r = {0};
  while (walk->weights && !status &&
         phx__layout_next(model, part.unit, part.flat, first, part.blocks * PHX_BLOCK, &r)) {
    float *const here = data + (r.first - first);
    if (walk->file) status = write_range(walk->file, &r, here, err);
    else
      status = phx__source_read(walk->source, &walk->params[r.param - phx_model_param(model, 0)], r.in_param, r.numel,
                                here, err);
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
  if ((walk->file && !walk->weights) || slice->kind == PHX_STATE_PRIVATE || phx__state_derived(slice)) return PHX_OK;
  return walk->file ? phx__slice_read(walk->rt, slice, write_part, walk, err)
                    : phx__slice_write(walk->rt, slice, read_part, walk, err);
}

static phx_status walk_slices(slice_walk *walk, phx_error *err) {
  return phx__state_visit(walk->rt, walk_slice, walk, err);
}

/* ---- writing ---- */
static phx_status barrier(phx__runtime *rt, phx_error *err) { return rt->core->barrier(rt->core->ctx, NULL, err); }

/* As `checkpoint export` would recognise it. */
static phx_status recognise(weights_file *f, phx_error *err) {
  phx__manifest *m = phx__manifest_create();
  if (!m) return phx_fail(err, PHX_NOMEM, "no memory for the header of %s", f->path);
  phx_status status = phx__checkpoint_describe(m, f->rt->prepared, f->rt->job->size, err);
  if (!status) f->is_gpt2 = !phx__gpt2_of_manifest(f->path, m, &f->gpt2, NULL);
  phx__manifest_free(m);
  return status;
}

/* Every rank lays the file out alike; rank 0 writes the header. */
static phx_status lay_out(const weights_file *f, int64_t step, char **head, int64_t *head_bytes, phx_error *err) {
  const phx_model *model = f->rt->prepared->model;
  char text[24];
  const char *const metadata[] = {"format", "pt", "step", text, NULL}; /* transformers asks for the format */
  int64_t file_bytes;
  phx__tensor *tensors = phx__calloc(model->n_params, sizeof *tensors);
  snprintf(text, sizeof text, "%" PRId64, step);
  if (!tensors) return phx_fail(err, PHX_NOMEM, "no memory for the header of %s", f->path);
  for (uint32_t i = 0; i < model->n_params; i++) {
    const phx_param *p = phx_model_param(model, i);
    const bool turned = is_turned(f, p);
    tensors[i] = (phx__tensor){.name = p->name, .dtype = PHX_F32, .ndim = p->ndim};
    for (uint32_t d = 0; d < p->ndim; d++) tensors[i].shape[d] = p->shape[turned ? 1 - d : d];
  }
  phx_status status = phx__safetensors_layout(f->path, tensors, model->n_params, metadata, head, head_bytes,
                                              &file_bytes, err);
  for (uint32_t i = 0; i < model->n_params && !status; i++) f->place[i] = tensors[i].begin;
  phx__free(tensors);
  return status;
}

static phx_status write_slices(weights_file *f, phx_error *err) {
  slice_walk walk = {.file = f, .rt = f->rt};
  phx_status status = PHX_OK;
  if (f->is_gpt2) status = phx__turned_open(&f->turned, f->fd, f->path, err);
  if (!status) status = walk_slices(&walk, err);
  if (!status) status = phx__turned_flush(&f->turned, err);
  phx__turned_close(&f->turned);
  if (!status && phx__sys.fsync(f->fd)) status = phx_fail_errno(err, PHX_IO, errno, "cannot flush %s", f->path);
  return status;
}

static phx_status publish(const weights_file *f, const char *dir, const char *path, phx_error *err) {
  phx_status status = phx__run_lock_check(err);
  if (!status && f->is_gpt2) status = phx__gpt2_write(dir, &f->gpt2, err);
  if (!status && phx__sys.rename(f->path, path))
    status = phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", f->path, path);
  return status;
}

phx_status phx__weights_write(phx__runtime *rt, const char *dir, int64_t step, phx_error *err) {
  phx_status status = PHX_OK;
  char path[4200], part[4210];
  weights_file f = {.rt = rt, .path = part, .fd = -1};
  char *head = NULL;
  int64_t head_bytes = 0;
  const bool first = rt->job->rank == 0;
  if (snprintf(path, sizeof path, "%s/" PHX__GPT2_WEIGHTS, dir) >= (int)sizeof path)
    return phx_fail(err, PHX_INVALID, "%s is too long for a path", dir);
  snprintf(part, sizeof part, "%s.part", path);
  f.place = phx__calloc(rt->prepared->model->n_params, sizeof *f.place);
  if (!f.place) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  PHX_TRY_GOTO(recognise(&f, err), status, done);
  PHX_TRY_GOTO(lay_out(&f, step, &head, &head_bytes, err), status, done);
  if (first) PHX_TRY_GOTO(phx__run_lock_check(err), status, done);
  if (first && (f.fd = phx__sys.open(part, O_RDWR | O_CREAT | O_TRUNC, 0644)) < 0) {
    status = phx_fail_errno(err, PHX_IO, errno, "cannot create %s", part);
    goto done;
  }
  if (first) PHX_TRY_GOTO(phx__file_write(f.fd, part, head, head_bytes, 0, err), status, done);
  PHX_TRY_GOTO(barrier(rt, err), status, done);
  if (!first && (f.fd = phx__sys.open(part, O_RDWR | O_NOFOLLOW, 0)) < 0) {
    status = phx_fail_errno(err, PHX_IO, errno, "cannot open %s", part);
    goto done;
  }
  PHX_TRY_GOTO(phx__state_prepare(rt, PHX_PREPARE_FINAL, err), status, done);
  PHX_TRY_GOTO(write_slices(&f, err), status, done);
  PHX_TRY_GOTO(barrier(rt, err), status, done);
  if (first) status = publish(&f, dir, path, err);
done:
  if (status && first && f.fd >= 0) phx__sys.unlink(part);
  if (f.fd >= 0) phx__sys.close(f.fd);
  phx__free(head);
  phx__free(f.place);
  return status;
}

/* ---- filling ---- */
static phx_status find_param(phx__source *source, const phx_param *p, phx__source_param *out, phx_error *err) {
  const char *path = source->files ? source->files->path : source->path;
  if (!phx__source_find(source, p->name, out))
    return phx_fail(err, PHX_IO, "%s has no tensor %s: not weights of this model", path, p->name);
  bool same = out->ndim == p->ndim;
  for (uint32_t d = 0; same && d < p->ndim; d++) same = out->shape[d] == p->shape[d];
  if (!same) return phx_fail(err, PHX_IO, "%s: tensor %s is not of the model's shape", path, p->name);
  return PHX_OK;
}

phx_status phx__weights_fill(phx__runtime *rt, phx__source *source, phx_error *err) {
  phx_status status = PHX_OK;
  const phx_model *model = rt->prepared->model;
  phx__source_param *params = phx__calloc(model->n_params, sizeof *params);
  if (!params) return phx_fail(err, PHX_NOMEM, "no memory to read %s", source->path);
  for (uint32_t i = 0; i < model->n_params; i++)
    PHX_TRY_GOTO(find_param(source, phx_model_param(model, i), &params[i], err), status, done);
  const phx_restored weights = {.struct_size = sizeof weights, .what = PHX_RESTORED_WEIGHTS};
  PHX_TRY_GOTO(phx__state_prepare(rt, PHX_PREPARE_LOAD, err), status, done);
  PHX_TRY_GOTO(phx__optim_state_changes(&rt->optim, err), status, done);
  slice_walk walk = {.source = source, .params = params, .rt = rt};
  PHX_TRY_GOTO(walk_slices(&walk, err), status, done);
  PHX_TRY_GOTO(phx__state_filled(rt, &weights, err), status, done);
done:
  phx__free(params);
  return status;
}
