/* plugins/cuda/cuda.h - what the files of the cuda device share.
 *
 * Host files are C on the runtime's C interface; .cu files hold the kernels and the few lines that launch them.  The
 * same sources are compiled a second time by the host's compiler against tests/emulation.
 *
 * Operations run on the stream they are given, asynchronously; those that need scratch are put in order by
 * phx__cuda_scratch when they come on different streams.  Every call of the runtime is checked (phx__cuda_check); a
 * kernel's fault shows at a later call, and the message says so. */
#ifndef PHX__CUDA_H
#define PHX__CUDA_H
#include <cuda_runtime_api.h>
#include <phalanx/error.h>
#include <phalanx/provider.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct phx__cuda_config {
  int32_t share, tf32, attention, profile;
  int64_t workspace; /* from the end of create: bytes, never auto (-1) */
} phx__cuda_config;

struct phx__cuda_products; /* product.c */
struct phx__cuda_cudnn;    /* attention_cudnn.c */
struct phx__cuda_profile;  /* profile.c */
typedef int phx__cuda_wait_value(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned flags);

typedef struct phx__cuda {
  const phx_host *host;
  phx__cuda_config config;
  int32_t device_index, sharing; /* sharing: other ranks of this job are on this GPU too */
  int32_t multiprocessors, shared_limit; /* shared_limit: bytes of shared memory a block may ask for */
  int32_t failed_call;           /* a runtime call failed: destroy frees what it can and says nothing more */
  cudaStream_t compute;
  phx_stream *streams;           /* all that exist but the compute stream */
  phx_stream *first;             /* the compute stream as an object: what it keeps of failures */
  phx__cuda_wait_value *wait_value; /* the driver's cuStreamWaitValue32 */
  void *scratch;                 /* NULL before the first alloc */
  int64_t scratch_bytes;         /* the operations' own, behind it the products' workspace */
  cudaStream_t scratch_stream;   /* who used it last */
  cudaEvent_t scratch_event;
  int64_t used_before;           /* bytes in use on the device when we came */
  struct phx__cuda_products *products;
  struct phx__cuda_cudnn *cudnn; /* NULL: own attention only */
  struct phx__cuda_profile *profile; /* NULL: not asked for */
  char name[160];
  phx_device device;
  phx_ops ops;
} phx__cuda;

/* ---- plugin.c ---- */
/* Fills err (may be NULL) with "cuda: rank R: ..." and returns code; cuda may be NULL (no rank yet). */
phx_status phx__cuda_fail(const phx__cuda *cuda, phx_error *err, phx_status code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* PHX_OK, or the failure of a runtime call or launch in `what`; cause is the cudaError. */
phx_status phx__cuda_check(const phx__cuda *cuda, cudaError_t error, const char *what, phx_error *err);
void phx__cuda_log(const phx__cuda *cuda, int32_t level, const char *message);

/* ---- memory.c ---- */
phx_status phx__cuda_alloc(phx__cuda *cuda, int32_t space, int64_t bytes, void **out, phx_error *err);
void phx__cuda_free(phx__cuda *cuda, int32_t space, void *p, int64_t bytes);
/* The first alloc takes the scratch. */
phx_status phx__cuda_take_scratch(phx__cuda *cuda, phx_error *err);
/* The scratch for work on stream s, behind what used it last. Refuses more than there is. */
phx_status phx__cuda_scratch(phx__cuda *cuda, cudaStream_t s, int64_t bytes, const char *what, void **out,
                             phx_error *err);
int64_t phx__cuda_driver_bytes(const phx__cuda *cuda);
/* As phx_device's space, pin and unpin. */
int32_t phx__cuda_space(void *ctx, const void *p);
phx_status phx__cuda_pin(void *ctx, void *p, int64_t bytes, phx_error *err);
void phx__cuda_unpin(void *ctx, void *p);
phx_status phx__cuda_bytes_in_use(const phx__cuda *cuda, int64_t *out, phx_error *err);

/* ---- profile.c ---- */
phx_status phx__cuda_profile_begin(phx__cuda *cuda, phx_error *err); /* behind the tables: wraps them */
void phx__cuda_profile_end(phx__cuda *cuda);                         /* says the result; the streams are still there */
phx_status phx__cuda_profile_drain(phx__cuda *cuda, phx_error *err); /* waits for what is timed */

/* ---- stream.c ---- */
void phx__cuda_device_init(phx__cuda *cuda); /* fills cuda->device */
phx_status phx__cuda_streams_begin(phx__cuda *cuda, phx_error *err); /* the compute stream */
void phx__cuda_streams_end(phx__cuda *cuda);
cudaStream_t phx__cuda_stream(const phx__cuda *cuda, phx_stream *s); /* NULL: the compute stream */

/* ---- product.c: cuBLASLt ---- */
enum { PHX__EPILOGUE_NONE, PHX__EPILOGUE_BIAS, PHX__EPILOGUE_GELU, PHX__EPILOGUE_DGELU, PHX__EPILOGUE_BIAS_GRADIENT };
/* Row-major: c(m, n; ldc) = op(a) op(b).  a is (m, k; lda), or with a_t (k, m; lda); b is (k, n; ldb), or with b_t
 * (n, k; ldb).  BIAS: + bias(n).  GELU: GELU_tanh(... + bias), aux(m, n) receives what it was taken of, if not NULL;
 * bias may be NULL.  DGELU: c = (...) * GELU_tanh'(aux).  BIAS_GRADIENT: bias(m) receives the row sums of op(a). */
typedef struct phx__cuda_product {
  int32_t in_dtype, out_dtype, a_t, b_t, accumulate, epilogue;
  int64_t m, n, k, lda, ldb, ldc;
  const void *a, *b;
  void *c, *bias, *aux;
} phx__cuda_product;
phx_status phx__cuda_products_begin(phx__cuda *cuda, phx_error *err);
void phx__cuda_products_end(phx__cuda *cuda);
int64_t phx__cuda_products_version(void);
/* *done = 0 and PHX_OK where cuBLASLt has no algorithm for it (an epilogue with this layout): nothing was started. */
phx_status phx__cuda_product_run(phx__cuda *cuda, const phx__cuda_product *p, cudaStream_t s, const char *what,
                                 int32_t *done, phx_error *err);

/* ---- attention_cudnn.c ---- */
/* Finds cuDNN, or says why attention is our own; refuses where the configuration insists. */
phx_status phx__cuda_attention_begin(phx__cuda *cuda, phx_error *err);
void phx__cuda_attention_end(phx__cuda *cuda);

/* ---- kernels (.cu): each starts its work on the stream; sizes were checked ---- */
cudaError_t phx__cuda_k_add(int32_t dtype, void *out, const void *a, const void *b, int64_t n, cudaStream_t s);
cudaError_t phx__cuda_k_scale(float *x, float by, int64_t n, cudaStream_t s);
cudaError_t phx__cuda_k_cast(void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t n,
                             cudaStream_t s);
typedef struct phx__cuda_update {
  float *w, *m, *v; /* m and v NULL: sgd */
  const float *g;
  void *low;
  int32_t low_dtype;
  float scale, lr, beta1, beta2, rest1, rest2, c1, c2, eps, decay;
} phx__cuda_update;
cudaError_t phx__cuda_k_update(const phx__cuda_update *u, int64_t n, cudaStream_t s);
cudaError_t phx__cuda_k_block_norms(double *sums, const float *x, int64_t blocks, cudaStream_t s);
cudaError_t phx__cuda_k_mean(double *out, const float *x, int64_t n, cudaStream_t s);
/* out = act(sums + bias) or sums * GELU'(pre), rows of a product kept in fp32: where no epilogue does it. */
typedef struct phx__cuda_finish {
  int32_t dtype, gelu, accumulate; /* accumulate: out += */
  void *out, *pre;                 /* pre: written (forward) */
  const void *bias, *slope_of;     /* slope_of: GELU' of it (backward) */
  int64_t rows, columns, out_ld;
} phx__cuda_finish;
cudaError_t phx__cuda_k_finish(const phx__cuda_finish *f, const float *sums, cudaStream_t s);
/* out(c) (+)= column sums of x(n, c; ld) in dtype; parts: scratch of slices * c floats. */
cudaError_t phx__cuda_k_column_sums(float *out, int32_t mode, int32_t dtype, const void *x, int64_t ld, int64_t n,
                                    int64_t c, float *parts, int64_t slices, cudaStream_t s);
cudaError_t phx__cuda_k_accumulate(float *out, const float *x, int64_t n, cudaStream_t s); /* out += x */
cudaError_t phx__cuda_k_embedding(int32_t dtype, void *out, const int32_t *tokens, const void *wte, const void *wpe,
                                  int64_t b, int64_t t, int64_t c, cudaStream_t s);
/* scratch: 2 * (v + n) integers */
cudaError_t phx__cuda_k_embedding_tokens(int32_t dtype, float *dwte, int32_t mode, const void *dout,
                                         const int32_t *tokens, int64_t n, int64_t c, int64_t v, int32_t *scratch,
                                         cudaStream_t s);
cudaError_t phx__cuda_k_embedding_places(int32_t dtype, float *dwpe, int32_t mode, const void *dout, int64_t b,
                                         int64_t t, int64_t c, int64_t max_t, cudaStream_t s);
cudaError_t phx__cuda_k_layer_norm(int32_t dtype, void *out, void *sum, float *mean, float *rstd, const void *a,
                                   const void *b, const void *w, const void *bias, int64_t n, int64_t c, float eps,
                                   cudaStream_t s);
typedef struct phx__cuda_norm_backward {
  int32_t dtype, w_mode, b_mode, reserved0;
  void *dx;
  const void *add, *dout, *x, *w;
  float *dw, *db, *parts; /* parts: slices * 2 * c floats of scratch */
  const float *mean, *rstd;
  int64_t n, c, slices;
} phx__cuda_norm_backward;
cudaError_t phx__cuda_k_layer_norm_backward(const phx__cuda_norm_backward *p, cudaStream_t s);
cudaError_t phx__cuda_k_cross_entropy(int32_t dtype, void *logits, float *losses, const int32_t *targets, int64_t n,
                                      int64_t v, int64_t vp, int32_t gradient, float scale, int64_t shared_limit,
                                      cudaStream_t s);

/* ---- ops*.c ---- */
/* An operation has the type of its member in phx_ops. */
#ifndef __cplusplus
#define PHX__CUDA_OP(name) extern __typeof__(*((phx_ops *)0)->name) phx__cuda_##name
PHX__CUDA_OP(linear);                 /* ops_linear.c */
PHX__CUDA_OP(linear_backward_input);  /* ops_linear.c */
PHX__CUDA_OP(linear_backward_weight); /* ops_linear.c */
PHX__CUDA_OP(attention);              /* attention.c */
PHX__CUDA_OP(attention_backward);     /* attention.c */
void phx__cuda_ops_init(phx__cuda *cuda); /* ops.c: fills cuda->ops */
#endif
/* The first call of an operation: is the dtype one of F32 and BF16? */
phx_status phx__cuda_begin(const phx__cuda *cuda, int32_t dtype, const char *what, phx_error *err);

#ifdef __cplusplus
}
#endif
#endif
