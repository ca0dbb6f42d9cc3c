/* loopback_device.c - the device of loopback.h: streams in the host's memory.  Threads: one per stream in THREADS mode;
 * in DEFERRED mode whoever waits runs what is waited for. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "loopback.h"
#include "base/status.h"
#include "toy.h"

enum { PAYLOAD = 256 };

typedef struct item {
  struct item *next;
  phx_stream_fn *fn;
  void *arg;
  _Alignas(16) unsigned char payload[PAYLOAD];
} item;
struct phx_stream {
  int mode;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  item *head, *tail;
  uint64_t issued, done;
  bool closing;
  phx_error failure; /* the first one; returned by waits from then on */
};
struct phx_event {
  phx_stream *stream;
  uint64_t at;
};
typedef struct device {
  phx_device base;
  int mode;
} device;

static void run_item(phx_stream *s, item *it) {
  phx_error err = PHX_ERROR_INIT;
  phx_status status = it->fn(it->arg ? it->arg : it->payload, &err);
  free(it);
  pthread_mutex_lock(&s->lock);
  if (status != PHX_OK && s->failure.code == PHX_OK) {
    s->failure = err;
    s->failure.code = status;
  }
  s->done++;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
}

static item *take(phx_stream *s) {
  item *it = s->head;
  s->head = it->next;
  if (!s->head) s->tail = NULL;
  return it;
}

static void *stream_main(void *arg) {
  phx_stream *s = arg;
  for (;;) {
    pthread_mutex_lock(&s->lock);
    while (!s->head && !s->closing) pthread_cond_wait(&s->changed, &s->lock);
    if (!s->head) break;
    item *it = take(s);
    pthread_mutex_unlock(&s->lock);
    run_item(s, it);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

static phx_status stream_reach(phx_stream *s, uint64_t at, phx_error *err) {
  if (!s) return PHX_OK;
  pthread_mutex_lock(&s->lock);
  while (s->done < at) {
    if (s->mode == LOOPBACK_THREADS) {
      pthread_cond_wait(&s->changed, &s->lock);
      continue;
    }
    item *it = take(s);
    pthread_mutex_unlock(&s->lock);
    run_item(s, it);
    pthread_mutex_lock(&s->lock);
  }
  phx_status status = s->failure.code;
  if (status != PHX_OK && err) *err = s->failure;
  pthread_mutex_unlock(&s->lock);
  return status;
}

static uint64_t stream_issued(phx_stream *s) {
  pthread_mutex_lock(&s->lock);
  uint64_t n = s->issued;
  pthread_mutex_unlock(&s->lock);
  return n;
}

static phx_status submit(phx_stream *s, phx_stream_fn *fn, void *arg, const void *payload, size_t bytes,
                         phx_error *err) {
  if (!s) {
    _Alignas(16) unsigned char copy[PAYLOAD];
    if (!arg) memcpy(copy, payload, bytes);
    return fn(arg ? arg : copy, err);
  }
  item *it = calloc(1, sizeof *it);
  if (!it || bytes > PAYLOAD) abort();
  it->fn = fn;
  it->arg = arg;
  if (bytes) memcpy(it->payload, payload, bytes);
  pthread_mutex_lock(&s->lock);
  if (s->tail)
    s->tail->next = it;
  else
    s->head = it;
  s->tail = it;
  s->issued++;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
  return PHX_OK;
}

phx_status loopback_submit(phx_device *d, phx_stream *s, phx_stream_fn *fn, const void *payload, size_t bytes,
                           phx_error *err) {
  (void)d;
  return submit(s, fn, NULL, payload, bytes, err);
}

static phx_status d_stream_create(void *ctx, const char *name, phx_stream **out, phx_error *err) {
  (void)name, (void)err;
  phx_stream *s = calloc(1, sizeof *s);
  if (!s) abort();
  s->mode = ((device *)ctx)->mode;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->changed, NULL);
  if (s->mode == LOOPBACK_THREADS && pthread_create(&s->thread, NULL, stream_main, s)) abort();
  *out = s;
  return PHX_OK;
}

static void d_stream_destroy(void *ctx, phx_stream *s) {
  (void)ctx;
  if (!s) return;
  stream_reach(s, stream_issued(s), NULL);
  if (s->mode == LOOPBACK_THREADS) {
    pthread_mutex_lock(&s->lock);
    s->closing = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
  }
  pthread_cond_destroy(&s->changed);
  pthread_mutex_destroy(&s->lock);
  free(s);
}

static phx_status d_stream_synchronize(void *ctx, phx_stream *s, phx_error *err) {
  (void)ctx;
  return s ? stream_reach(s, stream_issued(s), err) : PHX_OK;
}
static phx_status d_event_create(void *ctx, phx_event **out, phx_error *err) {
  (void)ctx, (void)err;
  *out = calloc(1, sizeof **out);
  if (!*out) abort();
  return PHX_OK;
}
static void d_event_destroy(void *ctx, phx_event *e) {
  (void)ctx;
  free(e);
}
static phx_status d_event_record(void *ctx, phx_event *e, phx_stream *s, phx_error *err) {
  (void)ctx, (void)err;
  *e = (phx_event){s, s ? stream_issued(s) : 0};
  return PHX_OK;
}
static phx_status wait_fn(void *arg, phx_error *err) {
  phx_event *e = arg;
  return stream_reach(e->stream, e->at, err);
}
static phx_status d_stream_wait(void *ctx, phx_stream *s, phx_event *e, phx_error *err) {
  (void)ctx;
  if (e->stream == s) return PHX_OK;
  return submit(s, wait_fn, NULL, e, sizeof *e, err);
}
static phx_status d_event_synchronize(void *ctx, phx_event *e, phx_error *err) {
  (void)ctx;
  return stream_reach(e->stream, e->at, err);
}
static int32_t d_event_done(void *ctx, phx_event *e) {
  (void)ctx;
  if (!e->stream) return 1;
  pthread_mutex_lock(&e->stream->lock);
  int32_t done = e->stream->done >= e->at;
  pthread_mutex_unlock(&e->stream->lock);
  return done;
}
static phx_status d_enqueue(void *ctx, phx_stream *s, phx_stream_fn *fn, void *arg, phx_error *err) {
  (void)ctx;
  if (arg) return submit(s, fn, arg, NULL, 0, err);
  return phx_fail(err, PHX_INVALID, "loopback: enqueue with no argument");
}
static void *d_native_stream(void *ctx, phx_stream *s) {
  (void)ctx, (void)s;
  return NULL;
}

typedef struct vec {
  void *dst;
  const void *src;
  int64_t n;
  float by;
} vec;
static phx_status copy_fn(void *arg, phx_error *err) {
  vec *v = arg;
  (void)err;
  memmove(v->dst, v->src, (size_t)v->n);
  return PHX_OK;
}
static phx_status zero_fn(void *arg, phx_error *err) {
  vec *v = arg;
  (void)err;
  memset(v->dst, 0, (size_t)v->n);
  return PHX_OK;
}
static phx_status add_fn(void *arg, phx_error *err) {
  vec *v = arg;
  float *acc = v->dst;
  const float *x = v->src;
  (void)err;
  for (int64_t e = 0; e < v->n; e++) acc[e] += x[e];
  return PHX_OK;
}
static phx_status narrow_fn(void *arg, phx_error *err) {
  vec *v = arg;
  uint16_t *out = v->dst;
  const float *x = v->src;
  (void)err;
  for (int64_t e = 0; e < v->n; e++) out[e] = toy_bf16(x[e]);
  return PHX_OK;
}
static phx_status widen_fn(void *arg, phx_error *err) {
  vec *v = arg;
  float *out = v->dst;
  const uint16_t *x = v->src;
  (void)err;
  for (int64_t e = 0; e < v->n; e++) out[e] = toy_from_bf16(x[e]);
  return PHX_OK;
}
static phx_status scale_fn(void *arg, phx_error *err) {
  vec *v = arg;
  float *x = v->dst;
  (void)err;
  for (int64_t e = 0; e < v->n; e++) x[e] *= v->by;
  return PHX_OK;
}
static phx_status d_copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  (void)ctx;
  return submit(s, copy_fn, NULL, &(vec){dst, src, bytes, 0}, sizeof(vec), err);
}
static phx_status d_zero(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err) {
  (void)ctx;
  return submit(s, zero_fn, NULL, &(vec){dst, NULL, bytes, 0}, sizeof(vec), err);
}
static phx_status d_cast(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                         phx_stream *s, phx_error *err) {
  (void)ctx;
  vec v = {dst, src, numel, 0};
  if (dst_dtype == src_dtype) return d_copy(ctx, dst, src, numel * (int64_t)phx_dtype_bytes(dst_dtype), s, err);
  if (dst_dtype == PHX_BF16 && src_dtype == PHX_F32) return submit(s, narrow_fn, NULL, &v, sizeof v, err);
  if (dst_dtype == PHX_F32 && src_dtype == PHX_BF16) return submit(s, widen_fn, NULL, &v, sizeof v, err);
  return phx_fail(err, PHX_UNSUPPORTED, "loopback: cast between dtypes %d and %d", src_dtype, dst_dtype);
}
static phx_status d_add(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s, phx_error *err) {
  (void)ctx;
  return submit(s, add_fn, NULL, &(vec){acc, x, numel, 0}, sizeof(vec), err);
}
static phx_status d_scale(void *ctx, float *x, float by, int64_t numel, phx_stream *s, phx_error *err) {
  (void)ctx;
  return submit(s, scale_fn, NULL, &(vec){x, NULL, numel, by}, sizeof(vec), err);
}

phx_device *loopback_device_create(int mode) {
  device *d = calloc(1, sizeof *d);
  if (!d) abort();
  d->mode = mode;
  d->base = (phx_device){.struct_size = sizeof(phx_device),
                         .ctx = d,
                         .name = "loopback",
                         .caps = PHX_DEVICE_HOST_MEMORY,
                         .threads = 1,
                         .stream_create = d_stream_create,
                         .stream_destroy = d_stream_destroy,
                         .stream_synchronize = d_stream_synchronize,
                         .event_create = d_event_create,
                         .event_destroy = d_event_destroy,
                         .event_record = d_event_record,
                         .stream_wait = d_stream_wait,
                         .event_synchronize = d_event_synchronize,
                         .event_done = d_event_done,
                         .enqueue = d_enqueue,
                         .native_stream = d_native_stream,
                         .copy = d_copy,
                         .zero = d_zero,
                         .cast = d_cast,
                         .add = d_add,
                         .scale = d_scale};
  return &d->base;
}
void loopback_device_destroy(phx_device *d) {
  free(d);
}
