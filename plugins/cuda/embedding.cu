/* plugins/cuda/embedding.cu - token and position embeddings, and their gradients without atomics.
 *
 * The gradient of a token's row is the sum of its positions' rows in order of (b, t).  Positions are put into one list
 * per token by a stable counting sort: rank of each position among those of its token (within chunks, a block each,
 * then one block goes from chunk to chunk), first place of each token (a scan), the lists; then a block per token adds
 * its rows, each row of the gradient being written once. */
#include "kernel.h"

namespace {
constexpr int kChunk = 1024;

/* N floats by accesses of 16 bytes, or one by one. */
template <int N> __device__ __forceinline__ void load_floats(float *to, const float *p) {
  constexpr int M = N < 4 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < N; i += M) {
    const pack<float, M> x = load_pack<M>(p + i);
#pragma unroll
    for (int k = 0; k < M; k++) to[i + k] = x.v[k];
  }
}
template <int N> __device__ __forceinline__ void store_floats(float *p, const float *from) {
  constexpr int M = N < 4 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < N; i += M) {
    pack<float, M> x;
#pragma unroll
    for (int k = 0; k < M; k++) x.v[k] = from[i + k];
    store_pack<M>(p + i, x);
  }
}

template <class T, int N>
__global__ void forward_kernel(T *out, const int32_t *tokens, const T *wte, const T *wpe, int64_t t, int64_t c) {
  const int64_t row = blockIdx.x;
  const T *a = wte + (int64_t)tokens[row] * c, *b = wpe + row % t * c;
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N) {
    const pack<T, N> x = load_pack<N>(a + j), y = load_pack<N>(b + j);
    pack<T, N> z;
#pragma unroll
    for (int i = 0; i < N; i++) z.v[i] = rounded<T>(as_float(x.v[i]) + as_float(y.v[i]));
    store_pack<N>(out + row * c + j, z);
  }
}

/* Within each chunk of positions: how many of the same token come before, twice, plus 1 for the last of its token. */
__global__ void __launch_bounds__(kChunk) chunk_kernel(int32_t *code, const int32_t *tokens, int64_t n) {
  PHX_SHARED(int32_t, chunk, kChunk);
  const int me = (int)threadIdx.x;
  const int64_t at = (int64_t)blockIdx.x * kChunk;
  const int here = (int)(n - at < kChunk ? n - at : kChunk);
  const int32_t mine = me < here ? tokens[at + me] : -1;
  chunk[me] = mine;
  __syncthreads();
  int before = 0, behind = 0;
  for (int i = 0; i < here; i++) {
    const int same = chunk[i] == mine;
    before += i < me ? same : 0;
    behind += i > me ? same : 0;
  }
  if (me < here) code[at + me] = 2 * before + (behind == 0);
}

/* count(v) ends as the number of each token; rank(n), the chunks' codes before: how many of the same token come before.
 * One block, since a chunk goes on from the counts of the one before it. */
__global__ void __launch_bounds__(kChunk)
    rank_kernel(int32_t *count, int32_t *rank, const int32_t *tokens, int64_t n, int64_t v) {
  const int64_t me = threadIdx.x;
  for (int64_t i = me; i < v; i += blockDim.x) count[i] = 0;
  __syncthreads();
  for (int64_t at = me; at < n + me; at += kChunk) {
    const int32_t mine = at < n ? tokens[at] : -1, code = at < n ? rank[at] : 0;
    if (mine >= 0) rank[at] = count[mine] + code / 2;
    __syncthreads();
    if (mine >= 0 && code % 2) count[mine] += code / 2 + 1;
    __syncthreads();
  }
}

/* first(v): sum of count before each token; one block. */
__global__ void scan_kernel(int32_t *first, const int32_t *count, int64_t v) {
  PHX_SHARED(int32_t, sums, kChunk);
  const int me = (int)threadIdx.x;
  const int64_t each = (v + kChunk - 1) / kChunk, from = me * each, to = from + each < v ? from + each : v;
  int32_t sum = 0;
  for (int64_t i = from; i < to; i++) sum += count[i];
  sums[me] = sum;
  __syncthreads();
  for (int by = 1; by < kChunk; by *= 2) {
    const int32_t left = me >= by ? sums[me - by] : 0;
    __syncthreads();
    sums[me] += left;
    __syncthreads();
  }
  int32_t running = sums[me] - sum;
  for (int64_t i = from; i < to; i++) {
    first[i] = running;
    running += count[i];
  }
}

__global__ void list_kernel(int32_t *list, const int32_t *first, const int32_t *rank, const int32_t *tokens,
                            int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) list[first[tokens[i]] + rank[i]] = (int32_t)i;
}

template <class T, int N>
__global__ void tokens_kernel(float *dwte, int32_t mode, const T *dout, const int32_t *list, const int32_t *first,
                              const int32_t *count, int64_t c) {
  const int64_t token = blockIdx.x, many = count[token];
  const int32_t *mine = list + first[token];
  if (many == 0 && mode == PHX_GRAD_ADD) return;
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N) {
    float *to = dwte + token * c + j;
    float sum[N] = {};
    if (mode == PHX_GRAD_ADD) load_floats<N>(sum, to);
#pragma unroll 4
    for (int64_t k = 0; k < many; k++) {
      const pack<T, N> x = load_pack<N>(dout + (int64_t)mine[k] * c + j);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += as_float(x.v[i]);
    }
    store_floats<N>(to, sum);
  }
}

template <class T, int N>
__global__ void places_kernel(float *dwpe, int32_t mode, const T *dout, int64_t b, int64_t t, int64_t c) {
  const int64_t place = blockIdx.x;
  if (place >= t && mode == PHX_GRAD_ADD) return;
  for (int64_t j = (int64_t)threadIdx.x * N; j < c; j += (int64_t)blockDim.x * N) {
    float *to = dwpe + place * c + j;
    float sum[N] = {};
    if (mode == PHX_GRAD_ADD) load_floats<N>(sum, to);
#pragma unroll 4
    for (int64_t k = 0; k < (place < t ? b : 0); k++) {
      const pack<T, N> x = load_pack<N>(dout + (k * t + place) * c + j);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += as_float(x.v[i]);
    }
    store_floats<N>(to, sum);
  }
}

template <class T>
cudaError_t forward(void *out, const int32_t *tokens, const void *wte, const void *wpe, int64_t n, int64_t t, int64_t c,
                    cudaStream_t s) {
  T *to = static_cast<T *>(out);
  const T *a = static_cast<const T *>(wte), *b = static_cast<const T *>(wpe);
  constexpr int N = pack_size<T>;
  if (rows_are_aligned(to, c) && rows_are_aligned(a, c) && rows_are_aligned(b, c))
    return PHX_LAUNCH((forward_kernel<T, N>), (unsigned)n, 128, 0, s, to, tokens, a, b, t, c);
  return PHX_LAUNCH((forward_kernel<T, 1>), (unsigned)n, 128, 0, s, to, tokens, a, b, t, c);
}

template <class T>
cudaError_t add_tokens(float *dwte, int32_t mode, const void *dout, const int32_t *list, const int32_t *first,
                       const int32_t *count, int64_t c, int64_t v, cudaStream_t s) {
  const T *d = static_cast<const T *>(dout);
  constexpr int N = pack_size<T>;
  if (rows_are_aligned(d, c) && rows_are_aligned(dwte, c))
    return PHX_LAUNCH((tokens_kernel<T, N>), (unsigned)v, 128, 0, s, dwte, mode, d, list, first, count, c);
  return PHX_LAUNCH((tokens_kernel<T, 1>), (unsigned)v, 128, 0, s, dwte, mode, d, list, first, count, c);
}

template <class T>
cudaError_t add_places(float *dwpe, int32_t mode, const void *dout, int64_t b, int64_t t, int64_t c, int64_t max_t,
                       cudaStream_t s) {
  const T *d = static_cast<const T *>(dout);
  constexpr int N = pack_size<T>;
  if (rows_are_aligned(d, c) && rows_are_aligned(dwpe, c))
    return PHX_LAUNCH((places_kernel<T, N>), (unsigned)max_t, 128, 0, s, dwpe, mode, d, b, t, c);
  return PHX_LAUNCH((places_kernel<T, 1>), (unsigned)max_t, 128, 0, s, dwpe, mode, d, b, t, c);
}
}  // namespace

extern "C" cudaError_t phx__cuda_k_embedding(int32_t dtype, void *out, const int32_t *tokens, const void *wte,
                                             const void *wpe, int64_t b, int64_t t, int64_t c, cudaStream_t s) {
  PHX_BY_DTYPE(dtype, T, return forward<T>(out, tokens, wte, wpe, b * t, t, c, s));
}

extern "C" cudaError_t phx__cuda_k_embedding_tokens(int32_t dtype, float *dwte, int32_t mode, const void *dout,
                                                    const int32_t *tokens, int64_t n, int64_t c, int64_t v,
                                                    int32_t *scratch, cudaStream_t s) {
  int32_t *count = scratch, *first = count + v, *rank = first + v, *list = rank + n;
  cudaError_t error = PHX_LAUNCH(chunk_kernel, blocks_for(n, kChunk, INT32_MAX), kChunk, 0, s, rank, tokens, n);
  if (error == cudaSuccess) error = PHX_LAUNCH(rank_kernel, 1, kChunk, 0, s, count, rank, tokens, n, v);
  if (error == cudaSuccess) error = PHX_LAUNCH(scan_kernel, 1, kChunk, 0, s, first, count, v);
  if (error == cudaSuccess)
    error = PHX_LAUNCH(list_kernel, blocks_for(n, 256, INT32_MAX), 256, 0, s, list, first, rank, tokens, n);
  if (error != cudaSuccess) return error;
  PHX_BY_DTYPE(dtype, T, return add_tokens<T>(dwte, mode, dout, list, first, count, c, v, s));
}

extern "C" cudaError_t phx__cuda_k_embedding_places(int32_t dtype, float *dwpe, int32_t mode, const void *dout,
                                                    int64_t b, int64_t t, int64_t c, int64_t max_t, cudaStream_t s) {
  PHX_BY_DTYPE(dtype, T, return add_places<T>(dwpe, mode, dout, b, t, c, max_t, s));
}
