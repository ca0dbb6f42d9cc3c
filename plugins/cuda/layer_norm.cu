/* plugins/cuda/layer_norm.cu - layer norm with the residual sum before it, and its gradients.  arXiv 1607.06450.
 *
 * A block per row; the row stays in shared memory where it fits, so memory is read once.  The gradients of weight and
 * bias are summed in two fixed steps: `slices` blocks each sum every slices-th row, then columns are added in order.
 * The mean and the variance are two passes over the row (in shared memory): no cancellation. */
#include "kernel.h"

namespace {
constexpr int64_t kSharedBytes = 40 << 10; /* of a row; longer ones are read again */

/* x(j) of the row: from shared memory, or computed again. */
template <class T> struct row_source {
  const T *a, *b, *kept; /* kept: the sum, when it was written */
  const float *cache;
  __device__ __forceinline__ float operator()(int64_t j) const {
    return cache ? cache[j] : as_float(kept ? kept[j] : a[j]);
  }
};

/* Reads the row once: cache and sum are written. */
template <class T, int N>
__device__ __forceinline__ float read_row(T *sum, float *cache, const T *a, const T *b, int64_t c) {
  float total = 0;
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N) {
    pack<T, N> x = load_pack<N>(a + j);
    if (b) {
      const pack<T, N> y = load_pack<N>(b + j);
#pragma unroll
      for (int i = 0; i < N; i++) x.v[i] = rounded<T>(as_float(x.v[i]) + as_float(y.v[i]));
    }
    if (sum) store_pack<N>(sum + j, x);
#pragma unroll
    for (int i = 0; i < N; i++) {
      total += as_float(x.v[i]);
      if (cache) cache[j + i] = as_float(x.v[i]);
    }
  }
  return total;
}

template <class T, int N>
__global__ void forward_kernel(T *out, T *sum, float *mean, float *rstd, const T *a, const T *b, const T *w,
                               const T *bias, int64_t c, float eps, int32_t cached) {
  PHX_DYNAMIC_SHARED(float, shared);
  PHX_SHARED(float, places, 33);
  const int64_t row = blockIdx.x, at = row * c;
  float *cache = cached ? shared : nullptr;
  T *kept = sum ? sum + at : nullptr;
  const float m = block_sum(read_row<T, N>(kept, cache, a + at, b ? b + at : nullptr, c), places) / (float)c;
  const row_source<T> x{a + at, nullptr, kept, cache};
  float square = 0;
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N)
#pragma unroll
    for (int i = 0; i < N; i++) square += (x(j + i) - m) * (x(j + i) - m);
  const float r = 1.0f / sqrtf(block_sum(square, places) / (float)c + eps);
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N) {
    const pack<T, N> pw = load_pack<N>(w + j), pb = load_pack<N>(bias + j);
    pack<T, N> y;
#pragma unroll
    for (int i = 0; i < N; i++) y.v[i] = rounded<T>((x(j + i) - m) * r * as_float(pw.v[i]) + as_float(pb.v[i]));
    store_pack<N>(out + at + j, y);
  }
  if (threadIdx.x == 0) {
    mean[row] = m;
    rstd[row] = r;
  }
}

unsigned threads_for(int64_t c, int n) {
  const int64_t threads = (c / n + 31) / 32 * 32;
  return (unsigned)(threads < 32 ? 32 : threads > 256 ? 256 : threads);
}

template <class T>
cudaError_t forward(void *out, void *sum, float *mean, float *rstd, const void *a, const void *b, const void *w,
                    const void *bias, int64_t n, int64_t c, float eps, cudaStream_t s) {
  T *to = static_cast<T *>(out), *kept = static_cast<T *>(sum);
  const T *x = static_cast<const T *>(a), *y = static_cast<const T *>(b), *pw = static_cast<const T *>(w);
  const T *pb = static_cast<const T *>(bias);
  constexpr int N = pack_size<T>;
  const bool packs = rows_are_aligned(to, c) && rows_are_aligned(x, c) && rows_are_aligned(kept, c) &&
                     rows_are_aligned(y, c) && rows_are_aligned(pw, c) && rows_are_aligned(pb, c);
  const int32_t cached = c * 4 <= kSharedBytes;
  const size_t bytes = cached ? (size_t)c * 4 : 0;
  const unsigned grid = (unsigned)n;
  if (packs)
    return PHX_LAUNCH((forward_kernel<T, N>), grid, threads_for(c, N), bytes, s, to, kept, mean, rstd, x, y, pw, pb, c,
                      eps, cached);
  return PHX_LAUNCH((forward_kernel<T, 1>), grid, threads_for(c, 1), bytes, s, to, kept, mean, rstd, x, y, pw, pb, c,
                    eps, cached);
}

/* ---- backward ---- */
/* Rows blockIdx.x, + slices, ...: a thread owns the same columns in every row, so the sums of a slice are in order. */
template <class T, int N> __global__ void backward_kernel(phx__cuda_norm_backward p, int32_t in_shared) {
  PHX_DYNAMIC_SHARED(float, shared);
  PHX_SHARED(float, places, 33);
  const int64_t c = p.c, first = (int64_t)threadIdx.x * N, step = (int64_t)blockDim.x * N;
  const T *w = static_cast<const T *>(p.w);
  float *dw = !p.parts ? nullptr : in_shared ? shared : p.parts + (int64_t)blockIdx.x * 2 * c;
  float *db = dw ? dw + c : nullptr;
  for (int64_t j = first; dw && j < c; j += step)
    for (int i = 0; i < N; i++) dw[j + i] = db[j + i] = 0;
  for (int64_t row = blockIdx.x; row < p.n; row += p.slices) {
    const T *d = static_cast<const T *>(p.dout) + row * c, *x = static_cast<const T *>(p.x) + row * c;
    const T *add = p.add ? static_cast<const T *>(p.add) + row * c : nullptr;
    T *dx = static_cast<T *>(p.dx) + row * c;
    const float m = p.mean[row], r = p.rstd[row];
    float sum = 0, dot = 0;
    for (int64_t j = first; j < c; j += step) {
      const pack<T, N> pd = load_pack<N>(d + j), px = load_pack<N>(x + j), pw = load_pack<N>(w + j);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float g = as_float(pd.v[i]), hat = (as_float(px.v[i]) - m) * r, gw = g * as_float(pw.v[i]);
        sum += gw;
        dot += gw * hat;
        if (dw) {
          dw[j + i] += g * hat;
          db[j + i] += g;
        }
      }
    }
    sum = block_sum(sum, places) / (float)c;
    dot = block_sum(dot, places) / (float)c;
    for (int64_t j = first; j < c; j += step) {
      const pack<T, N> pd = load_pack<N>(d + j), px = load_pack<N>(x + j), pw = load_pack<N>(w + j);
      pack<T, N> y{};
      if (add) y = load_pack<N>(add + j);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float hat = (as_float(px.v[i]) - m) * r;
        const float own = r * (as_float(pd.v[i]) * as_float(pw.v[i]) - sum - hat * dot);
        y.v[i] = rounded<T>(add ? as_float(y.v[i]) + own : own);
      }
      store_pack<N>(dx + j, y);
    }
  }
  if (!dw || !in_shared) return;
  float *out = p.parts + (int64_t)blockIdx.x * 2 * c;
  for (int64_t j = first; j < c; j += step)
    for (int i = 0; i < N; i++) {
      out[j + i] = dw[j + i];
      out[c + j + i] = db[j + i];
    }
}

/* dw and db (+)= the slices' sums, in order. */
__global__ void backward_total_kernel(phx__cuda_norm_backward p) {
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= 2 * p.c) return;
  float sum = 0;
  for (int64_t i = 0; i < p.slices; i++) sum += p.parts[i * 2 * p.c + column];
  float *out = column < p.c ? p.dw + column : p.db + (column - p.c);
  const int32_t mode = column < p.c ? p.w_mode : p.b_mode;
  *out = mode == PHX_GRAD_ADD ? *out + sum : sum;
}

template <class T> cudaError_t backward(const phx__cuda_norm_backward &p, cudaStream_t s) {
  constexpr int N = pack_size<T>;
  const bool packs = rows_are_aligned(static_cast<const T *>(p.dx), p.c) &&
                     rows_are_aligned(static_cast<const T *>(p.add), p.c) &&
                     rows_are_aligned(static_cast<const T *>(p.dout), p.c) &&
                     rows_are_aligned(static_cast<const T *>(p.x), p.c) &&
                     rows_are_aligned(static_cast<const T *>(p.w), p.c);
  const int32_t in_shared = p.parts && 8 * p.c <= kSharedBytes;
  const size_t bytes = in_shared ? (size_t)(8 * p.c) : 0;
  const unsigned grid = (unsigned)p.slices;
  if (packs) return PHX_LAUNCH((backward_kernel<T, N>), grid, threads_for(p.c, N), bytes, s, p, in_shared);
  return PHX_LAUNCH((backward_kernel<T, 1>), grid, threads_for(p.c, 1), bytes, s, p, in_shared);
}
}  // namespace

extern "C" cudaError_t phx__cuda_k_layer_norm(int32_t dtype, void *out, void *sum, float *mean, float *rstd,
                                              const void *a, const void *b, const void *w, const void *bias, int64_t n,
                                              int64_t c, float eps, cudaStream_t s) {
  PHX_BY_DTYPE(dtype, T, return forward<T>(out, sum, mean, rstd, a, b, w, bias, n, c, eps, s));
}

extern "C" cudaError_t phx__cuda_k_layer_norm_backward(const phx__cuda_norm_backward *p, cudaStream_t s) {
  const cudaError_t error = p->dtype == PHX_BF16 ? backward<bf16>(*p, s) : backward<float>(*p, s);
  if (error != cudaSuccess || !p->parts) return error;
  return PHX_LAUNCH(backward_total_kernel, blocks_for(2 * p->c, 128, INT32_MAX), 128, 0, s, *p);
}
