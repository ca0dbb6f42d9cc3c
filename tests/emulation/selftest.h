/* tests/emulation/selftest.h - the emulation's own test kernels, as C functions. */
#ifndef PHX__EMULATION_SELFTEST_H
#define PHX__EMULATION_SELFTEST_H
#include <cuda_runtime_api.h>
#ifdef __cplusplus
extern "C" {
#endif
cudaError_t selftest_sum(float *out, const float *x, int n, cudaStream_t s); /* 3 blocks' sums */
/* x has 2 * threads elements; even[0]: even ones of the first half, even[1]: ballot of the first warp's odd lanes */
cudaError_t selftest_reverse(int *x, int *even, unsigned threads, cudaStream_t s);
cudaError_t selftest_stuck(int *x);             /* ends the program */
cudaError_t selftest_overrun(char *x, int at);  /* writes x[at] */
cudaError_t selftest_shared(char *x, size_t bytes); /* a launch with so much dynamic shared memory, which writes x[0] */
cudaError_t selftest_ask(int bytes);                /* what that kernel may have */
unsigned short selftest_bf16(float x);
unsigned short selftest_fp16(float x);
float selftest_from_fp16(unsigned short x);
#ifdef __cplusplus
}
#endif
#endif
