/* plugins/cuda/ops.c - the operations' table, and those that are a check of arguments and kernels.  [main] */
#include "cuda.h"

enum { NORM_BLOCKS = 8 }; /* of layer_norm_backward, on a multiprocessor */

phx_status phx__cuda_begin(const phx__cuda *cuda, int32_t dtype, const char *what, phx_error *err) {
  if (dtype == PHX_F32 || dtype == PHX_BF16) return PHX_OK;
  return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s in dtype %d: only F32 and BF16", what, dtype);
}

static phx_status check_sizes(const phx__cuda *cuda, const char *what, int64_t n, int64_t c, phx_error *err) {
  if (n >= 1 && c >= 1 && n <= INT32_MAX) return PHX_OK;
  return phx__cuda_fail(cuda, err, PHX_INVALID, "%s of %lld rows of %lld", what, (long long)n, (long long)c);
}

static phx_status embedding(void *ctx, int32_t dtype, void *out, const int32_t *tokens, const void *wte,
                            const void *wpe, int64_t b, int64_t t, int64_t c, phx_stream *s, phx_error *err) {
  PHX_TRY(phx__cuda_begin(ctx, dtype, "embedding", err));
  PHX_TRY(check_sizes(ctx, "embedding", b * t, c, err));
  return phx__cuda_check(ctx, phx__cuda_k_embedding(dtype, out, tokens, wte, wpe, b, t, c, phx__cuda_stream(ctx, s)),
                         "embedding", err);
}

static phx_status embedding_backward(void *ctx, int32_t dtype, float *dwte, int32_t wte_mode, float *dwpe,
                                     int32_t wpe_mode, const void *dout, const int32_t *tokens, int64_t b, int64_t t,
                                     int64_t c, int64_t v, int64_t max_t, phx_stream *stream, phx_error *err) {
  static const char what[] = "embedding_backward";
  phx__cuda *cuda = ctx;
  const cudaStream_t s = phx__cuda_stream(cuda, stream);
  void *scratch;
  phx_status status = phx__cuda_begin(cuda, dtype, what, err);
  if (status == PHX_OK) status = check_sizes(cuda, what, b * t, c, err);
  if (status == PHX_OK && (max_t < t || v < 1 || v > INT32_MAX || max_t > INT32_MAX))
    status = phx__cuda_fail(cuda, err, PHX_INVALID, "%s: %lld tokens of context %lld, vocabulary %lld", what,
                            (long long)t, (long long)max_t, (long long)v);
  if (status == PHX_OK && dwte) {
    status = phx__cuda_scratch(cuda, s, 8 * (v + b * t), what, &scratch, err);
    if (status == PHX_OK)
      status = phx__cuda_check(
          cuda, phx__cuda_k_embedding_tokens(dtype, dwte, wte_mode, dout, tokens, b * t, c, v, scratch, s), what, err);
  }
  if (status == PHX_OK && dwpe)
    status = phx__cuda_check(cuda, phx__cuda_k_embedding_places(dtype, dwpe, wpe_mode, dout, b, t, c, max_t, s), what,
                             err);
  return status;
}

static phx_status layer_norm(void *ctx, int32_t dtype, void *out, void *sum, float *mean, float *rstd, const void *a,
                             const void *b, const void *w, const void *bias, int64_t n, int64_t c, float eps,
                             phx_stream *s, phx_error *err) {
  PHX_TRY(phx__cuda_begin(ctx, dtype, "layer_norm", err));
  PHX_TRY(check_sizes(ctx, "layer_norm", n, c, err));
  if (b && !sum) return phx__cuda_fail(ctx, err, PHX_INVALID, "layer_norm of a + b needs a place for the sum");
  return phx__cuda_check(
      ctx, phx__cuda_k_layer_norm(dtype, out, sum, mean, rstd, a, b, w, bias, n, c, eps, phx__cuda_stream(ctx, s)),
      "layer_norm", err);
}

static phx_status layer_norm_backward(void *ctx, int32_t dtype, void *dx, const void *add, float *dw, int32_t w_mode,
                                      float *db, int32_t b_mode, const void *dout, const void *x, const void *w,
                                      const float *mean, const float *rstd, int64_t n, int64_t c, phx_stream *stream,
                                      phx_error *err) {
  static const char what[] = "layer_norm_backward";
  phx__cuda *cuda = ctx;
  const cudaStream_t s = phx__cuda_stream(cuda, stream);
  void *parts = NULL;
  PHX_TRY(phx__cuda_begin(cuda, dtype, what, err));
  PHX_TRY(check_sizes(cuda, what, n, c, err));
  if (!dw != !db)
    return phx__cuda_fail(cuda, err, PHX_INVALID, "%s: gradients of weight and bias come together", what);
  const int64_t blocks = (int64_t)NORM_BLOCKS * cuda->multiprocessors;
  const int64_t most = cuda->scratch_bytes / (8 * c), rows = n < blocks ? n : blocks;
  if (dw && most < 1)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: %lld channels are too many", what, (long long)c);
  const int64_t slices = dw && most < rows ? most : rows;
  if (dw) PHX_TRY(phx__cuda_scratch(cuda, s, 8 * c * slices, what, &parts, err));
  const phx__cuda_norm_backward p = {.dtype = dtype, .w_mode = w_mode, .b_mode = b_mode, .dx = dx, .add = add,
                                     .dout = dout, .x = x, .w = w, .dw = dw, .db = db, .parts = parts, .mean = mean,
                                     .rstd = rstd, .n = n, .c = c, .slices = dw ? slices : n};
  return phx__cuda_check(cuda, phx__cuda_k_layer_norm_backward(&p, s), what, err);
}

static phx_status add(void *ctx, int32_t dtype, void *out, const void *a, const void *b, int64_t numel, phx_stream *s,
                      phx_error *err) {
  PHX_TRY(phx__cuda_begin(ctx, dtype, "add", err));
  return phx__cuda_check(ctx, phx__cuda_k_add(dtype, out, a, b, numel, phx__cuda_stream(ctx, s)), "add", err);
}

static phx_status cross_entropy(void *ctx, int32_t dtype, void *logits, float *losses, const int32_t *targets,
                                int64_t n, int64_t v, int64_t vp, int32_t gradient, float scale, phx_stream *s,
                                phx_error *err) {
  const phx__cuda *cuda = ctx;
  PHX_TRY(phx__cuda_begin(cuda, dtype, "cross_entropy", err));
  PHX_TRY(check_sizes(ctx, "cross_entropy", n, v, err));
  if (vp < v)
    return phx__cuda_fail(ctx, err, PHX_INVALID, "cross_entropy of %lld logits in rows of %lld", (long long)v,
                          (long long)vp);
  return phx__cuda_check(ctx,
                         phx__cuda_k_cross_entropy(dtype, logits, losses, targets, n, v, vp, gradient, scale,
                                                   cuda->shared_limit, phx__cuda_stream(cuda, s)),
                         "cross_entropy", err);
}

static phx_status update(const phx__cuda *cuda, const phx__cuda_update *u, int64_t numel, const char *what,
                         phx_stream *s, phx_error *err) {
  if (u->low && u->low_dtype != PHX_F32 && u->low_dtype != PHX_F16 && u->low_dtype != PHX_BF16)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: weight copy of dtype %d: only F32, F16 and BF16", what,
                          u->low_dtype);
  return phx__cuda_check(cuda, phx__cuda_k_update(u, numel, phx__cuda_stream(cuda, s)), what, err);
}

static phx_status adamw(void *ctx, float *w, const float *g, float *m, float *v, void *low, int32_t low_dtype,
                        int64_t numel, float scale, float lr, float beta1, float beta2, float c1, float c2, float eps,
                        float decay, phx_stream *s, phx_error *err) {
  const phx__cuda_update u = {w,  m,     v,     g,            low,          low_dtype, scale,
                              lr, beta1, beta2, 1.0f - beta1, 1.0f - beta2, c1,        c2,
                              eps, decay};
  return update(ctx, &u, numel, "adamw", s, err);
}

static phx_status sgd(void *ctx, float *w, const float *g, void *low, int32_t low_dtype, int64_t numel, float scale,
                      float lr, float decay, phx_stream *s, phx_error *err) {
  const phx__cuda_update u = {.w = w, .g = g, .low = low, .low_dtype = low_dtype, .scale = scale, .lr = lr,
                              .decay = decay};
  return update(ctx, &u, numel, "sgd", s, err);
}

static phx_status block_norms(void *ctx, double *sums, const float *x, int64_t blocks, phx_stream *s, phx_error *err) {
  return phx__cuda_check(ctx, phx__cuda_k_block_norms(sums, x, blocks, phx__cuda_stream(ctx, s)), "block_norms", err);
}

static phx_status mean(void *ctx, double *out, const float *x, int64_t n, phx_stream *s, phx_error *err) {
  if (n < 1) return phx__cuda_fail(ctx, err, PHX_INVALID, "mean of %lld values", (long long)n);
  return phx__cuda_check(ctx, phx__cuda_k_mean(out, x, n, phx__cuda_stream(ctx, s)), "mean", err);
}

void phx__cuda_ops_init(phx__cuda *cuda) {
  cuda->ops = (phx_ops){.struct_size = sizeof(phx_ops),
                        .ctx = cuda,
                        .scratch_bytes = cuda->scratch_bytes + cuda->config.workspace,
                        .linear = phx__cuda_linear,
                        .linear_backward_input = phx__cuda_linear_backward_input,
                        .linear_backward_weight = phx__cuda_linear_backward_weight,
                        .embedding = embedding,
                        .embedding_backward = embedding_backward,
                        .layer_norm = layer_norm,
                        .layer_norm_backward = layer_norm_backward,
                        .add = add,
                        .attention = phx__cuda_attention,
                        .attention_backward = phx__cuda_attention_backward,
                        .cross_entropy = cross_entropy,
                        .adamw = adamw,
                        .sgd = sgd,
                        .block_norms = block_norms,
                        .mean = mean};
}
