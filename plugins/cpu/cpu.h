/* plugins/cpu/cpu.h - what the files of the cpu device share.
 *
 * Two kinds of files.  Plain files (plugin.c, memory.c, stream.c, parallel.c, product*.c) are compiled once.  Kernel
 * files (ops_*.c, attention.c, cross_entropy.c) are compiled three times, for x86-64, x86-64-v3 and x86-64-v4, with
 * PHX__CPU_ISA set to base, avx2 or avx512; the operations they define get that suffix through the macros at the end,
 * and plugin.c picks one set at create.  All three give the same bits where they keep one order of additions (16 lanes)
 * and no fused multiply-add (-ffp-contract=off): then only products by oneDNN differ between instruction sets.
 *
 * Operations run on the compute stream, inline, one at a time: they may use all of cpu->threads and the whole scratch.
 */
#ifndef PHX__CPU_H
#define PHX__CPU_H
#include <phalanx/error.h>
#include <phalanx/provider.h>

enum { PHX__CPU_BASE = 0, PHX__CPU_AVX2 = 1, PHX__CPU_AVX512 = 2 };

/* One instruction set's functions (ops_table.c). */
typedef struct phx__cpu_kernels {
  phx_ops ops;                                   /* without ctx and scratch_bytes */
  int64_t (*attention_scratch)(int32_t threads); /* bytes */
  /* Elementwise on one thread, any slicing, any alignment of whole elements.  dtypes: F32, F16, BF16. */
  void (*cast)(void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel);
  void (*add)(float *out, const float *a, const float *b, int64_t numel); /* out may be a or b */
  void (*scale)(float *x, float by, int64_t numel);
} phx__cpu_kernels;
extern const phx__cpu_kernels phx__cpu_kernels_base, phx__cpu_kernels_avx2, phx__cpu_kernels_avx512;

typedef struct phx__cpu_matmuls phx__cpu_matmuls;

/* The scratch: where a kernel keeps a tile of a product, then what the product itself needs. */
enum { PHX__CPU_TILE_BYTES = 3 << 20, PHX__CPU_SCRATCH_LEAST = 4 << 20 };

typedef struct phx__cpu {
  const phx_host *host;
  int32_t threads; /* of operations, >= 1 */
  int32_t isa;     /* PHX__CPU_* in use */
  void *scratch;   /* NULL before the first use: ask phx__cpu_scratch */
  int64_t scratch_bytes;
  int32_t page_size_logged;
  int32_t bf16; /* the processor multiplies bf16 */
  phx__cpu_matmuls *matmuls; /* product_bf16.c; NULL before the first product */
  const phx__cpu_kernels *kernels;
  char name[96];
  phx_device device;
  phx_ops ops;
} phx__cpu;

/* ---- parallel.c ---- */
/* Work on items [first, last); worker < cpu->threads, for a part of the scratch.  Must not fail. */
typedef void phx__cpu_body(void *arg, int64_t first, int64_t last, int32_t worker);
/* Splits [0, items) into one contiguous range per thread, each a multiple of `grain` long but the last.  One thread:
 * runs inline.  Where the ranges are cut depends on the number of threads, so a body must give each item bits that do
 * not depend on the cut. */
void phx__cpu_parallel(const phx__cpu *cpu, int64_t items, int64_t grain, phx__cpu_body *body, void *arg);

/* Makes OpenMP's settings and runs one region of `threads`: how many threads it really has, >= 1.  *cpus: how many CPUs
 * those threads may run on, together; *available: how many this process had when OpenMP was loaded. */
int32_t phx__cpu_team(int32_t threads, int32_t *cpus, int32_t *available);
/* Makes the settings again where a plugin changed them: before whatever is cut by omp_get_max_threads(). */
void phx__cpu_settle(const phx__cpu *cpu);
void phx__cpu_parallel_end(const phx__cpu *cpu); /* ends the threads; a later loop starts new ones */

/* ---- memory.c ---- */
phx_status phx__cpu_alloc(phx__cpu *cpu, int64_t bytes, void **out, phx_error *err);
void phx__cpu_free(void *p, int64_t bytes);
/* The scratch, cpu->scratch_bytes long, PHX_ALIGN-aligned; an operation owns it until it returns.  Its contents are
 * left by whoever used it before. */
phx_status phx__cpu_scratch(phx__cpu *cpu, void **out, phx_error *err);

/* ---- product.c: row-major, fp32, by oneDNN ---- */
/* c(m, n; ldc) = a b (accumulate: added to c).  a is (m, k; lda), or with a_t the (k, m; lda) matrix is transposed; b
 * is (k, n; ldb), or with b_t (n, k; ldb) transposed. */
phx_status phx__cpu_product(const phx__cpu *cpu, int32_t a_t, int32_t b_t, int64_t m, int64_t n, int64_t k,
                            const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                            int32_t accumulate, phx_error *err);

/* ---- product_bf16.c ---- */
/* The same with a and b in bf16 and c in fp32.  Uses the scratch from PHX__CPU_TILE_BYTES on. */
phx_status phx__cpu_product_bf16(phx__cpu *cpu, int32_t a_t, int32_t b_t, int64_t m, int64_t n, int64_t k,
                                 const void *a, int64_t lda, const void *b, int64_t ldb, float *c, int64_t ldc,
                                 int32_t accumulate, phx_error *err);
void phx__cpu_product_bf16_end(phx__cpu *cpu); /* frees what it keeps */

void phx__cpu_product_version(int32_t version[3]);
/* [main] before the first product of the process: keeps oneDNN at PHX__CPU_BASE or PHX__CPU_AVX2. */
phx_status phx__cpu_product_isa(int32_t isa, phx_error *err);
int32_t phx__cpu_product_has_bf16(void); /* does oneDNN use the processor's bf16 instructions?  Settles its limit. */

/* ---- stream.c ---- */
void phx__cpu_device_init(phx__cpu *cpu); /* fills cpu->device */
/* The first call of every operation: operations run inline, so on a thread stream they first wait for what is queued
 * there (and return its failure).  At once on the compute stream. */
phx_status phx__cpu_enter(phx__cpu *cpu, phx_stream *s, phx_error *err);
/* The same for an operation with a dtype, which is refused when it is not offered. */
phx_status phx__cpu_begin(phx__cpu *cpu, int32_t dtype, phx_stream *s, phx_error *err);

/* ---- kernel files: every name below has a suffix in the object file ---- */
#define PHX__CPU_JOIN_(name, isa) name##_##isa
#define PHX__CPU_JOIN(name, isa) PHX__CPU_JOIN_(name, isa)
#ifdef PHX__CPU_ISA
#define PHX__CPU_NAME(name) PHX__CPU_JOIN(name, PHX__CPU_ISA)
#define phx__cpu_attention PHX__CPU_NAME(phx__cpu_attention)
#define phx__cpu_attention_backward PHX__CPU_NAME(phx__cpu_attention_backward)
#define phx__cpu_attention_scratch PHX__CPU_NAME(phx__cpu_attention_scratch)
#define phx__cpu_cross_entropy PHX__CPU_NAME(phx__cpu_cross_entropy)
#define phx__cpu_linear PHX__CPU_NAME(phx__cpu_linear)
#define phx__cpu_linear_backward_input PHX__CPU_NAME(phx__cpu_linear_backward_input)
#define phx__cpu_linear_backward_weight PHX__CPU_NAME(phx__cpu_linear_backward_weight)
#define phx__cpu_embedding PHX__CPU_NAME(phx__cpu_embedding)
#define phx__cpu_embedding_backward PHX__CPU_NAME(phx__cpu_embedding_backward)
#define phx__cpu_layer_norm PHX__CPU_NAME(phx__cpu_layer_norm)
#define phx__cpu_layer_norm_backward PHX__CPU_NAME(phx__cpu_layer_norm_backward)
#define phx__cpu_add PHX__CPU_NAME(phx__cpu_add)
#define phx__cpu_adamw PHX__CPU_NAME(phx__cpu_adamw)
#define phx__cpu_sgd PHX__CPU_NAME(phx__cpu_sgd)
#define phx__cpu_block_norms PHX__CPU_NAME(phx__cpu_block_norms)
#define phx__cpu_mean PHX__CPU_NAME(phx__cpu_mean)
#define phx__cpu_this_kernels PHX__CPU_JOIN(phx__cpu_kernels, PHX__CPU_ISA)
#define phx__cpu_slice_cast PHX__CPU_NAME(phx__cpu_slice_cast)
#define phx__cpu_slice_add PHX__CPU_NAME(phx__cpu_slice_add)
#define phx__cpu_slice_scale PHX__CPU_NAME(phx__cpu_slice_scale)

/* An operation has the type of its member in phx_ops. */
#define PHX__CPU_OP(name) extern __typeof__(*((phx_ops *)0)->name) phx__cpu_##name
PHX__CPU_OP(linear);
PHX__CPU_OP(linear_backward_input);
PHX__CPU_OP(linear_backward_weight);
PHX__CPU_OP(embedding);
PHX__CPU_OP(embedding_backward);
PHX__CPU_OP(layer_norm);
PHX__CPU_OP(layer_norm_backward);
PHX__CPU_OP(add);
PHX__CPU_OP(attention);          /* attention.c */
PHX__CPU_OP(attention_backward); /* attention.c */
PHX__CPU_OP(cross_entropy);      /* cross_entropy.c */
PHX__CPU_OP(adamw);
PHX__CPU_OP(sgd);
PHX__CPU_OP(block_norms);
PHX__CPU_OP(mean);
int64_t phx__cpu_attention_scratch(int32_t threads); /* bytes of scratch that attention and its backward need */
void phx__cpu_slice_cast(void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel);
void phx__cpu_slice_add(float *out, const float *a, const float *b, int64_t numel);
void phx__cpu_slice_scale(float *x, float by, int64_t numel);
#endif
#endif
