/* plugins/cuda/product.c - products by cuBLASLt: descriptors and algorithms kept by shape, dtype and epilogue.
 *
 * cuBLASLt speaks column-major.  A row-major (m, n; ld) array is the column-major (n, m; ld) of its transpose, so
 * c = op(a) op(b) is asked for as c' = op(b)' op(a)', b first: rows of c' are columns of c, and cuBLASLt's bias, a
 * vector along the rows of its result, is ours along columns.  BGRADB sums its second operand, our a, over k.
 * The heuristic is asked once for each key; the same key gives the same algorithm in every run on the same device and
 * version of the library.  Pointers enter by their alignment only (256 bytes where they have it): that of a parameter
 * is its place in its unit, so it is the same in every run and under every strategy.  With [run] deterministic, and
 * where the result is bf16, a split over k may reduce in fp32 through the workspace only: one rounding.
 * Epilogues that cuBLASLt has no algorithm for are remembered too: the caller then finishes with a kernel.  So it does
 * where the pointer of an epilogue is not on 16 bytes, which the library refuses or not, by its version.
 * The library is opened with the first device, not with the plugin: it is half a gigabyte, which `auto` would load on
 * every machine only to hear that there is no driver.  [main] */
#include <cublasLt.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"
#include "library.h"

/* ---- the library ---- */
#define LIBRARY_NAME(major) "libcublasLt.so." #major
#define LIBRARY_NAME_OF(major) LIBRARY_NAME(major)
#ifndef PHX__CUBLASLT /* a test build names its double */
#define PHX__CUBLASLT LIBRARY_NAME_OF(CUBLAS_VER_MAJOR)
#endif
#define FUNCTIONS(X) \
  X(Create) X(Destroy) X(GetVersion) X(GetStatusName) X(Matmul) X(MatmulAlgoGetHeuristic) X(MatmulDescCreate) \
  X(MatmulDescDestroy) X(MatmulDescSetAttribute) X(MatmulPreferenceCreate) X(MatmulPreferenceDestroy) \
  X(MatmulPreferenceSetAttribute) X(MatrixLayoutCreate) X(MatrixLayoutDestroy)
#define FIELD(name) __typeof__(cublasLt##name) *name;
static struct {
  void *library; /* stays open: another device of this process finds it here */
  FUNCTIONS(FIELD)
} blaslt;
#undef FIELD

static phx_status open_library(phx__cuda *cuda, phx_error *err) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* a process may make devices in several threads */
  phx_status status = PHX_OK;
  pthread_mutex_lock(&lock);
  if (!blaslt.library) {
    blaslt.library = dlopen(PHX__CUBLASLT, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!blaslt.library) {
      const char *why = dlerror();
      status =
          phx__cuda_fail(cuda, err, PHX_UNSUPPORTED,
                         "cuBLASLt was not found (%s): install it with CUDA, or name its folder in LD_LIBRARY_PATH",
                         why ? why : PHX__CUBLASLT);
    }
#define FIND(name) &phx__library_find(blaslt.library, "cublasLt" #name, &blaslt.name)
    else if (!(1 FUNCTIONS(FIND))) {
      blaslt.library = NULL;
      status = phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, PHX__CUBLASLT " lacks functions that this plugin needs");
    }
#undef FIND
  }
  pthread_mutex_unlock(&lock);
  return status;
}

enum { EPILOGUE_ALIGN = 16 }; /* bytes, of bias and aux */

typedef struct key { /* no padding: compared as bytes */
  int32_t in_dtype, out_dtype, a_t, b_t, accumulate, epilogue, has_bias, has_aux;
  int64_t m, n, k, lda, ldb, ldc, alignment;
} key;

typedef struct entry {
  key key;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, c; /* as cuBLASLt names them: a is our b */
  cublasLtMatmulAlgo_t algo;
  int32_t known, works; /* known: the heuristic was asked */
} entry;

struct phx__cuda_products {
  cublasLtHandle_t handle;
  entry **entries;
  int32_t n, room;
};

static phx_status check(const phx__cuda *cuda, cublasStatus_t status, const char *what, phx_error *err) {
  if (status == CUBLAS_STATUS_SUCCESS) return PHX_OK;
  const phx_status code = status == CUBLAS_STATUS_ALLOC_FAILED ? PHX_NOMEM : PHX_DEVICE;
  phx__cuda_fail(cuda, err, code, "%s: cuBLASLt: %s (%d)", what, blaslt.GetStatusName(status), (int)status);
  if (err) err->cause = (int32_t)status;
  return code;
}

int64_t phx__cuda_products_version(void) { return (int64_t)blaslt.GetVersion(); }

phx_status phx__cuda_products_begin(phx__cuda *cuda, phx_error *err) {
  PHX_TRY(open_library(cuda, err));
  cuda->products = calloc(1, sizeof *cuda->products);
  if (!cuda->products) return phx__cuda_fail(cuda, err, PHX_NOMEM, "no memory for the products");
  return check(cuda, blaslt.Create(&cuda->products->handle), "cublasLtCreate", err);
}

static void entry_free(entry *e) {
  if (e->desc) (void)blaslt.MatmulDescDestroy(e->desc);
  if (e->a) (void)blaslt.MatrixLayoutDestroy(e->a);
  if (e->b) (void)blaslt.MatrixLayoutDestroy(e->b);
  if (e->c) (void)blaslt.MatrixLayoutDestroy(e->c);
  free(e);
}

void phx__cuda_products_end(phx__cuda *cuda) {
  struct phx__cuda_products *p = cuda->products;
  if (!p) return;
  for (int32_t i = 0; i < p->n; i++) entry_free(p->entries[i]);
  free(p->entries);
  if (p->handle) (void)blaslt.Destroy(p->handle);
  free(p);
  cuda->products = NULL;
}

/* ---- what is asked for ---- */
static int64_t alignment_of(const phx__cuda_product *p) {
  const uintptr_t all = (uintptr_t)p->a | (uintptr_t)p->b | (uintptr_t)p->c | (uintptr_t)p->bias | (uintptr_t)p->aux |
                        PHX_ALIGN;
  return (int64_t)(all & -all); /* the lowest bit that is set */
}

static key key_of(const phx__cuda_product *p) {
  key k;
  memset(&k, 0, sizeof k);
  k.in_dtype = p->in_dtype, k.out_dtype = p->out_dtype;
  k.a_t = p->a_t, k.b_t = p->b_t, k.accumulate = p->accumulate, k.epilogue = p->epilogue;
  k.has_bias = p->bias != NULL, k.has_aux = p->aux != NULL;
  k.m = p->m, k.n = p->n, k.k = p->k, k.lda = p->lda, k.ldb = p->ldb, k.ldc = p->ldc;
  k.alignment = alignment_of(p);
  return k;
}

static cublasLtEpilogue_t epilogue_of(const key *k) {
  switch (k->epilogue) {
    case PHX__EPILOGUE_BIAS: return CUBLASLT_EPILOGUE_BIAS;
    case PHX__EPILOGUE_GELU:
      if (k->has_aux) return k->has_bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
      return k->has_bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case PHX__EPILOGUE_DGELU: return CUBLASLT_EPILOGUE_DGELU;
    case PHX__EPILOGUE_BIAS_GRADIENT: return CUBLASLT_EPILOGUE_BGRADB;
    default: return CUBLASLT_EPILOGUE_DEFAULT;
  }
}

static cudaDataType_t type_of(int32_t dtype) { return dtype == PHX_BF16 ? CUDA_R_16BF : CUDA_R_32F; }

/* Pointers are attributes, and the heuristic looks at their alignment: set before it is asked, and at every call. */
static cublasStatus_t set_pointers(const entry *e, const phx__cuda_product *p) {
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  if (p->bias)
    status = blaslt.MatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
  if (p->aux && status == CUBLAS_STATUS_SUCCESS)
    status = blaslt.MatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p->aux, sizeof p->aux);
  return status;
}

static cublasStatus_t describe(const phx__cuda *cuda, entry *e) {
  const key *k = &e->key;
  const cublasComputeType_t compute =
      cuda->config.tf32 && k->in_dtype == PHX_F32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  const cublasOperation_t op_a = k->b_t ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = k->a_t ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasLtEpilogue_t epilogue = epilogue_of(k);
  const cudaDataType_t in = type_of(k->in_dtype), out = type_of(k->out_dtype);
  const uint64_t n = (uint64_t)k->n, m = (uint64_t)k->m, depth = (uint64_t)k->k;
  cublasStatus_t status = blaslt.MatmulDescCreate(&e->desc, compute, CUDA_R_32F);
#define NEXT(call) \
  if (status == CUBLAS_STATUS_SUCCESS) status = call
  NEXT(blaslt.MatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
  NEXT(blaslt.MatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
  NEXT(blaslt.MatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
  if (k->has_aux)
    NEXT(blaslt.MatmulDescSetAttribute(e->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &k->n, sizeof k->n));
  NEXT(blaslt.MatrixLayoutCreate(&e->a, in, k->b_t ? depth : n, k->b_t ? n : depth, k->ldb));
  NEXT(blaslt.MatrixLayoutCreate(&e->b, in, k->a_t ? m : depth, k->a_t ? depth : m, k->lda));
  NEXT(blaslt.MatrixLayoutCreate(&e->c, out, n, m, k->ldc));
#undef NEXT
  return status;
}

static cublasStatus_t ask(const phx__cuda *cuda, entry *e) {
  cublasLtMatmulPreference_t wish;
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  const uint64_t workspace = (uint64_t)cuda->config.workspace;
  const uint32_t alignment = (uint32_t)e->key.alignment;
  const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* NONE is 0: always allowed */
  const cublasLtMatmulPreferenceAttributes_t sides[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  cublasStatus_t status = blaslt.MatmulPreferenceCreate(&wish);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  status =
      blaslt.MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  for (int i = 0; i < 4 && status == CUBLAS_STATUS_SUCCESS; i++)
    status = blaslt.MatmulPreferenceSetAttribute(wish, sides[i], &alignment, sizeof alignment);
  if ((cuda->host->deterministic || e->key.out_dtype == PHX_BF16) && status == CUBLAS_STATUS_SUCCESS)
    status =
        blaslt.MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes);
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = blaslt.MatmulAlgoGetHeuristic(cuda->products->handle, e->desc, e->a, e->b, e->c, e->c, wish, 1, &result,
                                           &found);
    const int fused = e->key.epilogue != PHX__EPILOGUE_NONE; /* some versions call what they cannot fuse invalid */
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || (fused && status == CUBLAS_STATUS_INVALID_VALUE))
      status = CUBLAS_STATUS_SUCCESS, found = 0;
  }
  (void)blaslt.MatmulPreferenceDestroy(wish);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  e->known = 1;
  e->works = found > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  if (e->works) e->algo = result.algo;
  return CUBLAS_STATUS_SUCCESS;
}

/* ---- the cache ---- */
static phx_status find_entry(phx__cuda *cuda, const phx__cuda_product *p, const char *what, entry **out,
                             phx_error *err) {
  struct phx__cuda_products *all = cuda->products;
  const key k = key_of(p);
  for (int32_t i = 0; i < all->n; i++) /* a model has some tens of shapes: comparing is cheaper than hashing */
    if (memcmp(&all->entries[i]->key, &k, sizeof k) == 0) {
      *out = all->entries[i];
      return PHX_OK;
    }
  if (all->n == all->room) {
    const int32_t room = all->room ? 2 * all->room : 32;
    entry **more = realloc(all->entries, (size_t)room * sizeof *more);
    if (!more) return phx__cuda_fail(cuda, err, PHX_NOMEM, "%s: no memory for a shape", what);
    all->entries = more;
    all->room = room;
  }
  entry *e = calloc(1, sizeof *e);
  if (!e) return phx__cuda_fail(cuda, err, PHX_NOMEM, "%s: no memory for a shape", what);
  e->key = k;
  cublasStatus_t status = describe(cuda, e);
  if (status == CUBLAS_STATUS_SUCCESS) status = set_pointers(e, p);
  if (status == CUBLAS_STATUS_SUCCESS) status = ask(cuda, e);
  if (status != CUBLAS_STATUS_SUCCESS) {
    entry_free(e);
    return check(cuda, status, what, err);
  }
  all->entries[all->n++] = e;
  *out = e;
  return PHX_OK;
}

phx_status phx__cuda_product_run(phx__cuda *cuda, const phx__cuda_product *p, cudaStream_t s, const char *what,
                                 int32_t *done, phx_error *err) {
  const float one = 1.0f, beta = p->accumulate ? 1.0f : 0.0f;
  void *scratch;
  entry *e = NULL;
  *done = 0;
  if (p->epilogue != PHX__EPILOGUE_NONE && ((uintptr_t)p->bias | (uintptr_t)p->aux) % EPILOGUE_ALIGN) return PHX_OK;
  phx_status status = find_entry(cuda, p, what, &e, err);
  if (status != PHX_OK || !e->works) {
    if (status == PHX_OK && p->epilogue == PHX__EPILOGUE_NONE)
      status = phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: cuBLASLt has no algorithm for (%lld, %lld, %lld)", what,
                              (long long)p->m, (long long)p->n, (long long)p->k);
    return status;
  }
  PHX_TRY(phx__cuda_scratch(cuda, s, 0, what, &scratch, err));
  PHX_TRY(check(cuda, set_pointers(e, p), what, err));
  void *workspace = (char *)scratch + cuda->scratch_bytes;
  status = check(cuda,
                 blaslt.Matmul(cuda->products->handle, e->desc, &one, p->b, e->a, p->a, e->b, &beta, p->c, e->c, p->c,
                               e->c, &e->algo, workspace, (size_t)cuda->config.workspace, s),
                 what, err);
  if (status == PHX_OK) *done = 1;
  return status;
}
