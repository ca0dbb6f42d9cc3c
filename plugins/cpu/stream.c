/* plugins/cpu/stream.c - streams and events of the cpu device.
 *
 * The compute stream (NULL) runs inline.  Every other stream is a thread with a ring of entries: a mutex, two
 * conditions, and it sleeps, never spins, since ranks own one core each.  A full ring blocks the caller; nothing is
 * allocated after create. Errors: a function's first failure is kept; what follows on the stream is skipped, except
 * events, which still complete and carry the failure to whoever waits; stream_synchronize returns it and clears it.
 * Events: record number k completes when the stream reaches it; a wait is for the last number at the time of the call.
 * Invariant: an event's numbers complete in order, so a record that changes the stream first waits for the last.  Waits
 * look back only, at records already made: no cycle.
 * Threads: calls are [main] but event_done; `done` is atomic and changed under the event's mutex. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cpu.h"

enum { RING = 256 };
enum { RUN, COPY, ZERO, CAST, ADD, SCALE, RECORD, WAIT };

struct phx_event {
  pthread_mutex_t lock;
  pthread_cond_t change;
  _Atomic uint64_t recorded; /* changed by [main] */
  _Atomic uint64_t done;     /* <= recorded */
  const phx_stream *stream;  /* of the last record; compared, never followed */
  phx_status status;         /* the stream's failure at the last completed record */
  phx_error failure;
};

typedef struct entry {
  int32_t kind, dst_dtype, src_dtype;
  float by;
  phx_stream_fn *fn;
  void *dst; /* or fn's argument */
  const void *src;
  int64_t count; /* bytes or elements */
  phx_event *event;
  uint64_t number;
} entry;

struct phx_stream {
  const phx__cpu *cpu;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t work, room; /* room: an entry was finished */
  uint64_t put, taken, finished;
  int32_t stop;
  phx_status status; /* kept failure; thread while busy, under lock otherwise */
  phx_error failure;
  entry ring[RING];
};

static void event_complete(phx_event *e, uint64_t number, phx_status status, const phx_error *failure) {
  pthread_mutex_lock(&e->lock);
  e->status = status;
  if (status != PHX_OK) e->failure = *failure;
  atomic_store_explicit(&e->done, number, memory_order_release);
  pthread_cond_broadcast(&e->change);
  pthread_mutex_unlock(&e->lock);
}

/* Blocks until record `number` completed; returns the failure it carries. */
static phx_status event_wait(phx_event *e, uint64_t number, phx_error *err) {
  if (number == 0) return PHX_OK;
  pthread_mutex_lock(&e->lock);
  while (atomic_load_explicit(&e->done, memory_order_relaxed) < number) pthread_cond_wait(&e->change, &e->lock);
  const phx_status status = e->status;
  if (status != PHX_OK && err) *err = e->failure;
  pthread_mutex_unlock(&e->lock);
  return status;
}

static phx_status run_entry(const phx__cpu *cpu, const entry *e, phx_error *err) {
  switch (e->kind) {
    case RUN:
      return e->fn(e->dst, err);
    case COPY:
      memmove(e->dst, e->src, (size_t)e->count);
      return PHX_OK;
    case ZERO:
      memset(e->dst, 0, (size_t)e->count);
      return PHX_OK;
    case CAST:
      cpu->kernels->cast(e->dst, e->dst_dtype, e->src, e->src_dtype, e->count);
      return PHX_OK;
    case ADD:
      cpu->kernels->add(e->dst, e->dst, e->src, e->count);
      return PHX_OK;
    case SCALE:
      cpu->kernels->scale(e->dst, e->by, e->count);
      return PHX_OK;
    case WAIT:
      return event_wait(e->event, e->number, err);
    default:
      return phx_fail(err, PHX_INTERNAL, "cpu: stream entry of kind %d", e->kind);
  }
}

static void keep_failure(phx_stream *s, phx_status status, const phx_error *err) {
  pthread_mutex_lock(&s->lock);
  s->status = status;
  s->failure = *err;
  s->failure.code = status;
  pthread_mutex_unlock(&s->lock);
}

static void *stream_main(void *arg) {
  phx_stream *s = arg;
  pthread_mutex_lock(&s->lock);
  for (;;) {
    while (s->taken == s->put && !s->stop) pthread_cond_wait(&s->work, &s->lock);
    if (s->taken == s->put) break;
    const entry *e = &s->ring[s->taken++ % RING];
    const phx_status kept = s->status; /* only this thread sets it, and it is cleared only while the stream is idle */
    pthread_mutex_unlock(&s->lock);
    if (e->kind == RECORD) {
      event_complete(e->event, e->number, kept, &s->failure);
    } else if (kept == PHX_OK) {
      phx_error err = {sizeof err, 0, 0, {0}};
      const phx_status status = run_entry(s->cpu, e, &err);
      if (status != PHX_OK) keep_failure(s, status, &err);
    } else if (e->kind == WAIT) {
      (void)event_wait(e->event, e->number, NULL); /* order holds for the events that follow; the first failure stays */
    }
    pthread_mutex_lock(&s->lock);
    s->finished++;
    pthread_cond_broadcast(&s->room);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

static void stream_put(phx_stream *s, const entry *e) {
  pthread_mutex_lock(&s->lock);
  while (s->put - s->finished == RING) pthread_cond_wait(&s->room, &s->lock);
  s->ring[s->put++ % RING] = *e;
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
}

/* In stream order: now, or as the stream's next entry. */
static phx_status submit(void *ctx, phx_stream *s, const entry *e, phx_error *err) {
  if (!s) return run_entry(ctx, e, err);
  stream_put(s, e);
  return PHX_OK;
}

static phx_status stream_synchronize(void *ctx, phx_stream *s, phx_error *err) {
  (void)ctx;
  if (!s) return PHX_OK;
  pthread_mutex_lock(&s->lock);
  while (s->finished != s->put) pthread_cond_wait(&s->room, &s->lock);
  const phx_status status = s->status;
  if (status != PHX_OK && err) *err = s->failure;
  s->status = PHX_OK;
  pthread_mutex_unlock(&s->lock);
  return status;
}

phx_status phx__cpu_enter(phx__cpu *cpu, phx_stream *s, phx_error *err) {
  return stream_synchronize(cpu, s, err);
}

phx_status phx__cpu_begin(phx__cpu *cpu, int32_t dtype, phx_stream *s, phx_error *err) {
  if (dtype != PHX_F32 && dtype != PHX_BF16)
    return phx_fail(err, PHX_UNSUPPORTED, "cpu: operations of dtype %d: this device computes in fp32 and bf16", dtype);
  return phx__cpu_enter(cpu, s, err);
}

/* Signals are the main thread's business. */
static int start_thread(phx_stream *s) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(&s->thread, NULL, stream_main, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return failed;
}

static phx_status stream_create(void *ctx, const char *name, phx_stream **out, phx_error *err) {
  phx_stream *s = calloc(1, sizeof *s);
  if (!s) return phx_fail(err, PHX_NOMEM, "cpu: no memory for stream \"%s\"", name ? name : "");
  s->cpu = ctx;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->work, NULL);
  pthread_cond_init(&s->room, NULL);
  const int failed = start_thread(s);
  if (failed) {
    pthread_cond_destroy(&s->room);
    pthread_cond_destroy(&s->work);
    pthread_mutex_destroy(&s->lock);
    free(s);
    return phx_fail_errno(err, PHX_DEVICE, failed, "cpu: no thread for stream \"%s\"", name ? name : "");
  }
  char shown[16];
  snprintf(shown, sizeof shown, "phx:%s", name ? name : "stream");
  pthread_setname_np(s->thread, shown);
  *out = s;
  return PHX_OK;
}

static void stream_destroy(void *ctx, phx_stream *s) {
  (void)ctx;
  if (!s) return;
  pthread_mutex_lock(&s->lock);
  s->stop = 1; /* the thread leaves when the ring is empty */
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
  pthread_join(s->thread, NULL);
  pthread_cond_destroy(&s->room);
  pthread_cond_destroy(&s->work);
  pthread_mutex_destroy(&s->lock);
  free(s);
}

static phx_status event_create(void *ctx, phx_event **out, phx_error *err) {
  (void)ctx;
  phx_event *e = calloc(1, sizeof *e);
  if (!e) return phx_fail(err, PHX_NOMEM, "cpu: no memory for an event");
  pthread_mutex_init(&e->lock, NULL);
  pthread_cond_init(&e->change, NULL);
  *out = e;
  return PHX_OK;
}

static void event_destroy(void *ctx, phx_event *e) {
  (void)ctx;
  if (!e) return;
  (void)event_wait(e, e->recorded, NULL); /* a record still in a ring would touch it */
  pthread_cond_destroy(&e->change);
  pthread_mutex_destroy(&e->lock);
  free(e);
}

static phx_status event_record(void *ctx, phx_event *e, phx_stream *s, phx_error *err) {
  (void)ctx;
  (void)err;
  const uint64_t last = e->recorded++;
  if (!s) {
    (void)event_wait(e, last, NULL);
    event_complete(e, e->recorded, PHX_OK, NULL);
  } else {
    if (last && e->stream != s && atomic_load_explicit(&e->done, memory_order_acquire) < last)
      stream_put(s, &(entry){.kind = WAIT, .event = e, .number = last});
    stream_put(s, &(entry){.kind = RECORD, .event = e, .number = e->recorded});
  }
  e->stream = s;
  return PHX_OK;
}

static phx_status stream_wait(void *ctx, phx_stream *s, phx_event *e, phx_error *err) {
  if (e->recorded == 0) return PHX_OK;
  return submit(ctx, s, &(entry){.kind = WAIT, .event = e, .number = e->recorded}, err);
}

static phx_status event_synchronize(void *ctx, phx_event *e, phx_error *err) {
  (void)ctx;
  return event_wait(e, e->recorded, err);
}

static int32_t event_done(void *ctx, phx_event *e) {
  (void)ctx;
  return atomic_load_explicit(&e->done, memory_order_acquire) ==
         atomic_load_explicit(&e->recorded, memory_order_acquire);
}

static phx_status enqueue(void *ctx, phx_stream *s, phx_stream_fn *fn, void *arg, phx_error *err) {
  return submit(ctx, s, &(entry){.kind = RUN, .fn = fn, .dst = arg}, err);
}

static void *native_stream(void *ctx, phx_stream *s) {
  (void)ctx;
  (void)s;
  return NULL;
}

static phx_status copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  return submit(ctx, s, &(entry){.kind = COPY, .dst = dst, .src = src, .count = bytes}, err);
}

static phx_status zero(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err) {
  return submit(ctx, s, &(entry){.kind = ZERO, .dst = dst, .count = bytes}, err);
}

static phx_status cast(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                       phx_stream *s, phx_error *err) {
  for (int i = 0; i < 2; i++) {
    const int32_t dtype = i ? src_dtype : dst_dtype;
    if (dtype != PHX_F32 && dtype != PHX_F16 && dtype != PHX_BF16)
      return phx_fail(err, PHX_UNSUPPORTED, "cpu: cast from dtype %d to %d: only F32, F16 and BF16", src_dtype,
                      dst_dtype);
  }
  return submit(
      ctx, s,
      &(entry){.kind = CAST, .dst = dst, .dst_dtype = dst_dtype, .src = src, .src_dtype = src_dtype, .count = numel},
      err);
}

static phx_status add(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s, phx_error *err) {
  return submit(ctx, s, &(entry){.kind = ADD, .dst = acc, .src = x, .count = numel}, err);
}

static phx_status scale(void *ctx, float *x, float by, int64_t numel, phx_stream *s, phx_error *err) {
  return submit(ctx, s, &(entry){.kind = SCALE, .dst = x, .by = by, .count = numel}, err);
}

void phx__cpu_device_init(phx__cpu *cpu) {
  cpu->device = (phx_device){.struct_size = sizeof(phx_device),
                             .ctx = cpu,
                             .name = cpu->name,
                             .caps = PHX_DEVICE_HOST_MEMORY,
                             .threads = cpu->threads,
                             .stream_create = stream_create,
                             .stream_destroy = stream_destroy,
                             .stream_synchronize = stream_synchronize,
                             .event_create = event_create,
                             .event_destroy = event_destroy,
                             .event_record = event_record,
                             .stream_wait = stream_wait,
                             .event_synchronize = event_synchronize,
                             .event_done = event_done,
                             .enqueue = enqueue,
                             .native_stream = native_stream,
                             .copy = copy,
                             .zero = zero,
                             .cast = cast,
                             .add = add,
                             .scale = scale};
}
