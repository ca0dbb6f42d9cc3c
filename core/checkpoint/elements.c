/* core/checkpoint/elements.c - see elements.h.
 *
 * Memory is the caller's scratch and one band of a transposed matrix. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/elements.h"

/* Names the first element that is no number. */
static phx_status check_finite(const char *path, const char *name, const int64_t *shape, uint32_t ndim,
                               int64_t first, int64_t numel, const float *values, phx_error *err) {
  char at[PHX__TENSOR_DIMS * 22 + 1] = "";
  int64_t i = 0, below = 1;
  int used = 0;
  while (i < numel && isfinite(values[i])) i++;
  if (i == numel) return PHX_OK;
  for (uint32_t d = 0; d < ndim; d++) below *= shape[d];
  int64_t rest = first + i;
  for (uint32_t d = 0; d < ndim; d++) {
    below /= shape[d];
    used += snprintf(at + used, sizeof at - (size_t)used, "%s%lld", d ? ", " : "", (long long)(rest / below));
    rest %= below;
  }
  return phx_fail(err, PHX_INVALID, "%s: tensor %s: element [%s] is %g, and weights must be finite", path, name, at,
                  (double)values[i]);
}

phx_status phx__param_elements(void *param_source, int64_t first, int64_t numel, float *out, phx_error *err) {
  phx__param_source *s = param_source;
  const phx__manifest_param *p = s->param;
  while (numel > 0) {
    const int64_t at = p->offset + first, block = at / PHX_BLOCK, inside = at % PHX_BLOCK;
    const int64_t part = numel < PHX__TOOL_PART ? numel : PHX__TOOL_PART;
    const int64_t blocks = (inside + part + PHX_BLOCK - 1) / PHX_BLOCK;
    phx_status status = phx__checkpoint_reader_blocks(s->reader, s->kind, s->index, p->unit, p->flat, block, blocks,
                                                      s->blocks, err);
    if (status) {
      char message[sizeof err->message];
      if (err) {
        memcpy(message, err->message, sizeof message);
        phx_fail(err, status, "%s (parameter %.100s)", message, p->name);
      }
      return status;
    }
    memcpy(out, s->blocks + inside, (size_t)part * sizeof *out);
    if (s->finite) status = check_finite(s->reader->dir, p->name, p->shape, p->ndim, first, part, out, err);
    if (status) return status;
    out += part;
    first += part;
    numel -= part;
  }
  return PHX_OK;
}

static float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* Exact: every half is a float. */
static float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = (float)fraction * 0x1p-24f;
  return sign ? -small : small;
}

phx_status phx__tensor_elements(void *tensor_source, int64_t first, int64_t numel, float *out, phx_error *err) {
  phx__tensor_source *s = tensor_source;
  const int64_t width = (int64_t)phx_dtype_bytes(s->tensor->dtype);
  if (s->tensor->dtype != PHX_F32 && s->tensor->dtype != PHX_F16 && s->tensor->dtype != PHX_BF16)
    return phx_fail(err, PHX_UNSUPPORTED, "%s: tensor %s is %s: F32, F16 and BF16 can be read", s->file->path,
                    s->tensor->name, s->tensor->dtype_name);
  while (numel > 0) {
    const int64_t part = numel < PHX__TOOL_PART ? numel : PHX__TOOL_PART;
    phx_status status = phx__safetensors_read(s->file, s->tensor, first * width, part * width, s->raw, err);
    if (status) return status;
    for (int64_t i = 0; width == 2 && i < part; i++) {
      uint16_t bits;
      memcpy(&bits, s->raw + 2 * i, 2);
      out[i] = s->tensor->dtype == PHX_F16 ? from_half(bits) : from_bits((uint32_t)bits << 16);
    }
    if (width == 4) memcpy(out, s->raw, (size_t)part * 4);
    const phx__tensor *t = s->tensor;
    if (s->finite) status = check_finite(s->file->path, t->name, t->shape, t->ndim, first, part, out, err);
    if (status) return status;
    out += part;
    first += part;
    numel -= part;
  }
  return PHX_OK;
}

/* ---- transposing ---- */
phx_status phx__transposer_open(phx__transposer *t, phx_error *err) {
  const int64_t fit = PHX__TOOL_BAND_BYTES / 4 / t->rows;
  t->room = fit < t->columns ? fit : t->columns;
  if (t->room < 1) t->room = 1;
  t->band_first = t->band_n = 0;
  t->band = phx__calloc((size_t)(t->room * t->rows), sizeof *t->band);
  t->line = phx__calloc((size_t)t->room, sizeof *t->line);
  if (t->band && t->line) return PHX_OK;
  phx__transposer_close(t);
  return phx_fail(err, PHX_NOMEM, "no memory to transpose a matrix");
}

void phx__transposer_close(phx__transposer *t) {
  phx__free(t->band);
  phx__free(t->line);
  t->band = t->line = NULL;
}

static phx_status load_band(phx__transposer *t, int64_t first, phx_error *err) {
  const int64_t n = t->columns - first < t->room ? t->columns - first : t->room;
  t->band_n = 0;
  for (int64_t i = 0; i < t->rows; i++) {
    PHX_TRY(t->read(t->ctx, i * t->columns + first, n, t->line, err));
    for (int64_t j = 0; j < n; j++) t->band[j * t->rows + i] = t->line[j];
  }
  t->band_first = first;
  t->band_n = n;
  return PHX_OK;
}

phx_status phx__transposed_elements(void *transposer, int64_t first, int64_t numel, float *out, phx_error *err) {
  phx__transposer *t = transposer;
  while (numel > 0) {
    const int64_t line = first / t->rows;
    if (line < t->band_first || line >= t->band_first + t->band_n) PHX_TRY(load_band(t, line, err));
    const int64_t at = first - t->band_first * t->rows, left = t->band_n * t->rows - at;
    const int64_t part = numel < left ? numel : left;
    memcpy(out, t->band + at, (size_t)part * sizeof *out);
    out += part;
    first += part;
    numel -= part;
  }
  return PHX_OK;
}
