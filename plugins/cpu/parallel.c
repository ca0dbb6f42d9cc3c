/* plugins/cpu/parallel.c - parallel loops of the operations, and error messages.
 *
 * The only file that speaks OpenMP besides product.c.  Invariant: one contiguous range per thread, cut by arithmetic
 * alone. One thread never enters the OpenMP runtime.  [main] */
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include "cpu.h"

void phx__cpu_parallel(const phx__cpu *cpu, int64_t items, int64_t grain, phx__cpu_body *body, void *arg) {
  const int64_t grains = (items + grain - 1) / grain;
  const int threads = (int)(grains < cpu->threads ? grains : cpu->threads);
  if (items <= 0) return;
  if (threads <= 1) {
    body(arg, 0, items, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t first = grains * t / n * grain, last = grains * (t + 1) / n * grain;
    if (first < last) body(arg, first, last < items ? last : items, (int32_t)t);
  }
}

void phx__cpu_parallel_end(const phx__cpu *cpu) {
  if (cpu->threads > 1) omp_pause_resource_all(omp_pause_hard);
}

phx_status phx__cpu_fail(phx_error *err, phx_status code, const char *format, ...) {
  if (err) {
    va_list args;
    va_start(args, format);
    err->code = code;
    err->cause = 0;
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
  }
  return code;
}
