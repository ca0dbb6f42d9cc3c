/* plugins/cpu/product.c - matrix products by oneDNN.
 *
 * dnnl_sgemm: row-major, the same C function in oneDNN 2 and 3, and measured as fast as the matmul primitive at every
 * shape and transposition of GPT-2 (about 95 % of the peak of one Zen 4 core), with nothing to cache.  Its packing
 * buffers come from malloc, for the call.  Bits depend on the shape, the number of threads and the instruction set, not
 * on pointers.  [main] */
#include <dnnl.h>
#include "cpu.h"

phx_status phx__cpu_product(const phx__cpu *cpu, int32_t a_t, int32_t b_t, int64_t m, int64_t n, int64_t k,
                            const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                            int32_t accumulate, phx_error *err) {
  if (m < 1 || n < 1 || k < 1)
    return phx_fail(err, PHX_INVALID, "cpu: product of %lld x %lld by %lld x %lld: sizes must be positive",
                    (long long)m, (long long)k, (long long)k, (long long)n);
  phx__cpu_settle(cpu);
  const dnnl_status_t status =
      dnnl_sgemm(a_t ? 'T' : 'N', b_t ? 'T' : 'N', m, n, k, 1.0f, a, lda, b, ldb, accumulate ? 1.0f : 0.0f, c, ldc);
  if (status == dnnl_success) return PHX_OK;
  phx_fail(err, status == dnnl_out_of_memory ? PHX_NOMEM : PHX_DEVICE,
           "cpu: oneDNN refused a product (m %lld, n %lld, k %lld): status %d", (long long)m, (long long)n,
           (long long)k, (int)status);
  if (err) err->cause = (int32_t)status;
  return status == dnnl_out_of_memory ? PHX_NOMEM : PHX_DEVICE;
}

void phx__cpu_product_version(int32_t version[3]) {
  const dnnl_version_t *v = dnnl_version();
  version[0] = (int32_t)v->major;
  version[1] = (int32_t)v->minor;
  version[2] = (int32_t)v->patch;
}

phx_status phx__cpu_product_isa(int32_t isa, phx_error *err) {
  const dnnl_cpu_isa_t limit = isa == PHX__CPU_BASE ? dnnl_cpu_isa_sse41 : dnnl_cpu_isa_avx2;
  if (isa == PHX__CPU_AVX512) return PHX_OK;
  if (dnnl_set_max_cpu_isa(limit) == dnnl_success || dnnl_get_effective_cpu_isa() == limit) return PHX_OK;
  return phx_fail(err, PHX_STATE,
                  "cpu: PHALANX_ISA comes too late: oneDNN already computes with more in this process (isa 0x%x)",
                  (unsigned)dnnl_get_effective_cpu_isa());
}

int32_t phx__cpu_product_has_bf16(void) {
  return ((int)dnnl_get_effective_cpu_isa() & (int)dnnl_cpu_isa_avx512_core_bf16) == (int)dnnl_cpu_isa_avx512_core_bf16;
}
