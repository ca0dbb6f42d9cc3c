/* plugins/cpu/ops_elementwise.c - casts, sums, optimizers and block norms.
 *
 * Invariant: an element's result depends on its own inputs only, by one sequence of IEEE operations: loops are written
 * for one element and vectorised by the compiler, so heads and tails have the same bits.  No approximate reciprocal, no
 * contraction.  AdamW: arXiv 1711.05101.  slice_*: [any]; operations: [main]. */
#include <math.h>
#include "cpu.h"
#include "simd.h"

/* ---- conversions, round to nearest even ---- */
static inline uint16_t to_f16(float x) {
  const uint32_t u = phx__bits_of(x) & 0x7fffffffu, sign = phx__bits_of(x) >> 16 & 0x8000u;
  const uint32_t normal = (u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13;
  const uint32_t small = phx__bits_of(phx__float_of(u) + 0.5f) - 0x3f000000u; /* 0.5's last bit is the smallest f16 */
  const uint32_t big = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t below = u < 0x38800000u ? small : normal;
  return (uint16_t)(sign | (u >= 0x47800000u ? big : below));
}
static inline float from_f16(uint16_t h) {
  const uint32_t u = (uint32_t)(h & 0x7fff) << 13, exponent = u & 0x0f800000u;
  const float small = phx__float_of(u + 0x38800000u) - phx__float_of(0x38800000u);
  const uint32_t normal = u + 0x38000000u + (exponent == 0x0f800000u ? 0x38000000u : 0u);
  return phx__float_of((exponent == 0 ? phx__bits_of(small) : normal) | (uint32_t)(h & 0x8000) << 16);
}

enum { CAST_CHUNK = 1024 };
void phx__cpu_slice_cast(void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel) {
  float chunk[CAST_CHUNK];
  if (dst_dtype == src_dtype) {
    memmove(dst, src, (size_t)numel * phx_dtype_bytes(src_dtype));
    return;
  }
  for (int64_t at = 0; at < numel; at += CAST_CHUNK) {
    const int64_t n = numel - at < CAST_CHUNK ? numel - at : CAST_CHUNK;
    const float *x = (const float *)src + at;
    const uint16_t *h = (const uint16_t *)src + at;
    uint16_t *out = (uint16_t *)dst + at;
    if (src_dtype != PHX_F32) {
      float *to = dst_dtype == PHX_F32 ? (float *)dst + at : chunk;
      if (src_dtype == PHX_BF16)
        for (int64_t i = 0; i < n; i++) to[i] = phx__from_bf16(h[i]);
      else
        for (int64_t i = 0; i < n; i++) to[i] = from_f16(h[i]);
      x = to;
    }
    if (dst_dtype == PHX_BF16)
      for (int64_t i = 0; i < n; i++) out[i] = phx__to_bf16(x[i]);
    else if (dst_dtype == PHX_F16)
      for (int64_t i = 0; i < n; i++) out[i] = to_f16(x[i]);
  }
}

void phx__cpu_slice_add(float *out, const float *a, const float *b, int64_t numel) {
  PHX__IVDEP for (int64_t i = 0; i < numel; i++) out[i] = a[i] + b[i];
}

void phx__cpu_slice_scale(float *x, float by, int64_t numel) {
  for (int64_t i = 0; i < numel; i++) x[i] *= by;
}

/* ---- operations ---- */
typedef struct add_args {
  void *out;
  const void *a, *b;
  int32_t dtype;
} add_args;
PHX__INLINE void add_elements(int32_t dtype, const add_args *x, int64_t first, int64_t last) {
  PHX__IVDEP for (int64_t i = first; i < last; i++)
      phx__set(dtype, x->out, i, phx__get(dtype, x->a, i) + phx__get(dtype, x->b, i));
}
static void add_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const add_args *x = arg;
  (void)worker;
  PHX__BY_DTYPE(x->dtype, add_elements, x, first, last);
}
phx_status phx__cpu_add(void *ctx, int32_t dtype, void *out, const void *a, const void *b, int64_t numel, phx_stream *s,
                        phx_error *err) {
  const phx_status status = phx__cpu_begin(ctx, dtype, s, err);
  if (status == PHX_OK) phx__cpu_parallel(ctx, numel, PHX_BLOCK, add_body, &(add_args){out, a, b, dtype});
  return status;
}

typedef struct update_args {
  float *w, *m, *v;
  const float *g;
  void *low;
  int32_t low_dtype;
  float scale, lr, beta1, beta2, c1, c2, eps, decay;
} update_args;

static phx_status check_low(const void *low, int32_t dtype, phx_error *err) {
  if (!low || dtype == PHX_F32 || dtype == PHX_F16 || dtype == PHX_BF16) return PHX_OK;
  return phx_fail(err, PHX_UNSUPPORTED, "cpu: weight copy of dtype %d: only F32, F16 and BF16", dtype);
}

/* `low` follows while the block of new weights is still in the cache. */
static void store_low(const update_args *x, int64_t at, int64_t n) {
  if (x->low)
    phx__cpu_slice_cast((char *)x->low + at * (int64_t)phx_dtype_bytes(x->low_dtype), x->low_dtype, x->w + at, PHX_F32,
                        n);
}

static void adamw_block(const update_args *x, int64_t at, int64_t n) {
  float *restrict w = x->w + at, *restrict m = x->m + at, *restrict v = x->v + at;
  const float *restrict g = x->g + at;
  const float scale = x->scale, lr = x->lr, beta1 = x->beta1, beta2 = x->beta2, c1 = x->c1, c2 = x->c2;
  const float eps = x->eps, decay = x->decay, rest1 = 1.0f - beta1, rest2 = 1.0f - beta2;
  for (int64_t i = 0; i < n; i++) {
    const float gs = g[i] * scale;
    const float mi = beta1 * m[i] + rest1 * gs;
    const float vi = beta2 * v[i] + rest2 * (gs * gs);
    m[i] = mi;
    v[i] = vi;
    w[i] -= lr * (mi / c1 / (sqrtf(vi / c2) + eps) + decay * w[i]);
  }
}
static void adamw_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  (void)worker;
  for (int64_t at = first; at < last; at += PHX_BLOCK) {
    const int64_t n = last - at < PHX_BLOCK ? last - at : PHX_BLOCK;
    adamw_block(arg, at, n);
    store_low(arg, at, n);
  }
}
phx_status phx__cpu_adamw(void *ctx, float *w, const float *g, float *m, float *v, void *low, int32_t low_dtype,
                          int64_t numel, float scale, float lr, float beta1, float beta2, float c1, float c2, float eps,
                          float decay, phx_stream *s, phx_error *err) {
  update_args x = {w, m, v, g, low, low_dtype, scale, lr, beta1, beta2, c1, c2, eps, decay};
  phx_status status = check_low(low, low_dtype, err);
  if (status == PHX_OK) status = phx__cpu_enter(ctx, s, err);
  if (status == PHX_OK) phx__cpu_parallel(ctx, numel, PHX_BLOCK, adamw_body, &x);
  return status;
}

static void sgd_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const update_args *x = arg;
  const float scale = x->scale, lr = x->lr, decay = x->decay;
  (void)worker;
  for (int64_t at = first; at < last; at += PHX_BLOCK) {
    const int64_t n = last - at < PHX_BLOCK ? last - at : PHX_BLOCK;
    float *restrict w = x->w + at;
    const float *restrict g = x->g + at;
    for (int64_t i = 0; i < n; i++) w[i] -= lr * (g[i] * scale + decay * w[i]);
    store_low(x, at, n);
  }
}
phx_status phx__cpu_sgd(void *ctx, float *w, const float *g, void *low, int32_t low_dtype, int64_t numel, float scale,
                        float lr, float decay, phx_stream *s, phx_error *err) {
  update_args x = {.w = w, .g = g, .low = low, .low_dtype = low_dtype, .scale = scale, .lr = lr, .decay = decay};
  phx_status status = check_low(low, low_dtype, err);
  if (status == PHX_OK) status = phx__cpu_enter(ctx, s, err);
  if (status == PHX_OK) phx__cpu_parallel(ctx, numel, PHX_BLOCK, sgd_body, &x);
  return status;
}

/* Lane i of 16 sums elements i, i + 16, ... of the block; the lanes are halved until one is left. */
typedef struct norm_args {
  double *sums;
  const float *x;
} norm_args;
static void norm_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const norm_args *a = arg;
  (void)worker;
  for (int64_t block = first; block < last; block++) {
    const float *x = a->x + block * PHX_BLOCK;
    double lane[16] = {0};
    for (int i = 0; i < PHX_BLOCK; i += 16)
      for (int l = 0; l < 16; l++) lane[l] += (double)x[i + l] * (double)x[i + l];
    for (int width = 8; width; width /= 2)
      for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    a->sums[block] = lane[0];
  }
}
phx_status phx__cpu_block_norms(void *ctx, double *sums, const float *x, int64_t blocks, phx_stream *s,
                                phx_error *err) {
  const phx_status status = phx__cpu_enter(ctx, s, err);
  if (status == PHX_OK) phx__cpu_parallel(ctx, blocks, 1, norm_body, &(norm_args){sums, x});
  return status;
}

phx_status phx__cpu_mean(void *ctx, double *out, const float *x, int64_t n, phx_stream *s, phx_error *err) {
  if (n < 1) return phx_fail(err, PHX_INVALID, "cpu: mean of %lld numbers", (long long)n);
  PHX_TRY(phx__cpu_enter(ctx, s, err));
  double sum = 0; /* in order, on one thread: thousands of losses, not millions */
  for (int64_t i = 0; i < n; i++) sum += (double)x[i];
  *out = sum / (double)n;
  return PHX_OK;
}
