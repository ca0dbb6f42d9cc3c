/* core/engine/layout.c - see layout.h.
 *
 * Invariant: parameters of a unit stand together; within a flat, parameters are in declaration order, each at a
 * multiple of 64 elements; blocks = ceil(end / PHX_BLOCK).  Nothing here depends on ranks or strategies. */
#include "engine/layout.h"

#include <stdbool.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"

typedef struct layout { /* one allocation-free view: model first, so that the pointers are the same */
  phx_model model;
  phx_param *params;
  phx_unit *units;
  phx_stage *stages;
  phx_use *uses;
} layout;

enum { ELEMENTS_PER_ALIGN = PHX_ALIGN / 4 };

/* What the model says a parameter is for. */
static phx_status check_role(const phx_param *p, phx_error *err) {
  const bool wide = p->role == PHX_ROLE_MATRIX || p->role == PHX_ROLE_EMBEDDING || p->role == PHX_ROLE_HEAD;
  if (p->role < PHX_ROLE_UNKNOWN || p->role >= PHX_ROLES || p->reserved0)
    return phx_fail(err, PHX_INVALID, "parameter %s has role %d and reserved0 = %u; expected 0 to %d, and 0", p->name,
                     p->role, p->reserved0, PHX_ROLES - 1);
  if ((wide && p->ndim < 2) || (p->role == PHX_ROLE_VECTOR && p->ndim > 1))
    return phx_fail(err, PHX_INVALID, "parameter %s has role %d and %u dimensions: a vector has one, a matrix, an "
                     "embedding and a head have two or more", p->name, p->role, p->ndim);
  const int64_t rows = p->row_parts ? p->row_parts : 1, columns = p->column_parts ? p->column_parts : 1;
  if (p->shape[0] % rows == 0 && phx_param_row(p) % columns == 0) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "parameter %s: %lld rows of %lld do not come apart in %lld x %lld equal parts",
                   p->name, (long long)p->shape[0], (long long)phx_param_row(p), (long long)rows, (long long)columns);
}

static phx_status place_param(phx_param *p, int64_t ends[PHX_FLATS], phx_error *err) {
  int64_t numel = 1;
  if (p->ndim < 1 || p->ndim > PHX_PARAM_DIMS)
    return phx_fail(err, PHX_INVALID, "parameter %s has %u dimensions; 1 to %d are allowed", p->name, p->ndim,
                    PHX_PARAM_DIMS);
  for (uint32_t d = 0; d < p->ndim; d++)
    if (p->shape[d] < 1 || __builtin_mul_overflow(numel, p->shape[d], &numel) || numel > INT64_MAX / 64)
      return phx_fail(err, PHX_INVALID, "parameter %s: dimension %u = %lld is not a size", p->name, d,
                      (long long)p->shape[d]);
  for (uint32_t d = p->ndim; d < PHX_PARAM_DIMS; d++) p->shape[d] = 1;
  int64_t *end = &ends[p->flags & PHX_PARAM_FROZEN ? PHX_FLAT_FROZEN : PHX_FLAT_TRAINABLE];
  p->numel = numel;
  p->offset = (*end + ELEMENTS_PER_ALIGN - 1) / ELEMENTS_PER_ALIGN * ELEMENTS_PER_ALIGN;
  if (__builtin_add_overflow(p->offset, numel, end))
    return phx_fail(err, PHX_INVALID, "parameter %s makes its unit too large", p->name);
  return check_role(p, err);
}

static phx_status place_units(layout *l, phx_error *err) {
  uint32_t expected = 0;
  for (uint32_t u = 0; u < l->model.n_units; u++) {
    phx_unit *unit = &l->units[u];
    int64_t ends[PHX_FLATS] = {0, 0};
    if (unit->first_param != expected || unit->n_params > l->model.n_params - expected)
      return phx_fail(err, PHX_INVALID, "unit %s: its parameters do not follow those of the unit before", unit->name);
    expected += unit->n_params;
    for (uint32_t i = 0; i < unit->n_params; i++) {
      phx_param *p = &l->params[unit->first_param + i];
      if (p->unit != u)
        return phx_fail(err, PHX_INVALID, "parameter %s says unit %u but stands in unit %u", p->name, p->unit, u);
      PHX_TRY(place_param(p, ends, err));
    }
    for (int f = 0; f < PHX_FLATS; f++) {
      unit->blocks[f] = (ends[f] + PHX_BLOCK - 1) / PHX_BLOCK;
      unit->first_block[f] = l->model.total_blocks[f];
      l->model.total_blocks[f] += unit->blocks[f];
    }
  }
  if (expected != l->model.n_params)
    return phx_fail(err, PHX_INVALID, "%u parameters belong to no unit", l->model.n_params - expected);
  return PHX_OK;
}

static phx_status check_stages(layout *l, phx_error *err) {
  for (uint32_t s = 0; s < l->model.n_stages; s++) {
    const phx_stage *stage = &l->stages[s];
    if (stage->first_use > l->model.n_uses || stage->n_uses > l->model.n_uses - stage->first_use)
      return phx_fail(err, PHX_INVALID, "stage %s uses units out of range", stage->name);
    for (uint32_t i = 0; i < stage->n_uses; i++) {
      phx_use *use = &l->uses[stage->first_use + i];
      if (use->unit >= l->model.n_units)
        return phx_fail(err, PHX_INVALID, "stage %s uses unit %u of %u", stage->name, use->unit, l->model.n_units);
      use->flags &= ~PHX_USE_LAST;
    }
  }
  for (uint32_t u = 0; u < l->model.n_units; u++) { /* backward runs from the last stage: the first one is last */
    phx_use *last = NULL;
    for (uint32_t s = 0; s < l->model.n_stages && !last; s++)
      for (uint32_t i = 0; i < l->stages[s].n_uses && !last; i++) {
        phx_use *use = &l->uses[l->stages[s].first_use + i];
        if (use->unit == u && (use->flags & PHX_USE_GRADIENT)) last = use;
      }
    if (last) last->flags |= PHX_USE_LAST;
    else if (l->units[u].blocks[PHX_FLAT_TRAINABLE])
      return phx_fail(err, PHX_INVALID, "unit %s has trainable parameters, but no stage writes their gradient",
                      l->units[u].name);
  }
  return PHX_OK;
}

static phx_status check_names(const layout *l, phx_error *err) {
  for (uint32_t i = 0; i < l->model.n_params; i++)
    for (uint32_t j = 0; j < i; j++)
      if (!strcmp(l->params[i].name, l->params[j].name))
        return phx_fail(err, PHX_INVALID, "two parameters are called %s", l->params[i].name);
  return PHX_OK;
}

phx_status phx__layout_build(const phx_model *declared, phx_model **out, phx_error *err) {
  phx_status status = PHX_OK;
  layout *l = phx__calloc(1, sizeof *l);
  if (!l) return phx_fail(err, PHX_NOMEM, "no memory for the model's layout");
  if (!declared->n_params || !declared->n_units || !declared->n_stages) {
    status = phx_fail(err, PHX_INVALID, "the model declares %u parameters, %u units and %u stages: none may be 0",
                      declared->n_params, declared->n_units, declared->n_stages);
    goto done;
  }
  l->params = phx__calloc(declared->n_params, sizeof *l->params);
  l->units = phx__calloc(declared->n_units, sizeof *l->units);
  l->stages = phx__calloc(declared->n_stages, sizeof *l->stages);
  l->uses = phx__calloc(declared->n_uses, sizeof *l->uses);
  if (!l->params || !l->units || !l->stages || !l->uses) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the model's layout");
    goto done;
  }
  const size_t known = declared->param_stride < sizeof *l->params ? declared->param_stride : sizeof *l->params;
  for (uint32_t i = 0; i < declared->n_params; i++) memcpy(&l->params[i], phx_model_param(declared, i), known);
  for (uint32_t i = 0; i < declared->n_units; i++) {
    const phx_unit *unit = phx_model_unit(declared, i);
    l->units[i] = (phx_unit){.name = unit->name, .first_param = unit->first_param, .n_params = unit->n_params};
  }
  for (uint32_t i = 0; i < declared->n_stages; i++) l->stages[i] = *phx_model_stage(declared, i);
  for (uint32_t i = 0; i < declared->n_uses; i++) l->uses[i] = *phx_model_use(declared, i);
  l->model = (phx_model){
      .struct_size = sizeof l->model, .params = l->params, .units = l->units, .stages = l->stages, .uses = l->uses,
      .n_params = declared->n_params, .n_units = declared->n_units, .n_stages = declared->n_stages,
      .n_uses = declared->n_uses, .param_stride = sizeof(phx_param), .unit_stride = sizeof(phx_unit),
      .stage_stride = sizeof(phx_stage), .use_stride = sizeof(phx_use)};
  PHX_TRY_GOTO(check_names(l, err), status, done);
  PHX_TRY_GOTO(place_units(l, err), status, done);
  PHX_TRY_GOTO(check_stages(l, err), status, done);
  *out = &l->model;
done:
  if (status) phx__layout_free(&l->model);
  return status;
}

void phx__layout_free(phx_model *model) {
  layout *l = (layout *)(void *)model;
  if (!l) return;
  phx__free(l->params);
  phx__free(l->units);
  phx__free(l->stages);
  phx__free(l->uses);
  phx__free(l);
}

int phx__layout_next(const phx_model *model, uint32_t unit, uint32_t flat, int64_t first, int64_t numel,
                     phx__range *range) {
  const phx_unit *u = phx_model_unit(model, unit);
  for (; range->next < u->n_params; range->next++) {
    const phx_param *p = phx_model_param(model, u->first_param + range->next);
    if (((p->flags & PHX_PARAM_FROZEN) != 0) != (flat == PHX_FLAT_FROZEN)) continue;
    int64_t begin = p->offset > first ? p->offset : first;
    int64_t end = p->offset + p->numel < first + numel ? p->offset + p->numel : first + numel;
    if (p->offset >= first + numel) return 0;
    if (begin >= end) continue;
    range->first = begin;
    range->numel = end - begin;
    range->in_param = begin - p->offset;
    range->param = p;
    range->next++;
    return 1;
  }
  return 0;
}

int64_t phx__layout_parameters(const phx_model *model) {
  int64_t total = 0;
  for (uint32_t i = 0; i < model->n_params; i++) total += phx_model_param(model, i)->numel;
  return total;
}
