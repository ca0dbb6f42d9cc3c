/* tests/support/hf_folder.c - see hf_folder.h. */
#include "hf_folder.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(condition, ...)        \
  do {                              \
    if (!(condition)) {             \
      fprintf(stderr, __VA_ARGS__); \
      fprintf(stderr, "\n");        \
      abort();                      \
    }                               \
  } while (0)

static char *whole_file(const char *path, size_t *bytes) {
  FILE *f = fopen(path, "r");
  MUST(f, "cannot open %s", path);
  fseek(f, 0, SEEK_END);
  *bytes = (size_t)ftell(f);
  rewind(f);
  char *data = calloc(1, *bytes + 1);
  MUST(data && fread(data, 1, *bytes, f) == *bytes, "cannot read %s", path);
  fclose(f);
  return data;
}

hf_file hf_read(const char *path) {
  size_t bytes;
  uint64_t length;
  hf_file f = {0};
  char *data = whole_file(path, &bytes);
  MUST(bytes > 8, "%s is short", path);
  memcpy(&length, data, 8);
  cJSON *root = cJSON_ParseWithLength(data + 8, length), *t, *d;
  MUST(root, "%s: no JSON", path);
  f.tensors = calloc((size_t)cJSON_GetArraySize(root), sizeof *f.tensors);
  cJSON_ArrayForEach(t, root) {
    if (!strcmp(t->string, "__metadata__")) {
      char *text = cJSON_PrintUnformatted(t);
      snprintf(f.metadata, sizeof f.metadata, "%s", text);
      free(text);
      continue;
    }
    hf_tensor *to = &f.tensors[f.n++];
    snprintf(to->name, sizeof to->name, "%s", t->string);
    to->numel = 1;
    MUST(!strcmp(cJSON_GetObjectItem(t, "dtype")->valuestring, "F32"), "%s is not F32", t->string);
    cJSON_ArrayForEach(d, cJSON_GetObjectItem(t, "shape")) {
      to->shape[to->ndim++] = (int64_t)d->valuedouble;
      to->numel *= (int64_t)d->valuedouble;
    }
    const size_t at = 8 + length + (size_t)cJSON_GetArrayItem(cJSON_GetObjectItem(t, "data_offsets"), 0)->valuedouble;
    MUST(at + (size_t)to->numel * 4 <= bytes, "%s: %s lies outside", path, t->string);
    to->data = calloc((size_t)to->numel, 4);
    memcpy(to->data, data + at, (size_t)to->numel * 4);
  }
  cJSON_Delete(root);
  free(data);
  return f;
}

void hf_free(hf_file *f) {
  for (int i = 0; i < f->n; i++) free(f->tensors[i].data);
  free(f->tensors);
}

hf_tensor *hf_find(hf_file *f, const char *name) {
  for (int i = 0; i < f->n; i++)
    if (!strcmp(f->tensors[i].name, name)) return &f->tensors[i];
  return NULL;
}

void hf_write(const hf_file *f, int from, int to, const char *path) {
  cJSON *root = cJSON_CreateObject();
  double at = 0;
  for (int i = from; i < to; i++) {
    const hf_tensor *t = &f->tensors[i];
    cJSON *one = cJSON_AddObjectToObject(root, t->name);
    cJSON_AddStringToObject(one, "dtype", "F32");
    cJSON *shape = cJSON_AddArrayToObject(one, "shape");
    for (int d = 0; d < t->ndim; d++) cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)t->shape[d]));
    cJSON *offsets = cJSON_AddArrayToObject(one, "data_offsets");
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber(at));
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber(at += 4.0 * (double)t->numel));
  }
  char *text = cJSON_PrintUnformatted(root);
  const uint64_t length = strlen(text);
  FILE *out = fopen(path, "w");
  MUST(out, "cannot create %s", path);
  fwrite(&length, 8, 1, out);
  fwrite(text, 1, length, out);
  for (int i = from; i < to; i++) fwrite(f->tensors[i].data, 4, (size_t)f->tensors[i].numel, out);
  MUST(!fclose(out), "cannot write %s", path);
  free(text);
  cJSON_Delete(root);
}

/* Conv1D's (in, out). */
static int is_turned(const char *name) {
  return strstr(name, ".c_attn.weight") || strstr(name, ".c_proj.weight") || strstr(name, ".c_fc.weight");
}

reference_gpt *hf_reference(const char *dir) {
  char path[600];
  size_t bytes;
  snprintf(path, sizeof path, "%s/config.json", dir);
  char *text = whole_file(path, &bytes);
  cJSON *c = cJSON_Parse(text);
  MUST(c, "%s is no JSON", path);
#define SIZE(name) ((int)cJSON_GetObjectItem(c, name)->valuedouble)
  reference_gpt *g = reference_gpt_create(SIZE("n_layer"), SIZE("n_head"), SIZE("n_embd"), SIZE("n_positions"),
                                          SIZE("vocab_size"));
#undef SIZE
  g->eps = cJSON_GetObjectItem(c, "layer_norm_epsilon")->valuedouble;
  snprintf(path, sizeof path, "%s/model.safetensors", dir);
  hf_file f = hf_read(path);
  MUST(f.n == g->n_tensors, "%s has %d tensors, not %d", path, f.n, g->n_tensors);
  for (int i = 0; i < g->n_tensors; i++) {
    reference_tensor *to = &g->tensors[i];
    const hf_tensor *from = hf_find(&f, to->name);
    MUST(from && from->numel == to->numel, "%s: %s", path, to->name);
    const int64_t rows = from->shape[0], columns = from->ndim == 2 ? from->shape[1] : 1;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < columns; k++)
        to->value[is_turned(to->name) ? k * rows + r : r * columns + k] = (double)from->data[r * columns + k];
  }
  hf_free(&f);
  cJSON_Delete(c);
  free(text);
  return g;
}
