/* plugins/cpu/ops_linear.c - the linear layer and its gradients: a product by oneDNN, and one pass for bias and GELU.
 *
 * The pass follows the product in chunks of rows, while the chunk is still in the last level of cache.  Invariant: how
 * rows are chunked depends on the shape alone.  [main] */
#include "columns.h"
#include "cpu.h"
#include "simd.h"

/* Rows per chunk: CHUNK floats of output, but not so few rows that packing the weights again would show. */
enum { CHUNK = 2 << 20, CHUNK_ROWS = 256 };
static int64_t chunk_rows(int64_t n, int64_t columns) {
  const int64_t rows = CHUNK / columns < CHUNK_ROWS ? CHUNK_ROWS : CHUNK / columns / 16 * 16;
  return rows < n ? rows : n;
}

static phx_status check(int64_t n, int64_t ic, int64_t oc, int64_t ld, phx_error *err) {
  if (n >= 1 && ic >= 1 && oc >= 1 && ld >= oc) return PHX_OK;
  return phx__cpu_fail(err, PHX_INVALID, "cpu: linear of %lld rows, %lld to %lld channels, row length %lld",
                       (long long)n, (long long)ic, (long long)oc, (long long)ld);
}

typedef struct pass_args {
  float *out, *pre; /* pre: where the product is, NULL: in out */
  const float *bias;
  int64_t out_ld, columns;
  int32_t gelu;
} pass_args;

/* out = f(in + bias), in = pre or out; pre += bias */
static inline void pass_vector(const pass_args *a, float *out, float *pre, int64_t j, int64_t n) {
  const int whole = n == PHX__LANES;
  const float *in = pre ? pre : out;
  phx__vf x = whole ? phx__load(in + j) : phx__load_part(in + j, n);
  if (a->bias) x += whole ? phx__load(a->bias + j) : phx__load_part(a->bias + j, n);
  if (pre && a->bias) whole ? phx__store(pre + j, x) : phx__store_part(pre + j, x, n);
  if (a->gelu) x = phx__vgelu(x);
  whole ? phx__store(out + j, x) : phx__store_part(out + j, x, n);
}
static void pass_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const pass_args *a = arg;
  (void)worker;
  for (int64_t row = first; row < last; row++) {
    float *out = a->out + row * a->out_ld, *pre = a->pre ? a->pre + row * a->columns : NULL;
    int64_t j = 0;
    for (; j + PHX__LANES <= a->columns; j += PHX__LANES) pass_vector(a, out, pre, j, PHX__LANES);
    if (j < a->columns) pass_vector(a, out, pre, j, a->columns - j);
  }
}

phx_status phx__cpu_linear(void *ctx, int32_t dtype, void *out, int64_t out_ld, void *pre, const void *x, const void *w,
                           const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t gelu, phx_stream *s,
                           phx_error *err) {
  float *const out_f = out, *const pre_f = pre;
  const float *const x_f = x;
  const int64_t ld = out_ld ? out_ld : oc;
  const int pass = bias || gelu || pre;
  phx_status status = check(n, ic, oc, ld, err);
  if (status == PHX_OK) status = phx__cpu_begin(ctx, dtype, s, err);
  const int64_t step = pass && status == PHX_OK ? chunk_rows(n, oc) : n;
  for (int64_t at = 0; at < n && status == PHX_OK; at += step) {
    const int64_t rows = n - at < step ? n - at : step;
    float *to = pre ? pre_f + at * oc : out_f + at * ld;
    status = phx__cpu_product(ctx, 0, 1, rows, oc, ic, x_f + at * ic, ic, w, ic, to, pre ? oc : ld, 0, err);
    if (status == PHX_OK && pass)
      phx__cpu_parallel(ctx, rows, 1, pass_body, &(pass_args){out_f + at * ld, pre ? to : NULL, bias, ld, oc, gelu});
  }
  return status;
}

/* dx (=|+=) product * GELU'(pre); the product is in dx itself (in place) or in a temporary. */
typedef struct slope_args {
  float *dx;
  const float *product, *pre;
  int64_t columns;
} slope_args;
static inline void slope_vector(const slope_args *a, int64_t i, int64_t n) {
  const int whole = n == PHX__LANES;
  phx__vf x = whole ? phx__load(a->product + i) : phx__load_part(a->product + i, n);
  x *= phx__vgelu_slope(whole ? phx__load(a->pre + i) : phx__load_part(a->pre + i, n));
  if (a->product != a->dx) x += whole ? phx__load(a->dx + i) : phx__load_part(a->dx + i, n);
  whole ? phx__store(a->dx + i, x) : phx__store_part(a->dx + i, x, n);
}
static void slope_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const slope_args *a = arg;
  (void)worker;
  int64_t i = first;
  for (; i + PHX__LANES <= last; i += PHX__LANES) slope_vector(a, i, PHX__LANES);
  if (i < last) slope_vector(a, i, last - i);
}

phx_status phx__cpu_linear_backward_input(void *ctx, int32_t dtype, void *dx, const void *dout, int64_t dout_ld,
                                          const void *w, const void *pre, int64_t n, int64_t ic, int64_t oc,
                                          int32_t mode, phx_stream *s, phx_error *err) {
  phx__cpu *cpu = ctx;
  float *const dx_f = dx;
  const float *const dout_f = dout, *const pre_f = pre;
  const int64_t ld = dout_ld ? dout_ld : oc;
  const int apart = pre && mode == PHX_GRAD_ADD; /* the product must not meet dx before its slope */
  void *scratch = NULL;
  phx_status status = check(n, ic, oc, ld, err);
  if (status == PHX_OK) status = phx__cpu_begin(ctx, dtype, s, err);
  if (status == PHX_OK && apart) status = phx__cpu_scratch(cpu, &scratch, err);
  if (status != PHX_OK) return status;
  int64_t step = pre ? chunk_rows(n, ic) : n;
  if (apart && step > cpu->scratch_bytes / 4 / ic) step = cpu->scratch_bytes / 4 / ic;
  if (step < 1)
    return phx__cpu_fail(err, PHX_UNSUPPORTED,
                         "cpu: linear_backward_input adds through GELU: a row of %lld is too long", (long long)ic);
  for (int64_t at = 0; at < n && status == PHX_OK; at += step) {
    const int64_t rows = n - at < step ? n - at : step;
    float *to = apart ? scratch : dx_f + at * ic;
    status = phx__cpu_product(ctx, 0, 0, rows, ic, oc, dout_f + at * ld, ld, w, ic, to, ic,
                              mode == PHX_GRAD_ADD && !apart, err);
    if (status == PHX_OK && pre)
      phx__cpu_parallel(ctx, rows * ic, 1024, slope_body, &(slope_args){dx_f + at * ic, to, pre_f + at * ic, ic});
  }
  return status;
}

typedef struct bias_args {
  float *db;
  const float *dout;
  int64_t ld, n;
  int32_t mode;
} bias_args;
static void bias_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const bias_args *a = arg;
  (void)worker;
  for (int64_t row = 0; row < a->n; row += PHX__COLUMN_ROWS) {
    const int64_t rows = a->n - row < PHX__COLUMN_ROWS ? a->n - row : PHX__COLUMN_ROWS;
    phx__column_sums(a->db, a->dout + row * a->ld, a->ld, rows, first, last, row == 0 && a->mode == PHX_GRAD_WRITE);
  }
}

phx_status phx__cpu_linear_backward_weight(void *ctx, int32_t dtype, float *dw, float *db, const void *dout,
                                           int64_t dout_ld, const void *x, int64_t n, int64_t ic, int64_t oc,
                                           int32_t w_mode, int32_t b_mode, phx_stream *s, phx_error *err) {
  const int64_t ld = dout_ld ? dout_ld : oc;
  phx_status status = check(n, ic, oc, ld, err);
  if (status == PHX_OK) status = phx__cpu_begin(ctx, dtype, s, err);
  if (status == PHX_OK && dw)
    status = phx__cpu_product(ctx, 1, 0, oc, ic, n, dout, ld, x, ic, dw, ic, w_mode == PHX_GRAD_ADD, err);
  if (status == PHX_OK && db) phx__cpu_parallel(ctx, oc, 64, bias_body, &(bias_args){db, dout, ld, n, b_mode});
  return status;
}
