/* plugins/cpu/ops_norm.c - layer norm and its gradients.  arXiv 1607.06450.
 *
 * Row sums use 16 lanes and one tree; the gradients of weight and bias are summed by columns (columns.h), so bits
 * depend neither on the instruction set nor on the number of threads.  [main] */
#include <math.h>
#include "columns.h"
#include "cpu.h"
#include "simd.h"

/* sum of x[j] (y NULL) or of (x[j] - minus) ^ 2 (square) over the row */
PHX__INLINE float row_sum(int32_t dtype, const void *x, int64_t c, float minus, int square) {
  phx__v16 acc = {0};
  float lane[16];
  int64_t j = 0;
  for (; j + 16 <= c; j += 16)
    for (int p = 0; p < PHX__PARTS; p++) {
      const phx__vf v = phx__load_as(dtype, x, j + p * PHX__LANES) - minus;
      acc.part[p] += square ? v * v : v;
    }
  phx__lanes(lane, &acc);
  for (int l = 0; j < c; j++, l++) {
    const float v = phx__get(dtype, x, j) - minus;
    lane[l] += square ? v * v : v;
  }
  return phx__sum_lanes(lane);
}

typedef struct forward_args {
  void *out, *sum;
  float *mean, *rstd;
  const void *a, *b, *w, *bias;
  int64_t c;
  float eps;
  int32_t dtype;
} forward_args;
/* The norm is that of the sum as it is kept: backward reads no other. */
PHX__INLINE void forward_rows(int32_t dtype, const forward_args *f, int64_t first, int64_t last) {
  const int64_t c = f->c;
  const void *restrict w = f->w, *restrict bias = f->bias;
  for (int64_t row = first; row < last; row++) {
    const void *x = phx__at(dtype, f->a, row * c);
    if (f->sum) {
      void *sum = phx__out_at(dtype, f->sum, row * c);
      if (f->b) {
        const void *b = phx__at(dtype, f->b, row * c);
        PHX__IVDEP for (int64_t j = 0; j < c; j++)
            phx__set(dtype, sum, j, phx__get(dtype, x, j) + phx__get(dtype, b, j));
      } else if (sum != x) {
        memcpy(sum, x, (size_t)c * phx_dtype_bytes(dtype));
      }
      x = sum;
    }
    const float mean = row_sum(dtype, x, c, 0.0f, 0) / (float)c;
    const float rstd = 1.0f / sqrtf(row_sum(dtype, x, c, mean, 1) / (float)c + f->eps);
    void *out = phx__out_at(dtype, f->out, row * c);
    PHX__IVDEP for (int64_t j = 0; j < c; j++) phx__set(
        dtype, out, j, (phx__get(dtype, x, j) - mean) * rstd * phx__get(dtype, w, j) + phx__get(dtype, bias, j));
    f->mean[row] = mean;
    f->rstd[row] = rstd;
  }
}
static void forward_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const forward_args *f = arg;
  (void)worker;
  PHX__BY_DTYPE(f->dtype, forward_rows, f, first, last);
}

phx_status phx__cpu_layer_norm(void *ctx, int32_t dtype, void *out, void *sum, float *mean, float *rstd, const void *a,
                               const void *b, const void *w, const void *bias, int64_t n, int64_t c, float eps,
                               phx_stream *s, phx_error *err) {
  if (n < 1 || c < 1)
    return phx_fail(err, PHX_INVALID, "cpu: layer norm of %lld rows of %lld", (long long)n, (long long)c);
  if (b && !sum) return phx_fail(err, PHX_INVALID, "cpu: layer norm of a + b needs a place for the sum");
  const phx_status status = phx__cpu_begin(ctx, dtype, s, err);
  if (status == PHX_OK)
    phx__cpu_parallel(ctx, n, 1, forward_body, &(forward_args){out, sum, mean, rstd, a, b, w, bias, c, eps, dtype});
  return status;
}

typedef struct backward_args {
  void *dx;
  float *dw, *db;
  const void *add, *dout, *x, *w;
  const float *mean, *rstd;
  int64_t c, first_row, rows; /* of this chunk */
  int32_t w_mode, b_mode, dtype;
} backward_args;

/* The two row sums: of d = dout * w and of d * norm. */
PHX__INLINE void row_dots(int32_t dtype, const void *dout, const void *x, const void *w, int64_t c, float mean,
                          float rstd, float *sum, float *dot) {
  phx__v16 s = {0}, t = {0};
  float lane_s[16], lane_t[16];
  int64_t j = 0;
  for (; j + 16 <= c; j += 16)
    for (int p = 0; p < PHX__PARTS; p++) {
      const int64_t i = j + p * PHX__LANES;
      const phx__vf d = phx__load_as(dtype, dout, i) * phx__load_as(dtype, w, i);
      s.part[p] += d;
      t.part[p] += d * ((phx__load_as(dtype, x, i) - mean) * rstd);
    }
  phx__lanes(lane_s, &s);
  phx__lanes(lane_t, &t);
  for (int l = 0; j < c; j++, l++) {
    const float d = phx__get(dtype, dout, j) * phx__get(dtype, w, j);
    lane_s[l] += d;
    lane_t[l] += d * ((phx__get(dtype, x, j) - mean) * rstd);
  }
  *sum = phx__sum_lanes(lane_s);
  *dot = phx__sum_lanes(lane_t);
}

/* An element of dx without what is added to it. */
#define SLOPE(j) \
  ((phx__get(dtype, dout, j) * phx__get(dtype, w, j) - sum - (phx__get(dtype, x, j) - mean) * rstd * dot) * rstd)
PHX__INLINE void backward_rows(int32_t dtype, const backward_args *a, int64_t first, int64_t last) {
  const int64_t c = a->c;
  const void *restrict w = a->w;
  for (int64_t row = a->first_row + first; row < a->first_row + last; row++) {
    const void *dout = phx__at(dtype, a->dout, row * c), *x = phx__at(dtype, a->x, row * c);
    const void *add = a->add ? phx__at(dtype, a->add, row * c) : NULL;
    const float mean = a->mean[row], rstd = a->rstd[row];
    void *dx = phx__out_at(dtype, a->dx, row * c);
    float sum, dot;
    row_dots(dtype, dout, x, w, c, mean, rstd, &sum, &dot);
    sum /= (float)c;
    dot /= (float)c;
    if (add) {
      PHX__IVDEP for (int64_t j = 0; j < c; j++) phx__set(dtype, dx, j, phx__get(dtype, add, j) + SLOPE(j));
    } else {
      PHX__IVDEP for (int64_t j = 0; j < c; j++) phx__set(dtype, dx, j, SLOPE(j));
    }
  }
}
static void rows_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const backward_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, backward_rows, a, first, last);
}

PHX__INLINE void backward_columns(int32_t dtype, const backward_args *a, int64_t first, int64_t last) {
  const int64_t c = a->c, end = a->first_row + a->rows;
  for (int64_t row = a->first_row; row < end; row += PHX__COLUMN_ROWS) {
    const int64_t rows = end - row < PHX__COLUMN_ROWS ? end - row : PHX__COLUMN_ROWS;
    const void *restrict dout = phx__at(dtype, a->dout, row * c), *restrict x = phx__at(dtype, a->x, row * c);
    const float *restrict mean = a->mean + row, *restrict rstd = a->rstd + row;
    if (a->db) phx__column_sums(dtype, a->db, dout, c, rows, first, last, row == 0 && a->b_mode == PHX_GRAD_WRITE);
    if (!a->dw) continue;
    const int fresh = row == 0 && a->w_mode == PHX_GRAD_WRITE;
    float *restrict dw = a->dw;
    for (int64_t j = first; j < last; j += 256) { /* a strip of sums stays in the first cache */
      float sum[256];
      const int64_t n = last - j < 256 ? last - j : 256;
      for (int64_t i = 0; i < n; i++)
        sum[i] = phx__get(dtype, dout, j + i) * ((phx__get(dtype, x, j + i) - mean[0]) * rstd[0]);
      for (int64_t r = 1; r < rows; r++)
        for (int64_t i = 0; i < n; i++)
          sum[i] += phx__get(dtype, dout, r * c + j + i) * ((phx__get(dtype, x, r * c + j + i) - mean[r]) * rstd[r]);
      for (int64_t i = 0; i < n; i++) dw[j + i] = fresh ? sum[i] : dw[j + i] + sum[i];
    }
  }
}

static void columns_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const backward_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, backward_columns, a, first, last);
}

/* Chunks of rows, so that the columns are summed while the rows are in the cache.  dx is written after dout was read by
 * the columns, not before: they are different arrays, but dx may be add. */
phx_status phx__cpu_layer_norm_backward(void *ctx, int32_t dtype, void *dx, const void *add, float *dw, int32_t w_mode,
                                        float *db, int32_t b_mode, const void *dout, const void *x, const void *w,
                                        const float *mean, const float *rstd, int64_t n, int64_t c, phx_stream *s,
                                        phx_error *err) {
  enum { ROWS = 64 };
  if (n < 1 || c < 1)
    return phx_fail(err, PHX_INVALID, "cpu: layer norm of %lld rows of %lld", (long long)n, (long long)c);
  PHX_TRY(phx__cpu_begin(ctx, dtype, s, err));
  backward_args a = {dx, dw, db, add, dout, x, w, mean, rstd, c, 0, 0, w_mode, b_mode, dtype};
  for (; a.first_row < n; a.first_row += ROWS) {
    a.rows = n - a.first_row < ROWS ? n - a.first_row : ROWS;
    if (dw || db) phx__cpu_parallel(ctx, c, 64, columns_body, &a);
    phx__cpu_parallel(ctx, a.rows, 1, rows_body, &a);
  }
  return PHX_OK;
}
