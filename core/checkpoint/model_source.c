/* core/checkpoint/model_source.c - see model_source.h.
 *
 * A folder with a config.json is checked whole when it is opened: every tensor is a parameter of that model in its
 * shape, a mask, or a head that equals wte.weight; nothing is missing. */
#include "checkpoint/model_source.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint_resolve.h"
#include "checkpoint/elements.h"
#include "plugin/host.h"

/* ---- parameters ---- */
static void of_tensor(const phx__source *s, const phx__tensor_place *place, phx__source_param *out) {
  const phx__tensor *t = place->tensor;
  *out = (phx__source_param){.name = phx__gpt2_bare(t->name), .ndim = t->ndim, .numel = t->numel, .place = *place};
  out->turned = s->turned && t->ndim == 2 && t->numel > 0 && phx__gpt2_transposed(out->name);
  for (uint32_t d = 0; d < t->ndim; d++) out->shape[d] = t->shape[out->turned ? 1 - d : d];
}

static void of_param(const phx__manifest_param *p, int32_t kind, uint32_t index, phx__source_param *out) {
  *out = (phx__source_param){.name = p->name, .ndim = p->ndim, .numel = p->numel, .kind = kind, .index = index,
                             .param = p};
  for (uint32_t d = 0; d < p->ndim; d++) out->shape[d] = p->shape[d];
}

static bool place_of(const phx__tensor_files *files, const char *name, phx__tensor_place *out) {
  char prefixed[PHX__SAFETENSORS_NAME_MOST + 16];
  if (phx__tensor_files_find(files, name, out)) return true;
  snprintf(prefixed, sizeof prefixed, "transformer.%.255s", name);
  return phx__tensor_files_find(files, prefixed, out);
}

uint32_t phx__source_n(const phx__source *s) { return s->reader ? s->reader->manifest->n_params : s->files->n; }

bool phx__source_at(const phx__source *s, uint32_t i, phx__source_param *out) {
  if (s->reader) {
    of_param(&s->reader->manifest->params[i], PHX_STATE_WEIGHT, 0, out);
    return true;
  }
  of_tensor(s, &s->files->places[i], out);
  return !phx__gpt2_mask(out->name) && !(s->has_config && !strcmp(out->name, "lm_head.weight"));
}

bool phx__source_find(const phx__source *s, const char *name, phx__source_param *out) {
  phx__tensor_place place;
  if (!s->reader) {
    if (!place_of(s->files, name, &place)) return false;
    of_tensor(s, &place, out);
    return true;
  }
  for (uint32_t i = 0; i < s->reader->manifest->n_params; i++)
    if (!strcmp(s->reader->manifest->params[i].name, name)) return phx__source_at(s, i, out);
  return false;
}

bool phx__source_find_state(const phx__source *s, const char *name, uint32_t state, phx__source_param *out) {
  if (!s->reader || !phx__source_find(s, name, out) || out->param->flat != PHX_FLAT_TRAINABLE) return false;
  out->kind = PHX_STATE_OPTIM;
  out->index = state;
  return true;
}

phx_status phx__source_gpt2(const phx__source *s, phx__gpt2 *out, phx_error *err) {
  if (s->reader) return phx__gpt2_of_manifest(s->path, s->reader->manifest, out, err);
  *out = s->gpt2;
  if (s->has_config) return PHX_OK;
  if (s->kind == PHX__SOURCE_FILE)
    return phx_fail(err, PHX_INVALID, "%s is one file: name the folder, which tells the model (" PHX__GPT2_CONFIG
                     ", or a run's config.ini)", s->path);
  return phx_fail(err, PHX_UNSUPPORTED, "%s has no " PHX__GPT2_CONFIG ": it is the run of a model that is no GPT-2",
                   s->path);
}

/* ---- values ---- */
phx_status phx__source_read_stored(phx__source *s, const phx__source_param *p, int64_t first, int64_t numel,
                                   float *out, phx_error *err) {
  if (!s->reader) {
    phx__tensor_source tensor = {p->place.file, p->place.tensor, s->raw, s->finite};
    return phx__tensor_elements(&tensor, first, numel, out, err);
  }
  phx__param_source param = {s->reader, p->param, p->kind, p->index, s->blocks, s->finite};
  return phx__param_elements(&param, first, numel, out, err);
}

static phx_status read_turning(void *source, int64_t first, int64_t numel, float *out, phx_error *err) {
  phx__source *s = source;
  phx__tensor_source tensor = {s->turning.file, s->turning.tensor, s->raw, s->finite};
  return phx__tensor_elements(&tensor, first, numel, out, err);
}

phx_status phx__source_read(phx__source *s, const phx__source_param *p, int64_t first, int64_t numel, float *out,
                            phx_error *err) {
  if (!p->turned) return phx__source_read_stored(s, p, first, numel, out, err);
  if (s->turning.tensor != p->place.tensor) {
    phx__transposer_close(&s->turn);
    s->turn = (phx__transposer){.read = read_turning, .ctx = s, .rows = p->shape[1], .columns = p->shape[0]};
    s->turning.tensor = NULL;
    PHX_TRY(phx__transposer_open(&s->turn, err));
    s->turning = p->place;
  }
  return phx__transposed_elements(&s->turn, first, numel, out, err);
}

/* ---- a folder ---- */
/* Only c_attn tells it: (width, 3 width), where ours is (3 width, width). */
static bool is_turned(const phx__tensor_files *files) {
  phx__tensor_place place;
  if (!place_of(files, "h.0.attn.c_attn.weight", &place)) return false;
  const phx__tensor *t = place.tensor;
  return t->ndim == 2 && t->shape[0] > 0 && t->shape[1] == 3 * t->shape[0];
}

static phx_status check_head(phx__source *s, const phx__tensor_place *head, phx_error *err) {
  phx_status status = PHX_OK;
  phx__source_param wte, own;
  float *a = phx__calloc(PHX__TOOL_PART, sizeof *a), *b = phx__calloc(PHX__TOOL_PART, sizeof *b);
  of_tensor(s, head, &own);
  if (!a || !b) {
    status = phx_fail(err, PHX_NOMEM, "no memory to compare %s", own.name);
    goto done;
  }
  bool same = phx__source_find(s, "wte.weight", &wte) && own.numel == wte.numel;
  for (int64_t at = 0; same && at < own.numel; at += PHX__TOOL_PART) {
    const int64_t n = own.numel - at < PHX__TOOL_PART ? own.numel - at : PHX__TOOL_PART;
    PHX_TRY_GOTO(phx__source_read(s, &own, at, n, a, err), status, done);
    PHX_TRY_GOTO(phx__source_read(s, &wte, at, n, b, err), status, done);
    same = !memcmp(a, b, (size_t)n * sizeof *a);
  }
  if (!same)
    status = phx_fail(err, PHX_UNSUPPORTED, "%s: %s differs from wte.weight, and the model's head is tied",
                      head->file->path, head->tensor->name);
done:
  phx__free(a);
  phx__free(b);
  return status;
}

static phx_status check_param(const phx__source *s, const phx__gpt2_param *p, bool *known, phx_error *err) {
  phx__tensor_place place;
  if (!place_of(s->files, p->name, &place))
    return phx_fail(err, PHX_INVALID, "%s has no tensor %s", s->files->path, p->name);
  const phx__tensor *t = place.tensor;
  known[place.index] = true;
  if (t->ndim == p->ndim && t->shape[0] == p->shape[0] && (t->ndim < 2 || t->shape[1] == p->shape[1])) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "%s: tensor %s has another shape than " PHX__GPT2_CONFIG " says",
                  place.file->path, t->name);
}

/* What is no parameter: masks, and one head. */
static phx_status check_other(phx__source *s, const phx__tensor_place *place, bool *head, phx_error *err) {
  const char *name = phx__gpt2_bare(place->tensor->name);
  phx__tensor_place same;
  if (phx__gpt2_mask(name)) return PHX_OK;
  if (!strcmp(name, "lm_head.weight") && !*head) {
    *head = true;
    return check_head(s, place, err);
  }
  if (name != place->tensor->name && phx__tensor_files_find(s->files, name, &same))
    return phx_fail(err, PHX_INVALID, "%s: tensor %s is there with and without 'transformer.'", place->file->path,
                    name);
  return phx_fail(err, PHX_INVALID, "%s: tensor %s is none of this model's", place->file->path, place->tensor->name);
}

static phx_status check_folder(phx__source *s, phx_error *err) {
  phx_status status = PHX_OK;
  bool head = false, *known = phx__calloc(s->files->n, sizeof *known);
  if (!known) return phx_fail(err, PHX_NOMEM, "no memory for the tensors of %s", s->path);
  for (uint32_t i = 0; i < phx__gpt2_n_params(&s->gpt2) && !status; i++) {
    const phx__gpt2_param p = phx__gpt2_param_at(&s->gpt2, i);
    status = check_param(s, &p, known, err);
  }
  for (uint32_t i = 0; i < s->files->n && !status; i++)
    if (!known[i]) status = check_other(s, &s->files->places[i], &head, err);
  phx__free(known);
  return status;
}

static int64_t step_of_files(const phx__tensor_files *files) {
  const char *text = phx__safetensors_metadata(files->files[0], "step");
  if (!text || !text[0] || strlen(text) > 18 || strspn(text, "0123456789") != strlen(text)) return -1;
  return strtoll(text, NULL, 10);
}

bool phx__source_is_folder(const char *dir) {
  return phx__is_there(dir, PHX__GPT2_WEIGHTS) || phx__is_there(dir, PHX__GPT2_WEIGHTS ".index.json");
}

static phx_status fill_folder(phx__source *s, phx_error *err) {
  s->seen = phx__sighting_of(s->path);
  PHX_TRY(phx__tensor_files_open(s->path, &s->files, err));
  s->kind = PHX__SOURCE_FOLDER;
  s->turned = is_turned(s->files);
  s->step = step_of_files(s->files);
  s->has_config = phx__is_there(s->path, PHX__GPT2_CONFIG);
  if (phx__is_there(s->path, "config.ini")) memcpy(s->run, s->path, sizeof s->run);
  if (!s->has_config && s->run[0]) return PHX_OK; /* a run of another model */
  s->has_config = true;
  phx_status status = phx__gpt2_read(s->path, &s->gpt2, err);
  if (!status) status = check_folder(s, err);
  return status == PHX_INVALID && s->run[0] ? PHX_IO : status; /* a run's own files fit, or are damaged */
}

/* ---- opening ---- */
static phx_status create(const char *path, phx__source **out, phx_error *err) {
  if (strlen(path) > 4000) return phx_fail(err, PHX_INVALID, "%.200s...: the path is too long", path);
  phx__source *s = *out = phx__calloc(1, sizeof *s);
  if (!s) return phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  s->step = -1;
  snprintf(s->path, sizeof s->path, "%s", path);
  s->blocks = phx__calloc(PHX__TOOL_PART + 2 * PHX_BLOCK, sizeof *s->blocks);
  s->raw = phx__calloc(PHX__TOOL_PART, 4);
  if (s->blocks && s->raw) return PHX_OK;
  return phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
}

/* By its name, or by what stands behind the length: a header that is JSON. */
static bool looks_like_safetensors(const char *path) {
  static const char suffix[] = ".safetensors";
  const size_t n = strlen(path);
  char head[9] = "";
  if (n >= sizeof suffix && !strcmp(path + n - (sizeof suffix - 1), suffix)) return true;
  const int fd = phx__sys.open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0);
  const bool read = fd >= 0 && phx__sys.pread(fd, head, sizeof head, 0) == (ssize_t)sizeof head;
  if (fd >= 0) phx__sys.close(fd);
  return fd < 0 || (read && head[8] == '{'); /* what cannot be opened is told by who tries */
}

static phx_status fill_file(phx__source *s, phx_error *err) {
  if (!looks_like_safetensors(s->path))
    return phx_fail(err, PHX_INVALID,
                    "%s is a file, and none of safetensors: name a run, a checkpoint's directory, a folder with "
                    PHX__GPT2_WEIGHTS ", or a .safetensors file", s->path);
  PHX_TRY(phx__tensor_files_open_one(s->path, &s->files, err));
  s->kind = PHX__SOURCE_FILE;
  s->turned = is_turned(s->files);
  s->step = step_of_files(s->files);
  return PHX_OK;
}

/* The run of RUN/checkpoints/step-N, by the directory's real place. */
static void find_run(phx__source *s) {
  char real[PATH_MAX];
  if (!realpath(s->path, real)) return;
  char *leaf = strrchr(real, '/');
  if (!leaf) return;
  *leaf = 0;
  char *parent = strrchr(real, '/');
  if (!parent || strcmp(parent + 1, "checkpoints") != 0) return;
  *parent = 0;
  if (phx__is_there(real, "config.ini")) snprintf(s->run, sizeof s->run, "%s", real); /* PATH_MAX fits */
}

static phx_status fill_checkpoint(phx__source *s, phx_error *err) {
  char dir[PHX__TOOL_PATH];
  phx__sighting seen;
  PHX_TRY(phx__checkpoint_resolve_open(s->path, dir, &seen, &s->reader, err));
  s->seen = seen;
  s->kind = PHX__SOURCE_CHECKPOINT;
  s->step = s->reader->manifest->step;
  memcpy(s->path, dir, sizeof s->path);
  find_run(s);
  return PHX_OK;
}

/* The step that a checkpoint's name tells; -1: its name tells none. */
static int64_t step_of_name(const char *dir) {
  const char *slash = strrchr(dir, '/'), *leaf = slash ? slash + 1 : dir;
  return phx__is_step_name(leaf) ? strtoll(leaf + 5, NULL, 10) : -1;
}

static void forget_folder(phx__source *s) {
  phx__transposer_close(&s->turn);
  phx__tensor_files_close(s->files);
  s->files = NULL;
  s->turning.tensor = NULL;
  s->turned = s->has_config = false;
  s->run[0] = 0;
}

/* The final weights of a run, where they are newer than its checkpoint; damaged, they leave the checkpoint as it is. */
static phx_status fill_newer_folder(phx__source *s, int64_t step, bool *filled, phx_error *err) {
  char text[PHX__TOOL_PATH + 640]; /* two names and a message */
  phx_error why = PHX_ERROR_INIT;
  phx__tensor_files *files = NULL;
  phx_status status = phx__tensor_files_open(s->path, &files, &why);
  const bool newer = !status && step_of_files(files) > step;
  phx__tensor_files_close(files);
  if (newer) status = fill_folder(s, &why);
  *filled = newer && !status;
  if (!status) return PHX_OK;
  forget_folder(s);
  if (status != PHX_IO && status != PHX_INVALID) return phx_fail(err, status, "%s", why.message);
  snprintf(text, sizeof text, "the final weights of %s cannot be used: %s; takes the checkpoint of step %" PRId64,
           s->path, why.message, step);
  phx__log(0, "checkpoint", PHX_LOG_WARN, text);
  return PHX_OK;
}

static phx_status fill(phx__source *s, phx_error *err) {
  char dir[PHX__TOOL_PATH];
  bool filled = false;
  struct stat st;
  if (!stat(s->path, &st) && !S_ISDIR(st.st_mode)) return fill_file(s, err);
  const bool weights = phx__source_is_folder(s->path);
  const bool checkpoints = phx__has_checkpoints(s->path) || phx__is_there(s->path, PHX__MANIFEST_NAME);
  if (weights && !checkpoints) return fill_folder(s, err);
  if (!checkpoints && step_of_name(s->path) < 0)
    return phx_fail(err, PHX_INVALID,
                    "%s holds no model: it is neither a checkpoint (it has no " PHX__MANIFEST_NAME
                    ") nor a run with checkpoints, and has neither " PHX__GPT2_WEIGHTS " nor " PHX__GPT2_WEIGHTS
                    ".index.json", s->path);
  phx_status status = phx__checkpoint_resolve(s->path, dir, err);
  if (status) return status;
  if (weights) status = fill_newer_folder(s, step_of_name(dir), &filled, err);
  if (status || filled) return status;
  /* without `latest`, the checkpoint's own name was told, and is enough */
  if (!phx__is_there(s->path, "checkpoints/latest")) memcpy(s->path, dir, sizeof s->path);
  return fill_checkpoint(s, err);
}

phx_status phx__source_open(const char *path, phx__source **out, phx_error *err) {
  phx__source *s = NULL;
  phx_status status = create(path, &s, err);
  if (!status) s->seen = phx__sighting_of(path);
  if (!status) status = phx__source_explain(s, fill(s, err), err);
  if (status) phx__source_close(s);
  else *out = s;
  return status;
}

phx_status phx__source_open_folder(const char *path, phx__source **out, phx_error *err) {
  phx__source *s = NULL;
  phx_status status = create(path, &s, err);
  if (!status) status = phx__source_explain(s, fill_folder(s, err), err);
  if (status) phx__source_close(s);
  else *out = s;
  return status;
}

phx_status phx__source_explain(const phx__source *s, phx_status status, phx_error *err) {
  return s ? phx__sighting_explain(&s->seen, s->path, status, err) : status;
}

void phx__source_close(phx__source *s) {
  if (!s) return;
  phx__transposer_close(&s->turn);
  phx__checkpoint_reader_close(s->reader);
  phx__tensor_files_close(s->files);
  phx__free(s->blocks);
  phx__free(s->raw);
  phx__free(s);
}
