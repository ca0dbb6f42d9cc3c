/* plugins/cuda/reduce.cu - block norms, means, column sums, and what follows a product kept in fp32.
 *
 * Invariant: every sum is made in one order that depends on the shape only. */
#include "kernel.h"

namespace {
constexpr int kThreads = 256;

/* A warp per canonical block: lane l sums elements 4 l + 128 k (+ 0..3) in order, then the lanes halve. */
template <int N> __global__ void block_norms_kernel(double *sums, const float *x, int64_t blocks) {
  const int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = (int)(threadIdx.x % 32);
  if (warp >= blocks) return;
  const float *p = x + warp * PHX_BLOCK;
  double sum = 0;
  for (int i = 4 * lane; i < PHX_BLOCK; i += 128)
#pragma unroll
    for (int j = 0; j < 4; j += N) {
      const pack<float, N> value = load_pack<N>(p + i + j);
#pragma unroll
      for (int k = 0; k < N; k++) sum = __dadd_rn(sum, __dmul_rn((double)value.v[k], (double)value.v[k]));
    }
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
}

__global__ void mean_kernel(double *out, const float *x, int64_t n) {
  PHX_SHARED(double, places, 33);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum = __dadd_rn(sum, (double)x[i]);
  sum = block_sum(sum, places);
  if (threadIdx.x == 0) *out = sum / (double)n;
}

/* parts(slices, c): slice s sums rows s, s + slices, ... */
template <class T>
__global__ void column_parts_kernel(float *parts, const T *x, int64_t ld, int64_t n, int64_t c, int64_t slices) {
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= c) return;
  float sum = 0;
  for (int64_t row = blockIdx.y; row < n; row += slices) sum += as_float(x[row * ld + column]);
  parts[blockIdx.y * c + column] = sum;
}
/* out(c) (+)= sum over slices of parts(slices, ld) */
__global__ void column_total_kernel(float *out, int32_t mode, const float *parts, int64_t ld, int64_t c,
                                    int64_t slices) {
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= c) return;
  float sum = 0;
  for (int64_t i = 0; i < slices; i++) sum += parts[i * ld + column];
  out[column] = mode == PHX_GRAD_ADD ? out[column] + sum : sum;
}

__device__ __forceinline__ float gelu(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + expf(-2.0f * u));
}
__device__ __forceinline__ float gelu_slope(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x), s = 1.0f / (1.0f + expf(-2.0f * u));
  return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
}

template <class T> __global__ void finish_kernel(phx__cuda_finish f, const float *sums) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, all = f.rows * f.columns;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t row = i / f.columns, column = i % f.columns;
    T *out = static_cast<T *>(f.out) + row * f.out_ld + column;
    float x = sums[i];
    if (f.bias) x += as_float(static_cast<const T *>(f.bias)[column]);
    if (f.pre) static_cast<T *>(f.pre)[i] = rounded<T>(x);
    if (f.gelu) x = gelu(x);
    if (f.slope_of) x *= gelu_slope(as_float(static_cast<const T *>(f.slope_of)[i]));
    if (f.accumulate) x += as_float(*out);
    *out = rounded<T>(x);
  }
}
}  // namespace

extern "C" cudaError_t phx__cuda_k_block_norms(double *sums, const float *x, int64_t blocks, cudaStream_t s) {
  if (blocks == 0) return cudaSuccess;
  const unsigned grid = blocks_for(blocks, kThreads / 32, INT32_MAX);
  if (rows_are_aligned(x, PHX_BLOCK)) return PHX_LAUNCH(block_norms_kernel<4>, grid, kThreads, 0, s, sums, x, blocks);
  return PHX_LAUNCH(block_norms_kernel<1>, grid, kThreads, 0, s, sums, x, blocks);
}

extern "C" cudaError_t phx__cuda_k_mean(double *out, const float *x, int64_t n, cudaStream_t s) {
  return PHX_LAUNCH(mean_kernel, 1, 1024, 0, s, out, x, n);
}

extern "C" cudaError_t phx__cuda_k_column_sums(float *out, int32_t mode, int32_t dtype, const void *x, int64_t ld,
                                               int64_t n, int64_t c, float *parts, int64_t slices, cudaStream_t s) {
  const dim3 grid(blocks_for(c, 128, INT32_MAX), (unsigned)slices);
  cudaError_t error;
  if (dtype == PHX_BF16)
    error = PHX_LAUNCH(column_parts_kernel<bf16>, grid, 128, 0, s, parts, static_cast<const bf16 *>(x), ld, n, c,
                       slices);
  else
    error = PHX_LAUNCH(column_parts_kernel<float>, grid, 128, 0, s, parts, static_cast<const float *>(x), ld, n, c,
                       slices);
  if (error != cudaSuccess) return error;
  return PHX_LAUNCH(column_total_kernel, grid.x, 128, 0, s, out, mode, parts, c, c, slices);
}

extern "C" cudaError_t phx__cuda_k_finish(const phx__cuda_finish *f, const float *sums, cudaStream_t s) {
  const unsigned grid = blocks_for(f->rows * f->columns, kThreads, 132 * 16);
  if (f->dtype == PHX_BF16) return PHX_LAUNCH(finish_kernel<bf16>, grid, kThreads, 0, s, *f, sums);
  return PHX_LAUNCH(finish_kernel<float>, grid, kThreads, 0, s, *f, sums);
}
