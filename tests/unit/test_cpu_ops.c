/* The cpu device's operations against plain references in double; gradients against numerical derivatives of the
 * forward references.  Outputs are NaN before each call, sizes are odd, threads and pointers must not change bits. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "device_ops.h"
#include "random_array.h"

enum { THREADS_MAX = 3 };

static device_ops f;
static const phx_ops *ops;
static uint64_t state;
static void open_one(void) {
  cr_assert_eq(device_ops_open(&f, 1, NULL, &f.err), PHX_OK, "%s", f.err.message);
  ops = f.ops;
  state = 7;
}
static void close_one(void) {
  device_ops_close(&f);
}
TestSuite(cpu_ops, .init = open_one, .fini = close_one, .timeout = 120);

#define OK(call) cr_assert_eq((call), PHX_OK, "%s", f.err.message)

/* got within `bound` times the scale of the sum behind it */
static void check_near(const char *what, int64_t i, double got, double want, double bound) {
  cr_assert(fabs(got - want) <= bound, "%s[%lld]: %.9g, not %.9g (bound %.2g)", what, (long long)i, got, want, bound);
}

/* ---- references ---- */
static double ref_gelu(double x) {
  return x / (1 + exp(-2 * sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
static double ref_gelu_slope(double x) {
  const double u = sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), s = 1 / (1 + exp(-2 * u));
  return s + x * s * (1 - s) * 2 * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}
static double ref_dot(const float *x, int64_t dx, const float *y, int64_t dy, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i * dx] * (double)y[i * dy];
  return sum;
}

/* ---- GELU: a product with 1 leaves x, so the layer shows the function ---- */
Test(cpu_ops, gelu_and_its_slope_are_accurate) {
  enum { M = 40001 };
  float *x = malloc(M * sizeof *x), *y = poisoned_array(M), *dy = poisoned_array(M), *ones = malloc(M * sizeof *ones);
  const float one = 1.0f;
  double worst = 0, worst_slope = 0;
  for (int i = 0; i < M; i++) x[i] = (float)(i - M / 2) * 5e-4f, ones[i] = 1.0f;
  OK(ops->linear(ops->ctx, PHX_F32, y, 0, NULL, x, &one, NULL, M, 1, 1, 1, NULL, &f.err));
  OK(ops->linear_backward_input(ops->ctx, PHX_F32, dy, ones, 0, &one, x, M, 1, 1, PHX_GRAD_WRITE, NULL, &f.err));
  for (int i = 0; i < M; i++) {
    const double want = ref_gelu((double)x[i]), slope = ref_gelu_slope((double)x[i]);
    /* e^u has u times the relative error of u: unavoidable in fp32, and only where the result is tiny */
    const double ulp = ldexp(1, -23), size = fabs(want) * (1 + fmax(0, -2 * (double)x[i] * fabs((double)x[i])));
    if (want != 0) worst = fmax(worst, fabs((double)y[i] - want) / (size * ulp));
    worst_slope = fmax(worst_slope, fabs((double)dy[i] - slope) / ulp);
  }
  cr_assert_lt(worst, 3.0, "GELU: %g ulp", worst);
  cr_assert_lt(worst_slope, 4.0, "GELU': %g ulp of 1", worst_slope);
  const float far[4] = {-1e4f, 1e4f, INFINITY, NAN};
  float out[4];
  OK(ops->linear(ops->ctx, PHX_F32, out, 0, NULL, far, &one, NULL, 4, 1, 1, 1, NULL, &f.err));
  cr_assert(fabsf(out[0]) < 1e-30f && out[1] == 1e4f && out[2] == INFINITY && isnan(out[3]));
  free(x), free(y), free(dy), free(ones);
}

/* ---- linear ---- */
typedef struct shape {
  int64_t n, ic, oc, pad;
} shape;
static const shape shapes[] = {{1, 1, 1, 0}, {5, 30, 257, 0}, {67, 48, 33, 3}, {17, 257, 30, 5}, {300, 3, 9001, 0}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static void check_linear(shape s, int with_bias, int gelu, int with_pre) {
  const int64_t ld = s.oc + s.pad;
  float *x = random_array(s.n * s.ic, 1, &state), *w = random_array(s.oc * s.ic, 1, &state);
  float *bias = random_array(s.oc, 1, &state), *out = poisoned_array(s.n * ld), *pre = poisoned_array(s.n * s.oc);
  OK(ops->linear(ops->ctx, PHX_F32, out, s.pad ? ld : 0, with_pre ? pre : NULL, x, w, with_bias ? bias : NULL, s.n,
                 s.ic, s.oc, gelu, NULL, &f.err));
  for (int64_t i = 0; i < s.n; i++) {
    for (int64_t j = 0; j < s.oc; j++) {
      const double sum = ref_dot(x + i * s.ic, 1, w + j * s.ic, 1, s.ic) + (with_bias ? (double)bias[j] : 0);
      const double bound = 1e-6 * ((double)s.ic + 2);
      check_near("out", i * s.oc + j, (double)out[i * ld + j], gelu ? ref_gelu(sum) : sum, bound);
      if (with_pre) check_near("pre", i * s.oc + j, (double)pre[i * s.oc + j], sum, bound);
    }
    for (int64_t j = s.oc; j < ld; j++) cr_assert(isnan(out[i * ld + j]), "padding was written");
  }
  free(x), free(w), free(bias), free(out), free(pre);
}
Test(cpu_ops, linear) {
  for (int i = 0; i < SHAPES; i++)
    for (int variant = 0; variant < 8; variant++) check_linear(shapes[i], variant & 1, variant >> 1 & 1, variant >> 2);
}

static void check_backward_input(shape s, int mode, int with_pre) {
  const int64_t ld = s.oc + s.pad;
  float *dout = random_array(s.n * ld, 1, &state), *w = random_array(s.oc * s.ic, 1, &state);
  float *pre = random_array(s.n * s.ic, 3, &state), *before = random_array(s.n * s.ic, 1, &state);
  float *dx = poisoned_array(s.n * s.ic);
  if (mode == PHX_GRAD_ADD) memcpy(dx, before, (size_t)(s.n * s.ic) * sizeof *dx);
  OK(ops->linear_backward_input(ops->ctx, PHX_F32, dx, dout, s.pad ? ld : 0, w, with_pre ? pre : NULL, s.n, s.ic, s.oc,
                                mode, NULL, &f.err));
  for (int64_t i = 0; i < s.n; i++)
    for (int64_t j = 0; j < s.ic; j++) {
      const int64_t at = i * s.ic + j;
      const double slope = with_pre ? ref_gelu_slope((double)pre[at]) : 1;
      const double want = ref_dot(dout + i * ld, 1, w + j, s.ic, s.oc) * slope;
      check_near("dx", at, (double)dx[at], want + (mode == PHX_GRAD_ADD ? (double)before[at] : 0),
                 1e-6 * (sqrt((double)s.oc) * 3 + 2));
    }
  free(dout), free(w), free(pre), free(before), free(dx);
}
Test(cpu_ops, linear_backward_input) {
  for (int i = 0; i < SHAPES; i++)
    for (int with_pre = 0; with_pre < 2; with_pre++) {
      check_backward_input(shapes[i], PHX_GRAD_WRITE, with_pre);
      check_backward_input(shapes[i], PHX_GRAD_ADD, with_pre);
    }
  check_backward_input((shape){300, 9001, 3, 0}, PHX_GRAD_ADD, 1); /* several chunks of scratch */
}

static void check_backward_weight(shape s, int w_mode, int b_mode, int with_db) {
  const int64_t ld = s.oc + s.pad;
  float *dout = random_array(s.n * ld, 1, &state), *x = random_array(s.n * s.ic, 1, &state);
  float *dw = poisoned_array(s.oc * s.ic), *db = poisoned_array(s.oc);
  if (w_mode == PHX_GRAD_ADD)
    for (int64_t i = 0; i < s.oc * s.ic; i++) dw[i] = 0.5f;
  if (b_mode == PHX_GRAD_ADD)
    for (int64_t i = 0; i < s.oc; i++) db[i] = 0.25f;
  OK(ops->linear_backward_weight(ops->ctx, PHX_F32, dw, with_db ? db : NULL, dout, s.pad ? ld : 0, x, s.n, s.ic, s.oc,
                                 w_mode, b_mode, NULL, &f.err));
  const double bound = 1e-6 * (sqrt((double)s.n) * 3 + 2);
  for (int64_t i = 0; i < s.oc; i++) {
    double sum = b_mode == PHX_GRAD_ADD ? 0.25 : 0;
    for (int64_t r = 0; r < s.n; r++) sum += (double)dout[r * ld + i];
    if (with_db) check_near("db", i, (double)db[i], sum, bound);
    for (int64_t j = 0; j < s.ic; j++)
      check_near("dw", i * s.ic + j, (double)dw[i * s.ic + j],
                 ref_dot(dout + i, ld, x + j, s.ic, s.n) + (w_mode == PHX_GRAD_ADD ? 0.5 : 0), bound);
  }
  free(dout), free(x), free(dw), free(db);
}
Test(cpu_ops, linear_backward_weight) {
  for (int i = 0; i < SHAPES; i++)
    for (int variant = 0; variant < 8; variant++)
      check_backward_weight(shapes[i], variant & 1 ? PHX_GRAD_ADD : PHX_GRAD_WRITE,
                            variant & 2 ? PHX_GRAD_ADD : PHX_GRAD_WRITE, variant & 4);
}

Test(cpu_ops, bad_sizes_are_refused) {
  float x[4] = {0};
  cr_assert_eq(ops->linear(ops->ctx, PHX_F32, x, 0, NULL, x, x, NULL, 0, 2, 2, 0, NULL, &f.err), PHX_INVALID);
  cr_assert_eq(ops->linear(ops->ctx, PHX_F32, x, 1, NULL, x, x, NULL, 2, 2, 2, 0, NULL, &f.err), PHX_INVALID);
  cr_assert_eq(ops->layer_norm(ops->ctx, PHX_F32, x, NULL, x, x, x, x, x, x, 1, 2, 1e-5f, NULL, &f.err), PHX_INVALID);
  cr_assert_eq(ops->adamw(ops->ctx, x, x, x, x, x, PHX_I32, 1, 1, 1, 0, 0, 1, 1, 1, 0, NULL, &f.err), PHX_UNSUPPORTED);
}

/* ---- numerical gradients: loss(inputs) = sum of r * forward(inputs), derived in double ---- */
typedef double loss_fn(const double *values, const void *arg);
static double slope_of(loss_fn *loss, const void *arg, double *values, int64_t i) {
  const double step = 1e-5, middle = values[i];
  values[i] = middle + step;
  const double up = loss(values, arg);
  values[i] = middle - step;
  const double down = loss(values, arg);
  values[i] = middle;
  return (up - down) / (2 * step);
}

enum { GN = 5, GI = 30, GO = 17 };
typedef struct mlp {
  double r[GN * GO];
} mlp;
/* values: x(GN, GI) | w(GO, GI) | bias(GO); loss = sum r * (gelu(x) W^T + bias) */
static double mlp_loss(const double *values, const void *arg) {
  const double *x = values, *w = x + GN * GI, *bias = w + GO * GI, *r = ((const mlp *)arg)->r;
  double sum = 0;
  for (int i = 0; i < GN; i++)
    for (int j = 0; j < GO; j++) {
      double out = bias[j];
      for (int k = 0; k < GI; k++) out += ref_gelu(x[i * GI + k]) * w[j * GI + k];
      sum += r[i * GO + j] * out;
    }
  return sum;
}
Test(cpu_ops, numerical_gradient_of_linear_and_gelu) {
  enum { TOTAL = GN * GI + GO * GI + GO };
  float *p = random_array(TOTAL, 1, &state), *r = random_array(GN * GO, 1, &state), got[TOTAL];
  float h[GN * GI], *x = p, *w = p + GN * GI;
  double values[TOTAL];
  mlp arg;
  for (int i = 0; i < TOTAL; i++) values[i] = (double)p[i];
  for (int i = 0; i < GN * GO; i++) arg.r[i] = (double)r[i];
  for (int i = 0; i < GN * GI; i++) h[i] = (float)ref_gelu((double)x[i]);
  OK(ops->linear_backward_input(ops->ctx, PHX_F32, got, r, 0, w, x, GN, GI, GO, PHX_GRAD_WRITE, NULL, &f.err));
  OK(ops->linear_backward_weight(ops->ctx, PHX_F32, got + GN * GI, got + GN * GI + GO * GI, r, 0, h, GN, GI, GO,
                                 PHX_GRAD_WRITE, PHX_GRAD_WRITE, NULL, &f.err));
  for (int i = 0; i < TOTAL; i++) check_near("gradient", i, (double)got[i], slope_of(mlp_loss, &arg, values, i), 1e-5);
  free(p), free(r);
}

/* ---- layer norm ---- */
enum { LN = 69, LC = 30 }; /* more rows than one chunk and one block of column sums; C no multiple of 16 */
static const float eps = 1e-5f;
static void ref_norm(const double *x, const double *w, const double *bias, int64_t n, int64_t c, double *out) {
  for (int64_t i = 0; i < n; i++) {
    double mean = 0, var = 0;
    for (int64_t j = 0; j < c; j++) mean += x[i * c + j] / (double)c;
    for (int64_t j = 0; j < c; j++) var += (x[i * c + j] - mean) * (x[i * c + j] - mean) / (double)c;
    for (int64_t j = 0; j < c; j++) out[i * c + j] = (x[i * c + j] - mean) / sqrt(var + (double)eps) * w[j] + bias[j];
  }
}
static void check_layer_norm(int64_t n, int64_t c, int with_b, int with_sum) {
  float *a = random_array(n * c, 2, &state), *b = random_array(n * c, 1, &state), *w = random_array(c, 1, &state);
  float *bias = random_array(c, 1, &state), *out = poisoned_array(n * c), *sum = poisoned_array(n * c);
  float *mean = poisoned_array(n), *rstd = poisoned_array(n);
  double *x = malloc((size_t)(n * c) * sizeof *x), *want = malloc((size_t)(n * c) * sizeof *want);
  double *dw = malloc((size_t)c * sizeof *dw), *dbias = malloc((size_t)c * sizeof *dbias);
  for (int64_t i = 0; i < n * c; i++) x[i] = (double)(with_b ? a[i] + b[i] : a[i]);
  for (int64_t j = 0; j < c; j++) dw[j] = (double)w[j], dbias[j] = (double)bias[j];
  ref_norm(x, dw, dbias, n, c, want);
  OK(ops->layer_norm(ops->ctx, PHX_F32, out, with_sum ? sum : NULL, mean, rstd, a, with_b ? b : NULL, w, bias, n, c,
                     eps, NULL, &f.err));
  for (int64_t i = 0; i < n * c; i++) {
    check_near("out", i, (double)out[i], want[i], 4e-6);
    if (with_sum) cr_assert_eq((double)sum[i], x[i]);
  }
  for (int64_t i = 0; i < n; i++) cr_assert(isfinite(mean[i]) && rstd[i] > 0);
  free(a), free(b), free(w), free(bias), free(out), free(sum), free(mean), free(rstd);
  free(x), free(want), free(dw), free(dbias);
}
Test(cpu_ops, layer_norm) {
  const int64_t sizes[][2] = {{5, 30}, {3, 257}, {21, 64}, {1, 2}};
  for (int i = 0; i < 4; i++) {
    check_layer_norm(sizes[i][0], sizes[i][1], 0, 0);
    check_layer_norm(sizes[i][0], sizes[i][1], 0, 1);
    check_layer_norm(sizes[i][0], sizes[i][1], 1, 1);
  }
}

/* values: x(LN, LC) | w(LC) | bias(LC) */
typedef struct norm_loss_arg {
  double r[LN * LC];
} norm_loss_arg;
static double norm_loss(const double *values, const void *arg) {
  double out[LN * LC], sum = 0;
  ref_norm(values, values + LN * LC, values + LN * LC + LC, LN, LC, out);
  for (int i = 0; i < LN * LC; i++) sum += ((const norm_loss_arg *)arg)->r[i] * out[i];
  return sum;
}
Test(cpu_ops, numerical_gradient_of_layer_norm) {
  enum { X = LN * LC, TOTAL = X + 2 * LC };
  float *p = random_array(TOTAL, 1, &state), *r = random_array(X, 1, &state), *add = random_array(X, 1, &state);
  float out[X], mean[LN], rstd[LN], dx[X], in_place[X], dw[LC], db[LC], dw_added[LC], db_added[LC];
  double values[TOTAL];
  norm_loss_arg arg;
  for (int i = 0; i < TOTAL; i++) values[i] = (double)p[i];
  for (int i = 0; i < X; i++) arg.r[i] = (double)r[i], in_place[i] = add[i], dx[i] = NAN;
  for (int i = 0; i < LC; i++) dw[i] = db[i] = NAN, dw_added[i] = 1, db_added[i] = 2;
  OK(ops->layer_norm(ops->ctx, PHX_F32, out, NULL, mean, rstd, p, NULL, p + X, p + X + LC, LN, LC, eps, NULL, &f.err));
  OK(ops->layer_norm_backward(ops->ctx, PHX_F32, dx, NULL, dw, PHX_GRAD_WRITE, db, PHX_GRAD_WRITE, r, p, p + X, mean,
                              rstd, LN, LC, NULL, &f.err));
  OK(ops->layer_norm_backward(ops->ctx, PHX_F32, in_place, in_place, dw_added, PHX_GRAD_ADD, db_added, PHX_GRAD_ADD, r,
                              p, p + X, mean, rstd, LN, LC, NULL, &f.err));
  for (int i = 0; i < TOTAL; i++) {
    const double want = slope_of(norm_loss, &arg, values, i);
    if (i < X) {
      check_near("dx", i, (double)dx[i], want, 2e-5);
      check_near("dx + add", i, (double)in_place[i], want + (double)add[i], 2e-5);
    } else if (i < X + LC) {
      check_near("dw", i, (double)dw[i - X], want, 2e-5);
      check_near("dw added", i, (double)dw_added[i - X], want + 1, 2e-5);
    } else {
      check_near("db", i, (double)db[i - X - LC], want, 2e-5);
      check_near("db added", i, (double)db_added[i - X - LC], want + 2, 2e-5);
    }
  }
  float frozen[X];
  OK(ops->layer_norm_backward(ops->ctx, PHX_F32, frozen, NULL, NULL, 0, NULL, 0, r, p, p + X, mean, rstd, LN, LC, NULL,
                              &f.err));
  cr_assert_eq(memcmp(frozen, dx, sizeof dx), 0);
  free(p), free(r), free(add);
}

/* ---- embedding ---- */
Test(cpu_ops, embedding_and_its_gradient) {
  enum { B = 3, T = 5, C = 30, V = 257, MAX_T = 8 };
  const int32_t tokens[B * T] = {0, 256, 7, 7, 1, 7, 256, 3, 2, 1, 9, 0, 7, 5, 256};
  float *wte = random_array(V * C, 1, &state), *wpe = random_array(MAX_T * C, 1, &state);
  float *out = poisoned_array(B * T * C), *dout = random_array(B * T * C, 1, &state);
  float *dwte = poisoned_array(V * C), *dwpe = poisoned_array(MAX_T * C);
  OK(ops->embedding(ops->ctx, PHX_F32, out, tokens, wte, wpe, B, T, C, NULL, &f.err));
  for (int i = 0; i < B * T * C; i++) cr_assert_eq(out[i], wte[tokens[i / C] * C + i % C] + wpe[i / C % T * C + i % C]);
  for (int turn = 1; turn <= 2; turn++) { /* write, then add the same again */
    const int32_t mode = turn == 1 ? PHX_GRAD_WRITE : PHX_GRAD_ADD;
    OK(ops->embedding_backward(ops->ctx, PHX_F32, dwte, mode, dwpe, mode, dout, tokens, B, T, C, V, MAX_T, NULL,
                               &f.err));
    for (int i = 0; i < V * C; i++) { /* the forward is linear: its numerical derivative is the sum itself */
      double want = 0;
      for (int row = 0; row < B * T; row++) want += tokens[row] == i / C ? (double)dout[row * C + i % C] : 0;
      check_near("dwte", i, (double)dwte[i], want * turn, 2e-6);
    }
    for (int i = 0; i < MAX_T * C; i++) {
      double want = 0;
      for (int row = 0; row < B * T; row++) want += row % T == i / C ? (double)dout[row * C + i % C] : 0;
      check_near("dwpe", i, (double)dwpe[i], want * turn, 2e-6);
    }
  }
  float *alone = poisoned_array(MAX_T * C);
  OK(ops->embedding_backward(ops->ctx, PHX_F32, NULL, 0, alone, PHX_GRAD_WRITE, dout, tokens, B, T, C, V, MAX_T, NULL,
                             &f.err));
  cr_assert(isfinite(alone[0]) && alone[MAX_T * C - 1] == 0);
  cr_assert_eq(
      ops->embedding_backward(ops->ctx, PHX_F32, dwte, 0, dwpe, 0, dout, tokens, B, T, C, V - 1, MAX_T, NULL, &f.err),
      PHX_INVALID);
  cr_assert(strstr(f.err.message, "256"), "%s", f.err.message);
  cr_assert_eq(
      ops->embedding_backward(ops->ctx, PHX_F32, dwte, 0, dwpe, 0, dout, tokens, B, T, C, V, T - 1, NULL, &f.err),
      PHX_INVALID);
  free(wte), free(wpe), free(out), free(dout), free(dwte), free(dwpe), free(alone);
}

/* ---- elementwise ---- */
Test(cpu_ops, adamw_and_sgd_follow_their_formulas) {
  enum { M = 1111, STEPS = 5 };
  const double b1 = 0.9, b2 = 0.95, lr = 1e-2, e = 1e-8, decay = 0.1, by = 0.5;
  float *w = random_array(M, 1, &state), *s = malloc(M * sizeof *s), *m = calloc(M, sizeof *m),
        *v = calloc(M, sizeof *v);
  double dw[M], dm[M], dv[M], ds[M];
  float low[M];
  for (int i = 0; i < M; i++) s[i] = w[i], dw[i] = ds[i] = (double)w[i], dm[i] = dv[i] = 0;
  for (int step = 1; step <= STEPS; step++) {
    float *g = random_array(M, 1, &state);
    const double c1 = 1 - pow(b1, step), c2 = 1 - pow(b2, step);
    OK(ops->adamw(ops->ctx, w, g, m, v, low, PHX_F32, M, (float)by, (float)lr, (float)b1, (float)b2, (float)c1,
                  (float)c2, (float)e, (float)decay, NULL, &f.err));
    OK(ops->sgd(ops->ctx, s, g, NULL, 0, M, (float)by, (float)lr, (float)decay, NULL, &f.err));
    for (int i = 0; i < M; i++) {
      const double gs = (double)g[i] * by;
      dm[i] = b1 * dm[i] + (1 - b1) * gs;
      dv[i] = b2 * dv[i] + (1 - b2) * gs * gs;
      dw[i] -= lr * (dm[i] / c1 / (sqrt(dv[i] / c2) + e) + decay * dw[i]);
      ds[i] -= lr * (gs + decay * ds[i]);
    }
    free(g);
  }
  for (int i = 0; i < M; i++) {
    check_near("m", i, (double)m[i], dm[i], 1e-6);
    check_near("v", i, (double)v[i], dv[i], 1e-6);
    check_near("adamw", i, (double)w[i], dw[i], 1e-5 * STEPS);
    check_near("sgd", i, (double)s[i], ds[i], 1e-6);
    cr_assert_eq(low[i], w[i]);
  }
  free(w), free(s), free(m), free(v);
}

/* To the last bit: the formula in fp32, one operation after the other (the tests too are compiled without contraction).
 */
Test(cpu_ops, adamw_and_sgd_are_the_formula_to_the_last_bit) {
  enum { M = 1031 };
  const float b1 = 0.9f, b2 = 0.95f, c1 = 0.271f, c2 = 0.142625f, lr = 3e-4f, e = 1e-8f, decay = 0.1f, by = 0.37f;
  float *w = random_array(M, 1, &state), *g = random_array(M, 1e-2f, &state), *m = random_array(M, 1e-2f, &state);
  float *v = random_array(M, 1e-4f, &state), *s = random_array(M, 1, &state), want_w[M], want_m[M], want_v[M],
        want_s[M];
  for (int i = 0; i < M; i++) {
    v[i] = fabsf(v[i]);
    const float gs = g[i] * by;
    want_m[i] = b1 * m[i] + (1.0f - b1) * gs;
    want_v[i] = b2 * v[i] + (1.0f - b2) * (gs * gs);
    want_w[i] = w[i] - lr * (want_m[i] / c1 / (sqrtf(want_v[i] / c2) + e) + decay * w[i]);
    want_s[i] = s[i] - lr * (gs + decay * s[i]);
  }
  OK(ops->adamw(ops->ctx, w, g, m, v, NULL, 0, M, by, lr, b1, b2, c1, c2, e, decay, NULL, &f.err));
  OK(ops->sgd(ops->ctx, s, g, NULL, 0, M, by, lr, decay, NULL, &f.err));
  cr_assert_eq(memcmp(w, want_w, sizeof want_w), 0);
  cr_assert_eq(memcmp(m, want_m, sizeof want_m), 0);
  cr_assert_eq(memcmp(v, want_v, sizeof want_v), 0);
  cr_assert_eq(memcmp(s, want_s, sizeof want_s), 0);
  free(w), free(g), free(m), free(v), free(s);
}

Test(cpu_ops, add_and_block_norms) {
  enum { BLOCKS = 5 };
  float *a = random_array(BLOCKS * PHX_BLOCK, 1, &state), *b = random_array(BLOCKS * PHX_BLOCK, 1e-3f, &state);
  float *sum = poisoned_array(BLOCKS * PHX_BLOCK);
  double norms[BLOCKS + 1] = {[BLOCKS] = -1};
  OK(ops->add(ops->ctx, PHX_F32, sum, a, b, 777, NULL, &f.err));
  for (int i = 0; i < 777; i++) cr_assert_eq(sum[i], a[i] + b[i]);
  cr_assert(isnan(sum[777]));
  OK(ops->block_norms(ops->ctx, norms, a, BLOCKS, NULL, &f.err));
  for (int i = 0; i < BLOCKS; i++) {
    const double want = ref_dot(a + i * PHX_BLOCK, 1, a + i * PHX_BLOCK, 1, PHX_BLOCK);
    check_near("norm", i, norms[i], want, 1e-12 * want);
  }
  cr_assert_eq(norms[BLOCKS], -1);
  OK(ops->add(ops->ctx, PHX_F32, a, a, a, BLOCKS * PHX_BLOCK, NULL, &f.err));
  double more[BLOCKS];
  OK(ops->block_norms(ops->ctx, more, a, BLOCKS, NULL, &f.err));
  for (int i = 0; i < BLOCKS; i++) cr_assert_eq(more[i], 4 * norms[i], "doubling is exact");
  free(a), free(b), free(sum);
}

/* ---- what must not change bits: the number of threads, the place in memory, the instruction set ---- */
enum { MN = 333, MC = 130, MV = 40 };
typedef struct results { /* of operations without a product */
  float out[MN * MC], mean[MN], rstd[MN], dx[MN * MC], dw[MC], db[MC], dwte[MV * MC], dwpe[MN * MC], bias[MC],
      embedded[MN * MC];
  double norms[MN * MC / PHX_BLOCK];
} results;
static int run_own(const phx_ops *o, results *r) {
  uint64_t seed = 99;
  float *x = random_array(MN * MC, 1, &seed), *w = random_array(MC, 1, &seed), *dout = random_array(MN * MC, 1, &seed);
  int32_t tokens[MN];
  float one[MN], dw[MC];
  for (int i = 0; i < MN; i++) tokens[i] = i * 7 % MV, one[i] = 1;
  int bad = o->layer_norm(o->ctx, PHX_F32, r->out, NULL, r->mean, r->rstd, x, NULL, w, w, MN, MC, eps, NULL, NULL);
  bad |= o->layer_norm_backward(o->ctx, PHX_F32, r->dx, x, r->dw, PHX_GRAD_WRITE, r->db, PHX_GRAD_WRITE, dout, x, w,
                                r->mean, r->rstd, MN, MC, NULL, NULL);
  bad |= o->embedding(o->ctx, PHX_F32, r->embedded, tokens, dout, x, 1, MV, MC, NULL, NULL);
  bad |= o->embedding_backward(o->ctx, PHX_F32, r->dwte, PHX_GRAD_WRITE, r->dwpe, PHX_GRAD_WRITE, dout, tokens, 1, MN,
                               MC, MV, MN, NULL, NULL);
  bad |= o->linear_backward_weight(o->ctx, PHX_F32, dw, r->bias, dout, 0, one, MN, 1, MC, PHX_GRAD_WRITE,
                                   PHX_GRAD_WRITE, NULL, NULL);
  bad |= o->block_norms(o->ctx, r->norms, r->out, MN * MC / PHX_BLOCK, NULL, NULL);
  free(x), free(w), free(dout);
  return bad;
}

Test(cpu_ops, threads_do_not_change_bits_of_own_kernels) {
  results *one = calloc(1, sizeof *one), *more = calloc(1, sizeof *more);
  cr_assert_eq(run_own(ops, one), 0);
  for (int threads = 2; threads <= THREADS_MAX; threads++) {
    device_ops g;
    memset(more, 0, sizeof *more);
    cr_assert_eq(device_ops_open(&g, threads, NULL, &g.err), PHX_OK);
    cr_assert_eq(g.device->threads, threads);
    cr_assert_eq(run_own(g.ops, more), 0);
    cr_assert_eq(memcmp(one, more, sizeof *one), 0, "%d threads", threads);
    device_ops_close(&g);
  }
  free(one), free(more);
}

Test(cpu_ops, pointers_do_not_change_bits) {
  enum { n = 65, ic = 96, oc = 160, MOVES = 4 };
  float *first = NULL;
  for (int move = 0; move < MOVES; move++) {
    void *room = NULL;
    cr_assert_eq(posix_memalign(&room, 4096, 1 << 20), 0);
    float *x = (float *)room + 64 * move, *w = x + n * ic / 64 * 64 + 64 * (1 + move), *out = w + oc * ic + 64 * move;
    uint64_t seed = 5;
    for (int i = 0; i < n * ic; i++) x[i] = random_float(&seed);
    for (int i = 0; i < oc * ic; i++) w[i] = random_float(&seed);
    OK(ops->linear(ops->ctx, PHX_F32, out, 0, NULL, x, w, NULL, n, ic, oc, 1, NULL, &f.err));
    if (!first) first = memcpy(malloc(n * oc * sizeof *first), out, n * oc * sizeof *first);
    cr_assert_eq(memcmp(first, out, n * oc * sizeof *first), 0, "move %d", move);
    free(room);
  }
  free(first);
}

typedef struct isa_results {
  results own;
  float linear[GN * GO];
} isa_results;
static void run_isa(const char *isa, isa_results *r) { /* a process of its own: see oneDNN's limit in product.c */
  const pid_t child = fork();
  if (child == 0) {
    device_ops g;
    uint64_t seed = 3;
    int bad = device_ops_open(&g, 1, isa, &g.err);
    if (bad) _exit(2);
    float *x = random_array(GN * GI, 1, &seed), *w = random_array(GO * GI, 1, &seed);
    bad |= run_own(g.ops, &r->own);
    bad |= g.ops->linear(g.ops->ctx, PHX_F32, r->linear, 0, NULL, x, w, NULL, GN, GI, GO, 1, NULL, NULL);
    _exit(bad != 0);
  }
  int status = -1;
  cr_assert_eq(waitpid(child, &status, 0), child);
  cr_assert_eq(status, 0, "isa %s", isa);
}
Test(cpu_isa, instruction_sets_agree, .timeout = 120) { /* a suite without a device of its own */
  isa_results *r = mmap(NULL, 2 * sizeof *r, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  cr_assert_neq(r, MAP_FAILED);
  const char *isas[] = {"base", "avx2", "avx512"};
  const int sets = device_ops_sets();
  run_isa(isas[0], &r[0]);
  for (int i = 1; i < sets; i++) {
    run_isa(isas[i], &r[1]);
    cr_assert_eq(memcmp(&r[0].own, &r[1].own, sizeof r->own), 0, "%s", isas[i]);
    for (int j = 0; j < GN * GO; j++) check_near("linear", j, (double)r[1].linear[j], (double)r[0].linear[j], 1e-5);
  }
  munmap(r, 2 * sizeof *r);
}
