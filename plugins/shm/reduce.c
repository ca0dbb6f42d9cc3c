/* reduce.c - elementwise reductions over n sources in one pass over memory, in the tree order of phalanx/comm.h.
 *
 * Compiled once per instruction set (SHM_ISA names the table).  Every kernel loads one vector of each source, combines
 * them in registers in the order T(n) and stores the result to every destination: 1 read per source and 1 write per
 * destination, whatever n.  The tree for any n comes from a binary counter: after i sources the stack holds the perfect
 * trees of i's binary digits, largest first, and folding it from the right gives T(n).  bf16 is widened to fp32,
 * combined and rounded once.  NaN wins in MIN and MAX.  Integers wrap.
 *
 * Does not: know of ranks, arenas or threads.  Invariant: an element's bits depend on its n inputs only, never on the
 * slicing: the last, incomplete vector goes through the same kernel in a padded copy.  Pure, any thread. */
#include "kernels.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ALWAYS static inline __attribute__((always_inline))
#if defined(__AVX512F__)
#define WIDTH 64 /* bytes of a vector */
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LANES __attribute__((vector_size(WIDTH)))
typedef float v_f32 LANES;
typedef double v_f64 LANES;
typedef int8_t v_i8 LANES;
typedef int16_t v_i16 LANES;
typedef int32_t v_i32 LANES;
typedef int64_t v_i64 LANES;
typedef uint8_t v_u8 LANES;
typedef uint16_t v_u16 LANES;
typedef uint32_t v_u32 LANES;
typedef uint64_t v_u64 LANES;
typedef uint16_t v_half __attribute__((vector_size(WIDTH / 2)));

ALWAYS void store_stream(void *p, const void *vector) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i *)p, _mm512_loadu_si512(vector));
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i *)p, _mm256_loadu_si256((const __m256i *)vector));
#elif defined(__x86_64__)
  _mm_stream_si128((__m128i *)p, _mm_loadu_si128((const __m128i *)vector));
#else
  memcpy(p, vector, WIDTH);
#endif
}
ALWAYS void fence(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#define LOAD_STORE(V)                                  \
  ALWAYS V load_##V(const char *p) {                   \
    V v;                                               \
    memcpy(&v, p, sizeof v);                           \
    return v;                                          \
  }                                                    \
  ALWAYS void store_##V(char *p, V v, int32_t stream) { \
    if (stream)                                        \
      store_stream(p, &v);                             \
    else                                               \
      memcpy(p, &v, sizeof v);                         \
  }
LOAD_STORE(v_f32)
LOAD_STORE(v_f64)
LOAD_STORE(v_i32)
LOAD_STORE(v_i64)
LOAD_STORE(v_u8)
LOAD_STORE(v_u16)
LOAD_STORE(v_u32)
LOAD_STORE(v_u64)

/* bf16 in memory, fp32 in registers: half a vector in memory. */
ALWAYS v_f32 load_bf16(const char *p) {
  v_half h;
  memcpy(&h, p, sizeof h);
  return (v_f32)(__builtin_convertvector(h, v_u32) << 16);
}
ALWAYS void store_bf16(char *p, v_f32 v, int32_t stream) {
  (void)stream; /* half a vector: streaming it costs more than it saves */
  v_u32 bits = (v_u32)v, nan = (v_u32)(v != v);
  v_u32 even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  v_half h = __builtin_convertvector((even & ~nan) | (((bits >> 16) | 0x40u) & nan), v_half);
  memcpy(p, &h, sizeof h);
}

#define ADD(V) \
  ALWAYS V sum_##V(V a, V b) { return a + b; }
/* a where it is smaller (greater) or NaN, else b. */
#define PICK(V, MASK, name, LESS)                        \
  ALWAYS V name##_##V(V a, V b) {                        \
    MASK m = (MASK)(a LESS b) | (MASK)(a != a);          \
    return (V)(((MASK)a & m) | ((MASK)b & ~m));          \
  }
#define PICKS(V, MASK) PICK(V, MASK, min, <) PICK(V, MASK, max, >)
ADD(v_f32) ADD(v_f64) ADD(v_u8) ADD(v_u16) ADD(v_u32) ADD(v_u64)
PICKS(v_f32, v_i32) PICKS(v_f64, v_i64) PICKS(v_i32, v_i32) PICKS(v_i64, v_i64)
PICKS(v_u8, v_i8) PICKS(v_u16, v_i16) PICKS(v_u32, v_i32) PICKS(v_u64, v_i64)

#define T2(LOAD, OP, i) OP(LOAD(s[i] + at), LOAD(s[i + 1] + at))
#define T4(LOAD, OP, i) OP(T2(LOAD, OP, i), T2(LOAD, OP, i + 2))

/* One fixed number of sources.  Destinations: 1, 2, or a loop over pointers. */
#define LOOP(V, STORE, STEP, TREE)                                                    \
  if (n_dst == 1) {                                                                   \
    char *a = d[0];                                                                   \
    for (; at + (STEP) <= bytes; at += (STEP)) {                                      \
      V v = TREE;                                                                     \
      STORE(a + at, v, stream);                                                       \
    }                                                                                 \
  } else if (n_dst == 2) {                                                            \
    char *a = d[0], *b = d[1];                                                        \
    for (; at + (STEP) <= bytes; at += (STEP)) {                                      \
      V v = TREE;                                                                     \
      STORE(a + at, v, stream);                                                       \
      STORE(b + at, v, stream);                                                       \
    }                                                                                 \
  } else {                                                                            \
    for (; at + (STEP) <= bytes; at += (STEP)) {                                      \
      V v = TREE;                                                                     \
      for (int32_t i = 0; i < n_dst; i++) STORE(d[i] + at, v, stream);                \
    }                                                                                 \
  }

#define CASE(N, V, STORE, STEP, TREE) \
  case N:                             \
    LOOP(V, STORE, STEP, TREE) break;

/* Any number of sources, by the binary counter. */
#define GENERIC(V, LOAD, STORE, STEP, OP)                                             \
  for (; at + (STEP) <= bytes; at += (STEP)) {                                        \
    V stack[8];                                                                       \
    int32_t top = 0;                                                                  \
    for (int32_t i = 0; i < n_src; i++) {                                             \
      V v = LOAD(s[i] + at);                                                          \
      for (int32_t k = i + 1; (k & 1) == 0; k >>= 1) v = OP(stack[--top], v);         \
      stack[top++] = v;                                                               \
    }                                                                                 \
    V v = stack[--top];                                                               \
    while (top > 0) v = OP(stack[--top], v);                                          \
    for (int32_t i = 0; i < n_dst; i++) STORE(d[i] + at, v, stream);                  \
  }

#define FEW(V, LOAD, STORE, STEP, OP)                                                             \
  CASE(2, V, STORE, STEP, T2(LOAD, OP, 0))
#define MANY(V, LOAD, STORE, STEP, OP)                                                            \
  FEW(V, LOAD, STORE, STEP, OP)                                                                   \
  CASE(3, V, STORE, STEP, OP(T2(LOAD, OP, 0), LOAD(s[2] + at)))                 \
  CASE(4, V, STORE, STEP, T4(LOAD, OP, 0))                                      \
  CASE(5, V, STORE, STEP, OP(T4(LOAD, OP, 0), LOAD(s[4] + at)))                 \
  CASE(6, V, STORE, STEP, OP(T4(LOAD, OP, 0), T2(LOAD, OP, 4)))                 \
  CASE(7, V, STORE, STEP, OP(T4(LOAD, OP, 0), OP(T2(LOAD, OP, 4), LOAD(s[6] + at)))) \
  CASE(8, V, STORE, STEP, OP(T4(LOAD, OP, 0), T4(LOAD, OP, 4)))

/* STEP: bytes in memory of one vector; BYTES: of one element. */
#define KERNEL(NAME, SPECIAL, V, LOAD, STORE, STEP, BYTES, OP)                                              \
  static void NAME##_vectors(char *const *dst, int32_t n_dst, const char *const *src, int32_t n_src, size_t bytes, \
                             int32_t stream) {                                                              \
    const char *s[64];                                                                                      \
    char *d[64];                                                                                            \
    size_t at = 0;                                                                                          \
    memcpy(s, src, (size_t)n_src * sizeof *s); /* locals: stores cannot alias them */                       \
    memcpy(d, dst, (size_t)n_dst * sizeof *d);                                                              \
    switch (n_src) {                                                                                        \
      SPECIAL(V, LOAD, STORE, STEP, OP)                                                                     \
      default: GENERIC(V, LOAD, STORE, STEP, OP)                                                            \
    }                                                                                                       \
  }                                                                                                         \
  static void NAME(void *const *dst, int32_t n_dst, const void *const *src, int32_t n_src, int64_t numel,   \
                   int32_t stream) {                                                                        \
    reduce_any(NAME##_vectors, dst, n_dst, src, n_src, (size_t)numel * (BYTES), (STEP), stream);            \
  }

typedef void vectors_fn(char *const *dst, int32_t n_dst, const char *const *src, int32_t n_src, size_t bytes,
                        int32_t stream);
/* Whole vectors in place; the rest in a padded copy, through the same code. */
static void reduce_any(vectors_fn *vectors, void *const *dst, int32_t n_dst, const void *const *src, int32_t n_src,
                       size_t bytes, size_t step, int32_t stream) {
  size_t whole = bytes / step * step, rest = bytes - whole;
  const char *s[64];
  char *d[64];
  for (int32_t i = 0; i < n_src; i++) s[i] = src[i];
  for (int32_t i = 0; i < n_dst; i++) {
    d[i] = dst[i];
    if ((uintptr_t)d[i] % 64) stream = 0; /* streaming stores must be aligned */
  }
  if (whole) vectors(d, n_dst, s, n_src, whole, stream);
  if (stream) fence();
  if (!rest) return;
  char in[64][64], out[64], *one = out;
  for (int32_t i = 0; i < n_src; i++) {
    memset(in[i], 0, step);
    memcpy(in[i], s[i] + whole, rest);
    s[i] = in[i];
  }
  vectors(&one, 1, s, n_src, step, 0);
  for (int32_t i = 0; i < n_dst; i++) memcpy(d[i] + whole, out, rest);
}

KERNEL(sum_f32, MANY, v_f32, load_v_f32, store_v_f32, WIDTH, 4, sum_v_f32)
KERNEL(sum_f64, MANY, v_f64, load_v_f64, store_v_f64, WIDTH, 8, sum_v_f64)
KERNEL(sum_bf16, MANY, v_f32, load_bf16, store_bf16, WIDTH / 2, 2, sum_v_f32)
KERNEL(sum_8, FEW, v_u8, load_v_u8, store_v_u8, WIDTH, 1, sum_v_u8)
KERNEL(sum_16, FEW, v_u16, load_v_u16, store_v_u16, WIDTH, 2, sum_v_u16)
KERNEL(sum_32, FEW, v_u32, load_v_u32, store_v_u32, WIDTH, 4, sum_v_u32)
KERNEL(sum_64, FEW, v_u64, load_v_u64, store_v_u64, WIDTH, 8, sum_v_u64)
#define PICK_KERNELS(T, V, LOAD, STORE, STEP, BYTES)              \
  KERNEL(min_##T, FEW, V, LOAD, STORE, STEP, BYTES, min_##V)      \
  KERNEL(max_##T, FEW, V, LOAD, STORE, STEP, BYTES, max_##V)
PICK_KERNELS(f32, v_f32, load_v_f32, store_v_f32, WIDTH, 4)
PICK_KERNELS(f64, v_f64, load_v_f64, store_v_f64, WIDTH, 8)
PICK_KERNELS(bf16, v_f32, load_bf16, store_bf16, WIDTH / 2, 2)
PICK_KERNELS(i32, v_i32, load_v_i32, store_v_i32, WIDTH, 4)
PICK_KERNELS(i64, v_i64, load_v_i64, store_v_i64, WIDTH, 8)
PICK_KERNELS(u8, v_u8, load_v_u8, store_v_u8, WIDTH, 1)
PICK_KERNELS(u16, v_u16, load_v_u16, store_v_u16, WIDTH, 2)
PICK_KERNELS(u32, v_u32, load_v_u32, store_v_u32, WIDTH, 4)
PICK_KERNELS(u64, v_u64, load_v_u64, store_v_u64, WIDTH, 8)

static void copy(void *dst, const void *src, int64_t bytes, int32_t stream) {
  char *d = dst;
  const char *s = src;
  size_t left = (size_t)bytes;
  if (d == s || bytes <= 0) return;
  if (!stream) {
    memcpy(d, s, left);
    return;
  }
  size_t head = (64 - (uintptr_t)d % 64) % 64;
  if (head > left) head = left;
  memcpy(d, s, head);
  for (d += head, s += head, left -= head; left >= 64; d += 64, s += 64, left -= 64) {
    for (int32_t i = 0; i < 64; i += WIDTH) store_v_u8(d + i, load_v_u8(s + i), 1);
  }
  fence();
  memcpy(d, s, left);
}

#define NAME_(a, b) a##b
#define NAME(a, b) NAME_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
const shm_kernels NAME(shm_kernels_, SHM_ISA) = {
    .isa = TEXT(SHM_ISA),
    .reduce = {[PHX_F32] = {sum_f32, min_f32, max_f32},
               [PHX_F64] = {sum_f64, min_f64, max_f64},
               [PHX_BF16] = {sum_bf16, min_bf16, max_bf16},
               [PHX_I32] = {sum_32, min_i32, max_i32},
               [PHX_I64] = {sum_64, min_i64, max_i64},
               [PHX_U8] = {sum_8, min_u8, max_u8},
               [PHX_U16] = {sum_16, min_u16, max_u16},
               [PHX_U32] = {sum_32, min_u32, max_u32},
               [PHX_U64] = {sum_64, min_u64, max_u64}},
    .copy = copy,
};
