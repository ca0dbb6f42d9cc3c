/* plugins/cuda/layer_norm.cu - layer norm with the residual sum before it, and its gradients.  arXiv 1607.06450.
 *
 * A block per row; the row stays in shared memory where it fits, so memory is read once.  The gradients of weight and
 * bias are summed in fixed steps: `slices` blocks each sum every slices-th row, then a block per 32 columns adds the
 * slices.  The mean and the variance are two passes over the row (in shared memory): no cancellation.
 * In shared memory element j + i of a row, i < N, is at i c / N + j / N: the threads of a warp, N apart in the row, are
 * neighbours there, so that no two want one bank. */
#include "kernel.h"

namespace {
constexpr int64_t kSharedBytes = 40 << 10; /* of a row; longer ones are read again */

/* Element j + i of the row, j the first of a thread's N: from shared memory, or read again. */
template <class T, int N> struct row_source {
  const T *a, *kept; /* kept: the sum, when it was written */
  const float *cache;
  int64_t c;
  __device__ __forceinline__ float operator()(int64_t j, int i) const {
    if (cache) return cache[i * (c / N) + j / N];
    return as_float(kept ? kept[j + i] : a[j + i]);
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
      if (cache) cache[i * (c / N) + j / N] = as_float(x.v[i]);
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
  const row_source<T, N> x{a + at, kept, cache, c};
  float square = 0;
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N)
#pragma unroll
    for (int i = 0; i < N; i++) square += (x(j, i) - m) * (x(j, i) - m);
  const float r = 1.0f / sqrtf(block_sum(square, places) / (float)c + eps);
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N) {
    const pack<T, N> pw = load_pack<N>(w + j), pb = load_pack<N>(bias + j);
    pack<T, N> y;
#pragma unroll
    for (int i = 0; i < N; i++) y.v[i] = rounded<T>((x(j, i) - m) * r * as_float(pw.v[i]) + as_float(pb.v[i]));
    store_pack<N>(out + at + j, y);
  }
  if (threadIdx.x == 0) {
    mean[row] = m;
    rstd[row] = r;
  }
}

unsigned threads_for(int64_t c, int n) {
  const int64_t threads = (c / n + 31) / 32 * 32;
  if (threads < 32) return 32;
  return (unsigned)(threads > 256 ? 256 : threads);
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
struct two_sums {
  float a, b;
};
/* block_sum of both.  places: 66 floats. */
__device__ __forceinline__ two_sums block_sums(two_sums x, float *places) {
  const int warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32), warps = (int)(blockDim.x / 32);
  x = two_sums{warp_sum(x.a), warp_sum(x.b)};
  __syncthreads(); /* places may still be read from the sums before */
  if (lane == 0) places[warp] = x.a, places[33 + warp] = x.b;
  __syncthreads();
  return two_sums{warp_sum(lane < warps ? places[lane] : 0.0f), warp_sum(lane < warps ? places[33 + lane] : 0.0f)};
}

/* Rows blockIdx.x, + slices, ...: a thread owns the same columns in every row, so the sums of a slice are in order. */
template <class T, int N> __global__ void backward_kernel(phx__cuda_norm_backward p, int32_t in_shared) {
  PHX_DYNAMIC_SHARED(float, shared);
  PHX_SHARED(float, places, 66);
  const int64_t c = p.c, first = (int64_t)threadIdx.x * N, step = (int64_t)blockDim.x * N;
  const int64_t apart = in_shared ? c / N : 1, every = in_shared ? N : 1; /* element j + i is at i apart + j / every */
  const T *w = static_cast<const T *>(p.w);
  float *dw = nullptr;
  if (p.parts) dw = in_shared ? shared : p.parts + (int64_t)blockIdx.x * 2 * c;
  float *db = dw ? dw + c : nullptr;
  for (int64_t j = first; dw && j < c; j += step)
    for (int i = 0; i < N; i++) dw[i * apart + j / every] = db[i * apart + j / every] = 0;
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
          dw[i * apart + j / every] += g * hat;
          db[i * apart + j / every] += g;
        }
      }
    }
    const two_sums all = block_sums(two_sums{sum, dot}, places);
    sum = all.a / (float)c;
    dot = all.b / (float)c;
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
      out[j + i] = dw[i * apart + j / every];
      out[c + j + i] = db[i * apart + j / every];
    }
}

/* dw and db (+)= the slices' sums: warp w of a block adds slices w, w + 32, ... of 32 columns; then warps in order. */
__global__ void __launch_bounds__(1024) backward_total_kernel(phx__cuda_norm_backward p) {
  PHX_SHARED(float, sums, 32 * 33);
  const int64_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = (int64_t)blockIdx.x * 32 + lane;
  float sum = 0;
  for (int64_t i = warp; column < 2 * p.c && i < p.slices; i += 32) sum += p.parts[i * 2 * p.c + column];
  sums[warp * 33 + lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= 2 * p.c) return;
  for (int w = 1; w < 32; w++) sum += sums[w * 33 + lane];
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
  return PHX_LAUNCH(backward_total_kernel, blocks_for(2 * p->c, 32, INT32_MAX), 1024, 0, s, *p);
}
