/* core/checkpoint/manifest_read.c - see manifest.h: from text to structs.
 *
 * The checksum is compared first, so that what is parsed is what somebody wrote; the limits are for what somebody
 * wrote on purpose.  Every member must be there and none besides.  A reader keeps the first failure; after it nothing
 * is read. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/manifest.h"
#include "checkpoint/manifest_inner.h"

typedef struct reader {
  const char *path;
  char where[64]; /* "slices[12]", or "" */
  phx_status status;
  phx_error *err;
} reader;

static void bad(reader *r, const char *name, const char *what) {
  if (r->status) return;
  r->status = phx_fail(r->err, PHX_IO, "%s: %s%s%s %s", r->path, r->where, r->where[0] ? "." : "", name, what);
}

static void no_memory(reader *r) {
  if (!r->status) r->status = phx_fail(r->err, PHX_NOMEM, "no memory to read %s", r->path);
}

static const cJSON *member(reader *r, const cJSON *parent, const char *name) {
  if (r->status) return NULL;
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(parent, name);
  if (!item) bad(r, name, "is missing");
  return item;
}

/* An object of exactly n members. */
static void object_of(reader *r, const cJSON *item, const char *name, int n) {
  if (r->status) return;
  if (!cJSON_IsObject(item)) bad(r, name, "is not an object");
  else if (cJSON_GetArraySize(item) != n) bad(r, name, "has other members than it should");
}

static int64_t integer(reader *r, const cJSON *parent, const char *name, int64_t lo, int64_t hi) {
  int64_t value = 0;
  const cJSON *item = member(r, parent, name);
  if (item && !phx__json_integer(item, lo, hi, &value)) bad(r, name, "is not a possible number");
  return value;
}

/* [borrow] of the tree; "" after a failure. */
static const char *text(reader *r, const cJSON *parent, const char *name) {
  const cJSON *item = member(r, parent, name);
  if (item && !cJSON_IsString(item)) bad(r, name, "is not a text");
  return r->status ? "" : item->valuestring;
}

static char *copy(reader *r, const cJSON *parent, const char *name) {
  const char *t = text(r, parent, name);
  char *kept = r->status ? NULL : phx__strdup(t);
  if (!kept) no_memory(r);
  return kept;
}

static uint64_t seed(reader *r, const cJSON *parent, const char *name) {
  const char *t = text(r, parent, name);
  uint64_t value = 0;
  if (r->status) return 0;
  const size_t n = strlen(t);
  bool good = n >= 1 && n <= 20 && (n == 1 || t[0] != '0');
  for (size_t i = 0; i < n && good; i++)
    good = t[i] >= '0' && t[i] <= '9' && !__builtin_mul_overflow(value, 10u, &value) &&
           !__builtin_add_overflow(value, (uint64_t)(t[i] - '0'), &value);
  if (!good) bad(r, name, "is not a decimal number of 64 bits");
  return value;
}

static int32_t dtype(reader *r, const cJSON *parent) {
  const char *t = text(r, parent, "dtype");
  const int32_t value = r->status ? 0 : phx__dtype_of(t);
  if (!value) bad(r, "dtype", "is unknown");
  return value;
}

/* A list; its elements are counted, and memory for them taken. */
static const cJSON *list(reader *r, const cJSON *parent, const char *name, int most, size_t element, void **out) {
  const cJSON *item = member(r, parent, name);
  if (!item) return NULL;
  if (!cJSON_IsArray(item)) bad(r, name, "is not a list");
  else if (cJSON_GetArraySize(item) > most) bad(r, name, "has too many elements");
  else if (out && !(*out = phx__calloc((size_t)cJSON_GetArraySize(item), element))) no_memory(r);
  return r->status ? NULL : item;
}

static void at(reader *r, const char *name, uint32_t i) {
  if (!r->status) snprintf(r->where, sizeof r->where, "%s[%" PRIu32 "]", name, i);
}

static void nowhere(reader *r) {
  if (!r->status) r->where[0] = 0;
}

/* Each element of a list (NULL after a failure) into the next of an array, which is counted on. */
typedef void read_element(reader *r, void *element, const cJSON *item);
static void each(reader *r, const char *name, const cJSON *items, void *array, size_t bytes, uint32_t *n,
                 read_element *read) {
  const cJSON *item;
  cJSON_ArrayForEach(item, items) {
    at(r, name, *n);
    if (r->status) return;
    read(r, (char *)array + bytes * (*n)++, item);
  }
  nowhere(r);
}

/* ---- members in their order ---- */
static void read_plugin(reader *r, phx__manifest *m, const cJSON *item, const char *kind) {
  if (r->status) return;
  phx__manifest_plugin *p = &m->plugins[m->n_plugins++];
  p->kind = kind ? phx__strdup(kind) : copy(r, item, "kind");
  if (!p->kind) no_memory(r);
  p->id = copy(r, item, "id");
  p->version = copy(r, item, "version");
  p->sha256 = copy(r, item, "sha256");
}

static void read_plugins(reader *r, phx__manifest *m, const cJSON *root) {
  enum { MOST = 16 };
  const cJSON *strategy = member(r, root, "strategy"), *item;
  object_of(r, strategy, "strategy", 3);
  const cJSON *others = list(r, root, "plugins", MOST, 0, NULL);
  if (!others) return;
  m->plugins = phx__calloc((size_t)cJSON_GetArraySize(others) + 1, sizeof *m->plugins);
  if (!m->plugins) {
    no_memory(r);
    return;
  }
  at(r, "strategy", 0);
  read_plugin(r, m, strategy, "strategy");
  cJSON_ArrayForEach(item, others) {
    at(r, "plugins", m->n_plugins - 1);
    object_of(r, item, "it", 4);
    read_plugin(r, m, item, NULL);
    if (!r->status && !strcmp(m->plugins[m->n_plugins - 1].kind, "strategy")) bad(r, "kind", "is a second strategy");
  }
  nowhere(r);
}

static void read_data_file(reader *r, void *element, const cJSON *item) {
  phx__manifest_data *d = element;
  char part[17] = "";
  object_of(r, item, "it", 4);
  d->name = copy(r, item, "name");
  d->bytes = integer(r, item, "bytes", 1, PHX__JSON_INTEGER_MOST);
  d->windows = integer(r, item, "windows", 1, PHX__JSON_INTEGER_MOST);
  const char *digits = text(r, item, "xxh128");
  if (strlen(digits) != 32 || strspn(digits, "0123456789abcdef") != 32)
    bad(r, "xxh128", "is not 32 hexadecimal digits");
  if (r->status) return;
  memcpy(part, digits, 16);
  d->high = strtoull(part, NULL, 16);
  d->low = strtoull(digits + 16, NULL, 16);
}

static void read_data(reader *r, phx__manifest *m, const cJSON *data) {
  m->data_sequence = integer(r, data, "sequence", 1, PHX__JSON_INTEGER_MOST);
  m->data_batch = integer(r, data, "batch", 1, PHX__JSON_INTEGER_MOST);
  const cJSON *files = list(r, data, "files", PHX__MANIFEST_DATA_MOST, sizeof *m->data, (void **)&m->data);
  each(r, "data.files", files, m->data, sizeof *m->data, &m->n_data, read_data_file);
}

static void read_head(reader *r, phx__manifest *m, const cJSON *root) {
  object_of(r, root, "it", 18);
  if (strcmp(text(r, root, "format"), "phalanx-checkpoint")) bad(r, "format", "is not 'phalanx-checkpoint'");
  const int64_t version = integer(r, root, "version", 1, INT32_MAX);
  if (!r->status && version != PHX__MANIFEST_VERSION)
    r->status =
        phx_fail(r->err, PHX_UNSUPPORTED, "%s has version %" PRId64 " of the format, and this phalanx reads %d",
                 r->path, version, PHX__MANIFEST_VERSION);
  m->step = integer(r, root, "step", 0, PHX__JSON_INTEGER_MOST);
  m->time = integer(r, root, "time", 0, PHX__JSON_INTEGER_MOST);
  m->ranks = (int32_t)integer(r, root, "ranks", 1, PHX_RANKS_MAX);
  const char *hash = text(r, root, "state_hash");
  if (strlen(hash) != 32) bad(r, "state_hash", "is not 32 hexadecimal digits");
  snprintf(m->state_hash, sizeof m->state_hash, "%s", hash);
  const cJSON *data = member(r, root, "data"), *generator = member(r, root, "generator");
  const bool known = data && cJSON_HasObjectItem(data, "sequence"); /* earlier ones say nothing of the files */
  const bool skipped = data && cJSON_HasObjectItem(data, "skipped");
  object_of(r, data, "data", (known ? 5 : 2) + skipped);
  object_of(r, generator, "generator", 1);
  m->data_seed = seed(r, data, "seed");
  m->samples = integer(r, data, "samples", 0, PHX__JSON_INTEGER_MOST);
  if (skipped) m->skipped = integer(r, data, "skipped", 1, PHX__JSON_INTEGER_MOST);
  m->generator_seed = seed(r, generator, "seed");
  if (known) read_data(r, m, data);
}

static void read_unit(reader *r, void *element, const cJSON *item) {
  phx__manifest_unit *u = element;
  object_of(r, item, "it", 2);
  u->name = copy(r, item, "name");
  const cJSON *blocks = list(r, item, "blocks", PHX_FLATS, 0, NULL);
  for (int f = 0; f < PHX_FLATS && !r->status; f++)
    if (!phx__json_integer(cJSON_GetArrayItem(blocks, f), 0, PHX__JSON_INTEGER_MOST, &u->blocks[f]))
      bad(r, "blocks", "is not a pair of counts");
}

static void read_param(reader *r, void *element, const cJSON *item) {
  phx__manifest_param *p = element;
  const cJSON *dim;
  object_of(r, item, "it", 6);
  p->name = copy(r, item, "name");
  if (strcmp(text(r, item, "dtype"), "F32")) bad(r, "dtype", "is not F32");
  p->unit = (uint32_t)integer(r, item, "unit", 0, PHX__MANIFEST_UNITS_MOST);
  p->flat = (uint32_t)integer(r, item, "flat", 0, PHX_FLATS - 1);
  p->offset = integer(r, item, "offset", 0, PHX__JSON_INTEGER_MOST);
  const cJSON *shape = list(r, item, "shape", PHX_PARAM_DIMS, 0, NULL);
  cJSON_ArrayForEach(dim, shape)
    if (!phx__json_integer(dim, 1, PHX__JSON_INTEGER_MOST, &p->shape[p->ndim++])) bad(r, "shape", "is impossible");
  for (uint32_t d = p->ndim; d < PHX_PARAM_DIMS; d++) p->shape[d] = 1;
}

static void read_model(reader *r, phx__manifest *m, const cJSON *root) {
  const cJSON *model = member(r, root, "model");
  object_of(r, model, "model", 2);
  const cJSON *units = list(r, model, "units", PHX__MANIFEST_UNITS_MOST, sizeof *m->units, (void **)&m->units);
  each(r, "units", units, m->units, sizeof *m->units, &m->n_units, read_unit);
  const cJSON *params = list(r, model, "params", PHX__MANIFEST_PARAMS_MOST, sizeof *m->params, (void **)&m->params);
  each(r, "params", params, m->params, sizeof *m->params, &m->n_params, read_param);
}

static void read_state(reader *r, void *element, const cJSON *item) {
  phx__manifest_state *s = element;
  object_of(r, item, "it", 2);
  s->name = copy(r, item, "name");
  s->dtype = dtype(r, item);
}

static void read_optimizer(reader *r, phx__manifest *m, const cJSON *root) {
  const cJSON *optimizer = member(r, root, "optimizer");
  object_of(r, optimizer, "optimizer", 2);
  m->optimizer = copy(r, optimizer, "name");
  const cJSON *states = list(r, optimizer, "states", PHX_OPTIM_STATES_MAX, 0, NULL);
  each(r, "states", states, m->states, sizeof *m->states, &m->n_states, read_state);
}

static void read_pairs(reader *r, phx__manifest *m, const cJSON *section, bool identity) {
  const cJSON *item;
  if (r->status) return;
  if (!cJSON_IsObject(section)) bad(r, section->string, "is not an object");
  cJSON_ArrayForEach(item, section) {
    if (r->status) return;
    if (!cJSON_IsString(item)) bad(r, item->string, "is not a text");
    else if ((identity ? m->n_identity : m->n_config) >= PHX__MANIFEST_PAIRS_MOST)
      bad(r, "config", "has too many values");
    else if (identity) r->status = phx__manifest_add_identity(m, item->string, item->valuestring, r->err);
    else r->status = phx__manifest_add_config(m, section->string, item->string, item->valuestring, r->err);
  }
}

static void read_config(reader *r, phx__manifest *m, const cJSON *root) {
  const cJSON *config = member(r, root, "config"), *identity = member(r, root, "identity"), *section;
  if (!r->status && !cJSON_IsObject(config)) bad(r, "config", "is not an object");
  cJSON_ArrayForEach(section, config) read_pairs(r, m, section, false);
  read_pairs(r, m, identity, true);
}

static void read_file(reader *r, void *element, const cJSON *item) {
  phx__manifest_file *f = element;
  const cJSON *chunk;
  int64_t i = 0;
  object_of(r, item, "it", 3);
  f->name = copy(r, item, "name");
  const int64_t bytes = integer(r, item, "bytes", 0, PHX__JSON_INTEGER_MOST);
  const cJSON *chunks = list(r, item, "chunks", INT32_MAX, sizeof *f->chunks, (void **)&f->chunks);
  if (r->status) return;
  if (cJSON_GetArraySize(chunks) != phx__chunks_count(bytes)) bad(r, "chunks", "is not one checksum for each MiB");
  cJSON_ArrayForEach(chunk, chunks) {
    const char *digits = cJSON_IsString(chunk) ? chunk->valuestring : "";
    if (strlen(digits) != 16 || strspn(digits, "0123456789abcdef") != 16)
      bad(r, "chunks", "has no 16 hexadecimal digits");
    if (r->status) return;
    f->chunks[i++] = strtoull(digits, NULL, 16);
  }
  f->bytes = bytes;
}

static int32_t kind(reader *r, const cJSON *item) {
  const char *t = text(r, item, "kind");
  for (int32_t k = 0; k < PHX__STATE_KINDS; k++)
    if (!strcmp(t, phx__state_kind_names[k])) return k;
  bad(r, "kind", "is unknown");
  return 0;
}

/* What slices and privates have in common. */
static phx__manifest_slice place(reader *r, const cJSON *item) {
  phx__manifest_slice s = {0}; /* one after the other: the first that is bad is named */
  s.unit = (uint32_t)integer(r, item, "unit", 0, PHX__MANIFEST_UNITS_MOST);
  s.flat = (uint32_t)integer(r, item, "flat", 0, PHX_FLATS - 1);
  s.first_block = integer(r, item, "first_block", 0, PHX__JSON_INTEGER_MOST);
  s.blocks = integer(r, item, "blocks", 1, PHX__JSON_INTEGER_MOST);
  s.dtype = dtype(r, item);
  s.file = (uint32_t)integer(r, item, "file", 0, PHX__MANIFEST_FILES_MOST);
  s.offset = integer(r, item, "offset", 0, PHX__JSON_INTEGER_MOST);
  return s;
}

static void read_slice(reader *r, void *element, const cJSON *item) {
  phx__manifest_slice *s = element;
  object_of(r, item, "it", 9);
  *s = place(r, item);
  s->kind = kind(r, item);
  s->index = (uint32_t)integer(r, item, "index", 0, PHX_OPTIM_STATES_MAX - 1);
}

static void read_private(reader *r, void *element, const cJSON *item) {
  phx__manifest_private *s = element;
  object_of(r, item, "it", 9);
  const char *name = text(r, item, "name");
  if (strlen(name) >= sizeof s->name) bad(r, "name", "is too long");
  else memcpy(s->name, name, strlen(name) + 1);
  s->rank = (int32_t)integer(r, item, "rank", 0, PHX_RANKS_MAX - 1);
  const phx__manifest_slice p = place(r, item);
  s->unit = p.unit, s->flat = p.flat, s->first_block = p.first_block, s->blocks = p.blocks;
  s->dtype = p.dtype, s->file = p.file, s->offset = p.offset;
}

static void read_files(reader *r, phx__manifest *m, const cJSON *root) {
  const cJSON *files = list(r, root, "files", PHX__MANIFEST_FILES_MOST, sizeof *m->files, (void **)&m->files);
  each(r, "files", files, m->files, sizeof *m->files, &m->n_files, read_file);
  const cJSON *slices = list(r, root, "slices", PHX__MANIFEST_SLICES_MOST, sizeof *m->slices, (void **)&m->slices);
  each(r, "slices", slices, m->slices, sizeof *m->slices, &m->n_slices, read_slice);
  const cJSON *privates = list(r, root, "private", PHX__MANIFEST_SLICES_MOST, sizeof *m->privates,
                               (void **)&m->privates);
  each(r, "private", privates, m->privates, sizeof *m->privates, &m->n_privates, read_private);
}

/* ---- the text ---- */
static phx_status check_sum(const char *path, const char *t, size_t bytes, phx_error *err) {
  enum { BEFORE = sizeof PHX__MANIFEST_BEFORE_SUM - 1, AFTER = sizeof PHX__MANIFEST_AFTER_SUM - 1, DIGITS = 32 };
  char digits[33];
  if (bytes > PHX__MANIFEST_BYTES_MOST)
    return phx_fail(err, PHX_IO, "%s has %zu bytes; %d are the most", path, bytes, PHX__MANIFEST_BYTES_MOST);
  if (bytes < BEFORE + DIGITS + AFTER || memcmp(t + bytes - AFTER, PHX__MANIFEST_AFTER_SUM, AFTER) ||
      memcmp(t + bytes - AFTER - DIGITS - BEFORE, PHX__MANIFEST_BEFORE_SUM, BEFORE))
    return phx_fail(err, PHX_IO, "%s does not end with its checksum: it is cut off or damaged", path);
  phx__manifest_checksum(t, bytes - BEFORE - DIGITS - AFTER, digits);
  if (!digits[0]) return phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  if (memcmp(digits, t + bytes - AFTER - DIGITS, DIGITS))
    return phx_fail(err, PHX_IO, "%s is damaged: member checksum says %.32s, and the text has %s", path,
                    t + bytes - AFTER - DIGITS, digits);
  return PHX_OK;
}

phx_status phx__manifest_parse(const char *path, const char *t, size_t bytes, phx__manifest **out, phx_error *err) {
  static const phx__json_limits limits = {.depth = PHX__MANIFEST_DEPTH_MOST, .values = 1u << 24};
  reader r = {.path = path, .err = err};
  cJSON *root = NULL;
  phx__manifest *m = phx__manifest_create();
  if (!m) no_memory(&r);
  if (!r.status) r.status = check_sum(path, t, bytes, err);
  if (!r.status) r.status = phx__json_read(path, t, bytes, &limits, &root, err);
  if (!r.status) {
    read_head(&r, m, root);
    read_plugins(&r, m, root);
    read_model(&r, m, root);
    read_optimizer(&r, m, root);
    read_config(&r, m, root);
    read_files(&r, m, root);
  }
  cJSON_Delete(root);
  if (!r.status) r.status = phx__manifest_check(path, m, err);
  if (r.status) phx__manifest_free(m);
  else *out = m;
  return r.status;
}

/* A directory that was renamed, or two that were swapped: each is whole by itself.  What was imported has step 0 under
 * any name. */
static phx_status check_name(const char *dir, const phx__manifest *m, phx_error *err) {
  const char *slash = strrchr(dir, '/'), *leaf = slash ? slash + 1 : dir;
  char *end;
  if (strncmp(leaf, "step-", 5) != 0 || m->step == 0) return PHX_OK;
  const long long named = strtoll(leaf + 5, &end, 10);
  if (end == leaf + 5 || *end || named == m->step) return PHX_OK;
  return phx_fail(err, PHX_IO, "%s is named as of step %lld, and holds step %" PRId64 ": it was renamed, or swapped",
                  dir, named, m->step);
}

phx_status phx__manifest_read(const char *dir, phx__manifest **out, phx_error *err) {
  char path[4200], *t = NULL;
  int fd = -1;
  int64_t bytes = 0;
  snprintf(path, sizeof path, "%s/" PHX__MANIFEST_NAME, dir);
  phx_status status = phx__file_open(path, &fd, &bytes, err);
  if (status) return status;
  if (bytes > PHX__MANIFEST_BYTES_MOST)
    status = phx_fail(err, PHX_IO, "%s has %" PRId64 " bytes; %d are the most", path, bytes, PHX__MANIFEST_BYTES_MOST);
  else if (!(t = phx__calloc(1, (size_t)bytes + 1)))
    status = phx_fail(err, PHX_NOMEM, "no memory to read %s", path);
  else
    status = phx__file_read(fd, path, t, bytes, 0, err);
  if (!status) status = phx__manifest_parse(path, t, (size_t)bytes, out, err);
  if (!status) {
    status = check_name(dir, *out, err);
    if (status) phx__manifest_free(*out);
    if (status) *out = NULL;
  }
  phx__free(t);
  phx__sys.close(fd);
  return status;
}
