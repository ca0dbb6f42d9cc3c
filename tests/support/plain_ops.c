/* A plain device for tests: see plain_ops.h.  Slow and simple on purpose; any thread. */
#include "plain_ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void store(float *at, double value, int32_t mode) {
  *at = mode == PHX_GRAD_ADD ? (float)((double)*at + value) : (float)value;
}

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

static double gelu_slope(double x) {
  const double k = sqrt(2 / M_PI), th = tanh(k * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * k * (1 + 3 * 0.044715 * x * x);
}

static phx_status linear(void *ctx, float *out, int64_t out_ld, float *pre, const float *x, const float *w,
                         const float *bias, int64_t n, int64_t ic, int64_t oc, int32_t with_gelu, phx_stream *s,
                         phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t ld = out_ld ? out_ld : oc;
  for (int64_t i = 0; i < n; i++)
    for (int64_t o = 0; o < oc; o++) {
      double sum = bias ? (double)bias[o] : 0;
      for (int64_t k = 0; k < ic; k++) sum += (double)x[i * ic + k] * (double)w[o * ic + k];
      if (pre) pre[i * oc + o] = (float)sum;
      out[i * ld + o] = (float)(with_gelu ? gelu(sum) : sum);
    }
  return PHX_OK;
}

static phx_status linear_backward_input(void *ctx, float *dx, const float *dout, int64_t dout_ld, const float *w,
                                        const float *pre, int64_t n, int64_t ic, int64_t oc, int32_t mode,
                                        phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t ld = dout_ld ? dout_ld : oc;
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < ic; k++) {
      double sum = 0;
      for (int64_t o = 0; o < oc; o++) sum += (double)dout[i * ld + o] * (double)w[o * ic + k];
      store(&dx[i * ic + k], pre ? sum * gelu_slope((double)pre[i * ic + k]) : sum, mode);
    }
  return PHX_OK;
}

static phx_status linear_backward_weight(void *ctx, float *dw, float *db, const float *dout, int64_t dout_ld,
                                         const float *x, int64_t n, int64_t ic, int64_t oc, int32_t w_mode,
                                         int32_t b_mode, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t ld = dout_ld ? dout_ld : oc;
  for (int64_t o = 0; o < oc; o++) {
    for (int64_t k = 0; k < ic; k++) {
      double sum = 0;
      for (int64_t i = 0; i < n; i++) sum += (double)dout[i * ld + o] * (double)x[i * ic + k];
      store(&dw[o * ic + k], sum, w_mode);
    }
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)dout[i * ld + o];
    if (db) store(&db[o], sum, b_mode);
  }
  return PHX_OK;
}

static phx_status embedding(void *ctx, float *out, const int32_t *tokens, const float *wte, const float *wpe, int64_t b,
                            int64_t t, int64_t c, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < b * t; i++)
    for (int64_t k = 0; k < c; k++) out[i * c + k] = wte[tokens[i] * c + k] + wpe[i % t * c + k];
  return PHX_OK;
}

static phx_status embedding_backward(void *ctx, float *dwte, int32_t wte_mode, float *dwpe, int32_t wpe_mode,
                                     const float *dout, const int32_t *tokens, int64_t b, int64_t t, int64_t c,
                                     int64_t v, int64_t max_t, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  if (dwte && wte_mode == PHX_GRAD_WRITE) memset(dwte, 0, (size_t)(v * c) * sizeof *dwte);
  if (dwpe && wpe_mode == PHX_GRAD_WRITE) memset(dwpe, 0, (size_t)(max_t * c) * sizeof *dwpe);
  for (int64_t i = 0; i < b * t; i++)
    for (int64_t k = 0; k < c; k++) {
      if (dwte) dwte[tokens[i] * c + k] += dout[i * c + k];
      if (dwpe) dwpe[i % t * c + k] += dout[i * c + k];
    }
  return PHX_OK;
}

static phx_status layer_norm(void *ctx, float *out, float *sum, float *mean, float *rstd, const float *a,
                             const float *b, const float *w, const float *bias, int64_t n, int64_t c, float eps,
                             phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < n; i++) {
    double m = 0, var = 0;
    for (int64_t k = 0; k < c; k++) m += (double)a[i * c + k] + (b ? (double)b[i * c + k] : 0);
    m /= (double)c;
    for (int64_t k = 0; k < c; k++) {
      const double d = (double)a[i * c + k] + (b ? (double)b[i * c + k] : 0) - m;
      var += d * d;
    }
    const double r = 1 / sqrt(var / (double)c + (double)eps);
    for (int64_t k = 0; k < c; k++) {
      const double x = (double)a[i * c + k] + (b ? (double)b[i * c + k] : 0);
      if (sum) sum[i * c + k] = (float)x;
      out[i * c + k] = (float)((x - m) * r * (double)w[k] + (double)bias[k]);
    }
    mean[i] = (float)m;
    rstd[i] = (float)r;
  }
  return PHX_OK;
}

static phx_status layer_norm_backward(void *ctx, float *dx, const float *add, float *dw, int32_t w_mode, float *db,
                                      int32_t b_mode, const float *dout, const float *x, const float *w,
                                      const float *mean, const float *rstd, int64_t n, int64_t c, phx_stream *s,
                                      phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t k = 0; dw && db && k < c; k++) {
    double sw = 0, sb = 0;
    for (int64_t i = 0; i < n; i++) {
      sw += (double)dout[i * c + k] * ((double)x[i * c + k] - (double)mean[i]) * (double)rstd[i];
      sb += (double)dout[i * c + k];
    }
    store(&dw[k], sw, w_mode);
    store(&db[k], sb, b_mode);
  }
  for (int64_t i = 0; i < n; i++) {
    const double m = (double)mean[i], r = (double)rstd[i];
    double d0 = 0, d1 = 0;
    for (int64_t k = 0; k < c; k++) {
      const double d = (double)dout[i * c + k] * (double)w[k];
      d0 += d / (double)c;
      d1 += d * ((double)x[i * c + k] - m) * r / (double)c;
    }
    for (int64_t k = 0; k < c; k++) {
      const double d = (double)dout[i * c + k] * (double)w[k], hat = ((double)x[i * c + k] - m) * r;
      dx[i * c + k] = (float)((add ? (double)add[i * c + k] : 0) + r * (d - d0 - hat * d1));
    }
  }
  return PHX_OK;
}

static phx_status add(void *ctx, float *out, const float *a, const float *b, int64_t numel, phx_stream *s,
                      phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < numel; i++) out[i] = a[i] + b[i];
  return PHX_OK;
}

/* Score of query i and key j <= i of one head; q, k point at that head's channels of position 0. */
static double score(const float *q, const float *k, int64_t i, int64_t j, int64_t c, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; d++) sum += (double)q[i * 3 * c + d] * (double)k[j * 3 * c + d];
  return sum / sqrt((double)width);
}

static phx_status attention(void *ctx, float *out, float *lse, const float *qkv, int64_t b, int64_t t, int64_t c,
                            int64_t heads, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t width = c / heads;
  for (int64_t n = 0; n < b * heads; n++) {
    const int64_t seq = n / heads, h = n % heads;
    const float *q = qkv + seq * t * 3 * c + h * width, *k = q + c, *v = q + 2 * c;
    for (int64_t i = 0; i < t; i++) {
      double top = -INFINITY, sum = 0;
      for (int64_t j = 0; j <= i; j++) top = fmax(top, score(q, k, i, j, c, width));
      for (int64_t j = 0; j <= i; j++) sum += exp(score(q, k, i, j, c, width) - top);
      lse[n * t + i] = (float)(top + log(sum));
      for (int64_t d = 0; d < width; d++) {
        double o = 0;
        for (int64_t j = 0; j <= i; j++) o += exp(score(q, k, i, j, c, width) - top) / sum * (double)v[j * 3 * c + d];
        out[(seq * t + i) * c + h * width + d] = (float)o;
      }
    }
  }
  return PHX_OK;
}

static phx_status attention_backward(void *ctx, float *dqkv, const float *dout, const float *qkv, const float *out,
                                     const float *lse, float *work, int64_t b, int64_t t, int64_t c, int64_t heads,
                                     phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t width = c / heads;
  const double scale = 1 / sqrt((double)width);
  memset(dqkv, 0, (size_t)(b * t * 3 * c) * sizeof *dqkv);
  for (int64_t n = 0; n < b * heads; n++) {
    const int64_t seq = n / heads, h = n % heads, at = seq * t * 3 * c + h * width, row = seq * t * c + h * width;
    const float *q = qkv + at, *k = q + c, *v = q + 2 * c;
    float *dq = dqkv + at, *dk = dq + c, *dv = dq + 2 * c;
    for (int64_t i = 0; i < t; i++) {
      double dot = 0;
      for (int64_t d = 0; d < width; d++) dot += (double)dout[row + i * c + d] * (double)out[row + i * c + d];
      work[n * t + i] = (float)dot;
      for (int64_t j = 0; j <= i; j++) {
        const double p = exp(score(q, k, i, j, c, width) - (double)lse[n * t + i]);
        double dp = 0;
        for (int64_t d = 0; d < width; d++) dp += (double)dout[row + i * c + d] * (double)v[j * 3 * c + d];
        const double ds = p * (dp - dot) * scale;
        for (int64_t d = 0; d < width; d++) {
          dq[i * 3 * c + d] += (float)(ds * (double)k[j * 3 * c + d]);
          dk[j * 3 * c + d] += (float)(ds * (double)q[i * 3 * c + d]);
          dv[j * 3 * c + d] += (float)(p * (double)dout[row + i * c + d]);
        }
      }
    }
  }
  return PHX_OK;
}

static phx_status cross_entropy(void *ctx, float *logits, float *losses, const int32_t *targets, int64_t n, int64_t v,
                                int64_t vp, int32_t gradient, float scale, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < n; i++) {
    float *row = logits + i * vp;
    double top = -INFINITY, sum = 0;
    for (int64_t k = 0; k < v; k++) top = fmax(top, (double)row[k]);
    for (int64_t k = 0; k < v; k++) sum += exp((double)row[k] - top);
    losses[i] = (float)(top + log(sum) - (double)row[targets[i]]);
    for (int64_t k = 0; gradient && k < vp; k++)
      row[k] = k < v ? (float)((exp((double)row[k] - top) / sum - (k == targets[i])) * (double)scale) : 0.0f;
  }
  return PHX_OK;
}

static phx_status plain_cast(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                             phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  if (dst_dtype == src_dtype) {
    memcpy(dst, src, (size_t)numel * phx_dtype_bytes(dst_dtype));
    return PHX_OK;
  }
  if (!((dst_dtype == PHX_BF16 && src_dtype == PHX_F32) || (dst_dtype == PHX_F32 && src_dtype == PHX_BF16)))
    return PHX_UNSUPPORTED;
  for (int64_t i = 0; i < numel; i++) {
    if (dst_dtype == PHX_BF16) {
      uint32_t bits;
      memcpy(&bits, (const float *)src + i, sizeof bits);
      const int nan = (bits & 0x7fffffffu) > 0x7f800000u;
      ((uint16_t *)dst)[i] = (uint16_t)(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    } else {
      const uint32_t bits = (uint32_t)((const uint16_t *)src)[i] << 16;
      memcpy((float *)dst + i, &bits, sizeof bits);
    }
  }
  return PHX_OK;
}

static phx_status adamw(void *ctx, float *w, const float *g, float *m, float *v, void *low, int32_t low_dtype,
                        int64_t numel, float scale, float lr, float beta1, float beta2, float c1, float c2, float eps,
                        float decay, phx_stream *s, phx_error *err) {
  for (int64_t i = 0; i < numel; i++) {
    const double grad = (double)g[i] * (double)scale;
    const double m1 = (double)beta1 * (double)m[i] + (1 - (double)beta1) * grad;
    const double v1 = (double)beta2 * (double)v[i] + (1 - (double)beta2) * grad * grad;
    m[i] = (float)m1;
    v[i] = (float)v1;
    w[i] = (float)((double)w[i] - (double)lr * (m1 / (double)c1 / (sqrt(v1 / (double)c2) + (double)eps) +
                                                (double)decay * (double)w[i]));
  }
  return low ? plain_cast(ctx, low, low_dtype, w, PHX_F32, numel, s, err) : PHX_OK;
}

static phx_status sgd(void *ctx, float *w, const float *g, void *low, int32_t low_dtype, int64_t numel, float scale,
                      float lr, float decay, phx_stream *s, phx_error *err) {
  for (int64_t i = 0; i < numel; i++)
    w[i] = (float)((double)w[i] - (double)lr * ((double)g[i] * (double)scale + (double)decay * (double)w[i]));
  return low ? plain_cast(ctx, low, low_dtype, w, PHX_F32, numel, s, err) : PHX_OK;
}

static phx_status block_norms(void *ctx, double *sums, const float *x, int64_t blocks, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t b = 0; b < blocks; b++) {
    sums[b] = 0;
    for (int64_t i = 0; i < PHX_BLOCK; i++) sums[b] += (double)x[b * PHX_BLOCK + i] * (double)x[b * PHX_BLOCK + i];
  }
  return PHX_OK;
}

const phx_ops plain_ops = {
    .struct_size = sizeof(phx_ops), .linear = linear, .linear_backward_input = linear_backward_input,
    .linear_backward_weight = linear_backward_weight, .embedding = embedding,
    .embedding_backward = embedding_backward, .layer_norm = layer_norm, .layer_norm_backward = layer_norm_backward,
    .add = add, .attention = attention, .attention_backward = attention_backward, .cross_entropy = cross_entropy,
    .adamw = adamw, .sgd = sgd, .block_norms = block_norms,
};

static phx_status synchronize(void *ctx, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  return PHX_OK;
}

static phx_status copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  memmove(dst, src, (size_t)bytes);
  return PHX_OK;
}

static phx_status zero(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  memset(dst, 0, (size_t)bytes);
  return PHX_OK;
}

const phx_device plain_device = {
    .struct_size = sizeof(phx_device), .name = "plain", .caps = PHX_DEVICE_HOST_MEMORY, .threads = 1,
    .stream_synchronize = synchronize, .copy = copy, .zero = zero, .cast = plain_cast,
};

const void *plain_extension(const char *id) {
  if (!strcmp(id, PHX_EXT_OPS)) return &plain_ops;
  if (!strcmp(id, PHX_EXT_DEVICE)) return &plain_device;
  return NULL;
}
