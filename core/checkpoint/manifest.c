/* core/checkpoint/manifest.c - see manifest.h: filling a manifest, and its text.
 *
 * Rules are in manifest_check.c, reading in manifest_read.c.  Nothing is written that reading would refuse. */
#include "checkpoint/manifest.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/manifest_inner.h"

phx__manifest *phx__manifest_create(void) { return phx__calloc(1, sizeof(phx__manifest)); }

static void free_pairs(phx__manifest_pair *pairs, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) {
    phx__free(pairs[i].section);
    phx__free(pairs[i].key);
    phx__free(pairs[i].value);
  }
  phx__free(pairs);
}

void phx__manifest_free(phx__manifest *m) {
  if (!m) return;
  phx__free(m->optimizer);
  for (uint32_t i = 0; i < PHX_OPTIM_STATES_MAX; i++) phx__free(m->states[i].name);
  for (uint32_t i = 0; i < m->n_plugins; i++) {
    phx__free(m->plugins[i].kind);
    phx__free(m->plugins[i].id);
    phx__free(m->plugins[i].version);
    phx__free(m->plugins[i].sha256);
  }
  phx__free(m->plugins);
  for (uint32_t i = 0; i < m->n_units; i++) phx__free(m->units[i].name);
  phx__free(m->units);
  for (uint32_t i = 0; i < m->n_params; i++) phx__free(m->params[i].name);
  phx__free(m->params);
  free_pairs(m->config, m->n_config);
  free_pairs(m->identity, m->n_identity);
  for (uint32_t i = 0; i < m->n_files; i++) {
    phx__free(m->files[i].name);
    phx__free(m->files[i].chunks);
  }
  phx__free(m->files);
  for (uint32_t i = 0; i < m->n_data; i++) phx__free(m->data[i].name);
  phx__free(m->data);
  phx__free(m->slices);
  phx__free(m->privates);
  phx__free(m);
}

/* ---- filling ---- */
static phx_status no_memory(phx_error *err) { return phx_fail(err, PHX_NOMEM, "no memory for a manifest"); }

/* Room for one more element in front of n; false: no memory. */
static bool grow(void **array, uint32_t *room, uint32_t n, size_t bytes) {
  if (n < *room) return true;
  const uint32_t more = n ? n * 2 : 16;
  void *p = phx__sys.realloc(*array, more * bytes);
  if (!p) return false;
  *array = p;
  *room = more;
  return true;
}
#define GROW(m, array, n, index) grow((void **)&(m)->array, &(m)->room[index], (m)->n, sizeof *(m)->array)

phx_status phx__manifest_set_model(phx__manifest *m, const phx_model *model, phx_error *err) {
  m->units = phx__calloc(model->n_units, sizeof *m->units);
  m->params = phx__calloc(model->n_params, sizeof *m->params);
  if (!m->units || !m->params) return no_memory(err);
  for (uint32_t i = 0; i < model->n_units; i++) {
    const phx_unit *from = phx_model_unit(model, i);
    phx__manifest_unit *to = &m->units[m->n_units++];
    if (!(to->name = phx__strdup(from->name))) return no_memory(err);
    memcpy(to->blocks, from->blocks, sizeof to->blocks);
  }
  for (uint32_t i = 0; i < model->n_params; i++) {
    const phx_param *from = phx_model_param(model, i);
    phx__manifest_param *to = &m->params[m->n_params++];
    *to = (phx__manifest_param){.name = phx__strdup(from->name), .ndim = from->ndim, .unit = from->unit,
                                .flat = from->flags & PHX_PARAM_FROZEN ? PHX_FLAT_FROZEN : PHX_FLAT_TRAINABLE,
                                .numel = from->numel, .offset = from->offset};
    memcpy(to->shape, from->shape, sizeof to->shape);
    if (!to->name) return no_memory(err);
  }
  return PHX_OK;
}

phx_status phx__manifest_add_plugin(phx__manifest *m, const char *kind, const char *id, const char *version,
                                    const char *sha256, phx_error *err) {
  if (!GROW(m, plugins, n_plugins, 0)) return no_memory(err);
  phx__manifest_plugin *p = &m->plugins[m->n_plugins++];
  *p = (phx__manifest_plugin){phx__strdup(kind), phx__strdup(id), phx__strdup(version), phx__strdup(sha256)};
  return p->kind && p->id && p->version && p->sha256 ? PHX_OK : no_memory(err);
}

static phx_status fill_pair(phx__manifest_pair *p, const char *section, const char *key, const char *value,
                            phx_error *err) {
  *p = (phx__manifest_pair){phx__strdup(section), phx__strdup(key), phx__strdup(value)};
  return p->section && p->key && p->value ? PHX_OK : no_memory(err);
}

phx_status phx__manifest_add_config(phx__manifest *m, const char *section, const char *key, const char *value,
                                    phx_error *err) {
  if (!GROW(m, config, n_config, 1)) return no_memory(err);
  return fill_pair(&m->config[m->n_config++], section, key, value, err);
}

phx_status phx__manifest_add_identity(phx__manifest *m, const char *key, const char *value, phx_error *err) {
  if (!GROW(m, identity, n_identity, 2)) return no_memory(err);
  return fill_pair(&m->identity[m->n_identity++], "identity", key, value, err);
}

phx_status phx__manifest_add_file(phx__manifest *m, const char *name, int64_t bytes, const uint64_t *chunks,
                                  phx_error *err) {
  const size_t n = (size_t)phx__chunks_count(bytes);
  if (!GROW(m, files, n_files, 3)) return no_memory(err);
  phx__manifest_file *f = &m->files[m->n_files++];
  *f = (phx__manifest_file){phx__strdup(name), bytes, phx__calloc(n, sizeof *f->chunks)};
  if (!f->name || !f->chunks) return no_memory(err);
  if (n) memcpy(f->chunks, chunks, n * sizeof *chunks);
  return PHX_OK;
}

phx_status phx__manifest_add_data(phx__manifest *m, const phx__manifest_data *file, phx_error *err) {
  if (!GROW(m, data, n_data, 6)) return no_memory(err);
  phx__manifest_data *d = &m->data[m->n_data++];
  *d = *file;
  d->name = phx__strdup(file->name);
  return d->name ? PHX_OK : no_memory(err);
}

phx_status phx__manifest_add_slice(phx__manifest *m, const phx__manifest_slice *slice, phx_error *err) {
  if (!GROW(m, slices, n_slices, 4)) return no_memory(err);
  m->slices[m->n_slices++] = *slice;
  return PHX_OK;
}

phx_status phx__manifest_add_private(phx__manifest *m, const phx__manifest_private *slice, phx_error *err) {
  if (!GROW(m, privates, n_privates, 5)) return no_memory(err);
  m->privates[m->n_privates++] = *slice;
  return PHX_OK;
}

const phx__manifest_plugin *phx__manifest_plugin_of(const phx__manifest *m, const char *kind) {
  for (uint32_t i = 0; i < m->n_plugins; i++)
    if (!strcmp(m->plugins[i].kind, kind)) return &m->plugins[i];
  return NULL;
}

const char *phx__manifest_config_of(const phx__manifest *m, const char *section, const char *key) {
  for (uint32_t i = 0; i < m->n_config; i++)
    if (!strcmp(m->config[i].section, section) && !strcmp(m->config[i].key, key)) return m->config[i].value;
  return NULL;
}

const char *phx__manifest_identity_of(const phx__manifest *m, const char *key) {
  for (uint32_t i = 0; i < m->n_identity; i++)
    if (!strcmp(m->identity[i].key, key)) return m->identity[i].value;
  return NULL;
}

/* ---- the text: one element of a list a line, so that people can read and compare it ---- */
static void print_string(phx__text *t, const char *name, const char *value) {
  phx__text_add(t, "\"%s\":", name);
  phx__text_json(t, value);
}

static void print_plugin(phx__text *t, const phx__manifest_plugin *p) {
  print_string(t, "id", p->id);
  phx__text_add(t, ",");
  print_string(t, "version", p->version);
  phx__text_add(t, ",");
  print_string(t, "sha256", p->sha256);
}

static void print_data(phx__text *t, const phx__manifest *m) {
  phx__text_add(t, "\"data\":{\"seed\":\"%" PRIu64 "\",\"samples\":%" PRId64, m->data_seed, m->samples);
  if (m->skipped > 0) phx__text_add(t, ",\"skipped\":%" PRId64, m->skipped);
  if (m->data_sequence > 0) {
    phx__text_add(t, ",\"sequence\":%" PRId64 ",\"batch\":%" PRId64 ",\"files\":[", m->data_sequence, m->data_batch);
    for (uint32_t i = 0; i < m->n_data; i++) {
      phx__text_add(t, i ? ",\n{" : "\n{");
      print_string(t, "name", m->data[i].name);
      phx__text_add(t, ",\"bytes\":%" PRId64 ",\"windows\":%" PRId64 ",\"xxh128\":\"%016" PRIx64 "%016" PRIx64 "\"}",
                    m->data[i].bytes, m->data[i].windows, m->data[i].high, m->data[i].low);
    }
    phx__text_add(t, "]");
  }
  phx__text_add(t, "},\n");
}

static void print_head(phx__text *t, const phx__manifest *m) {
  phx__text_add(t, "{\"format\":\"phalanx-checkpoint\",\"version\":%d,\n\"step\":%" PRId64 ",\"time\":%" PRId64 ",\n",
                PHX__MANIFEST_VERSION, m->step, m->time);
  print_data(t, m);
  phx__text_add(t, "\"generator\":{\"seed\":\"%" PRIu64 "\"},\n", m->generator_seed);
  phx__text_add(t, "\"state_hash\":\"%s\",\"ranks\":%" PRId32 ",\n\"strategy\":{", m->state_hash, m->ranks);
  print_plugin(t, phx__manifest_plugin_of(m, "strategy"));
  phx__text_add(t, "},\n\"plugins\":[");
  bool first = true;
  for (uint32_t i = 0; i < m->n_plugins; i++) {
    if (!strcmp(m->plugins[i].kind, "strategy")) continue;
    phx__text_add(t, first ? "\n{" : ",\n{");
    first = false;
    print_string(t, "kind", m->plugins[i].kind);
    phx__text_add(t, ",");
    print_plugin(t, &m->plugins[i]);
    phx__text_add(t, "}");
  }
  phx__text_add(t, "],\n");
}

static void print_model(phx__text *t, const phx__manifest *m) {
  phx__text_add(t, "\"model\":{\"units\":[");
  for (uint32_t i = 0; i < m->n_units; i++) {
    phx__text_add(t, i ? ",\n{" : "\n{");
    print_string(t, "name", m->units[i].name);
    phx__text_add(t, ",\"blocks\":[%" PRId64 ",%" PRId64 "]}", m->units[i].blocks[0], m->units[i].blocks[1]);
  }
  phx__text_add(t, "],\n\"params\":[");
  for (uint32_t i = 0; i < m->n_params; i++) {
    const phx__manifest_param *p = &m->params[i];
    phx__text_add(t, i ? ",\n{" : "\n{");
    print_string(t, "name", p->name);
    phx__text_add(t, ",\"shape\":[");
    for (uint32_t d = 0; d < p->ndim; d++) phx__text_add(t, d ? ",%" PRId64 : "%" PRId64, p->shape[d]);
    phx__text_add(t, "],\"dtype\":\"F32\",\"unit\":%" PRIu32 ",\"flat\":%" PRIu32 ",\"offset\":%" PRId64 "}", p->unit,
                  p->flat, p->offset);
  }
  phx__text_add(t, "]},\n\"optimizer\":{");
  print_string(t, "name", m->optimizer);
  phx__text_add(t, ",\"states\":[");
  for (uint32_t i = 0; i < m->n_states; i++) {
    phx__text_add(t, i ? ",{" : "{");
    print_string(t, "name", m->states[i].name);
    phx__text_add(t, ",\"dtype\":\"%s\"}", phx__dtype_name(m->states[i].dtype));
  }
  phx__text_add(t, "]},\n");
}

static bool seen_before(const phx__manifest_pair *pairs, uint32_t i) {
  for (uint32_t j = 0; j < i; j++)
    if (!strcmp(pairs[j].section, pairs[i].section)) return true;
  return false;
}

static void print_section(phx__text *t, const phx__manifest_pair *pairs, uint32_t n, const char *section) {
  bool first = true;
  phx__text_json(t, section);
  phx__text_add(t, ":{");
  for (uint32_t i = 0; i < n; i++) {
    if (strcmp(pairs[i].section, section)) continue;
    phx__text_add(t, first ? "" : ",");
    first = false;
    phx__text_json(t, pairs[i].key);
    phx__text_add(t, ":");
    phx__text_json(t, pairs[i].value);
  }
  phx__text_add(t, "}");
}

static void print_config(phx__text *t, const phx__manifest *m) {
  bool first = true;
  phx__text_add(t, "\"config\":{");
  for (uint32_t i = 0; i < m->n_config; i++) {
    if (seen_before(m->config, i)) continue;
    phx__text_add(t, first ? "\n" : ",\n");
    first = false;
    print_section(t, m->config, m->n_config, m->config[i].section);
  }
  phx__text_add(t, "},\n");
  print_section(t, m->identity, m->n_identity, "identity");
  phx__text_add(t, ",\n");
}

static void print_files(phx__text *t, const phx__manifest *m) {
  phx__text_add(t, "\"files\":[");
  for (uint32_t i = 0; i < m->n_files; i++) {
    phx__text_add(t, i ? ",\n{" : "\n{");
    print_string(t, "name", m->files[i].name);
    phx__text_add(t, ",\"bytes\":%" PRId64 ",\"chunks\":[", m->files[i].bytes);
    for (int64_t c = 0; c < phx__chunks_count(m->files[i].bytes); c++)
      phx__text_add(t, c ? ",\"%016" PRIx64 "\"" : "\"%016" PRIx64 "\"", m->files[i].chunks[c]);
    phx__text_add(t, "]}");
  }
  phx__text_add(t, "],\n");
}

static void print_slices(phx__text *t, const phx__manifest *m) {
  phx__text_add(t, "\"slices\":[");
  for (uint32_t i = 0; i < m->n_slices; i++) {
    const phx__manifest_slice *s = &m->slices[i];
    phx__text_add(t, "%s\n{\"kind\":\"%s\",\"index\":%" PRIu32 ",\"unit\":%" PRIu32 ",\"flat\":%" PRIu32
                  ",\"first_block\":%" PRId64 ",\"blocks\":%" PRId64 ",\"dtype\":\"%s\",\"file\":%" PRIu32
                  ",\"offset\":%" PRId64 "}", i ? "," : "", phx__state_kind_names[s->kind], s->index, s->unit, s->flat,
                  s->first_block, s->blocks, phx__dtype_name(s->dtype), s->file, s->offset);
  }
  phx__text_add(t, "],\n\"private\":[");
  for (uint32_t i = 0; i < m->n_privates; i++) {
    const phx__manifest_private *s = &m->privates[i];
    phx__text_add(t, i ? ",\n{" : "\n{");
    print_string(t, "name", s->name);
    phx__text_add(t, ",\"rank\":%" PRId32 ",\"unit\":%" PRIu32 ",\"flat\":%" PRIu32 ",\"first_block\":%" PRId64
                  ",\"blocks\":%" PRId64 ",\"dtype\":\"%s\",\"file\":%" PRIu32 ",\"offset\":%" PRId64 "}", s->rank,
                  s->unit, s->flat, s->first_block, s->blocks, phx__dtype_name(s->dtype), s->file, s->offset);
  }
  phx__text_add(t, "]");
}

void phx__manifest_checksum(const char *text, size_t bytes, char digits[33]) {
  XXH3_state_t *state = XXH3_createState();
  XXH128_hash_t h = {0, 0};
  digits[0] = 0; /* fits no checksum: without memory a manifest is neither written nor read */
  if (!state) return;
  XXH3_128bits_reset(state);
  XXH3_128bits_update(state, text, bytes);
  XXH3_128bits_update(state, "}", 1);
  h = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  snprintf(digits, 33, "%016" PRIx64 "%016" PRIx64, h.high64, h.low64);
}

phx_status phx__manifest_print(const char *path, phx__manifest *m, char **text, size_t *bytes, phx_error *err) {
  phx__text t = {0};
  char digits[33];
  phx_status status = phx__manifest_check(path, m, err);
  if (status) return status;
  print_head(&t, m);
  print_model(&t, m);
  print_config(&t, m);
  print_files(&t, m);
  print_slices(&t, m);
  if (!t.failed) phx__manifest_checksum(t.data, t.bytes, digits);
  if (!t.failed) phx__text_add(&t, PHX__MANIFEST_BEFORE_SUM "%s" PHX__MANIFEST_AFTER_SUM, digits);
  if (t.failed || !digits[0]) status = phx_fail(err, PHX_NOMEM, "no memory for %s", path);
  else if (t.bytes > PHX__MANIFEST_BYTES_MOST)
    status = phx_fail(err, PHX_UNSUPPORTED, "%s would have %zu bytes; %d are the most", path, t.bytes,
                      PHX__MANIFEST_BYTES_MOST);
  if (status) {
    phx__free(t.data);
    return status;
  }
  *text = t.data;
  *bytes = t.bytes;
  return PHX_OK;
}

phx_status phx__manifest_write(const char *dir, phx__manifest *m, phx_error *err) {
  char path[4200], *text = NULL;
  size_t bytes = 0;
  snprintf(path, sizeof path, "%s/" PHX__MANIFEST_NAME, dir);
  phx_status status = phx__manifest_print(path, m, &text, &bytes, err);
  if (status) return status;
  const int fd = phx__sys.open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0) status = phx_fail_errno(err, PHX_IO, errno, "cannot create %s", path);
  if (!status) status = phx__file_write(fd, path, text, (int64_t)bytes, 0, err);
  if (!status && phx__sys.fsync(fd)) status = phx_fail_errno(err, PHX_IO, errno, "cannot flush %s", path);
  if (fd >= 0 && phx__sys.close(fd) && !status) status = phx_fail_errno(err, PHX_IO, errno, "cannot close %s", path);
  phx__free(text);
  return status;
}
