/* plugins/cpu/product_bf16.c - matrix products of bf16 with fp32 sums, by oneDNN.
 *
 * Where the processor multiplies bf16, oneDNN's matmul primitive; transposition is a matter of strides.  Creating one
 * takes as long as a small product, so they are kept by shape, the least recently used giving way.  What a primitive
 * needs beside its arguments comes from the device's scratch; a product that needs more is halved until it fits.
 * Elsewhere, and where oneDNN has no such primitive, blocks are widened to fp32 in the scratch and multiplied there:
 * right, but no faster than fp32.
 *
 * Bits depend on the shape, the number of threads and the processor, not on pointers.  [main] */
#include <dnnl.h>
#include <stdlib.h>
#include <string.h>
#include "cpu.h"

enum { KEPT = 256, LEAST_SPLIT = 64 };

typedef struct shape {
  int64_t m, n, k, lda, ldb, ldc;
  int32_t a_t, b_t, accumulate, reserved0;
} shape;

typedef struct matmul {
  shape shape;
  dnnl_primitive_t primitive; /* NULL: oneDNN refused this shape */
  dnnl_memory_t a, b, c, scratch;
  int64_t scratch_bytes;
  uint64_t used;
} matmul;

struct phx__cpu_matmuls {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  matmul kept[KEPT];
  int32_t n;
  uint64_t clock;
};

static phx_status refused(const char *what, dnnl_status_t status, phx_error *err) {
  phx_fail(err, status == dnnl_out_of_memory ? PHX_NOMEM : PHX_DEVICE, "cpu: oneDNN: %s: status %d", what, (int)status);
  if (err) err->cause = (int32_t)status;
  return status == dnnl_out_of_memory ? PHX_NOMEM : PHX_DEVICE;
}

/* ---- primitives ---- */

static void matmul_free(matmul *x) {
  if (x->scratch) dnnl_memory_destroy(x->scratch);
  if (x->c) dnnl_memory_destroy(x->c);
  if (x->b) dnnl_memory_destroy(x->b);
  if (x->a) dnnl_memory_destroy(x->a);
  if (x->primitive) dnnl_primitive_destroy(x->primitive);
  memset(x, 0, sizeof *x);
}

#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t matrix;
static dnnl_status_t matrix_make(matrix *out, dnnl_data_type_t type, int64_t rows, int64_t columns, int64_t ld,
                                 int32_t transposed) {
  return dnnl_memory_desc_create_with_strides(out, 2, (dnnl_dims_t){rows, columns}, type,
                                              (dnnl_dims_t){transposed ? 1 : ld, transposed ? ld : 1});
}
static void matrix_free(matrix *x) {
  if (*x) dnnl_memory_desc_destroy(*x);
}
static dnnl_status_t describe(dnnl_primitive_desc_t *out, dnnl_engine_t engine, matrix *a, matrix *b, matrix *c,
                              dnnl_primitive_attr_t attr) {
  return dnnl_matmul_primitive_desc_create(out, engine, *a, *b, NULL, *c, attr);
}
static dnnl_status_t memory_make(dnnl_memory_t *out, matrix *x, dnnl_engine_t engine) {
  return dnnl_memory_create(out, *x, engine, DNNL_MEMORY_NONE);
}
#else
typedef dnnl_memory_desc_t matrix;
static dnnl_status_t matrix_make(matrix *out, dnnl_data_type_t type, int64_t rows, int64_t columns, int64_t ld,
                                 int32_t transposed) {
  return dnnl_memory_desc_init_by_strides(out, 2, (dnnl_dims_t){rows, columns}, type,
                                          (dnnl_dims_t){transposed ? 1 : ld, transposed ? ld : 1});
}
static void matrix_free(matrix *x) {
  (void)x;
}
static dnnl_status_t describe(dnnl_primitive_desc_t *out, dnnl_engine_t engine, matrix *a, matrix *b, matrix *c,
                              dnnl_primitive_attr_t attr) {
  dnnl_matmul_desc_t d;
  const dnnl_status_t status = dnnl_matmul_desc_init(&d, a, b, NULL, c);
  return status == dnnl_success ? dnnl_primitive_desc_create(out, &d, attr, engine, NULL) : status;
}
static dnnl_status_t memory_make(dnnl_memory_t *out, matrix *x, dnnl_engine_t engine) {
  return dnnl_memory_create(out, x, engine, DNNL_MEMORY_NONE);
}
#endif

/* The first failure counts. */
#define TRY(call) \
  if (status == dnnl_success) status = (call)

static dnnl_status_t attributes(dnnl_primitive_attr_t *out, int32_t accumulate) {
  dnnl_post_ops_t after = NULL;
  dnnl_status_t status = dnnl_primitive_attr_create(out);
  TRY(dnnl_primitive_attr_set_scratchpad_mode(*out, dnnl_scratchpad_mode_user));
  if (accumulate) {
    TRY(dnnl_post_ops_create(&after));
    TRY(dnnl_post_ops_append_sum(after, 1.0f));
    TRY(dnnl_primitive_attr_set_post_ops(*out, after));
  }
  if (after) dnnl_post_ops_destroy(after);
  return status;
}

/* dnnl_unimplemented is no failure: the primitive is NULL. */
static dnnl_status_t matmul_make(matmul *x, dnnl_engine_t engine, const shape *s) {
  matrix a = {0}, b = {0}, c = {0};
  dnnl_primitive_attr_t attr = NULL;
  dnnl_primitive_desc_t desc = NULL;
  dnnl_status_t status = matrix_make(&a, dnnl_bf16, s->m, s->k, s->lda, s->a_t);
  x->shape = *s;
  TRY(matrix_make(&b, dnnl_bf16, s->k, s->n, s->ldb, s->b_t));
  TRY(matrix_make(&c, dnnl_f32, s->m, s->n, s->ldc, 0));
  TRY(attributes(&attr, s->accumulate));
  TRY(describe(&desc, engine, &a, &b, &c, attr));
  TRY(dnnl_primitive_create(&x->primitive, desc));
  TRY(memory_make(&x->a, &a, engine));
  TRY(memory_make(&x->b, &b, engine));
  TRY(memory_make(&x->c, &c, engine));
  if (status == dnnl_success) {
    /* a pointer to a description in oneDNN 2, a description in 3 */
    const __typeof__(dnnl_primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0)) scratch =
        dnnl_primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0);
    x->scratch_bytes = scratch ? (int64_t)dnnl_memory_desc_get_size(scratch) : 0;
    if (x->scratch_bytes) TRY(dnnl_memory_create(&x->scratch, scratch, engine, DNNL_MEMORY_NONE));
  }
  if (desc) dnnl_primitive_desc_destroy(desc);
  if (attr) dnnl_primitive_attr_destroy(attr);
  matrix_free(&c), matrix_free(&b), matrix_free(&a);
  if (status != dnnl_success) {
    matmul_free(x);
    x->shape = *s;
  }
  return status == dnnl_unimplemented ? dnnl_success : status;
}

static phx_status matmuls_open(phx__cpu *cpu, phx_error *err) {
  if (cpu->matmuls) return PHX_OK;
  phx__cpu_matmuls *all = calloc(1, sizeof *all);
  if (!all) return phx_fail(err, PHX_NOMEM, "cpu: no memory for bf16 products");
  cpu->matmuls = all;
  dnnl_status_t status = dnnl_engine_create(&all->engine, dnnl_cpu, 0);
  TRY(dnnl_stream_create(&all->stream, all->engine, dnnl_stream_default_flags));
  if (status == dnnl_success) return PHX_OK;
  phx__cpu_product_bf16_end(cpu);
  return refused("no engine", status, err);
}

void phx__cpu_product_bf16_end(phx__cpu *cpu) {
  phx__cpu_matmuls *all = cpu->matmuls;
  if (!all) return;
  for (int32_t i = 0; i < all->n; i++) matmul_free(&all->kept[i]);
  if (all->stream) dnnl_stream_destroy(all->stream);
  if (all->engine) dnnl_engine_destroy(all->engine);
  free(all);
  cpu->matmuls = NULL;
}

static phx_status matmul_find(phx__cpu *cpu, const shape *s, matmul **out, phx_error *err) {
  PHX_TRY(matmuls_open(cpu, err));
  phx__cpu_matmuls *all = cpu->matmuls;
  matmul *oldest = &all->kept[0];
  for (int32_t i = 0; i < all->n; i++) {
    matmul *x = &all->kept[i];
    if (memcmp(&x->shape, s, sizeof *s) == 0) {
      x->used = ++all->clock;
      *out = x;
      return PHX_OK;
    }
    if (x->used < oldest->used) oldest = x;
  }
  matmul *x = all->n < KEPT ? &all->kept[all->n++] : oldest;
  matmul_free(x);
  const dnnl_status_t status = matmul_make(x, all->engine, s);
  x->used = ++all->clock;
  if (status != dnnl_success) return refused("no matmul", status, err);
  *out = x;
  return PHX_OK;
}

/* ---- where there is none ---- */

/* dst(rows, columns) = src(rows, columns; ld), widened */
static void widen(const phx__cpu *cpu, float *dst, const uint16_t *src, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) cpu->kernels->cast(dst + i * columns, PHX_F32, src + i * ld, PHX_BF16, columns);
}

/* Where the block that begins at row i and column j of op(x) is stored. */
static const uint16_t *block_at(const uint16_t *x, int64_t ld, int32_t transposed, int64_t i, int64_t j) {
  return transposed ? x + j * ld + i : x + i * ld + j;
}

static phx_status widened(const phx__cpu *cpu, const shape *s, const uint16_t *a, const uint16_t *b, float *c,
                          void *room, int64_t room_bytes, phx_error *err) {
  int64_t side = 64; /* blocks of a and b, one after the other */
  while (2 * (2 * side) * (2 * side) * 4 <= room_bytes) side *= 2;
  float *const wide_a = room, *const wide_b = wide_a + side * side;
  phx_status status = PHX_OK;
  for (int64_t k0 = 0; k0 < s->k && status == PHX_OK; k0 += side)
    for (int64_t j = 0; j < s->n && status == PHX_OK; j += side) {
      const int64_t k = s->k - k0 < side ? s->k - k0 : side, n = s->n - j < side ? s->n - j : side;
      widen(cpu, wide_b, block_at(b, s->ldb, s->b_t, k0, j), s->ldb, s->b_t ? n : k, s->b_t ? k : n);
      for (int64_t i = 0; i < s->m && status == PHX_OK; i += side) {
        const int64_t m = s->m - i < side ? s->m - i : side;
        widen(cpu, wide_a, block_at(a, s->lda, s->a_t, i, k0), s->lda, s->a_t ? k : m, s->a_t ? m : k);
        status = phx__cpu_product(cpu, s->a_t, s->b_t, m, n, k, wide_a, s->a_t ? m : k, wide_b, s->b_t ? k : n,
                                  c + i * s->ldc + j, s->ldc, s->accumulate || k0 > 0, err);
      }
    }
  return status;
}

/* ---- the product ---- */

static phx_status execute(phx__cpu *cpu, const matmul *x, const void *a, const void *b, float *c, void *room,
                          phx_error *err) {
  const struct {
    dnnl_memory_t memory;
    const void *at;
  } places[] = {{x->a, a}, {x->b, b}, {x->c, c}, {x->scratch, room}};
  dnnl_status_t status = dnnl_success;
  for (int i = 0; i < 4; i++) {
    void *at; /* oneDNN takes all of them as void *; a and b are only read */
    memcpy(&at, &places[i].at, sizeof at);
    if (places[i].memory) TRY(dnnl_memory_set_data_handle(places[i].memory, at));
  }
  const dnnl_exec_arg_t args[] = {
      {DNNL_ARG_SRC, x->a}, {DNNL_ARG_WEIGHTS, x->b}, {DNNL_ARG_DST, x->c}, {DNNL_ARG_SCRATCHPAD, x->scratch}};
  TRY(dnnl_primitive_execute(x->primitive, cpu->matmuls->stream, x->scratch ? 4 : 3, args));
  TRY(dnnl_stream_wait(cpu->matmuls->stream));
  return status == dnnl_success ? PHX_OK : refused("a product", status, err);
}

/* room: the scratch, from which the tile is taken when c lies in it. */
static phx_status multiply(phx__cpu *cpu, const shape *s, const uint16_t *a, const uint16_t *b, float *c, void *room,
                           int64_t room_bytes, phx_error *err) {
  matmul *x = NULL;
  if (!cpu->bf16) return widened(cpu, s, a, b, c, room, room_bytes, err);
  PHX_TRY(matmul_find(cpu, s, &x, err));
  if (x->primitive && x->scratch_bytes <= room_bytes) return execute(cpu, x, a, b, c, room, err);
  const int rows = s->m >= s->n;
  if (!x->primitive || (rows ? s->m : s->n) < 2 * LEAST_SPLIT) return widened(cpu, s, a, b, c, room, room_bytes, err);
  shape half = *s;
  const int64_t first = (rows ? s->m : s->n) / 2 / LEAST_SPLIT * LEAST_SPLIT;
  *(rows ? &half.m : &half.n) = first;
  PHX_TRY(multiply(cpu, &half, a, b, c, room, room_bytes, err));
  *(rows ? &half.m : &half.n) = (rows ? s->m : s->n) - first;
  if (rows)
    return multiply(cpu, &half, block_at(a, s->lda, s->a_t, first, 0), b, c + first * s->ldc, room, room_bytes, err);
  return multiply(cpu, &half, a, block_at(b, s->ldb, s->b_t, 0, first), c + first, room, room_bytes, err);
}

phx_status phx__cpu_product_bf16(phx__cpu *cpu, int32_t a_t, int32_t b_t, int64_t m, int64_t n, int64_t k,
                                 const void *a, int64_t lda, const void *b, int64_t ldb, float *c, int64_t ldc,
                                 int32_t accumulate, phx_error *err) {
  const shape s = {m, n, k, lda, ldb, ldc, a_t, b_t, accumulate, 0};
  void *scratch = NULL;
  if (m < 1 || n < 1 || k < 1)
    return phx_fail(err, PHX_INVALID, "cpu: product of %lld x %lld by %lld x %lld: sizes must be positive",
                    (long long)m, (long long)k, (long long)k, (long long)n);
  PHX_TRY(phx__cpu_scratch(cpu, &scratch, err));
  phx__cpu_settle(cpu);
  const int64_t taken = (void *)c == scratch ? PHX__CPU_TILE_BYTES : 0;
  return multiply(cpu, &s, a, b, c, (char *)scratch + taken, cpu->scratch_bytes - taken, err);
}
