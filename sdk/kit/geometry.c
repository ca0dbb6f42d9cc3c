/* sdk/kit/geometry.c - shards, the order in which gradients become complete, buckets.
 *
 * Pure arithmetic in canonical blocks.  Invariant: over all ranks, and over all buckets, every block comes up exactly
 * once. */
#include <phalanx/kit.h>
#include <stdlib.h>
#include <string.h>

phx_kit_shard phx_kit_shard_of(int64_t blocks, int32_t rank, int32_t ranks) {
  phx_kit_shard s = {.per = (blocks + ranks - 1) / ranks};
  s.first = s.per * rank < blocks ? s.per * rank : blocks;
  s.blocks = blocks - s.first < s.per ? blocks - s.first : s.per;
  return s;
}

int64_t phx_kit_whole_numel(int64_t blocks, int32_t ranks) {
  return (blocks + ranks - 1) / ranks * ranks * PHX_BLOCK;
}

bool phx_kit_part_next(const phx_model *model, uint32_t flat, int64_t first, int64_t blocks, phx_kit_part *part) {
  int64_t at = part->next;
  if (at >= blocks) return false;
  for (uint32_t u = part->unit; u < model->n_units; u++) {
    const phx_unit *unit = phx_model_unit(model, u);
    int64_t inside = first + at - unit->first_block[flat];
    if (inside < 0 || inside >= unit->blocks[flat]) continue;
    int64_t rest = unit->blocks[flat] - inside;
    part->unit = u;
    part->first = inside;
    part->blocks = rest < blocks - at ? rest : blocks - at;
    part->at = at;
    part->next = at + part->blocks;
    return true;
  }
  return false; /* what follows the last unit is padding */
}

phx_status phx_kit_order_create(const phx_model *m, phx_kit_order *out, phx_error *err) {
  phx_kit_order o = {.units = calloc(m->n_units + 1u, sizeof *o.units),
                     .offset = calloc(m->n_units + 1u, sizeof *o.offset)};
  phx_status status = PHX_OK;
  if (!o.units || !o.offset) {
    status = phx_fail(err, PHX_NOMEM, "no memory for the order of %u units", m->n_units);
    goto done;
  }
  for (uint32_t u = 0; u < m->n_units; u++) o.offset[u] = -1;
  for (uint32_t s = m->n_stages; s-- > 0;) {
    const phx_stage *stage = phx_model_stage(m, s);
    for (uint32_t i = stage->n_uses; i-- > 0;) {
      const phx_use *use = phx_model_use(m, stage->first_use + i);
      const phx_unit *unit = phx_model_unit(m, use->unit);
      if (!(use->flags & PHX_USE_LAST) || unit->blocks[PHX_FLAT_TRAINABLE] == 0 || o.offset[use->unit] >= 0) continue;
      o.units[o.n++] = use->unit;
      o.offset[use->unit] = o.numel;
      o.numel += unit->blocks[PHX_FLAT_TRAINABLE] * PHX_BLOCK;
    }
  }
  for (uint32_t u = 0; u < m->n_units; u++)
    if (o.offset[u] < 0 && phx_model_unit(m, u)->blocks[PHX_FLAT_TRAINABLE] > 0) {
      status = phx_fail(err, PHX_INVALID,
                        "unit '%s' has trainable parameters, but no stage adds to their gradient: freeze them, or "
                        "declare the stage's use with PHX_USE_GRADIENT",
                        phx_model_unit(m, u)->name);
      goto done;
    }
  *out = o;
  return PHX_OK;
done:
  phx_kit_order_destroy(&o);
  return status;
}

void phx_kit_order_destroy(phx_kit_order *o) {
  free(o->units);
  free(o->offset);
  memset(o, 0, sizeof *o);
}

static int64_t to_blocks(int64_t numel) {
  return numel <= PHX_BLOCK ? 1 : numel / PHX_BLOCK + (numel % PHX_BLOCK != 0);
}

phx_status phx_kit_buckets_create(const phx_model *m, const phx_kit_order *order, int64_t first_numel, int64_t numel,
                                  phx_kit_bucket **out, uint32_t *n_out, phx_error *err) {
  int64_t total = order->numel / PHX_BLOCK, head = to_blocks(first_numel), each = to_blocks(numel);
  if (head > total) head = total;
  int64_t n = total == 0 ? 0 : 1 + (total - head + each - 1) / each;
  phx_kit_bucket *buckets = n < UINT32_MAX ? calloc((size_t)n + 1, sizeof *buckets) : NULL;
  if (!buckets) return phx_fail(err, PHX_NOMEM, "no memory for %lld buckets", (long long)n);
  uint32_t last = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    int64_t blocks = total - at < each ? total - at : each;
    if (i == 0) blocks = head;
    buckets[i].first = at * PHX_BLOCK;
    buckets[i].numel = blocks * PHX_BLOCK;
    at += blocks;
    for (;; last++) { /* the unit that holds the bucket's last block completes it */
      uint32_t u = order->units[last];
      if (order->offset[u] / PHX_BLOCK + phx_model_unit(m, u)->blocks[PHX_FLAT_TRAINABLE] >= at) break;
    }
    buckets[i].last = last;
  }
  *out = buckets;
  *n_out = (uint32_t)n;
  return PHX_OK;
}
