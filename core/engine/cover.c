/* core/engine/cover.c - see cover.h.
 *
 * Hashes have 32 bits, so that no sum of 64 ranks overflows int64 in any use.  Two different sets of parts with equal
 * sums are a matter of chance, 1 in 2^32: plugins are checked for mistakes here, not for attacks. */
#include "engine/cover.h"

#include <inttypes.h>
#include <string.h>

#include "base/rng.h"
#include "base/status.h"
#include "base/sys.h"
#include "engine/layout.h"

static int64_t mark(int64_t element) { return (int64_t)(phx__splitmix64((uint64_t)element) >> 32); }

static void add_range(phx__cover_cell *cell, int64_t first, int64_t numel) {
  cell->elements += numel;
  cell->print += mark(first + numel) - mark(first);
}

static void add(const phx__cover *c, phx__cover_cell *cell, uint32_t unit, uint32_t flat, int64_t first,
                int64_t numel) {
  phx__range range = {0};
  if (!c->logical) {
    add_range(cell, first, numel);
    return;
  }
  while (phx__layout_next(c->model, unit, flat, first, numel, &range)) add_range(cell, range.first, range.numel);
}

/* What the whole of a unit's flat comes to. */
static phx__cover_cell whole(const phx__cover *c, uint32_t unit, uint32_t flat) {
  phx__cover_cell cell = {0, 0};
  add(c, &cell, unit, flat, 0, phx_model_unit(c->model, unit)->blocks[flat] * PHX_BLOCK);
  return cell;
}

phx_status phx__cover_open(const phx_model *model, uint32_t kinds, phx__cover *out, phx_error *err) {
  const size_t n = (size_t)kinds * PHX_FLATS * model->n_units;
  *out = (phx__cover){.model = model, .kinds = kinds, .n = n};
  out->cells = phx__calloc(n, sizeof *out->cells);
  return out->cells ? PHX_OK : phx_fail(err, PHX_NOMEM, "no memory to count %u units", model->n_units);
}

void phx__cover_close(phx__cover *c) {
  phx__free(c->cells);
  *c = (phx__cover){0};
}

void phx__cover_clear(phx__cover *c) { memset(c->cells, 0, c->n * sizeof *c->cells); }

bool phx__cover_add(phx__cover *c, uint32_t kind, uint32_t unit, uint32_t flat, int64_t first, int64_t numel) {
  phx__cover_cell *cell = &c->cells[((size_t)kind * PHX_FLATS + flat) * c->model->n_units + unit];
  add(c, cell, unit, flat, first, numel);
  return cell->elements <= phx_model_unit(c->model, unit)->blocks[flat] * PHX_BLOCK;
}

int64_t phx__cover_size(const phx__cover *c) { return (int64_t)(c->n * (sizeof *c->cells / sizeof(int64_t))); }

void phx__cover_words(const phx__cover *c, int64_t *words) { memcpy(words, c->cells, c->n * sizeof *c->cells); }

/* Is `all` the whole, once, or with repeats several times? */
static bool covers(phx__cover_cell all, phx__cover_cell once, bool repeats) {
  if (all.elements == once.elements && all.print == once.print) return true;
  if (!repeats || once.elements == 0 || all.elements <= 0 || all.elements % once.elements) return false;
  return all.print == all.elements / once.elements * once.print;
}

phx_status phx__cover_judge(const phx__cover *c, const int64_t *sums, bool repeats, const char *const *kind_names,
                            const char *verb, phx_error *err) {
  for (size_t i = 0; i < c->n; i++) {
    const uint32_t unit = (uint32_t)(i % c->model->n_units), flat = (uint32_t)(i / c->model->n_units) % PHX_FLATS;
    const size_t kind = i / c->model->n_units / PHX_FLATS;
    phx__cover_cell all, once = {0, 0};
    memcpy(&all, sums + i * (sizeof all / sizeof *sums), sizeof all);
    if (flat == PHX_FLAT_TRAINABLE || (c->frozen && kind == 0)) once = whole(c, unit, flat);
    if (covers(all, once, repeats)) continue;
    return phx_fail(err, PHX_INTERNAL,
                    "the ranks together %s %" PRId64 " of %" PRId64 " elements of %s of unit %u (%s)%s; every one "
                    "must be %s exactly once%s",
                    verb, all.elements, once.elements, kind_names[kind], unit, phx_model_unit(c->model, unit)->name,
                    all.elements == once.elements ? ", but some twice and others never" : "", verb,
                    repeats ? ", or once by each replica" : "");
  }
  return PHX_OK;
}
