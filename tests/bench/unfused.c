/* tests/bench/unfused.c - causal attention as a framework without a fused kernel does it: oneDNN's products over blocks
 * of query rows, each only as wide as the causal mask leaves it, a vectorised softmax in place, and the T x T
 * probabilities kept from forward to backward.  Backward needs four products then, the fused one five. */
#include <dnnl.h>
#include <math.h>
#include "unfused.h"
#include "../../plugins/cpu/simd.h"

static int64_t least(int64_t x, int64_t y) {
  return x < y ? x : y;
}

/* x[0 .. n) becomes softmax(x), x[n .. end) zero. */
static void softmax(float *x, int64_t n, int64_t end) {
  float top = -INFINITY, sum = 0.0f;
  phx__vf best = phx__splat(-INFINITY), total = {0};
  int64_t i = 0;
  for (; i + PHX__LANES <= n; i += PHX__LANES) {
    const phx__vf y = phx__load(x + i);
    best = phx__choose(y > best, y, best);
  }
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int l = 0; l < PHX__LANES; l++) top = best[l] > top ? best[l] : top;
  for (i = 0; i + PHX__LANES <= n; i += PHX__LANES) {
    const phx__vf e = phx__vexp(phx__load(x + i) - top);
    phx__store(x + i, e);
    total += e;
  }
  for (; i < n; i++) sum += x[i] = expf(x[i] - top);
  for (int l = 0; l < PHX__LANES; l++) sum += total[l];
  const float by = 1.0f / sum;
  for (i = 0; i + PHX__LANES <= n; i += PHX__LANES) phx__store(x + i, phx__load(x + i) * by);
  for (; i < n; i++) x[i] *= by;
  for (; i < end; i++) x[i] = 0.0f;
}

void unfused_forward(float *out, float *p, const float *qkv, int64_t b, int64_t t, int64_t c, int64_t heads,
                     int64_t rows) {
  const int64_t d = c / heads, ld = 3 * c;
  const float scale = 1.0f / sqrtf((float)d);
  for (int64_t i = 0; i < b * heads; i++) {
    const float *q = qkv + i / heads * t * ld + i % heads * d, *k = q + c, *v = k + c;
    float *o = out + i / heads * t * c + i % heads * d;
    for (int64_t r = 0; r < t; r += rows) {
      const int64_t n = least(rows, t - r), end = r + n;
      float *s = p + (i * t + r) * t;
      dnnl_sgemm('N', 'T', n, end, d, scale, q + r * ld, ld, k, ld, 0.0f, s, t);
      for (int64_t y = 0; y < n; y++) softmax(s + y * t, r + y + 1, end);
      dnnl_sgemm('N', 'N', n, d, end, 1.0f, s, t, v, ld, 0.0f, o + r * c, c);
    }
  }
}

void unfused_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *p, float *block,
                      int64_t b, int64_t t, int64_t c, int64_t heads, int64_t rows) {
  const int64_t d = c / heads, ld = 3 * c;
  const float scale = 1.0f / sqrtf((float)d);
  for (int64_t i = 0; i < b * heads; i++) {
    const int64_t at = i / heads * t * ld + i % heads * d, at_out = i / heads * t * c + i % heads * d;
    const float *q = qkv + at, *k = q + c, *v = k + c, *g = dout + at_out, *o = out + at_out;
    float *dq = dqkv + at, *dk = dq + c, *dv = dk + c;
    /* from the last block down: the first product then writes every row of dk and dv */
    for (int64_t r = (t - 1) / rows * rows; r >= 0; r -= rows) {
      const int64_t n = least(rows, t - r), end = r + n;
      const float *s = p + (i * t + r) * t, add = end < t ? 1.0f : 0.0f;
      dnnl_sgemm('T', 'N', end, d, n, 1.0f, s, t, g + r * c, c, add, dv, ld);
      dnnl_sgemm('N', 'T', n, end, d, 1.0f, g + r * c, c, v, ld, 0.0f, block, t);
      for (int64_t y = 0; y < n; y++) {
        float dot = 0.0f;
        for (int64_t x = 0; x < d; x++) dot += g[(r + y) * c + x] * o[(r + y) * c + x];
        int64_t x = 0;
        for (; x + PHX__LANES <= end; x += PHX__LANES)
          phx__store(block + y * t + x, phx__load(s + y * t + x) * (phx__load(block + y * t + x) - dot));
        for (; x < end; x++) block[y * t + x] = s[y * t + x] * (block[y * t + x] - dot);
      }
      dnnl_sgemm('N', 'N', n, d, end, scale, block, t, k, ld, 0.0f, dq + r * ld, ld);
      dnnl_sgemm('T', 'N', end, d, n, scale, block, t, q + r * ld, ld, add, dk, ld);
    }
  }
}
