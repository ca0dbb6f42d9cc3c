/* plugins/cuda/attention_plain.cu - causal attention without a T x T matrix, in fp32 arithmetic, for any head width up
 * to 128.  FlashAttention-2, arXiv 2307.08691.
 *
 * A block owns 64 rows of one head, four neighbouring lanes a row; a lane holds every fourth channel in registers.  The
 * other side passes through shared memory 32 rows at a time.  Backward is deterministic: one kernel owns rows of keys
 * (dk, dv), a second owns rows of queries (dq); each recomputes the scores, nothing is added by atomics. */
#include "attention.h"
#include "kernel.h"

namespace {
constexpr int kRows = 64, kParts = 4, kThreads = kRows * kParts, kTile = 32;

struct shape {
  int64_t t, c;
  int heads, width;
  float scale;
};
template <class T> __device__ __forceinline__ float exponential(float x);
template <> __device__ __forceinline__ float exponential<float>(float x) { return expf(x); }
template <> __device__ __forceinline__ float exponential<bf16>(float x) { return __expf(x); }

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* A lane's channels of the row at p (ld between channels: 1); zero where there is no row or no channel. */
template <int E, class T>
__device__ __forceinline__ void load_row(float (&x)[E], const T *p, bool there, int part, int width) {
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = e * kParts + part;
    x[e] = there && d < width ? as_float(p[d]) : 0.0f;
  }
}
template <int E, class T>
__device__ __forceinline__ void store_row(T *p, const float (&x)[E], float by, int part, int width) {
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = e * kParts + part;
    if (d < width) p[d] = rounded<T>(x[e] * by);
  }
}
/* kTile rows of one head, from row `first`, into tile(kTile, 4 E); ld elements between rows. */
template <int E, class T>
__device__ __forceinline__ void load_tile(float *tile, const T *p, int64_t first, int64_t t, int64_t ld, int width) {
  constexpr int D = E * kParts;
  for (int i = (int)threadIdx.x; i < kTile * D; i += kThreads) {
    const int row = i / D, d = i % D;
    tile[i] = first + row < t && d < width ? as_float(p[(first + row) * ld + d]) : 0.0f;
  }
}
template <int E> __device__ __forceinline__ float dot(const float (&x)[E], const float *row, int part) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < E; e++) sum += x[e] * row[e * kParts + part];
  return row_sum(sum);
}
template <int E> __device__ __forceinline__ void add_row(float (&x)[E], float by, const float *row, int part) {
#pragma unroll
  for (int e = 0; e < E; e++) x[e] += by * row[e * kParts + part];
}

/* Blocks: x = (sequence, head), y = 64 rows, the longest first. */
struct place {
  int64_t sequence, first, row;
  int head, part;
};
__device__ __forceinline__ place place_of(const shape &s, bool last_first) {
  const int64_t tile = last_first ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
  const int64_t first = tile * kRows;
  return place{(int64_t)blockIdx.x / s.heads, first, first + threadIdx.x / kParts, (int)(blockIdx.x % s.heads),
               (int)(threadIdx.x % kParts)};
}

template <class T, int E> __global__ void forward_kernel(T *out, float *lse, const T *qkv, shape s) {
  PHX_DYNAMIC_SHARED(float, shared);
  float *const keys = shared, *const values = shared + kTile * E * kParts;
  const place at = place_of(s, true);
  const T *q = qkv + at.sequence * s.t * 3 * s.c + at.head * s.width, *k = q + s.c, *v = k + s.c;
  const bool there = at.row < s.t;
  const int64_t end = at.first + kRows < s.t ? at.first + kRows : s.t;
  float mine[E], sum[E] = {0}, top = -INFINITY, total = 0;
  load_row(mine, q + at.row * 3 * s.c, there, at.part, s.width);
  for (int64_t first = 0; first < end; first += kTile) {
    __syncthreads();
    load_tile<E>(keys, k, first, s.t, 3 * s.c, s.width);
    load_tile<E>(values, v, first, s.t, 3 * s.c, s.width);
    __syncthreads();
    float score[kTile], higher = top;
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      const float x = dot(mine, keys + j * E * kParts, at.part) * s.scale;
      score[j] = first + j <= at.row ? x : -INFINITY;
      higher = fmaxf(higher, score[j]);
    }
    if (higher == -INFINITY) continue; /* all of the tile lies behind this row; the row's first tile never does */
    const float shrink = exponential<T>(top - higher);
    total *= shrink;
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] *= shrink;
    top = higher;
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      const float p = exponential<T>(score[j] - top);
      total += p;
      add_row(sum, p, values + j * E * kParts, at.part);
    }
  }
  if (!there) return;
  store_row(out + (at.sequence * s.t + at.row) * s.c + at.head * s.width, sum, 1.0f / total, at.part, s.width);
  if (at.part == 0) lse[(int64_t)blockIdx.x * s.t + at.row] = top + logf(total);
}

/* ---- backward ---- */
/* work(b, h, t) = sum over the head's channels of dout * out; a warp a row. */
template <class T> __global__ void dots_kernel(float *work, const T *dout, const T *out, int64_t rows, shape s) {
  const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = (int)(threadIdx.x % 32);
  if (row >= rows) return;
  const int64_t head = row / s.t, token = row % s.t;
  const int64_t at = ((head / s.heads) * s.t + token) * s.c + head % s.heads * s.width;
  float sum = 0;
  for (int d = lane; d < s.width; d += 32) sum += as_float(dout[at + d]) * as_float(out[at + d]);
  sum = warp_sum(sum);
  if (lane == 0) work[row] = sum;
}

template <class T, int E>
__global__ void queries_kernel(T *dqkv, const T *dout, const T *qkv, const float *lse, const float *work, shape s) {
  PHX_DYNAMIC_SHARED(float, shared);
  float *const keys = shared, *const values = shared + kTile * E * kParts;
  const place at = place_of(s, true);
  const int64_t base = at.sequence * s.t * 3 * s.c + at.head * s.width;
  const T *q = qkv + base, *k = q + s.c, *v = k + s.c;
  const T *d = dout + at.sequence * s.t * s.c + at.head * s.width;
  const bool there = at.row < s.t;
  const int64_t end = at.first + kRows < s.t ? at.first + kRows : s.t, kept = (int64_t)blockIdx.x * s.t + at.row;
  const float level = there ? lse[kept] : 0.0f, own = there ? work[kept] : 0.0f;
  float mine[E], slope[E], sum[E] = {0};
  load_row(mine, q + at.row * 3 * s.c, there, at.part, s.width);
  load_row(slope, d + at.row * s.c, there, at.part, s.width);
  for (int64_t first = 0; first < end; first += kTile) {
    __syncthreads();
    load_tile<E>(keys, k, first, s.t, 3 * s.c, s.width);
    load_tile<E>(values, v, first, s.t, 3 * s.c, s.width);
    __syncthreads();
    for (int j = 0; j < kTile; j++) {
      const float x = dot(mine, keys + j * E * kParts, at.part) * s.scale;
      const float p = first + j <= at.row ? exponential<T>(x - level) : 0.0f;
      const float ds = p * (dot(slope, values + j * E * kParts, at.part) - own);
      add_row(sum, ds, keys + j * E * kParts, at.part);
    }
  }
  if (there) store_row(dqkv + base + at.row * 3 * s.c, sum, s.scale, at.part, s.width);
}

template <class T, int E>
__global__ void keys_kernel(T *dqkv, const T *dout, const T *qkv, const float *lse, const float *work, shape s) {
  PHX_DYNAMIC_SHARED(float, shared);
  float *const queries = shared, *const slopes = shared + kTile * E * kParts;
  float *const levels = slopes + kTile * E * kParts, *const owns = levels + kTile;
  const place at = place_of(s, false);
  const int64_t base = at.sequence * s.t * 3 * s.c + at.head * s.width, kept = (int64_t)blockIdx.x * s.t;
  const T *q = qkv + base, *k = q + s.c, *v = k + s.c;
  const T *d = dout + at.sequence * s.t * s.c + at.head * s.width;
  const bool there = at.row < s.t;
  float key[E], value[E], dk[E] = {0}, dv[E] = {0};
  load_row(key, k + at.row * 3 * s.c, there, at.part, s.width);
  load_row(value, v + at.row * 3 * s.c, there, at.part, s.width);
  for (int64_t first = at.first; first < s.t; first += kTile) {
    __syncthreads();
    load_tile<E>(queries, q, first, s.t, 3 * s.c, s.width);
    load_tile<E>(slopes, d, first, s.t, s.c, s.width);
    if (threadIdx.x < kTile) {
      const int64_t row = first + threadIdx.x;
      levels[threadIdx.x] = row < s.t ? lse[kept + row] : 0.0f;
      owns[threadIdx.x] = row < s.t ? work[kept + row] : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < kTile; i++) {
      const float x = dot(key, queries + i * E * kParts, at.part) * s.scale;
      const float p = first + i >= at.row && first + i < s.t ? exponential<T>(x - levels[i]) : 0.0f;
      const float ds = p * (dot(value, slopes + i * E * kParts, at.part) - owns[i]);
      add_row(dv, p, slopes + i * E * kParts, at.part);
      add_row(dk, ds, queries + i * E * kParts, at.part);
    }
  }
  if (!there) return;
  store_row(dqkv + base + s.c + at.row * 3 * s.c, dk, s.scale, at.part, s.width);
  store_row(dqkv + base + 2 * s.c + at.row * 3 * s.c, dv, 1.0f, at.part, s.width);
}

shape shape_of(const phx__cuda_attention_call *x) {
  return shape{x->t, x->c, (int)x->heads, (int)x->width, 1.0f / sqrtf((float)x->width)};
}

template <class T, int E> cudaError_t run(const phx__cuda_attention_call *x, cudaStream_t s) {
  const dim3 grid((unsigned)(x->b * x->heads), blocks_for(x->t, kRows, 65535));
  const size_t tiles = 2 * kTile * E * kParts * sizeof(float);
  const shape sh = shape_of(x);
  const T *qkv = static_cast<const T *>(x->qkv), *dout = static_cast<const T *>(x->dout);
  T *dqkv = static_cast<T *>(x->dqkv);
  if (!x->backward)
    return PHX_LAUNCH((forward_kernel<T, E>), grid, kThreads, tiles, s, static_cast<T *>(x->out), x->lse, qkv, sh);
  cudaError_t error = phx__cuda_attention_dots(x, s);
  if (error == cudaSuccess)
    error = PHX_LAUNCH((keys_kernel<T, E>), grid, kThreads, tiles + 2 * kTile * sizeof(float), s, dqkv, dout, qkv,
                       x->lse, x->work, sh);
  if (error == cudaSuccess)
    error = PHX_LAUNCH((queries_kernel<T, E>), grid, kThreads, tiles, s, dqkv, dout, qkv, x->lse, x->work, sh);
  return error;
}

template <class T> cudaError_t by_width(const phx__cuda_attention_call *x, cudaStream_t s) {
  if (x->width <= 16) return run<T, 4>(x, s);
  if (x->width <= 32) return run<T, 8>(x, s);
  return x->width <= 64 ? run<T, 16>(x, s) : run<T, 32>(x, s);
}
}  // namespace

extern "C" cudaError_t phx__cuda_attention_dots(const phx__cuda_attention_call *x, cudaStream_t s) {
  const int64_t rows = x->b * x->heads * x->t;
  PHX_BY_DTYPE(x->dtype, T,
               return PHX_LAUNCH(dots_kernel<T>, blocks_for(rows, 8, INT32_MAX), 256, 0, s, x->work,
                                 static_cast<const T *>(x->dout), static_cast<const T *>(x->out), rows, shape_of(x)));
}

extern "C" cudaError_t phx__cuda_attention_plain(const phx__cuda_attention_call *x, cudaStream_t s) {
  PHX_BY_DTYPE(x->dtype, T, return by_width<T>(x, s));
}
