/* loopback.c - see loopback.h.  Threads: a rank's main thread, and one thread per stream in THREADS mode.  Invariant: a
 * group is entered by one thread per rank at a time, since one communicator is one order. */
#include "loopback.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "status.h"
#include "toy.h"

enum { RANKS = 64, PAYLOAD = 256 };

/* ==== device =======================================================================================================
 */
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
  return phx__fail(err, PHX_INVALID, "loopback: enqueue with no argument");
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
  return phx__fail(err, PHX_UNSUPPORTED, "loopback: cast between dtypes %d and %d", src_dtype, dst_dtype);
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

/* ==== communicator =================================================================================================
 */
typedef struct call { /* what a rank shows the others; plain data */
  struct comm *comm;
  uint64_t seq;
  int32_t op, dtype, red, root;
  int64_t numel;
  const void *src;
  void *dst;
} call;
typedef struct mail { /* rendezvous of send and recv; src NULL: empty */
  const void *src;
  int64_t numel;
  int32_t dtype;
} mail;
typedef struct group {
  int32_t size, members;
  loopback_world *world;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int32_t arrived;
  uint64_t generation;
  call slots[RANKS];
  mail mails[RANKS][RANKS];  /* from, to */
  struct group *made[RANKS]; /* split: by leader */
} group;
struct loopback_world {
  pthread_mutex_t lock;
  bool aborted;
  char why[500];
  group *root;
};
typedef struct comm {
  phx_comm base;
  group *g;
  phx_device *device;
  const loopback_watch *watch;
  uint64_t issued, executed;
  int32_t unit;
  pthread_mutex_t lock; /* of stats: a stream's thread writes, main reads */
  phx_comm_stats stats;
} comm;

int64_t loopback_payload(int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size, int32_t root) {
  int64_t es = (int64_t)phx_dtype_bytes(dtype), others = size - 1,
          part = numel * (rank + 1) / size - numel * rank / size;
  switch (op) {
    case PHX_OP_ALL_REDUCE:
      return 2 * others * part * es;
    case PHX_OP_REDUCE:
      return rank == root ? others * numel * es : 0;
    case PHX_OP_REDUCE_SCATTER:
    case PHX_OP_ALL_GATHER:
    case PHX_OP_ALL_TO_ALL:
      return others * numel * es;
    case PHX_OP_BROADCAST:
      return rank == root ? 0 : numel * es;
    case PHX_OP_SEND:
      return numel * es;
    default:
      return 0;
  }
}

static bool aborted(loopback_world *w) {
  pthread_mutex_lock(&w->lock);
  bool yes = w->aborted;
  pthread_mutex_unlock(&w->lock);
  return yes;
}

void loopback_abort(loopback_world *w, const char *why) {
  pthread_mutex_lock(&w->lock);
  if (!w->aborted) snprintf(w->why, sizeof w->why, "%.490s", why);
  w->aborted = true;
  pthread_mutex_unlock(&w->lock);
}

/* One bounded sleep on the group; the lock is held. */
static phx_status nap(group *g, int *naps, phx_error *err, const call *c) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_nsec += 20000000;
  if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
  pthread_cond_timedwait(&g->changed, &g->lock, &t);
  if (aborted(g->world)) return phx__fail(err, PHX_COMM, "the job was ended");
  if (++*naps > 3000)
    return phx__fail(err, PHX_COMM, "rank %d waits in %s of %lld elements", c->comm->base.rank, phx_op_name(c->op),
                     (long long)c->numel);
  return PHX_OK;
}

static phx_status meet(group *g, const call *c, phx_error *err) {
  phx_status status = PHX_OK;
  int naps = 0;
  pthread_mutex_lock(&g->lock);
  uint64_t mine = g->generation;
  if (++g->arrived == g->size) {
    g->arrived = 0;
    g->generation++;
    pthread_cond_broadcast(&g->changed);
  }
  while (g->generation == mine && status == PHX_OK) status = nap(g, &naps, err, c);
  if (g->generation != mine) status = PHX_OK; /* all came, whatever happened since */
  pthread_mutex_unlock(&g->lock);
  return status;
}

static phx_status check_slots(group *g, const call *c, phx_error *err) {
  for (int32_t r = 0; r < g->size; r++) {
    const call *o = &g->slots[r];
    if (o->op == c->op && o->numel == c->numel && o->dtype == c->dtype && o->red == c->red && o->root == c->root &&
        o->seq == c->seq)
      continue;
    return phx__fail(err, PHX_COMM,
                     "call %llu differs: rank %d issues %s of %lld (dtype %d, root %d), rank %d %s of %lld (dtype %d, "
                     "root %d)",
                     (unsigned long long)c->seq, c->comm->base.rank, phx_op_name(c->op), (long long)c->numel, c->dtype,
                     c->root, r, phx_op_name(o->op), (long long)o->numel, o->dtype, o->root);
  }
  return PHX_OK;
}

/* out = reduction over ranks of elements [at, at + n) of their src */
static void reduce_part(group *g, const call *c, void *out, int64_t at, int64_t n) {
  if (c->dtype == PHX_F32 && c->red == PHX_SUM) {
    const float *src[RANKS];
    for (int32_t r = 0; r < g->size; r++) src[r] = (const float *)g->slots[r].src + at;
    toy_tree_f32(out, src, 0, g->size, n);
    return;
  }
  if (c->dtype == PHX_BF16 && c->red == PHX_SUM) {
    for (int64_t e = 0; e < n; e++) {
      float x[RANKS], sum;
      const float *src[RANKS];
      for (int32_t r = 0; r < g->size; r++) {
        x[r] = toy_from_bf16(((const uint16_t *)g->slots[r].src)[at + e]);
        src[r] = &x[r];
      }
      toy_tree_f32(&sum, src, 0, g->size, 1);
      ((uint16_t *)out)[e] = toy_bf16(sum);
    }
    return;
  }
  for (int64_t e = 0; e < n; e++) { /* doubles and integers: sums of whole numbers, and MIN/MAX, need no order here */
    for (int32_t r = 0; r < g->size; r++) {
      const unsigned char *p = (const unsigned char *)g->slots[r].src + (size_t)(at + e) * phx_dtype_bytes(c->dtype);
#define FOLD(T)                                                                                         \
  do {                                                                                                  \
    T x, *o = (T *)out + e;                                                                             \
    memcpy(&x, p, sizeof x);                                                                            \
    *o = r == 0 ? x : c->red == PHX_SUM ? (T)(*o + x) : (c->red == PHX_MIN ? x < *o : x > *o) ? x : *o; \
  } while (0)
      switch (c->dtype) {
        case PHX_F32:
          FOLD(float);
          break;
        case PHX_F64:
          FOLD(double);
          break;
        case PHX_I32:
          FOLD(int32_t);
          break;
        case PHX_U32:
          FOLD(uint32_t);
          break;
        case PHX_I64:
          FOLD(int64_t);
          break;
        case PHX_U64:
          FOLD(uint64_t);
          break;
        case PHX_U8:
          FOLD(uint8_t);
          break;
        default:
          abort();
      }
    }
  }
}

static void move(group *g, const call *c) {
  int32_t rank = c->comm->base.rank, size = g->size;
  size_t es = phx_dtype_bytes(c->dtype), bytes = (size_t)c->numel * es;
  int64_t from = c->numel * rank / size, to = c->numel * (rank + 1) / size;
  void *temp = NULL;
  if (c->numel == 0) return;
  switch (c->op) {
    case PHX_OP_ALL_REDUCE: /* this rank's part, stored everywhere: nobody else reads or writes that part */
      temp = malloc((size_t)(to - from) * es + 1);
      reduce_part(g, c, temp, from, to - from);
      for (int32_t r = 0; r < size; r++)
        memcpy((char *)g->slots[r].dst + (size_t)from * es, temp, (size_t)(to - from) * es);
      break;
    case PHX_OP_REDUCE:
      if (rank != c->root) break;
      temp = malloc(bytes);
      reduce_part(g, c, temp, 0, c->numel);
      memcpy(c->dst, temp, bytes);
      break;
    case PHX_OP_REDUCE_SCATTER:
      temp = malloc(bytes);
      reduce_part(g, c, temp, rank * c->numel, c->numel);
      memcpy(c->dst, temp, bytes);
      break;
    case PHX_OP_ALL_GATHER:
      for (int32_t r = 0; r < size; r++)
        if ((char *)c->dst + (size_t)r * bytes != g->slots[r].src)
          memcpy((char *)c->dst + (size_t)r * bytes, g->slots[r].src, bytes);
      break;
    case PHX_OP_BROADCAST:
      if (rank != c->root) memcpy(c->dst, g->slots[c->root].dst, bytes);
      break;
    case PHX_OP_ALL_TO_ALL:
      for (int32_t r = 0; r < size; r++)
        memcpy((char *)c->dst + (size_t)r * bytes, (const char *)g->slots[r].src + (size_t)rank * bytes, bytes);
      break;
    default:
      break;
  }
  free(temp);
}

static phx_status exchange(group *g, const call *c, phx_error *err) { /* send and recv: the sender waits */
  int32_t rank = c->comm->base.rank;
  mail *m = c->op == PHX_OP_SEND ? &g->mails[rank][c->root] : &g->mails[c->root][rank];
  phx_status status = PHX_OK;
  int naps = 0;
  pthread_mutex_lock(&g->lock);
  if (c->op == PHX_OP_SEND) {
    *m = (mail){c->src, c->numel, c->dtype};
    pthread_cond_broadcast(&g->changed);
    while (m->src && status == PHX_OK) status = nap(g, &naps, err, c);
  } else {
    while (!m->src && status == PHX_OK) status = nap(g, &naps, err, c);
    if (status == PHX_OK && (m->numel != c->numel || m->dtype != c->dtype))
      status = phx__fail(err, PHX_COMM, "recv of %lld elements meets a send of %lld", (long long)c->numel,
                         (long long)m->numel);
    if (status == PHX_OK) {
      memcpy(c->dst, m->src, (size_t)c->numel * phx_dtype_bytes(c->dtype));
      m->src = NULL;
      pthread_cond_broadcast(&g->changed);
    }
  }
  pthread_mutex_unlock(&g->lock);
  return status;
}

static phx_status call_fn(void *arg, phx_error *err) {
  const call *c = arg;
  comm *m = c->comm;
  group *g = m->g;
  phx_status status = PHX_OK;
  if (aborted(g->world)) /* others may still look at what this rank showed them last */
    return phx__fail(err, PHX_COMM, "the job was ended");
  if (c->op == PHX_OP_SEND || c->op == PHX_OP_RECV) {
    PHX__TRY(exchange(g, c, err));
  } else {
    if (c->seq != m->executed++) {
      status = phx__fail(err, PHX_COMM, "%s %llu runs before those issued earlier", phx_op_name(c->op),
                         (unsigned long long)c->seq);
      goto done;
    }
    if (aborted(g->world)) return phx__fail(err, PHX_COMM, "the job was ended"); /* others may still read the slots */
    g->slots[m->base.rank] = *c;
    PHX__TRY(meet(g, c, err));
    PHX__TRY(check_slots(g, c, err));
    move(g, c);
    PHX__TRY(meet(g, c, err));
  }
  pthread_mutex_lock(&m->lock);
  m->stats.calls[c->op]++;
  m->stats.bytes[c->op] += loopback_payload(c->op, c->numel, c->dtype, m->base.rank, g->size, c->root);
  pthread_mutex_unlock(&m->lock);
done:
  if (status != PHX_OK) loopback_abort(g->world, err ? err->message : "a collective failed");
  return status;
}

static phx_status issue(void *ctx, int32_t op, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t red,
                        int32_t root, phx_stream *s, phx_error *err) {
  comm *m = ctx;
  bool mail_op = op == PHX_OP_SEND || op == PHX_OP_RECV;
  if (numel < 0 || (op != PHX_OP_BARRIER && !phx_dtype_bytes(dtype)) || root < 0 || root >= m->g->size)
    return phx__fail(err, PHX_INVALID, "%s: numel %lld, dtype %d, root %d", phx_op_name(op), (long long)numel, dtype,
                     root);
  call c = {m, mail_op ? 0 : m->issued++, op, dtype, red, root, numel, src, dst};
  if (m->watch)
    m->watch->issued(m->watch->ctx, op, numel, loopback_payload(op, numel, dtype, m->base.rank, m->g->size, root),
                     s != NULL, src, dst);
  return submit(s, call_fn, NULL, &c, sizeof c, err);
}

static phx_status c_all_reduce(void *ctx, const void *src, void *dst, int64_t n, int32_t dtype, int32_t op,
                               phx_stream *s, phx_error *err) {
  return issue(ctx, PHX_OP_ALL_REDUCE, src, dst, n, dtype, op, 0, s, err);
}
static phx_status c_reduce(void *ctx, const void *src, void *dst, int64_t n, int32_t dtype, int32_t op, int32_t root,
                           phx_stream *s, phx_error *err) {
  return issue(ctx, PHX_OP_REDUCE, src, dst, n, dtype, op, root, s, err);
}
static phx_status c_reduce_scatter(void *ctx, const void *src, void *dst, int64_t n, int32_t dtype, int32_t op,
                                   phx_stream *s, phx_error *err) {
  return issue(ctx, PHX_OP_REDUCE_SCATTER, src, dst, n, dtype, op, 0, s, err);
}
static phx_status c_all_gather(void *ctx, const void *src, void *dst, int64_t n, int32_t dtype, phx_stream *s,
                               phx_error *err) {
  return issue(ctx, PHX_OP_ALL_GATHER, src, dst, n, dtype, 0, 0, s, err);
}
static phx_status c_broadcast(void *ctx, void *buf, int64_t n, int32_t dtype, int32_t root, phx_stream *s,
                              phx_error *err) {
  return issue(ctx, PHX_OP_BROADCAST, buf, buf, n, dtype, 0, root, s, err);
}
static phx_status c_send(void *ctx, const void *buf, int64_t n, int32_t dtype, int32_t peer, phx_stream *s,
                         phx_error *err) {
  return issue(ctx, PHX_OP_SEND, buf, NULL, n, dtype, 0, peer, s, err);
}
static phx_status c_recv(void *ctx, void *buf, int64_t n, int32_t dtype, int32_t peer, phx_stream *s, phx_error *err) {
  return issue(ctx, PHX_OP_RECV, NULL, buf, n, dtype, 0, peer, s, err);
}
static phx_status c_all_to_all(void *ctx, const void *src, void *dst, int64_t n, int32_t dtype, phx_stream *s,
                               phx_error *err) {
  return issue(ctx, PHX_OP_ALL_TO_ALL, src, dst, n, dtype, 0, 0, s, err);
}
static phx_status c_barrier(void *ctx, phx_stream *s, phx_error *err) {
  return issue(ctx, PHX_OP_BARRIER, NULL, NULL, 0, 0, 0, 0, s, err);
}

static phx_comm *comm_make(group *g, int32_t rank, phx_device *d, const loopback_watch *watch);
static group *group_make(loopback_world *w, int32_t size) {
  group *g = calloc(1, sizeof *g);
  if (!g) abort();
  g->size = g->members = size;
  g->world = w;
  pthread_mutex_init(&g->lock, NULL);
  pthread_cond_init(&g->changed, NULL);
  return g;
}

static void group_leave(group *g) {
  pthread_mutex_lock(&g->lock);
  bool last = --g->members == 0;
  pthread_mutex_unlock(&g->lock);
  if (!last) return;
  pthread_cond_destroy(&g->changed);
  pthread_mutex_destroy(&g->lock);
  free(g);
}

static phx_status c_split(void *ctx, int32_t color, int32_t key, phx_comm **out, phx_error *err) {
  comm *m = ctx;
  group *g = m->g;
  int32_t me = m->base.rank, size = 0, rank = 0, leader = -1;
  phx_status status = PHX_OK;
  call c = {.comm = m, .op = PHX_OP_SPLIT, .seq = m->issued++, .dtype = color, .red = key};
  m->executed++;
  g->slots[me] = c;
  PHX__TRY(meet(g, &c, err));
  for (int32_t r = 0; r < g->size; r++) {
    if (g->slots[r].dtype != color) continue;
    if (leader < 0) leader = r;
    size++;
    rank += g->slots[r].red < key || (g->slots[r].red == key && r < me);
  }
  if (color >= 0 && leader == me) g->made[me] = group_make(g->world, size);
  PHX__TRY(meet(g, &c, err));
  *out = color < 0 ? NULL : comm_make(g->made[leader], rank, m->device, m->watch);
  PHX__TRY(meet(g, &c, err));
done:
  return status;
}

static void c_destroy(phx_comm *base) {
  if (!base) return;
  comm *m = (comm *)base;
  group_leave(m->g);
  pthread_mutex_destroy(&m->lock);
  free(m);
}
static void c_annotate(void *ctx, int32_t unit) {
  ((comm *)ctx)->unit = unit;
}
static void c_stats(void *ctx, phx_comm_stats *out) {
  comm *m = ctx;
  pthread_mutex_lock(&m->lock);
  *out = m->stats;
  pthread_mutex_unlock(&m->lock);
  out->struct_size = sizeof *out;
}
static phx_status c_health(void *ctx, phx_error *err) {
  comm *m = ctx;
  return aborted(m->g->world) ? phx__fail(err, PHX_COMM, "%s", m->g->world->why) : PHX_OK;
}
static void c_abort(void *ctx) {
  loopback_abort(((comm *)ctx)->g->world, "abort");
}

static phx_comm *comm_make(group *g, int32_t rank, phx_device *d, const loopback_watch *watch) {
  comm *m = calloc(1, sizeof *m);
  if (!m) abort();
  m->g = g, m->device = d, m->watch = watch;
  pthread_mutex_init(&m->lock, NULL);
  m->base = (phx_comm){.struct_size = sizeof(phx_comm),
                       .ctx = m,
                       .rank = rank,
                       .size = g->size,
                       .all_reduce = c_all_reduce,
                       .reduce = c_reduce,
                       .reduce_scatter = c_reduce_scatter,
                       .all_gather = c_all_gather,
                       .broadcast = c_broadcast,
                       .send = c_send,
                       .recv = c_recv,
                       .all_to_all = c_all_to_all,
                       .barrier = c_barrier,
                       .split = c_split,
                       .destroy = c_destroy,
                       .annotate = c_annotate,
                       .stats = c_stats,
                       .health = c_health,
                       .abort = c_abort};
  return &m->base;
}

loopback_world *loopback_world_create(int32_t size) {
  loopback_world *w = calloc(1, sizeof *w);
  if (!w) abort();
  pthread_mutex_init(&w->lock, NULL);
  w->root = group_make(w, size);
  w->root->members++; /* the world's own */
  return w;
}
phx_comm *loopback_comm(loopback_world *w, int32_t rank, phx_device *d, const loopback_watch *watch) {
  return comm_make(w->root, rank, d, watch);
}
const char *loopback_why(loopback_world *w) {
  return w->why;
}
void loopback_world_destroy(loopback_world *w) {
  group_leave(w->root);
  pthread_mutex_destroy(&w->lock);
  free(w);
}
