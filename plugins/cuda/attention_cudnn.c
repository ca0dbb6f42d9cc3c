/* plugins/cuda/attention_cudnn.c - causal attention by cuDNN, where it is found: when, with which plan and memory.
 *
 * libcudnn is loaded at run time, so the plugin works without it.  It takes bf16 and heads of 8, 16 ... 128 channels.
 * A plan is made at the first call of a shape and kept, and so is the reason where there is none; it is used only if
 * its memory fits [cuda] workspace and holds no (T, T) matrix, as cuDNN's deterministic backward does on the GPUs of
 * today.  [main] */
#include "attention.h"

enum { AUTO, CUDNN, OWN }; /* [cuda] attention */

#ifdef PHX__CUDNN
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "attention_graph.h"

typedef struct entry {
  phx__cudnn_shape shape;
  phx__cudnn_plan plan;
  int64_t total; /* bytes of workspace: the sums of dq, and behind them the engine's */
} entry;

struct phx__cuda_cudnn {
  phx__cudnn_api api;
  cudnnHandle_t handle;
  entry *entries;
  int32_t n, room;
  const char *told; /* why it was not asked, last told */
};

static phx_status check(const phx__cuda *cuda, cudnnStatus_t status, const char *what, phx_error *err) {
  char last[256] = "";
  if (status == CUDNN_STATUS_SUCCESS) return PHX_OK;
  const phx__cudnn_api *api = &cuda->cudnn->api;
  api->last_error(last, sizeof last);
  phx__cuda_fail(cuda, err, PHX_DEVICE, "%s: cuDNN: %s (%.200s)", what, api->error_string(status), last);
  if (err) err->cause = (int32_t)status;
  return PHX_DEVICE;
}

/* ---- which plan ---- */
/* Why cuDNN is not even asked, or NULL.  Up to 9.15 its backward was wrong in a last, partial block of keys. */
static const char *declined(const phx__cuda *cuda, const phx__cuda_attention_call *call) {
  const uintptr_t places = (uintptr_t)call->qkv | (uintptr_t)call->out | (uintptr_t)call->lse | (uintptr_t)call->dqkv |
                           (uintptr_t)call->dout | (uintptr_t)call->work;
  if (call->dtype != PHX_BF16) return "it takes bf16 only";
  if (call->width % 8 || call->width > 128) return "it takes heads of 8, 16 ... 128 channels";
  if (call->t < 2) return "it takes two tokens and more";
  if (call->t % 128 && cuda->cudnn->api.version <= 91500) return "before 9.16 it takes multiples of 128 tokens";
  return places % 16 ? "it wants tensors at multiples of 16 bytes" : NULL;
}

static void judge(const phx__cuda *cuda, entry *e) {
  const phx__cudnn_shape *shape = &e->shape;
  phx__cudnn_plan *plan = &e->plan;
  char why[sizeof plan->reason] = "";
  e->total = phx_align_bytes(plan->dq_sum) + plan->workspace;
  if (!plan->plan) return;
  if (shape->deterministic && plan->workspace >= shape->b * shape->heads * shape->t * shape->t)
    snprintf(why, sizeof why, "its deterministic plan keeps a matrix of tokens by tokens (%lld MiB)",
             (long long)(plan->workspace >> 20));
  else if (e->total > cuda->config.workspace)
    snprintf(why, sizeof why, "its plan needs a workspace of %lld MiB, [cuda] workspace is %lld MiB",
             (long long)((e->total + (1 << 20) - 1) >> 20), (long long)(cuda->config.workspace >> 20));
  if (!*why) return;
  phx__cudnn_plan_free(&cuda->cudnn->api, plan);
  memcpy(plan->reason, why, sizeof why);
}

static void tell(const phx__cuda *cuda, const entry *e, const char *what) {
  const phx__cudnn_shape *shape = &e->shape;
  char line[480];
  const int at = snprintf(line, sizeof line, "%s, %lld x %lld tokens, %lld heads of %lld: ", what, (long long)shape->b,
                          (long long)shape->t, (long long)shape->heads, (long long)shape->width);
  if (e->plan.plan)
    snprintf(line + at, sizeof line - (size_t)at, "cuDNN's engine %lld, workspace %lld KiB", (long long)e->plan.engine,
             (long long)((e->total + 1023) >> 10));
  else
    snprintf(line + at, sizeof line - (size_t)at, "own kernel, not cuDNN: %s", e->plan.reason);
  phx__cuda_log(cuda, PHX_LOG_INFO, line);
}

static void tell_declined(const phx__cuda *cuda, const char *reason) {
  char line[200];
  cuda->cudnn->told = reason;
  snprintf(line, sizeof line, "attention: own kernels, not cuDNN: %s", reason);
  phx__cuda_log(cuda, PHX_LOG_INFO, line);
}

static phx_status find(const phx__cuda *cuda, const phx__cuda_attention_call *call, const char *what, entry **out,
                       phx_error *err) {
  struct phx__cuda_cudnn *all = cuda->cudnn;
  const phx__cudnn_shape shape = {.b = call->b, .t = call->t, .heads = call->heads, .width = call->width,
                                  .backward = call->backward, .deterministic = cuda->host->deterministic != 0};
  for (int32_t i = 0; i < all->n; i++)
    if (memcmp(&all->entries[i].shape, &shape, sizeof shape) == 0) {
      *out = &all->entries[i];
      return PHX_OK;
    }
  if (all->n == all->room) {
    const int32_t room = all->room ? 2 * all->room : 8;
    entry *more = realloc(all->entries, (size_t)room * sizeof *more);
    if (!more) return phx__cuda_fail(cuda, err, PHX_NOMEM, "%s: no memory for a shape", what);
    all->entries = more;
    all->room = room;
  }
  entry *e = &all->entries[all->n];
  *e = (entry){.shape = shape};
  phx__cudnn_plan_make(&all->api, all->handle, NULL, &shape, &e->plan);
  judge(cuda, e);
  all->n++;
  if (e->plan.plan || cuda->config.attention == AUTO) tell(cuda, e, what);
  *out = e;
  return PHX_OK;
}

/* ---- run ---- */
static char *part(const void *at, int64_t elements) { return (char *)(uintptr_t)at + 2 * elements; }

static cudnnStatus_t execute(const struct phx__cuda_cudnn *all, const entry *e, const phx__cuda_attention_call *call,
                             char *workspace) {
  const phx__cudnn_api *api = &all->api;
  float scale = 1.0f / sqrtf((float)call->width), masked = -INFINITY, one = 1.0f;
  char *engine = workspace + phx_align_bytes(e->plan.dq_sum);
  int64_t ids[PHX__CUDNN_TENSORS], n = 0;
  void *places[PHX__CUDNN_TENSORS];
  const struct {
    int64_t id;
    void *place;
    int32_t needed;
  } all_of_them[] = {{PHX__CUDNN_Q, part(call->qkv, 0), 1},
                     {PHX__CUDNN_K, part(call->qkv, call->c), 1},
                     {PHX__CUDNN_V, part(call->qkv, 2 * call->c), 1},
                     {PHX__CUDNN_OUT, call->out, 1},
                     {PHX__CUDNN_LSE, call->lse, 1},
                     {PHX__CUDNN_SCALE, &scale, 1},
                     {PHX__CUDNN_MASKED, &masked, 1},
                     {PHX__CUDNN_ONE, &one, call->backward},
                     {PHX__CUDNN_DOUT, part(call->dout, 0), call->backward},
                     {PHX__CUDNN_DQ, part(call->dqkv, 0), call->backward},
                     {PHX__CUDNN_DK, part(call->dqkv, call->c), call->backward},
                     {PHX__CUDNN_DV, part(call->dqkv, 2 * call->c), call->backward},
                     {PHX__CUDNN_DOTS, call->work, call->backward},
                     {PHX__CUDNN_DQ_SUM, workspace, e->plan.dq_sum > 0}};
  for (size_t i = 0; i < sizeof all_of_them / sizeof all_of_them[0]; i++)
    if (all_of_them[i].needed) {
      ids[n] = all_of_them[i].id;
      places[n++] = all_of_them[i].place;
    }
  cudnnBackendDescriptor_t pack;
  cudnnStatus_t status = api->descriptor_create(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
  if (status != CUDNN_STATUS_SUCCESS) return status;
  status = api->set(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, ids);
  if (status == CUDNN_STATUS_SUCCESS)
    status = api->set(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, places);
  if (status == CUDNN_STATUS_SUCCESS)
    status = api->set(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &engine);
  if (status == CUDNN_STATUS_SUCCESS) status = api->finalize(pack);
  if (status == CUDNN_STATUS_SUCCESS) status = api->execute(all->handle, e->plan.plan, pack);
  (void)api->descriptor_destroy(pack);
  return status;
}

phx_status phx__cuda_attention_cudnn(phx__cuda *cuda, const phx__cuda_attention_call *call, cudaStream_t s,
                                     const char *what, int32_t *done, phx_error *err) {
  void *scratch;
  entry *e = NULL;
  *done = 0;
  if (!cuda->cudnn) return PHX_OK;
  const char *reason = declined(cuda, call);
  if (reason && reason != cuda->cudnn->told && call->dtype == PHX_BF16) tell_declined(cuda, reason);
  if (!reason) PHX_TRY(find(cuda, call, what, &e, err));
  if (!reason && !e->plan.plan) reason = e->plan.reason;
  if (reason && cuda->config.attention == CUDNN)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED,
                          "%s of %lld x %lld tokens, %lld heads of %lld: [cuda] attention = cudnn, but %s", what,
                          (long long)call->b, (long long)call->t, (long long)call->heads, (long long)call->width,
                          reason);
  if (reason) return PHX_OK;
  PHX_TRY(phx__cuda_scratch(cuda, s, 0, what, &scratch, err));
  PHX_TRY(check(cuda, cuda->cudnn->api.set_stream(cuda->cudnn->handle, s), what, err));
  phx_status status = check(cuda, execute(cuda->cudnn, e, call, (char *)scratch + cuda->scratch_bytes), what, err);
  if (status == PHX_OK) *done = 1;
  return status;
}

/* ---- begin and end ---- */
static int32_t open_library(phx__cuda *cuda, char *reason, size_t size) {
  struct phx__cuda_cudnn *all = calloc(1, sizeof *all);
  if (!all) {
    snprintf(reason, size, "there is no memory for it");
    return 0;
  }
  if (!phx__cudnn_open(&all->api, reason, size)) {
    free(all);
    return 0;
  }
  const cudnnStatus_t status = all->api.create(&all->handle);
  if (status == CUDNN_STATUS_SUCCESS) {
    cuda->cudnn = all;
    return 1;
  }
  snprintf(reason, size, "cuDNN %lld.%lld does not start: %s", (long long)all->api.version / 10000,
           (long long)all->api.version / 100 % 100, all->api.error_string(status));
  phx__cudnn_close(&all->api);
  free(all);
  return 0;
}

void phx__cuda_attention_end(phx__cuda *cuda) {
  struct phx__cuda_cudnn *all = cuda->cudnn;
  if (!all) return;
  for (int32_t i = 0; i < all->n; i++) phx__cudnn_plan_free(&all->api, &all->entries[i].plan);
  if (all->api.destroy(all->handle) != CUDNN_STATUS_SUCCESS && !cuda->failed_call)
    phx__cuda_log(cuda, PHX_LOG_WARN, "cudnnDestroy failed");
  phx__cudnn_close(&all->api);
  free(all->entries);
  free(all);
  cuda->cudnn = NULL;
}

static void announce(const phx__cuda *cuda) {
  const long long version = (long long)cuda->cudnn->api.version;
  char line[160];
  snprintf(line, sizeof line, "attention: cuDNN %lld.%lld.%lld in bf16, own kernels in fp32", version / 10000,
           version / 100 % 100, version % 100);
  phx__cuda_log(cuda, PHX_LOG_INFO, line);
}
#else
#include <stdio.h>

phx_status phx__cuda_attention_cudnn(phx__cuda *cuda, const phx__cuda_attention_call *call, cudaStream_t s,
                                     const char *what, int32_t *done, phx_error *err) {
  (void)cuda, (void)call, (void)s, (void)what, (void)err;
  *done = 0;
  return PHX_OK;
}

static int32_t open_library(phx__cuda *cuda, char *reason, size_t size) {
  (void)cuda;
  snprintf(reason, size, "this plugin is built without cuDNN's headers");
  return 0;
}

void phx__cuda_attention_end(phx__cuda *cuda) { (void)cuda; }
static void announce(const phx__cuda *cuda) { (void)cuda; }
#endif

phx_status phx__cuda_attention_begin(phx__cuda *cuda, phx_error *err) {
  char reason[400] = "[cuda] attention = own", line[480];
  if (cuda->config.attention != OWN && open_library(cuda, reason, sizeof reason)) {
    announce(cuda);
    return PHX_OK;
  }
  if (cuda->config.attention == CUDNN)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "[cuda] attention = cudnn, but %s", reason);
  snprintf(line, sizeof line, "attention: own kernels, since %s", reason);
  phx__cuda_log(cuda, PHX_LOG_INFO, line);
  return PHX_OK;
}
