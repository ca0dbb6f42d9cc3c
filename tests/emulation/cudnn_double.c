/* See cudnn_double.h.  A descriptor keeps what was set, in the order it came; what a graph refers to lives on after
 * its destruction, as in cuDNN, so things are freed when none is left. */
#include "cudnn_double.h"
#include <cudnn_graph.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ATTRIBUTES = 16, RANK = 4 };
typedef struct attribute {
  int32_t name, type;
  int64_t n;
  void *data;
} attribute;
typedef struct thing {
  struct thing *next;
  int32_t type, finished, n, index;
  attribute attributes[ATTRIBUTES];
  struct thing *of; /* results: the graph they are for */
  float *values;    /* a virtual tensor, while its graph runs */
} thing;

static cudnn_double_state state;
static thing *all;
static int handle;
cudnn_double_settings_entry cudnn_double_settings;
cudnn_double_state *cudnn_double_settings(void) { return &state; }

__attribute__((destructor)) static void free_all(void) {
  while (all) {
    thing *t = all;
    all = t->next;
    for (int32_t i = 0; i < t->n; i++) free(t->attributes[i].data);
    free(t);
  }
}

static int fails(void) { return ++state.calls == state.fail_at; }
static size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE: return 8;
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR: return sizeof(void *);
    default: return 4;
  }
}
static const attribute *attribute_of(const thing *t, int32_t name) {
  for (int32_t i = 0; i < t->n; i++)
    if (t->attributes[i].name == name) return &t->attributes[i];
  return NULL;
}
static thing *thing_of(const thing *t, int32_t name) {
  const attribute *a = attribute_of(t, name);
  return a ? *(thing **)a->data : NULL;
}
static int32_t number_of(const thing *t, int32_t name) { return *(const int32_t *)attribute_of(t, name)->data; }
static int32_t is(const thing *t, int32_t name) {
  const attribute *a = attribute_of(t, name);
  return a && *(const bool *)a->data;
}

/* ---- the interface ---- */
size_t cudnnGetVersion(void) { return state.version ? state.version : 91900; }
const char *cudnnGetErrorString(cudnnStatus_t status) {
  return status == CUDNN_STATUS_NOT_SUPPORTED ? "NOT_SUPPORTED" : status ? "FAILED" : "SUCCESS";
}
void cudnnGetLastErrorString(char *message, size_t max_size) { snprintf(message, max_size, "the double\nsays no"); }
cudnnStatus_t cudnnCreate(cudnnHandle_t *out) {
  if (state.no_handle || fails()) return CUDNN_STATUS_NOT_INITIALIZED;
  *out = (cudnnHandle_t)&handle;
  state.handles++;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t h) {
  if (h != (cudnnHandle_t)&handle) return CUDNN_STATUS_BAD_PARAM;
  state.handles--;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t h, cudaStream_t stream) {
  (void)stream; /* work is done in the call: for streams that run inline */
  return h != (cudnnHandle_t)&handle || fails() ? CUDNN_STATUS_BAD_PARAM : CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *out) {
  thing *t = fails() ? NULL : calloc(1, sizeof *t);
  if (!t) return CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
  t->type = (int32_t)type;
  t->next = all;
  all = t;
  state.descriptors++;
  *out = t;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d) {
  if (!d) return CUDNN_STATUS_BAD_PARAM;
  if (--state.descriptors == 0) free_all();
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t n, const void *value) {
  thing *t = d;
  if (fails()) return CUDNN_STATUS_BAD_PARAM;
  if (!t || t->finished || n < 1 || !value || t->n == ATTRIBUTES || attribute_of(t, (int32_t)name))
    return CUDNN_STATUS_BAD_PARAM;
  const size_t bytes = size_of(type) * (size_t)n;
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR)
    for (int64_t i = 0; i < n; i++) {
      const thing *given = ((thing *const *)value)[i];
      if (!given || !given->finished) return CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED;
    }
  attribute *a = &t->attributes[t->n];
  *a = (attribute){(int32_t)name, (int32_t)type, n, malloc(bytes)};
  if (!a->data) return CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
  memcpy(a->data, value, bytes);
  t->n++;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d) {
  thing *t = d;
  if (!t || t->finished || fails()) return CUDNN_STATUS_BAD_PARAM;
  t->finished = 1;
  return CUDNN_STATUS_SUCCESS;
}

/* Results come as descriptors of the caller that are filled here. */
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const d, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t room, int64_t *n, void *values) {
  const thing *t = d;
  if (fails() || !t || room < 1) return CUDNN_STATUS_BAD_PARAM;
  *n = 1;
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    *n = name != CUDNN_ATTR_ENGINEHEUR_RESULTS ? 1 : state.no_engine ? 0 : state.noted ? 2 : 1;
    for (int32_t i = 0; i < *n; i++) {
      thing *to = ((thing **)values)[i];
      to->of = name == CUDNN_ATTR_ENGINEHEUR_RESULTS ? thing_of(t, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH) : t->of;
      to->index = name == CUDNN_ATTR_ENGINEHEUR_RESULTS ? i : t->index;
      to->finished = 1;
    }
  } else if (name == CUDNN_ATTR_ENGINE_NUMERICAL_NOTE) {
    *n = state.noted && t->index == 0;
    if (*n) *(cudnnBackendNumericalNote_t *)values = CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC;
  } else if (name == CUDNN_ATTR_ENGINE_GLOBAL_INDEX) {
    *(int64_t *)values = t->index;
  } else if (name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE) {
    *(int64_t *)values = state.workspace;
  } else {
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  return CUDNN_STATUS_SUCCESS;
}

/* ---- carrying it out ---- */
static const int64_t *dims_of(const thing *t) { return attribute_of(t, CUDNN_ATTR_TENSOR_DIMENSIONS)->data; }
static const int64_t *strides_of(const thing *t) { return attribute_of(t, CUDNN_ATTR_TENSOR_STRIDES)->data; }

typedef struct run {
  const int64_t *ids;
  void *const *places;
  int64_t n;
  cudnnStatus_t status;
} run;

static void *place_of(run *r, const thing *t) {
  const int64_t id = *(const int64_t *)attribute_of(t, CUDNN_ATTR_TENSOR_UNIQUE_ID)->data;
  for (int64_t i = 0; i < r->n; i++)
    if (r->ids[i] == id && r->places[i]) return r->places[i];
  r->status = CUDNN_STATUS_BAD_PARAM_NULL_POINTER;
  return NULL;
}
static float round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static int64_t offset_of(const thing *t, const int64_t at[RANK]) {
  const int64_t *dims = dims_of(t), *strides = strides_of(t); /* tests spend their time here: each is looked up once */
  int64_t offset = 0;
  for (int i = 0; i < RANK; i++)
    if (dims[i] != 1) offset += at[i] * strides[i];
  return offset;
}
static float at_offset(run *r, const thing *t, int64_t offset) {
  if (t->values) return t->values[offset];
  if (is(t, CUDNN_ATTR_TENSOR_IS_VIRTUAL)) return nanf("");
  const void *place = place_of(r, t);
  if (!place) return 0;
  if (number_of(t, CUDNN_ATTR_TENSOR_DATA_TYPE) == CUDNN_DATA_FLOAT) return ((const float *)place)[offset];
  const uint32_t bits = (uint32_t)((const uint16_t *)place)[offset] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static float get(run *r, const thing *t, const int64_t at[RANK]) { return at_offset(r, t, offset_of(t, at)); }
static void put(run *r, thing *t, int64_t offset, float x) {
  const int32_t type = number_of(t, CUDNN_ATTR_TENSOR_DATA_TYPE);
  if (type == CUDNN_DATA_BFLOAT16 && !isinf(x)) x = round_bf16(x);
  if (is(t, CUDNN_ATTR_TENSOR_IS_VIRTUAL)) {
    t->values[offset] = x;
    return;
  }
  void *place = place_of(r, t);
  if (!place) return;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (type == CUDNN_DATA_FLOAT)
    ((float *)place)[offset] = x;
  else
    ((uint16_t *)place)[offset] = (uint16_t)(bits >> 16);
}
static void begin_tensor(run *r, thing *t) {
  int64_t last = 0;
  if (!is(t, CUDNN_ATTR_TENSOR_IS_VIRTUAL) || t->values) return;
  for (int i = 0; i < RANK; i++) last += (dims_of(t)[i] - 1) * strides_of(t)[i];
  t->values = calloc((size_t)last + 1, sizeof *t->values);
  if (!t->values) r->status = CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
}

static float pointwise(int32_t mode, float x, float y, float choose) {
  switch (mode) {
    case CUDNN_POINTWISE_ADD: return x + y;
    case CUDNN_POINTWISE_SUB: return x - y;
    case CUDNN_POINTWISE_MUL: return x * y;
    case CUDNN_POINTWISE_DIV: return x / y;
    case CUDNN_POINTWISE_EXP: return expf(x);
    case CUDNN_POINTWISE_LOG: return logf(x);
    case CUDNN_POINTWISE_IDENTITY: return x;
    case CUDNN_POINTWISE_CMP_GE: return x >= y;
    case CUDNN_POINTWISE_BINARY_SELECT: return choose != 0 ? x : y;
    default: return nanf("");
  }
}
static float product(run *r, const thing *a, const thing *b, const int64_t at[RANK]) {
  float sum = 0;
  for (int64_t k = 0; k < dims_of(a)[3]; k++)
    sum += get(r, a, (int64_t[]){at[0], at[1], at[2], k}) * get(r, b, (int64_t[]){at[0], at[1], k, at[3]});
  return sum;
}
static float reduction(run *r, int32_t by, const thing *x, const int64_t at[RANK]) {
  float value = by == CUDNN_REDUCE_TENSOR_MAX ? -INFINITY : 0;
  for (int64_t k = 0; k < dims_of(x)[3]; k++) {
    const float next = get(r, x, (int64_t[]){at[0], at[1], at[2], k});
    value = by == CUDNN_REDUCE_TENSOR_MAX ? fmaxf(value, next) : value + next;
  }
  return value;
}

static float element(run *r, const thing *op, const thing *to, const int64_t at[RANK]) {
  switch (op->type) {
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
      return product(r, thing_of(op, CUDNN_ATTR_OPERATION_MATMUL_ADESC),
                     thing_of(op, CUDNN_ATTR_OPERATION_MATMUL_BDESC), at);
    case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR:
      return reduction(r, number_of(thing_of(op, CUDNN_ATTR_OPERATION_REDUCTION_DESC), CUDNN_ATTR_REDUCTION_OPERATOR),
                       thing_of(op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC), at);
    case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR: /* the same memory by other strides */
      return at_offset(r, thing_of(op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC), offset_of(to, at));
    default: break;
  }
  const thing *how = thing_of(op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR);
  const thing *x = thing_of(op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC),
              *y = thing_of(op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC),
              *choose = thing_of(op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC);
  const int32_t mode = number_of(how, CUDNN_ATTR_POINTWISE_MODE);
  if (mode == CUDNN_POINTWISE_GEN_INDEX)
    return (float)at[*(const int64_t *)attribute_of(how, CUDNN_ATTR_POINTWISE_AXIS)->data];
  return pointwise(mode, get(r, x, at), y ? get(r, y, at) : 0, choose ? get(r, choose, at) : 0);
}

static void operate(run *r, const thing *op) {
  static const int32_t results[] = {CUDNN_ATTR_OPERATION_MATMUL_CDESC, CUDNN_ATTR_OPERATION_REDUCTION_YDESC,
                                    CUDNN_ATTR_OPERATION_RESHAPE_YDESC, CUDNN_ATTR_OPERATION_POINTWISE_YDESC};
  thing *to = NULL;
  int64_t at[RANK];
  for (size_t i = 0; i < sizeof results / sizeof *results && !to; i++) to = thing_of(op, results[i]);
  if (!to) {
    r->status = CUDNN_STATUS_NOT_SUPPORTED;
    return;
  }
  begin_tensor(r, to);
  if (r->status != CUDNN_STATUS_SUCCESS) return;
  const int64_t *dims = dims_of(to);
  for (at[0] = 0; at[0] < dims[0]; at[0]++)
    for (at[1] = 0; at[1] < dims[1]; at[1]++)
      for (at[2] = 0; at[2] < dims[2]; at[2]++)
        for (at[3] = 0; at[3] < dims[3]; at[3]++) put(r, to, offset_of(to, at), element(r, op, to, at));
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t h, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
  const thing *p = pack, *config = thing_of(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
  if (h != (cudnnHandle_t)&handle || fails()) return CUDNN_STATUS_EXECUTION_FAILED;
  const attribute *ids = attribute_of(p, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS),
                  *places = attribute_of(p, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS),
                  *operations = attribute_of(config->of, CUDNN_ATTR_OPERATIONGRAPH_OPS);
  run r = {ids->data, places->data, ids->n, CUDNN_STATUS_SUCCESS};
  char *workspace = *(void **)attribute_of(p, CUDNN_ATTR_VARIANT_PACK_WORKSPACE)->data;
  if (!workspace || (uintptr_t)workspace % 256 || ids->n != places->n) return CUDNN_STATUS_BAD_PARAM;
  memset(workspace, 0xEE, (size_t)state.workspace);
  for (int64_t i = 0; i < operations->n && r.status == CUDNN_STATUS_SUCCESS; i++)
    operate(&r, ((thing *const *)operations->data)[i]);
  for (thing *t = all; t; t = t->next) {
    free(t->values);
    t->values = NULL;
  }
  if (r.status == CUDNN_STATUS_SUCCESS) state.executed++;
  state.operations = operations->n;
  return r.status;
}
