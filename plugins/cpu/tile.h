/* plugins/cpu/tile.h - products of dense tiles in registers, packing, and 2^x: what attention.c is made of.
 *
 * For attention.c alone, which is compiled once per instruction set.  A tile is TILE x TILE, or TILE x (head size
 * padded to whole vectors).  Rows come in groups of ROWS: of a last, incomplete group the missing rows are computed too
 * and must be readable and writable.  Products may contract a * b + c. */
#ifndef PHX__CPU_TILE_H
#define PHX__CPU_TILE_H
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#include "simd.h"

#define INLINE static inline __attribute__((always_inline))
#define VL PHX__LANES
#define UNROLL _Pragma("GCC unroll 4")
typedef uint32_t vbits __attribute__((vector_size(4 * PHX__LANES)));
#define TILE 64        /* queries and keys per tile; a multiple of VL and ROWS */
#define ROWS 4         /* rows of the micro-kernel */
#define VECS (VL / 4)  /* its columns in vectors, at most 4: what the registers hold */
#define TV (TILE / VL) /* vectors in a row of a tile */

_Static_assert(TILE % VL == 0 && TILE % ROWS == 0 && VL % ROWS == 0, "tiles are whole vectors and whole row groups");

/* ---- lanes ---- */

/* Whether any lane is not 0. */
INLINE int any_lane(phx__vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  int any = 0;
  for (int l = 0; l < VL; l++) any |= x[l];
  return any;
#endif
}

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

/* 2^x within 2 ulp for x <= 126; exactly 0 below -120, so that nothing downstream meets a denormal number; NaN stays
 * NaN.  x = n + f, 2^f by a polynomial.  With AVX-512 n is a multiple of 1/16, whose fraction a register of 16 powers
 * turns into a factor: degree 3 does (relative error 4e-9) and the units that multiply stay free.  Else n is whole,
 * |f| <= 1/2, degree 6 (2.6e-9). */
INLINE phx__vf exp2_lanes(phx__vf x) {
  const float least = -120.0f;
#if defined(__AVX512F__)
  /* the bits of 2^(j / 16), less j << 19, which the shift below adds again */
  const vbits powers = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const float magic = 786432.0f; /* 1.5 * 2^19: adding it rounds to sixteenths in the low bits */
  const phx__vf shifted = x + magic, f = x - (shifted - magic);
  phx__vf p = f * 5.550410866482158e-2f + 2.402265069591007e-1f;
  p = p * f + 6.931471805599453e-1f;
  p = p * f + 1.0f;
  const vbits power = (vbits)_mm512_permutexvar_epi32((__m512i)shifted, (__m512i)powers) + ((vbits)shifted << 19);
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return (phx__vf)_mm512_maskz_mul_ps(kept, (__m512)p, (__m512)power);
#else
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  const phx__vf shifted = x + magic, n = shifted - magic, f = x - n;
  phx__vf p = f * 1.546144469856913e-4f + 1.3400428177615838e-3f;
  p = p * f + 9.618056678524637e-3f;
  p = p * f + 5.550327226670302e-2f;
  p = p * f + 2.4022650922288757e-1f;
  p = p * f + 6.931472067028326e-1f;
  p = p * f + 1.0f;
  const phx__vf y = p * (phx__vf)(((vbits)shifted << 23) + 0x3f800000u);
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
  UNROLL for (int64_t k = 0; k < klen; k++, a += cs, b += ldb) {
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

/* Memory that is needed soon, asked for a few rows at a time while a product runs: rows of qkv are too far apart for
 * the hardware to guess, and asked for all at once they fill the queue of misses. */
typedef struct soon {
  const char *p; /* (rows, d; ld); ld in bytes */
  int64_t ld, rows;
} soon;
static const soon nothing = {NULL, 0, 0};

/* c(m, nv vectors; ldc) = or += a(m, klen) b(klen, nv vectors; ldb).  bytes: of a row of `next`.  Rows up to the next
 * multiple of 4 are read and written too. */
static inline void product(enum mask mask, int64_t m, int nv, int64_t klen, operand a, const float *b, int64_t ldb,
                           float *c, int64_t ldc, int add, soon next, int64_t bytes) {
  for (int v0 = 0; v0 < nv; v0 += VECS) {
    for (int64_t r = 0; r < m; r += ROWS) {
      for (int64_t i = r; v0 == 0 && i < r + ROWS && i < next.rows; i++)
        for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(next.p + i * next.ld + x, 0, 2);
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

/* Rows in memory, of dtype F32 or BF16, ld elements apart: row r begins at element r * ld of p. */
typedef struct source {
  const void *p;
  int64_t ld;
  int32_t dtype;
} source;
static source rows_from(source x, int64_t row) {
  return (source){phx__at(x.dtype, x.p, row * x.ld), x.ld, x.dtype};
}

/* dst(round4(rows), dp) = src(rows, d), the rest 0 */
INLINE void pack_as(int32_t dtype, float *dst, int64_t dp, source src, int64_t rows, int64_t d) {
  const int64_t whole = d / VL * VL;
  for (int64_t r = 0; r < rows; r++, dst += dp) {
    const void *from = phx__at(dtype, src.p, r * src.ld);
    for (int64_t i = 0; i < whole; i += VL) phx__store(dst + i, phx__load_as(dtype, from, i));
    for (int64_t i = whole; i < dp; i++) dst[i] = i < d ? phx__get(dtype, from, i) : 0.0f;
  }
  for (; rows % ROWS; rows++, dst += dp) memset(dst, 0, (size_t)dp * sizeof *dst);
}
static void pack(float *dst, int64_t dp, source src, int64_t rows, int64_t d) {
  PHX__BY_DTYPE(src.dtype, pack_as, dst, dp, src, rows, d);
}

/* One round of a transposition: the lanes of x and y in turn, from the lower and from the upper halves. */
#if VL == 16
#define LOWER(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define UPPER(x, y) __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VL == 8
#define LOWER(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11)
#define UPPER(x, y) __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOWER(x, y) __builtin_shufflevector(x, y, 0, 4, 1, 5)
#define UPPER(x, y) __builtin_shufflevector(x, y, 2, 6, 3, 7)
#endif

/* dst(d, TILE) = factor * src(rows, d)^T, columns past rows 0 */
INLINE void pack_transposed_as(int32_t dtype, float *dst, source src, int64_t rows, int64_t d, float factor) {
  for (int64_t r = 0; r < TILE; r += VL)
    for (int64_t i = 0; i < d; i += VL) {
      const int64_t width = d - i < VL ? d - i : VL;
      phx__vf x[VL], y[VL];
      for (int64_t j = 0; j < VL; j++) {
        const int64_t at = (r + j) * src.ld + i;
        x[j] = r + j >= rows ? (phx__vf){0}
               : width == VL ? phx__load_as(dtype, src.p, at)
                             : phx__load_part_as(dtype, src.p, at, width);
      }
      for (int step = 1; step < VL; step *= 2) { /* a perfect shuffle, log2(VL) times */
        for (int j = 0; j < VL / 2; j++) {
          y[2 * j] = LOWER(x[j], x[j + VL / 2]);
          y[2 * j + 1] = UPPER(x[j], x[j + VL / 2]);
        }
        memcpy(x, y, sizeof x);
      }
      for (int64_t j = 0; j < width; j++) phx__store(dst + (i + j) * TILE + r, x[j] * factor);
    }
}

static void pack_transposed(float *dst, source src, int64_t rows, int64_t d, float factor) {
  PHX__BY_DTYPE(src.dtype, pack_transposed_as, dst, src, rows, d, factor);
}

static int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}
#endif
