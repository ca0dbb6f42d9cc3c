/* canonical.c - reductions in the order T(n) of phalanx/comm.h, whatever NCCL's own order is.
 *
 * Each member owns a slice.  A chunk at a time: everybody sends every owner its part of that slice (one group of
 * sends and receives), the owner adds the n rows up in the order of the tree, and the sums go where they are needed
 * (all, the root, nowhere else).  fp32 and bf16 sums are done by the device's own `add` and `cast` (bf16 is widened
 * to fp32, and rounded once); other types by the CPU (tree.c), after which the call is done when it returns.
 *
 * What it costs, S bytes on n ranks: as many bytes on the wire as a ring, 2 S (n - 1) / n received, in two steps
 * instead of a pipeline of 2 (n - 1); and on the device about 3 S (n - 1) / n read and written for the additions, n
 * launches a chunk.
 *
 * The staging's second half, per row of `stride` elements: for the device n rows as received and n rows of fp32;
 * for the CPU n rows, whose copy in pinned memory is added up. */
#include "comm_nccl.h"

typedef struct canonical {
  const nccl_call *call;
  nccl_comm *c;
  int64_t element, stride; /* bytes of one; elements of a row */
  char *rows;              /* as received */
  float *wide;             /* fp32 rows; F32: the same as rows */
  int32_t on_device;
} canonical;

static phx_status add_rows(const canonical *k, int32_t first, int32_t n, int64_t numel, phx_error *err) {
  const phx_device *d = k->c->world->device;
  int32_t left = 1;
  if (n == 1) return PHX_OK;
  while (left * 2 < n) left *= 2;
  PHX_TRY(add_rows(k, first, left, numel, err));
  PHX_TRY(add_rows(k, first + left, n - left, numel, err));
  return d->add(d->ctx, k->wide + first * k->stride, k->wide + (first + left) * k->stride, numel, k->call->s, err);
}

/* Row 0 becomes the sum of all rows. */
static phx_status reduce_rows(const canonical *k, int64_t numel, phx_error *err) {
  const phx_device *d = k->c->world->device;
  const nccl_call *call = k->call;
  const int32_t n = k->c->n;
  if (numel == 0) return PHX_OK;
  if (!k->on_device) {
    char *host = nccl_pinned(k->c) + k->c->world->config.staging / 2;
    const int64_t bytes = ((n - 1) * k->stride + numel) * k->element;
    PHX_TRY(nccl_copy(call, host, k->rows, bytes, err));
    PHX_TRY(nccl_wait(call, err));
    nccl_tree(call->dtype, call->reduce, host, k->stride * k->element, n, numel);
    return nccl_copy(call, k->rows, host, numel * k->element, err);
  }
  if (call->dtype == PHX_F32) return add_rows(k, 0, n, numel, err);
  PHX_TRY(d->cast(d->ctx, k->wide, PHX_F32, k->rows, call->dtype, (n - 1) * k->stride + numel, call->s, err));
  PHX_TRY(add_rows(k, 0, n, numel, err));
  return d->cast(d->ctx, k->rows, call->dtype, k->wide, PHX_F32, numel, call->s, err);
}

typedef struct part {
  int64_t begin, numel; /* of the source, in elements */
} part;

/* Chunk number k of every owner's elements; 0: there is no such chunk. */
static int cut(const canonical *k, int64_t numel, int64_t round, part *parts) {
  const int32_t n = k->c->n;
  if (k->call->op == PHX_OP_REDUCE_SCATTER) {
    const int64_t at = round * k->stride;
    if (at >= numel) return 0;
    for (int32_t p = 0; p < n; p++) parts[p] = (part){p * numel + at, numel - at < k->stride ? numel - at : k->stride};
    return 1;
  }
  const int64_t at = round * k->stride * n, left = numel - at;
  if (left <= 0) return 0;
  for (int32_t p = 0; p < n; p++) {
    int64_t lo = 0, hi = 0;
    nccl_cut(left < k->stride * n ? left : k->stride * n, n, p, &lo, &hi);
    parts[p] = (part){at + lo, hi - lo};
  }
  return 1;
}

static phx_status gather_rows(const canonical *k, const char *src, const part *parts, phx_error *err) {
  nccl_parcel parcels[PHX_RANKS_MAX];
  const int64_t mine = parts[k->c->me].numel * k->element;
  for (int32_t p = 0; p < k->c->n; p++)
    parcels[p] = (nccl_parcel){src + parts[p].begin * k->element, k->rows + p * k->stride * k->element,
                               parts[p].numel * k->element, mine};
  PHX_TRY(nccl_copy(k->call, parcels[k->c->me].to, parcels[k->c->me].from, mine, err));
  return nccl_exchange(k->call, parcels, err);
}

static phx_status hand_out(const canonical *k, char *dst, int64_t round, const part *parts, phx_error *err) {
  nccl_parcel parcels[PHX_RANKS_MAX] = {{0}};
  const nccl_call *call = k->call;
  const int32_t me = k->c->me;
  const int64_t mine = parts[me].numel * k->element;
  if (call->op == PHX_OP_REDUCE_SCATTER)
    return nccl_copy(call, dst + round * k->stride * k->element, k->rows, mine, err);
  const int to_all = call->op == PHX_OP_ALL_REDUCE, i_get = to_all || me == call->root;
  for (int32_t p = 0; p < k->c->n; p++) {
    parcels[p].from = k->rows;
    parcels[p].send = to_all || p == call->root ? mine : 0;
    parcels[p].to = i_get ? dst + parts[p].begin * k->element : NULL;
    parcels[p].recv = i_get ? parts[p].numel * k->element : 0;
  }
  if (i_get) PHX_TRY(nccl_copy(call, parcels[me].to, k->rows, mine, err));
  return nccl_exchange(call, parcels, err);
}

phx_status nccl_canonical(const nccl_call *call, const void *src, void *dst, int64_t numel, phx_error *err) {
  nccl_comm *c = call->comm;
  canonical k = {.call = call, .c = c, .element = (int64_t)phx_dtype_bytes(call->dtype)};
  part parts[PHX_RANKS_MAX];
  k.on_device = call->reduce == PHX_SUM && (call->dtype == PHX_F32 || call->dtype == PHX_BF16);
  k.stride = c->world->config.staging / 2 / (c->n * 8) / NCCL_GRAIN * NCCL_GRAIN; /* 8 bytes: 2 + 4 are needed, or 8 */
  k.rows = nccl_staging(c) + c->world->config.staging / 2;
  k.wide = (float *)(void *)(call->dtype == PHX_F32 ? k.rows : k.rows + c->n * k.stride * k.element);
  for (int64_t round = 0; cut(&k, numel, round, parts); round++) {
    PHX_TRY(gather_rows(&k, src, parts, err));
    PHX_TRY(reduce_rows(&k, parts[c->me].numel, err));
    PHX_TRY(hand_out(&k, dst, round, parts, err));
  }
  return PHX_OK;
}
