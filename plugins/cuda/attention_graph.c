/* plugins/cuda/attention_graph.c - causal attention as a graph of cuDNN's operations, and the plan that runs it.
 *
 * The graph says what flash attention computes, matrix by matrix; every (T, T) matrix in it is virtual, and cuDNN's
 * engines recognise the whole and fuse it.  They know it by its form: products, masks and reductions have to come in
 * the order below.  q, k and v are strided views into qkv.  The first failing call is kept, those after it do nothing,
 * and everything but the plan is freed at the end.  [main] */
#ifdef PHX__CUDNN
#include "attention_graph.h"
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include "library.h"

enum { DESCRIPTORS = 192, OPERATIONS = 40, VIRTUAL = 100 /* the first id of tensors inside */, ENGINES = 16 };

typedef cudnnBackendDescriptor_t descriptor;

typedef struct builder {
  const phx__cudnn_api *api;
  const phx__cudnn_shape *shape;
  cudnnStatus_t status;
  const char *step; /* the one that failed */
  descriptor all[DESCRIPTORS], operations[OPERATIONS];
  int32_t n, n_operations;
  int64_t next;
} builder;

/* A tensor's place in the graph: its descriptor and sizes. */
typedef struct tensor {
  descriptor d;
  int64_t dims[4], strides[4];
} tensor;

/* ---- the library ---- */
int32_t phx__cudnn_open(phx__cudnn_api *api, char *reason, size_t size) {
  *api = (phx__cudnn_api){.library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)};
  if (!api->library) {
    const char *why = dlerror();
    snprintf(reason, size, "cuDNN 9 was not found (%s)", why ? why : "dlopen");
    return 0;
  }
  const struct {
    const char *name;
    void *to;
  } functions[] = {{"cudnnGetVersion", &api->get_version},
                   {"cudnnGetErrorString", &api->error_string},
                   {"cudnnGetLastErrorString", &api->last_error},
                   {"cudnnCreate", &api->create},
                   {"cudnnDestroy", &api->destroy},
                   {"cudnnSetStream", &api->set_stream},
                   {"cudnnBackendCreateDescriptor", &api->descriptor_create},
                   {"cudnnBackendDestroyDescriptor", &api->descriptor_destroy},
                   {"cudnnBackendFinalize", &api->finalize},
                   {"cudnnBackendSetAttribute", &api->set},
                   {"cudnnBackendGetAttribute", &api->get},
                   {"cudnnBackendExecute", &api->execute}};
  int32_t found = 1;
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
    found &= phx__library_find(api->library, functions[i].name, functions[i].to);
  if (found) api->version = (int64_t)api->get_version();
  if (found && api->version >= PHX__CUDNN_LEAST) return 1;
  if (!found)
    snprintf(reason, size, "libcudnn.so.9 lacks functions of the graph interface");
  else
    snprintf(reason, size, "cuDNN %lld.%lld.%lld is too old, %d.%d.%d is the least", (long long)api->version / 10000,
             (long long)api->version / 100 % 100, (long long)api->version % 100, PHX__CUDNN_LEAST / 10000,
             PHX__CUDNN_LEAST / 100 % 100, PHX__CUDNN_LEAST % 100);
  phx__cudnn_close(api);
  return 0;
}

void phx__cudnn_close(phx__cudnn_api *api) {
  if (api->library) (void)dlclose(api->library);
  *api = (phx__cudnn_api){0};
}

/* ---- descriptors ---- */
static void note(builder *b, cudnnStatus_t status, const char *step) {
  if (b->status != CUDNN_STATUS_SUCCESS || status == CUDNN_STATUS_SUCCESS) return;
  b->status = status;
  b->step = step;
}

static descriptor create(builder *b, cudnnBackendDescriptorType_t type, const char *step) {
  descriptor d = NULL;
  if (b->status != CUDNN_STATUS_SUCCESS) return NULL;
  if (b->n == DESCRIPTORS) {
    note(b, CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, step);
    return NULL;
  }
  note(b, b->api->descriptor_create(type, &d), step);
  if (b->status == CUDNN_STATUS_SUCCESS) b->all[b->n++] = d;
  return d;
}

static void set(builder *b, descriptor d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                const void *value, const char *step) {
  if (b->status == CUDNN_STATUS_SUCCESS) note(b, b->api->set(d, name, type, n, value), step);
}

static void set_descriptor(builder *b, descriptor d, cudnnBackendAttributeName_t name, descriptor value,
                           const char *step) {
  set(b, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value, step);
}

static void finalize(builder *b, descriptor d, const char *step) {
  if (b->status == CUDNN_STATUS_SUCCESS) note(b, b->api->finalize(d), step);
}

/* ---- tensors ---- */
static tensor make(builder *b, int64_t id, cudnnDataType_t type, int32_t by_value, const int64_t dims[4],
                   const int64_t strides[4]) {
  static const char step[] = "a tensor";
  const bool is_virtual = id == 0, value = by_value;
  const int64_t alignment = 16, own = is_virtual ? VIRTUAL + b->next++ : id;
  tensor t = {.d = create(b, CUDNN_BACKEND_TENSOR_DESCRIPTOR, step)};
  memcpy(t.dims, dims, sizeof t.dims);
  memcpy(t.strides, strides, sizeof t.strides);
  set(b, t.d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type, step);
  set(b, t.d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims, step);
  set(b, t.d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides, step);
  set(b, t.d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &own, step);
  set(b, t.d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment, step);
  set(b, t.d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual, step);
  set(b, t.d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &value, step);
  finalize(b, t.d, step);
  return t;
}

/* (B, H, rows, columns), dense; id 0: inside the graph */
static tensor dense(builder *b, int64_t id, cudnnDataType_t type, int64_t rows, int64_t columns) {
  const int64_t heads = b->shape->heads;
  return make(b, id, type, 0, (int64_t[]){b->shape->b, heads, rows, columns},
              (int64_t[]){heads * rows * columns, rows * columns, columns, 1});
}

/* (B, H, T, D) in rows of `row` elements; turned: (B, H, D, T), the same elements */
static tensor rows_of(builder *b, int64_t id, int64_t row, int32_t turned) {
  const int64_t t = b->shape->t, w = b->shape->width, n = b->shape->b, heads = b->shape->heads;
  return turned ? make(b, id, CUDNN_DATA_BFLOAT16, 0, (int64_t[]){n, heads, w, t}, (int64_t[]){t * row, w, 1, row})
                : make(b, id, CUDNN_DATA_BFLOAT16, 0, (int64_t[]){n, heads, t, w}, (int64_t[]){t * row, w, row, 1});
}

static tensor scalar(builder *b, int64_t id) {
  static const int64_t ones[4] = {1, 1, 1, 1};
  return make(b, id, CUDNN_DATA_FLOAT, 1, ones, ones);
}

/* What a matrix looks like with rows and columns exchanged, inside the graph. */
static tensor turned(builder *b, const tensor *x, cudnnDataType_t type) {
  return make(b, 0, type, 0, (int64_t[]){x->dims[0], x->dims[1], x->dims[3], x->dims[2]},
              (int64_t[]){x->strides[0], x->strides[1], x->strides[3], x->strides[2]});
}

/* ---- operations ---- */
static void add_operation(builder *b, descriptor d, const char *step) {
  finalize(b, d, step);
  if (b->n_operations == OPERATIONS) note(b, CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, step);
  if (b->status == CUDNN_STATUS_SUCCESS) b->operations[b->n_operations++] = d;
}

static void product(builder *b, tensor x, tensor y, tensor to, const char *step) {
  const cudnnDataType_t type = CUDNN_DATA_FLOAT;
  const descriptor how = create(b, CUDNN_BACKEND_MATMUL_DESCRIPTOR, step);
  set(b, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type, step);
  finalize(b, how, step);
  const descriptor d = create(b, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_MATMUL_DESC, how, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_MATMUL_ADESC, x.d, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_MATMUL_BDESC, y.d, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_MATMUL_CDESC, to.d, step);
  add_operation(b, d, step);
}

static void pointwise(builder *b, cudnnPointwiseMode_t mode, cudnnDataType_t compute, int64_t axis, const tensor *x,
                      const tensor *y, const tensor *choose, const tensor *to, const char *step) {
  const descriptor how = create(b, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, step);
  set(b, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode, step);
  set(b, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute, step);
  if (axis >= 0) set(b, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis, step);
  finalize(b, how, step);
  const descriptor d = create(b, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x->d, step);
  if (y) set_descriptor(b, d, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, y->d, step);
  if (choose) set_descriptor(b, d, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, choose->d, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, to->d, step);
  add_operation(b, d, step);
}

static void two(builder *b, cudnnPointwiseMode_t mode, tensor x, tensor y, tensor to, const char *step) {
  pointwise(b, mode, CUDNN_DATA_FLOAT, -1, &x, &y, NULL, &to, step);
}

static void one(builder *b, cudnnPointwiseMode_t mode, tensor x, tensor to, const char *step) {
  pointwise(b, mode, CUDNN_DATA_FLOAT, -1, &x, NULL, NULL, &to, step);
}

static void reduce(builder *b, cudnnReduceTensorOp_t by, tensor x, tensor to, const char *step) {
  const cudnnDataType_t type = CUDNN_DATA_FLOAT;
  const descriptor how = create(b, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, step);
  set(b, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &by, step);
  set(b, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type, step);
  finalize(b, how, step);
  const descriptor d = create(b, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x.d, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, to.d, step);
  add_operation(b, d, step);
}

static void reshape(builder *b, tensor x, tensor to, const char *step) {
  const descriptor d = create(b, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x.d, step);
  set_descriptor(b, d, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, to.d, step);
  add_operation(b, d, step);
}

/* ---- the graphs ---- */
static tensor square(builder *b) { return dense(b, 0, CUDNN_DATA_FLOAT, b->shape->t, b->shape->t); }
static tensor column(builder *b, int64_t id) { return dense(b, id, CUDNN_DATA_FLOAT, b->shape->t, 1); }

/* Rows see keys up to themselves; the rest becomes minus infinity. */
static tensor mask(builder *b, tensor scores, const char *step) {
  const int64_t t = b->shape->t;
  const tensor row = dense(b, 0, CUDNN_DATA_INT32, t, t), key = dense(b, 0, CUDNN_DATA_INT32, t, t);
  const tensor seen = dense(b, 0, CUDNN_DATA_BOOLEAN, t, t), masked = scalar(b, PHX__CUDNN_MASKED), to = square(b);
  pointwise(b, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, 2, &scores, NULL, NULL, &row, step);
  pointwise(b, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, 3, &scores, NULL, NULL, &key, step);
  pointwise(b, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, -1, &row, &key, NULL, &seen, step);
  pointwise(b, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, -1, &scores, &masked, &seen, &to, step);
  return to;
}

static void forward(builder *b) {
  static const char step[] = "forward's softmax";
  const int64_t t = b->shape->t, c = b->shape->heads * b->shape->width;
  const tensor q = rows_of(b, PHX__CUDNN_Q, 3 * c, 0), k = rows_of(b, PHX__CUDNN_K, 3 * c, 1),
               v = rows_of(b, PHX__CUDNN_V, 3 * c, 0), out = rows_of(b, PHX__CUDNN_OUT, c, 0),
               lse = column(b, PHX__CUDNN_LSE), scale = scalar(b, PHX__CUDNN_SCALE);
  const tensor raw = square(b), scores = square(b), most = column(b, 0), below = square(b), e = square(b),
               sum = column(b, 0), logarithm = column(b, 0), p = dense(b, 0, CUDNN_DATA_BFLOAT16, t, t);
  product(b, q, k, raw, "forward's scores");
  two(b, CUDNN_POINTWISE_MUL, raw, scale, scores, "forward's scale");
  const tensor masked = mask(b, scores, "forward's mask");
  reduce(b, CUDNN_REDUCE_TENSOR_MAX, masked, most, step);
  two(b, CUDNN_POINTWISE_SUB, masked, most, below, step);
  one(b, CUDNN_POINTWISE_EXP, below, e, step);
  reduce(b, CUDNN_REDUCE_TENSOR_ADD, e, sum, step);
  one(b, CUDNN_POINTWISE_LOG, sum, logarithm, step);
  two(b, CUDNN_POINTWISE_ADD, most, logarithm, lse, step);
  two(b, CUDNN_POINTWISE_DIV, e, sum, p, step);
  product(b, p, v, out, "forward's output");
}

static void backward(builder *b) {
  const int64_t t = b->shape->t, w = b->shape->width, c = b->shape->heads * w;
  const tensor q = rows_of(b, PHX__CUDNN_Q, 3 * c, 0), k = rows_of(b, PHX__CUDNN_K, 3 * c, 1),
               v = rows_of(b, PHX__CUDNN_V, 3 * c, 1), out = rows_of(b, PHX__CUDNN_OUT, c, 0),
               dout = rows_of(b, PHX__CUDNN_DOUT, c, 0), lse = column(b, PHX__CUDNN_LSE),
               scale = scalar(b, PHX__CUDNN_SCALE), unit = scalar(b, PHX__CUDNN_ONE);
  const tensor dq = rows_of(b, PHX__CUDNN_DQ, 3 * c, 0), dk = rows_of(b, PHX__CUDNN_DK, 3 * c, 0),
               dv = rows_of(b, PHX__CUDNN_DV, 3 * c, 0), dots = column(b, PHX__CUDNN_DOTS);
  /* dots = sums of dout * out over a head's channels */
  const tensor both = dense(b, 0, CUDNN_DATA_FLOAT, t, w), sums = column(b, 0);
  two(b, CUDNN_POINTWISE_MUL, dout, out, both, "backward's dots");
  reduce(b, CUDNN_REDUCE_TENSOR_ADD, both, sums, "backward's dots");
  two(b, CUDNN_POINTWISE_MUL, sums, unit, dots, "backward's dots");
  /* p = exp(scores - lse), dv = p' dout */
  const tensor raw = square(b), scores = square(b), below = square(b), p = square(b);
  product(b, q, k, raw, "backward's scores");
  two(b, CUDNN_POINTWISE_MUL, raw, scale, scores, "backward's scale");
  two(b, CUDNN_POINTWISE_SUB, scores, lse, below, "backward's probabilities");
  const tensor masked = mask(b, below, "backward's mask");
  one(b, CUDNN_POINTWISE_EXP, masked, p, "backward's probabilities");
  const tensor pt = turned(b, &p, CUDNN_DATA_BFLOAT16);
  reshape(b, p, pt, "backward's dv");
  product(b, pt, dout, dv, "backward's dv");
  /* ds = p * (dout v' - dots) * scale, dk = ds' q, dq = ds k */
  const tensor dp = square(b), less = square(b), unscaled = square(b), ds = square(b);
  product(b, dout, v, dp, "backward's ds");
  two(b, CUDNN_POINTWISE_SUB, dp, dots, less, "backward's ds");
  two(b, CUDNN_POINTWISE_MUL, less, p, unscaled, "backward's ds");
  two(b, CUDNN_POINTWISE_MUL, unscaled, scale, ds, "backward's ds");
  const tensor dst = turned(b, &ds, CUDNN_DATA_BFLOAT16), kt = turned(b, &k, CUDNN_DATA_BFLOAT16);
  reshape(b, ds, dst, "backward's dk");
  product(b, dst, q, dk, "backward's dk");
  reshape(b, k, kt, "backward's dq");
  if (b->shape->deterministic) {
    product(b, ds, kt, dq, "backward's dq");
  } else { /* blocks of keys add to it as they come */
    const tensor dq_sum = dense(b, PHX__CUDNN_DQ_SUM, CUDNN_DATA_FLOAT, t, w);
    product(b, ds, kt, dq_sum, "backward's dq");
    one(b, CUDNN_POINTWISE_IDENTITY, dq_sum, dq, "backward's dq");
  }
}

/* ---- plans ---- */
static descriptor properties(builder *b, const char *json) {
  static const char step[] = "the device's properties";
  const descriptor d = create(b, CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, step);
  set(b, d, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)strlen(json) + 1, json, step);
  finalize(b, d, step);
  return d;
}

/* An engine whose results may differ from run to run says so. */
static cudnnStatus_t usable(const builder *b, descriptor engine) {
  cudnnBackendNumericalNote_t notes[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
  int64_t n = 0;
  if (!b->shape->deterministic) return CUDNN_STATUS_SUCCESS;
  const cudnnStatus_t status = b->api->get(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                           CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &n, notes);
  for (int64_t i = 0; i < n && i < CUDNN_NUMERICAL_NOTE_TYPE_COUNT && status == CUDNN_STATUS_SUCCESS; i++)
    if (notes[i] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) return CUDNN_STATUS_NOT_SUPPORTED;
  return status;
}

/* The plan of an engine's configuration, with what it needs; where cuDNN refuses it, nothing is left. */
static cudnnStatus_t plan_of(const builder *b, cudnnHandle_t handle, descriptor config, descriptor engine,
                             phx__cudnn_plan *out) {
  const phx__cudnn_api *api = b->api;
  descriptor d = NULL;
  int64_t count = 0, workspace = 0, index = 0;
  cudnnStatus_t status =
      api->get(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count, &engine);
  if (status == CUDNN_STATUS_SUCCESS) status = usable(b, engine);
  if (status == CUDNN_STATUS_SUCCESS)
    status = api->get(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &count, &index);
  if (status == CUDNN_STATUS_SUCCESS) status = api->descriptor_create(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &d);
  if (status != CUDNN_STATUS_SUCCESS) return status;
  if (handle) status = api->set(d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  if (status == CUDNN_STATUS_SUCCESS)
    status = api->set(d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config);
  if (status == CUDNN_STATUS_SUCCESS) status = api->finalize(d);
  if (status == CUDNN_STATUS_SUCCESS)
    status = api->get(d, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count, &workspace);
  if (status != CUDNN_STATUS_SUCCESS) {
    (void)api->descriptor_destroy(d);
    return status;
  }
  out->plan = d;
  out->workspace = workspace;
  out->engine = index;
  return CUDNN_STATUS_SUCCESS;
}

/* Asks the heuristic for engines, best first, and takes the first that can be built. */
static void choose(builder *b, cudnnHandle_t handle, descriptor graph, descriptor device, phx__cudnn_plan *out) {
  const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
  static const char step[] = "the heuristic";
  descriptor configs[ENGINES] = {NULL}, engines[ENGINES] = {NULL};
  int64_t n = 0;
  const descriptor heuristic = create(b, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, step);
  set_descriptor(b, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph, step);
  set(b, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode, step);
  if (device) set_descriptor(b, heuristic, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, device, step);
  finalize(b, heuristic, step);
  for (int32_t i = 0; i < ENGINES; i++) {
    configs[i] = create(b, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, step);
    engines[i] = create(b, CUDNN_BACKEND_ENGINE_DESCRIPTOR, step);
  }
  if (b->status != CUDNN_STATUS_SUCCESS) return;
  note(b, b->api->get(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, ENGINES, &n, configs),
       step);
  if (b->status != CUDNN_STATUS_SUCCESS) return;
  cudnnStatus_t status = CUDNN_STATUS_NOT_SUPPORTED;
  for (int64_t i = 0; i < n && i < ENGINES && !out->plan; i++)
    status = plan_of(b, handle, configs[i], engines[i], out);
  note(b, status, n > 0 ? "plans of engines" : step);
}

void phx__cudnn_plan_make(const phx__cudnn_api *api, cudnnHandle_t handle, const char *device,
                          const phx__cudnn_shape *shape, phx__cudnn_plan *out) {
  builder all = {.api = api, .shape = shape, .step = "nothing"}, *b = &all;
  *out = (phx__cudnn_plan){0};
  if (shape->backward)
    backward(b);
  else
    forward(b);
  const descriptor graph = create(b, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "the graph");
  if (handle) set(b, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle, "the graph");
  set(b, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, b->n_operations, b->operations,
      "the graph");
  finalize(b, graph, "the graph");
  const descriptor properties_ = device ? properties(b, device) : NULL;
  choose(b, handle, graph, properties_, out);
  if (out->plan && shape->backward && !shape->deterministic)
    out->dq_sum = (int64_t)sizeof(float) * shape->b * shape->heads * shape->t * shape->width;
  if (!out->plan) {
    char last[160] = "";
    api->last_error(last, sizeof last);
    for (char *c = last; *c; c++)
      if (*c == '\n') *c = ' '; /* reasons are one line */
    snprintf(out->reason, sizeof out->reason, "it has no plan (%s: %s %.120s)", b->step, api->error_string(b->status),
             last);
  }
  while (b->n > 0) (void)api->descriptor_destroy(b->all[--b->n]);
}

void phx__cudnn_plan_free(const phx__cudnn_api *api, phx__cudnn_plan *plan) {
  if (plan->plan) (void)api->descriptor_destroy(plan->plan);
  plan->plan = NULL;
}
#else
typedef int phx__no_cudnn; /* ISO C wants a declaration */
#endif
