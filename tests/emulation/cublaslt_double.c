/* cublaslt_double.c - products as cuBLASLt is asked for them, computed plainly: column-major, sums in fp32 over k.
 *
 * It refuses what the library's documentation refuses: operands that do not fit, leading dimensions of aux not
 * divisible by 8, bias and aux that are not on 16 bytes, operands less aligned than was declared, an algorithm asked
 * for another product, too small a workspace; and writes rubbish to the workspace, since the library may.
 * PHX_CUDA_DOUBLE_REFUSE=BITS sets `refuse`.  Threads: one. */
#include "cublaslt_double.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "double_inner.h"

struct cublasLtContext {
  int alive;
};
struct emulated_matmul_desc {
  cublasComputeType_t compute;
  cublasOperation_t op_a, op_b;
  cublasLtEpilogue_t epilogue;
  void *bias, *aux;
  int64_t aux_ld;
};
struct emulated_layout {
  cudaDataType_t type;
  int64_t rows, columns, ld;
};
struct emulated_preference {
  uint64_t workspace;
  uint32_t alignment[4], schemes;
};

cublaslt_double_state cublaslt_double = {.reduction_mask = 7};

size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    default: return "CUBLAS_STATUS_INTERNAL_ERROR";
  }
}

#define LT_ENTER(name) \
  if (cuda_double_enter(name) != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED

static void *make(size_t bytes) {
  void *p = calloc(1, bytes);
  if (!p) abort();
  __atomic_fetch_add(&cublaslt_double.alive, 1, __ATOMIC_RELAXED);
  return p;
}
static cublasStatus_t unmake(void *p) {
  if (!p) return CUBLAS_STATUS_INVALID_VALUE;
  free(p);
  __atomic_fetch_sub(&cublaslt_double.alive, 1, __ATOMIC_RELAXED);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  const char *refuse = getenv("PHX_CUDA_DOUBLE_REFUSE");
  LT_ENTER("cublasLtCreate");
  if (refuse) cublaslt_double.refuse = atoi(refuse);
  *handle = make(sizeof **handle);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return unmake(handle); }
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return unmake(desc); }
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return unmake(layout); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return unmake(preference); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
  LT_ENTER("cublasLtMatmulDescCreate");
  if (scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
  *desc = make(sizeof **desc);
  (*desc)->compute = compute;
  (*desc)->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t set(void *field, size_t size, const void *value, size_t bytes) {
  if (!value || bytes != size) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy(field, value, size);
  return CUBLAS_STATUS_SUCCESS;
}
#define SET(field) set(&(field), sizeof(field), value, bytes)

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes) {
  LT_ENTER("cublasLtMatmulDescSetAttribute");
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return SET(desc->op_a);
    case CUBLASLT_MATMUL_DESC_TRANSB: return SET(desc->op_b);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return SET(desc->epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return SET(desc->bias);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return SET(desc->aux);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return SET(desc->aux_ld);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
  LT_ENTER("cublasLtMatrixLayoutCreate");
  if (ld < (int64_t)rows || (type != CUDA_R_32F && type != CUDA_R_16BF)) return CUBLAS_STATUS_INVALID_VALUE;
  *layout = make(sizeof **layout);
  **layout = (struct emulated_layout){type, (int64_t)rows, (int64_t)columns, ld};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
  LT_ENTER("cublasLtMatmulPreferenceCreate");
  *preference = make(sizeof **preference);
  (*preference)->schemes = 7;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes) {
  LT_ENTER("cublasLtMatmulPreferenceSetAttribute");
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return SET(preference->workspace);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return SET(preference->schemes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      return SET(preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES]);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

/* ---- the product ---- */
static int fits(const struct emulated_matmul_desc *desc, const struct emulated_layout *a,
                const struct emulated_layout *b, const struct emulated_layout *d) {
  const int a_plain = desc->op_a == CUBLAS_OP_N, b_plain = desc->op_b == CUBLAS_OP_N;
  const int64_t m = a_plain ? a->rows : a->columns, k = a_plain ? a->columns : a->rows;
  const int64_t n = b_plain ? b->columns : b->rows, kb = b_plain ? b->rows : b->columns;
  return m == d->rows && n == d->columns && k == kb && a->type == b->type &&
         (d->type == a->type || (a->type == CUDA_R_16BF && d->type == CUDA_R_32F));
}

static void identify(cublasLtMatmulAlgo_t *algo, const struct emulated_matmul_desc *desc,
                     const struct emulated_layout *a, const struct emulated_layout *b,
                     const struct emulated_layout *d, uint32_t alignment) {
  *algo = (cublasLtMatmulAlgo_t){{(uint64_t)d->rows, (uint64_t)d->columns, (uint64_t)a->rows, (uint64_t)b->rows,
                                  (uint64_t)(desc->epilogue * 100 + desc->op_a * 10 + desc->op_b), (uint64_t)a->type,
                                  (uint64_t)d->type, alignment}};
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found) {
  LT_ENTER("cublasLtMatmulAlgoGetHeuristic");
  *found = 0;
  if (!handle || wanted < 1 || !fits(desc, a, b, d) || c->rows != d->rows || c->type != d->type)
    return CUBLAS_STATUS_INVALID_VALUE;
  cublaslt_double.heuristics++;
  cublaslt_double.reduction_mask = preference->schemes;
  if (d->type == CUDA_R_16BF) cublaslt_double.bf16_masks |= preference->schemes;
  if (cublaslt_double.refuse & (int)desc->epilogue & ~1) return CUBLAS_STATUS_NOT_SUPPORTED;
  if ((desc->epilogue & 128) && desc->aux_ld % 8) return CUBLAS_STATUS_INVALID_VALUE;
  if (((uintptr_t)desc->bias | (uintptr_t)desc->aux) % 16) return CUBLAS_STATUS_INVALID_VALUE;
  memset(results, 0, sizeof *results);
  uint32_t declared = 1;
  for (int i = 0; i < 4; i++) declared = preference->alignment[i] > declared ? preference->alignment[i] : declared;
  identify(&results->algo, desc, a, b, d, declared);
  results->workspaceSize = preference->workspace < 1000 ? preference->workspace : 1000;
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

typedef struct job {
  struct emulated_matmul_desc desc;
  struct emulated_layout a, b, d;
  const void *pa, *pb;
  void *pd, *workspace;
  size_t workspace_bytes;
  float alpha, beta;
} job;

static float get(const void *p, cudaDataType_t type, int64_t i) {
  if (type == CUDA_R_32F) return ((const float *)p)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static void put(void *p, cudaDataType_t type, int64_t i, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int nan = (bits & 0x7fffffffu) > 0x7f800000u;
  if (type == CUDA_R_32F)
    ((float *)p)[i] = x;
  else
    ((uint16_t *)p)[i] = nan ? 0x7fff : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
static float gelu(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1 + tanhf(u));
}
static float gelu_slope(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x), th = tanhf(u);
  return 0.5f * (1 + th) + 0.5f * x * (1 - th * th) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

/* Element (i, j) of op(x). */
static float at(const void *p, const struct emulated_layout *x, cublasOperation_t op, int64_t i, int64_t j) {
  return get(p, x->type, op == CUBLAS_OP_N ? i + j * x->ld : j + i * x->ld);
}

static void run_job(void *arg) {
  const job *q = arg;
  const int e = (int)q->desc.epilogue;
  const cudaDataType_t type = q->d.type;
  const int64_t depth = q->desc.op_a == CUBLAS_OP_N ? q->a.columns : q->a.rows;
  if (q->workspace) memset(q->workspace, 0xEE, q->workspace_bytes);
  for (int64_t j = 0; j < q->d.columns; j++) {
    for (int64_t i = 0; i < q->d.rows; i++) {
      float sum = 0;
      for (int64_t k = 0; k < depth; k++)
        sum += at(q->pa, &q->a, q->desc.op_a, i, k) * at(q->pb, &q->b, q->desc.op_b, k, j);
      sum *= q->alpha;
      if (q->beta != 0) sum += q->beta * get(q->pd, type, i + j * q->d.ld);
      if (e & 4) sum += get(q->desc.bias, type, i);
      const int64_t aux = i + j * q->desc.aux_ld;
      if ((e & 32) && (e & 128)) put(q->desc.aux, type, aux, sum);
      if (e & 32) sum = gelu(sum);
      if (e & 64) sum *= gelu_slope(get(q->desc.aux, type, aux));
      put(q->pd, type, i + j * q->d.ld, sum);
    }
    float sum = 0;
    for (int64_t k = 0; (e & 512) && k < depth; k++) sum += at(q->pb, &q->b, q->desc.op_b, k, j);
    if (e & 512) put(q->desc.bias, type, j, sum);
  }
}

static int inside(const void *p, const struct emulated_layout *x) {
  const int64_t size = x->type == CUDA_R_32F ? 4 : 2;
  return double__find(p, NULL, NULL) == DOUBLE_ON_DEVICE &&
         double__inside(p, (size_t)(((x->columns - 1) * x->ld + x->rows) * size));
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
  cublasLtMatmulAlgo_t asked;
  LT_ENTER("cublasLtMatmul");
  const int e = (int)desc->epilogue;
  const uint32_t declared = (uint32_t)algo->data[7];
  if (declared == 0 || ((uintptr_t)a | (uintptr_t)b | (uintptr_t)d) % declared) return CUBLAS_STATUS_INVALID_VALUE;
  identify(&asked, desc, a_layout, b_layout, d_layout, declared);
  if (!handle || !fits(desc, a_layout, b_layout, d_layout) || c != d || c_layout != d_layout ||
      memcmp(&asked, algo, sizeof asked) != 0 || !inside(a, a_layout) || !inside(b, b_layout) || !inside(d, d_layout) ||
      ((e & (4 | 512)) && (!desc->bias || (uintptr_t)desc->bias % 16)) ||
      ((e & 128) && (!desc->aux || desc->aux_ld % 8 || (uintptr_t)desc->aux % 16)))
    return CUBLAS_STATUS_INVALID_VALUE;
  if (workspace_bytes && (!double__inside(workspace, workspace_bytes) || (uintptr_t)workspace % 256))
    return CUBLAS_STATUS_INVALID_VALUE;
  job *q = malloc(sizeof *q);
  if (!q) abort();
  *q = (job){.desc = *desc, .a = *a_layout, .b = *b_layout, .d = *d_layout, .pa = a, .pb = b, .pd = d,
             .workspace = workspace, .workspace_bytes = workspace_bytes < 1000 ? workspace_bytes : 1000};
  memcpy(&q->alpha, alpha, sizeof q->alpha);
  memcpy(&q->beta, beta, sizeof q->beta);
  cublaslt_double.products++;
  return cuda_double_submit(stream, run_job, free, q) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                     : CUBLAS_STATUS_EXECUTION_FAILED;
}
