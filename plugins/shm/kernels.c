/* kernels.c - picks the table of kernels that fits this CPU.  Pure, any thread. */
#include "kernels.h"

const shm_kernels *shm_kernels_pick(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &shm_kernels_avx512;
  if (__builtin_cpu_supports("avx2")) return &shm_kernels_avx2;
#endif
  return &shm_kernels_base;
}
