/* tests/bench/bench_products.c - the product rate of GPT-2 124M's shapes, by plain dnnl_sgemm: what a training step is
 * measured against.
 *
 * Forward, dX and dW of C to 3C, C to C, C to 4C, 4C to C (12 layers) and of the head, at M = 1024 rows; every shape
 * counts as often as a step has it, so the rate is weighted by the step's own FLOPs.  Wall clock, one thread, the best
 * of two runs of each shape after one to warm up (the head: of one).  Prints one line of JSON. */
#include <dnnl.h>
#include <stdio.h>
#include "bench.h"

enum { ROWS = 1024, C = 768, V = 50257, LAYERS = 12 };

static double seconds_of(int pass, int64_t ic, int64_t oc, float *x, float *w, float *out) {
  const double begin = bench_now();
  if (pass == 0) dnnl_sgemm('N', 'T', ROWS, oc, ic, 1, x, ic, w, ic, 0, out, oc);
  if (pass == 1) dnnl_sgemm('N', 'N', ROWS, ic, oc, 1, out, oc, w, ic, 0, x, ic);
  if (pass == 2) dnnl_sgemm('T', 'N', oc, ic, ROWS, 1, out, oc, x, ic, 0, w, ic);
  return bench_now() - begin;
}

int main(int argc, char **argv) {
  static const int64_t shapes[][3] = {
      {C, 3 * C, LAYERS}, {C, C, LAYERS}, {C, 4 * C, LAYERS}, {4 * C, C, LAYERS}, {C, V, 1}};
  double flops = 0, seconds = 0;
  bench_init(argc, argv);
  float *x = bench_memory((int64_t)ROWS * 4 * C * 4), *w = bench_memory((int64_t)V * C * 4),
        *out = bench_memory((int64_t)ROWS * V * 4);
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int pass = 0; pass < 3; pass++) {
      const int64_t ic = shapes[i][0], oc = shapes[i][1], times = shapes[i][2];
      const int runs = times > 1 ? 3 : 1;
      double best = 0;
      bench_fill(x, ROWS * ic, 1.0f, 1);
      bench_fill(w, oc * ic, 0.02f, 2);
      bench_fill(out, ROWS * oc, 0.01f, 3);
      for (int r = 0; r < runs; r++) {
        const double t = seconds_of(pass, ic, oc, x, w, out);
        if (r < 2 || t < best) best = t; /* the first only warms up */
      }
      seconds += (double)times * best;
      flops += (double)times * 2.0 * ROWS * (double)ic * (double)oc;
    }
  const dnnl_version_t *v = dnnl_version();
  printf("{\"version\": \"oneDNN %d.%d.%d\", \"flops\": %.0f, \"seconds\": %.6f, \"rate\": %.6g}\n", v->major, v->minor,
         v->patch, flops, seconds, flops / seconds);
  return 0;
}
