/* plugins/cpu/attention.c - causal attention and its gradient in tiles, after FlashAttention-2 (arXiv 2307.08691).
 *
 * Keeps no T x T matrix: the forward pass walks over tiles of 64 keys with a running maximum and sum per query, the
 * backward pass computes the probabilities again from qkv and lse.  Tiles above the diagonal are not computed, and
 * inside a diagonal tile only what the mask leaves, in steps of 4 rows and one vector.
 *
 * Forward computes scores transposed, S^T = K Q^T: the softmax then runs down the columns of a tile, without a
 * horizontal sum, and neither K nor the probabilities need a transpose.  Backward computes S = Q K^T with K^T and V^T
 * transposed once per 64 keys.  Everything else is copied into dense tiles: rows of qkv are 3C apart, a distance at
 * which they evict each other from the first-level cache.
 *
 * Invariant: scratch per thread is a constant, whatever the shape.  One item (a tile of queries forward, a head
 * backward) is computed by one thread in one order, so the bits do not depend on the number of threads.
 * Unlike the other kernels this file may contract a * b + c; its bits differ between instruction sets.
 *
 * Does not do: dropout, other masks, heads wider than 256. */
#include <math.h>
#include "cpu.h"
#include "tile.h"

#define WIDEST 256 /* largest head size */
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

/* One thread's part of the scratch; each pass uses some of it. */
typedef struct tiles {
  float q[TILE * WIDEST]; /* (TILE, dp) forward: Q^T (d, TILE) */
  float k[TILE * WIDEST];
  float v[TILE * WIDEST];  /* backward: V^T (d, TILE) */
  float kt[TILE * WIDEST]; /* K^T (d, TILE) */
  float o[TILE * WIDEST];  /* forward: unnormalised output; backward: dO */
  float dk[TILE * WIDEST], dv[TILE * WIDEST], dq[TILE * WIDEST];
  float s[TILE * TILE], dp[TILE * TILE];
  float max[TILE], sum[TILE], decay[TILE];
  float fill[64];
} tiles;
_Static_assert(sizeof(tiles) % PHX_ALIGN == 0, "each thread's tiles begin at PHX_ALIGN");

int64_t phx__cpu_attention_scratch(int32_t threads) {
  return threads * (int64_t)sizeof(tiles);
}

/* ---- forward ---- */

typedef struct job {
  const float *qkv, *out, *lse, *dout;
  float *new_out, *new_lse, *dqkv, *work;
  int64_t t, c, heads, d;
  float scale;
  tiles *scratch;
} job;

/* One vector of columns (queries) of S^T(keys, TILE) becomes probabilities relative to the new running maximum.  In a
 * diagonal tile `lane` is the first query's place in it: keys after a query are masked. */
INLINE void softmax_column(float *s, int64_t keys, int diagonal, int64_t lane, float *max, float *sum, float *decay) {
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
    for (int u = 0; u < 4; u++) top[u] = larger(phx__load(s + (k + u) * TILE), top[u]);
  for (; k < keys; k++) top[0] = larger(phx__load(s + k * TILE), top[0]);
  const phx__vf old = phx__load(max);
  const phx__vf now = larger(larger(larger(top[0], top[1]), larger(top[2], top[3])), old);
  const phx__vf shrink = exp2_lanes(old - now);
  phx__vf total[2] = {(phx__vf){0}, (phx__vf){0}};
  for (k = 0; k < keys; k++) {
    const phx__vf p = exp2_lanes(phx__load(s + k * TILE) - now);
    phx__store(s + k * TILE, p);
    total[k & 1] += p;
  }
  phx__store(max, now);
  phx__store(decay, shrink);
  phx__store(sum, phx__load(sum) * shrink + (total[0] + total[1]));
}

/* Rows of o(rows, dp) times decay[row]; rows that keep their maximum are left alone. */
static void rescale(float *o, int64_t dp, int64_t rows, const float *decay) {
  for (int64_t r = 0; r < rows; r++, o += dp) {
    if (decay[r] == 1.0f) continue;
    for (int64_t i = 0; i < dp; i += VL) phx__store(o + i, phx__load(o + i) * decay[r]);
  }
}

/* Queries q0 .. q0 + rows - 1 of one head. */
static void forward_tile(const job *a, tiles *w, int64_t batch, int64_t head, int64_t q0, soon next_q) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL), left = a->t - q0, rows = left < TILE ? left : TILE;
  const float *q = a->qkv + batch * a->t * ld + head * d, *k = q + a->c, *v = k + a->c;
  const int vecs = (int)(round_up(rows, VL) / VL);
  float *out = a->new_out + (batch * a->t + q0) * a->c + head * d;
  pack_transposed(w->q, q + q0 * ld, ld, rows, d, a->scale * LOG2E);
  memset(w->o, 0, (size_t)(TILE * dp) * sizeof *w->o);
  for (int64_t i = 0; i < TILE; i++) w->max[i] = -INFINITY, w->sum[i] = 0.0f;
  for (int64_t k0 = 0; k0 <= q0; k0 += TILE) {
    const int diagonal = k0 == q0;
    const int64_t keys = diagonal ? rows : TILE;
    operand keys_at = {k + k0 * ld, ld, 1};
    const int64_t next = k0 + TILE, more = next == q0 ? rows : TILE;
    const soon next_k = diagonal ? nothing : (soon){k + next * ld, ld, more};
    const soon next_v = diagonal ? nothing : (soon){v + next * ld, ld, more};
    if (keys % ROWS) {
      pack(w->k, dp, k + k0 * ld, ld, keys, d);
      keys_at = (operand){w->k, dp, 1};
    }
    pack(w->v, dp, v + k0 * ld, ld, keys, d);
    product(diagonal ? COLS_FROM : WHOLE, keys, vecs, d, keys_at, w->q, TILE, w->s, TILE, 0,
            diagonal ? (soon){out, a->c, rows} : next_k, d);
    for (int64_t i = 0; i < vecs; i++)
      softmax_column(w->s + i * VL, keys, diagonal, i * VL, w->max + i * VL, w->sum + i * VL, w->decay + i * VL);
    if (k0) rescale(w->o, dp, rows, w->decay);
    product(diagonal ? DEPTH_UPTO : WHOLE, rows, (int)(dp / VL), keys, (operand){w->s, 1, TILE}, w->v, dp, w->o, dp, 1,
            diagonal ? next_q : next_v, d);
  }
  float *lse = a->new_lse + (batch * a->heads + head) * a->t + q0;
  for (int64_t r = 0; r < rows; r++) {
    const float by = 1.0f / w->sum[r];
    for (int64_t i = 0; i < d; i++) out[r * a->c + i] = w->o[r * dp + i] * by;
    lse[r] = w->max[r] * LN2 + logf(w->sum[r]);
  }
}

/* The first query of a head's x-th tile: tiles are taken from both ends in turn, so that equal numbers of items are
 * about equal work. */
static int64_t forward_query(int64_t x, int64_t n) {
  return (x % 2 ? n - 1 - x / 2 : x / 2) * TILE;
}

/* Items are the tiles of queries of every head. */
static void forward_items(void *arg, int64_t first, int64_t last, int32_t worker) {
  const job *a = arg;
  const int64_t n = (a->t + TILE - 1) / TILE, ld = 3 * a->c;
  for (int64_t i = first; i < last; i++) {
    const int64_t bh = i / n, q0 = forward_query(i % n, n), next = i + 1 == last ? i : i + 1,
                  nq0 = forward_query(next % n, n);
    const float *q = a->qkv + next / n / a->heads * a->t * ld + next / n % a->heads * a->d + nq0 * ld;
    const soon next_q = {q, ld, a->t - nq0 < TILE ? a->t - nq0 : TILE};
    forward_tile(a, a->scratch + worker, bh / a->heads, bh % a->heads, q0, next_q);
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

/* D(t) = sum over the head of dout * out */
static void row_dots(const job *a, int64_t batch, int64_t head, float *dots) {
  for (int64_t t = 0; t < a->t; t++) {
    const float *x = a->dout + (batch * a->t + t) * a->c + head * a->d;
    const float *y = a->out + (batch * a->t + t) * a->c + head * a->d;
    phx__vf acc = {0};
    int64_t i = 0;
    for (int64_t l = 0; t + 8 < a->t && l < a->d; l += 16) {
      __builtin_prefetch(x + 8 * a->c + l);
      __builtin_prefetch(y + 8 * a->c + l);
    }
    for (; i + VL <= a->d; i += VL) acc += phx__load(x + i) * phx__load(y + i);
    if (i < a->d) acc += phx__load_part(x + i, a->d - i) * phx__load_part(y + i, a->d - i);
    float lane[VL];
    phx__store(lane, acc);
    for (int width = VL / 2; width; width /= 2)
      for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    dots[t] = lane[0];
  }
}

/* dst(rows, d; ld) = or += factor * src(rows, dp) */
static void unpack(float *dst, int64_t ld, const float *src, int64_t dp, int64_t rows, int64_t d, float factor,
                   int add) {
  for (int64_t r = 0; r < rows; r++, dst += ld, src += dp) {
    int64_t i = 0;
    for (; i + VL <= d; i += VL)
      phx__store(dst + i, phx__load(src + i) * factor + (add ? phx__load(dst + i) : (phx__vf){0}));
    for (; i < d; i++) dst[i] = src[i] * factor + (add ? dst[i] : 0.0f);
  }
}

/* One tile of queries and what is needed of it. */
typedef struct queries {
  const float *q, *dout, *lse, *dots;
  float *dq;
  int64_t rows, next; /* queries in this tile, in the one after it */
} queries;

/* A tile of queries against the keys that w holds: adds to w->dk and w->dv, and to dq in memory. */
static void backward_tile(const job *a, tiles *w, const queries *x, int64_t keys, int diagonal, int add_dq, soon next_k,
                          soon next_v) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL), rows = x->rows, next = x->next;
  const int dvecs = (int)(dp / VL);
  const enum mask upper = diagonal ? COLS_UPTO : WHOLE, later = diagonal ? DEPTH_FROM : WHOLE;
  const soon next_q = next > 0 ? (soon){x->q + TILE * ld, ld, next} : nothing;
  const soon next_dq = next > 0 ? (soon){x->dq + TILE * ld, ld, next} : nothing;
  const soon next_dout = next > 0 ? (soon){x->dout + TILE * a->c, a->c, next} : nothing;
  pack(w->q, dp, x->q, ld, rows, d);
  pack(w->o, dp, x->dout, a->c, rows, d);
  product(upper, rows, TV, d, (operand){w->q, dp, 1}, w->kt, TILE, w->s, TILE, 0, next_q, d);
  product(upper, rows, TV, d, (operand){w->o, dp, 1}, w->v, TILE, w->dp, TILE, 0, next_dout, d);
  probabilities(w->s, w->dp, rows, keys, diagonal, x->lse, x->dots);
  const operand p = {w->s, 1, TILE}, ds = {w->dp, 1, TILE};
  product(later, keys, dvecs, rows, p, w->o, dp, w->dv, dp, 1, next_dq, d);
  product(later, keys, dvecs, rows, ds, w->q, dp, w->dk, dp, 1, next_k, d);
  product(diagonal ? DEPTH_UPTO : WHOLE, rows, dvecs, keys, (operand){w->dp, TILE, 1}, w->k, dp, w->dq, dp, 0, next_v,
          d);
  unpack(x->dq, ld, w->dq, dp, rows, d, a->scale, add_dq);
}

static void backward_head(const job *a, tiles *w, int64_t batch, int64_t head) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL), t = a->t;
  const int64_t at = batch * t * ld + head * d;
  const float *q = a->qkv + at, *k = q + a->c, *v = k + a->c;
  const float *dout = a->dout + batch * t * a->c + head * d, *lse = a->lse + (batch * a->heads + head) * t;
  float *dq = a->dqkv + at, *dots = a->work + (batch * a->heads + head) * t;
  row_dots(a, batch, head, dots);
  for (int64_t k0 = 0; k0 < t; k0 += TILE) {
    const int64_t keys = t - k0 < TILE ? t - k0 : TILE;
    pack(w->k, dp, k + k0 * ld, ld, keys, d);
    pack_transposed(w->kt, k + k0 * ld, ld, keys, d, a->scale * LOG2E);
    pack_transposed(w->v, v + k0 * ld, ld, keys, d, 1.0f);
    memset(w->dk, 0, (size_t)(TILE * dp) * sizeof *w->dk);
    memset(w->dv, 0, (size_t)(TILE * dp) * sizeof *w->dv);
    for (int64_t q0 = k0; q0 < t; q0 += TILE) {
      const int64_t rows = t - q0 < TILE ? t - q0 : TILE, left = t - q0 - rows, keys_left = t - k0 - keys;
      const queries x = {q + q0 * ld, dout + q0 * a->c,         lse + q0, dots + q0, dq + q0 * ld,
                         rows,        left < TILE ? left : TILE};
      const int last = left == 0 && keys_left > 0;
      const int64_t more = keys_left < TILE ? keys_left : TILE;
      backward_tile(a, w, &x, keys, q0 == k0, k0 > 0, last ? (soon){k + (k0 + TILE) * ld, ld, more} : nothing,
                    last ? (soon){v + (k0 + TILE) * ld, ld, more} : nothing);
    }
    unpack(dq + a->c + k0 * ld, ld, w->dk, dp, keys, d, a->scale, 0);
    unpack(dq + 2 * a->c + k0 * ld, ld, w->dv, dp, keys, d, 1.0f, 0);
  }
}

static void backward_items(void *arg, int64_t first, int64_t last, int32_t worker) {
  const job *a = arg;
  for (int64_t i = first; i < last; i++) backward_head(a, a->scratch + worker, i / a->heads, i % a->heads);
}

/* ---- entry points ---- */

static phx_status check(int64_t b, int64_t t, int64_t c, int64_t heads, phx_error *err) {
  if (b < 1 || t < 1 || heads < 1 || c < 1 || c % heads)
    return phx__cpu_fail(
        err, PHX_INVALID,
        "attention: batch %lld, sequence %lld, channels %lld, heads %lld: all must be positive and the "
        "channels a multiple of the heads",
        (long long)b, (long long)t, (long long)c, (long long)heads);
  if (c / heads > WIDEST)
    return phx__cpu_fail(err, PHX_UNSUPPORTED,
                         "attention: a head of %lld channels; the cpu device goes to %d: use more heads",
                         (long long)(c / heads), WIDEST);
  return PHX_OK;
}

static job describe(int64_t t, int64_t c, int64_t heads, void *scratch) {
  const int64_t d = c / heads;
  return (job){.t = t, .c = c, .heads = heads, .d = d, .scale = (float)(1.0 / sqrt((double)d)), .scratch = scratch};
}

phx_status phx__cpu_attention(void *ctx, float *out, float *lse, const float *qkv, int64_t b, int64_t t, int64_t c,
                              int64_t heads, phx_stream *s, phx_error *err) {
  phx__cpu *cpu = ctx;
  void *scratch = NULL;
  phx_status status = check(b, t, c, heads, err);
  if (status == PHX_OK) status = phx__cpu_enter(cpu, s, err);
  if (status == PHX_OK) status = phx__cpu_scratch(cpu, &scratch, err);
  if (status != PHX_OK) return status;
  job a = describe(t, c, heads, scratch);
  a.qkv = qkv, a.new_out = out, a.new_lse = lse;
  phx__cpu_parallel(cpu, b * heads * ((t + TILE - 1) / TILE), 1, forward_items, &a);
  return PHX_OK;
}

phx_status phx__cpu_attention_backward(void *ctx, float *dqkv, const float *dout, const float *qkv, const float *out,
                                       const float *lse, float *work, int64_t b, int64_t t, int64_t c, int64_t heads,
                                       phx_stream *s, phx_error *err) {
  phx__cpu *cpu = ctx;
  void *scratch = NULL;
  phx_status status = check(b, t, c, heads, err);
  if (status == PHX_OK) status = phx__cpu_enter(cpu, s, err);
  if (status == PHX_OK) status = phx__cpu_scratch(cpu, &scratch, err);
  if (status != PHX_OK) return status;
  job a = describe(t, c, heads, scratch);
  a.qkv = qkv, a.out = out, a.lse = lse, a.dout = dout, a.dqkv = dqkv, a.work = work;
  phx__cpu_parallel(cpu, b * heads, 1, backward_items, &a);
  return PHX_OK;
}
