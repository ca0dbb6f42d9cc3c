/* plugins/cpu/attention.c - causal attention and its gradient in tiles, after FlashAttention-2 (arXiv 2307.08691).
 *
 * Keeps no T x T matrix: the forward pass walks over tiles of 64 keys with a running maximum and sum per query, the
 * backward pass computes the probabilities again from qkv and lse.  Tiles above the diagonal are not computed, and
 * inside a diagonal tile only what the mask leaves, in steps of 4 rows and one vector.
 *
 * Forward computes scores transposed, S^T = K Q^T: the softmax then runs down the columns of a tile, without a
 * horizontal sum, and neither K nor the probabilities need a transpose.  Backward computes S = Q K^T with K^T and V^T
 * transposed once per 64 keys.  Everything else is copied into dense tiles: rows of qkv are 3C apart, a distance at which
 * they evict each other from the first-level cache.
 *
 * Invariant: scratch per thread is a constant, whatever the shape.  One item (a tile of queries forward, a head
 * backward) is computed by one thread in one order, so the bits do not depend on the number of threads.
 * Unlike the other kernels this file may contract a * b + c; its bits differ between instruction sets.
 *
 * Does not do: dropout, other masks, heads wider than 256. */
#include <math.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#include "cpu.h"
#include "simd.h"

#define INLINE static inline __attribute__((always_inline))
#define VL PHX__LANES
#define UNROLL _Pragma("GCC unroll 4")
#define TILE 64         /* queries and keys per tile; a multiple of VL and ROWS */
#define WIDEST 256      /* largest head size */
#define ROWS 4          /* rows of the micro-kernel */
#define VECS (VL / 4)   /* its columns in vectors, at most 4: what the registers hold */
#define TV (TILE / VL)  /* vectors in a row of a tile */
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

_Static_assert(TILE % VL == 0 && TILE % ROWS == 0 && VL % ROWS == 0, "tiles are whole vectors and whole row groups");

/* One thread's part of the scratch; each pass uses some of it. */
typedef struct tiles {
  float q[TILE * WIDEST];  /* (TILE, dp) forward: Q^T (d, TILE) */
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

int64_t phx__cpu_attention_scratch(int32_t threads) { return threads * (int64_t)sizeof(tiles); }

/* ---- lanes ---- */

static phx__vf lane_numbers(void) { /* 0, 1, 2, ... */
  phx__vf x;
  for (int i = 0; i < VL; i++) x[i] = (float)i;
  return x;
}

/* The larger of x and y; y where one of them is NaN. */
INLINE phx__vf larger(phx__vf x, phx__vf y) {
#if defined(__AVX512F__)
  return (phx__vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (phx__vf)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return phx__choose(x > y, x, y);
#endif
}

/* 2^x within 1.5 ulp for x <= 126; exactly 0 below -120, so that nothing downstream meets a denormal number; NaN stays
 * NaN.  x = n + f with |f| <= 1/2; 2^f by a polynomial of degree 6 (relative error 2.6e-9). */
INLINE phx__vf exp2_lanes(phx__vf x) {
  const float magic = 12582912.0f, least = -120.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  const phx__vf shifted = x + magic;
  const phx__vf f = x - (shifted - magic);
  phx__vf p = f * 1.546144469856913e-4f + 1.3400428177615838e-3f;
  p = p * f + 9.618056678524637e-3f;
  p = p * f + 5.550327226670302e-2f;
  p = p * f + 2.4022650922288757e-1f;
  p = p * f + 6.931472067028326e-1f;
  p = p * f + 1.0f;
  const phx__vf y = p * (phx__vf)(((phx__vi)shifted << 23) + 0x3f800000);
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return (phx__vf)_mm512_maskz_mov_ps(kept, (__m512)y);
#else
  return (phx__vf)((phx__vi)y & ~(x < least));
#endif
}

/* ---- products of tiles ---- */

/* c(4, nv vectors; ldc) = or += a b over klen;  a(r, k) is a[r * rs + k * cs], b is (klen, nv vectors; ldb) */
INLINE void micro(const int nv, int64_t klen, const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb,
                  float *c, int64_t ldc, int add) {
  /* Loops to VECS with a test, not to nv: both compilers then keep acc in registers. */
  phx__vf acc[ROWS][VECS];
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int v = 0; v < VECS; v++) acc[r][v] = add && v < nv ? phx__load(c + r * ldc + v * VL) : (phx__vf){0};
  }
  for (int64_t k = 0; k < klen; k++, a += cs, b += ldb) {
    phx__vf row[VECS];
    UNROLL for (int v = 0; v < VECS; v++) row[v] = v < nv ? phx__load(b + v * VL) : (phx__vf){0};
    UNROLL for (int r = 0; r < ROWS; r++) {
      const phx__vf x = phx__splat(a[r * rs]);
      UNROLL for (int v = 0; v < VECS; v++) if (v < nv) acc[r][v] += x * row[v];
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int v = 0; v < VECS; v++) if (v < nv) phx__store(c + r * ldc + v * VL, acc[r][v]);
  }
}

INLINE void micro_any(int nv, int64_t klen, const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb,
                      float *c, int64_t ldc, int add) {
  if (nv == 1) micro(1, klen, a, rs, cs, b, ldb, c, ldc, add);
#if VL >= 8
  if (nv == 2) micro(2, klen, a, rs, cs, b, ldb, c, ldc, add);
#endif
#if VL >= 16
  if (nv == 3) micro(3, klen, a, rs, cs, b, ldb, c, ldc, add);
  if (nv == 4) micro(4, klen, a, rs, cs, b, ldb, c, ldc, add);
#endif
}

/* What the causal mask leaves of a product in a diagonal tile. */
enum mask {
  WHOLE,      /* everything */
  COLS_UPTO,  /* columns <= row */
  COLS_FROM,  /* columns >= row */
  DEPTH_UPTO, /* row r of c adds over k <= r */
  DEPTH_FROM  /* row r of c adds over k >= r */
};

typedef struct operand {
  const float *p;
  int64_t rs, cs; /* elements between rows, between columns */
} operand;

/* c(m, nv vectors; ldc) = or += a(m, klen) b(klen, nv vectors; ldb).  Rows up to the next multiple of 4 are read and
 * written too. */
static void product(enum mask mask, int64_t m, int nv, int64_t klen, operand a, const float *b, int64_t ldb, float *c,
                    int64_t ldc, int add) {
  for (int v0 = 0; v0 < nv; v0 += VECS) {
    for (int64_t r = 0; r < m; r += ROWS) {
      int from = v0, upto = v0 + VECS < nv ? v0 + VECS : nv;
      int64_t k0 = 0, k1 = klen;
      if (mask == COLS_UPTO && upto > r / VL + 1) upto = (int)(r / VL) + 1;
      if (mask == COLS_FROM && from < r / VL) from = (int)(r / VL);
      if (mask == DEPTH_UPTO && k1 > r + ROWS) k1 = r + ROWS;
      if (mask == DEPTH_FROM) k0 = r;
      if (from < upto)
        micro_any(upto - from, k1 - k0, a.p + r * a.rs + k0 * a.cs, a.rs, a.cs, b + k0 * ldb + from * VL, ldb,
                  c + r * ldc + from * VL, ldc, add);
    }
  }
}

/* ---- packing ---- */

/* dst(round4(rows), dp) = src(rows, d; ld), the rest 0 */
static void pack(float *dst, int64_t dp, const float *src, int64_t ld, int64_t rows, int64_t d) {
  const int64_t whole = d / VL * VL;
  for (int64_t r = 0; r < rows; r++, dst += dp, src += ld) {
    for (int64_t i = 0; i < whole; i += VL) phx__store(dst + i, phx__load(src + i));
    for (int64_t i = whole; i < dp; i++) dst[i] = i < d ? src[i] : 0.0f;
  }
  for (; rows % ROWS; rows++, dst += dp) memset(dst, 0, (size_t)dp * sizeof *dst);
}

/* dst(d, TILE) = factor * src(rows, d; ld)^T, columns past rows 0 */
static void pack_transposed(float *restrict dst, const float *restrict src, int64_t ld, int64_t rows, int64_t d,
                            float factor) {
  float block[VL][VL];
  for (int64_t r = 0; r < TILE; r += VL)
    for (int64_t i = 0; i < d; i += VL) {
      const int64_t width = d - i < VL ? d - i : VL;
      for (int64_t y = 0; y < VL; y++)
        for (int64_t x = 0; x < width; x++) block[x][y] = r + y < rows ? src[(r + y) * ld + i + x] * factor : 0.0f;
      for (int64_t x = 0; x < width; x++) phx__store(dst + (i + x) * TILE + r, phx__load(block[x]));
    }
}

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

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
static void forward_tile(const job *a, tiles *w, int64_t batch, int64_t head, int64_t q0) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL), left = a->t - q0, rows = left < TILE ? left : TILE;
  const float *q = a->qkv + batch * a->t * ld + head * d, *k = q + a->c, *v = k + a->c;
  const int vecs = (int)(round_up(rows, VL) / VL);
  pack_transposed(w->q, q + q0 * ld, ld, rows, d, a->scale * LOG2E);
  memset(w->o, 0, (size_t)(TILE * dp) * sizeof *w->o);
  for (int64_t i = 0; i < TILE; i++) w->max[i] = -INFINITY, w->sum[i] = 0.0f;
  for (int64_t k0 = 0; k0 <= q0; k0 += TILE) {
    const int diagonal = k0 == q0;
    const int64_t keys = diagonal ? rows : TILE;
    operand keys_at = {k + k0 * ld, ld, 1};
    if (keys % ROWS) {
      pack(w->k, dp, k + k0 * ld, ld, keys, d);
      keys_at = (operand){w->k, dp, 1};
    }
    pack(w->v, dp, v + k0 * ld, ld, keys, d);
    product(diagonal ? COLS_FROM : WHOLE, keys, vecs, d, keys_at, w->q, TILE, w->s, TILE, 0);
    for (int64_t i = 0; i < vecs; i++)
      softmax_column(w->s + i * VL, keys, diagonal, i * VL, w->max + i * VL, w->sum + i * VL, w->decay + i * VL);
    if (k0) rescale(w->o, dp, rows, w->decay);
    product(diagonal ? DEPTH_UPTO : WHOLE, rows, (int)(dp / VL), keys, (operand){w->s, 1, TILE}, w->v, dp, w->o, dp, 1);
  }
  float *out = a->new_out + (batch * a->t + q0) * a->c + head * d;
  float *lse = a->new_lse + (batch * a->heads + head) * a->t + q0;
  for (int64_t r = 0; r < rows; r++) {
    const float by = 1.0f / w->sum[r];
    for (int64_t i = 0; i < d; i++) out[r * a->c + i] = w->o[r * dp + i] * by;
    lse[r] = w->max[r] * LN2 + logf(w->sum[r]);
  }
}

/* Items are the tiles of queries of every head; tiles of one head are taken from both ends in turn, so that equal numbers
 * of items are about equal work. */
static void forward_items(void *arg, int64_t first, int64_t last, int32_t worker) {
  const job *a = arg;
  const int64_t n = (a->t + TILE - 1) / TILE;
  for (int64_t i = first; i < last; i++) {
    const int64_t bh = i / n, x = i % n, tile = x % 2 ? n - 1 - x / 2 : x / 2;
    forward_tile(a, a->scratch + worker, bh / a->heads, bh % a->heads, tile * TILE);
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
    for (; i + VL <= a->d; i += VL) acc += phx__load(x + i) * phx__load(y + i);
    float sum = 0.0f;
    for (; i < a->d; i++) sum += x[i] * y[i];
    for (int l = 0; l < VL; l++) sum += acc[l];
    dots[t] = sum;
  }
}

/* dst(rows, d; ld) = or += factor * src(rows, dp) */
static void unpack(float *dst, int64_t ld, const float *src, int64_t dp, int64_t rows, int64_t d, float factor,
                   int add) {
  for (int64_t r = 0; r < rows; r++, dst += ld, src += dp) {
    int64_t i = 0;
    for (; i + VL <= d; i += VL) phx__store(dst + i, phx__load(src + i) * factor + (add ? phx__load(dst + i) : (phx__vf){0}));
    for (; i < d; i++) dst[i] = src[i] * factor + (add ? dst[i] : 0.0f);
  }
}

/* The tile of queries q0 against the keys that w holds: adds to w->dk and w->dv, and to dq in memory. */
static void backward_tile(const job *a, tiles *w, const float *q, const float *dout, float *dq, const float *lse,
                          const float *dots, int64_t rows, int64_t keys, int diagonal, int add_dq) {
  const int64_t ld = 3 * a->c, d = a->d, dp = round_up(d, VL);
  const int dvecs = (int)(dp / VL);
  const enum mask upper = diagonal ? COLS_UPTO : WHOLE;
  pack(w->q, dp, q, ld, rows, d);
  pack(w->o, dp, dout, a->c, rows, d);
  product(upper, rows, TV, d, (operand){w->q, dp, 1}, w->kt, TILE, w->s, TILE, 0);
  product(upper, rows, TV, d, (operand){w->o, dp, 1}, w->v, TILE, w->dp, TILE, 0);
  probabilities(w->s, w->dp, rows, keys, diagonal, lse, dots);
  const enum mask later = diagonal ? DEPTH_FROM : WHOLE;
  const operand p = {w->s, 1, TILE}, ds = {w->dp, 1, TILE};
  product(later, keys, dvecs, rows, p, w->o, dp, w->dv, dp, 1);
  product(later, keys, dvecs, rows, ds, w->q, dp, w->dk, dp, 1);
  product(diagonal ? DEPTH_UPTO : WHOLE, rows, dvecs, keys, (operand){w->dp, TILE, 1}, w->k, dp, w->dq, dp, 0);
  unpack(dq, ld, w->dq, dp, rows, d, a->scale, add_dq);
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
      const int64_t rows = t - q0 < TILE ? t - q0 : TILE;
      backward_tile(a, w, q + q0 * ld, dout + q0 * a->c, dq + q0 * ld, lse + q0, dots + q0, rows, keys, q0 == k0,
                    k0 > 0);
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
    return phx__cpu_fail(err, PHX_INVALID,
                         "attention: batch %lld, sequence %lld, channels %lld, heads %lld: all must be positive and the "
                         "channels a multiple of the heads",
                         (long long)b, (long long)t, (long long)c, (long long)heads);
  if (c / heads > WIDEST)
    return phx__cpu_fail(err, PHX_UNSUPPORTED, "attention: a head of %lld channels; the cpu device goes to %d: use more heads",
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
  (void)s; /* the compute stream runs inline */
  phx_status status = check(b, t, c, heads, err);
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
  (void)s;
  phx_status status = check(b, t, c, heads, err);
  if (status == PHX_OK) status = phx__cpu_scratch(cpu, &scratch, err);
  if (status != PHX_OK) return status;
  job a = describe(t, c, heads, scratch);
  a.qkv = qkv, a.out = out, a.lse = lse, a.dout = dout, a.dqkv = dqkv, a.work = work;
  phx__cpu_parallel(cpu, b * heads, 1, backward_items, &a);
  return PHX_OK;
}
