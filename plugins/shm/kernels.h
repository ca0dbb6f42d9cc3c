/* kernels.h - reductions over n sources in one pass, and copies; one table per instruction set. */
#ifndef SHM_KERNELS_H
#define SHM_KERNELS_H
#include <phalanx/comm.h>

/* dst[d][i] = tree over r of src[r][i], for all n_dst destinations; n_src and n_dst from 1 to 64.  A destination may be
 * one of the sources.  stream: stores go around the caches (the destinations are not read again soon). */
typedef void shm_reduce_fn(void *const *dst, int32_t n_dst, const void *const *src, int32_t n_src, int64_t numel,
                           int32_t stream);
typedef struct shm_kernels {
  const char *isa;
  shm_reduce_fn *reduce[PHX_U64 + 1][PHX_MAX + 1]; /* [dtype][op]; NULL: not a type that can be reduced */
  void (*copy)(void *dst, const void *src, int64_t bytes, int32_t stream); /* dst == src is a no-op */
} shm_kernels;

const shm_kernels *shm_kernels_pick(void); /* [any] the widest that this CPU has */
extern const shm_kernels shm_kernels_base;
#if defined(__x86_64__)
extern const shm_kernels shm_kernels_avx2, shm_kernels_avx512;
#endif
#endif
