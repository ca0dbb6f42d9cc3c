/* plugins/cuda/stream.c - streams, events, copies, and host functions in stream order.
 *
 * A host function (a collective of a communicator that works on the host, for one) may block for long and wait for
 * peers, so it does not run in the driver's callback thread, which may be one for all streams: each stream that needs
 * it has a thread.  The stream tells the thread that it is there (a callback that only wakes it), and then waits for a
 * number in pinned memory that the thread writes when the function returned (cuStreamWaitValue32).
 * Errors: a function's first failure is kept; later functions of the stream are skipped; the failure is returned by the
 * next synchronize of that stream, of an event recorded there, or of a stream that waits for such an event.
 * Threads: calls are [main] but event_done; the thread's state is under its mutex. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

enum { RING = 256, WAIT_GEQ = 0 };

struct phx_event {
  cudaEvent_t native;
  phx_stream *stream; /* of the last record */
};

typedef struct call {
  phx_stream_fn *fn;
  void *arg;
} call;

struct phx_stream {
  phx__cuda *cuda;
  cudaStream_t native;
  phx_stream *next;
  phx_stream **upstream; /* streams whose events this one waited for */
  int32_t n_upstream, upstream_room;
  int32_t running; /* the thread exists */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t change;
  uint32_t put, reached, done; /* calls: given, arrived at by the stream, returned */
  int32_t stop;
  uint32_t *flag; /* pinned: `done`, as the stream sees it */
  phx_status status;
  phx_error failure;
  call ring[RING];
};

cudaStream_t phx__cuda_stream(const phx__cuda *cuda, phx_stream *s) { return s ? s->native : cuda->compute; }

static phx_stream *object_of(const phx__cuda *cuda, phx_stream *s) { return s ? s : cuda->first; }

/* ---- the thread of a stream ---- */
static void *thread_main(void *arg) {
  phx_stream *s = arg;
  phx_error unset = {.struct_size = sizeof unset};
  const phx_status set = phx__cuda_check(s->cuda, cudaSetDevice(s->cuda->device_index), "cudaSetDevice", &unset);
  pthread_mutex_lock(&s->lock);
  if (set != PHX_OK) { /* functions may call the runtime */
    s->status = set;
    s->failure = unset;
  }
  for (;;) {
    while (s->reached == s->done && !s->stop) pthread_cond_wait(&s->change, &s->lock);
    if (s->reached == s->done) break;
    const call c = s->ring[s->done % RING];
    const phx_status kept = s->status;
    pthread_mutex_unlock(&s->lock);
    phx_error err = {.struct_size = sizeof err};
    const phx_status status = kept == PHX_OK ? c.fn(c.arg, &err) : PHX_OK;
    pthread_mutex_lock(&s->lock);
    if (status != PHX_OK) {
      s->status = status;
      s->failure = err;
      s->failure.code = status;
    }
    s->done++;
    __atomic_store_n(s->flag, s->done, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&s->change);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

static void CUDART_CB stream_is_there(void *arg) {
  phx_stream *s = arg;
  pthread_mutex_lock(&s->lock);
  s->reached++;
  pthread_cond_broadcast(&s->change);
  pthread_mutex_unlock(&s->lock);
}

static phx_status thread_begin(phx_stream *s, phx_error *err) {
  sigset_t all, before;
  void *flag = NULL;
  if (s->running) return PHX_OK;
  if (!s->flag) {
    PHX_TRY(phx__cuda_alloc(s->cuda, PHX_SPACE_PINNED, PHX_ALIGN, &flag, err));
    s->flag = flag;
  }
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the main thread */
  const int failed = pthread_create(&s->thread, NULL, thread_main, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (failed) return phx__cuda_fail(s->cuda, err, PHX_NOMEM, "no thread for a stream: %s", strerror(failed));
  s->running = 1;
  return PHX_OK;
}

static phx_status enqueue(void *ctx, phx_stream *stream, phx_stream_fn *fn, void *arg, phx_error *err) {
  phx__cuda *cuda = ctx;
  phx_stream *s = object_of(cuda, stream);
  PHX_TRY(thread_begin(s, err));
  pthread_mutex_lock(&s->lock);
  while (s->put - s->done == RING) pthread_cond_wait(&s->change, &s->lock);
  s->ring[s->put % RING] = (call){fn, arg};
  const uint32_t number = s->put + 1;
  pthread_mutex_unlock(&s->lock);
  phx_status status = phx__cuda_check(cuda, cudaLaunchHostFunc(s->native, stream_is_there, s), "enqueue", err);
  if (status != PHX_OK) return status; /* the place in the ring is used again */
  pthread_mutex_lock(&s->lock);
  s->put = number;
  pthread_mutex_unlock(&s->lock);
  const int result = cuda->wait_value(s->native, (unsigned long long)(uintptr_t)s->flag, number, WAIT_GEQ);
  if (result == 0) return PHX_OK;
  status = phx__cuda_fail(cuda, err, PHX_DEVICE, "enqueue: cuStreamWaitValue32 returned %d", result);
  if (err) err->cause = result;
  return status;
}

/* ---- streams ---- */
static phx_status stream_make(phx__cuda *cuda, phx_stream **out, phx_error *err) {
  phx_stream *s = calloc(1, sizeof *s);
  if (!s) return phx__cuda_fail(cuda, err, PHX_NOMEM, "no memory for a stream");
  const phx_status status =
      phx__cuda_check(cuda, cudaStreamCreateWithFlags(&s->native, cudaStreamNonBlocking), "stream_create", err);
  if (status != PHX_OK) {
    free(s);
    return status;
  }
  s->cuda = cuda;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->change, NULL);
  *out = s;
  return PHX_OK;
}

static void stream_unmake(phx_stream *s) {
  (void)cudaStreamSynchronize(s->native); /* what failed was or will be reported by who waited */
  if (s->running) {
    pthread_mutex_lock(&s->lock);
    s->stop = 1;
    pthread_cond_broadcast(&s->change);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
  }
  if (s->flag) phx__cuda_free(s->cuda, PHX_SPACE_PINNED, s->flag, PHX_ALIGN);
  (void)cudaStreamDestroy(s->native);
  pthread_cond_destroy(&s->change);
  pthread_mutex_destroy(&s->lock);
  free(s->upstream);
  free(s);
}

static phx_status stream_create(void *ctx, const char *name, phx_stream **out, phx_error *err) {
  phx__cuda *cuda = ctx;
  (void)name;
  PHX_TRY(stream_make(cuda, out, err));
  (*out)->next = cuda->streams;
  cuda->streams = *out;
  return PHX_OK;
}

static void forget_upstream(phx_stream *from, const phx_stream *gone) {
  for (int32_t i = from->n_upstream - 1; i >= 0; i--)
    if (from->upstream[i] == gone) from->upstream[i] = from->upstream[--from->n_upstream];
}

static void stream_destroy(void *ctx, phx_stream *s) {
  phx__cuda *cuda = ctx;
  if (!s) return;
  for (phx_stream **at = &cuda->streams; *at; at = &(*at)->next)
    if (*at == s) {
      *at = s->next;
      break;
    }
  for (phx_stream *other = cuda->streams; other; other = other->next) forget_upstream(other, s);
  forget_upstream(cuda->first, s);
  if (cuda->scratch_stream == s->native) {
    (void)cudaStreamSynchronize(s->native);
    cuda->scratch_stream = cuda->compute;
  }
  stream_unmake(s);
}

/* The failure that s keeps, which is then forgotten (clear). */
static phx_status kept_failure(phx_stream *s, int32_t clear, phx_error *err) {
  pthread_mutex_lock(&s->lock);
  const phx_status status = s->status;
  if (status != PHX_OK && err) *err = s->failure;
  if (clear) s->status = PHX_OK;
  pthread_mutex_unlock(&s->lock);
  return status;
}

static phx_status failure_of(phx_stream *s, int32_t clear, phx_error *err) {
  phx_status status = kept_failure(s, clear, err);
  for (int32_t i = 0; i < s->n_upstream && status == PHX_OK; i++) status = kept_failure(s->upstream[i], 0, err);
  return status;
}

static phx_status stream_synchronize(void *ctx, phx_stream *stream, phx_error *err) {
  phx__cuda *cuda = ctx;
  phx_stream *s = object_of(cuda, stream);
  const phx_status status = phx__cuda_check(cuda, cudaStreamSynchronize(s->native), "stream_synchronize", err);
  return status == PHX_OK ? failure_of(s, 1, err) : status;
}

/* ---- events ---- */
static phx_status event_create(void *ctx, phx_event **out, phx_error *err) {
  phx__cuda *cuda = ctx;
  phx_event *e = calloc(1, sizeof *e);
  if (!e) return phx__cuda_fail(cuda, err, PHX_NOMEM, "no memory for an event");
  const phx_status status =
      phx__cuda_check(cuda, cudaEventCreateWithFlags(&e->native, cudaEventDisableTiming), "event_create", err);
  if (status == PHX_OK)
    *out = e;
  else
    free(e);
  return status;
}

static void event_destroy(void *ctx, phx_event *e) {
  (void)ctx;
  if (!e) return;
  (void)cudaEventDestroy(e->native);
  free(e);
}

static phx_status event_record(void *ctx, phx_event *e, phx_stream *stream, phx_error *err) {
  phx__cuda *cuda = ctx;
  phx_stream *s = object_of(cuda, stream);
  const phx_status status = phx__cuda_check(cuda, cudaEventRecord(e->native, s->native), "event_record", err);
  if (status == PHX_OK) e->stream = s;
  return status;
}

static int32_t exists(const phx__cuda *cuda, const phx_stream *s) {
  const phx_stream *at = cuda->streams;
  while (at && at != s) at = at->next;
  return at || s == cuda->first;
}

static phx_status stream_wait(void *ctx, phx_stream *stream, phx_event *e, phx_error *err) {
  phx__cuda *cuda = ctx;
  phx_stream *s = object_of(cuda, stream);
  const phx_status status = phx__cuda_check(cuda, cudaStreamWaitEvent(s->native, e->native, 0), "stream_wait", err);
  if (status != PHX_OK || !e->stream || e->stream == s || !exists(cuda, e->stream)) return status;
  for (int32_t i = 0; i < s->n_upstream; i++)
    if (s->upstream[i] == e->stream) return PHX_OK;
  if (s->n_upstream == s->upstream_room) { /* once for each pair of streams */
    phx_stream **more = realloc(s->upstream, (size_t)(s->upstream_room + 8) * sizeof *more);
    if (!more) return phx__cuda_fail(cuda, err, PHX_NOMEM, "stream_wait: no memory to remember a stream");
    s->upstream = more;
    s->upstream_room += 8;
  }
  s->upstream[s->n_upstream++] = e->stream;
  return PHX_OK;
}

static phx_status event_synchronize(void *ctx, phx_event *e, phx_error *err) {
  phx__cuda *cuda = ctx;
  const phx_status status = phx__cuda_check(cuda, cudaEventSynchronize(e->native), "event_synchronize", err);
  return status == PHX_OK && e->stream && exists(cuda, e->stream) ? failure_of(e->stream, 0, err) : status;
}

static int32_t event_done(void *ctx, phx_event *e) {
  (void)ctx;
  return cudaEventQuery(e->native) != cudaErrorNotReady; /* a failure is found by the wait that follows */
}

static void *native_stream(void *ctx, phx_stream *s) { return phx__cuda_stream(ctx, s); }

/* ---- elementwise ---- */
static phx_status copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  const cudaStream_t stream = phx__cuda_stream(ctx, s);
  if (bytes == 0) return PHX_OK;
  return phx__cuda_check(ctx, cudaMemcpyAsync(dst, src, (size_t)bytes, cudaMemcpyDefault, stream), "copy", err);
}
static phx_status zero(void *ctx, void *dst, int64_t bytes, phx_stream *s, phx_error *err) {
  if (bytes == 0) return PHX_OK;
  return phx__cuda_check(ctx, cudaMemsetAsync(dst, 0, (size_t)bytes, phx__cuda_stream(ctx, s)), "zero", err);
}
static phx_status cast(void *ctx, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype, int64_t numel,
                       phx_stream *s, phx_error *err) {
  for (int i = 0; i < 2; i++) {
    const int32_t dtype = i ? src_dtype : dst_dtype;
    if (dtype != PHX_F32 && dtype != PHX_F16 && dtype != PHX_BF16)
      return phx__cuda_fail(ctx, err, PHX_UNSUPPORTED, "cast from dtype %d to %d: only F32, F16 and BF16", src_dtype,
                            dst_dtype);
  }
  if (dst_dtype == src_dtype) return copy(ctx, dst, src, numel * (int64_t)phx_dtype_bytes(src_dtype), s, err);
  return phx__cuda_check(ctx, phx__cuda_k_cast(dst, dst_dtype, src, src_dtype, numel, phx__cuda_stream(ctx, s)), "cast",
                         err);
}
static phx_status add(void *ctx, float *acc, const float *x, int64_t numel, phx_stream *s, phx_error *err) {
  return phx__cuda_check(ctx, phx__cuda_k_accumulate(acc, x, numel, phx__cuda_stream(ctx, s)), "add", err);
}
static phx_status scale(void *ctx, float *x, float by, int64_t numel, phx_stream *s, phx_error *err) {
  return phx__cuda_check(ctx, phx__cuda_k_scale(x, by, numel, phx__cuda_stream(ctx, s)), "scale", err);
}

/* ---- begin and end ---- */
static phx_status find_wait_value(phx__cuda *cuda, phx_error *err) {
  enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  void *entry = NULL;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuStreamWaitValue32", &entry, cudaEnableDefault, &found);
#endif
  PHX_TRY(phx__cuda_check(cuda, error, "looking for cuStreamWaitValue32", err));
  if (found != cudaDriverEntryPointSuccess || !entry)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "the driver has no cuStreamWaitValue32: update it");
  memcpy(&cuda->wait_value, &entry, sizeof entry);
  return PHX_OK;
}

static phx_status keep_pool(const phx__cuda *cuda, phx_error *err) {
  cudaMemPool_t pool;
  uint64_t all = UINT64_MAX;
  phx_status status = phx__cuda_check(cuda, cudaDeviceGetDefaultMemPool(&pool, cuda->device_index),
                                      "cudaDeviceGetDefaultMemPool", err);
  if (status == PHX_OK)
    status = phx__cuda_check(cuda, cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all),
                             "cudaMemPoolSetAttribute", err);
  return status;
}

phx_status phx__cuda_streams_begin(phx__cuda *cuda, phx_error *err) {
  PHX_TRY(find_wait_value(cuda, err));
  PHX_TRY(keep_pool(cuda, err));
  PHX_TRY(stream_make(cuda, &cuda->first, err));
  cuda->compute = cuda->scratch_stream = cuda->first->native;
  return phx__cuda_check(cuda, cudaEventCreateWithFlags(&cuda->scratch_event, cudaEventDisableTiming), "event_create",
                         err);
}

void phx__cuda_streams_end(phx__cuda *cuda) {
  while (cuda->streams) stream_destroy(cuda, cuda->streams);
  if (cuda->scratch) phx__cuda_free(cuda, PHX_SPACE_DEVICE, cuda->scratch, 0);
  if (cuda->scratch_event) (void)cudaEventDestroy(cuda->scratch_event);
  if (cuda->first) stream_unmake(cuda->first);
  cuda->first = NULL;
}

void phx__cuda_device_init(phx__cuda *cuda) {
  cuda->device = (phx_device){.struct_size = sizeof(phx_device),
                              .ctx = cuda,
                              .name = cuda->name,
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
                              .scale = scale,
                              .space = phx__cuda_space,
                              .pin = phx__cuda_pin,
                              .unpin = phx__cuda_unpin};
}
