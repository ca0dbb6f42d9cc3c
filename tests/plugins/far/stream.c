/* stream.c - every stream is a thread with a queue; events; the strategy-facing device.
 *
 * As on the cpu device: a failure is kept, what follows on the stream is skipped but for records, which complete and
 * carry it; synchronize returns and clears it.  One lock for everything: this device is for tests. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "far.h"

static phx_stream *real_stream(phx_device_self *self, phx_stream *s) { return s ? s : self->null; }

static void put(phx_stream *s, far_entry *e) {
  phx_device_self *self = s->far;
  pthread_mutex_lock(&self->lock);
  *s->last = e;
  s->last = &e->next;
  s->put++;
  pthread_cond_broadcast(&s->change);
  pthread_mutex_unlock(&self->lock);
}

static phx_status new_entry(size_t bytes, far_entry **out, phx_error *err) {
  far_entry *e = calloc(1, sizeof *e + bytes);
  if (!e) return phx_fail(err, PHX_NOMEM, "far: no memory for an entry of a stream");
  *out = e;
  return PHX_OK;
}

phx_status far_submit(phx_device_self *self, phx_stream *s, phx_stream_fn *run, const void *arguments, size_t bytes,
                      phx_error *err) {
  far_entry *e = NULL;
  PHX_TRY(new_entry(bytes, &e, err));
  e->run = run;
  memcpy(e->arguments, arguments, bytes);
  put(real_stream(self, s), e);
  return PHX_OK;
}

/* With the lock held. */
static void run_event(phx_stream *s, const far_entry *e) {
  phx_device_self *self = s->far;
  phx_event *event = e->event;
  if (e->record) {
    event->status = s->status;
    event->failure = s->failure;
    event->done = e->number;
    pthread_cond_broadcast(&self->done);
    return;
  }
  while (event->done < e->number) pthread_cond_wait(&self->done, &self->lock);
  if (event->status && !s->status) {
    s->status = event->status;
    s->failure = event->failure;
  }
}

static void run_work(phx_stream *s, far_entry *e) {
  phx_device_self *self = s->far;
  phx_error err = {sizeof err, 0, 0, {0}};
  if (s->status) return;
  pthread_mutex_unlock(&self->lock);
  const phx_status status = e->run(e->arguments, &err);
  pthread_mutex_lock(&self->lock);
  if (!status) return;
  s->status = status;
  s->failure = err;
  s->failure.code = status;
}

static void wait_a_little(phx_stream *s) {
  const int64_t ms = s->far->config.delay;
  const struct timespec t = {ms / 1000, ms % 1000 * 1000000};
  if (ms == 0) return;
  pthread_mutex_unlock(&s->far->lock);
  nanosleep(&t, NULL);
  pthread_mutex_lock(&s->far->lock);
}

static void *stream_main(void *arg) {
  phx_stream *s = arg;
  phx_device_self *self = s->far;
  pthread_mutex_lock(&self->lock);
  for (int idle = 1;; idle = !s->first) {
    while (!s->first && !s->stop) pthread_cond_wait(&s->change, &self->lock);
    if (!s->first) break;
    if (idle) wait_a_little(s);
    far_entry *e = s->first;
    if (e->event) run_event(s, e);
    else run_work(s, e);
    s->first = e->next;
    if (!s->first) s->last = &s->first;
    free(e);
    s->finished++;
    pthread_cond_broadcast(&s->change);
  }
  pthread_mutex_unlock(&self->lock);
  return NULL;
}

phx_status far_stream_new(phx_device_self *self, phx_stream **out, phx_error *err) {
  sigset_t all, before;
  phx_stream *s = calloc(1, sizeof *s);
  if (!s) return phx_fail(err, PHX_NOMEM, "far: no memory for a stream");
  s->far = self;
  s->last = &s->first;
  pthread_cond_init(&s->change, NULL);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(&s->thread, NULL, stream_main, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (failed) {
    pthread_cond_destroy(&s->change);
    free(s);
    return phx_fail_errno(err, PHX_DEVICE, failed, "far: no thread for a stream");
  }
  *out = s;
  return PHX_OK;
}

void far_stream_end(phx_stream *s) {
  if (!s) return;
  pthread_mutex_lock(&s->far->lock);
  s->stop = 1;
  pthread_cond_broadcast(&s->change);
  pthread_mutex_unlock(&s->far->lock);
  pthread_join(s->thread, NULL);
  pthread_cond_destroy(&s->change);
  free(s);
}

static phx_status stream_create(void *ctx, const char *name, phx_stream **out, phx_error *err) {
  (void)name;
  return far_stream_new(ctx, out, err);
}
static void stream_destroy(void *ctx, phx_stream *s) {
  (void)ctx;
  far_stream_end(s);
}

static phx_status stream_synchronize(void *ctx, phx_stream *s, phx_error *err) {
  phx_device_self *self = ctx;
  s = real_stream(self, s);
  pthread_mutex_lock(&self->lock);
  while (s->finished != s->put) pthread_cond_wait(&s->change, &self->lock);
  const phx_status status = s->status;
  if (status && err) *err = s->failure;
  s->status = PHX_OK;
  pthread_mutex_unlock(&self->lock);
  return status;
}

/* ---- events ---- */
static phx_status event_create(void *ctx, phx_event **out, phx_error *err) {
  (void)ctx;
  phx_event *e = calloc(1, sizeof *e);
  if (!e) return phx_fail(err, PHX_NOMEM, "far: no memory for an event");
  *out = e;
  return PHX_OK;
}

static phx_status wait_done(phx_device_self *self, phx_event *e, phx_error *err) {
  pthread_mutex_lock(&self->lock);
  while (e->done < e->recorded) pthread_cond_wait(&self->done, &self->lock);
  const phx_status status = e->status;
  if (status && err) *err = e->failure;
  pthread_mutex_unlock(&self->lock);
  return status;
}

static void event_destroy(void *ctx, phx_event *e) {
  if (!e) return;
  (void)wait_done(ctx, e, NULL);
  free(e);
}

static phx_status put_event(phx_device_self *self, phx_stream *s, phx_event *event, int32_t record, phx_error *err) {
  far_entry *e = NULL;
  PHX_TRY(new_entry(0, &e, err));
  pthread_mutex_lock(&self->lock);
  e->event = event;
  e->record = record;
  e->number = record ? ++event->recorded : event->recorded;
  pthread_mutex_unlock(&self->lock);
  put(real_stream(self, s), e);
  return PHX_OK;
}

/* Numbers are reached in order: a record on another stream comes after the one before. */
static phx_status event_record(void *ctx, phx_event *e, phx_stream *s, phx_error *err) {
  phx_device_self *self = ctx;
  const phx_status status = e->recorded ? put_event(self, s, e, 0, err) : PHX_OK;
  return status ? status : put_event(self, s, e, 1, err);
}
static phx_status stream_wait(void *ctx, phx_stream *s, phx_event *e, phx_error *err) {
  return e->recorded ? put_event(ctx, s, e, 0, err) : PHX_OK;
}
static phx_status event_synchronize(void *ctx, phx_event *e, phx_error *err) { return wait_done(ctx, e, err); }
static int32_t event_done(void *ctx, phx_event *e) {
  phx_device_self *self = ctx;
  pthread_mutex_lock(&self->lock);
  const int32_t done = e->done == e->recorded;
  pthread_mutex_unlock(&self->lock);
  return done;
}

/* ---- work ---- */
typedef struct host_call {
  phx_stream_fn *fn;
  void *arg;
} host_call;
static phx_status run_host(void *arguments, phx_error *err) {
  const host_call *c = arguments;
  return c->fn(c->arg, err);
}
static phx_status enqueue(void *ctx, phx_stream *s, phx_stream_fn *fn, void *arg, phx_error *err) {
  const host_call c = {fn, arg};
  return far_submit(ctx, s, run_host, &c, sizeof c, err);
}
static void *native_stream(void *ctx, phx_stream *s) {
  (void)ctx, (void)s;
  return NULL;
}

typedef struct simple {
  phx_device_self *self;
  void *dst;
  const void *src;
  int64_t count;
  int32_t dst_dtype, src_dtype;
  float by;
  int32_t reserved0;
} simple;

static phx_status run_copy(void *arguments, phx_error *err) {
  const simple *a = arguments;
  const phx_device *d = a->self->inner;
  return d->copy(d->ctx, far_near(a->dst), far_near(a->src), a->count, NULL, err);
}
static phx_status copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  const simple a = {.self = ctx, .dst = dst, .src = src, .count = bytes};
  phx_status status = bytes > 0 ? far_check(ctx, "copy to", dst, bytes, -1, err) : PHX_OK;
  if (!status && bytes > 0) status = far_check(ctx, "copy from", src, bytes, -1, err);
  return status ? status : far_submit(ctx, s, run_copy, &a, sizeof a, err);
}

static phx_status run_zero(void *arguments, phx_error *err) {
  const simple *a = arguments;
  const phx_device *d = a->self->inner;
  return d->zero(d->ctx, far_near(a->dst), a->count, NULL, err);
}
static phx_status zero(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err) {
  const simple a = {.self = ctx, .dst = dst, .count = bytes};
  const phx_status status = bytes > 0 ? far_check(ctx, "zero", dst, bytes, -1, err) : PHX_OK;
  return status ? status : far_submit(ctx, s, run_zero, &a, sizeof a, err);
}

static phx_status run_cast(void *arguments, phx_error *err) {
  const simple *a = arguments;
  const phx_device *d = a->self->inner;
  return d->cast(d->ctx, far_near(a->dst), a->dst_dtype, far_near(a->src), a->src_dtype, a->count, NULL, err);
}
static phx_status cast(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                       phx_stream *s, phx_error *err) {
  const simple a = {ctx, dst, src, numel, dst_dtype, src_dtype, 0, 0};
  phx_status status = far_check(ctx, "cast to", dst, numel * (int64_t)phx_dtype_bytes(dst_dtype), 1, err);
  if (!status) status = far_check(ctx, "cast from", src, numel * (int64_t)phx_dtype_bytes(src_dtype), 1, err);
  return status ? status : far_submit(ctx, s, run_cast, &a, sizeof a, err);
}

static phx_status run_add(void *arguments, phx_error *err) {
  const simple *a = arguments;
  const phx_device *d = a->self->inner;
  return d->add(d->ctx, far_near(a->dst), far_near(a->src), a->count, NULL, err);
}
static phx_status add(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s, phx_error *err) {
  const simple a = {.self = ctx, .dst = acc, .src = x, .count = numel};
  phx_status status = far_check(ctx, "add to", acc, numel * 4, 1, err);
  if (!status) status = far_check(ctx, "add", x, numel * 4, 1, err);
  return status ? status : far_submit(ctx, s, run_add, &a, sizeof a, err);
}

static phx_status run_scale(void *arguments, phx_error *err) {
  const simple *a = arguments;
  const phx_device *d = a->self->inner;
  return d->scale(d->ctx, far_near(a->dst), a->by, a->count, NULL, err);
}
static phx_status scale(void *ctx, float *x, float by, int64_t numel, phx_stream *s, phx_error *err) {
  const simple a = {.self = ctx, .dst = x, .count = numel, .by = by};
  const phx_status status = far_check(ctx, "scale", x, numel * 4, 1, err);
  return status ? status : far_submit(ctx, s, run_scale, &a, sizeof a, err);
}

void far_stream_calls(phx_device_self *self) {
  self->device = (phx_device){.struct_size = sizeof(phx_device), .ctx = self, .name = self->name, .caps = 0,
                              .threads = self->inner->threads, .stream_create = stream_create,
                              .stream_destroy = stream_destroy, .stream_synchronize = stream_synchronize,
                              .event_create = event_create, .event_destroy = event_destroy,
                              .event_record = event_record, .stream_wait = stream_wait,
                              .event_synchronize = event_synchronize, .event_done = event_done, .enqueue = enqueue,
                              .native_stream = native_stream, .copy = copy, .zero = zero, .cast = cast, .add = add,
                              .scale = scale, .space = far_space, .pin = far_pin, .unpin = far_unpin};
}
