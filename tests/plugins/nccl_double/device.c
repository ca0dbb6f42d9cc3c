/* device.c - the little of a CUDA device that plugins/nccl asks for, on the double's streams: no memory, no
 * operations. */
#include <cuda_double.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include "inner.h"
#include "nccl_double.h"

typedef struct double_device {
  phx_device table;
  cudaStream_t compute;
} double_device;

static cudaStream_t native(void *ctx, phx_stream *s) {
  return s ? (cudaStream_t)(void *)s : ((double_device *)ctx)->compute;
}
static void *native_stream(void *ctx, phx_stream *s) { return native(ctx, s); }
static phx_status told(cudaError_t code) { return code == cudaSuccess ? PHX_OK : PHX_DEVICE; }
static phx_status stream_create(void *ctx, const char *name, phx_stream **out, phx_error *err) {
  (void)ctx, (void)name, (void)err;
  return told(cudaStreamCreate((cudaStream_t *)(void *)out));
}
static void stream_destroy(void *ctx, phx_stream *s) {
  cudaStreamSynchronize(native(ctx, s));
  cudaStreamDestroy(native(ctx, s));
}
static phx_status stream_synchronize(void *ctx, phx_stream *s, phx_error *err) {
  (void)err;
  return told(cudaStreamSynchronize(native(ctx, s)));
}
static phx_status event_create(void *ctx, phx_event **out, phx_error *err) {
  (void)ctx, (void)err;
  return told(cudaEventCreate((cudaEvent_t *)(void *)out));
}
static void event_destroy(void *ctx, phx_event *e) {
  (void)ctx;
  cudaEventDestroy((cudaEvent_t)(void *)e);
}
static phx_status event_record(void *ctx, phx_event *e, phx_stream *s, phx_error *err) {
  (void)err;
  return told(cudaEventRecord((cudaEvent_t)(void *)e, native(ctx, s)));
}
static phx_status event_synchronize(void *ctx, phx_event *e, phx_error *err) {
  (void)ctx, (void)err;
  return told(cudaEventSynchronize((cudaEvent_t)(void *)e));
}

typedef struct math {
  char *out;
  const char *in;
  int64_t numel;
  int32_t to, from; /* dtypes; 0: add fp32 */
} math;
static void run_math(void *arg) {
  const math *m = arg;
  const size_t in_bytes = m->from == PHX_BF16 ? 2 : 4;
  for (int64_t i = 0; i < m->numel; i++) {
    uint32_t bits = 0;
    float x = 0, sum = 0;
    memcpy((char *)&bits + (4 - in_bytes), m->in + (size_t)i * in_bytes, in_bytes);
    memcpy(&x, &bits, 4);
    const uint16_t half = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    if (m->to == 0) memcpy(&sum, m->out + i * 4, 4);
    sum += x;
    if (m->to == PHX_BF16)
      memcpy(m->out + i * 2, &half, 2);
    else
      memcpy(m->out + i * 4, m->to == 0 ? &sum : &x, 4);
  }
}
static phx_status do_math(void *ctx, void *out, const void *in, int64_t numel, int32_t to, int32_t from,
                          phx_stream *s) {
  math *m = malloc(sizeof *m);
  if (!m) return PHX_NOMEM;
  *m = (math){out, in, numel, to, from};
  return told(cuda_double_submit(native(ctx, s), run_math, free, m));
}
static phx_status cast(void *ctx, void *dst, int32_t to, const void *src, int32_t from, int64_t numel, phx_stream *s,
                       phx_error *err) {
  (void)err;
  return do_math(ctx, dst, src, numel, to, from, s);
}
static phx_status add(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s, phx_error *err) {
  (void)err;
  return do_math(ctx, acc, x, numel, 0, 0, s);
}

static phx_status copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  (void)err;
  return told(cudaMemcpyAsync(dst, src, (size_t)bytes, cudaMemcpyDefault, native(ctx, s)));
}

const phx_device *double_device_open(int rank) {
  double_device *d = calloc(1, sizeof *d);
  if (!d) return NULL;
  double_rank = rank;
  cudaSetDevice(double_shared->control.one_gpu ? 0 : rank);
  cudaStreamCreate(&d->compute);
  d->table = (phx_device){.struct_size = sizeof(phx_device), .ctx = d, .name = "double", .caps = 0,
                          .stream_create = stream_create, .stream_destroy = stream_destroy,
                          .stream_synchronize = stream_synchronize, .event_create = event_create,
                          .event_destroy = event_destroy, .event_record = event_record,
                          .event_synchronize = event_synchronize, .native_stream = native_stream, .cast = cast,
                          .add = add, .copy = copy};
  return &d->table;
}
void double_device_close(const phx_device *device) {
  double_device *d = device->ctx;
  stream_destroy(d, NULL);
  free(d);
}
