/* plugins/cuda/ops_linear.c - linear layers: one product each, with what follows fused as its epilogue.
 *
 * Where cuBLASLt has no such epilogue (odd leading dimensions, some pairs of types), or none exists (gradients added
 * through GELU), rows go through the scratch in fp32 and a kernel finishes them: slower, rounded once all the same.
 * A vocabulary of 50257 has rows on 128 bytes (the padding), but no length that a wide load divides, and the library's
 * fast kernels want both: columns up to the last multiple of 64 are one product, the rest another.
 * The choice depends on the shape, and on the alignment of what an epilogue reads, only.  [main] */
#include "cuda.h"

static phx_status check_shape(const phx__cuda *cuda, const char *what, int64_t n, int64_t ic, int64_t oc, int64_t ld,
                              phx_error *err) {
  if (n >= 1 && ic >= 1 && oc >= 1 && (ld == 0 || ld >= oc)) return PHX_OK;
  return phx__cuda_fail(cuda, err, PHX_INVALID, "%s of %lld rows, %lld to %lld channels, %lld between rows", what,
                        (long long)n, (long long)ic, (long long)oc, (long long)ld);
}

/* Of oc columns in rows of ld: how many are a product of their own; 0: all are one. */
static int64_t columns_apart(int64_t oc, int64_t ld) {
  enum { GRAIN = 64 };
  return oc > GRAIN && oc % GRAIN && ld > oc && ld % GRAIN == 0 ? oc / GRAIN * GRAIN : 0;
}

/* The product p (without epilogue), its first `apart` terms of k and the others in turn. */
static phx_status product_of_parts(phx__cuda *cuda, phx__cuda_product p, int64_t apart, const char *what,
                                   cudaStream_t s, phx_error *err) {
  const int64_t size = (int64_t)phx_dtype_bytes(p.in_dtype), rest = p.k - apart;
  int32_t done;
  if (apart == 0) return phx__cuda_product_run(cuda, &p, s, what, &done, err);
  p.k = apart;
  PHX_TRY(phx__cuda_product_run(cuda, &p, s, what, &done, err));
  p.k = rest, p.accumulate = 1;
  p.a = (const char *)p.a + apart * size; /* rows of a, and of b as it is */
  p.b = (const char *)p.b + apart * p.ldb * size;
  return phx__cuda_product_run(cuda, &p, s, what, &done, err);
}

/* The product p (without epilogue) in fp32, by chunks of rows through the scratch, each finished by f. */
static phx_status finish_by_rows(phx__cuda *cuda, phx__cuda_product p, int64_t apart, phx__cuda_finish f,
                                 const char *what, cudaStream_t s, phx_error *err) {
  const int64_t most = cuda->scratch_bytes / 4 / p.n, in = (int64_t)phx_dtype_bytes(p.in_dtype), rows = p.m;
  const int64_t out = (int64_t)phx_dtype_bytes(f.dtype);
  const int64_t chunk = most < rows ? most / 64 * 64 : rows; /* 64: rows keep their alignment */
  void *scratch;
  if (chunk < 1)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: %lld channels are too many", what, (long long)p.n);
  phx_status status = phx__cuda_scratch(cuda, s, 4 * p.n * chunk, what, &scratch, err);
  p.out_dtype = PHX_F32, p.epilogue = PHX__EPILOGUE_NONE, p.accumulate = 0;
  p.bias = p.aux = NULL;
  p.c = scratch, p.ldc = p.n;
  for (int64_t at = 0; at < rows && status == PHX_OK; at += chunk) {
    p.m = f.rows = rows - at < chunk ? rows - at : chunk;
    status = product_of_parts(cuda, p, apart, what, s, err);
    if (status == PHX_OK) status = phx__cuda_check(cuda, phx__cuda_k_finish(&f, scratch, s), what, err);
    p.a = (const char *)p.a + p.m * p.lda * in;
    f.out = (char *)f.out + p.m * f.out_ld * out;
    if (f.pre) f.pre = (char *)f.pre + p.m * p.n * out;
    if (f.slope_of) f.slope_of = (const char *)f.slope_of + p.m * p.n * out;
  }
  return status;
}

static phx_status linear_columns(phx__cuda *cuda, int32_t dtype, void *out, int64_t ld, void *pre, const void *x,
                                 const void *w, const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t gelu,
                                 cudaStream_t s, phx_error *err) {
  int32_t done = 0, epilogue = bias ? PHX__EPILOGUE_BIAS : PHX__EPILOGUE_NONE;
  if (gelu) epilogue = PHX__EPILOGUE_GELU;
  const phx__cuda_product p = {.in_dtype = dtype, .out_dtype = dtype, .b_t = 1, .m = n, .n = oc, .k = ic, .lda = ic,
                               .ldb = ic, .ldc = ld, .a = x, .b = w, .c = out, .bias = (void *)(uintptr_t)bias,
                               .aux = gelu ? pre : NULL,
                               .epilogue = epilogue};
  if (gelu || !pre) {
    const phx_status status = phx__cuda_product_run(cuda, &p, s, "linear", &done, err);
    if (status != PHX_OK || done) return status;
  }
  const phx__cuda_finish f = {.dtype = dtype, .gelu = gelu, .out = out, .pre = pre, .bias = bias, .columns = oc,
                              .out_ld = ld};
  return finish_by_rows(cuda, p, 0, f, "linear", s, err);
}

phx_status phx__cuda_linear(void *ctx, int32_t dtype, void *out, int64_t out_ld, void *pre, const void *x,
                            const void *w, const void *bias, int64_t n, int64_t ic, int64_t oc, int32_t gelu,
                            phx_stream *stream, phx_error *err) {
  phx__cuda *cuda = ctx;
  const cudaStream_t s = phx__cuda_stream(cuda, stream);
  const int64_t size = (int64_t)phx_dtype_bytes(dtype), ld = out_ld ? out_ld : oc;
  PHX_TRY(phx__cuda_begin(cuda, dtype, "linear", err));
  PHX_TRY(check_shape(cuda, "linear", n, ic, oc, out_ld, err));
  const int64_t apart = pre ? 0 : columns_apart(oc, ld); /* rows of pre are not padded */
  if (apart) {
    PHX_TRY(linear_columns(cuda, dtype, out, ld, NULL, x, w, bias, n, ic, apart, gelu, s, err));
    out = (char *)out + apart * size;
    w = (const char *)w + apart * ic * size;
    if (bias) bias = (const char *)bias + apart * size;
  }
  return linear_columns(cuda, dtype, out, ld, pre, x, w, bias, n, ic, oc - apart, gelu, s, err);
}

phx_status phx__cuda_linear_backward_input(void *ctx, int32_t dtype, void *dx, const void *dout, int64_t dout_ld,
                                           const void *w, const void *pre, int64_t n, int64_t ic, int64_t oc,
                                           int32_t mode, phx_stream *stream, phx_error *err) {
  static const char what[] = "linear_backward_input";
  phx__cuda *cuda = ctx;
  const cudaStream_t s = phx__cuda_stream(cuda, stream);
  int32_t done = 0;
  phx_status status = phx__cuda_begin(cuda, dtype, what, err);
  if (status == PHX_OK) status = check_shape(cuda, what, n, ic, oc, dout_ld, err);
  if (status != PHX_OK) return status;
  const phx__cuda_product p = {.in_dtype = dtype, .out_dtype = dtype, .m = n, .n = ic, .k = oc,
                               .lda = dout_ld ? dout_ld : oc, .ldb = ic, .ldc = ic, .a = dout, .b = w, .c = dx,
                               .aux = (void *)(uintptr_t)pre, .accumulate = mode == PHX_GRAD_ADD,
                               .epilogue = pre ? PHX__EPILOGUE_DGELU : PHX__EPILOGUE_NONE};
  const int64_t apart = columns_apart(oc, dout_ld); /* both parts of a sum are rounded once, so they meet in fp32 */
  if (!apart && !(pre && mode == PHX_GRAD_ADD)) { /* DGELU would take the slope of the sum */
    status = phx__cuda_product_run(cuda, &p, s, what, &done, err);
    if (status != PHX_OK || done) return status;
  }
  const phx__cuda_finish f = {.dtype = dtype, .accumulate = mode == PHX_GRAD_ADD, .out = dx, .slope_of = pre,
                              .columns = ic, .out_ld = ic};
  return finish_by_rows(cuda, p, apart, f, what, s, err);
}

/* db (+)= column sums of dout, by a kernel of our own. */
static phx_status bias_gradient(phx__cuda *cuda, int32_t dtype, float *db, int32_t mode, const void *dout, int64_t ld,
                                int64_t n, int64_t oc, cudaStream_t s, const char *what, phx_error *err) {
  const int64_t most = cuda->scratch_bytes / 4 / oc;
  const int64_t slices = n < 128 ? n : 128;
  void *parts;
  if (most < 1)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: %lld channels are too many", what, (long long)oc);
  const int64_t taken = slices < most ? slices : most;
  PHX_TRY(phx__cuda_scratch(cuda, s, 4 * oc * taken, what, &parts, err));
  return phx__cuda_check(cuda, phx__cuda_k_column_sums(db, mode, dtype, dout, ld, n, oc, parts, taken, s), what, err);
}

static phx_status weight_columns(phx__cuda *cuda, int32_t dtype, float *dw, float *db, const void *dout, int64_t ld,
                                 const void *x, int64_t n, int64_t ic, int64_t oc, int32_t w_mode, int32_t b_mode,
                                 const char *what, cudaStream_t s, phx_error *err) {
  int32_t done = 0;
  phx_status status = PHX_OK;
  phx__cuda_product p = {.in_dtype = dtype, .out_dtype = PHX_F32, .a_t = 1, .m = oc, .n = ic, .k = n, .lda = ld,
                         .ldb = ic, .ldc = ic, .a = dout, .b = x, .c = dw, .accumulate = w_mode == PHX_GRAD_ADD,
                         .epilogue = db ? PHX__EPILOGUE_BIAS_GRADIENT : PHX__EPILOGUE_NONE, .bias = db};
  void *sums = NULL;
  const int32_t through_scratch = db && b_mode == PHX_GRAD_ADD && 4 * oc <= cuda->scratch_bytes;
  if (through_scratch) { /* the epilogue writes: what is added comes by way of the scratch */
    PHX_TRY(phx__cuda_scratch(cuda, s, 4 * oc, what, &sums, err));
    p.bias = sums;
  }
  PHX_TRY(phx__cuda_product_run(cuda, &p, s, what, &done, err));
  if (done)
    return through_scratch ? phx__cuda_check(cuda, phx__cuda_k_accumulate(db, sums, oc, s), what, err) : PHX_OK;
  p.epilogue = PHX__EPILOGUE_NONE, p.bias = NULL;
  status = phx__cuda_product_run(cuda, &p, s, what, &done, err);
  return status == PHX_OK ? bias_gradient(cuda, dtype, db, b_mode, dout, ld, n, oc, s, what, err) : status;
}

phx_status phx__cuda_linear_backward_weight(void *ctx, int32_t dtype, float *dw, float *db, const void *dout,
                                            int64_t dout_ld, const void *x, int64_t n, int64_t ic, int64_t oc,
                                            int32_t w_mode, int32_t b_mode, phx_stream *stream, phx_error *err) {
  static const char what[] = "linear_backward_weight";
  phx__cuda *cuda = ctx;
  const cudaStream_t s = phx__cuda_stream(cuda, stream);
  const int64_t ld = dout_ld ? dout_ld : oc, apart = columns_apart(oc, ld);
  PHX_TRY(phx__cuda_begin(cuda, dtype, what, err));
  PHX_TRY(check_shape(cuda, what, n, ic, oc, dout_ld, err));
  if (apart) {
    PHX_TRY(weight_columns(cuda, dtype, dw, db, dout, ld, x, n, ic, apart, w_mode, b_mode, what, s, err));
    dw += apart * ic;
    dout = (const char *)dout + apart * (int64_t)phx_dtype_bytes(dtype);
    if (db) db += apart;
  }
  return weight_columns(cuda, dtype, dw, db, dout, ld, x, n, ic, oc - apart, w_mode, b_mode, what, s, err);
}
