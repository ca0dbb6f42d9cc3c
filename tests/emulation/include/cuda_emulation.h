/* tests/emulation/include/cuda_emulation.h - the language of CUDA kernels on top of C++17: the same .cu files run on
 * the processor: correctness only, no speed.
 *
 * Blocks run one after the other; the threads of a block are fibers, so barriers, shuffles and votes work, and a
 * barrier that not all threads reach ends the program with a message.  Shared memory is filled with 0xFF (NaN) before
 * each block.  Each fiber runs until it waits: an order of threads that hides races between barriers, so every launch
 * runs its threads upwards, and downwards when PHX_CUDA_DOUBLE_ORDER=down (the results must be equal).
 * Not here: textures, cooperative groups, clusters, asynchronous copies, atomics on anything but what is listed. */
#ifndef PHX__CUDA_EMULATION_H
#define PHX__CUDA_EMULATION_H
#include <cuda_runtime_api.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(16) double2 { double x, y; };
static inline float2 make_float2(float x, float y) { return float2{x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

/* ---- what a thread is ---- */
namespace emulation {
struct coordinates { uint3 thread, block; dim3 block_dim, grid_dim; };
extern thread_local coordinates here; /* of the fiber that runs */
void barrier();                       /* all threads of the block that have not ended */
int barrier_count(int predicate);     /* the same; how many gave non-zero */
/* All lanes of mask give 8 bytes, and read those of lane `from` of their warp (0xFF... when it does not take part). */
uint64_t exchange(unsigned mask, uint64_t value, unsigned from);
unsigned vote(unsigned mask, int predicate); /* ballot */
unsigned lane();
void *dynamic_shared();
/* Shared memory that a kernel declares itself: one place per declaration, the same for all threads of the block. */
void *static_shared(const void *key, size_t bytes);
cudaError_t launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::function<void()> body);
cudaError_t allow_shared(const void *kernel, enum cudaFuncAttribute what, int bytes);
/* Arguments are copied now, as a launch copies them. */
template <class... P, class... A>
cudaError_t launch_kernel(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                          void (*kernel)(P...), A... arguments) {
  std::tuple<P...> values(static_cast<P>(arguments)...);
  return launch(name, reinterpret_cast<const void *>(kernel), grid, block, shared, stream,
                [kernel, values] { std::apply(kernel, values); });
}
}  // namespace emulation
#define threadIdx (emulation::here.thread)
#define blockIdx (emulation::here.block)
#define blockDim (emulation::here.block_dim)
#define gridDim (emulation::here.grid_dim)
static const int warpSize = 32;

static inline void __syncthreads() { emulation::barrier(); }
static inline int __syncthreads_or(int p) { return emulation::barrier_count(p) != 0; }
static inline int __syncthreads_and(int p) { return emulation::barrier_count(!p) == 0; }
static inline int __syncthreads_count(int p) { return emulation::barrier_count(p); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { (void)emulation::vote(mask, 0); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline unsigned __ballot_sync(unsigned mask, int p) { return emulation::vote(mask, p); }
static inline int __any_sync(unsigned mask, int p) { return emulation::vote(mask, p) != 0; }
static inline int __all_sync(unsigned mask, int p) { return emulation::vote(mask, !p) == 0; }

template <class T> static inline T emulated_shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  const unsigned l = emulation::lane(), w = (unsigned)width;
  return emulated_shuffle(mask, v, (l & ~(w - 1)) | ((unsigned)from & (w - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) {
  const unsigned l = emulation::lane(), to = l ^ (unsigned)by;
  return emulated_shuffle(mask, v, (to / (unsigned)width) == (l / (unsigned)width) ? to : l);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const unsigned l = emulation::lane(), w = (unsigned)width;
  return emulated_shuffle(mask, v, (l & (w - 1)) + by < w ? l + by : l);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const unsigned l = emulation::lane(), w = (unsigned)width;
  return emulated_shuffle(mask, v, (l & (w - 1)) >= by ? l - by : l);
}

/* ---- atomics: fibers of one stream never run at the same time ---- */
template <class T> static inline T atomicAdd(T *p, T by) { T old = *p; *p = (T)(old + by); return old; }
template <class T> static inline T atomicMax(T *p, T v) { T old = *p; if (v > old) *p = v; return old; }
template <class T> static inline T atomicMin(T *p, T v) { T old = *p; if (v < old) *p = v; return old; }
template <class T> static inline T atomicExch(T *p, T v) { T old = *p; *p = v; return old; }
template <class T> static inline T atomicCAS(T *p, T is, T v) { T old = *p; if (old == is) *p = v; return old; }

/* ---- arithmetic ---- */
static inline float __int_as_float(int v) { float f; std::memcpy(&f, &v, 4); return f; }
static inline int __float_as_int(float f) { int v; std::memcpy(&v, &f, 4); return v; }
static inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned v; std::memcpy(&v, &f, 4); return v; }
static inline float __fmul_rn(float a, float b) { return a * b; } /* compiled with -ffp-contract=off */
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
#define __expf(a) std::exp((float)(a)) /* the C library has functions of these names */
#define __logf(a) std::log((float)(a))
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T v) { *p = v; }

/* The real runtime's template: any kernel is known here. */
template <class... P>
static inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), enum cudaFuncAttribute what, int value) {
  return emulation::allow_shared(reinterpret_cast<const void *>(kernel), what, value);
}
#endif
