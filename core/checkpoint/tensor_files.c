/* core/checkpoint/tensor_files.c - see tensor_files.h.
 *
 * The index is JSON from anywhere: it is read under limits, and a file that it names is one in the same directory. */
#include "checkpoint/tensor_files.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"

enum { FILES_MOST = 4096, INDEX_MOST = 64 << 20, PATH = 4200 };

static phx_status no_memory(const phx__tensor_files *t, phx_error *err) {
  return phx_fail(err, PHX_NOMEM, "no memory for the tensors of %s", t->path);
}

static phx_status begin(const char *path, uint32_t most, phx__tensor_files **out, phx_error *err) {
  phx__tensor_files *t = *out = phx__calloc(1, sizeof *t);
  if (!t) return phx_fail(err, PHX_NOMEM, "no memory for the tensors of %s", path);
  t->path = phx__strdup(path);
  t->files = phx__calloc(most, sizeof *t->files);
  if (t->path && t->files) return PHX_OK;
  return phx_fail(err, PHX_NOMEM, "no memory for the tensors of %s", path);
}

/* All files are open. */
static phx_status list(phx__tensor_files *t, phx_error *err) {
  size_t n = 0;
  for (uint32_t f = 0; f < t->n_files; f++) n += t->files[f]->n;
  t->places = phx__calloc(n, sizeof *t->places);
  if (!t->places) return no_memory(t, err);
  for (uint32_t f = 0; f < t->n_files; f++)
    for (uint32_t i = 0; i < t->files[f]->n; i++) {
      t->places[t->n] = (phx__tensor_place){t->files[f], &t->files[f]->tensors[i], t->n};
      t->n++;
    }
  return PHX_OK;
}

static phx_status add(phx__tensor_files *t, const char *path, phx_error *err) {
  const phx_status status = phx__safetensors_open(path, &t->files[t->n_files], err);
  if (!status) t->n_files++;
  return status;
}

/* ---- an index ---- */
static phx_status read_index(const char *path, cJSON **out, phx_error *err) {
  static const phx__json_limits limits = {.depth = 6, .values = 1u << 16, .fractions = true};
  int fd = -1;
  int64_t bytes = 0;
  char *text = NULL;
  phx_status status = phx__file_open(path, &fd, &bytes, err);
  if (status) return status;
  if (bytes > INDEX_MOST)
    status = phx_fail(err, PHX_IO, "%s has %lld bytes; %d are the most", path, (long long)bytes, INDEX_MOST);
  else if (!(text = phx__calloc(1, (size_t)bytes + 1)))
    status = phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  else status = phx__file_read(fd, path, text, bytes, 0, err);
  phx__sys.close(fd);
  if (!status) status = phx__json_read(path, text, (size_t)bytes, &limits, out, err);
  phx__free(text);
  return status;
}

static const char *base_name(const char *path) { return strrchr(path, '/') + 1; }

/* The number of the file, or t->n_files. */
static uint32_t file_number(const phx__tensor_files *t, const char *name) {
  uint32_t f = t->n_files;
  while (f > 0 && strcmp(base_name(t->files[f - 1]->path), name)) f--; /* mostly the last */
  return f ? f - 1 : t->n_files;
}

static phx_status open_named(phx__tensor_files *t, const char *dir, const cJSON *item, phx_error *err) {
  char path[PATH];
  const char *name = cJSON_GetStringValue(item);
  if (!name || !name[0] || name[0] == '.' || strchr(name, '/') || strlen(name) > 255)
    return phx_fail(err, PHX_IO, "%s: tensor %.200s is in no file of this directory", t->path, item->string);
  if (file_number(t, name) < t->n_files) return PHX_OK;
  if (t->n_files == FILES_MOST) return phx_fail(err, PHX_IO, "%s names more than %d files", t->path, FILES_MOST);
  snprintf(path, sizeof path, "%.3900s/%s", dir, name);
  return add(t, path, err);
}

static phx_status check_index(const phx__tensor_files *t, const cJSON *map, phx_error *err) {
  const cJSON *item;
  uint32_t listed = 0;
  cJSON_ArrayForEach(item, map) {
    const phx__safetensors *st = t->files[file_number(t, item->valuestring)];
    if (!phx__safetensors_find(st, item->string))
      return phx_fail(err, PHX_IO, "%s: tensor %.200s is not in %s", t->path, item->string, item->valuestring);
    listed++;
  }
  if (listed == t->n) return PHX_OK; /* names stand once in the index: each tensor is there */
  for (uint32_t i = 0; i < t->n; i++) {
    const cJSON *place = cJSON_GetObjectItemCaseSensitive(map, t->places[i].tensor->name);
    if (!place || strcmp(place->valuestring, base_name(t->places[i].file->path)))
      return phx_fail(err, PHX_IO, "%s does not list tensor %s of %s", t->path, t->places[i].tensor->name,
                      t->places[i].file->path);
  }
  return PHX_OK;
}

static phx_status open_index(const char *dir, const char *path, phx__tensor_files **out, phx_error *err) {
  phx_status status = PHX_OK;
  cJSON *root = NULL;
  const cJSON *item;
  phx__tensor_files *t = NULL;
  PHX_TRY_GOTO(begin(path, FILES_MOST, &t, err), status, done);
  PHX_TRY_GOTO(read_index(path, &root, err), status, done);
  const cJSON *map = cJSON_GetObjectItemCaseSensitive(root, "weight_map");
  if (!cJSON_IsObject(map) || !map->child) {
    status = phx_fail(err, PHX_IO, "%s has no weight_map", path);
    goto done;
  }
  cJSON_ArrayForEach(item, map) PHX_TRY_GOTO(open_named(t, dir, item, err), status, done);
  PHX_TRY_GOTO(list(t, err), status, done);
  PHX_TRY_GOTO(check_index(t, map, err), status, done);
  *out = t;
done:
  cJSON_Delete(root);
  if (status) phx__tensor_files_close(t);
  return status;
}

phx_status phx__tensor_files_open_one(const char *path, phx__tensor_files **out, phx_error *err) {
  phx__tensor_files *t = NULL;
  phx_status status = begin(path, 1, &t, err);
  if (!status) status = add(t, path, err);
  if (!status) status = list(t, err);
  if (status) phx__tensor_files_close(t);
  else *out = t;
  return status;
}

phx_status phx__tensor_files_open(const char *dir, phx__tensor_files **out, phx_error *err) {
  char one[PATH], index[PATH];
  if (strlen(dir) > 3900) return phx_fail(err, PHX_INVALID, "%.200s... is too long for a path", dir);
  snprintf(one, sizeof one, "%.3900s/model.safetensors", dir);
  snprintf(index, sizeof index, "%.3900s/model.safetensors.index.json", dir);
  const bool is_one = !access(one, F_OK), is_index = !access(index, F_OK);
  if (is_one && is_index)
    return phx_fail(err, PHX_INVALID, "%s and %s are both there: take away the one that is not the model", one, index);
  if (is_one) return phx__tensor_files_open_one(one, out, err);
  if (is_index) return open_index(dir, index, out, err);
  return phx_fail(err, PHX_INVALID, "%s has neither model.safetensors nor model.safetensors.index.json", dir);
}

void phx__tensor_files_close(phx__tensor_files *t) {
  if (!t) return;
  for (uint32_t f = 0; f < t->n_files; f++) phx__safetensors_close(t->files[f]);
  phx__free(t->files);
  phx__free(t->places);
  phx__free(t->path);
  phx__free(t);
}

bool phx__tensor_files_find(const phx__tensor_files *t, const char *name, phx__tensor_place *out) {
  uint32_t before = 0;
  for (uint32_t f = 0; f < t->n_files; f++) {
    const phx__tensor *tensor = phx__safetensors_find(t->files[f], name);
    if (tensor) {
      *out = t->places[before + (uint32_t)(tensor - t->files[f]->tensors)];
      return true;
    }
    before += t->files[f]->n;
  }
  return false;
}
