/* plugins/cuda/profile.c - [cuda] profile = yes: milliseconds by kind of work, said when the device closes.
 *
 * Operations, and what else is given to a stream: copies, fills, casts, functions of the host.  Each stands between two
 * events of its stream, so what is counted is the time of its kernels and of the gaps between them.  Kinds add up to a
 * stream's time but for the host's delays; what other streams do beside it counts as well.  What a communicator
 * launches on these streams itself is in its own list (nccl; PHX_DEVICE_TIMED).  Events come from a pool that is made
 * at create; when it is used up, [main] waits for them and reads them.  [main] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

enum { PAIRS = 4096 };
enum {
  LINEAR,
  LINEAR_BACKWARD_INPUT,
  LINEAR_BACKWARD_WEIGHT,
  EMBEDDING,
  EMBEDDING_BACKWARD,
  LAYER_NORM,
  LAYER_NORM_BACKWARD,
  ADD,
  ATTENTION,
  ATTENTION_BACKWARD,
  CROSS_ENTROPY,
  ADAMW,
  SGD,
  BLOCK_NORMS,
  MEAN,
  COPY,
  FILL,
  CAST,
  ACCUMULATE,
  SCALE,
  HOST_FUNCTION,
  KINDS
};
static const char *const names[KINDS] = {"linear",
                                         "linear_backward_input",
                                         "linear_backward_weight",
                                         "embedding",
                                         "embedding_backward",
                                         "layer_norm",
                                         "layer_norm_backward",
                                         "add",
                                         "attention",
                                         "attention_backward",
                                         "cross_entropy",
                                         "adamw",
                                         "sgd",
                                         "block_norms",
                                         "mean",
                                         "copy",
                                         "fill",
                                         "cast",
                                         "accumulate",
                                         "scale",
                                         "host_function"};

typedef struct pair {
  cudaEvent_t begin, end;
  int32_t kind;
} pair;

struct phx__cuda_profile {
  pair pairs[PAIRS];
  int32_t used;
  double ms[KINDS];
  int64_t calls[KINDS];
  phx_ops plain;
  phx_device device; /* its calls, untimed */
};

phx_status phx__cuda_profile_drain(phx__cuda *cuda, phx_error *err) {
  struct phx__cuda_profile *p = cuda->profile;
  if (!p) return PHX_OK;
  phx_status status = PHX_OK;
  for (int32_t i = 0; i < p->used && status == PHX_OK; i++) {
    float ms = 0;
    status = phx__cuda_check(cuda, cudaEventSynchronize(p->pairs[i].end), "profile", err);
    if (status == PHX_OK)
      status = phx__cuda_check(cuda, cudaEventElapsedTime(&ms, p->pairs[i].begin, p->pairs[i].end), "profile", err);
    p->ms[p->pairs[i].kind] += (double)ms;
    p->calls[p->pairs[i].kind]++;
  }
  p->used = 0;
  return status;
}

/* ---- around an operation ---- */
static const phx_ops *plain(void *ctx) {
  return &((phx__cuda *)ctx)->profile->plain;
}

/* The first argument of the operation, and on the way the first event: a failure of it shows at the second. */
static void *plain_ctx(void *ctx, phx_stream *s) {
  phx__cuda *cuda = ctx;
  if (cuda->profile->used == PAIRS) (void)phx__cuda_profile_drain(cuda, NULL);
  (void)cudaEventRecord(cuda->profile->pairs[cuda->profile->used].begin, phx__cuda_stream(cuda, s));
  return ctx;
}

static phx_status over(phx__cuda *cuda, int32_t kind, phx_stream *s, phx_status status, phx_error *err) {
  struct phx__cuda_profile *p = cuda->profile;
  if (status != PHX_OK) return status;
  p->pairs[p->used].kind = kind;
  return phx__cuda_check(cuda, cudaEventRecord(p->pairs[p->used++].end, phx__cuda_stream(cuda, s)), "profile", err);
}

static phx_status timed_linear(void *ctx, int32_t dtype, void *out, int64_t out_ld, void *pre, const void *x,
                               const void *w, const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t gelu,
                               phx_stream *s, phx_error *err) {
  return over(ctx, LINEAR, s,
              plain(ctx)->linear(plain_ctx(ctx, s), dtype, out, out_ld, pre, x, w, bias, n, ic, oc, gelu, s, err), err);
}
static phx_status timed_linear_backward_input(void *ctx, int32_t dtype, void *dx, const void *dout, int64_t dout_ld,
                                              const void *w, const void *pre, int64_t n, int64_t ic, int64_t oc,
                                              int32_t mode, phx_stream *s, phx_error *err) {
  return over(
      ctx, LINEAR_BACKWARD_INPUT, s,
      plain(ctx)->linear_backward_input(plain_ctx(ctx, s), dtype, dx, dout, dout_ld, w, pre, n, ic, oc, mode, s, err),
      err);
}
static phx_status timed_linear_backward_weight(void *ctx, int32_t dtype, float *dw, float *db, const void *dout,
                                               int64_t dout_ld, const void *x, int64_t n, int64_t ic, int64_t oc,
                                               int32_t w_mode, int32_t b_mode, phx_stream *s, phx_error *err) {
  return over(ctx, LINEAR_BACKWARD_WEIGHT, s,
              plain(ctx)->linear_backward_weight(plain_ctx(ctx, s), dtype, dw, db, dout, dout_ld, x, n, ic, oc, w_mode,
                                                 b_mode, s, err),
              err);
}
static phx_status timed_embedding(void *ctx, int32_t dtype, void *out, const int32_t *tokens, const void *wte,
                                  const void *wpe, int64_t b, int64_t t, int64_t c, phx_stream *s, phx_error *err) {
  return over(ctx, EMBEDDING, s,
              plain(ctx)->embedding(plain_ctx(ctx, s), dtype, out, tokens, wte, wpe, b, t, c, s, err), err);
}
static phx_status timed_embedding_backward(void *ctx, int32_t dtype, float *dwte, int32_t wte_mode, float *dwpe,
                                           int32_t wpe_mode, const void *dout, const int32_t *tokens, int64_t b,
                                           int64_t t, int64_t c, int64_t v, int64_t max_t, phx_stream *s,
                                           phx_error *err) {
  return over(ctx, EMBEDDING_BACKWARD, s,
              plain(ctx)->embedding_backward(plain_ctx(ctx, s), dtype, dwte, wte_mode, dwpe, wpe_mode, dout, tokens, b,
                                             t, c, v, max_t, s, err),
              err);
}
static phx_status timed_layer_norm(void *ctx, int32_t dtype, void *out, void *sum, float *mean, float *rstd,
                                   const void *a, const void *b, const void *w, const void *bias, int64_t n, int64_t c,
                                   float eps, phx_stream *s, phx_error *err) {
  return over(ctx, LAYER_NORM, s,
              plain(ctx)->layer_norm(plain_ctx(ctx, s), dtype, out, sum, mean, rstd, a, b, w, bias, n, c, eps, s, err),
              err);
}
static phx_status timed_layer_norm_backward(void *ctx, int32_t dtype, void *dx, const void *add, float *dw,
                                            int32_t w_mode, float *db, int32_t b_mode, const void *dout, const void *x,
                                            const void *w, const float *mean, const float *rstd, int64_t n, int64_t c,
                                            phx_stream *s, phx_error *err) {
  return over(ctx, LAYER_NORM_BACKWARD, s,
              plain(ctx)->layer_norm_backward(plain_ctx(ctx, s), dtype, dx, add, dw, w_mode, db, b_mode, dout, x, w,
                                              mean, rstd, n, c, s, err),
              err);
}
static phx_status timed_add(void *ctx, int32_t dtype, void *out, const void *a, const void *b, int64_t numel,
                            phx_stream *s, phx_error *err) {
  return over(ctx, ADD, s, plain(ctx)->add(plain_ctx(ctx, s), dtype, out, a, b, numel, s, err), err);
}
static phx_status timed_attention(void *ctx, int32_t dtype, void *out, float *lse, const void *qkv, int64_t b,
                                  int64_t t, int64_t c, int64_t heads, phx_stream *s, phx_error *err) {
  return over(ctx, ATTENTION, s, plain(ctx)->attention(plain_ctx(ctx, s), dtype, out, lse, qkv, b, t, c, heads, s, err),
              err);
}
static phx_status timed_attention_backward(void *ctx, int32_t dtype, void *dqkv, const void *dout, const void *qkv,
                                           const void *out, const float *lse, float *work, int64_t b, int64_t t,
                                           int64_t c, int64_t heads, phx_stream *s, phx_error *err) {
  return over(
      ctx, ATTENTION_BACKWARD, s,
      plain(ctx)->attention_backward(plain_ctx(ctx, s), dtype, dqkv, dout, qkv, out, lse, work, b, t, c, heads, s, err),
      err);
}
static phx_status timed_cross_entropy(void *ctx, int32_t dtype, void *logits, float *losses, const int32_t *targets,
                                      int64_t n, int64_t v, int64_t vp, int32_t gradient, float scale, phx_stream *s,
                                      phx_error *err) {
  return over(
      ctx, CROSS_ENTROPY, s,
      plain(ctx)->cross_entropy(plain_ctx(ctx, s), dtype, logits, losses, targets, n, v, vp, gradient, scale, s, err),
      err);
}
static phx_status timed_adamw(void *ctx, float *w, const float *g, float *m, float *v, void *low, int32_t low_dtype,
                              int64_t numel, float scale, float lr, float beta1, float beta2, float c1, float c2,
                              float eps, float decay, phx_stream *s, phx_error *err) {
  return over(ctx, ADAMW, s,
              plain(ctx)->adamw(plain_ctx(ctx, s), w, g, m, v, low, low_dtype, numel, scale, lr, beta1, beta2, c1, c2,
                                eps, decay, s, err),
              err);
}
static phx_status timed_sgd(void *ctx, float *w, const float *g, void *low, int32_t low_dtype, int64_t numel,
                            float scale, float lr, float decay, phx_stream *s, phx_error *err) {
  return over(ctx, SGD, s, plain(ctx)->sgd(plain_ctx(ctx, s), w, g, low, low_dtype, numel, scale, lr, decay, s, err),
              err);
}
static phx_status timed_block_norms(void *ctx, double *sums, const float *x, int64_t blocks, phx_stream *s,
                                    phx_error *err) {
  return over(ctx, BLOCK_NORMS, s, plain(ctx)->block_norms(plain_ctx(ctx, s), sums, x, blocks, s, err), err);
}
static phx_status timed_mean(void *ctx, double *out, const float *x, int64_t n, phx_stream *s, phx_error *err) {
  return over(ctx, MEAN, s, plain(ctx)->mean(plain_ctx(ctx, s), out, x, n, s, err), err);
}

/* ---- around what else a stream is given ---- */
static const phx_device *device(void *ctx) {
  return &((phx__cuda *)ctx)->profile->device;
}

static phx_status timed_copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  return over(ctx, COPY, s, device(ctx)->copy(plain_ctx(ctx, s), dst, src, bytes, s, err), err);
}
static phx_status timed_fill(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err) {
  return over(ctx, FILL, s, device(ctx)->zero(plain_ctx(ctx, s), dst, bytes, s, err), err);
}
static phx_status timed_cast(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                             phx_stream *s, phx_error *err) {
  return over(ctx, CAST, s, device(ctx)->cast(plain_ctx(ctx, s), dst, dst_dtype, src, src_dtype, numel, s, err), err);
}
static phx_status timed_accumulate(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s,
                                   phx_error *err) {
  return over(ctx, ACCUMULATE, s, device(ctx)->add(plain_ctx(ctx, s), acc, x, numel, s, err), err);
}
static phx_status timed_scale(void *ctx, float *x, float by, int64_t numel, phx_stream *s, phx_error *err) {
  return over(ctx, SCALE, s, device(ctx)->scale(plain_ctx(ctx, s), x, by, numel, s, err), err);
}
static phx_status timed_host_function(void *ctx, phx_stream *s, phx_stream_fn *fn, void *arg, phx_error *err) {
  return over(ctx, HOST_FUNCTION, s, device(ctx)->enqueue(plain_ctx(ctx, s), s, fn, arg, err), err);
}

/* ---- life ---- */
phx_status phx__cuda_profile_begin(phx__cuda *cuda, phx_error *err) {
  if (!cuda->config.profile) return PHX_OK;
  struct phx__cuda_profile *p = calloc(1, sizeof *p);
  if (!p) return phx__cuda_fail(cuda, err, PHX_NOMEM, "no memory for [cuda] profile");
  cuda->profile = p;
  p->plain = cuda->ops;
  p->device = cuda->device;
  for (int32_t i = 0; i < PAIRS; i++) {
    PHX_TRY(phx__cuda_check(cuda, cudaEventCreate(&p->pairs[i].begin), "profile", err));
    PHX_TRY(phx__cuda_check(cuda, cudaEventCreate(&p->pairs[i].end), "profile", err));
  }
  cuda->ops.linear = timed_linear;
  cuda->ops.linear_backward_input = timed_linear_backward_input;
  cuda->ops.linear_backward_weight = timed_linear_backward_weight;
  cuda->ops.embedding = timed_embedding;
  cuda->ops.embedding_backward = timed_embedding_backward;
  cuda->ops.layer_norm = timed_layer_norm;
  cuda->ops.layer_norm_backward = timed_layer_norm_backward;
  cuda->ops.add = timed_add;
  cuda->ops.attention = timed_attention;
  cuda->ops.attention_backward = timed_attention_backward;
  cuda->ops.cross_entropy = timed_cross_entropy;
  cuda->ops.adamw = timed_adamw;
  cuda->ops.sgd = timed_sgd;
  cuda->ops.block_norms = timed_block_norms;
  cuda->ops.mean = timed_mean;
  cuda->device.copy = timed_copy;
  cuda->device.zero = timed_fill;
  cuda->device.cast = timed_cast;
  cuda->device.add = timed_accumulate;
  cuda->device.scale = timed_scale;
  cuda->device.enqueue = timed_host_function;
  cuda->device.caps |= PHX_DEVICE_TIMED;
  return PHX_OK;
}

void phx__cuda_profile_end(phx__cuda *cuda) {
  struct phx__cuda_profile *p = cuda->profile;
  if (!p) return;
  if (!cuda->failed_call) (void)phx__cuda_profile_drain(cuda, NULL);
  for (int32_t kind = 0; kind < KINDS; kind++) {
    char line[128];
    if (!p->calls[kind]) continue;
    snprintf(line, sizeof line, "profile: %s: %.3f ms in %lld calls", names[kind], p->ms[kind],
             (long long)p->calls[kind]);
    phx__cuda_log(cuda, PHX_LOG_INFO, line);
  }
  for (int32_t i = 0; i < PAIRS; i++) {
    if (p->pairs[i].begin) (void)cudaEventDestroy(p->pairs[i].begin);
    if (p->pairs[i].end) (void)cudaEventDestroy(p->pairs[i].end);
  }
  free(p);
  cuda->profile = NULL;
}
