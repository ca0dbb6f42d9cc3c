/* moves.c - how the NCCL double moves and reduces: through channels of two chunks in shared memory.  Runs on streams.
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "inner.h"

#define PIECE 4096 /* elements that a reduction works on at a time */

void double_pause(int *turns) {
  if ((*turns)++ < 50)
    sched_yield();
  else
    nanosleep(&(struct timespec){0, *turns < 500 ? 20000 : 500000}, NULL);
}
static int is_aborted(const struct ncclComm *c) { return __atomic_load_n(&c->aborted, __ATOMIC_ACQUIRE); }
void double_hang(struct ncclComm *c) {
  for (int turns = 0; !is_aborted(c);) double_pause(&turns);
}

/* 1: something moved. */
static int step(struct ncclComm *c, move *m) {
  channel *k = m->is_send ? &c->room->pair[c->me][m->peer] : &c->room->pair[m->peer][c->me];
  const uint32_t posted = __atomic_load_n(&k->posted, __ATOMIC_ACQUIRE),
                 taken = __atomic_load_n(&k->taken, __ATOMIC_ACQUIRE);
  if (m->is_send) {
    if (posted - taken >= 2) return 0;
    const size_t n = m->bytes - m->done < CHUNK ? m->bytes - m->done : CHUNK;
    memcpy(k->data[posted & 1], m->p + m->done, n);
    k->bytes[posted & 1] = (uint32_t)n;
    m->done += n;
    __atomic_store_n(&k->posted, posted + 1, __ATOMIC_RELEASE);
    return 1;
  }
  if (posted == taken) return 0;
  const size_t n = k->bytes[taken & 1], left = m->bytes - m->done;
  if (n > left || (n < CHUNK && n < left)) return 0; /* sizes differ: as in NCCL, nobody gets on */
  memcpy(m->p + m->done, k->data[taken & 1], n);
  m->done += n;
  __atomic_store_n(&k->taken, taken + 1, __ATOMIC_RELEASE);
  return 1;
}

int double_move(struct ncclComm *c, move *moves, int n) {
  for (int turns = 0;;) {
    unsigned busy[2] = {0, 0}; /* peers with an unfinished move before this one */
    int moved = 0, left = 0;
    for (int i = 0; i < n; i++) {
      move *m = &moves[i];
      if (m->done == m->bytes || (busy[m->is_send] >> m->peer & 1)) continue;
      moved |= step(c, m);
      if (m->done == m->bytes) continue;
      left++;
      busy[m->is_send] |= 1u << m->peer;
    }
    for (int i = 0; i < n; i++) left += moves[i].done < moves[i].bytes;
    if (left == 0) return 0;
    if (is_aborted(c)) return -1;
    if (moved)
      turns = 0;
    else
      double_pause(&turns);
  }
}

/* ---- reductions ---- */

static double load(ncclDataType_t type, const char *p, int64_t *integer) {
  float f = 0;
  double d = 0;
  uint32_t bits = 0;
  *integer = 0;
  switch (type) {
    case ncclFloat32: memcpy(&f, p, 4); return (double)f;
    case ncclFloat64: memcpy(&d, p, 8); return d;
    case ncclBfloat16:
      memcpy((char *)&bits + 2, p, 2);
      memcpy(&f, &bits, 4);
      return (double)f;
    case ncclInt32: memcpy(&bits, p, 4); *integer = (int32_t)bits; return 0;
    case ncclUint32: memcpy(&bits, p, 4); *integer = bits; return 0;
    case ncclUint8: *integer = *(const unsigned char *)p; return 0;
    default: memcpy(integer, p, 8); return 0;
  }
}
#define PICK(a, b) (op == ncclMax ? ((a) > (b) ? (a) : (b)) : (a) < (b) ? (a) : (b))
static void combine(ncclDataType_t type, ncclRedOp_t op, char *acc, const char *x, size_t element) {
  int64_t i = 0, j = 0;
  const double a = load(type, acc, &i), b = load(type, x, &j);
  if (type == ncclFloat32 || type == ncclBfloat16) {
    const float sum = op == ncclSum ? (float)a + (float)b : (float)PICK(a, b);
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    if (type == ncclBfloat16) bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* rounded at every addition */
    memcpy(acc, &bits, element);
  } else if (type == ncclFloat64) {
    const double sum = op == ncclSum ? a + b : PICK(a, b);
    memcpy(acc, &sum, 8);
  } else {
    const uint64_t u = (uint64_t)i, v = (uint64_t)j;
    const uint64_t w = op == ncclSum ? u + v : type == ncclUint64 ? PICK(u, v) : (uint64_t)PICK(i, j);
    memcpy(acc, &w, element);
  }
}

/* Everybody's numel elements at `from(p)`, reduced into dst of the owner(s). */
static int reduce_piece(const work *w, size_t at, size_t numel, char *rows, int everybody) {
  struct ncclComm *c = w->comm;
  move moves[2 * DOUBLE_RANKS];
  const size_t bytes = numel * w->element, scatter = w->kind == DO_REDUCE_SCATTER ? w->count * w->element : 0;
  int n = 0;
  for (int p = 0; p < c->n; p++) {
    char *from = (char *)(uintptr_t)w->src + (size_t)p * scatter + at * w->element;
    if (p == c->me && (everybody || w->root == p)) memcpy(rows + (size_t)p * bytes, from, bytes);
    if (p == c->me) continue;
    if (everybody || w->root == p) moves[n++] = (move){p, 1, from, bytes, 0};
    if (everybody || w->root == c->me) moves[n++] = (move){p, 0, rows + (size_t)p * bytes, bytes, 0};
  }
  if (double_move(c, moves, n) != 0) return -1;
  if (!everybody && w->root != c->me) return 0;
  for (int p = 1; p < c->n; p++)
    for (size_t i = 0; i < bytes; i += w->element)
      combine(w->type, w->op, rows + i, rows + (size_t)p * bytes + i, w->element);
  memcpy(w->dst + at * w->element, rows, bytes);
  return 0;
}
static void run_reduction(const work *w) {
  char *rows = malloc((size_t)w->comm->n * PIECE * w->element);
  if (!rows) abort();
  for (size_t at = 0; at < w->count; at += PIECE) {
    const size_t numel = w->count - at < PIECE ? w->count - at : PIECE;
    if (reduce_piece(w, at, numel, rows, w->kind != DO_REDUCE) != 0) break;
  }
  free(rows);
}

static void run_moves(const work *w) {
  struct ncclComm *c = w->comm;
  move moves[2 * DOUBLE_RANKS];
  const size_t bytes = w->count * w->element;
  int n = 0;
  for (int p = 0; p < c->n; p++) {
    char *own = (char *)(uintptr_t)w->src;
    if (w->kind == DO_ALL_GATHER && p == c->me) memmove(w->dst + (size_t)p * bytes, own, bytes);
    if (w->kind == DO_BROADCAST && p == c->me && p == w->root && w->dst) memmove(w->dst, own, bytes);
    if (p == c->me) continue;
    if (w->kind == DO_ALL_GATHER || w->root == c->me) moves[n++] = (move){p, 1, own, bytes, 0};
    if (w->kind == DO_ALL_GATHER) moves[n++] = (move){p, 0, w->dst + (size_t)p * bytes, bytes, 0};
    if (w->kind == DO_BROADCAST && w->root == p) moves[n++] = (move){p, 0, w->dst, bytes, 0};
  }
  double_move(c, moves, n);
}

void double_run(void *arg) {
  work *w = arg;
  struct ncclComm *c = w->comm;
  if (is_aborted(c)) return;
  if (w->fault == DOUBLE_ASYNC_ERROR) __atomic_store_n(&c->state, ncclRemoteError, __ATOMIC_RELEASE);
  if (w->fault || __atomic_load_n(&double_shared->control.fault, __ATOMIC_RELAXED) == DOUBLE_CUT)
    double_hang(c);
  else if (w->kind == DO_MOVES)
    double_move(c, w->moves, w->n_moves);
  else if (w->kind <= DO_REDUCE_SCATTER)
    run_reduction(w);
  else
    run_moves(w);
}
void double_drop(void *arg) {
  work *w = arg;
  double_release(w->comm);
  free(w->moves);
  free(w);
}
