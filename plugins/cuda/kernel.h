/* plugins/cuda/kernel.h - what kernels share: launching, dtypes, 16-byte accesses, sums over warps and blocks.
 *
 * Sums are made in one fixed order, so that a result has the same bits on every run.  Nothing here is an atomic. */
#ifndef PHX__CUDA_KERNEL_H
#define PHX__CUDA_KERNEL_H
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>
#include "cuda.h"

/* PHX_LAUNCH(kernel, grid, block, shared, stream, arguments...): every launch, as a cudaError_t. */
#ifdef PHX_CUDA_EMULATED
#define PHX_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulation::launch_kernel(#kernel, grid, block, shared, stream, kernel, __VA_ARGS__)
#define PHX_SHARED(type, name, count) \
  static char name##_place;           \
  type *const name = static_cast<type *>(emulation::static_shared(&name##_place, sizeof(type) * (count)))
#define PHX_DYNAMIC_SHARED(type, name) type *const name = static_cast<type *>(emulation::dynamic_shared())
#else
#define PHX_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel<<<grid, block, shared, stream>>>(__VA_ARGS__), cudaGetLastError())
#define PHX_SHARED(type, name, count) __shared__ __align__(16) type name[count]
extern __shared__ __align__(1024) unsigned char phx__cuda_dynamic_shared[];
#define PHX_DYNAMIC_SHARED(type, name) type *const name = reinterpret_cast<type *>(phx__cuda_dynamic_shared)
#endif

namespace {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 rounded<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half rounded<__half>(float x) { return __float2half_rn(x); }

/* N elements that are moved by one access (16 bytes, or less where a wider type sets the pace). */
template <class T, int N> struct __align__(sizeof(T) * N) pack {
  T v[N];
};
template <class T> constexpr int pack_size = 16 / (int)sizeof(T);

template <int N, class T> __device__ __forceinline__ pack<T, N> load_pack(const T *p) {
  return *reinterpret_cast<const pack<T, N> *>(p);
}
template <int N, class T> __device__ __forceinline__ void store_pack(T *p, const pack<T, N> &x) {
  *reinterpret_cast<pack<T, N> *>(p) = x;
}

/* Is every row of ld elements at p on a 16-byte boundary? */
template <class T> inline bool rows_are_aligned(const T *p, int64_t ld) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % pack_size<T> == 0;
}

template <class T> __device__ __forceinline__ T warp_sum(T x) {
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int by = 16; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
  return x;
}

/* Sum over a block of whole warps (at most 32), known to all of its threads.  places: 33 of T in shared memory. */
template <class T> __device__ __forceinline__ T block_sum(T x, T *places) {
  const int warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32), warps = (int)(blockDim.x / 32);
  x = warp_sum(x);
  __syncthreads(); /* places may still be read from the sum before */
  if (lane == 0) places[warp] = x;
  __syncthreads();
  T sum = lane < warps ? places[lane] : T(0);
  return warp_sum(sum);
}

inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t most) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks < 1) return 1;
  return (unsigned)(blocks < most ? blocks : most);
}

/* Calls do(float) or do(bf16): `dtype` was checked. */
#define PHX_BY_DTYPE(dtype, T, ...) \
  do {                              \
    if ((dtype) == PHX_BF16) {      \
      using T = bf16;               \
      __VA_ARGS__;                  \
    } else {                        \
      using T = float;              \
      __VA_ARGS__;                  \
    }                               \
  } while (0)

}  // namespace
#endif
