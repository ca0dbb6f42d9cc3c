/* tree.c - the reduction T(n) of phalanx/comm.h in the CPU's memory, for what neither NCCL nor the device reduces in
 * that order: float64, minimum and maximum of floats, uint16.  Small data (losses, norms): plain loops.  NaN wins in
 * minimum and maximum; integers wrap; bf16 is summed in fp32 and rounded once.  Pure, any thread. */
#include <string.h>

#include "comm_nccl.h"

typedef union value {
  float f;
  double d;
  int64_t i;
  uint64_t u;
} value;

static value load(int32_t dtype, const char *p) {
  value v = {.u = 0};
  uint32_t bits = 0;
  int32_t i = 0;
  switch (dtype) {
    case PHX_F32: memcpy(&v.f, p, 4); break;
    case PHX_F64: memcpy(&v.d, p, 8); break;
    case PHX_BF16:
      memcpy((char *)&bits + 2, p, 2); /* little-endian, as every machine with CUDA */
      memcpy(&v.f, &bits, 4);
      break;
    case PHX_I32:
      memcpy(&i, p, 4);
      v.i = i;
      break;
    default: memcpy(&v.u, p, phx_dtype_bytes(dtype));
  }
  return v;
}

static void store(int32_t dtype, char *p, value v) {
  if (dtype == PHX_BF16) { /* to nearest even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &v.f, 4);
    bits = v.f != v.f ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint16_t half = (uint16_t)bits;
    memcpy(p, &half, 2);
  } else {
    memcpy(p, &v, phx_dtype_bytes(dtype));
  }
}

#define COMBINE(name, T)                          \
  static T name(int32_t reduce, T a, T b) {       \
    if (reduce == PHX_SUM) return (T)(a + b);     \
    if (reduce == PHX_MIN) return a < b ? a : b;  \
    return a > b ? a : b;                         \
  }
COMBINE(combine_f32, float)
COMBINE(combine_f64, double)
COMBINE(combine_u64, uint64_t)
COMBINE(combine_i64, int64_t)

/* What is no number stays so. */
static float combine_float(int32_t reduce, float a, float b) {
  if (a != a) return a;
  return b != b ? b : combine_f32(reduce, a, b);
}
static double combine_double(int32_t reduce, double a, double b) {
  if (a != a) return a;
  return b != b ? b : combine_f64(reduce, a, b);
}

static value combine(int32_t dtype, int32_t reduce, value a, value b) {
  value v = {.u = 0};
  if (dtype == PHX_F32 || dtype == PHX_BF16)
    v.f = combine_float(reduce, a.f, b.f);
  else if (dtype == PHX_F64)
    v.d = combine_double(reduce, a.d, b.d);
  else if (reduce == PHX_SUM || (dtype != PHX_I32 && dtype != PHX_I64))
    v.u = combine_u64(reduce, a.u, b.u);
  else
    v.i = combine_i64(reduce, a.i, b.i);
  return v;
}

static value tree(int32_t dtype, int32_t reduce, const char *row, int64_t stride, int32_t n) {
  if (n == 1) return load(dtype, row);
  int32_t left = 1;
  while (left * 2 < n) left *= 2;
  const value a = tree(dtype, reduce, row, stride, left);
  return combine(dtype, reduce, a, tree(dtype, reduce, row + left * stride, stride, n - left));
}

void nccl_tree(int32_t dtype, int32_t reduce, char *rows, int64_t stride, int32_t n, int64_t numel) {
  const int64_t element = (int64_t)phx_dtype_bytes(dtype);
  for (int64_t i = 0; i < numel; i++)
    store(dtype, rows + i * element, tree(dtype, reduce, rows + i * element, stride, n));
}
