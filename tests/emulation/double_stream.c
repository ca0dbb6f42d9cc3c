/* double_stream.c - the double's streams, events and copies.
 *
 * Inline mode: work is done in the call.  Threads mode: a stream is a thread with a list of work; the NULL stream waits
 * for all others and then works in the call (the legacy stream, and stricter: for non-blocking streams too).
 * Invariant: an event is done up to the number of its last completed record; a wait is for the number at its call.
 * Threads: any; a lock per stream and per event, and one for the list of streams. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "double_inner.h"

typedef struct task {
  struct task *next;
  void (*run)(void *arg);
  void (*drop)(void *arg);
  void *arg;
  int host; /* a host function: device memory stays out of reach */
} task;

struct CUstream_st {
  struct CUstream_st *next; /* in the list of streams */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t change;
  task *first, **last;
  uint64_t put, done;
  int stop, threaded;
};

struct CUevent_st {
  pthread_mutex_t lock;
  pthread_cond_t change;
  uint64_t recorded, done;
  struct timespec when;
  unsigned flags;
};

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static cudaStream_t all_streams;

static void run_task(task *t) {
  if (!t->host) cuda_double_reach();
  t->run(t->arg);
  if (!t->host) cuda_double_leave();
  if (t->drop) t->drop(t->arg);
}

static void *stream_main(void *arg) {
  cudaStream_t s = arg;
  pthread_mutex_lock(&s->lock);
  for (;;) {
    while (!s->first && !s->stop) pthread_cond_wait(&s->change, &s->lock);
    task *t = s->first;
    if (!t) break;
    s->first = t->next;
    if (!s->first) s->last = &s->first;
    pthread_mutex_unlock(&s->lock);
    const struct timespec late = {0, 20000}; /* what does not wait should lose the race */
    nanosleep(&late, NULL);
    if (double__sticky() == cudaSuccess || t->host)
      run_task(t);
    else if (t->drop)
      t->drop(t->arg);
    free(t);
    pthread_mutex_lock(&s->lock);
    s->done++;
    pthread_cond_broadcast(&s->change);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

static void wait_stream(cudaStream_t s) {
  if (!s->threaded) return;
  pthread_mutex_lock(&s->lock);
  const uint64_t until = s->put;
  while (s->done < until) pthread_cond_wait(&s->change, &s->lock);
  pthread_mutex_unlock(&s->lock);
}

void double__wait_all_streams(void) {
  pthread_mutex_lock(&list_lock);
  for (cudaStream_t s = all_streams; s; s = s->next) wait_stream(s);
  pthread_mutex_unlock(&list_lock);
}

void double__wait_stream(cudaStream_t stream) {
  if (stream)
    wait_stream(stream);
  else
    double__wait_all_streams();
}

static cudaError_t submit(cudaStream_t s, void (*run)(void *), void (*drop)(void *), void *arg, int host) {
  if (!s) double__wait_all_streams();
  if (!s || !s->threaded) {
    task now = {.run = run, .drop = drop, .arg = arg, .host = host};
    run_task(&now);
    return cudaSuccess;
  }
  task *t = malloc(sizeof *t);
  if (!t) abort();
  *t = (task){.run = run, .drop = drop, .arg = arg, .host = host};
  pthread_mutex_lock(&s->lock);
  *s->last = t;
  s->last = &t->next;
  s->put++;
  pthread_cond_broadcast(&s->change);
  pthread_mutex_unlock(&s->lock);
  return cudaSuccess;
}

cudaError_t cuda_double_submit(cudaStream_t stream, void (*run)(void *), void (*drop)(void *), void *arg) {
  return submit(stream, run, drop, arg, 0);
}

/* ---- streams ---- */
static cudaError_t make_stream(cudaStream_t *out) {
  cudaStream_t s = calloc(1, sizeof *s);
  if (!s) abort();
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->change, NULL);
  s->last = &s->first;
  s->threaded = double__config()->threads;
  if (s->threaded && pthread_create(&s->thread, NULL, stream_main, s) != 0) abort();
  pthread_mutex_lock(&list_lock);
  s->next = all_streams;
  all_streams = s;
  pthread_mutex_unlock(&list_lock);
  double__count(&double__stats.streams, 1);
  *out = s;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  ENTER("cudaStreamCreate");
  return make_stream(stream);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  ENTER("cudaStreamCreateWithFlags");
  return flags > cudaStreamNonBlocking ? cuda_double_return(cudaErrorInvalidValue) : make_stream(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  ENTER("cudaStreamCreateWithPriority");
  (void)priority; /* clamped by the runtime, too */
  return flags > cudaStreamNonBlocking ? cuda_double_return(cudaErrorInvalidValue) : make_stream(stream);
}

static int unlist(cudaStream_t s) {
  int found = 0;
  pthread_mutex_lock(&list_lock);
  for (cudaStream_t *at = &all_streams; *at && !found; at = &(*at)->next) {
    if (*at != s) continue;
    *at = s->next;
    found = 1;
    break;
  }
  pthread_mutex_unlock(&list_lock);
  return found;
}

cudaError_t cudaStreamDestroy(cudaStream_t s) {
  ENTER("cudaStreamDestroy");
  if (!s || !unlist(s)) return cuda_double_return(cudaErrorInvalidResourceHandle);
  if (s->threaded) {
    pthread_mutex_lock(&s->lock);
    s->stop = 1;
    pthread_cond_broadcast(&s->change);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
  }
  pthread_cond_destroy(&s->change);
  pthread_mutex_destroy(&s->lock);
  free(s);
  double__count(&double__stats.streams, -1);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  ENTER("cudaStreamSynchronize");
  double__wait_stream(s);
  return cuda_double_return(double__sticky());
}
cudaError_t cudaDeviceSynchronize(void) {
  ENTER("cudaDeviceSynchronize");
  double__wait_all_streams();
  return cuda_double_return(double__sticky());
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  ENTER("cudaStreamQuery");
  if (!s || !s->threaded) return cudaSuccess;
  pthread_mutex_lock(&s->lock);
  const int idle = s->done == s->put;
  pthread_mutex_unlock(&s->lock);
  return idle ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *arg) {
  ENTER("cudaLaunchHostFunc");
  return submit(stream, fn, NULL, arg, 1);
}

typedef struct value_wait {
  const uint32_t *at;
  uint32_t value;
} value_wait;
static void wait_for_value(void *arg) {
  const value_wait *w = arg;
  const struct timespec pause = {0, 20000};
  while ((int32_t)(__atomic_load_n(w->at, __ATOMIC_ACQUIRE) - w->value) < 0) nanosleep(&pause, NULL);
}
/* The driver's call; flags 0: until the value is there or was passed. */
static int wait_value32(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned flags) {
  if (cuda_double_enter("cuStreamWaitValue32") != cudaSuccess || flags) return (int)cudaErrorInvalidValue;
  value_wait *w = malloc(sizeof *w);
  if (!w) abort();
  *w = (value_wait){(const uint32_t *)(uintptr_t)address, value};
  return (int)submit(stream, wait_for_value, free, w, 1);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **entry, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  int (*const call)(cudaStream_t, unsigned long long, uint32_t, unsigned) = wait_value32;
  ENTER("cudaGetDriverEntryPointByVersion");
  (void)version, (void)flags;
  *entry = NULL;
  *found =
      strcmp(symbol, "cuStreamWaitValue32") == 0 ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (*found == cudaDriverEntryPointSuccess) memcpy(entry, &call, sizeof call);
  return cudaSuccess;
}

/* ---- events ---- */
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  ENTER("cudaEventCreateWithFlags");
  cudaEvent_t e = calloc(1, sizeof *e);
  if (!e) abort();
  pthread_mutex_init(&e->lock, NULL);
  pthread_cond_init(&e->change, NULL);
  e->flags = flags;
  double__count(&double__stats.events, 1);
  *event = e;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

static void wait_event(cudaEvent_t e, uint64_t number) {
  pthread_mutex_lock(&e->lock);
  while (e->done < number) pthread_cond_wait(&e->change, &e->lock);
  pthread_mutex_unlock(&e->lock);
}

static uint64_t event_recorded(cudaEvent_t e) {
  pthread_mutex_lock(&e->lock);
  const uint64_t number = e->recorded;
  pthread_mutex_unlock(&e->lock);
  return number;
}

cudaError_t cudaEventDestroy(cudaEvent_t e) {
  ENTER("cudaEventDestroy");
  if (!e) return cuda_double_return(cudaErrorInvalidResourceHandle);
  wait_event(e, event_recorded(e)); /* the runtime keeps it alive until then */
  pthread_cond_destroy(&e->change);
  pthread_mutex_destroy(&e->lock);
  free(e);
  double__count(&double__stats.events, -1);
  return cudaSuccess;
}

typedef struct mark {
  cudaEvent_t event;
  uint64_t number;
} mark;

static mark *new_mark(cudaEvent_t e, uint64_t number) {
  mark *m = malloc(sizeof *m);
  if (!m) abort();
  *m = (mark){e, number};
  return m;
}
static void complete(void *arg) {
  const mark *m = arg;
  pthread_mutex_lock(&m->event->lock);
  if (m->event->done < m->number) m->event->done = m->number;
  clock_gettime(CLOCK_MONOTONIC, &m->event->when);
  pthread_cond_broadcast(&m->event->change);
  pthread_mutex_unlock(&m->event->lock);
}
static void await(void *arg) {
  const mark *m = arg;
  wait_event(m->event, m->number);
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
  ENTER("cudaEventRecord");
  if (!e) return cuda_double_return(cudaErrorInvalidResourceHandle);
  pthread_mutex_lock(&e->lock);
  const uint64_t number = ++e->recorded;
  pthread_mutex_unlock(&e->lock);
  return submit(stream, complete, free, new_mark(e, number), 1);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned flags) {
  ENTER("cudaStreamWaitEvent");
  if (!e || flags) return cuda_double_return(cudaErrorInvalidValue);
  return submit(stream, await, free, new_mark(e, event_recorded(e)), 1);
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  ENTER("cudaEventSynchronize");
  wait_event(e, event_recorded(e));
  return cuda_double_return(double__sticky());
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  ENTER("cudaEventQuery");
  pthread_mutex_lock(&e->lock);
  const int done = e->done == e->recorded;
  pthread_mutex_unlock(&e->lock);
  return done ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  ENTER("cudaEventElapsedTime");
  if (((start->flags | end->flags) & cudaEventDisableTiming) || !start->recorded || !end->recorded)
    return cuda_double_return(cudaErrorInvalidResourceHandle);
  *milliseconds = (float)(end->when.tv_sec - start->when.tv_sec) * 1e3f +
                  (float)(end->when.tv_nsec - start->when.tv_nsec) * 1e-6f;
  return cudaSuccess;
}

/* ---- copies ---- */
typedef struct copying {
  void *dst;
  const void *src; /* NULL: fill */
  size_t bytes;
  int value;
} copying;

static void do_copy(void *arg) {
  const copying *c = arg;
  if (c->src)
    memmove(c->dst, c->src, c->bytes);
  else
    memset(c->dst, c->value, c->bytes);
}

/* Does `kind` fit where the two ends are?  The runtime trusts it for pageable memory only. */
static int kind_fits(const void *dst, const void *src, enum cudaMemcpyKind kind) {
  const int to = double__find(dst, NULL, NULL) == DOUBLE_ON_DEVICE;
  const int from = double__find(src, NULL, NULL) == DOUBLE_ON_DEVICE;
  switch (kind) {
    case cudaMemcpyHostToHost: return !to && !from;
    case cudaMemcpyHostToDevice: return to && !from;
    case cudaMemcpyDeviceToHost: return !to && from;
    case cudaMemcpyDeviceToDevice: return to && from;
    default: return 1;
  }
}

static cudaError_t start_copy(const copying *what, cudaStream_t stream) {
  if (!double__inside(what->dst, what->bytes) || (what->src && !double__inside(what->src, what->bytes)))
    return cuda_double_return(cudaErrorInvalidValue);
  copying *c = malloc(sizeof *c);
  if (!c) abort();
  *c = *what;
  const int pageable = double__find(c->dst, NULL, NULL) == DOUBLE_PAGEABLE ||
                       (c->src && double__find(c->src, NULL, NULL) == DOUBLE_PAGEABLE);
  const cudaError_t error = submit(stream, do_copy, free, c, 0);
  if (pageable) double__wait_stream(stream); /* copies of pageable memory do not return before it was read or written */
  return error;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  ENTER("cudaMemcpyAsync");
  if (bytes == 0) return cudaSuccess;
  if (!dst || !src || !kind_fits(dst, src, kind)) return cuda_double_return(cudaErrorInvalidValue);
  return start_copy(&(copying){dst, src, bytes, 0}, stream);
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind) {
  ENTER("cudaMemcpy");
  if (bytes == 0) return cudaSuccess;
  if (!dst || !src || !kind_fits(dst, src, kind)) return cuda_double_return(cudaErrorInvalidValue);
  return start_copy(&(copying){dst, src, bytes, 0}, NULL);
}
cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream) {
  ENTER("cudaMemsetAsync");
  if (bytes == 0) return cudaSuccess;
  if (double__find(dst, NULL, NULL) == DOUBLE_PAGEABLE) return cuda_double_return(cudaErrorInvalidValue);
  return start_copy(&(copying){dst, NULL, bytes, value}, stream);
}
cudaError_t cudaMemset(void *dst, int value, size_t bytes) {
  ENTER("cudaMemset");
  if (bytes == 0) return cudaSuccess;
  if (double__find(dst, NULL, NULL) == DOUBLE_PAGEABLE) return cuda_double_return(cudaErrorInvalidValue);
  return start_copy(&(copying){dst, NULL, bytes, value}, NULL);
}
