/* plugins/cpu/ops_linear.c - the linear layer and its gradients: a product by oneDNN, and one pass for bias and GELU.
 *
 * In fp32 the product goes where the result will be, and the pass follows it in chunks of rows, while the chunk is
 * still in the last level of cache.  In bf16 it goes, in fp32, to a tile in the scratch, and the pass rounds: once.
 * Gradients of weights are fp32 and need no pass.  Invariant: how rows and columns are cut depends on the shape alone.
 * [main] */
#include "columns.h"
#include "cpu.h"
#include "simd.h"

/* Rows per chunk: CHUNK floats of output, but not so few rows that packing the weights again would show. */
enum { CHUNK = 2 << 20, CHUNK_ROWS = 256, TILE_ROWS = 1024 };
static int64_t chunk_rows(int64_t n, int64_t columns) {
  const int64_t rows = CHUNK / columns < CHUNK_ROWS ? CHUNK_ROWS : CHUNK / columns / 16 * 16;
  return rows < n ? rows : n;
}

static phx_status check(int64_t n, int64_t ic, int64_t oc, int64_t ld, phx_error *err) {
  if (n >= 1 && ic >= 1 && oc >= 1 && ld >= oc) return PHX_OK;
  return phx_fail(err, PHX_INVALID, "cpu: linear of %lld rows, %lld to %lld channels, row length %lld",
                  (long long)n, (long long)ic, (long long)oc, (long long)ld);
}

/* ---- products of either dtype ---- */

/* What a pass works on: a tile of an fp32 product, at row and column 0 of what it becomes. */
typedef struct tile {
  float *p;
  int64_t ld, row, column, rows, columns;
} tile;

/* a and b, as in phx__cpu_product; an element is of `dtype`. */
typedef struct factors {
  int32_t dtype, a_t, b_t;
  const void *a, *b;
  int64_t lda, ldb, k;
} factors;

/* Rows [t->row, + rows) and columns [t->column, + columns) of the product, into the tile. */
static phx_status product_tile(phx__cpu *cpu, const factors *x, const tile *t, int32_t accumulate, phx_error *err) {
  const void *a = phx__at(x->dtype, x->a, x->a_t ? t->row : t->row * x->lda);
  const void *b = phx__at(x->dtype, x->b, x->b_t ? t->column * x->ldb : t->column);
  if (x->dtype == PHX_BF16)
    return phx__cpu_product_bf16(cpu, x->a_t, x->b_t, t->rows, t->columns, x->k, a, x->lda, b, x->ldb, t->p, t->ld,
                                 accumulate, err);
  return phx__cpu_product(cpu, x->a_t, x->b_t, t->rows, t->columns, x->k, a, x->lda, b, x->ldb, t->p, t->ld, accumulate,
                          err);
}

/* The product of (n, columns) in tiles in the scratch, each followed by the pass. */
typedef struct tiled {
  factors x;
  void (*pass)(void *arg, const tile *t);
  void *arg;
} tiled;
static phx_status product_in_tiles(phx__cpu *cpu, const tiled *w, int64_t n, int64_t columns, phx_error *err) {
  void *scratch = NULL;
  phx_status status = phx__cpu_scratch(cpu, &scratch, err);
  const int64_t rows = n < TILE_ROWS ? n : TILE_ROWS;
  const int64_t most = PHX__CPU_TILE_BYTES / 4 / rows / 16 * 16, width = columns < most ? columns : most;
  for (int64_t row = 0; row < n && status == PHX_OK; row += rows)
    for (int64_t column = 0; column < columns && status == PHX_OK; column += width) {
      const tile t = {scratch,
                      columns - column < width ? columns - column : width,
                      row,
                      column,
                      n - row < rows ? n - row : rows,
                      columns - column < width ? columns - column : width};
      status = product_tile(cpu, &w->x, &t, 0, err);
      if (status == PHX_OK) w->pass(w->arg, &t);
    }
  return status;
}

/* ---- forward ---- */

typedef struct pass_args {
  phx__cpu *cpu;
  const tile *t;
  void *out, *pre; /* pre: kept, or NULL */
  const void *bias;
  int64_t out_ld, pre_ld;
  int32_t gelu, dtype;
} pass_args;

/* out = f(product + bias), pre = product + bias; the product may be in out or pre itself */
PHX__INLINE void pass_vector(int32_t dtype, const pass_args *a, const float *in, void *out, void *pre, int64_t j,
                             int64_t n) {
  const int whole = n == PHX__LANES;
  const int64_t column = a->t->column + j;
  phx__vf x = whole ? phx__load(in + j) : phx__load_part(in + j, n);
  if (a->bias) x += whole ? phx__load_as(dtype, a->bias, column) : phx__load_part_as(dtype, a->bias, column, n);
  if (pre && (a->bias || (const void *)in != pre))
    whole ? phx__store_as(dtype, pre, j, x) : phx__store_part_as(dtype, pre, j, x, n);
  if (a->gelu) x = phx__vgelu(x);
  whole ? phx__store_as(dtype, out, j, x) : phx__store_part_as(dtype, out, j, x, n);
}
PHX__INLINE void pass_rows(int32_t dtype, const pass_args *a, int64_t first, int64_t last) {
  const tile *t = a->t;
  for (int64_t row = first; row < last; row++) {
    const float *in = t->p + row * t->ld;
    void *out = phx__out_at(dtype, a->out, (t->row + row) * a->out_ld + t->column);
    void *pre = a->pre ? phx__out_at(dtype, a->pre, (t->row + row) * a->pre_ld + t->column) : NULL;
    int64_t j = 0;
    for (; j + PHX__LANES <= t->columns; j += PHX__LANES) pass_vector(dtype, a, in, out, pre, j, PHX__LANES);
    if (j < t->columns) pass_vector(dtype, a, in, out, pre, j, t->columns - j);
  }
}
static void pass_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const pass_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, pass_rows, a, first, last);
}
static void pass(void *arg, const tile *t) {
  pass_args *a = arg;
  a->t = t;
  phx__cpu_parallel(a->cpu, t->rows, 1, pass_body, a);
}

phx_status phx__cpu_linear(void *ctx, int32_t dtype, void *out, int64_t out_ld, void *pre, const void *x, const void *w,
                           const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t gelu, phx_stream *s,
                           phx_error *err) {
  const int64_t ld = out_ld ? out_ld : oc;
  phx_status status = check(n, ic, oc, ld, err);
  if (status == PHX_OK) status = phx__cpu_begin(ctx, dtype, s, err);
  if (status != PHX_OK) return status;
  pass_args args = {ctx, NULL, out, pre, bias, ld, oc, gelu, dtype};
  const factors f = {dtype, 0, 1, x, w, ic, ic, ic};
  if (dtype == PHX_BF16) return product_in_tiles(ctx, &(tiled){f, pass, &args}, n, oc, err);
  const int passes = bias || gelu || pre;
  const int64_t step = passes ? chunk_rows(n, oc) : n, to_ld = pre ? oc : ld;
  for (int64_t at = 0; at < n && status == PHX_OK; at += step) {
    const tile t = {(float *)(pre ? pre : out) + at * to_ld, to_ld, at, 0, n - at < step ? n - at : step, oc};
    status = product_tile(ctx, &f, &t, 0, err);
    if (status == PHX_OK && passes) pass(&args, &t);
  }
  return status;
}

/* ---- gradient of the input ---- */

/* dx (=|+=) product * GELU'(pre); the product may be in dx itself (then it is not added). */
typedef struct slope_args {
  phx__cpu *cpu;
  const tile *t;
  void *dx;
  const void *pre;
  int64_t ld;
  int32_t add, dtype;
} slope_args;
PHX__INLINE void slope_vector(int32_t dtype, const slope_args *a, const float *in, void *dx, const void *pre, int64_t j,
                              int64_t n) {
  const int whole = n == PHX__LANES;
  phx__vf x = whole ? phx__load(in + j) : phx__load_part(in + j, n);
  if (pre) x *= phx__vgelu_slope(whole ? phx__load_as(dtype, pre, j) : phx__load_part_as(dtype, pre, j, n));
  if (a->add) x += whole ? phx__load_as(dtype, dx, j) : phx__load_part_as(dtype, dx, j, n);
  whole ? phx__store_as(dtype, dx, j, x) : phx__store_part_as(dtype, dx, j, x, n);
}
PHX__INLINE void slope_rows(int32_t dtype, const slope_args *a, int64_t first, int64_t last) {
  const tile *t = a->t;
  for (int64_t row = first; row < last; row++) {
    const float *in = t->p + row * t->ld;
    const int64_t at = (t->row + row) * a->ld + t->column;
    void *dx = phx__out_at(dtype, a->dx, at);
    const void *pre = a->pre ? phx__at(dtype, a->pre, at) : NULL;
    int64_t j = 0;
    for (; j + PHX__LANES <= t->columns; j += PHX__LANES) slope_vector(dtype, a, in, dx, pre, j, PHX__LANES);
    if (j < t->columns) slope_vector(dtype, a, in, dx, pre, j, t->columns - j);
  }
}
static void slope_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const slope_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, slope_rows, a, first, last);
}
static void slope(void *arg, const tile *t) {
  slope_args *a = arg;
  a->t = t;
  phx__cpu_parallel(a->cpu, t->rows, 1, slope_body, a);
}

phx_status phx__cpu_linear_backward_input(void *ctx, int32_t dtype, void *dx, const void *dout, int64_t dout_ld,
                                          const void *w, const void *pre, int64_t n, int64_t ic, int64_t oc,
                                          int32_t mode, phx_stream *s, phx_error *err) {
  phx__cpu *cpu = ctx;
  const int64_t ld = dout_ld ? dout_ld : oc;
  const int apart = pre && mode == PHX_GRAD_ADD; /* the product must not meet dx before its slope */
  void *scratch = NULL;
  phx_status status = check(n, ic, oc, ld, err);
  if (status == PHX_OK) status = phx__cpu_begin(ctx, dtype, s, err);
  if (status == PHX_OK && apart) status = phx__cpu_scratch(cpu, &scratch, err);
  if (status != PHX_OK) return status;
  slope_args args = {cpu, NULL, dx, pre, ic, dtype == PHX_BF16 ? mode == PHX_GRAD_ADD : apart, dtype};
  const factors f = {dtype, 0, 0, dout, w, ld, ic, oc};
  if (dtype == PHX_BF16) return product_in_tiles(cpu, &(tiled){f, slope, &args}, n, ic, err);
  int64_t step = pre ? chunk_rows(n, ic) : n;
  if (apart && step > cpu->scratch_bytes / 4 / ic) step = cpu->scratch_bytes / 4 / ic;
  if (step < 1)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "cpu: linear_backward_input adds through GELU: a row of %lld is too long", (long long)ic);
  for (int64_t at = 0; at < n && status == PHX_OK; at += step) {
    const tile t = {apart ? scratch : (float *)dx + at * ic, ic, at, 0, n - at < step ? n - at : step, ic};
    status = product_tile(cpu, &f, &t, mode == PHX_GRAD_ADD && !apart, err);
    if (status == PHX_OK && pre) slope(&args, &t);
  }
  return status;
}

/* ---- gradients of weight and bias ---- */

typedef struct bias_args {
  float *db;
  const void *dout;
  int64_t ld, n;
  int32_t mode, dtype;
} bias_args;
PHX__INLINE void bias_columns(int32_t dtype, const bias_args *a, int64_t first, int64_t last) {
  for (int64_t row = 0; row < a->n; row += PHX__COLUMN_ROWS) {
    const int64_t rows = a->n - row < PHX__COLUMN_ROWS ? a->n - row : PHX__COLUMN_ROWS;
    const int fresh = row == 0 && a->mode == PHX_GRAD_WRITE;
    phx__column_sums(dtype, a->db, phx__at(dtype, a->dout, row * a->ld), a->ld, rows, first, last, fresh);
  }
}
static void bias_body(void *arg, int64_t first, int64_t last, int32_t worker) {
  const bias_args *a = arg;
  (void)worker;
  PHX__BY_DTYPE(a->dtype, bias_columns, a, first, last);
}

phx_status phx__cpu_linear_backward_weight(void *ctx, int32_t dtype, float *dw, float *db, const void *dout,
                                           int64_t dout_ld, const void *x, int64_t n, int64_t ic, int64_t oc,
                                           int32_t w_mode, int32_t b_mode, phx_stream *s, phx_error *err) {
  const int64_t ld = dout_ld ? dout_ld : oc;
  phx_status status = check(n, ic, oc, ld, err);
  if (status == PHX_OK) status = phx__cpu_begin(ctx, dtype, s, err);
  const factors f = {dtype, 1, 0, dout, x, ld, ic, n};
  const tile t = {dw, ic, 0, 0, oc, ic};
  if (status == PHX_OK && dw) status = product_tile(ctx, &f, &t, w_mode == PHX_GRAD_ADD, err);
  if (status == PHX_OK && db) phx__cpu_parallel(ctx, oc, 64, bias_body, &(bias_args){db, dout, ld, n, b_mode, dtype});
  return status;
}
