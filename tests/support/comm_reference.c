/* See comm_reference.h. */
#include "comm_reference.h"

#include <phalanx/comm.h>
#include <stdbool.h>
#include <string.h>

static uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
static float bf16_to_f32(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static uint16_t f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
void comm_reference_element(int32_t dtype, uint64_t seed, int32_t r, int64_t i, void *out) {
  static const double scale[17] = {0x1p-8, 0x1p-7, 0x1p-6, 0x1p-5, 0x1p-4, 0x1p-3, 0x1p-2, 0x1p-1, 1,
                                   0x1p1,  0x1p2,  0x1p3,  0x1p4,  0x1p5,  0x1p6,  0x1p7,  0x1p8};
  uint64_t h = mix(mix(seed * 977 + (uint64_t)r) + (uint64_t)i);
  double x = ((double)(h >> 11) * 0x1p-53 - 0.5) * scale[h % 17];
  float f = (float)x;
  uint16_t b = f32_to_bf16(f);
  switch (dtype) {
    case PHX_F32: memcpy(out, &f, 4); break;
    case PHX_F64: memcpy(out, &x, 8); break;
    case PHX_BF16: memcpy(out, &b, 2); break;
    default: memcpy(out, &h, phx_dtype_bytes(dtype));
  }
}
comm_value comm_reference_widen(int32_t dtype, const void *p) {
  comm_value v = {.u = 0};
  uint16_t b;
  switch (dtype) {
    case PHX_F32: memcpy(&v.f, p, 4); break;
    case PHX_F64: memcpy(&v.d, p, 8); break;
    case PHX_BF16: memcpy(&b, p, 2); v.f = bf16_to_f32(b); break;
    case PHX_I32: { int32_t t; memcpy(&t, p, 4); v.i = t; break; }
    default: memcpy(&v.u, p, phx_dtype_bytes(dtype));
  }
  return v;
}
static bool is_narrow_float(int32_t dtype) {
  return dtype == PHX_F32 || dtype == PHX_BF16;
}
static comm_value add(int32_t dtype, comm_value a, comm_value b) {
  comm_value v = {.u = 0};
  if (is_narrow_float(dtype))
    v.f = a.f + b.f;
  else if (dtype == PHX_F64)
    v.d = a.d + b.d;
  else
    v.u = a.u + b.u;
  return v;
}
static bool is_less(int32_t dtype, comm_value a, comm_value b) {
  if (is_narrow_float(dtype)) return a.f < b.f;
  if (dtype == PHX_F64) return a.d < b.d;
  return dtype == PHX_I32 || dtype == PHX_I64 ? a.i < b.i : a.u < b.u;
}
static comm_value combine(int32_t dtype, int32_t op, comm_value a, comm_value b) {
  if (op == PHX_SUM) return add(dtype, a, b);
  const bool takes_a = op == PHX_MIN ? is_less(dtype, a, b) : is_less(dtype, b, a);
  return takes_a ? a : b;
}
void comm_reference_narrow(int32_t dtype, comm_value v, void *out) {
  uint16_t b = f32_to_bf16(v.f);
  if (dtype == PHX_BF16)
    memcpy(out, &b, 2);
  else
    memcpy(out, &v, phx_dtype_bytes(dtype));
}
comm_value comm_reference_tree(int32_t dtype, int32_t op, uint64_t seed, int32_t first, int32_t n, int64_t i) {
  char e[8];
  if (n == 1) {
    comm_reference_element(dtype, seed, first, i, e);
    return comm_reference_widen(dtype, e);
  }
  int32_t left = 1;
  while (left * 2 < n) left *= 2;
  return combine(dtype, op, comm_reference_tree(dtype, op, seed, first, left, i),
                 comm_reference_tree(dtype, op, seed, first + left, n - left, i));
}
comm_value comm_reference_left_to_right(int32_t dtype, uint64_t seed, int32_t n, int64_t i) {
  comm_value v = comm_reference_tree(dtype, PHX_SUM, seed, 0, 1, i);
  for (int32_t r = 1; r < n; r++) v = combine(dtype, PHX_SUM, v, comm_reference_tree(dtype, PHX_SUM, seed, r, 1, i));
  return v;
}
