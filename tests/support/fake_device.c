/* fake_device.c - streams as threads, for tests of communicators: no operations, no memory.  Correct, not fast. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "fake_job.h"

#define ROOM 1024
typedef struct task {
  phx_stream_fn *fn;
  void *arg;
} task;
struct phx_stream {
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  task tasks[ROOM];
  uint64_t head, tail; /* tail: done */
  int stop;
  phx_status status;
  phx_error error;
};
struct phx_event {
  phx_stream *stream;
  uint64_t after;
};

static void *stream_main(void *arg) {
  phx_stream *s = arg;
  pthread_mutex_lock(&s->lock);
  for (;;) {
    while (s->head == s->tail && !s->stop) pthread_cond_wait(&s->changed, &s->lock);
    if (s->head == s->tail) break;
    task t = s->tasks[s->tail % ROOM];
    phx_error err = {.struct_size = sizeof err};
    pthread_mutex_unlock(&s->lock);
    phx_status status = t.fn(t.arg, &err);
    pthread_mutex_lock(&s->lock);
    if (status != PHX_OK && s->status == PHX_OK) {
      s->status = status;
      s->error = err;
    }
    s->tail++;
    pthread_cond_broadcast(&s->changed);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

static phx_status stream_create(void *ctx, const char *name, phx_stream **out, phx_error *err) {
  phx_stream *s = calloc(1, sizeof *s);
  (void)ctx, (void)name, (void)err;
  if (!s) return PHX_NOMEM;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->changed, NULL);
  if (pthread_create(&s->thread, NULL, stream_main, s) != 0) {
    free(s);
    return PHX_NOMEM;
  }
  *out = s;
  return PHX_OK;
}
static void stream_destroy(void *ctx, phx_stream *s) {
  (void)ctx;
  if (!s) return;
  pthread_mutex_lock(&s->lock);
  s->stop = 1;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
  pthread_join(s->thread, NULL);
  pthread_cond_destroy(&s->changed);
  pthread_mutex_destroy(&s->lock);
  free(s);
}
static phx_status wait_until(phx_stream *s, uint64_t done, phx_error *err) {
  pthread_mutex_lock(&s->lock);
  while (s->tail < done) pthread_cond_wait(&s->changed, &s->lock);
  phx_status status = s->status;
  if (status != PHX_OK && err) *err = s->error;
  s->status = PHX_OK;
  pthread_mutex_unlock(&s->lock);
  return status;
}
static phx_status stream_synchronize(void *ctx, phx_stream *s, phx_error *err) {
  (void)ctx;
  return s ? wait_until(s, s->head, err) : PHX_OK;
}
static phx_status enqueue(void *ctx, phx_stream *s, phx_stream_fn *fn, void *arg, phx_error *err) {
  (void)ctx;
  if (!s) return fn(arg, err);
  pthread_mutex_lock(&s->lock);
  while (s->head - s->tail == ROOM) pthread_cond_wait(&s->changed, &s->lock);
  s->tasks[s->head++ % ROOM] = (task){fn, arg};
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
  return PHX_OK;
}
static phx_status event_create(void *ctx, phx_event **out, phx_error *err) {
  (void)ctx, (void)err;
  *out = calloc(1, sizeof **out);
  return *out ? PHX_OK : PHX_NOMEM;
}
static void event_destroy(void *ctx, phx_event *e) {
  (void)ctx;
  free(e);
}
static phx_status event_record(void *ctx, phx_event *e, phx_stream *s, phx_error *err) {
  (void)ctx, (void)err;
  e->stream = s;
  e->after = s ? s->head : 0;
  return PHX_OK;
}
static phx_status event_synchronize(void *ctx, phx_event *e, phx_error *err) {
  (void)ctx;
  return e->stream ? wait_until(e->stream, e->after, err) : PHX_OK;
}
static phx_status stream_wait(void *ctx, phx_stream *s, phx_event *e, phx_error *err) {
  (void)s; /* the caller waits in the stream's place: later work is enqueued later */
  return event_synchronize(ctx, e, err);
}
static int32_t event_done(void *ctx, phx_event *e) {
  (void)ctx;
  if (!e->stream) return 1;
  pthread_mutex_lock(&e->stream->lock);
  int32_t done = e->stream->tail >= e->after;
  pthread_mutex_unlock(&e->stream->lock);
  return done;
}

const phx_device *fake_device(void) {
  static const phx_device device = {.struct_size = sizeof(phx_device), .name = "fake", .caps = PHX_DEVICE_HOST_MEMORY,
                                    .threads = 1, .stream_create = stream_create, .stream_destroy = stream_destroy,
                                    .stream_synchronize = stream_synchronize, .event_create = event_create,
                                    .event_destroy = event_destroy, .event_record = event_record,
                                    .stream_wait = stream_wait, .event_synchronize = event_synchronize,
                                    .event_done = event_done, .enqueue = enqueue};
  return &device;
}
