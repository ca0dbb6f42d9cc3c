/* plugins/cpu/attention.c - causal attention and its gradient in tiles, after FlashAttention-2 (arXiv 2307.08691).
 *
 * Keeps no T x T matrix: the forward pass walks over tiles of 64 keys with a running maximum and sum per query, the
 * backward pass computes the probabilities again from qkv and lse.  Tiles above the diagonal are not computed, and
 * inside a diagonal tile only what the mask leaves, in steps of 4 rows and one vector.
 *
 * Order of the loops.  Forward: for a group of up to 4 tiles of queries, for each tile of keys, for each tile of the
 * group: so keys and values are copied once per group, and the outputs stay in scratch until they are complete.
 * Backward: for a group of tiles of keys, for each tile of queries, for each tile of the group: so queries and output
 * gradients are copied, and dq read and written, once per group, and dk and dv stay in scratch.  A group, its
 * gradients and one tile of scores stay in the second-level cache (1 MiB), what one product reuses in the first.
 *
 * Forward computes scores transposed, S^T = K Q^T: the softmax then runs down the columns of a tile, without a
 * horizontal sum, and neither K nor the probabilities need a transpose.  Backward computes S = Q K^T with K^T and V^T
 * transposed once per 64 keys.  All operands are copied into dense tiles: rows of qkv are 3C apart, a distance at
 * which they evict each other from the first-level cache.
 *
 * In bf16, tiles are widened as they are copied, and everything between is as in fp32.  dq is complete only when the
 * last group of keys it sees is; until then it is kept in fp32 in two halves: in its own place and in the dk of the
 * same row, which is not written before.
 *
 * Invariant: scratch per thread is a constant, whatever the shape.  One item (a group of queries forward, a head
 * backward) is computed by one thread in one order, so the bits do not depend on the number of threads.
 * Unlike the other kernels this file may contract a * b + c; its bits differ between instruction sets.
 *
 * Does not do: dropout, other masks, heads wider than 256. */
#include <math.h>
#include "cpu.h"
#include "tile.h"

#define WIDEST 256 /* largest head size */
#define GROUP 4    /* most tiles that are held at once; fewer where a head is wide */
#define LAZY 8.0f  /* the running maximum is left behind by up to this, in powers of two */
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

/* One thread's part of the scratch; each pass uses some of it.  Arrays of TILE * WIDEST hold a group of tiles one
 * after the other (part below), or one tile. */
typedef struct tiles {
  float q[TILE * WIDEST];                     /* (TILE, dp); forward: group of Q^T (d, TILE) */
  float k[TILE * WIDEST];                     /* (TILE, dp); backward: group */
  float v[TILE * WIDEST];                     /* (TILE, dp); backward: group of V^T (d, TILE) */
  float kt[TILE * WIDEST];                    /* group of K^T (d, TILE) */
  float o[TILE * WIDEST];                     /* forward: group of unnormalised outputs; backward: dO */
  float dk[TILE * WIDEST], dv[TILE * WIDEST]; /* groups */
  float dq[TILE * WIDEST];
  float s[TILE * TILE], dp[TILE * TILE];
  float max[GROUP * TILE], sum[GROUP * TILE];
  float decay[TILE];
} tiles;
_Static_assert(sizeof(tiles) % PHX_ALIGN == 0, "each thread's tiles begin at PHX_ALIGN");

int64_t phx__cpu_attention_scratch(int32_t threads) {
  return threads * (int64_t)sizeof(tiles);
}

typedef struct job {
  const void *qkv, *out, *dout;
  const float *lse;
  void *new_out, *dqkv;
  float *new_lse, *work;
  int64_t t, c, heads, d, bytes; /* bytes: of an element */
  float scale;
  int32_t dtype;
  tiles *scratch;
} job;

/* Tiles in a group: what fits TILE * WIDEST. */
static int64_t group_of(int64_t dp) {
  return WIDEST / dp < GROUP ? WIDEST / dp : GROUP;
}

/* The rows of a head in x(B, T, ld), and those of a later part of the same. */
static source head_of(const job *a, const void *x, int64_t ld, int64_t batch, int64_t head) {
  return (source){phx__at(a->dtype, x, batch * a->t * ld + head * a->d), ld, a->dtype};
}
static source part_of(source x, int64_t elements) {
  return (source){phx__at(x.dtype, x.p, elements), x.ld, x.dtype};
}
static soon soon_rows(source x, int64_t row, int64_t rows) {
  return (soon){rows_from(x, row).p, x.ld * (int64_t)phx_dtype_bytes(x.dtype), rows};
}

/* The number of rows in the tile that begins at t0, of t in all; 0 past the end. */
static int64_t rows_at(int64_t t0, int64_t t) {
  if (t0 >= t) return 0;
  return t - t0 < TILE ? t - t0 : TILE;
}

/* ---- forward ---- */

/* One vector of columns (queries) of S^T(keys, TILE) becomes probabilities relative to the running maximum.  In a
 * diagonal tile `lane` is the first query's place in it: keys after a query are masked.  The maximum follows only when
 * it is more than LAZY behind: until then probabilities up to 2^LAZY are as exact, and nothing has to be rescaled.
 * Returns whether any query's has moved. */
INLINE int softmax_column(float *s, int64_t keys, int diagonal, int64_t lane, float *max, float *sum, float *decay) {
  const phx__vf none = phx__splat(-INFINITY), query = lane_numbers() + (float)lane;
  if (diagonal) {
    if (keys > lane + VL) keys = lane + VL;
    for (int64_t k = lane; k < keys; k++) { /* where key > query: -infinity */
      const phx__vi after = phx__splat((float)k) > query;
      const phx__vf x = phx__load(s + k * TILE);
      phx__store(s + k * TILE, (phx__vf)(((phx__vi)x & ~after) | ((phx__vi)none & after)));
    }
  }
  phx__vf top[4] = {none, none, none, none};
  int64_t k = 0;
  for (; k + 4 <= keys; k += 4)
    UNROLL for (int u = 0; u < 4; u++) top[u] = larger(phx__load(s + (k + u) * TILE), top[u]);
  for (; k < keys; k++) top[0] = larger(phx__load(s + k * TILE), top[0]);
  const phx__vf old = phx__load(max);
  const phx__vf here = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  const phx__vi moves = here - old > LAZY;
  const phx__vf now = phx__choose(moves, here, old);
  phx__vf total[4] = {(phx__vf){0}, (phx__vf){0}, (phx__vf){0}, (phx__vf){0}};
  for (k = 0; k + 4 <= keys; k += 4) {
    phx__vf p[4];
    UNROLL for (int u = 0; u < 4; u++) p[u] = exp2_lanes(phx__load(s + (k + u) * TILE) - now);
    UNROLL for (int u = 0; u < 4; u++) phx__store(s + (k + u) * TILE, p[u]);
    UNROLL for (int u = 0; u < 4; u++) total[u] += p[u];
  }
  for (; k < keys; k++) {
    const phx__vf p = exp2_lanes(phx__load(s + k * TILE) - now);
    phx__store(s + k * TILE, p);
    total[0] += p;
  }
  phx__vf before = phx__load(sum);
  const int moved = any_lane(moves);
  if (moved) {
    const phx__vf shrink = exp2_lanes(old - now);
    phx__store(max, now);
    before *= shrink;
    phx__store(decay, shrink);
  } else {
    phx__store(decay, phx__splat(1.0f));
  }
  phx__store(sum, before + ((total[0] + total[1]) + (total[2] + total[3])));
  return moved;
}

/* Rows of o(rows, dp) times decay[row]; rows that keep their maximum are left alone. */
static void rescale(float *o, int64_t dp, int64_t rows, const float *decay) {
  for (int64_t r = 0; r < rows; r++, o += dp) {
    if (decay[r] == 1.0f) continue;
    for (int64_t i = 0; i < dp; i += VL) phx__store(o + i, phx__load(o + i) * decay[r]);
  }
}

/* A tile of queries of w's group against the keys in w. */
static void forward_tile(tiles *w, int64_t part, int64_t rows, int64_t keys, int diagonal, int first, int64_t d,
                         soon soon_s, soon soon_o, int64_t bytes) {
  const int64_t dp = round_up(d, VL);
  const int vecs = (int)(round_up(rows, VL) / VL);
  float *o = w->o + part * TILE * dp;
  int moved = 0;
  product(diagonal ? COLS_FROM : WHOLE, keys, vecs, d, (operand){w->k, dp, 1}, w->q + part * TILE * dp, TILE, w->s,
          TILE, 0, soon_s, bytes);
  for (int64_t i = 0; i < vecs * VL; i += VL)
    moved |=
        softmax_column(w->s + i, keys, diagonal, i, w->max + part * TILE + i, w->sum + part * TILE + i, w->decay + i);
  if (moved && !first) rescale(o, dp, rows, w->decay);
  product(diagonal ? DEPTH_UPTO : WHOLE, rows, (int)(dp / VL), keys, (operand){w->s, 1, TILE}, w->v, dp, o, dp, !first,
          soon_o, bytes);
}

/* out(rows, d; c) and lse of a tile of queries that has seen all its keys */
INLINE void forward_end_as(int32_t dtype, const tiles *w, int64_t part, void *out, float *lse, int64_t c, int64_t rows,
                           int64_t d) {
  const int64_t dp = round_up(d, VL);
  const float *o = w->o + part * TILE * dp, *max = w->max + part * TILE, *sum = w->sum + part * TILE;
  for (int64_t r = 0; r < rows; r++) {
    const float by = 1.0f / sum[r];
    PHX__IVDEP for (int64_t i = 0; i < d; i++) phx__set(dtype, out, r * c + i, o[r * dp + i] * by);
    lse[r] = max[r] * LN2 + logf(sum[r]);
  }
}

static void forward_end(int32_t dtype, const tiles *w, int64_t part, void *out, float *lse, int64_t c, int64_t rows,
                        int64_t d) {
  PHX__BY_DTYPE(dtype, forward_end_as, w, part, out, lse, c, rows, d);
}

/* Queries q0 .. q0 + n * TILE - 1 of one head: every tile of keys is packed once for the group.  `after`: the queries
 * of the next group. */
static void forward_group(const job *a, tiles *w, int64_t batch, int64_t head, int64_t q0, int64_t n, soon after) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL), t = a->t, bytes = a->bytes;
  const source q = head_of(a, a->qkv, 3 * a->c, batch, head), k = part_of(q, a->c), v = part_of(k, a->c);
  char *out = (char *)a->new_out + (batch * t * a->c + head * d) * bytes;
  float *lse = a->new_lse + (batch * a->heads + head) * t;
  for (int64_t i = 0; i < n; i++)
    pack_transposed(w->q + i * TILE * dp, rows_from(q, q0 + i * TILE), rows_at(q0 + i * TILE, t), d, a->scale * LOG2E);
  for (int64_t i = 0; i < n * TILE; i++) w->max[i] = -INFINITY, w->sum[i] = 0.0f;
  for (int64_t k0 = 0; k0 < q0 + n * TILE; k0 += TILE) {
    const int64_t keys = rows_at(k0, t), next = k0 + TILE, on_diagonal = k0 < q0 ? -1 : (k0 - q0) / TILE;
    const int64_t first = on_diagonal < 0 ? 0 : on_diagonal;
    pack(w->k, dp, rows_from(k, k0), keys, d);
    pack(w->v, dp, rows_from(v, k0), keys, d);
    for (int64_t i = first; i < n; i++) {
      const int64_t rows = rows_at(q0 + i * TILE, t);
      soon soon_s = nothing, soon_o = nothing;
      if (i == on_diagonal) { /* the last of this tile of queries */
        const int64_t left = after.rows - i * TILE;
        soon_s = (soon){out + k0 * a->c * bytes, a->c * bytes, rows};
        soon_o = (soon){after.p + i * TILE * ld * bytes, ld * bytes, left < TILE ? left : TILE};
      } else if (i == on_diagonal + 1) {
        soon_s = soon_rows(k, next, rows_at(next, t));
        soon_o = soon_rows(v, next, rows_at(next, t));
      }
      forward_tile(w, i, rows, keys, i == on_diagonal, k0 == 0, d, soon_s, soon_o, d * bytes);
    }
    if (on_diagonal >= 0) forward_end(a->dtype, w, on_diagonal, out + k0 * a->c * bytes, lse + k0, a->c, keys, d);
  }
}

/* The first query of a head's x-th group of n: groups are taken from both ends in turn, so that equal numbers of items
 * are about equal work. */
static int64_t forward_query(int64_t x, int64_t n, int64_t size) {
  return (x % 2 ? n - 1 - x / 2 : x / 2) * size;
}

static int64_t forward_groups(const job *a) { /* of a head */
  const int64_t size = group_of(round_up(a->d, VL)) * TILE;
  return (a->t + size - 1) / size;
}

/* Items are the groups of queries of every head. */
static void forward_items(void *arg, int64_t first, int64_t last, int32_t worker) {
  const job *a = arg;
  const int64_t size = group_of(round_up(a->d, VL)) * TILE, n = forward_groups(a), ld = 3 * a->c * a->bytes;
  for (int64_t i = first; i < last; i++) {
    const int64_t bh = i / n, q0 = forward_query(i % n, n, size), left = a->t - q0;
    const int64_t next = i + 1 == last ? i : i + 1, nq0 = forward_query(next % n, n, size), nleft = a->t - nq0;
    const char *q =
        (const char *)a->qkv + (next / n / a->heads * a->t + nq0) * ld + next / n % a->heads * a->d * a->bytes;
    forward_group(a, a->scratch + worker, bh / a->heads, bh % a->heads, q0,
                  ((left < size ? left : size) + TILE - 1) / TILE, (soon){q, ld, nleft < size ? nleft : size});
  }
}

/* ---- backward ---- */

/* s(rows, TILE): scores in powers of two become probabilities P; dp becomes dS = P * (dp - D). */
static void probabilities(float *s, float *dp, int64_t rows, int64_t keys, int diagonal, const float *lse,
                          const float *dots) {
  const phx__vf lanes = lane_numbers();
  for (int64_t r = 0; r < round_up(rows, ROWS); r++, s += TILE, dp += TILE) {
    const int64_t limit = diagonal && r + 1 < keys ? r + 1 : keys;
    /* one vector past the last that is computed may be read by the row group's products */
    const int64_t end = diagonal ? (r / VL + 1) * VL : TILE;
    if (r >= rows) { /* padding rows add nothing */
      memset(s, 0, (size_t)end * sizeof *s);
      memset(dp, 0, (size_t)end * sizeof *dp);
      continue;
    }
    const phx__vf l = phx__splat(lse[r] * LOG2E), dot = phx__splat(dots[r]);
    for (int64_t i = 0; i < end; i += VL) {
      phx__vf p = exp2_lanes(phx__load(s + i) - l), g = phx__load(dp + i);
      g = p * (g - dot);
      if (i + VL > limit) {
        const phx__vi in = lanes + (float)i < phx__splat((float)limit);
        p = (phx__vf)((phx__vi)p & in);
        g = (phx__vf)((phx__vi)g & in);
      }
      phx__store(s + i, p);
      phx__store(dp + i, g);
    }
  }
}

/* dots[r] = sum over the head of dout * out, rows of both c apart */
INLINE void row_dots_as(int32_t dtype, float *dots, const void *dout, const void *out, int64_t c, int64_t rows,
                        int64_t d) {
  for (int64_t r = 0; r < rows; r++, dout = phx__at(dtype, dout, c), out = phx__at(dtype, out, c)) {
    phx__vf acc = {0};
    int64_t i = 0;
    for (; i + VL <= d; i += VL) acc += phx__load_as(dtype, dout, i) * phx__load_as(dtype, out, i);
    if (i < d) acc += phx__load_part_as(dtype, dout, i, d - i) * phx__load_part_as(dtype, out, i, d - i);
    float lane[VL];
    phx__store(lane, acc);
    for (int width = VL / 2; width; width /= 2)
      for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    dots[r] = lane[0];
  }
}

static void row_dots(int32_t dtype, float *dots, const void *dout, const void *out, int64_t c, int64_t rows,
                     int64_t d) {
  PHX__BY_DTYPE(dtype, row_dots_as, dots, dout, out, c, rows, d);
}

/* dst(rows, d; ld) = or += factor * src(rows, dp) */
INLINE void unpack_as(int32_t dtype, void *dst, int64_t ld, const float *src, int64_t dp, int64_t rows, int64_t d,
                      float factor, int add) {
  for (int64_t r = 0; r < rows; r++, dst = phx__out_at(dtype, dst, ld), src += dp) {
    int64_t i = 0;
    for (; i + VL <= d; i += VL)
      phx__store_as(dtype, dst, i, phx__load(src + i) * factor + (add ? phx__load_as(dtype, dst, i) : (phx__vf){0}));
    for (; i < d; i++) phx__set(dtype, dst, i, src[i] * factor + (add ? phx__get(dtype, dst, i) : 0.0f));
  }
}
static void unpack(int32_t dtype, void *dst, int64_t ld, const float *src, int64_t dp, int64_t rows, int64_t d,
                   float factor, int add) {
  PHX__BY_DTYPE(dtype, unpack_as, dst, ld, src, dp, rows, d, factor, add);
}

/* The same into bf16 that is added to again unless `last`: until then the fp32 sum stands in two halves, the upper in
 * dst, the lower in `low`. */
static void unpack_halves(uint16_t *dst, uint16_t *low, int64_t ld, const float *src, int64_t dp, int64_t rows,
                          int64_t d, float factor, int add, int last) {
  for (int64_t r = 0; r < rows; r++, dst += ld, low += ld, src += dp) PHX__IVDEP for (int64_t i = 0; i < d; i++) {
      const float before = add ? phx__float_of((uint32_t)dst[i] << 16 | low[i]) : 0.0f, x = src[i] * factor + before;
      const uint32_t bits = phx__bits_of(x);
      dst[i] = last ? phx__to_bf16(x) : (uint16_t)(bits >> 16);
      if (!last) low[i] = (uint16_t)bits;
    }
}

/* One tile of queries and what is needed of it. */
typedef struct queries {
  source q;
  const void *out, *dout; /* rows c apart */
  const float *lse;
  void *dq;
  float *dots;
  int64_t rows;
} queries;

/* What may be asked for during the products of one tile. */
typedef struct ahead {
  soon of[5];
} ahead;

/* The tile of queries in w->q, w->o against one tile of keys of w's group: adds to (on the diagonal: sets) its dk and
 * dv, adds to (first: sets) w->dq. */
static void backward_tile(tiles *w, int64_t part, int64_t rows, int64_t keys, int64_t d, int diagonal, const queries *x,
                          const ahead *next) {
  const int64_t dp = round_up(d, VL), at = part * TILE * dp, bytes = d * (int64_t)phx_dtype_bytes(x->q.dtype);
  const int dvecs = (int)(dp / VL), add = !diagonal;
  const enum mask upper = diagonal ? COLS_UPTO : WHOLE, later = diagonal ? DEPTH_FROM : WHOLE;
  const operand p = {w->s, 1, TILE}, ds = {w->dp, 1, TILE};
  product(upper, rows, TV, d, (operand){w->q, dp, 1}, w->kt + at, TILE, w->s, TILE, 0, next->of[0], bytes);
  product(upper, rows, TV, d, (operand){w->o, dp, 1}, w->v + at, TILE, w->dp, TILE, 0, next->of[1], bytes);
  probabilities(w->s, w->dp, rows, keys, diagonal, x->lse, x->dots);
  product(later, keys, dvecs, rows, p, w->o, dp, w->dv + at, dp, add, next->of[2], bytes);
  product(later, keys, dvecs, rows, ds, w->q, dp, w->dk + at, dp, add, next->of[3], bytes);
  product(diagonal ? DEPTH_UPTO : WHOLE, rows, dvecs, keys, (operand){w->dp, TILE, 1}, w->k + at, dp, w->dq, dp,
          part > 0, next->of[4], bytes);
}

/* The tile of queries at q0 against the group of n tiles of keys at k0; dk: where the group's go. */
static void backward_queries(const job *a, tiles *w, const queries *x, int64_t q0, int64_t k0, int64_t n, source k,
                             const char *dk) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL), next = q0 + TILE, more = rows_at(next, a->t);
  const int64_t bytes = a->bytes, row = ld * bytes;
  const source dout = {x->dout, a->c, a->dtype}, out = {x->out, a->c, a->dtype};
  if (k0 == 0) row_dots(a->dtype, x->dots, x->dout, x->out, a->c, x->rows, d);
  pack(w->q, dp, x->q, x->rows, d);
  pack(w->o, dp, dout, x->rows, d);
  for (int64_t i = 0; i < n && k0 + i * TILE <= q0; i++) {
    const int64_t keys = rows_at(k0 + i * TILE, a->t), k_next = k0 + (n + i) * TILE;
    ahead soon_of = {{nothing, nothing, nothing, nothing, nothing}};
    if (more == 0) { /* what this group of keys writes, and the next one */
      soon_of.of[0] = (soon){dk + i * TILE * row, row, keys};
      soon_of.of[1] = (soon){dk + i * TILE * row + a->c * bytes, row, keys};
      soon_of.of[3] = soon_rows(k, k_next, rows_at(k_next, a->t));
      soon_of.of[4] = soon_rows(part_of(k, a->c), k_next, rows_at(k_next, a->t));
    } else if (i == 0) { /* the next queries */
      soon_of.of[0] = soon_rows(x->q, TILE, more);
      soon_of.of[1] = soon_rows(dout, TILE, more);
      soon_of.of[2] = (soon){(const char *)x->dq + TILE * row, row, more};
      if (k0 == 0) soon_of.of[3] = soon_rows(out, TILE, more);
    }
    backward_tile(w, i, x->rows, keys, d, k0 + i * TILE == q0, x, &soon_of);
  }
  if (a->dtype == PHX_BF16)
    unpack_halves(x->dq, (uint16_t *)x->dq + a->c, ld, w->dq, dp, x->rows, d, a->scale, k0 > 0, q0 < k0 + n * TILE);
  else
    unpack(a->dtype, x->dq, ld, w->dq, dp, x->rows, d, a->scale, k0 > 0);
}

static void backward_head(const job *a, tiles *w, int64_t batch, int64_t head) {
  const int64_t c = a->c, ld = 3 * c, d = a->d, dp = round_up(d, VL), t = a->t, n = group_of(dp), bytes = a->bytes;
  const source q = head_of(a, a->qkv, ld, batch, head), k = part_of(q, c), v = part_of(k, c);
  const source dout = head_of(a, a->dout, c, batch, head), out = head_of(a, a->out, c, batch, head);
  const float *lse = a->lse + (batch * a->heads + head) * t;
  float *dots = a->work + (batch * a->heads + head) * t;
  char *dq = (char *)a->dqkv + (batch * t * ld + head * d) * bytes, *dk = dq + c * bytes, *dv = dk + c * bytes;
  for (int64_t k0 = 0; k0 < t; k0 += n * TILE) {
    for (int64_t i = 0, k1 = k0; i < n && k1 < t; i++, k1 += TILE) {
      const int64_t keys = rows_at(k1, t), to = i * TILE * dp;
      pack(w->k + to, dp, rows_from(k, k1), keys, d);
      pack_transposed(w->kt + to, rows_from(k, k1), keys, d, a->scale * LOG2E);
      pack_transposed(w->v + to, rows_from(v, k1), keys, d, 1.0f);
    }
    for (int64_t q0 = k0; q0 < t; q0 += TILE) {
      const queries x = {rows_from(q, q0), rows_from(out, q0).p, rows_from(dout, q0).p, lse + q0, dq + q0 * ld * bytes,
                         dots + q0,        rows_at(q0, t)};
      backward_queries(a, w, &x, q0, k0, n, k, dk + k0 * ld * bytes);
    }
    for (int64_t i = 0, k1 = k0; i < n && k1 < t; i++, k1 += TILE) {
      const int64_t rows = rows_at(k1, t), at = k1 * ld * bytes;
      unpack(a->dtype, dk + at, ld, w->dk + i * TILE * dp, dp, rows, d, a->scale, 0);
      unpack(a->dtype, dv + at, ld, w->dv + i * TILE * dp, dp, rows, d, 1.0f, 0);
    }
  }
}

static void backward_items(void *arg, int64_t first, int64_t last, int32_t worker) {
  const job *a = arg;
  for (int64_t i = first; i < last; i++) backward_head(a, a->scratch + worker, i / a->heads, i % a->heads);
}

/* ---- entry points ---- */

static phx_status check(int64_t b, int64_t t, int64_t c, int64_t heads, phx_error *err) {
  if (b < 1 || t < 1 || heads < 1 || c < 1 || c % heads)
    return phx_fail(
        err, PHX_INVALID,
        "attention: batch %lld, sequence %lld, channels %lld, heads %lld: all must be positive and the "
        "channels a multiple of the heads",
        (long long)b, (long long)t, (long long)c, (long long)heads);
  if (c / heads > WIDEST)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "attention: a head of %lld channels; the cpu device goes to %d: use more heads",
                    (long long)(c / heads), WIDEST);
  return PHX_OK;
}

static phx_status begin(phx__cpu *cpu, int32_t dtype, int64_t b, int64_t t, int64_t c, int64_t heads, phx_stream *s,
                        job *out, phx_error *err) {
  void *scratch = NULL;
  PHX_TRY(check(b, t, c, heads, err));
  PHX_TRY(phx__cpu_begin(cpu, dtype, s, err));
  PHX_TRY(phx__cpu_scratch(cpu, &scratch, err));
  *out = (job){.t = t,
               .c = c,
               .heads = heads,
               .d = c / heads,
               .bytes = (int64_t)phx_dtype_bytes(dtype),
               .scale = (float)(1.0 / sqrt((double)(c / heads))),
               .dtype = dtype,
               .scratch = scratch};
  return PHX_OK;
}

phx_status phx__cpu_attention(void *ctx, int32_t dtype, void *out, float *lse, const void *qkv, int64_t b, int64_t t,
                              int64_t c, int64_t heads, phx_stream *s, phx_error *err) {
  phx__cpu *cpu = ctx;
  job a;
  PHX_TRY(begin(cpu, dtype, b, t, c, heads, s, &a, err));
  a.qkv = qkv, a.new_out = out, a.new_lse = lse;
  phx__cpu_parallel(cpu, b * heads * forward_groups(&a), 1, forward_items, &a);
  return PHX_OK;
}

phx_status phx__cpu_attention_backward(void *ctx, int32_t dtype, void *dqkv, const void *dout, const void *qkv,
                                       const void *out, const float *lse, float *work, int64_t b, int64_t t, int64_t c,
                                       int64_t heads, phx_stream *s, phx_error *err) {
  phx__cpu *cpu = ctx;
  job a;
  PHX_TRY(begin(cpu, dtype, b, t, c, heads, s, &a, err));
  a.qkv = qkv, a.out = out, a.lse = lse, a.dout = dout, a.dqkv = dqkv, a.work = work;
  phx__cpu_parallel(cpu, b * heads, 1, backward_items, &a);
  return PHX_OK;
}
