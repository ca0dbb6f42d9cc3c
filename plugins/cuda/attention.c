/* plugins/cuda/attention.c - causal attention: checks, and the choice of who computes it.  [main] */
#include "attention.h"

enum { WIDTH_MOST = 128 };

static phx_status run(phx__cuda *cuda, const phx__cuda_attention_call *call, const char *what, phx_stream *stream,
                      phx_error *err) {
  const cudaStream_t s = phx__cuda_stream(cuda, stream);
  int32_t done = 0;
  const phx_status status = phx__cuda_attention_cudnn(cuda, call, s, what, &done, err);
  if (status != PHX_OK || done) return status;
  if (call->width <= WIDTH_MOST) return phx__cuda_check(cuda, phx__cuda_attention_plain(call, s), what, err);
  return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: heads of %lld channels; %d is the most", what,
                        (long long)call->width, WIDTH_MOST);
}

static phx_status check(const phx__cuda *cuda, const phx__cuda_attention_call *call, const char *what, phx_error *err) {
  PHX_TRY(phx__cuda_begin(cuda, call->dtype, what, err));
  if (call->b < 1 || call->t < 1 || call->heads < 1 || call->c < 1 || call->c % call->heads ||
      call->b * call->heads > INT32_MAX || call->t > 65535 * (int64_t)32)
    return phx__cuda_fail(cuda, err, PHX_INVALID, "%s: %lld sequences of %lld tokens, %lld channels in %lld heads",
                          what, (long long)call->b, (long long)call->t, (long long)call->c, (long long)call->heads);
  return PHX_OK;
}

phx_status phx__cuda_attention(void *ctx, int32_t dtype, void *out, float *lse, const void *qkv, int64_t b, int64_t t,
                               int64_t c, int64_t heads, phx_stream *s, phx_error *err) {
  const phx__cuda_attention_call call = {.dtype = dtype, .b = b, .t = t, .c = c, .heads = heads,
                                         .width = heads > 0 ? c / heads : 0, .qkv = qkv, .out = out, .lse = lse};
  const phx_status status = check(ctx, &call, "attention", err);
  return status == PHX_OK ? run(ctx, &call, "attention", s, err) : status;
}

phx_status phx__cuda_attention_backward(void *ctx, int32_t dtype, void *dqkv, const void *dout, const void *qkv,
                                        const void *out, const float *lse, float *work, int64_t b, int64_t t, int64_t c,
                                        int64_t heads, phx_stream *s, phx_error *err) {
  const phx__cuda_attention_call call = {.dtype = dtype, .backward = 1, .b = b, .t = t, .c = c, .heads = heads,
                                         .width = heads > 0 ? c / heads : 0, .qkv = qkv, .dqkv = dqkv, .dout = dout,
                                         .out = (void *)(uintptr_t)out, .lse = (float *)(uintptr_t)lse, .work = work};
  const phx_status status = check(ctx, &call, "attention_backward", err);
  return status == PHX_OK ? run(ctx, &call, "attention_backward", s, err) : status;
}
