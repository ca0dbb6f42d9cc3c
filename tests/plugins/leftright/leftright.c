/* leftright.c - the negative control of the equality tests: shm, but ((a + b) + c) + d instead of (a + b) + (c + d).
 *
 * Two ranks see no difference, four must.  Everything but the fp32 sum is shm's own code. */
#define phx_plugin_v1 shm_entry
#include "shm.c"
#undef phx_plugin_v1

static void sum_from_the_left(void *const *dst, int32_t n_dst, const void *const *src, int32_t n_src, int64_t numel,
                              int32_t stream) {
  (void)stream;
  for (int64_t i = 0; i < numel; i++) {
    float sum = ((const float *)src[0])[i];
    for (int32_t r = 1; r < n_src; r++) sum += ((const float *)src[r])[i];
    for (int32_t d = 0; d < n_dst; d++) ((float *)dst[d])[i] = sum;
  }
}

const shm_kernels *shm_kernels_pick(void) {
  static shm_kernels kernels;
  kernels = shm_kernels_base;
  kernels.reduce[PHX_F32][PHX_SUM] = sum_from_the_left;
  return &kernels;
}

PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) {
  static phx_plugin renamed;
  renamed = *shm_entry();
  renamed.id = "leftright";
  return &renamed;
}
