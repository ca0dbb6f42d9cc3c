/* plugins/cuda/attention.h - attention's seam: who computes it, for which shapes.
 *
 * A provider says what it takes, by dtype and shape only, so a run's choice is the same in every step and on every
 * rank.  The first in the list of attention.c that takes a shape computes it, forward and backward: what one wrote
 * (out, lse) the other could read.  cuDNN's graph, where it is built in, would come first in the list. */
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

typedef struct phx__cuda_attention_provider {
  const char *name;
  int32_t (*takes)(const phx__cuda *cuda, const phx__cuda_attention_call *call);
  cudaError_t (*run)(const phx__cuda_attention_call *call, cudaStream_t s);
} phx__cuda_attention_provider;

/* attention_plain.cu: every width to 128, fp32 and bf16, fp32 arithmetic */
cudaError_t phx__cuda_attention_plain(const phx__cuda_attention_call *call, cudaStream_t s);
/* work = sums of dout * out: the first step of backward, for every provider of our own */
cudaError_t phx__cuda_attention_dots(const phx__cuda_attention_call *call, cudaStream_t s);

#ifdef __cplusplus
}
#endif
#endif
