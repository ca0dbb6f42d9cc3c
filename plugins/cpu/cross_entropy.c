/* plugins/cpu/cross_entropy.c - softmax cross-entropy over the vocabulary, gradient in place of the logits.
 *
 * Two passes over a row.  The first goes by blocks with a running maximum (Milakov and Gimelshein, arXiv 1805.02867):
 * it leaves e^(x - maximum so far) where the logits were and adds it up; the second, while the row is still in the
 * second-level cache, multiplies each block by what its maximum lacked and by scale / sum.  So each element meets one
 * exponential, and memory is read once.  Without a gradient the first pass stores nothing; nor does it with logits in
 * bf16, which the second pass reads again: a gradient is rounded once.
 *
 * Does not do: label smoothing, ignored targets.
 * Invariant: one row is one thread's, in one order with 16 lanes: the bits depend on neither the number of threads nor
 * the instruction set.  Sums of at most 64 floats per lane are added in double. */
#include <math.h>
#include "cpu.h"
#include "simd.h"

#define MOST_BLOCKS 256 /* of a row: their maxima are kept on the stack */
#define LEAST_BLOCK 1024

typedef struct job {
  void *logits;
  float *losses;
  const int32_t *targets;
  int64_t v, vp, block;
  int32_t gradient, dtype;
  float scale;
} job;

/* e^x for x <= 0: exactly 0 where e^x has no normal representation; NaN stays NaN */
static inline phx__vf exp_or_0(phx__vf x) {
  return (phx__vf)((phx__vi)phx__vexp(x) & ~(x < -87.0f));
}

/* The largest of x[0 .. n) and `top`; a NaN may or may not be seen: the sum shows it. */
PHX__INLINE float largest(int32_t dtype, const void *x, int64_t at, int64_t n, float top) {
  phx__vf best[2 * PHX__PARTS];
  int64_t i = 0;
  for (int p = 0; p < 2 * PHX__PARTS; p++) best[p] = phx__splat(top);
  for (; i + 32 <= n; i += 32)
    for (int p = 0; p < 2 * PHX__PARTS; p++) {
      const phx__vf y = phx__load_as(dtype, x, at + i + p * PHX__LANES);
      best[p] = phx__choose(y > best[p], y, best[p]);
    }
  for (; i < n; i++) top = phx__get(dtype, x, at + i) > top ? phx__get(dtype, x, at + i) : top;
  for (int p = 0; p < 2 * PHX__PARTS; p++)
    for (int l = 0; l < PHX__LANES; l++) top = best[p][l] > top ? best[p][l] : top;
  return top;
}

/* e^(x - top) added up over x[at .. at + n), and stored there if `keep`.  n <= 1024. */
PHX__INLINE float exponentials(int32_t dtype, void *x, int64_t from, int64_t n, float top, int32_t keep) {
  phx__v16 sum = {0};
  float lane[16];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int p = 0; p < PHX__PARTS; p++) {
      const int64_t at = from + i + p * PHX__LANES;
      const phx__vf e = exp_or_0(phx__load_as(dtype, x, at) - top);
      sum.part[p] += e;
      if (keep) phx__store_as(dtype, x, at, e);
    }
  phx__lanes(lane, &sum);
  for (; i < n; i += PHX__LANES) { /* the last, in vectors of which a part counts */
    const int64_t left = n - i < PHX__LANES ? n - i : PHX__LANES;
    const phx__vf e = exp_or_0(phx__load_part_as(dtype, x, from + i, left) - top);
    for (int64_t l = 0; l < left; l++) lane[(i + l) % 16] += e[l];
    if (keep) phx__store_part_as(dtype, x, from + i, e, left);
  }
  return phx__sum_lanes(lane);
}

static void times(float *x, int64_t n, float by) {
  int64_t i = 0;
  for (; i + PHX__LANES <= n; i += PHX__LANES) phx__store(x + i, phx__load(x + i) * by);
  for (; i < n; i++) x[i] *= by;
}

/* x[0 .. v) become e^(x - top) * by */
PHX__INLINE void gradients(int32_t dtype, void *x, int64_t v, float top, float by) {
  int64_t i = 0;
  for (; i + PHX__LANES <= v; i += PHX__LANES)
    phx__store_as(dtype, x, i, exp_or_0(phx__load_as(dtype, x, i) - top) * by);
  if (i < v) phx__store_part_as(dtype, x, i, exp_or_0(phx__load_part_as(dtype, x, i, v - i) - top) * by, v - i);
}

PHX__INLINE void row(int32_t dtype, const job *a, void *x, int32_t target, float *loss) {
  const int32_t keep = a->gradient && dtype == PHX_F32;
  float maxima[MOST_BLOCKS], top = -INFINITY;
  double sum = 0.0;
  const double wanted = (double)phx__get(dtype, x, target);
  int64_t blocks = 0;
  for (int64_t at = 0; at < a->v; at += a->block, blocks++) {
    const int64_t n = a->v - at < a->block ? a->v - at : a->block;
    const float before = top;
    top = largest(dtype, x, at, n, top);
    if (top > before && sum != 0.0) sum *= exp((double)before - (double)top);
    maxima[blocks] = top;
    /* nothing but -infinity so far: any finite reference gives the zeros that are due */
    const float reference = top == -INFINITY ? 0.0f : top;
    for (int64_t i = 0; i < n; i += LEAST_BLOCK)
      sum += exponentials(dtype, x, at + i, n - i < LEAST_BLOCK ? n - i : LEAST_BLOCK, reference, keep);
  }
  *loss = (float)(log(sum) + ((double)top - wanted));
  if (!a->gradient) return;
  void *padding = phx__out_at(dtype, x, a->v);
  memset(padding, 0, (size_t)(a->vp - a->v) * phx_dtype_bytes(dtype));
  if (!keep) {
    const float by = (float)(a->scale / sum), reference = top == -INFINITY ? 0.0f : top;
    const float p = (exp_or_0(phx__splat((float)wanted) - reference) * by)[0];
    gradients(dtype, x, a->v, reference, by);
    phx__set(dtype, x, target, p - a->scale);
    return;
  }
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t at = i * a->block, n = a->v - at < a->block ? a->v - at : a->block;
    const double lacked = maxima[i] == top ? 1.0 : exp((double)maxima[i] - (double)top);
    times((float *)x + at, n, (float)(lacked * a->scale / sum));
  }
  ((float *)x)[target] -= a->scale;
}

static void rows(void *arg, int64_t first, int64_t last, int32_t worker) {
  const job *a = arg;
  (void)worker;
  for (int64_t i = first; i < last; i++) {
    void *x = phx__out_at(a->dtype, a->logits, i * a->vp);
    PHX__BY_DTYPE(a->dtype, row, a, x, a->targets[i], a->losses + i);
  }
}

phx_status phx__cpu_cross_entropy(void *ctx, int32_t dtype, void *logits, float *losses, const int32_t *targets,
                                  int64_t n, int64_t v, int64_t vp, int32_t gradient, float scale, phx_stream *s,
                                  phx_error *err) {
  PHX_TRY(phx__cpu_begin(ctx, dtype, s, err));
  if (n < 1 || v < 1 || vp < v)
    return phx_fail(err, PHX_INVALID, "cross_entropy: %lld rows of %lld classes in rows of %lld", (long long)n,
                    (long long)v, (long long)vp);
  for (int64_t i = 0; i < n; i++)
    if (targets[i] < 0 || targets[i] >= v)
      return phx_fail(err, PHX_INVALID, "cross_entropy: target %d of row %lld is not below the vocabulary of %lld",
                      targets[i], (long long)i, (long long)v);
  int64_t block = (v + MOST_BLOCKS - 1) / MOST_BLOCKS;
  block = (block + LEAST_BLOCK - 1) / LEAST_BLOCK * LEAST_BLOCK;
  job a = {logits, losses, targets, v, vp, block, gradient, dtype, scale};
  phx__cpu_parallel(ctx, n, 1, rows, &a);
  return PHX_OK;
}
