/* tests/bench/bench_ops.c - the cpu device's operations against what they can be measured by: AdamW against memory
 * bandwidth, attention against the same without fusion, products against oneDNN called plainly, and in bf16 against the
 * same in fp32. */
#include <dnnl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#include "bench.h"
#include "device_ops.h"
#include "unfused.h"
#include "../../plugins/cpu/simd.h"

static const phx_ops *ops;
static const phx_device *device;
static char versions[64]; /* of oneDNN */

static void must(phx_status status, const phx_error *err) {
  if (status == PHX_OK) return;
  fprintf(stderr, "%s\n", err->message);
  exit(3);
}

/* ---- FMA peak ---- */

/* Chains are named, not an array: each stays in a register. */
static double fma_peak(void *arg) {
  const int64_t rounds = 4000000;
  const phx__vf by = phx__splat(0.999f);
  phx__vf a = by, b = by * 2, c = by * 3, d = by * 4, e = by * 5, f = by * 6, g = by * 7, h = by * 8, i = by * 9,
          j = by * 10;
  (void)arg;
  const double start = bench_busy();
  for (int64_t r = 0; r < rounds; r++) {
    a = a * by + by, b = b * by + by, c = c * by + by, d = d * by + by, e = e * by + by;
    f = f * by + by, g = g * by + by, h = h * by + by, i = i * by + by, j = j * by + by;
  }
  const double seconds = bench_busy() - start;
  volatile float sink = (a + b + c + d + e + f + g + h + i + j)[0];
  (void)sink;
  return 2.0 * 10 * PHX__LANES * (double)rounds / seconds;
}

/* ---- AdamW over triad ---- */

typedef struct update {
  float *w, *g, *m, *v;
  int64_t n;
  int kind; /* of the triad */
} update;

static double adamw_rate(void *arg) {
  const update *u = arg;
  phx_error err = {.struct_size = sizeof err};
  const double start = bench_busy();
  must(ops->adamw(ops->ctx, u->w, u->g, u->m, u->v, NULL, PHX_F32, u->n, 1.0f, 1e-4f, 0.9f, 0.999f, 0.1f, 0.001f, 1e-8f,
                  0.1f, NULL, &err),
       &err);
  return 28.0 * (double)u->n / (bench_busy() - start);
}

enum { PLAIN, STREAMED, IN_PLACE, TRIADS };
static const char *const triads[] = {"triad, plain stores", "triad, non-temporal stores", "triad, in place"};

/* STREAM's triad a = b + 3 c, counted as STREAM does: 12 bytes per element.  Plain stores read a line before they write
 * it, which is not counted; stores past the cache do not; nor does a = a + 3 b, whose line is there, as AdamW's are. */
static double triad_rate(void *arg) {
  const update *u = arg;
  const float *b = u->kind == IN_PLACE ? u->w : u->g;
  const double start = bench_busy();
  for (int64_t i = 0; i < u->n; i += PHX__LANES) {
    const phx__vf x = phx__load(b + i) + 3.0f * phx__load(u->m + i);
#if defined(__AVX512F__)
    if (u->kind == STREAMED) _mm512_stream_ps(u->w + i, (__m512)x);
#elif defined(__AVX2__)
    if (u->kind == STREAMED) _mm256_stream_ps(u->w + i, (__m256)x);
#elif defined(__SSE2__)
    if (u->kind == STREAMED) _mm_stream_ps(u->w + i, (__m128)x);
#endif
    if (u->kind != STREAMED) phx__store(u->w + i, x);
  }
#ifdef __SSE2__
  _mm_sfence();
#endif
  return 12.0 * (double)u->n / (bench_busy() - start);
}

static void bench_adamw(void) {
  const char *name = "adamw";
  if (!bench_wanted(name)) return;
  update u = {.n = 16 << 20};
  float **arrays[] = {&u.w, &u.g, &u.m, &u.v};
  for (int i = 0; i < 4; i++) {
    *arrays[i] = bench_memory(u.n * 4);
    bench_fill(*arrays[i], u.n, 0.1f, (uint64_t)i + 1);
  }
  for (int64_t i = 0; i < u.n; i++) u.v[i] *= u.v[i];
  double best[TRIADS] = {0};
  int chosen = PLAIN;
  for (int r = 0; r < 5; r++)
    for (u.kind = 0; u.kind < TRIADS; u.kind++) {
#ifndef __SSE2__
      if (u.kind == STREAMED) continue;
#endif
      const double rate = triad_rate(&u);
      if (rate > best[u.kind]) best[u.kind] = rate;
    }
  for (int i = 0; i < TRIADS; i++)
    if (best[i] > best[chosen]) chosen = i;
  u.kind = chosen;
  bench_fill(u.w, u.n, 0.1f, 1);
  update other = u; /* the triad's target is not AdamW's weights: it would feed them numbers of no meaning */
  other.w = bench_memory(u.n * 4);
  bench_line line = {.name = name,
                     .a = "28 bytes per parameter, 16 Mi parameters",
                     .unit = "GB/s",
                     .divisor = 1e9,
                     .limit = 0.95,
                     .b = triads[chosen]};
  bench_note(name, "%s %.1f, %s %.1f, %s %.1f GB/s", triads[0], best[0] / 1e9, triads[1], best[1] / 1e9, triads[2],
             best[2] / 1e9);
  bench_compare(&line, adamw_rate, &u, triad_rate, &other);
  bench_print(&line);
}

/* ---- attention ---- */

typedef struct attention {
  int64_t b, t, c, heads, rows;
  int by_blocks;
  float *qkv, *out, *lse, *dout, *dqkv, *work, *p, *dp;
  int passes; /* 1 forward, 2 backward, 3 both */
} attention;

static double flops(const attention *a) { /* over the causal half, and the five products of a fused backward */
  const double product = (double)a->b * (double)a->t * (double)a->t * (double)a->c;
  return product * ((a->passes & 1 ? 2.0 : 0.0) + (a->passes & 2 ? 5.0 : 0.0));
}

static double fused_rate(void *arg) {
  const attention *a = arg;
  phx_error err = {.struct_size = sizeof err};
  const double start = bench_busy();
  if (a->passes & 1)
    must(ops->attention(ops->ctx, PHX_F32, a->out, a->lse, a->qkv, a->b, a->t, a->c, a->heads, NULL, &err), &err);
  if (a->passes & 2)
    must(ops->attention_backward(ops->ctx, PHX_F32, a->dqkv, a->dout, a->qkv, a->out, a->lse, a->work, a->b, a->t, a->c,
                                 a->heads, NULL, &err),
         &err);
  return flops(a) / (bench_busy() - start);
}

static double unfused_rate(void *arg) {
  const attention *a = arg;
  const double start = bench_busy();
  const unfused u = {a->qkv, a->dout, a->out, a->dqkv, a->p, a->dp, a->b, a->t, a->c, a->heads, a->rows, a->by_blocks};
  if (a->passes & 1) unfused_forward(&u);
  if (a->passes & 2) unfused_backward(&u);
  return flops(a) / (bench_busy() - start);
}

static attention attention_of(int64_t b, int64_t t, int with_squares) {
  attention a = {.b = b, .t = t, .c = 768, .heads = 12, .passes = 3};
  a.qkv = bench_memory(a.b * t * 3 * a.c * 4), a.dqkv = bench_memory(a.b * t * 3 * a.c * 4);
  a.out = bench_memory(a.b * t * a.c * 4), a.dout = bench_memory(a.b * t * a.c * 4);
  a.lse = bench_memory(a.b * a.heads * t * 4), a.work = bench_memory(a.b * a.heads * t * 4);
  if (with_squares) a.p = bench_memory(a.b * a.heads * t * t * 4), a.dp = bench_memory(a.b * a.heads * t * t * 4);
  bench_fill(a.qkv, a.b * t * 3 * a.c, 1.0f, 1);
  bench_fill(a.dout, a.b * t * a.c, 1.0f, 2);
  return a;
}

/* The comparator's best block of rows, and that both compute the same. */
static void prepare_unfused(attention *a, float *worst) {
  const int64_t n = a->b * a->t * 3 * a->c;
  float *dqkv = bench_memory(n * 4), most = 0.0f;
  double best = 0.0;
  int64_t best_rows = 0;
  for (a->rows = 32; a->rows <= 512; a->rows *= 2)
    for (int i = 0; i < 3; i++) {
      const double rate = unfused_rate(a);
      if (rate > best) best = rate, best_rows = a->rows;
    }
  a->rows = best_rows;
  memcpy(dqkv, a->dqkv, (size_t)n * 4);
  fused_rate(a);
  *worst = 0.0f;
  for (int64_t i = 0; i < n; i++) {
    most = fmaxf(most, fabsf(dqkv[i]));
    *worst = fmaxf(*worst, fabsf(dqkv[i] - a->dqkv[i]));
  }
  *worst /= most;
}

static void bench_attention(int64_t batch, int by_blocks, int least_passes, double limit) {
  static const char *const names[] = {"", "attention forward", "attention backward", "attention"};
  char fused[96], other[160];
  if (!bench_wanted(names[1]) && !bench_wanted(names[2])) return;
  attention a = attention_of(batch, 1024, 1);
  a.by_blocks = by_blocks;
  float worst;
  prepare_unfused(&a, &worst);
  snprintf(fused, sizeof fused, "fused, B = %d, T = 1024, C = 768, 12 heads", (int)batch);
  snprintf(other, sizeof other, "unfused, %s, blocks of %d rows%s", versions, (int)a.rows,
           by_blocks ? ", all operations of a block in turn" : "");
  for (a.passes = 3; a.passes >= least_passes; a.passes--) {
    bench_line line = {.name = names[a.passes],
                       .a = fused,
                       .b = other,
                       .unit = "GFLOP/s",
                       .divisor = 1e9,
                       .limit = a.passes == 3 ? limit : 0.0};
    bench_compare(&line, fused_rate, &a, unfused_rate, &a);
    bench_print(&line);
  }
  bench_note("attention", "B = %d: fused and unfused gradients differ by at most %.1e of the largest", (int)batch,
             (double)worst);
}

static int64_t peak_kib(void) {
  struct rusage use;
  getrusage(RUSAGE_SELF, &use);
  return use.ru_maxrss;
}

/* Everything that attention needs beside qkv, out and their gradients; the growth of the process is measured. */
static void bench_attention_memory(void) {
  const char *name = "attention memory";
  if (!bench_wanted(name)) return;
  attention small = attention_of(1, 64, 0);
  fused_rate(&small); /* the device takes its scratch */
  for (int64_t t = 1024; t <= 4096; t *= 2) {
    attention a = attention_of(1, t, 0);
    const int64_t before = peak_kib();
    fused_rate(&a);
    bench_note(name, "T = %d: lse and work %d KiB, grown while running %d KiB (probabilities would be %d KiB)", (int)t,
               (int)(2 * a.heads * t * 4 / 1024), (int)(peak_kib() - before), (int)(a.heads * t * t * 4 / 1024));
  }
}

/* ---- products ---- */

typedef struct shape {
  int64_t n, ic, oc, ld; /* ld: of the rows of the output */
  int pass;              /* 0 forward, 1 input gradient, 2 weight gradient */
  int32_t dtype;         /* of x, w and out; the weight gradient is fp32 */
  void *x, *w, *out;
  float *dw;
} shape;

static double product_flops(const shape *s) {
  return 2.0 * (double)s->n * (double)s->ic * (double)s->oc;
}

static double op_seconds(const shape *s) {
  phx_error err = {.struct_size = sizeof err};
  const double start = bench_busy();
  if (s->pass == 0)
    must(ops->linear(ops->ctx, s->dtype, s->out, s->ld, NULL, s->x, s->w, NULL, s->n, s->ic, s->oc, 0, NULL, &err),
         &err);
  if (s->pass == 1)
    must(ops->linear_backward_input(ops->ctx, s->dtype, s->x, s->out, s->ld, s->w, NULL, s->n, s->ic, s->oc,
                                    PHX_GRAD_WRITE, NULL, &err),
         &err);
  if (s->pass == 2)
    must(ops->linear_backward_weight(ops->ctx, s->dtype, s->dw, NULL, s->out, s->ld, s->x, s->n, s->ic, s->oc,
                                     PHX_GRAD_WRITE, PHX_GRAD_WRITE, NULL, &err),
         &err);
  return bench_busy() - start;
}

static double plain_seconds(const shape *s) {
  const double start = bench_busy();
  if (s->pass == 0) dnnl_sgemm('N', 'T', s->n, s->oc, s->ic, 1, s->x, s->ic, s->w, s->ic, 0, s->out, s->oc);
  if (s->pass == 1) dnnl_sgemm('N', 'N', s->n, s->ic, s->oc, 1, s->out, s->oc, s->w, s->ic, 0, s->x, s->ic);
  if (s->pass == 2) dnnl_sgemm('T', 'N', s->oc, s->ic, s->n, 1, s->out, s->oc, s->x, s->ic, 0, s->dw, s->ic);
  return bench_busy() - start;
}

static double op_rate(void *arg) {
  return product_flops(arg) / op_seconds(arg);
}
static double plain_rate(void *arg) {
  return product_flops(arg) / plain_seconds(arg);
}

static shape shape_of(int32_t dtype, int64_t n, int64_t weights, int64_t ic, int64_t ld) {
  const int64_t wide = dtype == PHX_F32 ? 4 : 2;
  return (shape){.n = n, .dtype = dtype, .x = bench_memory(n * ic * wide), .w = bench_memory(weights * wide),
                 .out = bench_memory(n * ld * wide), .dw = bench_memory(weights * 4)};
}

/* Sizes of a layer, and fresh operands: the last pass overwrote one of them. */
static void fill_shape(shape *s, const shape *from) {
  const int64_t sizes[] = {s->n * s->ic, s->oc * s->ic, s->n * s->ld};
  void *const to[] = {s->x, s->w, s->out};
  const void *const same[] = {from->x, from->w, from->out};
  static const float scales[] = {1.0f, 0.02f, 0.01f};
  phx_error err = {.struct_size = sizeof err};
  for (uint64_t i = 0; i < 3; i++)
    if (s == from)
      bench_fill(to[i], sizes[i], scales[i], i + 1);
    else
      must(device->cast(device->ctx, to[i], s->dtype, same[i], from->dtype, sizes[i], NULL, &err), &err);
}

/* Products as GPT-2 124M has them: in fp32 against oneDNN called plainly, in bf16 against the same in fp32. */
static void bench_products(int32_t dtype) {
  enum { C = 768, V = 50257, VP = 50304, N = 1024 };
  static const struct {
    const char *name;
    int64_t ic, oc, ld;
    double times;
  } layers[] = {{"products C to 3C", C, 3 * C, 3 * C, 12},
                {"products C to C", C, C, C, 12},
                {"products C to 4C", C, 4 * C, 4 * C, 12},
                {"products 4C to C", 4 * C, C, C, 12},
                {"products head", C, V, VP, 1}};
  static const char *const passes[] = {"forward", "dX", "dW"};
  if (!bench_wanted("products") && !bench_wanted("head") && !bench_wanted("bf16")) return;
  const int low = dtype == PHX_BF16;
  const char *beside = low ? "cpu device, fp32" : versions;
  static shape full; /* one for both dtypes: half a GB */
  if (!full.x) full = shape_of(PHX_F32, N, (int64_t)V * C, 4 * C, VP);
  shape half = full;
  if (low) half = shape_of(PHX_BF16, N, (int64_t)V * C, 4 * C, VP);
  double a = 0, b = 0, work = 0;
  int measured = 0;
  for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
    for (int pass = 0; pass < 3; pass++) {
      char name[64];
      full.ic = half.ic = layers[i].ic, full.oc = half.oc = layers[i].oc, full.ld = half.ld = layers[i].ld;
      full.pass = half.pass = pass;
      snprintf(name, sizeof name, "%s%s, %s", low ? "bf16 " : "", layers[i].name, passes[pass]);
      bench_line line = {.name = name, .a = low ? "cpu device, bf16, M = 1024" : "cpu device, M = 1024", .b = beside,
                         .unit = "GFLOP/s", .divisor = 1e9};
      if (!bench_wanted(name)) continue;
      fill_shape(&full, &full);
      if (low) fill_shape(&half, &full);
      bench_compare(&line, op_rate, low ? &half : &full, low ? op_rate : plain_rate, &full);
      bench_print(&line);
      const double f = layers[i].times * product_flops(&full);
      measured++;
      work += f, a += f / line.rate_a, b += f / line.rate_b;
    }
  if (measured == 15)
    bench_note(low ? "bf16 products" : "products",
               "all of GPT-2 124M's (12 layers and the head, weighted): cpu device%s %.1f GFLOP/s, %s %.1f, ratio %.3f",
               low ? ", bf16," : "", work / a / 1e9, beside, work / b / 1e9, b / a);
}

int main(int argc, char **argv) {
  device_ops d;
  phx_error err = {.struct_size = sizeof err};
  bench_init(argc, argv);
  must(device_ops_open(&d, bench_threads(), NULL, &err), &err);
  ops = d.ops;
  device = d.device;
  const dnnl_version_t *v = dnnl_version();
  snprintf(versions, sizeof versions, "dnnl_sgemm %d.%d.%d", v->major, v->minor, v->patch);
  bench_note("device", "%s; %s", d.device->name, versions);
  bench_adamw();
  bench_attention(1, 0, 1, 1.3);
  bench_attention(1, 1, 1, 0.0); /* the strongest form short of fusion */
  bench_attention(4, 0, 3, 0.0); /* where the probabilities fit no cache */
  bench_attention_memory();
  bench_products(PHX_F32);
  bench_products(PHX_BF16);
  bench_note("fma peak", "%.1f GFLOP/s on one core, fp32, 10 chains of %d lanes", fma_peak(NULL) / 1e9, PHX__LANES);
  device_ops_close(&d);
  return bench_finish();
}
