// selftest.cpp - kernels that use each part of the emulation once; tests/unit/test_cuda_double.c runs them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "selftest.h"

// Sum of x(n) per block, by shuffles inside a warp and shared memory between warps.
__global__ void sum_kernel(float *out, const float *x, int n) {
  static char key;
  float *parts = (float *)emulation::static_shared(&key, 32 * sizeof(float));
  float sum = 0;
  for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x)) sum += x[i];
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += parts[w];
    out[blockIdx.x] = total;
  }
}

// Reverses 2 * blockDim elements through dynamic shared memory; counts the even ones.
__global__ void reverse_kernel(int *x, int *even) {
  int *shared = (int *)emulation::dynamic_shared();
  const unsigned n = 2 * blockDim.x, i = threadIdx.x;
  shared[i] = x[i];
  shared[i + blockDim.x] = x[i + blockDim.x];
  const int count = __syncthreads_count(shared[i] % 2 == 0);
  x[i] = shared[n - 1 - i];
  x[i + blockDim.x] = shared[n - 1 - i - blockDim.x];
  if (i == 0) *even = count;
  const unsigned odd = __ballot_sync(0xffffffffu, (int)(i & 1));
  if (i == 1) even[1] = (int)odd;
}

// Half of a warp waits for the other half in a shuffle, and that half at a barrier.
__global__ void stuck_kernel(int *x) {
  if (threadIdx.x < 4) (void)__shfl_sync(0xffu, 1, 7);
  __syncthreads();
  x[threadIdx.x] = 1;
}

__global__ void overrun_kernel(char *x, int at) { x[at] = 0; }

cudaError_t selftest_sum(float *out, const float *x, int n, cudaStream_t s) {
  return emulation::launch_kernel("sum", 3, 128, 0, s, sum_kernel, out, x, n);
}
cudaError_t selftest_reverse(int *x, int *even, unsigned threads, cudaStream_t s) {
  return emulation::launch_kernel("reverse", 1, threads, 2 * threads * sizeof(int), s, reverse_kernel, x, even);
}
cudaError_t selftest_stuck(int *x) { return emulation::launch_kernel("stuck", 1, 8, 0, nullptr, stuck_kernel, x); }
cudaError_t selftest_overrun(char *x, int at) {
  return emulation::launch_kernel("overrun", 1, 1, 0, nullptr, overrun_kernel, x, at);
}
cudaError_t selftest_shared(char *x, size_t bytes) {
  return emulation::launch_kernel("overrun", 1, 1, bytes, nullptr, overrun_kernel, x, 0);
}
cudaError_t selftest_ask(int bytes) {
  return cudaFuncSetAttribute(overrun_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
unsigned short selftest_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
unsigned short selftest_fp16(float x) { return __half_as_ushort(__float2half_rn(x)); }
float selftest_from_fp16(unsigned short x) { return __half2float(__ushort_as_half(x)); }
