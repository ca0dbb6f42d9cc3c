/* The suite of every communicator, on forked ranks or threads: each collective against a plain reference, bit for
 * bit; order, split, faults, traffic.  Each rank generates every rank's data itself, so the reference needs no
 * communication. */
#include "comm_suite.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "comm_reference.h"

#define GUARD 64
#define BAD COMM_SUITE_BAD

comm_suite_setup comm_suite;

/* ---- one rank's bench of tools ---- */

int comm_suite_rig_open(rig *g, fake_rank *rank, int64_t arena) {
  memset(g, 0, sizeof *g);
  g->rank = rank;
  g->err.struct_size = sizeof g->err;
  if (comm_suite.enter) comm_suite.enter(rank);
  phx_status status = comm_suite.table->create(&rank->host, comm_suite.config, arena, &g->comm, &g->err);
  if (status != PHX_OK) BAD(g, "create: %s", g->err.message);
  if (status == PHX_OK) g->arena = comm_suite.table->arena(g->comm);
  if (status != PHX_OK || !comm_suite.far_arena) return status == PHX_OK;
  g->far = g->arena;
  g->arena = calloc(1, COMM_SUITE_ARENA);
  if (!g->arena) abort();
  return 1;
}

/* Where the communicator finds a buffer. */
static char *there(const rig *g, char *p) {
  return g->far && p >= g->arena && p < g->arena + COMM_SUITE_ARENA ? g->far + (p - g->arena) : p;
}
/* All that is used of the arena, to the device or from it. */
static phx_status carry(rig *g, int to_device) {
  const phx_device *d = g->rank->device;
  if (!g->far || g->used == 0) return PHX_OK;
  const phx_status status = d->copy(d->ctx, to_device ? g->far : g->arena, to_device ? g->arena : g->far, g->used, NULL,
                                    &g->err);
  return status == PHX_OK ? d->stream_synchronize(d->ctx, NULL, &g->err) : status;
}

/* A buffer with guards, in the arena or not, moved `shift` bytes from a 64-byte boundary. */
char *comm_suite_buffer(rig *g, int in_arena, int64_t bytes, int64_t shift) {
  int64_t size = (bytes + shift + 2 * GUARD + 255) / 64 * 64;
  char *p;
  if (in_arena) {
    p = g->arena + g->used;
    g->used += size;
    if (g->used > COMM_SUITE_ARENA) BAD(g, "the test's arena is too small");
  } else {
    p = g->heap[g->n_heap++] = aligned_alloc(64, (size_t)size);
  }
  memset(p, 0xA5, (size_t)size);
  return p + GUARD + shift;
}
static void check_guard(rig *g, const char *p, int64_t bytes) {
  for (int i = 1; i <= GUARD; i++) {
    if ((unsigned char)p[-i] != 0xA5 || (unsigned char)p[bytes + i - 1] != 0xA5) BAD(g, "a guard was overwritten");
  }
}
void comm_suite_buffers_free(rig *g) {
  for (int i = 0; i < g->n_heap; i++) free(g->heap[i]);
  g->n_heap = 0;
  g->used = 0;
}
void comm_suite_rig_close(rig *g) {
  comm_suite_buffers_free(g);
  if (g->far) free(g->arena);
  comm_suite.table->destroy(g->comm);
  if (comm_suite.leave) comm_suite.leave(g->rank);
}
void comm_suite_fill(char *p, int32_t dtype, uint64_t seed, int32_t r, int64_t first, int64_t numel) {
  size_t e = phx_dtype_bytes(dtype);
  for (int64_t i = 0; i < numel; i++) {
    char one[8];
    comm_reference_element(dtype, seed, r, first + i, one);
    memcpy(p + (size_t)i * e, one, e); /* here, where sanitizers see it */
  }
}
/* Large buffers: all of the ends, and a sample between. */
static int64_t next(int64_t i, int64_t numel) { return i < 300 || i > numel - 300 ? i + 1 : i + 61; }

static const char *shape_text(const shape *s) {
  static _Thread_local char text[160];
  snprintf(text, sizeof text, "%s dtype %d op %d numel %lld arena %d in place %d shift %lld", phx_op_name(s->op),
           s->dtype, s->reduce, (long long)s->numel, s->in_arena, s->in_place, (long long)s->shift);
  return text;
}

/* What any order of additions may give, bf16 rounded at every step. */
static int is_close(const shape *s, int32_t n, uint64_t seed, int64_t i, const char *got) {
  double sum = 0, largest = 0;
  for (int32_t r = 0; r < n; r++) {
    const comm_value v = comm_reference_tree(s->dtype, PHX_SUM, seed, r, 1, i);
    const double x = s->dtype == PHX_F64 ? v.d : (double)v.f;
    sum += x;
    largest += fabs(x);
  }
  char e[8] = {0};
  memcpy(e, got, phx_dtype_bytes(s->dtype));
  const comm_value v = comm_reference_widen(s->dtype, e);
  const double bound = n * largest * (s->dtype == PHX_F64 ? 0x1p-52 : s->dtype == PHX_F32 ? 0x1p-23 : 0x1p-8);
  return fabs((s->dtype == PHX_F64 ? v.d : (double)v.f) - sum) <= bound;
}
static int in_any_order(const shape *s) {
  const int is_float = s->dtype == PHX_F32 || s->dtype == PHX_F64 || s->dtype == PHX_BF16;
  return comm_suite.any_order && is_float && s->reduce == PHX_SUM;
}

void comm_suite_expect_reduced(rig *g, const shape *s, const char *got, int64_t first, int64_t numel, uint64_t seed) {
  size_t e = phx_dtype_bytes(s->dtype);
  for (int64_t i = 0; i < numel && !g->bad; i = next(i, numel)) {
    char want[8];
    if (in_any_order(s)) {
      if (!is_close(s, g->comm->size, seed, first + i, got + (size_t)i * e))
        BAD(g, "%s: element %lld", shape_text(s), (long long)i);
      continue;
    }
    comm_reference_narrow(s->dtype, comm_reference_tree(s->dtype, s->reduce, seed, 0, g->comm->size, first + i), want);
    if (memcmp(want, got + (size_t)i * e, e) != 0) BAD(g, "%s: element %lld", shape_text(s), (long long)i);
  }
}
void comm_suite_expect_from(rig *g, const shape *s, const char *got, int32_t r, int64_t first, int64_t numel,
                            uint64_t seed) {
  size_t e = phx_dtype_bytes(s->dtype);
  for (int64_t i = 0; i < numel && !g->bad; i = next(i, numel)) {
    char want[8];
    comm_reference_element(s->dtype, seed, r, first + i, want);
    if (memcmp(want, got + (size_t)i * e, e) != 0)
      BAD(g, "%s: element %lld of rank %d", shape_text(s), (long long)i, r);
  }
}

static phx_status call(rig *g, const shape *s, char *here_src, char *here_dst, int32_t root, phx_stream *stream) {
  phx_comm *c = g->comm;
  char *src = there(g, here_src), *dst = there(g, here_dst);
  switch (s->op) {
    case PHX_OP_ALL_REDUCE: return c->all_reduce(c->ctx, src, dst, s->numel, s->dtype, s->reduce, stream, &g->err);
    case PHX_OP_REDUCE:
      return c->reduce(c->ctx, src, c->rank == root ? dst : NULL, s->numel, s->dtype, s->reduce, root, stream, &g->err);
    case PHX_OP_REDUCE_SCATTER:
      return c->reduce_scatter(c->ctx, src, dst, s->numel, s->dtype, s->reduce, stream, &g->err);
    case PHX_OP_ALL_GATHER: return c->all_gather(c->ctx, src, dst, s->numel, s->dtype, stream, &g->err);
    case PHX_OP_BROADCAST: return c->broadcast(c->ctx, src, s->numel, s->dtype, root, stream, &g->err);
    case PHX_OP_ALL_TO_ALL: return c->all_to_all(c->ctx, src, dst, s->numel, s->dtype, stream, &g->err);
    default: return PHX_INTERNAL;
  }
}

/* Collectives on the device's memory are asynchronous, also on the compute stream. */
static phx_status finish(rig *g) {
  const phx_device *d = g->rank->device;
  const phx_status status = d->stream_synchronize(d->ctx, NULL, &g->err);
  return status == PHX_OK ? carry(g, 0) : status;
}

/* Runs one call and checks result, untouched source, guards, stats. */
void comm_suite_try_shape(rig *g, const shape *s, uint64_t seed) {
  int32_t n = g->comm->size, me = g->comm->rank, root = (int32_t)(seed % (uint64_t)n), op = s->op;
  int64_t e = (int64_t)phx_dtype_bytes(s->dtype), own = s->numel * e;
  int64_t in = own * (op == PHX_OP_REDUCE_SCATTER || op == PHX_OP_ALL_TO_ALL ? n : 1);
  int64_t out = own * (op == PHX_OP_ALL_GATHER || op == PHX_OP_ALL_TO_ALL ? n : 1);
  phx_comm_stats before = {.struct_size = sizeof before}, after = {.struct_size = sizeof after};
  char *src, *dst;
  if (s->in_place || op == PHX_OP_BROADCAST) {
    char *p = comm_suite_buffer(g, s->in_arena, in > out ? in : out, s->shift);
    src = op == PHX_OP_ALL_GATHER ? p + me * own : p;
    dst = op == PHX_OP_REDUCE_SCATTER ? p + me * own : p;
  } else {
    src = comm_suite_buffer(g, s->in_arena, in, s->shift);
    dst = comm_suite_buffer(g, s->in_arena, out, s->shift);
  }
  comm_suite_fill(src, s->dtype, seed, me, 0, in / e);
  g->comm->stats(g->comm->ctx, &before);
  phx_status status = carry(g, 1);
  if (status == PHX_OK) status = call(g, s, src, dst, root, NULL);
  if (status == PHX_OK) status = finish(g);
  g->comm->stats(g->comm->ctx, &after);
  if (status != PHX_OK) BAD(g, "%s: %s", shape_text(s), g->err.message);
  if (g->bad) return;
  if (op == PHX_OP_ALL_REDUCE || (op == PHX_OP_REDUCE && me == root))
    comm_suite_expect_reduced(g, s, dst, 0, s->numel, seed);
  if (op == PHX_OP_REDUCE_SCATTER) comm_suite_expect_reduced(g, s, dst, me * s->numel, s->numel, seed);
  if (op == PHX_OP_BROADCAST) comm_suite_expect_from(g, s, src, root, 0, s->numel, seed);
  for (int32_t r = 0; r < n; r++) {
    if (op == PHX_OP_ALL_GATHER) comm_suite_expect_from(g, s, dst + r * own, r, 0, s->numel, seed);
    if (op == PHX_OP_ALL_TO_ALL) comm_suite_expect_from(g, s, dst + r * own, r, me * s->numel, s->numel, seed);
  }
  if (!s->in_place && op != PHX_OP_BROADCAST) {
    comm_suite_expect_from(g, s, src, me, 0, in / e, seed);
    check_guard(g, src, in);
    check_guard(g, dst, out);
  }
  int64_t want = comm_suite.table->payload(NULL, op, s->numel, s->dtype, me, n, root),
          got = after.bytes[op] - before.bytes[op];
  if (got != want) BAD(g, "%s: payload %lld, moved %lld", shape_text(s), (long long)want, (long long)got);
  if (after.calls[op] != before.calls[op] + 1) BAD(g, "%s: calls", shape_text(s));
  comm_suite_buffers_free(g);
}

static const int32_t all_dtypes[] = {PHX_F32, PHX_F64, PHX_BF16, PHX_I32, PHX_I64, PHX_U8, PHX_U16, PHX_U32, PHX_U64};
static int in_place_legal(int32_t op) { return op != PHX_OP_ALL_TO_ALL; }

/* Every op and dtype at small and middle sizes; a few at 1 MiB + 5 elements. */
void comm_suite_battery(fake_rank *rank) {
  rig g;
  uint64_t seed = 1;
  if (!comm_suite_rig_open(&g, rank, COMM_SUITE_ARENA)) return;
  static const int64_t counts[] = {0, 1, 3, 1023, 40001};
  for (int32_t op = PHX_OP_ALL_REDUCE; op <= PHX_OP_ALL_TO_ALL; op++) {
    if (op == PHX_OP_SEND || op == PHX_OP_RECV) continue;
    int reduces = op <= PHX_OP_REDUCE_SCATTER;
    for (size_t d = 0; d < sizeof all_dtypes / sizeof *all_dtypes; d++) {
      for (int32_t reduce = 0; reduce <= (reduces ? PHX_MAX : 0); reduce++) {
        for (size_t k = 0; k < 5; k++) {
          int64_t numel = k == 4 ? counts[k] / g.comm->size + 7 : counts[k];
          int variant = (int)((seed + (uint64_t)reduce) % 8);
          shape s = {op, all_dtypes[d], reduce, numel, variant & 1, in_place_legal(op) && (variant & 2),
                     variant & 4 ? (int64_t)phx_dtype_bytes(all_dtypes[d]) * 3 : 0};
          comm_suite_try_shape(&g, &s, ++seed);
          if (g.bad) return;
        }
      }
    }
    static const int32_t big[] = {PHX_F32, PHX_BF16, PHX_U8};
    for (size_t d = 0; d < 3; d++) {
      for (int variant = 0; variant < 4; variant++) {
        int64_t numel = ((1 << 20) + 5) / (op == PHX_OP_ALL_REDUCE || op == PHX_OP_BROADCAST ? 1 : g.comm->size) + 1;
        if (g.comm->size > 5) numel /= 8;
        shape s = {op, big[d], PHX_SUM, numel, variant & 1, in_place_legal(op) && (variant & 2), variant == 3 ? 1 : 0};
        comm_suite_try_shape(&g, &s, ++seed);
        if (g.bad) return;
      }
    }
  }
  comm_suite_rig_close(&g);
}

/* ---- send and recv ---- */

void comm_suite_pairs(fake_rank *rank) {
  rig g;
  if (!comm_suite_rig_open(&g, rank, COMM_SUITE_ARENA)) return;
  phx_comm *c = g.comm;
  static const int64_t counts[] = {0, 1, 1023, 300007};
  uint64_t seed = 5;
  for (int round = 0; round < 3; round++) {
    for (int k = 0; k < 4; k++) {
      for (int arena = 0; arena < 2; arena++, seed++) {
        int32_t to = (c->rank + 1) % c->size, from = (c->rank + c->size - 1) % c->size;
        int64_t bytes = counts[k] * 4;
        shape s = {PHX_OP_SEND, PHX_F32, 0, counts[k], arena, 0, 0};
        char *out = comm_suite_buffer(&g, arena, bytes, 4), *in = comm_suite_buffer(&g, 0, bytes, 1);
        comm_suite_fill(out, PHX_F32, seed, c->rank, 0, counts[k]);
        if (carry(&g, 1) != PHX_OK) BAD(&g, "%s", g.err.message);
        for (int turn = 0; turn < 2; turn++) { /* a ring: rank 0 receives last */
          phx_status status = (turn == 0) == (c->rank != 0)
                                  ? c->recv(c->ctx, in, counts[k], PHX_F32, from, NULL, &g.err)
                                  : c->send(c->ctx, there(&g, out), counts[k], PHX_F32, to, NULL, &g.err);
          if (status != PHX_OK) BAD(&g, "%s", g.err.message);
          if (g.bad) return;
        }
        if (finish(&g) != PHX_OK) BAD(&g, "%s", g.err.message);
        comm_suite_expect_from(&g, &s, in, from, 0, counts[k], seed);
        check_guard(&g, in, bytes);
        comm_suite_buffers_free(&g);
        if (g.bad) return;
      }
    }
    if (c->barrier(c->ctx, NULL, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  }
  phx_comm_stats st = {.struct_size = sizeof st};
  c->stats(c->ctx, &st);
  int64_t want = 3 * 2 * (comm_suite.table->payload(NULL, PHX_OP_RECV, 1, PHX_F32, 0, c->size, 0) +
                          comm_suite.table->payload(NULL, PHX_OP_RECV, 1023, PHX_F32, 0, c->size, 0) +
                          comm_suite.table->payload(NULL, PHX_OP_RECV, 300007, PHX_F32, 0, c->size, 0));
  if (st.bytes[PHX_OP_RECV] != want || st.bytes[PHX_OP_SEND] != 0 || st.calls[PHX_OP_SEND] != 24) BAD(&g, "stats");
  comm_suite_rig_close(&g);
}
/* ---- streams ---- */

void comm_suite_streams(fake_rank *rank) {
  rig g;
  phx_stream *s;
  phx_event *e;
  const phx_device *d;
  if (!comm_suite_rig_open(&g, rank, COMM_SUITE_ARENA)) return;
  d = rank->device;
  phx_comm *c = g.comm;
  d->stream_create(d->ctx, "comm", &s, &g.err);
  d->event_create(d->ctx, &e, &g.err);
  float *x = (float *)(void *)comm_suite_buffer(&g, 1, 4 * 5000, 0),
        *sum = (float *)(void *)comm_suite_buffer(&g, 0, 4 * 700, 0);
  for (int i = 0; i < 5000; i++) x[i] = (float)(i + c->rank);
  for (int k = 0; k < 700; k++) sum[k] = (float)k;
  for (int k = 0; k < 700 && !g.bad; k++) { /* more calls than the queue holds: issuing blocks, and goes on */
    if (c->all_reduce(c->ctx, &sum[k], &sum[k], 1, PHX_F32, PHX_SUM, s, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  }
  if (c->all_reduce(c->ctx, x, x, 5000, PHX_F32, PHX_SUM, s, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  d->event_record(d->ctx, e, s, &g.err);
  if (d->event_synchronize(d->ctx, e, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  int n = c->size;
  for (int k = 0; k < 700; k++) if (sum[k] != (float)(n * k)) BAD(&g, "call %d on the stream: %g", k, (double)sum[k]);
  for (int i = 0; i < 5000; i++) if (x[i] != (float)(n * i + n * (n - 1) / 2)) BAD(&g, "element %d", i);
  d->event_destroy(d->ctx, e);
  d->stream_destroy(d->ctx, s);
  comm_suite_rig_close(&g);
}
/* ---- split ---- */

void comm_suite_splits(fake_rank *rank) {
  rig g;
  phx_stream *s[2];
  phx_comm *half = NULL, *back = NULL, *none = NULL;
  const phx_device *d;
  if (!comm_suite_rig_open(&g, rank, COMM_SUITE_ARENA)) return;
  d = rank->device;
  phx_comm *c = g.comm;
  int32_t n = c->size, me = c->rank;
  /* odd and even; and everybody backwards */
  if (c->split(c->ctx, me % 2, me, &half, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  if (!g.bad && c->split(c->ctx, 7, -me, &back, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  if (!g.bad && c->split(c->ctx, me == 0 ? -1 : 1, 0, &none, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  if (g.bad) return;
  if (back->size != n || back->rank != n - 1 - me) BAD(&g, "order by key: %d of %d", back->rank, back->size);
  if (half->size != (n + (me % 2 == 0)) / 2 || half->rank != me / 2) BAD(&g, "half: %d of %d", half->rank, half->size);
  if ((none == NULL) != (me == 0)) BAD(&g, "a negative colour joins none");
  /* two orders at once, on two streams; rank parity decides which is issued first */
  enum { ROUNDS = 200, LENGTH = 4000 };
  int32_t *a = (int32_t *)(void *)comm_suite_buffer(&g, 1, 4 * LENGTH, 0),
          *b = (int32_t *)(void *)comm_suite_buffer(&g, 0, 4 * LENGTH, 0);
  for (int i = 0; i < LENGTH; i++) a[i] = me + 1, b[i] = me + 1;
  for (int k = 0; k < 2; k++) d->stream_create(d->ctx, "comm", &s[k], &g.err);
  for (int k = 0; k < ROUNDS && !g.bad; k++) {
    for (int j = 0; j < 2; j++) {
      int first = (j ^ me) & 1;
      phx_comm *x = first ? half : back;
      int32_t *p = first ? a : b;
      if (x->all_reduce(x->ctx, p, p, LENGTH, PHX_I32, k % 10 == 0 ? PHX_SUM : PHX_MAX, s[first], &g.err) != PHX_OK)
        BAD(&g, "%s", g.err.message);
    }
  }
  for (int k = 0; k < 2; k++) if (d->stream_synchronize(d->ctx, s[k], &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
  uint32_t want_a = 0, want_b = (uint32_t)(n * (n + 1) / 2);
  for (int32_t r = me % 2; r < n; r += 2) want_a += (uint32_t)r + 1;
  for (int k = 10; k < ROUNDS; k += 10) want_a *= (uint32_t)half->size, want_b *= (uint32_t)n;
  for (int i = 0; i < LENGTH; i++) if ((uint32_t)a[i] != want_a || (uint32_t)b[i] != want_b) BAD(&g, "element %d", i);
  for (int k = 0; k < 2; k++) d->stream_destroy(d->ctx, s[k]);
  phx_comm_stats world = {.struct_size = sizeof world}, part = {.struct_size = sizeof part};
  c->stats(c->ctx, &world);
  half->stats(half->ctx, &part);
  if (part.calls[PHX_OP_ALL_REDUCE] != ROUNDS || world.calls[PHX_OP_ALL_REDUCE] != 2 * ROUNDS) BAD(&g, "stats");
  half->destroy(half);
  back->destroy(back);
  if (none) none->destroy(none);
  /* the pool is given back: more splits than it holds, used by small calls with no barrier at the end */
  for (int k = 0; k < 60 && !g.bad; k++) {
    phx_comm *x = NULL;
    if (c->split(c->ctx, me % 3, k % 2 ? me : -me, &x, &g.err) != PHX_OK) { BAD(&g, "%s", g.err.message); break; }
    int32_t one = 1;
    for (int j = 0; j <= k % 3; j++) {
      one = 1;
      if (x->all_reduce(x->ctx, &one, &one, 1, PHX_I32, PHX_SUM, NULL, &g.err) != PHX_OK) BAD(&g, "%s", g.err.message);
    }
    if (one != x->size) BAD(&g, "sum %d of %d", one, x->size);
    x->destroy(x);
  }
  comm_suite_rig_close(&g);
}
void comm_suite_pool_empty(fake_rank *rank) {
  rig g;
  phx_comm *x[64] = {NULL};
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  int k = 0;
  phx_status status = PHX_OK;
  while (k < 64 && (status = c->split(c->ctx, 0, 0, &x[k], &g.err)) == PHX_OK) k++;
  if (k != comm_suite.communicators - 1 || status != PHX_UNSUPPORTED || !strstr(g.err.message, "communicators"))
    BAD(&g, "%d communicators, %s", k, g.err.message);
  if (c->barrier(c->ctx, NULL, &g.err) != PHX_OK) BAD(&g, "not whole after a refused split: %s", g.err.message);
  comm_suite_rig_close(&g); /* also of what was not destroyed */
}
/* ---- faults ---- */

void comm_suite_mismatch(fake_rank *rank) {
  rig g;
  int kind = *(int *)rank->arg, odd = rank->job.rank == 1;
  float x[4096] = {0}, y[4096] = {0};
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  phx_status status = PHX_INTERNAL;
  if (kind == 0) status = odd ? c->barrier(c->ctx, NULL, &g.err)
                              : c->all_reduce(c->ctx, x, y, 3000, PHX_F32, PHX_SUM, NULL, &g.err);
  if (kind == 1) status = c->all_reduce(c->ctx, x, y, odd ? 3001 : 3000, PHX_F32, PHX_SUM, NULL, &g.err);
  if (kind == 2) status = c->all_reduce(c->ctx, x, y, 3, odd ? PHX_I32 : PHX_F32, PHX_SUM, NULL, &g.err);
  if (kind == 3) status = c->broadcast(c->ctx, x, 3, PHX_F32, odd, NULL, &g.err);
  if (kind == 4) status = c->all_reduce(c->ctx, x, y, 3, PHX_F32, odd ? PHX_MAX : PHX_SUM, NULL, &g.err);
  if (kind == 5) status = odd ? c->recv(c->ctx, x, 4, PHX_F32, 0, NULL, &g.err)
                              : c->send(c->ctx, x, 3, PHX_F32, 1, NULL, &g.err);
  if (kind == 6) status = c->send(c->ctx, x, 3, PHX_F32, !odd, NULL, &g.err);
  if (kind == 7) status = odd ? c->barrier(c->ctx, NULL, &g.err) : c->send(c->ctx, x, 3, PHX_F32, 1, NULL, &g.err);
  for (int k = 0; k < 2000 && status == PHX_OK; k++) { /* a root or a sender may be done before its peer comes */
    nanosleep(&(struct timespec){0, 1000000}, NULL);
    status = c->health(c->ctx, &g.err);
  }
  FAKE_CHECK(rank, status == PHX_COMM, "kind %d: status %d", kind, status);
  FAKE_CHECK(rank, strstr(g.err.message, "rank 0") && strstr(g.err.message, "rank 1"), "kind %d: %s", kind,
             g.err.message);
  static const char *const names[8][2] = {{"all_reduce(3000 f32", "barrier("}, {"3000", "3001"}, {"f32", "i32"},
                                          {"root 0", "root 1"}, {"sum", "max"}, {"send(3", "recv(4"}, {"send", "send"},
                                          {"barrier", "send"}};
  FAKE_CHECK(rank, strstr(g.err.message, names[kind][0]) && strstr(g.err.message, names[kind][1]), "kind %d: %s", kind,
             g.err.message);
  FAKE_CHECK(rank, __atomic_load_n(rank->job.failed, __ATOMIC_ACQUIRE), "the job goes on");
  FAKE_CHECK(rank, c->health(c->ctx, &g.err) == PHX_COMM, "healthy after a failure");
}
void comm_suite_absent(fake_rank *rank) {
  rig g;
  int32_t x = 1;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm, *sub = NULL;
  c->annotate(c->ctx, 3);
  FAKE_CHECK(rank, c->split(c->ctx, c->rank != 0, 0, &sub, &g.err) == PHX_OK, "%s", g.err.message);
  FAKE_CHECK(rank, c->barrier(c->ctx, NULL, &g.err) == PHX_OK, "%s", g.err.message);
  if (c->rank == 2) { /* in another collective, on a communicator whose other member does not come; it gives up later */
    nanosleep(&(struct timespec){0, 250000000}, NULL);
    sub->barrier(sub->ctx, NULL, &g.err);
    return;
  }
  phx_status status = c->all_reduce(c->ctx, &x, &x, 1, PHX_I32, PHX_SUM, NULL, &g.err);
  FAKE_CHECK(rank, status == PHX_COMM, "status %d", status);
  FAKE_CHECK(rank, strstr(g.err.message, "all_reduce") && strstr(g.err.message, "rank 2 (pid") &&
                       strstr(g.err.message, "is in barrier, number 1 of communicator"), "%s", g.err.message);
  FAKE_CHECK(rank, c->health(c->ctx, &g.err) == PHX_COMM, "healthy");
}
/* A rank that comes late, but in time, is no fault; and no timeout means for ever. */
void comm_suite_late(fake_rank *rank) {
  rig g;
  int32_t x = 1;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  for (int k = 0; k < 3; k++) {
    if (c->rank == k % c->size) nanosleep(&(struct timespec){0, 250000000}, NULL);
    phx_status status = c->all_reduce(c->ctx, &x, &x, 1, PHX_I32, PHX_MAX, NULL, &g.err);
    FAKE_CHECK(rank, status == PHX_OK, "%s", g.err.message);
  }
  phx_comm_stats st = {.struct_size = sizeof st};
  c->stats(c->ctx, &st);
  FAKE_CHECK(rank, st.wait_ns > 200000000, "waited %lld ns", (long long)st.wait_ns);
  const phx_liveness *page = rank->job.mine;
  FAKE_CHECK(rank, page->n_flights == 3 && page->ring[2].op == PHX_OP_ALL_REDUCE && page->ring[2].sequence == 3 &&
                       page->ring[2].bytes == 4 && page->ring[2].end_ns >= page->ring[2].begin_ns && page->heartbeat_ns,
             "the flight record");
  comm_suite_rig_close(&g);
}
/* Rank 0 waits, is stopped for longer than the timeout, and goes on waiting: only the time in which it ran counts. */
void comm_suite_suspended(fake_rank *rank) {
  rig g;
  int32_t x = 1;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  if (c->rank == 1) {
    const pid_t peer = rank->job.ranks[0]->pid;
    nanosleep(&(struct timespec){0, 300000000}, NULL);
    FAKE_CHECK(rank, peer > 0 && kill(peer, SIGSTOP) == 0, "cannot stop process %d", (int)peer);
    nanosleep(&(struct timespec){2, 500000000}, NULL);
    kill(peer, SIGCONT);
    nanosleep(&(struct timespec){0, 500000000}, NULL);
  }
  phx_status status = c->all_reduce(c->ctx, &x, &x, 1, PHX_I32, PHX_SUM, NULL, &g.err);
  FAKE_CHECK(rank, status == PHX_OK && x == 2, "%s", g.err.message);
  phx_comm_stats st = {.struct_size = sizeof st};
  c->stats(c->ctx, &st);
  FAKE_CHECK(rank, st.wait_ns < 1700000000, "waited %lld ns", (long long)st.wait_ns);
  comm_suite_rig_close(&g);
}
void comm_suite_killed(fake_rank *rank) {
  rig g;
  static float x[300000];
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  for (int k = 0;; k++) {
    if (c->rank == 1 && k == 20) raise(SIGKILL);
    if (c->rank == 2 && k == 20) { /* plays the launcher, which sees the death */
      nanosleep(&(struct timespec){0, 50000000}, NULL);
      rank->job.fail(rank->job.ctx, "rank 1 was killed");
    }
    phx_status status = c->all_reduce(c->ctx, x, x, 300000, PHX_F32, PHX_SUM, NULL, &g.err);
    if (status == PHX_OK) continue;
    FAKE_CHECK(rank, k == 20 && status == PHX_COMM && strstr(g.err.message, "rank 1 was killed"), "%d: %s", k,
               g.err.message);
    return;
  }
}
/* ---- arguments, options, pure functions ---- */

void comm_suite_arguments(fake_rank *rank) {
  rig g;
  float x[8] = {0};
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  void *k = c->ctx;
  FAKE_CHECK(rank, c->all_reduce(k, x, x, -1, PHX_F32, PHX_SUM, NULL, &g.err) == PHX_INVALID, "numel");
  FAKE_CHECK(rank, c->all_reduce(k, x, x, INT64_MAX / 2, PHX_F32, PHX_SUM, NULL, &g.err) == PHX_INVALID, "overflow");
  FAKE_CHECK(rank, c->all_reduce(k, x, x, 1, 77, PHX_SUM, NULL, &g.err) == PHX_INVALID, "dtype");
  FAKE_CHECK(rank, c->all_reduce(k, x, x, 1, PHX_F16, PHX_SUM, NULL, &g.err) == PHX_UNSUPPORTED, "f16");
  FAKE_CHECK(rank, c->all_reduce(k, x, x, 1, PHX_F32, 3, NULL, &g.err) == PHX_INVALID, "op");
  FAKE_CHECK(rank, c->all_reduce(k, NULL, x, 1, PHX_F32, 0, NULL, NULL) == PHX_INVALID, "null");
  FAKE_CHECK(rank, c->broadcast(k, x, 1, PHX_F32, c->size, NULL, &g.err) == PHX_INVALID, "root");
  FAKE_CHECK(rank, c->send(k, x, 1, PHX_F32, c->rank, NULL, &g.err) == PHX_INVALID, "self");
  FAKE_CHECK(rank, c->all_to_all(k, x, x, 1, PHX_F32, NULL, &g.err) == PHX_INVALID, "in place");
  FAKE_CHECK(rank, c->broadcast(k, x, 8, PHX_F16, 0, NULL, &g.err) == PHX_OK, "f16 can be moved: %s", g.err.message);
  c->destroy(NULL);
  comm_suite.table->destroy(NULL);
  comm_suite_rig_close(&g);
}
/* The smallest staging cuts everything into many chunks. */
void comm_suite_tiny_staging(fake_rank *rank) {
  rig g;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  for (int32_t op = PHX_OP_ALL_REDUCE; op <= PHX_OP_ALL_TO_ALL && !g.bad; op++) {
    if (op == PHX_OP_SEND || op == PHX_OP_RECV) continue;
    for (int64_t numel = 20000; numel <= 60001; numel += 40001) {
      shape s = {op, PHX_F32, PHX_SUM, numel, 0, 0, 4};
      comm_suite_try_shape(&g, &s, (uint64_t)(op * 10 + 3));
      if (g.bad) return;
    }
  }
  comm_suite_rig_close(&g);
}
/* Ranks as threads: what the thread sanitizer looks at. */
void comm_suite_as_threads(fake_rank *rank) {
  comm_suite_tiny_staging(rank);
  comm_suite_pairs(rank);
  comm_suite_streams(rank);
  comm_suite_splits(rank);
}

int64_t comm_suite_order_shows(void) {
  int64_t differ = 0;
  for (int64_t i = 0; i < 1000; i++)
    differ += comm_reference_tree(PHX_F32, PHX_SUM, 1, 0, 4, i).f != comm_reference_left_to_right(PHX_F32, 1, 4, i).f;
  return differ;
}
