/* plugins/cuda/cross_entropy.cu - softmax cross-entropy fused with its gradient, in place.
 *
 * A block per row.  The first walk keeps a running maximum and sum (online softmax, arXiv 1805.02867); the second
 * replaces the logits by the gradient, reading them from shared memory where a row fits: memory is read once and
 * written once.  Targets outside 0..V-1 give NaN. */
#include "kernel.h"

namespace {
constexpr int kThreads = 512, kCachedThreads = 1024; /* with its row in shared memory a block has few neighbours */
constexpr int64_t kStaticShared = 1 << 10, kUsualShared = 48 << 10; /* the kernel's own, rounded up; needs no asking */
constexpr int64_t kShortRow = 16 << 10;              /* bytes: no need of so many threads */

template <class T> __device__ __forceinline__ float exponential(float x);
template <> __device__ __forceinline__ float exponential<float>(float x) { return expf(x); }
template <> __device__ __forceinline__ float exponential<bf16>(float x) { return __expf(x); } /* rounded to 8 bits */

struct running {
  float top, sum; /* sum of exp(x - top) */
};
__device__ __forceinline__ running join(running a, running b) {
  const float top = fmaxf(a.top, b.top);
  if (top == -INFINITY) return running{top, 0.0f}; /* nothing seen yet, or only -inf */
  return running{top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top)};
}
__device__ __forceinline__ running warp_join(running r) {
  for (int by = 16; by > 0; by /= 2) {
    const float top = __shfl_xor_sync(0xffffffffu, r.top, by), sum = __shfl_xor_sync(0xffffffffu, r.sum, by);
    r = join(r, running{top, sum});
  }
  return r;
}

template <class T, int N>
__global__ void __launch_bounds__(kCachedThreads)
kernel(T *logits, float *losses, const int32_t *targets, int64_t v, int64_t vp, int32_t gradient, float scale,
       int32_t cached) {
  PHX_DYNAMIC_SHARED(T, cache);
  PHX_SHARED(float, tops, 32);
  PHX_SHARED(float, sums, 32);
  const int64_t row = blockIdx.x, first = (int64_t)threadIdx.x * N, step = (int64_t)blockDim.x * N;
  const int warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32), warps = (int)(blockDim.x / 32);
  T *x = logits + row * vp;
  const int64_t target = targets[row];
  const bool known = target >= 0 && target < v;
  const float chosen = known ? as_float(x[target]) : NAN;
  running mine{-INFINITY, 0.0f};
  for (int64_t j = first; j < v; j += step) {
    const pack<T, N> p = load_pack<N>(x + j);
    if (cached) store_pack<N>(cache + j, p); /* read by this thread only */
    float value[N], top = mine.top;
#pragma unroll
    for (int i = 0; i < N; i++) {
      value[i] = j + i < v ? as_float(p.v[i]) : -INFINITY;
      top = value[i] > top || value[i] != value[i] ? value[i] : top; /* a NaN goes on */
    }
    if (top == -INFINITY) continue;
    if (top != mine.top) mine.sum *= exponential<T>(mine.top - top);
    mine.top = top;
#pragma unroll
    for (int i = 0; i < N; i++) mine.sum += exponential<T>(value[i] - top);
  }
  mine = warp_join(mine);
  if (lane == 0) {
    tops[warp] = mine.top;
    sums[warp] = mine.sum;
  }
  __syncthreads(); /* x[target] was read by all, too */
  const running all = warp_join(lane < warps ? running{tops[lane], sums[lane]} : running{-INFINITY, 0.0f});
  if (threadIdx.x == 0) losses[row] = logf(all.sum) + all.top - chosen;
  if (!gradient) return;
  const float by = scale / all.sum;
  for (int64_t j = first; j < vp; j += step) {
    pack<T, N> p{};
    if (j < v) p = load_pack<N>(cached ? cache + j : x + j);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float g = exponential<T>(as_float(p.v[i]) - all.top) * by - (j + i == target ? scale : 0.0f);
      const float inside = known ? g : NAN;
      p.v[i] = rounded<T>(j + i < v ? inside : 0.0f);
    }
    store_pack<N>(x + j, p);
  }
}

template <class T, int N>
cudaError_t run(T *x, float *losses, const int32_t *targets, int64_t n, int64_t v, int64_t vp, int32_t gradient,
                float scale, int64_t shared_limit, cudaStream_t s) {
  const int64_t row = (v + N - 1) / N * N * (int64_t)sizeof(T);
  const int32_t cached = gradient && row <= shared_limit - kStaticShared;
  const size_t bytes = cached ? (size_t)row : 0;
  if (bytes > kUsualShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return error;
  }
  return PHX_LAUNCH((kernel<T, N>), (unsigned)n, cached && row > kShortRow ? kCachedThreads : kThreads, bytes, s, x,
                    losses, targets, v, vp, gradient, scale, cached);
}

template <class T>
cudaError_t aligned(void *logits, float *losses, const int32_t *targets, int64_t n, int64_t v, int64_t vp,
                    int32_t gradient, float scale, int64_t shared_limit, cudaStream_t s) {
  T *x = static_cast<T *>(logits);
  if (rows_are_aligned(x, vp))
    return run<T, pack_size<T>>(x, losses, targets, n, v, vp, gradient, scale, shared_limit, s);
  return run<T, 1>(x, losses, targets, n, v, vp, gradient, scale, shared_limit, s);
}
}  // namespace

extern "C" cudaError_t phx__cuda_k_cross_entropy(int32_t dtype, void *logits, float *losses, const int32_t *targets,
                                                 int64_t n, int64_t v, int64_t vp, int32_t gradient, float scale,
                                                 int64_t shared_limit, cudaStream_t s) {
  PHX_BY_DTYPE(dtype, T, return aligned<T>(logits, losses, targets, n, v, vp, gradient, scale, shared_limit, s));
}
