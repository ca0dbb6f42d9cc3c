/* state.c - see hostile.h: state that is named, mapped or made whole wrongly. */
#include "hostile.h"

static const phx_visitor *inner;
static int64_t visited;

static bool once(void) {
  const bool first = !hostile.broken;
  hostile.broken = true;
  return first;
}

static phx_status meddle(void *ctx, const phx_slice *slice, phx_error *err) {
  phx_slice s = *slice;
  (void)ctx;
  if (is(HOSTILE_visit_nothing)) return PHX_OK;
  if (is(HOSTILE_visit_missing) && visited == 2) return visited++, PHX_OK;
  if (visited++ == 1) {
    if (is(HOSTILE_visit_twice)) PHX_TRY(inner->slice(inner->ctx, &s, err));
    if (is(HOSTILE_visit_beyond)) s.blocks += 1000;
    if (is(HOSTILE_visit_before)) s.first_block = -1;
    if (is(HOSTILE_visit_unit)) s.unit = 9999;
    if (is(HOSTILE_visit_flat)) s.flat = 7;
    if (is(HOSTILE_visit_kind)) s.kind = 99;
    if (is(HOSTILE_visit_index)) s.state_index = 9;
    if (is(HOSTILE_visit_index)) s.kind = PHX_STATE_OPTIM;
    if (is(HOSTILE_visit_dtype)) s.dtype = 99;
    if (is(HOSTILE_visit_place)) s.place = 9;
    if (is(HOSTILE_visit_empty)) s.blocks = 0;
    if (is(HOSTILE_visit_size)) s.struct_size = 8;
    if (is(HOSTILE_visit_numel)) s.numel = 5;
    if (is(HOSTILE_visit_null)) return inner->slice(inner->ctx, NULL, err);
    if (is(HOSTILE_visit_nameless)) s.kind = PHX_STATE_PRIVATE;
  }
  if (is(HOSTILE_visit_moved) && s.unit == 2) s.unit = 3; /* of equal size: one twice, one never */
  return inner->slice(inner->ctx, &s, err);
}

static phx_status visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  const phx_visitor outer = {.struct_size = sizeof outer, .slice = meddle};
  inner = visitor;
  visited = 0;
  return hostile.base->visit_state(self, &outer, err);
}

static phx_status map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  PHX_TRY(hostile.base->map(self, slice, mode, out, err));
  if (is(HOSTILE_map_null) && once()) *out = NULL;
  if (is(HOSTILE_map_unaligned) && once()) *out = (char *)*out + 1;
  const bool last = slice->unit == hostile.model->n_units - 1; /* behind it ends the memory */
  if (is(HOSTILE_map_beyond) && last && once()) *out = (char *)*out + 4 * PHX_BLOCK * slice->blocks - 4;
  return PHX_OK;
}

static phx_status state_changed(phx_strategy *self, phx_error *err) {
  if (is(HOSTILE_changed_nothing)) return PHX_OK;
  const phx_status status = hostile.base->state_changed(self, err);
  void *at = NULL;
  phx_slice first = {.struct_size = sizeof first, .kind = PHX_STATE_WEIGHT, .blocks = 1, .dtype = PHX_F32};
  const bool one = is(HOSTILE_changed_one) || (is(HOSTILE_layout_differ) && hostile.comm->rank == 1);
  if (status == PHX_OK && one && hostile.base->map(self, &first, 3, &at, err) == PHX_OK)
    ((float *)at)[5] += 1; /* a replica that is not the others' */
  return status;
}

void hostile_state_calls(phx_strategy_table *t) {
  t->visit_state = visit_state;
  t->map = map;
  t->state_changed = state_changed;
}
