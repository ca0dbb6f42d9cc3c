/* core/checkpoint/manifest_check.c - see manifest.h: the rules between a manifest's members.
 *
 * Works on copies of what it sorts, except the slices; all arithmetic on numbers from a file is checked or on numbers
 * that were limited before.  A failed rule is PHX_IO: such a file is damaged, or was never one of ours. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/manifest.h"
#include "checkpoint/manifest_inner.h"

const char *const phx__state_kind_names[PHX__STATE_KINDS] = {
    [PHX_STATE_WEIGHT] = "weight", [PHX_STATE_MASTER] = "master", [PHX_STATE_OPTIM] = "optim",
    [PHX_STATE_BUFFER] = "buffer"};

#define BLOCKS_MOST (INT64_C(1) << 40) /* of a flat: 2^50 elements */

/* ---- names ---- */
static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* names[i] is the text at `first` + i * stride. */
static phx_status check_unique(const char *path, const char *what, const void *first, size_t stride, uint32_t n,
                               phx_error *err) {
  phx_status status = PHX_OK;
  const char **names = phx__calloc(n, sizeof *names);
  if (!names) return phx_fail(err, PHX_NOMEM, "no memory to check %s", path);
  for (uint32_t i = 0; i < n; i++) names[i] = *(char *const *)(const void *)((const char *)first + i * stride);
  if (n) qsort(names, n, sizeof *names, by_text);
  for (uint32_t i = 1; i < n && !status; i++)
    if (!strcmp(names[i - 1], names[i]))
      status = phx_fail(err, PHX_IO, "%s: %s: the name '%.200s' stands twice", path, what, names[i]);
  phx__free(names);
  return status;
}

static bool plain_name(const char *name, size_t most, bool dots) {
  const size_t n = strlen(name);
  if (!n || n > most || name[0] == '.') return false;
  for (size_t i = 0; i < n; i++) {
    const char c = name[i];
    if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
          (dots && c == '.')))
      return false;
  }
  return true;
}

/* A tensor's or unit's name: what a terminal can show. */
static bool shown_name(const char *name) {
  const size_t n = strlen(name);
  for (size_t i = 0; i < n; i++)
    if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f) return false;
  return n >= 1 && n <= PHX__SAFETENSORS_NAME_MOST;
}

/* ---- members ---- */
static phx_status check_head(const char *path, const phx__manifest *m, phx_error *err) {
  const int64_t counts[] = {m->step, m->samples, m->skipped, m->time};
  bool are_counts = m->skipped <= m->step;
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    are_counts = are_counts && counts[i] >= 0 && counts[i] <= PHX__JSON_INTEGER_MOST;
  if (!are_counts)
    return phx_fail(err, PHX_IO, "%s: step, samples, skipped or time is not a count", path);
  if (m->ranks < 1 || m->ranks > PHX_RANKS_MAX)
    return phx_fail(err, PHX_IO, "%s: ranks = %" PRId32 "; 1 to %d are possible", path, m->ranks, PHX_RANKS_MAX);
  if (strlen(m->state_hash) != 32 || strspn(m->state_hash, "0123456789abcdef") != 32)
    return phx_fail(err, PHX_IO, "%s: state_hash is not 32 hexadecimal digits", path);
  if (!phx__manifest_plugin_of(m, "strategy")) return phx_fail(err, PHX_IO, "%s: there is no strategy", path);
  PHX_TRY(check_unique(path, "plugins", &m->plugins->kind, sizeof *m->plugins, m->n_plugins, err));
  if (!m->optimizer || m->n_states > PHX_OPTIM_STATES_MAX)
    return phx_fail(err, PHX_IO, "%s: optimizer: %u states; %d are the most", path, m->n_states, PHX_OPTIM_STATES_MAX);
  for (uint32_t i = 0; i < m->n_states; i++) {
    const char *name = m->states[i].name;
    bool good = plain_name(name, 32, false) && m->states[i].dtype == PHX_F32 && strcmp(name, "private");
    for (int k = 0; k < PHX__STATE_KINDS; k++) good = good && strcmp(name, phx__state_kind_names[k]);
    if (!good) return phx_fail(err, PHX_IO, "%s: optimizer: state %u has no usable name and dtype", path, i);
  }
  return check_unique(path, "optimizer.states", &m->states[0].name, sizeof m->states[0], m->n_states, err);
}

static phx_status check_param(const char *path, const phx__manifest *m, uint32_t i, int64_t ends[PHX_FLATS],
                              phx_error *err) {
  phx__manifest_param *p = &m->params[i];
  int64_t numel = 1, end = 0;
  if (!shown_name(p->name)) return phx_fail(err, PHX_IO, "%s: model.params[%u] has no usable name", path, i);
  if (p->ndim < 1 || p->ndim > PHX_PARAM_DIMS || p->flat >= PHX_FLATS)
    return phx_fail(err, PHX_IO, "%s: parameter %s: its shape or flat is impossible", path, p->name);
  for (uint32_t d = 0; d < p->ndim; d++)
    if (p->shape[d] < 1 || __builtin_mul_overflow(numel, p->shape[d], &numel))
      return phx_fail(err, PHX_IO, "%s: parameter %s: its shape overflows", path, p->name);
  if (p->offset < ends[p->flat] || p->offset % 64 || __builtin_add_overflow(p->offset, numel, &end) ||
      end > m->units[p->unit].blocks[p->flat] * PHX_BLOCK)
    return phx_fail(err, PHX_IO, "%s: parameter %s does not lie in its unit behind the one before", path, p->name);
  p->numel = numel;
  ends[p->flat] = end;
  return PHX_OK;
}

static phx_status check_model(const char *path, const phx__manifest *m, phx_error *err) {
  uint32_t i = 0;
  if (m->n_units < 1 || m->n_units > PHX__MANIFEST_UNITS_MOST || m->n_params < 1 ||
      m->n_params > PHX__MANIFEST_PARAMS_MOST)
    return phx_fail(err, PHX_IO, "%s: %u units and %u parameters; %d and %d are the most", path, m->n_units,
                    m->n_params, PHX__MANIFEST_UNITS_MOST, PHX__MANIFEST_PARAMS_MOST);
  for (uint32_t u = 0; u < m->n_units; u++) {
    const phx__manifest_unit *unit = &m->units[u];
    int64_t ends[PHX_FLATS] = {0, 0};
    if (!shown_name(unit->name)) return phx_fail(err, PHX_IO, "%s: model.units[%u] has no usable name", path, u);
    for (int f = 0; f < PHX_FLATS; f++)
      if (unit->blocks[f] < 0 || unit->blocks[f] > BLOCKS_MOST)
        return phx_fail(err, PHX_IO, "%s: unit %s: its number of blocks is impossible", path, unit->name);
    for (; i < m->n_params && m->params[i].unit == u; i++) PHX_TRY(check_param(path, m, i, ends, err));
    for (int f = 0; f < PHX_FLATS; f++)
      if ((ends[f] + PHX_BLOCK - 1) / PHX_BLOCK != unit->blocks[f])
        return phx_fail(err, PHX_IO, "%s: unit %s has %" PRId64 " blocks, and its parameters need %" PRId64, path,
                        unit->name, unit->blocks[f], (ends[f] + PHX_BLOCK - 1) / PHX_BLOCK);
  }
  if (i < m->n_params)
    return phx_fail(err, PHX_IO, "%s: parameter %.200s belongs to no unit, or not in this order", path,
                    m->params[i].name ? m->params[i].name : "");
  return check_unique(path, "model.params", &m->params->name, sizeof *m->params, m->n_params, err);
}

static phx_status check_files(const char *path, const phx__manifest *m, phx_error *err) {
  if (m->n_files > PHX__MANIFEST_FILES_MOST)
    return phx_fail(err, PHX_IO, "%s: %u files; %d are the most", path, m->n_files, PHX__MANIFEST_FILES_MOST);
  for (uint32_t i = 0; i < m->n_files; i++) {
    const phx__manifest_file *f = &m->files[i];
    if (!plain_name(f->name, 100, true) || !strcmp(f->name, PHX__MANIFEST_NAME))
      return phx_fail(err, PHX_IO, "%s: files[%u]: '%.100s' is not a plain file name", path, i, f->name);
    if (f->bytes < 0 || f->bytes > PHX__JSON_INTEGER_MOST)
      return phx_fail(err, PHX_IO, "%s: file %s: its size is impossible", path, f->name);
  }
  if (!m->n_files) return PHX_OK;
  return check_unique(path, "files", &m->files->name, sizeof *m->files, m->n_files, err);
}

/* ---- ranges of files ---- */
typedef struct extent {
  uint32_t file;
  int64_t offset, bytes;
} extent;

static int by_extent(const void *a, const void *b) {
  const extent *x = a, *y = b;
  if (x->file != y->file) return x->file < y->file ? -1 : 1;
  return (x->offset > y->offset) - (x->offset < y->offset);
}

static phx_status check_extent(const char *path, const phx__manifest *m, const char *what, uint32_t i, int64_t blocks,
                               int32_t dtype, uint32_t file, int64_t offset, extent *out, phx_error *err) {
  const int64_t width = (int64_t)phx_dtype_bytes(dtype) * PHX_BLOCK;
  int64_t bytes = 0;
  if (file >= m->n_files)
    return phx_fail(err, PHX_IO, "%s: %s[%u]: file %u of %u", path, what, i, file, m->n_files);
  if (!width || blocks < 1 || __builtin_mul_overflow(blocks, width, &bytes) || offset < 0 ||
      bytes > m->files[file].bytes || offset > m->files[file].bytes - bytes)
    return phx_fail(err, PHX_IO, "%s: %s[%u] does not lie inside %s", path, what, i, m->files[file].name);
  *out = (extent){file, offset, bytes};
  return PHX_OK;
}

static phx_status check_slice(const char *path, const phx__manifest *m, uint32_t i, phx_error *err) {
  const phx__manifest_slice *s = &m->slices[i];
  if (s->kind < 0 || s->kind >= PHX__STATE_KINDS || s->dtype != PHX_F32 ||
      s->index >= (s->kind == PHX_STATE_OPTIM ? m->n_states : 1) || s->unit >= m->n_units || s->flat >= PHX_FLATS ||
      (s->kind == PHX_STATE_OPTIM && s->flat != PHX_FLAT_TRAINABLE))
    return phx_fail(err, PHX_IO, "%s: slices[%u] is of no state that this model has", path, i);
  if (s->first_block < 0 || s->blocks < 1 || s->blocks > m->units[s->unit].blocks[s->flat] ||
      s->first_block > m->units[s->unit].blocks[s->flat] - s->blocks)
    return phx_fail(err, PHX_IO, "%s: slices[%u]: unit %s has no such blocks", path, i, m->units[s->unit].name);
  return PHX_OK;
}

static phx_status check_ranges(const char *path, const phx__manifest *m, phx_error *err) {
  phx_status status = PHX_OK;
  uint32_t n = 0;
  if (m->n_slices > PHX__MANIFEST_SLICES_MOST || m->n_privates > PHX__MANIFEST_SLICES_MOST)
    return phx_fail(err, PHX_IO, "%s: %u and %u slices; %d are the most", path, m->n_slices, m->n_privates,
                    PHX__MANIFEST_SLICES_MOST);
  extent *extents = phx__calloc((size_t)m->n_slices + m->n_privates, sizeof *extents);
  if (!extents) return phx_fail(err, PHX_NOMEM, "no memory to check %s", path);
  for (uint32_t i = 0; i < m->n_slices; i++) {
    const phx__manifest_slice *s = &m->slices[i];
    PHX_TRY_GOTO(check_slice(path, m, i, err), status, done);
    PHX_TRY_GOTO(check_extent(path, m, "slices", i, s->blocks, s->dtype, s->file, s->offset, &extents[n++], err),
                 status, done);
  }
  for (uint32_t i = 0; i < m->n_privates; i++) {
    const phx__manifest_private *s = &m->privates[i];
    if (!plain_name(s->name, sizeof s->name - 1, true) || s->rank < 0 || s->rank >= m->ranks ||
        s->unit >= m->n_units || s->flat >= PHX_FLATS || s->first_block < 0 || s->first_block > BLOCKS_MOST) {
      status = phx_fail(err, PHX_IO, "%s: private[%u] has no usable name, rank or place", path, i);
      goto done;
    }
    PHX_TRY_GOTO(check_extent(path, m, "private", i, s->blocks, s->dtype, s->file, s->offset, &extents[n++], err),
                 status, done);
  }
  if (n) qsort(extents, n, sizeof *extents, by_extent);
  for (uint32_t i = 1; i < n && !status; i++)
    if (extents[i - 1].file == extents[i].file && extents[i - 1].offset + extents[i - 1].bytes > extents[i].offset)
      status = phx_fail(err, PHX_IO, "%s: two slices overlap in %s at byte %" PRId64, path,
                        m->files[extents[i].file].name, extents[i].offset);
done:
  phx__free(extents);
  return status;
}

/* ---- coverage ---- */
static int32_t group_of(int32_t kind) { return kind == PHX_STATE_MASTER ? PHX_STATE_WEIGHT : kind; }

static int by_state(const void *a, const void *b) {
  const phx__manifest_slice *x = a, *y = b;
  const int64_t p[5] = {group_of(x->kind), x->index, x->unit, x->flat, x->first_block};
  const int64_t q[5] = {group_of(y->kind), y->index, y->unit, y->flat, y->first_block};
  for (int i = 0; i < 5; i++)
    if (p[i] != q[i]) return p[i] < q[i] ? -1 : 1;
  return 0;
}

/* The slices of one flat of one state, beginning at *at. */
static phx_status cover_flat(const char *path, const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit,
                             uint32_t flat, uint32_t *at, phx_error *err) {
  const char *state = kind == PHX_STATE_OPTIM ? m->states[index].name : phx__state_kind_names[kind];
  int64_t next = 0;
  for (; *at < m->n_slices; (*at)++) {
    const phx__manifest_slice *s = &m->slices[*at];
    if (group_of(s->kind) != kind || s->index != index || s->unit != unit || s->flat != flat) break;
    if (s->first_block < next)
      return phx_fail(err, PHX_IO, "%s: block %" PRId64 " of %s of unit %s is there twice", path, s->first_block,
                      state, m->units[unit].name);
    if (s->first_block > next) break;
    next += s->blocks;
  }
  if (next != m->units[unit].blocks[flat])
    return phx_fail(err, PHX_IO, "%s: blocks from %" PRId64 " of %s of unit %s are missing", path, next, state,
                    m->units[unit].name);
  return PHX_OK;
}

static phx_status check_cover(const char *path, phx__manifest *m, phx_error *err) {
  phx_status status = PHX_OK;
  uint32_t at = 0;
  if (m->n_slices) qsort(m->slices, m->n_slices, sizeof *m->slices, by_state);
  for (uint32_t u = 0; u < m->n_units && !status; u++)
    for (uint32_t f = 0; f < PHX_FLATS && !status; f++)
      status = cover_flat(path, m, PHX_STATE_WEIGHT, 0, u, f, &at, err);
  for (uint32_t i = 0; i < m->n_states && !status; i++)
    for (uint32_t u = 0; u < m->n_units && !status; u++)
      status = cover_flat(path, m, PHX_STATE_OPTIM, i, u, PHX_FLAT_TRAINABLE, &at, err);
  for (; at + 1 < m->n_slices && !status; at++) { /* buffers: where there are some, not twice */
    const phx__manifest_slice *a = &m->slices[at], *b = a + 1;
    if (a->unit == b->unit && a->flat == b->flat && a->first_block + a->blocks > b->first_block)
      status = phx_fail(err, PHX_IO, "%s: block %" PRId64 " of buffer of unit %s is there twice", path, b->first_block,
                        m->units[b->unit].name);
  }
  return status;
}

static phx_status check_data(const char *path, const phx__manifest *m, phx_error *err) {
  const bool known = m->data_sequence > 0;
  if (m->n_data > PHX__MANIFEST_DATA_MOST)
    return phx_fail(err, PHX_IO, "%s: %u token files; %d are the most", path, m->n_data, PHX__MANIFEST_DATA_MOST);
  if (m->data_sequence < 0 || (m->data_batch > 0) != known || (m->n_data > 0) != known)
    return phx_fail(err, PHX_IO, "%s: data: sequence, batch and files do not go together", path);
  for (uint32_t i = 0; i < m->n_data; i++) {
    const phx__manifest_data *d = &m->data[i];
    if (!d->name || strlen(d->name) > PHX__MANIFEST_TEXT_MOST || d->bytes < 1 || d->windows < 1 ||
        d->bytes > PHX__JSON_INTEGER_MOST || d->windows > PHX__JSON_INTEGER_MOST)
      return phx_fail(err, PHX_IO, "%s: data.files[%u] has no usable name or size", path, i);
  }
  return PHX_OK;
}

static phx_status check_pairs(const char *path, const phx__manifest_pair *pairs, uint32_t n, phx_error *err) {
  if (n > PHX__MANIFEST_PAIRS_MOST)
    return phx_fail(err, PHX_IO, "%s: %u configured values; %d are the most", path, n, PHX__MANIFEST_PAIRS_MOST);
  for (uint32_t i = 0; i < n; i++)
    if (!shown_name(pairs[i].section) || !shown_name(pairs[i].key) || strlen(pairs[i].value) > PHX__MANIFEST_TEXT_MOST)
      return phx_fail(err, PHX_IO, "%s: a configured value has no usable name or is too long", path);
  return PHX_OK;
}

phx_status phx__manifest_check(const char *path, phx__manifest *m, phx_error *err) {
  phx_status status = check_head(path, m, err);
  if (!status) status = check_data(path, m, err);
  if (!status) status = check_model(path, m, err);
  if (!status) status = check_pairs(path, m->config, m->n_config, err);
  if (!status) status = check_pairs(path, m->identity, m->n_identity, err);
  if (!status) status = check_files(path, m, err);
  if (!status) status = check_ranges(path, m, err);
  return status ? status : check_cover(path, m, err);
}

phx_status phx__manifest_match(const char *path, const phx__manifest *m, const phx_model *model, phx_error *err) {
  if (m->n_params != model->n_params || m->n_units != model->n_units)
    return phx_fail(err, PHX_INVALID, "%s is of another model: %u parameters in %u units, and this one has %u in %u",
                    path, m->n_params, m->n_units, model->n_params, model->n_units);
  for (uint32_t i = 0; i < m->n_params; i++) {
    const phx__manifest_param *a = &m->params[i];
    const phx_param *b = phx_model_param(model, i);
    if (strcmp(a->name, b->name))
      return phx_fail(err, PHX_INVALID, "%s is of another model: parameter %u is %.100s, here %.100s", path, i,
                      a->name, b->name);
    if (a->ndim != b->ndim || memcmp(a->shape, b->shape, a->ndim * sizeof *a->shape))
      return phx_fail(err, PHX_INVALID, "%s: parameter %.100s has another shape than in this model", path, a->name);
    if ((a->flat == PHX_FLAT_FROZEN) != ((b->flags & PHX_PARAM_FROZEN) != 0))
      return phx_fail(err, PHX_INVALID, "%s: parameter %.100s is %s there and %s here", path, a->name,
                      a->flat == PHX_FLAT_FROZEN ? "frozen" : "trained",
                      b->flags & PHX_PARAM_FROZEN ? "frozen" : "trained");
    if (a->unit != b->unit || a->offset != b->offset)
      return phx_fail(err, PHX_INVALID, "%s: parameter %.100s stands elsewhere in this model's units", path, a->name);
  }
  return PHX_OK;
}

const phx__manifest_slice *phx__manifest_find(const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit,
                                              uint32_t flat, int64_t first_block) {
  const phx__manifest_slice wanted = {.kind = kind, .index = index, .unit = unit, .flat = flat,
                                      .first_block = first_block};
  uint32_t lo = 0, hi = m->n_slices; /* the first slice behind the wanted one */
  while (lo < hi) {
    const uint32_t middle = lo + (hi - lo) / 2;
    if (by_state(&m->slices[middle], &wanted) <= 0) lo = middle + 1;
    else hi = middle;
  }
  if (!lo) return NULL;
  const phx__manifest_slice *s = &m->slices[lo - 1];
  const bool holds = group_of(s->kind) == group_of(kind) && s->index == index && s->unit == unit && s->flat == flat &&
                     first_block - s->first_block < s->blocks;
  return holds ? s : NULL;
}
