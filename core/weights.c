/* core/weights.c - see weights.h.
 *
 * Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the tensors
 * without holes, in declaration order.  The header is read under limits; damage names the file and the tensor. */
#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layout.h"
#include "output.h"
#include "status.h"
#include "sys.h"

enum { HEADER_MAX = 16 << 20 };

typedef struct weights_file {
  phx__runtime *rt;
  const char *path;
  int fd;
  int64_t *place; /* (n_params) byte offset of each tensor in the file */
} weights_file;

static phx_status transfer(const weights_file *f, bool out, void *data, int64_t bytes, int64_t at, phx_error *err) {
  char *p = data;
  while (bytes > 0) {
    const size_t part = bytes > 1 << 30 ? 1u << 30 : (size_t)bytes;
    ssize_t n = out ? phx__sys.pwrite(f->fd, p, part, at) : phx__sys.pread(f->fd, p, part, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return phx__fail_errno(err, PHX_IO, errno, "%s %s", out ? "cannot write" : "cannot read", f->path);
    if (n == 0) return phx__fail(err, PHX_IO, "%s %s at byte %lld", f->path,
                                 out ? "takes no more data" : "ends too early,", (long long)at);
    p += n;
    at += n;
    bytes -= n;
  }
  return PHX_OK;
}

/* ---- the slices this rank owns ---- */
typedef struct slice_walk {
  const weights_file *file;
  bool out;
} slice_walk;

static phx_status walk_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  const slice_walk *walk = ctx;
  phx__runtime *rt = walk->file->rt;
  const phx_strategy_table *strategy = rt->prepared->strategy;
  const phx_model *model = rt->prepared->model;
  const int64_t first = slice->first_block * PHX_BLOCK;
  const int32_t mode = walk->out ? PHX_MAP_READ : PHX_MAP_WRITE;
  const bool weights = slice->dtype == PHX_F32 && (slice->kind == PHX_STATE_WEIGHT || slice->kind == PHX_STATE_MASTER);
  void *data = NULL;
  if ((walk->out && !weights) || slice->kind == PHX_STATE_PRIVATE) return PHX_OK;
  phx_status status = strategy->map(rt->strategy, slice, mode, &data, err);
  if (status) return status;
  if (!walk->out) memset(data, 0, (size_t)slice->blocks * PHX_BLOCK * phx_dtype_bytes(slice->dtype));
  phx__range r = {0};
  while (weights && !status &&
         phx__layout_next(model, slice->unit, slice->flat, first, slice->blocks * PHX_BLOCK, &r)) {
    const size_t param = (size_t)(r.param - phx_model_param(model, 0));
    status = transfer(walk->file, walk->out, (float *)data + (r.first - first), r.numel * 4,
                      walk->file->place[param] + r.in_param * 4, err);
  }
  phx_status unmapped = strategy->unmap(rt->strategy, slice, mode, data, status ? NULL : err);
  return status ? status : unmapped;
}

static phx_status walk_slices(const weights_file *f, bool out, phx_error *err) {
  slice_walk walk = {f, out};
  const phx_visitor visitor = {.struct_size = sizeof visitor, .ctx = &walk, .slice = walk_slice};
  return f->rt->prepared->strategy->visit_state(f->rt->strategy, &visitor, err);
}

/* ---- writing ---- */
static char *header_text(const phx_model *model, int64_t *place) {
  int64_t at = 0;
  phx__json_begin();
  cJSON *root = cJSON_CreateObject();
  for (uint32_t i = 0; i < model->n_params; i++) {
    const phx_param *p = phx_model_param(model, i);
    cJSON *tensor = cJSON_AddObjectToObject(root, p->name);
    cJSON_AddStringToObject(tensor, "dtype", "F32");
    cJSON *shape = cJSON_AddArrayToObject(tensor, "shape");
    for (uint32_t d = 0; d < p->ndim; d++) phx__json_append(shape, cJSON_CreateNumber((double)p->shape[d]));
    cJSON *offsets = cJSON_AddArrayToObject(tensor, "data_offsets");
    phx__json_append(offsets, cJSON_CreateNumber((double)at));
    phx__json_append(offsets, cJSON_CreateNumber((double)(at + p->numel * 4)));
    place[i] = at;
    at += p->numel * 4;
  }
  char *text = cJSON_PrintUnformatted(root);
  cJSON_Delete(root);
  if (!phx__json_lost()) return text;
  cJSON_free(text);
  return NULL;
}

static phx_status write_header(const weights_file *f, const char *text, int64_t padded, phx_error *err) {
  char *header = phx__calloc(1, (size_t)padded + 8);
  if (!header) return phx__fail(err, PHX_NOMEM, "no memory for the header of %s", f->path);
  for (int i = 0; i < 8; i++) header[i] = (char)(padded >> (8 * i));
  memset(header + 8, ' ', (size_t)padded);
  memcpy(header + 8, text, strlen(text));
  phx_status status = transfer(f, true, header, padded + 8, 0, err);
  phx__free(header);
  return status;
}

static phx_status barrier(phx__runtime *rt, phx_error *err) { return rt->core->barrier(rt->core->ctx, NULL, err); }

phx_status phx__weights_write(phx__runtime *rt, const char *path, phx_error *err) {
  phx_status status = PHX_OK;
  char part[4200];
  weights_file f = {.rt = rt, .path = part, .fd = -1};
  char *text = NULL;
  const bool first = rt->job->rank == 0;
  if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part)
    return phx__fail(err, PHX_INVALID, "%s is too long for a path", path);
  f.place = phx__calloc(rt->prepared->model->n_params, sizeof *f.place);
  if (f.place) text = header_text(rt->prepared->model, f.place);
  if (!text) {
    status = phx__fail(err, PHX_NOMEM, "no memory for the header of %s", path);
    goto done;
  }
  const int64_t padded = ((int64_t)strlen(text) + 63) / 64 * 64; /* tensors begin at a multiple of 8 */
  for (uint32_t i = 0; i < rt->prepared->model->n_params; i++) f.place[i] += padded + 8;
  if (first && (f.fd = phx__sys.open(part, O_RDWR | O_CREAT | O_TRUNC, 0644)) < 0) {
    status = phx__fail_errno(err, PHX_IO, errno, "cannot create %s", part);
    goto done;
  }
  if (first) PHX__TRY(write_header(&f, text, padded, err));
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
  if (first && phx__sys.rename(part, path))
    status = phx__fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", part, path);
done:
  if (status && first && f.fd >= 0) phx__sys.unlink(part);
  if (f.fd >= 0) phx__sys.close(f.fd);
  cJSON_free(text);
  phx__free(f.place);
  return status;
}

/* ---- reading ---- */
static phx_status read_tensor(const weights_file *f, const cJSON *root, uint32_t i, int64_t data_at, int64_t file_bytes,
                              phx_error *err) {
  const phx_param *p = phx_model_param(f->rt->prepared->model, i);
  const cJSON *tensor = cJSON_GetObjectItemCaseSensitive(root, p->name);
  const cJSON *shape = cJSON_GetObjectItemCaseSensitive(tensor, "shape");
  const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(tensor, "data_offsets");
  const char *dtype = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(tensor, "dtype"));
  if (!tensor) return phx__fail(err, PHX_IO, "%s has no tensor %s: not weights of this model", f->path, p->name);
  bool same = dtype && !strcmp(dtype, "F32") && cJSON_GetArraySize(shape) == (int)p->ndim &&
              cJSON_GetArraySize(offsets) == 2;
  for (uint32_t d = 0; same && d < p->ndim; d++)
    same = cJSON_GetNumberValue(cJSON_GetArrayItem(shape, (int)d)) == (double)p->shape[d];
  if (!same) return phx__fail(err, PHX_IO, "%s: tensor %s is not F32 of the model's shape", f->path, p->name);
  const double begin = cJSON_GetNumberValue(cJSON_GetArrayItem(offsets, 0));
  const double end = cJSON_GetNumberValue(cJSON_GetArrayItem(offsets, 1));
  if (!(begin >= 0) || begin != floor(begin) || end - begin != (double)p->numel * 4)
    return phx__fail(err, PHX_IO, "%s: the place of tensor %s (bytes %.0f to %.0f) is not that of %lld numbers", f->path,
                     p->name, begin, end, (long long)p->numel);
  if (end > (double)(file_bytes - data_at))
    return phx__fail(err, PHX_IO, "%s: tensor %s ends at byte %.0f of the data, which has only %lld: the file is truncated",
                     f->path, p->name, end, (long long)(file_bytes - data_at));
  f->place[i] = data_at + (int64_t)begin;
  for (uint32_t j = 0; j < i; j++) {
    const phx_param *q = phx_model_param(f->rt->prepared->model, j);
    if (f->place[i] < f->place[j] + q->numel * 4 && f->place[j] < f->place[i] + p->numel * 4)
      return phx__fail(err, PHX_IO, "%s: tensors %s and %s overlap", f->path, q->name, p->name);
  }
  return PHX_OK;
}

static phx_status read_header(const weights_file *f, phx_error *err) {
  phx_status status = PHX_OK;
  unsigned char length[8];
  struct stat st;
  char *text = NULL;
  cJSON *root = NULL;
  if (phx__sys.fstat(f->fd, &st)) return phx__fail_errno(err, PHX_IO, errno, "cannot look at %s", f->path);
  PHX__TRY(transfer(f, false, length, 8, 0, err));
  uint64_t bytes = 0;
  for (int i = 7; i >= 0; i--) bytes = bytes << 8 | length[i];
  if (bytes < 2 || bytes > HEADER_MAX || (int64_t)bytes > st.st_size - 8) {
    status = phx__fail(err, PHX_IO, "%s is not a safetensors file (header of %llu bytes)", f->path,
                       (unsigned long long)bytes);
    goto done;
  }
  text = phx__calloc(1, bytes + 1);
  if (!text) {
    status = phx__fail(err, PHX_NOMEM, "no memory for the header of %s", f->path);
    goto done;
  }
  PHX__TRY(transfer(f, false, text, (int64_t)bytes, 8, err));
  phx__json_begin();
  root = cJSON_ParseWithLength(text, bytes);
  if (phx__json_lost()) {
    status = phx__fail(err, PHX_NOMEM, "no memory for the header of %s", f->path);
    goto done;
  }
  if (!cJSON_IsObject(root)) {
    status = phx__fail(err, PHX_IO, "%s: the header is not JSON", f->path);
    goto done;
  }
  for (uint32_t i = 0; i < f->rt->prepared->model->n_params; i++)
    PHX__TRY(read_tensor(f, root, i, (int64_t)bytes + 8, st.st_size, err));
done:
  cJSON_Delete(root);
  phx__free(text);
  return status;
}

phx_status phx__weights_read(phx__runtime *rt, const char *path, phx_error *err) {
  phx_status status = PHX_OK;
  weights_file f = {.rt = rt, .path = path};
  f.fd = phx__sys.open(path, O_RDONLY, 0);
  if (f.fd < 0) return phx__fail_errno(err, PHX_INVALID, errno, "cannot open the weights %s", path);
  f.place = phx__calloc(rt->prepared->model->n_params, sizeof *f.place);
  if (!f.place) {
    status = phx__fail(err, PHX_NOMEM, "no memory to read %s", path);
    goto done;
  }
  PHX__TRY(read_header(&f, err));
  PHX__TRY(walk_slices(&f, false, err));
  PHX__TRY(rt->prepared->strategy->state_changed(rt->strategy, err));
done:
  phx__free(f.place);
  phx__sys.close(f.fd);
  return status;
}
