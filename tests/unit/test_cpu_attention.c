/* Causal attention of the cpu device: against a plain double-precision reference and numerical differences, on sizes
 * that fit no tile, for every instruction set of the machine; equal bits for any number of threads and any place in
 * memory. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "device_ops.h"

enum { GUARD = 64 }; /* poisoned elements after each output */

typedef struct shape {
  int64_t b, t, c, heads;
} shape;

static const shape shapes[] = {{1, 1, 10, 1},    {2, 1, 30, 3},  {1, 33, 30, 3},  {2, 64, 64, 2},   {1, 65, 128, 2},
                               {1, 130, 128, 1}, {2, 67, 51, 3}, {1, 200, 24, 8}, {1, 129, 256, 1}, {3, 17, 7, 7}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static float *poisoned(int64_t n) {
  float *x = aligned_alloc(PHX_ALIGN, (size_t)phx_align_bytes((n + GUARD) * 4));
  cr_assert_not_null(x);
  memset(x, 0xff, (size_t)(n + GUARD) * 4); /* NaN */
  return x;
}

static void assert_guard(const float *x, int64_t n) {
  for (int64_t i = n; i < n + GUARD; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    cr_assert_eq(bits, 0xffffffffu, "written past the end, by %d", (int)(i - n));
  }
}

static float number(uint64_t *state) { /* uniform in -1 .. 1 */
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}

/* ---- the plain reference ---- */

/* p[u], u <= t: probabilities of query t; returns the log-sum-exp */
static double reference_row(double *p, const double *qkv, const shape *s, int64_t b, int64_t h, int64_t t) {
  const int64_t d = s->c / s->heads, ld = 3 * s->c;
  const double *q = qkv + (b * s->t + t) * ld + h * d;
  double top = -INFINITY, sum = 0.0;
  for (int64_t u = 0; u <= t; u++) {
    const double *k = qkv + (b * s->t + u) * ld + s->c + h * d;
    p[u] = 0.0;
    for (int64_t i = 0; i < d; i++) p[u] += q[i] * k[i];
    p[u] /= sqrt((double)d);
    if (p[u] > top) top = p[u];
  }
  for (int64_t u = 0; u <= t; u++) sum += p[u] = exp(p[u] - top);
  for (int64_t u = 0; u <= t; u++) p[u] /= sum;
  return top + log(sum);
}

static void reference_forward(double *out, double *lse, const double *qkv, const shape *s) {
  const int64_t d = s->c / s->heads, ld = 3 * s->c;
  double *p = calloc((size_t)s->t, sizeof *p);
  for (int64_t b = 0; b < s->b; b++)
    for (int64_t h = 0; h < s->heads; h++)
      for (int64_t t = 0; t < s->t; t++) {
        double *o = out + (b * s->t + t) * s->c + h * d;
        lse[(b * s->heads + h) * s->t + t] = reference_row(p, qkv, s, b, h, t);
        for (int64_t i = 0; i < d; i++) {
          o[i] = 0.0;
          for (int64_t u = 0; u <= t; u++) o[i] += p[u] * qkv[(b * s->t + u) * ld + 2 * s->c + h * d + i];
        }
      }
  free(p);
}

static void reference_backward(double *dqkv, const double *dout, const double *qkv, const shape *s) {
  const int64_t d = s->c / s->heads, c = s->c, ld = 3 * c;
  double *p = calloc((size_t)s->t, sizeof *p), *dp = calloc((size_t)s->t, sizeof *dp);
  memset(dqkv, 0, (size_t)(s->b * s->t * ld) * sizeof *dqkv);
  for (int64_t b = 0; b < s->b; b++)
    for (int64_t h = 0; h < s->heads; h++)
      for (int64_t t = 0; t < s->t; t++) {
        const double *g = dout + (b * s->t + t) * c + h * d;
        const int64_t q = (b * s->t + t) * ld + h * d;
        double mean = 0.0;
        reference_row(p, qkv, s, b, h, t);
        for (int64_t u = 0; u <= t; u++) {
          const int64_t v = (b * s->t + u) * ld + 2 * c + h * d;
          dp[u] = 0.0;
          for (int64_t i = 0; i < d; i++) dp[u] += g[i] * qkv[v + i], dqkv[v + i] += p[u] * g[i];
          mean += p[u] * dp[u];
        }
        for (int64_t u = 0; u <= t; u++) {
          const int64_t k = (b * s->t + u) * ld + c + h * d;
          const double ds = p[u] * (dp[u] - mean) / sqrt((double)d);
          for (int64_t i = 0; i < d; i++) dqkv[q + i] += ds * qkv[k + i], dqkv[k + i] += ds * qkv[q + i];
        }
      }
  free(p);
  free(dp);
}

/* ---- one run of the device ---- */

typedef struct arrays {
  int64_t n, rows; /* elements of out, of lse */
  float *qkv, *dout, *out, *lse, *work, *dqkv;
} arrays;

static arrays fill(const shape *s, float scale) {
  arrays a = {.n = s->b * s->t * s->c, .rows = s->b * s->t * s->heads};
  uint64_t state = 7;
  a.qkv = poisoned(3 * a.n), a.dqkv = poisoned(3 * a.n);
  a.dout = poisoned(a.n), a.out = poisoned(a.n);
  a.lse = poisoned(a.rows), a.work = poisoned(a.rows);
  for (int64_t i = 0; i < 3 * a.n; i++) a.qkv[i] = scale * number(&state);
  for (int64_t i = 0; i < a.n; i++) a.dout[i] = number(&state);
  return a;
}

static void discard(arrays *a) {
  free(a->qkv), free(a->dqkv), free(a->dout), free(a->out), free(a->lse), free(a->work);
}

static void run(const device_ops *d, const arrays *a, const shape *s) {
  const phx_ops *ops = d->ops;
  phx_error err = {.struct_size = sizeof err};
  cr_assert_eq(ops->attention(ops->ctx, PHX_F32, a->out, a->lse, a->qkv, s->b, s->t, s->c, s->heads, NULL, &err),
               PHX_OK, "%s", err.message);
  cr_assert_eq(ops->attention_backward(ops->ctx, PHX_F32, a->dqkv, a->dout, a->qkv, a->out, a->lse, a->work, s->b, s->t,
                                       s->c, s->heads, NULL, &err),
               PHX_OK, "%s", err.message);
  assert_guard(a->out, a->n), assert_guard(a->dqkv, 3 * a->n);
  assert_guard(a->lse, a->rows), assert_guard(a->work, a->rows);
}

/* largest |x - y| over the largest |y|, or |x - y| where all y are 0; NaN counts as infinite */
static double difference(const float *x, const double *y, int64_t n) {
  double worst = 0.0, most = 0.0;
  for (int64_t i = 0; i < n; i++) {
    const double e = fabs(x[i] - y[i]);
    if (!(e <= worst)) worst = isnan(e) ? INFINITY : e;
    if (fabs(y[i]) > most) most = fabs(y[i]);
  }
  return most > 0.0 ? worst / most : worst;
}

static double *zeros(int64_t n) {
  cr_assert(n > 0 && n < 1 << 28);
  double *x = calloc((size_t)n, sizeof *x);
  cr_assert_not_null(x);
  return x;
}

static double *doubled(const float *x, int64_t n) {
  double *y = zeros(n);
  for (int64_t i = 0; i < n; i++) y[i] = x[i];
  return y;
}

static void compare(const arrays *a, const shape *s, double bound) {
  double *qkv = doubled(a->qkv, 3 * a->n), *dout = doubled(a->dout, a->n);
  double *out = zeros(a->n), *lse = zeros(a->rows), *dqkv = zeros(3 * a->n);
  reference_forward(out, lse, qkv, s);
  reference_backward(dqkv, dout, qkv, s);
  const double e_out = difference(a->out, out, a->n), e_lse = difference(a->lse, lse, a->rows);
  const double e_dqkv = difference(a->dqkv, dqkv, 3 * a->n);
  cr_log_info("(%d, %d, %d, %d): out %.1e, lse %.1e, dqkv %.1e", (int)s->b, (int)s->t, (int)s->c, (int)s->heads, e_out,
              e_lse, e_dqkv);
  cr_assert_lt(e_out, bound, "out of (%d, %d, %d) off by %.2e", (int)s->t, (int)s->c, (int)s->heads, e_out);
  cr_assert_lt(e_lse, bound, "lse off by %.2e", e_lse);
  cr_assert_lt(e_dqkv, bound, "dqkv of (%d, %d, %d) off by %.2e", (int)s->t, (int)s->c, (int)s->heads, e_dqkv);
  free(qkv), free(dout), free(out), free(lse), free(dqkv);
}

/* ---- tests ---- */

static void against_reference(const char *isa) {
  device_ops d;
  if (!device_ops_have(&d, 1, isa)) cr_skip_test("this machine has no %s", isa);
  for (int i = 0; i < SHAPES; i++) {
    arrays a = fill(&shapes[i], 2.0f);
    run(&d, &a, &shapes[i]);
    compare(&a, &shapes[i], 3e-6);
    discard(&a);
  }
  device_ops_close(&d);
}
Test(cpu_attention, reference_base, .timeout = 60) {
  against_reference("base");
}
Test(cpu_attention, reference_avx2, .timeout = 60) {
  against_reference("avx2");
}
Test(cpu_attention, reference_avx512, .timeout = 60) {
  against_reference("avx512");
}

/* Scores up to several hundred: the running maximum matters, and most probabilities vanish. */
Test(cpu_attention, large_scores, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  const shape s = {1, 150, 64, 1};
  arrays a = fill(&s, 20.0f);
  run(&d, &a, &s);
  compare(&a, &s, 3e-4); /* scores near 500 have an error of 500 ulp/2 before the exponential sees them */
  discard(&a);
  device_ops_close(&d);
}

/* The gradient is the derivative of the forward pass: central differences of the double reference's sum(out * dout)
 * along single elements of qkv. */
Test(cpu_attention, numerical_gradient, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  const shape s = {1, 70, 20, 2};
  arrays a = fill(&s, 1.0f);
  run(&d, &a, &s);
  double *qkv = doubled(a.qkv, 3 * a.n), *out = zeros(a.n), *lse = zeros(a.rows);
  const double h = 1e-5;
  for (int64_t i = 0; i < 3 * a.n; i += 41) {
    double side[2];
    for (int j = 0; j < 2; j++) {
      qkv[i] = a.qkv[i] + (j ? h : -h);
      reference_forward(out, lse, qkv, &s);
      side[j] = 0.0;
      for (int64_t k = 0; k < a.n; k++) side[j] += out[k] * a.dout[k];
    }
    qkv[i] = a.qkv[i];
    cr_assert_float_eq(a.dqkv[i], (side[1] - side[0]) / (2 * h), 2e-5, "element %d: %g, difference %g", (int)i,
                       a.dqkv[i], (side[1] - side[0]) / (2 * h));
  }
  free(qkv), free(out), free(lse);
  discard(&a);
  device_ops_close(&d);
}

/* Keys after a query do not exist for it: rows 0 .. t of the results must not change with row t + 1 of the input. */
Test(cpu_attention, causal, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  const shape s = {1, 150, 30, 3};
  arrays a = fill(&s, 1.0f), b = fill(&s, 1.0f);
  for (int64_t i = 71 * 3 * s.c; i < 3 * b.n; i++) b.qkv[i] = 1e30f;
  phx_error err = {.struct_size = sizeof err};
  run(&d, &a, &s);
  cr_assert_eq(d.ops->attention(d.ops->ctx, PHX_F32, b.out, b.lse, b.qkv, s.b, s.t, s.c, s.heads, NULL, &err), PHX_OK);
  cr_assert_arr_eq(a.out, b.out, (size_t)(71 * s.c) * 4);
  discard(&a);
  discard(&b);
  device_ops_close(&d);
}

/* Same bits for 1, 2 and 3 threads, for arrays at another place, and when run again over used scratch. */
Test(cpu_attention, same_bits, .timeout = 60) {
  const shape s = {2, 150, 30, 3};
  arrays first = fill(&s, 1.0f);
  for (int32_t threads = 1; threads <= 3; threads++) {
    device_ops d;
    cr_assert(device_ops_have(&d, threads, NULL));
    for (int again = 0; again < 2; again++) {
      arrays a = fill(&s, 1.0f), moved = a;
      if (again) { /* 4 bytes further: the worst alignment there is */
        moved.qkv++, moved.dqkv++, moved.out++, moved.dout++, moved.lse++, moved.work++;
        memmove(moved.qkv, a.qkv, (size_t)(3 * a.n) * 4);
        memmove(moved.dout, a.dout, (size_t)a.n * 4);
      }
      const phx_ops *ops = d.ops;
      cr_assert_eq(
          ops->attention(ops->ctx, PHX_F32, moved.out, moved.lse, moved.qkv, s.b, s.t, s.c, s.heads, NULL, NULL),
          PHX_OK);
      cr_assert_eq(ops->attention_backward(ops->ctx, PHX_F32, moved.dqkv, moved.dout, moved.qkv, moved.out, moved.lse,
                                           moved.work, s.b, s.t, s.c, s.heads, NULL, NULL),
                   PHX_OK);
      if (threads == 1 && !again) {
        memcpy(first.out, a.out, (size_t)a.n * 4);
        memcpy(first.lse, a.lse, (size_t)a.rows * 4);
        memcpy(first.dqkv, a.dqkv, (size_t)(3 * a.n) * 4);
      }
      cr_assert_arr_eq(moved.out, first.out, (size_t)a.n * 4, "out, %d threads", threads);
      cr_assert_arr_eq(moved.lse, first.lse, (size_t)a.rows * 4, "lse, %d threads", threads);
      cr_assert_arr_eq(moved.dqkv, first.dqkv, (size_t)(3 * a.n) * 4, "dqkv, %d threads", threads);
      discard(&a);
    }
    device_ops_close(&d);
  }
  discard(&first);
}

/* A NaN reaches every later query of its head, and no other head: it is not lost in a maximum.  (Rows are computed in
 * groups of 4, so a NaN in v may also reach the group's earlier queries, as 0 times NaN.) */
Test(cpu_attention, nan_is_kept, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  const shape s = {1, 100, 32, 2};
  for (int part = 0; part < 3; part++) { /* q, k, v */
    arrays a = fill(&s, 1.0f);
    a.qkv[70 * 3 * s.c + part * s.c + 3] = NAN;
    run(&d, &a, &s);
    for (int64_t t = 0; t < s.t; t++) {
      if (part == 2 && (t == 68 || t == 69)) continue;
      cr_assert_eq(isnan(a.out[t * s.c + 3]) != 0, part == 0 ? t == 70 : t >= 70, "part %d, query %d", part, (int)t);
      cr_assert_not(isnan(a.out[t * s.c + 16 + 3]), "the other head");
    }
    discard(&a);
  }
  device_ops_close(&d);
}

/* The scratch is declared once, per thread, and serves any length: nothing grows with T or T * T. */
Test(cpu_attention, scratch_is_constant, .timeout = 60) {
  device_ops one, two;
  cr_assert(device_ops_have(&one, 1, NULL) && device_ops_have(&two, 2, NULL));
  cr_assert_leq(two.ops->scratch_bytes - one.ops->scratch_bytes, 8 << 20, "scratch of one thread more");
  device_ops_close(&two);
  const int64_t declared = one.ops->scratch_bytes;
  for (int64_t t = 1; t <= 1024; t *= 32) {
    const shape s = {1, t, 64, 1};
    arrays a = fill(&s, 1.0f);
    const int64_t allocs = one.fake.allocs;
    run(&one, &a, &s);
    cr_assert_eq(one.fake.allocs, allocs, "asked the host for memory");
    cr_assert_eq(one.ops->scratch_bytes, declared);
    discard(&a);
  }
  device_ops_close(&one);
}

Test(cpu_attention, refuses, .timeout = 60) {
  device_ops d;
  cr_assert(device_ops_have(&d, 1, NULL));
  const phx_ops *ops = d.ops;
  float x[4] = {5, 5, 5, 5};
  phx_error err = {.struct_size = sizeof err};
  cr_assert_eq(ops->attention(ops->ctx, PHX_F32, x, x, x, 1, 1, 10, 3, NULL, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "channels 10") && strstr(err.message, "heads 3"), "%s", err.message);
  cr_assert_eq(ops->attention(ops->ctx, PHX_F32, x, x, x, 1, 0, 10, 1, NULL, &err), PHX_INVALID);
  cr_assert_eq(ops->attention(ops->ctx, PHX_F32, x, x, x, 1, 1, 257, 1, NULL, &err), PHX_UNSUPPORTED);
  cr_assert_eq(ops->attention_backward(ops->ctx, PHX_F32, x, x, x, x, x, x, 1, 1, 257, 1, NULL, &err), PHX_UNSUPPORTED);
  cr_assert(x[0] == 5 && x[3] == 5);
  device_ops_close(&d);
}
