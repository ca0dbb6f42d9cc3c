/* Softmax cross-entropy of the cpu device: against double precision, numerical differences, extreme logits, padding;
 * equal bits for any number of threads and every instruction set. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "device_ops.h"

enum { GUARD = 64 };
static const int64_t sizes[][3] = {/* rows, classes, row length */
                                   {1, 1, 1},         {3, 2, 64},         {5, 15, 16},     {4, 16, 16},
                                   {7, 257, 320},     {3, 1024, 1024},    {2, 1025, 1088}, {2, 5000, 5056},
                                   {1, 50257, 50304}, {1, 270001, 270016}};
enum { SIZES = sizeof sizes / sizeof *sizes };

static float number(uint64_t *state) { /* uniform in -1 .. 1 */
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}

typedef struct rows {
  int64_t n, v, vp;
  float *logits, *losses;
  int32_t *targets;
} rows;

/* Padding columns hold NaN: they must be ignored and then cleared. */
static rows fill(int64_t n, int64_t v, int64_t vp, float scale) {
  rows r = {n, v, vp, malloc((size_t)(n * vp + GUARD) * 4), malloc((size_t)(n + GUARD) * 4), malloc((size_t)n * 4)};
  uint64_t state = (uint64_t)(n + 31 * v);
  memset(r.logits, 0xff, (size_t)(n * vp + GUARD) * 4);
  memset(r.losses, 0xff, (size_t)(n + GUARD) * 4);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < v; j++) r.logits[i * vp + j] = scale * number(&state);
    r.targets[i] = (int32_t)((i * 7919 + 3) % v);
  }
  return r;
}

static void discard(rows *r) {
  free(r->logits), free(r->losses), free(r->targets);
}

static void assert_guard(const float *x, int64_t n) {
  for (int64_t i = n; i < n + GUARD; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    cr_assert_eq(bits, 0xffffffffu, "written past the end, by %d", (int)(i - n));
  }
}

static void run(const device_ops *d, const rows *r, int32_t gradient, float scale) {
  phx_error err = {.struct_size = sizeof err};
  cr_assert_eq(d->ops->cross_entropy(d->ops->ctx, PHX_F32, r->logits, r->losses, r->targets, r->n, r->v, r->vp,
                                     gradient, scale, NULL, &err),
               PHX_OK, "%s", err.message);
  assert_guard(r->logits, r->n * r->vp);
  assert_guard(r->losses, r->n);
}

/* log-sum-exp of one row */
static double reference(const float *x, int64_t v) {
  double top = -INFINITY, sum = 0.0;
  for (int64_t i = 0; i < v; i++) top = x[i] > top ? x[i] : top;
  for (int64_t i = 0; i < v; i++) sum += exp(x[i] - top);
  return top + log(sum);
}

/* Loss and gradient of `before` as found in r. */
static void compare(const rows *r, const float *before, float scale) {
  for (int64_t i = 0; i < r->n; i++) {
    const float *x = before + i * r->vp, *g = r->logits + i * r->vp;
    const double lse = reference(x, r->v), loss = lse - x[r->targets[i]];
    cr_assert_leq(fabs(r->losses[i] - loss), 5e-7 * fabs(loss) + 5e-7, "loss of row %d (V = %d): %.9g, not %.9g",
                  (int)i, (int)r->v, r->losses[i], loss);
    for (int64_t j = 0; j < r->vp; j++) {
      double p = j < r->v ? exp(x[j] - lse) : 0.0;
      const double want = (p - (j < r->v && j == r->targets[i] ? 1.0 : 0.0)) * scale;
      /* two ulp of p for the exponential, and the argument's rounding (|x| / 2 ulp) */
      const double relative = p > 0 ? 5e-7 + 1.2e-7 * fabs(x[j] - lse) : 0.0;
      const double bound = fabs(scale) * (p * relative + (want < 0 ? 1e-7 : 0.0) + 1.2e-38);
      cr_assert(fabs(g[j] - want) <= bound, "V = %d, row %d, column %d: %.9g, not %.9g", (int)r->v, (int)i, (int)j,
                g[j], want);
      cr_assert(j < r->v || g[j] == 0.0f);
    }
  }
}

static float *copy_of(const rows *r) {
  float *x = malloc((size_t)(r->n * r->vp) * 4);
  memcpy(x, r->logits, (size_t)(r->n * r->vp) * 4);
  return x;
}

/* FNV-1a */
static uint64_t hash(uint64_t h, const void *p, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)p)[i]) * 0x100000001b3u;
  return h;
}

static void against_reference(const char *isa) {
  device_ops d;
  if (!device_ops_have(&d, 1, isa)) cr_skip_test("this machine has no %s", isa);
  for (int i = 0; i < SIZES; i++) {
    rows r = fill(sizes[i][0], sizes[i][1], sizes[i][2], 6.0f);
    float *before = copy_of(&r);
    run(&d, &r, 1, 0.125f);
    compare(&r, before, 0.125f);
    free(before);
    discard(&r);
  }
  device_ops_close(&d);
}
Test(cpu_cross_entropy, reference_base, .timeout = 60) {
  against_reference("base");
}
Test(cpu_cross_entropy, reference_avx2, .timeout = 60) {
  against_reference("avx2");
}
Test(cpu_cross_entropy, reference_avx512, .timeout = 60) {
  against_reference("avx512");
}

/* Logits of 1e4 and -1e4, of -infinity, and a maximum that comes last: nothing overflows, nothing is NaN. */
Test(cpu_cross_entropy, extreme_logits, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  for (int kind = 0; kind < 4; kind++) {
    rows r = fill(4, 3000, 3008, kind == 3 ? 1e-30f : 1e4f);
    for (int64_t i = 0; i < r.n; i++)
      for (int64_t j = 0; j < r.v; j++) {
        float *x = &r.logits[i * r.vp + j];
        if (kind == 1 && j < 2500 && j != r.targets[i]) *x = -INFINITY; /* whole blocks of it */
        if (kind == 2) *x = (float)j; /* each block's maximum is above the last one's */
      }
    float *before = copy_of(&r);
    run(&d, &r, 1, 1.0f);
    compare(&r, before, 1.0f);
    free(before);
    discard(&r);
  }
  device_ops_close(&d);
}

/* A NaN in a row shows in its loss and gradient, and in no other row's. */
Test(cpu_cross_entropy, nan_is_kept, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  for (int64_t at = 0; at < 2100; at += 523) {
    rows r = fill(3, 2100, 2112, 1.0f);
    r.logits[1 * r.vp + at] = NAN;
    run(&d, &r, 1, 1.0f);
    cr_assert(isnan(r.losses[1]) && !isnan(r.losses[0]) && !isnan(r.losses[2]), "NaN at %d", (int)at);
    cr_assert(isnan(r.logits[1 * r.vp + at]) && !isnan(r.logits[2 * r.vp + at]));
    discard(&r);
  }
  device_ops_close(&d);
}

/* gradient = 0 gives the same losses and leaves the logits, padding included, as they are. */
Test(cpu_cross_entropy, without_gradient, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  rows r = fill(5, 2600, 2624, 3.0f);
  float *before = copy_of(&r), losses[5];
  run(&d, &r, 0, 1.0f);
  cr_assert_arr_eq(before, r.logits, (size_t)(r.n * r.vp) * 4);
  memcpy(losses, r.losses, sizeof losses);
  run(&d, &r, 1, 1.0f);
  cr_assert_arr_eq(losses, r.losses, sizeof losses);
  free(before);
  discard(&r);
  device_ops_close(&d);
}

/* The gradient is the derivative of the loss (central differences in double). */
Test(cpu_cross_entropy, numerical_gradient, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  rows r = fill(1, 37, 48, 2.0f);
  float *before = copy_of(&r);
  run(&d, &r, 1, 1.0f);
  for (int64_t j = 0; j < r.v; j++) {
    double side[2];
    for (int s = 0; s < 2; s++) {
      float *x = before + j, keep = *x;
      *x += s ? 0x1p-10f : -0x1p-10f;
      const double h = (double)*x - keep;
      side[s] = reference(before, r.v) - before[r.targets[0]];
      cr_assert_float_eq(fabs(h), 0x1p-10, 1e-7);
      *x = keep;
    }
    cr_assert_float_eq(r.logits[j], (side[1] - side[0]) * 0x1p9, 2e-6, "column %d", (int)j);
  }
  free(before);
  discard(&r);
  device_ops_close(&d);
}

static uint64_t bits_of(int32_t threads, const char *isa) {
  device_ops d;
  if (!device_ops_have(&d, threads, isa)) return 0;
  rows r = fill(7, 2077, 2112, 5.0f);
  run(&d, &r, 1, 0.3f);
  const uint64_t h = hash(hash(0xcbf29ce484222325u, r.logits, (size_t)(r.n * r.vp) * 4), r.losses, (size_t)r.n * 4);
  discard(&r);
  device_ops_close(&d);
  return h;
}

Test(cpu_cross_entropy, same_bits_for_any_threads, .timeout = 60) {
  const uint64_t first = bits_of(1, NULL);
  cr_assert_eq(bits_of(2, NULL), first);
  cr_assert_eq(bits_of(3, NULL), first);
}

/* 16 lanes everywhere.  oneDNN takes one limit per process, so two tests; the device allows the highest set after it.
 */
Test(cpu_cross_entropy, same_bits_base_avx512, .timeout = 60) {
  const uint64_t low = bits_of(1, "base"), high = bits_of(1, "avx512");
  if (!high) cr_skip_test("this machine has no avx512");
  cr_assert_eq(low, high);
}
Test(cpu_cross_entropy, same_bits_avx2_avx512, .timeout = 60) {
  const uint64_t low = bits_of(1, "avx2"), high = bits_of(1, "avx512");
  if (!high) cr_skip_test("this machine has no avx512");
  cr_assert_eq(low, high);
}

Test(cpu_cross_entropy, refuses, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  const phx_ops *ops = d.ops;
  phx_error err = {.struct_size = sizeof err};
  float x[2] = {5, 5}, loss = 5;
  int32_t target = 2;
  cr_assert_eq(ops->cross_entropy(ops->ctx, PHX_F32, x, &loss, &target, 1, 2, 2, 1, 1.0f, NULL, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "target 2") && strstr(err.message, "vocabulary of 2"), "%s", err.message);
  target = -1;
  cr_assert_eq(ops->cross_entropy(ops->ctx, PHX_F32, x, &loss, &target, 1, 2, 2, 1, 1.0f, NULL, &err), PHX_INVALID);
  target = 0;
  cr_assert_eq(ops->cross_entropy(ops->ctx, PHX_F32, x, &loss, &target, 1, 2, 1, 1, 1.0f, NULL, &err), PHX_INVALID);
  cr_assert(x[0] == 5 && x[1] == 5 && loss == 5);
  device_ops_close(&d);
}
