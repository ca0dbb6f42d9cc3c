/* A plain device for tests: see plain_ops.h.  Slow and simple on purpose; any thread. */
#include "plain_ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Element i of an array of dtype F32 or BF16. */
static double get(const void *p, int32_t dtype, int64_t i) {
  if (dtype == PHX_F32) return (double)((const float *)p)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return (double)x;
}

static uint16_t to_bf16(float x) { /* to nearest even */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return (uint16_t)(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static void put(void *p, int32_t dtype, int64_t i, double value) {
  if (dtype == PHX_F32)
    ((float *)p)[i] = (float)value;
  else
    ((uint16_t *)p)[i] = to_bf16((float)value);
}

static const void *part(const void *p, int32_t dtype, int64_t i) {
  return (const char *)p + i * (int64_t)phx_dtype_bytes(dtype);
}

static void store(float *at, double value, int32_t mode) {
  *at = mode == PHX_GRAD_ADD ? (float)((double)*at + value) : (float)value;
}

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

static double gelu_slope(double x) {
  const double k = sqrt(2 / M_PI), th = tanh(k * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * k * (1 + 3 * 0.044715 * x * x);
}

static phx_status linear(void *ctx, int32_t dtype, void *out, int64_t out_ld, void *pre, const void *x, const void *w,
                         const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t with_gelu, phx_stream *s,
                         phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t ld = out_ld ? out_ld : oc;
  for (int64_t i = 0; i < n; i++)
    for (int64_t o = 0; o < oc; o++) {
      double sum = bias ? get(bias, dtype, o) : 0;
      for (int64_t k = 0; k < ic; k++) sum += get(x, dtype, i * ic + k) * get(w, dtype, o * ic + k);
      if (pre) put(pre, dtype, i * oc + o, sum);
      put(out, dtype, i * ld + o, with_gelu ? gelu(sum) : sum);
    }
  return PHX_OK;
}

static phx_status linear_backward_input(void *ctx, int32_t dtype, void *dx, const void *dout, int64_t dout_ld,
                                        const void *w, const void *pre, int64_t n, int64_t ic, int64_t oc, int32_t mode,
                                        phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t ld = dout_ld ? dout_ld : oc;
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < ic; k++) {
      double sum = 0;
      for (int64_t o = 0; o < oc; o++) sum += get(dout, dtype, i * ld + o) * get(w, dtype, o * ic + k);
      if (pre) sum *= gelu_slope(get(pre, dtype, i * ic + k));
      put(dx, dtype, i * ic + k, sum + (mode == PHX_GRAD_ADD ? get(dx, dtype, i * ic + k) : 0));
    }
  return PHX_OK;
}

static phx_status linear_backward_weight(void *ctx, int32_t dtype, float *dw, float *db, const void *dout,
                                         int64_t dout_ld, const void *x, int64_t n, int64_t ic, int64_t oc,
                                         int32_t w_mode, int32_t b_mode, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t ld = dout_ld ? dout_ld : oc;
  for (int64_t o = 0; o < oc; o++) {
    for (int64_t k = 0; k < ic; k++) {
      double sum = 0;
      for (int64_t i = 0; i < n; i++) sum += get(dout, dtype, i * ld + o) * get(x, dtype, i * ic + k);
      store(&dw[o * ic + k], sum, w_mode);
    }
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += get(dout, dtype, i * ld + o);
    if (db) store(&db[o], sum, b_mode);
  }
  return PHX_OK;
}

static phx_status embedding(void *ctx, int32_t dtype, void *out, const int32_t *tokens, const void *wte,
                            const void *wpe, int64_t b, int64_t t, int64_t c, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < b * t; i++)
    for (int64_t k = 0; k < c; k++)
      put(out, dtype, i * c + k, get(wte, dtype, tokens[i] * c + k) + get(wpe, dtype, i % t * c + k));
  return PHX_OK;
}

static phx_status embedding_backward(void *ctx, int32_t dtype, float *dwte, int32_t wte_mode, float *dwpe,
                                     int32_t wpe_mode, const void *dout, const int32_t *tokens, int64_t b, int64_t t,
                                     int64_t c, int64_t v, int64_t max_t, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  if (dwte && wte_mode == PHX_GRAD_WRITE) memset(dwte, 0, (size_t)(v * c) * sizeof *dwte);
  if (dwpe && wpe_mode == PHX_GRAD_WRITE) memset(dwpe, 0, (size_t)(max_t * c) * sizeof *dwpe);
  for (int64_t i = 0; i < b * t; i++)
    for (int64_t k = 0; k < c; k++) {
      if (dwte) dwte[tokens[i] * c + k] += (float)get(dout, dtype, i * c + k);
      if (dwpe) dwpe[i % t * c + k] += (float)get(dout, dtype, i * c + k);
    }
  return PHX_OK;
}

static phx_status layer_norm(void *ctx, int32_t dtype, void *out, void *sum, float *mean, float *rstd, const void *a,
                             const void *b, const void *w, const void *bias, int64_t n, int64_t c, float eps,
                             phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < n; i++) {
    const void *x = sum ? sum : a; /* the norm is that of what is kept */
    double m = 0, var = 0;
    for (int64_t k = 0; sum && k < c; k++)
      put(sum, dtype, i * c + k, get(a, dtype, i * c + k) + (b ? get(b, dtype, i * c + k) : 0));
    for (int64_t k = 0; k < c; k++) m += get(x, dtype, i * c + k);
    m /= (double)c;
    for (int64_t k = 0; k < c; k++) var += (get(x, dtype, i * c + k) - m) * (get(x, dtype, i * c + k) - m);
    const double r = 1 / sqrt(var / (double)c + (double)eps);
    for (int64_t k = 0; k < c; k++)
      put(out, dtype, i * c + k, (get(x, dtype, i * c + k) - m) * r * get(w, dtype, k) + get(bias, dtype, k));
    mean[i] = (float)m;
    rstd[i] = (float)r;
  }
  return PHX_OK;
}

static phx_status layer_norm_backward(void *ctx, int32_t dtype, void *dx, const void *add, float *dw, int32_t w_mode,
                                      float *db, int32_t b_mode, const void *dout, const void *x, const void *w,
                                      const float *mean, const float *rstd, int64_t n, int64_t c, phx_stream *s,
                                      phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t k = 0; dw && db && k < c; k++) {
    double sw = 0, sb = 0;
    for (int64_t i = 0; i < n; i++) {
      sw += get(dout, dtype, i * c + k) * (get(x, dtype, i * c + k) - (double)mean[i]) * (double)rstd[i];
      sb += get(dout, dtype, i * c + k);
    }
    store(&dw[k], sw, w_mode);
    store(&db[k], sb, b_mode);
  }
  for (int64_t i = 0; i < n; i++) {
    const double m = (double)mean[i], r = (double)rstd[i];
    double d0 = 0, d1 = 0;
    for (int64_t k = 0; k < c; k++) {
      const double d = get(dout, dtype, i * c + k) * get(w, dtype, k);
      d0 += d / (double)c;
      d1 += d * (get(x, dtype, i * c + k) - m) * r / (double)c;
    }
    for (int64_t k = 0; k < c; k++) {
      const double d = get(dout, dtype, i * c + k) * get(w, dtype, k), hat = (get(x, dtype, i * c + k) - m) * r;
      put(dx, dtype, i * c + k, (add ? get(add, dtype, i * c + k) : 0) + r * (d - d0 - hat * d1));
    }
  }
  return PHX_OK;
}

static phx_status add(void *ctx, int32_t dtype, void *out, const void *a, const void *b, int64_t numel, phx_stream *s,
                      phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < numel; i++) put(out, dtype, i, get(a, dtype, i) + get(b, dtype, i));
  return PHX_OK;
}

/* Score of query i and key j <= i of one head; q, k point at that head's channels of position 0. */
static double score(int32_t dtype, const void *q, const void *k, int64_t i, int64_t j, int64_t c, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; d++) sum += get(q, dtype, i * 3 * c + d) * get(k, dtype, j * 3 * c + d);
  return sum / sqrt((double)width);
}

static phx_status attention(void *ctx, int32_t dtype, void *out, float *lse, const void *qkv, int64_t b, int64_t t,
                            int64_t c, int64_t heads, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t width = c / heads;
  for (int64_t n = 0; n < b * heads; n++) {
    const int64_t seq = n / heads, h = n % heads;
    const void *q = part(qkv, dtype, seq * t * 3 * c + h * width), *k = part(q, dtype, c), *v = part(k, dtype, c);
    for (int64_t i = 0; i < t; i++) {
      double top = -INFINITY, sum = 0;
      for (int64_t j = 0; j <= i; j++) top = fmax(top, score(dtype, q, k, i, j, c, width));
      for (int64_t j = 0; j <= i; j++) sum += exp(score(dtype, q, k, i, j, c, width) - top);
      lse[n * t + i] = (float)(top + log(sum));
      for (int64_t d = 0; d < width; d++) {
        double o = 0;
        for (int64_t j = 0; j <= i; j++)
          o += exp(score(dtype, q, k, i, j, c, width) - top) / sum * get(v, dtype, j * 3 * c + d);
        put(out, dtype, (seq * t + i) * c + h * width + d, o);
      }
    }
  }
  return PHX_OK;
}

static phx_status attention_backward(void *ctx, int32_t dtype, void *dqkv, const void *dout, const void *qkv,
                                     const void *out, const float *lse, float *work, int64_t b, int64_t t, int64_t c,
                                     int64_t heads, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  const int64_t width = c / heads;
  const double scale = 1 / sqrt((double)width);
  double *sums = calloc((size_t)(b * t * 3 * c), sizeof *sums);
  if (!sums) return PHX_NOMEM;
  for (int64_t n = 0; n < b * heads; n++) {
    const int64_t seq = n / heads, h = n % heads, at = seq * t * 3 * c + h * width, row = seq * t * c + h * width;
    const void *q = part(qkv, dtype, at), *k = part(q, dtype, c), *v = part(k, dtype, c);
    double *dq = sums + at, *dk = dq + c, *dv = dq + 2 * c;
    for (int64_t i = 0; i < t; i++) {
      double dot = 0;
      for (int64_t d = 0; d < width; d++) dot += get(dout, dtype, row + i * c + d) * get(out, dtype, row + i * c + d);
      work[n * t + i] = (float)dot;
      for (int64_t j = 0; j <= i; j++) {
        const double p = exp(score(dtype, q, k, i, j, c, width) - (double)lse[n * t + i]);
        double dp = 0;
        for (int64_t d = 0; d < width; d++) dp += get(dout, dtype, row + i * c + d) * get(v, dtype, j * 3 * c + d);
        const double ds = p * (dp - dot) * scale;
        for (int64_t d = 0; d < width; d++) {
          dq[i * 3 * c + d] += ds * get(k, dtype, j * 3 * c + d);
          dk[j * 3 * c + d] += ds * get(q, dtype, i * 3 * c + d);
          dv[j * 3 * c + d] += p * get(dout, dtype, row + i * c + d);
        }
      }
    }
  }
  for (int64_t i = 0; i < b * t * 3 * c; i++) put(dqkv, dtype, i, sums[i]);
  free(sums);
  return PHX_OK;
}

static phx_status cross_entropy(void *ctx, int32_t dtype, void *logits, float *losses, const int32_t *targets,
                                int64_t n, int64_t v, int64_t vp, int32_t gradient, float scale, phx_stream *s,
                                phx_error *err) {
  (void)ctx, (void)s, (void)err;
  for (int64_t i = 0; i < n; i++) {
    void *row = (char *)logits + i * vp * (int64_t)phx_dtype_bytes(dtype);
    double top = -INFINITY, sum = 0;
    for (int64_t k = 0; k < v; k++) top = fmax(top, get(row, dtype, k));
    for (int64_t k = 0; k < v; k++) sum += exp(get(row, dtype, k) - top);
    losses[i] = (float)(top + log(sum) - get(row, dtype, targets[i]));
    for (int64_t k = 0; gradient && k < vp; k++)
      put(row, dtype, k, k < v ? (exp(get(row, dtype, k) - top) / sum - (k == targets[i])) * (double)scale : 0);
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
      ((uint16_t *)dst)[i] = to_bf16(((const float *)src)[i]);
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

static phx_status mean(void *ctx, double *out, const float *x, int64_t n, phx_stream *s, phx_error *err) {
  (void)ctx, (void)s, (void)err;
  *out = 0;
  for (int64_t i = 0; i < n; i++) *out += (double)x[i];
  *out /= (double)n;
  return PHX_OK;
}

const phx_ops plain_ops = {
    .struct_size = sizeof(phx_ops),
    .linear = linear,
    .linear_backward_input = linear_backward_input,
    .linear_backward_weight = linear_backward_weight,
    .embedding = embedding,
    .embedding_backward = embedding_backward,
    .layer_norm = layer_norm,
    .layer_norm_backward = layer_norm_backward,
    .add = add,
    .attention = attention,
    .attention_backward = attention_backward,
    .cross_entropy = cross_entropy,
    .adamw = adamw,
    .sgd = sgd,
    .block_norms = block_norms,
    .mean = mean,
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
