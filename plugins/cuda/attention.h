/* plugins/cuda/attention.h - attention's seam: who computes it, for which shapes.
 *
 * cuDNN is asked first, where it is found and wanted, then our own kernel.  Who takes a call follows from dtype and
 * shape, so a run's choice is the same in every step.  Forward and backward may be computed by different ones: what
 * one wrote (out, lse) the other can read. */
#ifndef PHX__CUDA_ATTENTION_H
#define PHX__CUDA_ATTENTION_H
#include "cuda.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct phx__cuda_attention_call {
  int32_t dtype, backward;
  int64_t b, t, c, heads, width; /* width: c / heads */
  const void *qkv;
  void *out;   /* written by forward, read by backward */
  float *lse;  /* written by forward, read by backward */
  /* backward */
  void *dqkv;
  const void *dout;
  float *work; /* (b, heads, t): sums of dout * out */
} phx__cuda_attention_call;

/* attention_cudnn.c: bf16 by cuDNN.  *done = 0 and PHX_OK where it does not take the call: nothing was started. */
phx_status phx__cuda_attention_cudnn(phx__cuda *cuda, const phx__cuda_attention_call *call, cudaStream_t s,
                                     const char *what, int32_t *done, phx_error *err);
/* attention_plain.cu: every width to 128, fp32 and bf16, fp32 arithmetic */
cudaError_t phx__cuda_attention_plain(const phx__cuda_attention_call *call, cudaStream_t s);
/* work = sums of dout * out: the first step of backward, for every provider of our own */
cudaError_t phx__cuda_attention_dots(const phx__cuda_attention_call *call, cudaStream_t s);

#ifdef __cplusplus
}
#endif
#endif
