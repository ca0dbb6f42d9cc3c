/* loopback.c - the communicator of loopback.h.  Threads: a rank's main thread, and its streams'.  Invariant: a group is
 * entered by one thread per rank at a time, since one communicator is one order. */
#include "loopback.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "base/status.h"
#include "toy.h"

enum { RANKS = 64 };

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

int64_t loopback_payload(const void *ctx, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                         int32_t root) {
  (void)ctx;
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
  if (aborted(g->world)) return phx_fail(err, PHX_COMM, "the job was ended");
  if (++*naps > 3000)
    return phx_fail(err, PHX_COMM, "rank %d waits in %s of %lld elements", c->comm->base.rank, phx_op_name(c->op),
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
    return phx_fail(err, PHX_COMM,
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
      status = phx_fail(err, PHX_COMM, "recv of %lld elements meets a send of %lld", (long long)c->numel,
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
    return phx_fail(err, PHX_COMM, "the job was ended");
  if (c->op == PHX_OP_SEND || c->op == PHX_OP_RECV) {
    PHX_TRY_GOTO(exchange(g, c, err), status, done);
  } else {
    if (c->seq != m->executed++) {
      status = phx_fail(err, PHX_COMM, "%s %llu runs before those issued earlier", phx_op_name(c->op),
                        (unsigned long long)c->seq);
      goto done;
    }
    if (aborted(g->world)) return phx_fail(err, PHX_COMM, "the job was ended"); /* others may still read the slots */
    g->slots[m->base.rank] = *c;
    PHX_TRY_GOTO(meet(g, c, err), status, done);
    PHX_TRY_GOTO(check_slots(g, c, err), status, done);
    move(g, c);
    PHX_TRY_GOTO(meet(g, c, err), status, done);
  }
  pthread_mutex_lock(&m->lock);
  m->stats.calls[c->op]++;
  m->stats.bytes[c->op] += loopback_payload(NULL, c->op, c->numel, c->dtype, m->base.rank, g->size, c->root);
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
    return phx_fail(err, PHX_INVALID, "%s: numel %lld, dtype %d, root %d", phx_op_name(op), (long long)numel, dtype,
                    root);
  call c = {m, mail_op ? 0 : m->issued++, op, dtype, red, root, numel, src, dst};
  if (m->watch)
    m->watch->issued(m->watch->ctx, op, numel, loopback_payload(NULL, op, numel, dtype, m->base.rank, m->g->size, root),
                     s != NULL, src, dst);
  return loopback_submit(m->device, s, call_fn, &c, sizeof c, err);
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
  call c = {.comm = m, .op = PHX_OP_SPLIT, .seq = m->issued++, .dtype = color, .red = key};
  m->executed++;
  g->slots[me] = c;
  PHX_TRY(meet(g, &c, err));
  for (int32_t r = 0; r < g->size; r++) {
    if (g->slots[r].dtype != color) continue;
    if (leader < 0) leader = r;
    size++;
    rank += g->slots[r].red < key || (g->slots[r].red == key && r < me);
  }
  if (color >= 0 && leader == me) g->made[me] = group_make(g->world, size);
  PHX_TRY(meet(g, &c, err));
  *out = color < 0 ? NULL : comm_make(g->made[leader], rank, m->device, m->watch);
  PHX_TRY(meet(g, &c, err));
  return PHX_OK;
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
  m->stats.struct_size = sizeof m->stats;
  phx_struct_give(out, &m->stats);
  pthread_mutex_unlock(&m->lock);
}
static phx_status c_health(void *ctx, phx_error *err) {
  comm *m = ctx;
  return aborted(m->g->world) ? phx_fail(err, PHX_COMM, "%s", m->g->world->why) : PHX_OK;
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
