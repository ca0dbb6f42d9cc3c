/* plugins/cuda/elementwise.cu - sums, scaling, casts, optimizers: one pass over memory, 16-byte accesses.
 *
 * Invariant: an element's result depends on its own inputs by one sequence of IEEE operations (the intrinsics below are
 * never contracted), so heads, tails and every slicing give the same bits, and the same as the cpu device's.
 * AdamW: arXiv 1711.05101. */
#include "kernel.h"

namespace {
constexpr int kThreads = 256;
constexpr int64_t kBlocksMost = 132 * 16; /* grid-stride: enough to fill any device several times */

/* Elements before the first 16-byte boundary of p, of n. */
template <class T> int64_t head_of(const T *p, int64_t n) {
  const uintptr_t over = reinterpret_cast<uintptr_t>(p) % 16;
  const int64_t head = over ? (int64_t)(16 - over) / (int64_t)sizeof(T) : 0;
  return head < n ? head : n;
}
/* Is element `at` of p (NULL: yes) on a boundary of N elements? */
template <int N, class T> bool fits(const T *p, int64_t at) {
  return !p || reinterpret_cast<uintptr_t>(p + at) % (sizeof(T) * N) == 0;
}

/* How an array is cut: head single elements, then packs, then single elements.  packs = 0: all single. */
struct cut {
  int64_t head, packs, n;
};
template <int N> cut make_cut(int64_t head, int64_t n, bool all_fit) {
  return all_fit ? cut{head, (n - head) / N, n} : cut{n, 0, n};
}
template <int N> unsigned blocks_of(const cut &c) {
  return blocks_for(c.packs > 0 ? c.packs + c.head + N : c.n, kThreads, kBlocksMost);
}
/* one(i) for single elements, many(i) for packs that begin at i. */
template <int N, class One, class Many> __device__ __forceinline__ void walk(const cut &c, One one, Many many) {
  const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = first; i < c.packs; i += step) many(c.head + i * N);
  const int64_t tail = c.head + c.packs * N;
  for (int64_t i = first; i < c.head + (c.n - tail); i += step) one(i < c.head ? i : tail + (i - c.head));
}

template <class T> __global__ void add_kernel(T *out, const T *a, const T *b, cut c) {
  constexpr int N = pack_size<T>;
  walk<N>(
      c, [=](int64_t i) { out[i] = rounded<T>(__fadd_rn(as_float(a[i]), as_float(b[i]))); },
      [=](int64_t i) {
        const pack<T, N> x = load_pack<N>(a + i), y = load_pack<N>(b + i);
        pack<T, N> z;
#pragma unroll
        for (int j = 0; j < N; j++) z.v[j] = rounded<T>(__fadd_rn(as_float(x.v[j]), as_float(y.v[j])));
        store_pack<N>(out + i, z);
      });
}

template <class T> cudaError_t add(T *out, const T *a, const T *b, int64_t n, cudaStream_t s) {
  constexpr int N = pack_size<T>;
  const int64_t h = head_of(out, n);
  const cut c = make_cut<N>(h, n, fits<N>(out, h) && fits<N>(a, h) && fits<N>(b, h));
  return PHX_LAUNCH(add_kernel<T>, blocks_of<N>(c), kThreads, 0, s, out, a, b, c);
}

__global__ void scale_kernel(float *x, float by, cut c) {
  walk<4>(
      c, [=](int64_t i) { x[i] = __fmul_rn(x[i], by); },
      [=](int64_t i) {
        pack<float, 4> v = load_pack<4>(x + i);
#pragma unroll
        for (int j = 0; j < 4; j++) v.v[j] = __fmul_rn(v.v[j], by);
        store_pack<4>(x + i, v);
      });
}

template <class D, class S> __global__ void cast_kernel(D *dst, const S *src, cut c) {
  walk<4>(
      c, [=](int64_t i) { dst[i] = rounded<D>(as_float(src[i])); },
      [=](int64_t i) {
        const pack<S, 4> x = load_pack<4>(src + i);
        pack<D, 4> y;
#pragma unroll
        for (int j = 0; j < 4; j++) y.v[j] = rounded<D>(as_float(x.v[j]));
        store_pack<4>(dst + i, y);
      });
}

template <class D, class S> cudaError_t cast(void *dst, const void *src, int64_t n, cudaStream_t s) {
  D *to = static_cast<D *>(dst);
  const S *from = static_cast<const S *>(src);
  const int64_t h = sizeof(D) > sizeof(S) ? head_of(to, n) : head_of(from, n);
  const cut c = make_cut<4>(h, n, fits<4>(to, h) && fits<4>(from, h));
  return PHX_LAUNCH((cast_kernel<D, S>), blocks_of<4>(c), kThreads, 0, s, to, from, c);
}
template <class S> cudaError_t cast_from(void *dst, int32_t dtype, const void *src, int64_t n, cudaStream_t s) {
  if (dtype == PHX_F32) return cast<float, S>(dst, src, n, s);
  return dtype == PHX_BF16 ? cast<bf16, S>(dst, src, n, s) : cast<__half, S>(dst, src, n, s);
}

/* ---- optimizers ---- */
__device__ __forceinline__ void adamw_one(const phx__cuda_update &u, float &w, float g, float &m, float &v) {
  const float gs = __fmul_rn(g, u.scale);
  m = __fadd_rn(__fmul_rn(u.beta1, m), __fmul_rn(u.rest1, gs));
  v = __fadd_rn(__fmul_rn(u.beta2, v), __fmul_rn(u.rest2, __fmul_rn(gs, gs)));
  const float root = __fadd_rn(__fsqrt_rn(__fdiv_rn(v, u.c2)), u.eps);
  const float step = __fadd_rn(__fdiv_rn(__fdiv_rn(m, u.c1), root), __fmul_rn(u.decay, w));
  w = __fsub_rn(w, __fmul_rn(u.lr, step));
}
__device__ __forceinline__ void sgd_one(const phx__cuda_update &u, float &w, float g) {
  w = __fsub_rn(w, __fmul_rn(u.lr, __fadd_rn(__fmul_rn(g, u.scale), __fmul_rn(u.decay, w))));
}

template <class L, bool kAdam> __global__ void update_kernel(phx__cuda_update u, cut c) {
  L *low = static_cast<L *>(u.low);
  walk<4>(
      c,
      [=](int64_t i) {
        float w = u.w[i];
        if constexpr (kAdam) {
          float m = u.m[i], v = u.v[i];
          adamw_one(u, w, u.g[i], m, v);
          u.m[i] = m;
          u.v[i] = v;
        } else {
          sgd_one(u, w, u.g[i]);
        }
        u.w[i] = w;
        if (low) low[i] = rounded<L>(w);
      },
      [=](int64_t i) {
        pack<float, 4> w = load_pack<4>(u.w + i), m{}, v{};
        const pack<float, 4> g = load_pack<4>(u.g + i);
        if constexpr (kAdam) {
          m = load_pack<4>(u.m + i);
          v = load_pack<4>(u.v + i);
        }
        pack<L, 4> copy;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if constexpr (kAdam)
            adamw_one(u, w.v[j], g.v[j], m.v[j], v.v[j]);
          else
            sgd_one(u, w.v[j], g.v[j]);
          copy.v[j] = rounded<L>(w.v[j]);
        }
        store_pack<4>(u.w + i, w);
        if constexpr (kAdam) {
          store_pack<4>(u.m + i, m);
          store_pack<4>(u.v + i, v);
        }
        if (low) store_pack<4>(low + i, copy);
      });
}

template <class L> cudaError_t update(const phx__cuda_update &u, int64_t n, cudaStream_t s) {
  const int64_t h = head_of(u.w, n);
  const L *low = static_cast<const L *>(u.low);
  const bool all = fits<4>(u.w, h) && fits<4>(u.g, h) && fits<4>(u.m, h) && fits<4>(u.v, h) && fits<4>(low, h);
  const cut c = make_cut<4>(h, n, all);
  if (u.m) return PHX_LAUNCH((update_kernel<L, true>), blocks_of<4>(c), kThreads, 0, s, u, c);
  return PHX_LAUNCH((update_kernel<L, false>), blocks_of<4>(c), kThreads, 0, s, u, c);
}
}  // namespace

extern "C" cudaError_t phx__cuda_k_add(int32_t dtype, void *out, const void *a, const void *b, int64_t n,
                                       cudaStream_t s) {
  if (n == 0) return cudaSuccess;
  PHX_BY_DTYPE(dtype, T,
               return add(static_cast<T *>(out), static_cast<const T *>(a), static_cast<const T *>(b), n, s));
}

extern "C" cudaError_t phx__cuda_k_accumulate(float *out, const float *x, int64_t n, cudaStream_t s) {
  return n ? add<float>(out, out, x, n, s) : cudaSuccess;
}

extern "C" cudaError_t phx__cuda_k_scale(float *x, float by, int64_t n, cudaStream_t s) {
  if (n == 0) return cudaSuccess;
  const cut c = make_cut<4>(head_of(x, n), n, true);
  return PHX_LAUNCH(scale_kernel, blocks_of<4>(c), kThreads, 0, s, x, by, c);
}

extern "C" cudaError_t phx__cuda_k_cast(void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t n,
                                        cudaStream_t s) {
  if (n == 0) return cudaSuccess;
  if (src_dtype == PHX_F32) return cast_from<float>(dst, dst_dtype, src, n, s);
  if (src_dtype == PHX_BF16) return cast_from<bf16>(dst, dst_dtype, src, n, s);
  return cast_from<__half>(dst, dst_dtype, src, n, s);
}

extern "C" cudaError_t phx__cuda_k_update(const phx__cuda_update *u, int64_t n, cudaStream_t s) {
  if (n == 0) return cudaSuccess;
  if (u->low && u->low_dtype == PHX_BF16) return update<bf16>(*u, n, s);
  if (u->low && u->low_dtype == PHX_F16) return update<__half>(*u, n, s);
  return update<float>(*u, n, s);
}
