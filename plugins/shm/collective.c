/* collective.c - how the collectives move their bytes.
 *
 * Every collective begins with an arrival: the rank publishes the record of its call (and, when it is small, its data)
 * in the lane, steps, waits for everybody's step and compares the records, so ranks that disagree are found at once.
 * Then one of three forms, chosen from the same records by all ranks alike:
 *
 *   small    the data came with the record: read the peers' lanes, done.  One round; no completion is needed, since a
 *            rank can overwrite a slot only two calls later, after everybody arrived at the call between.
 *   direct   all buffers that peers must reach are in arenas: read (and store) them in place, then one barrier, after
 *            which nobody touches this rank's buffers any more.
 *   staged   some rank's buffer is elsewhere: chunks go through two staging halves in turn; filling the next half comes
 *            before the barrier that ends the work on this one, so a chunk costs one barrier.
 *
 * Reductions cut the elements into one slice per rank (shm_cut); a rank reduces its slice over all ranks' buffers in
 * one pass and stores it where it is needed: per all_reduce a rank moves 2 S bytes on the bus, S read and S written,
 * for any number of ranks (S: the buffer).  Direct and staged forms move the same payload: bytes read from or stored to
 * peers.
 *
 * Does not: know of streams, tickets or stats (issue.c), or of waiting (wait.c).  Threads: the one that runs the call.
 */
#include <string.h>

#include "shm.h"

typedef struct move { /* a large collective in progress */
  shm_call *call;
  shm_comm *c;
  shm_record record[PHX_RANKS_MAX];
  int64_t element; /* bytes */
} move;

int64_t shm_arena_offset(const shm_comm *c, const void *p, int64_t bytes) {
  uintptr_t arena = (uintptr_t)c->arena[c->me], at = (uintptr_t)p;
  if (!p || at < arena || at - arena > (uint64_t)c->world->arena_bytes) return -1;
  return bytes <= c->world->arena_bytes - (int64_t)(at - arena) ? (int64_t)(at - arena) : -1;
}

/* The next call's slot: its readers are done with it since everybody came to this call, so its lines can be made ours
 * while we wait for the peers.  As many lines as this call filled. */
static inline void slot_prepare(shm_lane *lane, uint64_t sequence, int64_t bytes) {
#if defined(__x86_64__)
  const char *next = lane->slot[(sequence + 1) & 1].data;
  __asm__ volatile("prefetchw %0" ::"m"(lane->slot[(sequence + 1) & 1].record));
  for (int64_t at = 0; at < bytes; at += 64) __asm__ volatile("prefetchw %0" ::"m"(next[at]));
#else
  (void)lane, (void)sequence, (void)bytes;
#endif
}

phx_status shm_arrive(shm_call *call, const shm_record *mine, phx_error *err) {
  shm_comm *c = call->comm;
  shm_lane *lane = c->lane[c->me];
  lane->slot[mine->sequence & 1].record = *mine;
  __atomic_store_n(&lane->begun, mine->sequence, __ATOMIC_RELEASE);
  shm_step(c);
  int64_t put = shm_put_bytes(mine->op, mine->numel, (int64_t)phx_dtype_bytes(mine->dtype), c->n);
  if (put <= SHM_SMALL) slot_prepare(lane, mine->sequence, put);
  for (int32_t p = 0; p < c->n; p++) {
    if (p == c->me) continue;
    PHX_TRY(shm_step_of(call, p, err));
    const shm_record *r = &c->lane[p]->slot[mine->sequence & 1].record;
    if (r->sequence != mine->sequence || r->numel != mine->numel || r->op != mine->op || r->dtype != mine->dtype ||
        r->reduce != mine->reduce || r->root != mine->root)
      return shm_report_mismatch(call, p, r, err);
  }
  return PHX_OK;
}

/* ---- the three primitives; each counts the payload where it touches a peer ---- */

/* dst[] = tree over src[], one per rank; sources and destinations of other members are payload. */
static void reduce_pass(move *m, void *const *dst, int32_t n_dst, int32_t only, const void *const *src, int64_t numel) {
  const shm_comm *c = m->c;
  int32_t in_place = 0;
  if (numel <= 0) return;
  for (int32_t i = 0; i < n_dst; i++) in_place |= dst[i] == src[n_dst == 1 ? only : i];
  int64_t bytes = numel * m->element;
  c->world->kernels->reduce[m->call->dtype][m->call->reduce](dst, n_dst, src, c->n, numel,
                                                             !in_place && bytes * n_dst >= SHM_STREAM);
  m->call->moved += bytes * (c->n - 1) + bytes * (n_dst == 1 ? only != c->me : n_dst - 1);
}
static void fetch(move *m, void *dst, int32_t from, const void *src, int64_t bytes) {
  if (bytes <= 0) return;
  m->c->world->kernels->copy(dst, src, bytes, m->call->numel * m->element >= SHM_STREAM);
  if (from != m->c->me) m->call->moved += bytes;
}

/* ---- small: everything lies in the lanes' slots ---- */

static int put_in_slot(const shm_call *call, int64_t bytes, char *data) {
  if (bytes > SHM_SMALL) return 0;
  if (bytes > 0 && (call->op != PHX_OP_BROADCAST || call->root == call->comm->me))
    memcpy(data, call->src, (size_t)bytes);
  return 1;
}

static void run_small(move *m, uint64_t sequence) {
  shm_call *call = m->call;
  shm_comm *c = m->c;
  const void *in[PHX_RANKS_MAX];
  int64_t bytes = call->numel * m->element;
  char *dst = call->dst;
  int32_t op = call->op;
  int64_t at = op == PHX_OP_REDUCE_SCATTER || op == PHX_OP_ALL_TO_ALL ? c->me * bytes : 0;
  for (int32_t p = 0; p < c->n; p++) in[p] = c->lane[p]->slot[sequence & 1].data + at;
  if (op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE_SCATTER || (op == PHX_OP_REDUCE && call->root == c->me))
    reduce_pass(m, (void *const *)&call->dst, 1, c->me, in, call->numel);
  if (op == PHX_OP_ALL_GATHER || op == PHX_OP_ALL_TO_ALL)
    for (int32_t p = 0; p < c->n; p++) fetch(m, dst + p * bytes, p, in[p], bytes);
  if (op == PHX_OP_BROADCAST && call->root != c->me) fetch(m, dst, call->root, in[call->root], bytes);
}

/* ---- direct: in the arenas ---- */

static int is_direct(const move *m) {
  int32_t op = m->call->op, root = m->call->root;
  if (op == PHX_OP_BROADCAST) return m->record[root].src >= 0;
  if (op == PHX_OP_REDUCE && m->record[root].dst < 0) return 0;
  for (int32_t p = 0; p < m->c->n; p++) {
    if (m->record[p].src < 0 || (op == PHX_OP_ALL_REDUCE && m->record[p].dst < 0)) return 0;
  }
  return 1;
}

static phx_status run_direct(move *m, phx_error *err) {
  shm_call *call = m->call;
  shm_comm *c = m->c;
  const void *src[PHX_RANKS_MAX];
  void *dst[PHX_RANKS_MAX];
  int64_t lo = 0, hi = 0, bytes = call->numel * m->element;
  char *out = call->dst;
  shm_cut(call->numel, m->element, c->n, c->me, &lo, &hi);
  for (int32_t p = 0; p < c->n; p++) { /* an offset of -1 is never followed: see is_direct */
    src[p] = c->arena[p] + m->record[p].src;
    dst[p] = c->arena[p] + m->record[p].dst;
  }
  if (call->op == PHX_OP_ALL_REDUCE || call->op == PHX_OP_REDUCE) {
    for (int32_t p = 0; p < c->n; p++) {
      src[p] = (const char *)src[p] + lo * m->element;
      dst[p] = (char *)dst[p] + lo * m->element;
    }
    if (call->op == PHX_OP_ALL_REDUCE)
      reduce_pass(m, dst, c->n, 0, src, hi - lo);
    else
      reduce_pass(m, &dst[call->root], 1, call->root, src, hi - lo);
  } else if (call->op == PHX_OP_REDUCE_SCATTER) {
    for (int32_t p = 0; p < c->n; p++) src[p] = (const char *)src[p] + c->me * bytes;
    reduce_pass(m, (void *const *)&call->dst, 1, c->me, src, call->numel);
  } else if (call->op == PHX_OP_BROADCAST) {
    if (c->me != call->root) {
      fetch(m, out, call->root, src[call->root], bytes);
      shm_step(c); /* only the root has a buffer that others read */
      return PHX_OK;
    }
  } else { /* all_gather, all_to_all: begin with the next rank, so that not all read the same memory at once */
    for (int32_t k = 1; k <= c->n; k++) {
      int32_t p = (c->me + k) % c->n;
      fetch(m, out + p * bytes, p, (const char *)src[p] + (call->op == PHX_OP_ALL_TO_ALL ? c->me * bytes : 0), bytes);
    }
  }
  return shm_barrier(call, err);
}

/* ---- staged: chunks through the halves of the staging area ---- */

shm_chunks shm_chunks_of(const shm_call *call) {
  const shm_comm *c = call->comm;
  int32_t op = call->op, one = op == PHX_OP_ALL_GATHER || op == PHX_OP_BROADCAST;
  shm_chunks k = {one ? 1 : c->n, 0, 0};
  int64_t element = (int64_t)phx_dtype_bytes(call->dtype), longest = call->numel, lo = 0, grain = SHM_GRAIN / element;
  if (op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE) shm_cut(call->numel, element, c->n, 0, &lo, &longest);
  k.step = c->world->config.staging / 2 / (k.pieces * element) / grain * grain;
  k.rounds = (longest + k.step - 1) / k.step;
  return k;
}
/* Chunk r of part q, in elements of the whole buffer. */
static void part(const move *m, const shm_chunks *k, int64_t r, int32_t q, int64_t *lo, int64_t *hi) {
  int32_t op = m->call->op;
  int64_t begin = 0, end = m->call->numel;
  if (op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE) {
    shm_cut(m->call->numel, m->element, m->c->n, q, &begin, &end);
  } else if (k->pieces > 1) {
    begin = q * m->call->numel;
    end = begin + m->call->numel;
  }
  *lo = begin + r * k->step < end ? begin + r * k->step : end;
  *hi = end - *lo < k->step ? end : *lo + k->step;
}
static char *stage(const move *m, const shm_chunks *k, int32_t rank, int64_t r, int32_t q) {
  return m->c->staging[rank] + (r & 1) * (m->c->world->config.staging / 2) + q * k->step * m->element;
}

static void stage_in(move *m, const shm_chunks *k, int64_t r) {
  int64_t lo = 0, hi = 0;
  if (m->call->op == PHX_OP_BROADCAST && m->call->root != m->c->me) return;
  for (int32_t q = 0; q < k->pieces; q++) {
    part(m, k, r, q, &lo, &hi);
    if (hi > lo)
      memcpy(stage(m, k, m->c->me, r, q), (const char *)m->call->src + lo * m->element,
             (size_t)((hi - lo) * m->element));
  }
}

static void stage_work(move *m, const shm_chunks *k, int64_t r) {
  shm_comm *c = m->c;
  int32_t op = m->call->op, root = m->call->root;
  int64_t lo = 0, hi = 0, whole = m->call->numel * m->element;
  char *out = m->call->dst;
  if (op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE || op == PHX_OP_REDUCE_SCATTER) {
    void *at[PHX_RANKS_MAX];
    for (int32_t p = 0; p < c->n; p++) at[p] = stage(m, k, p, r, c->me);
    part(m, k, r, c->me, &lo, &hi);
    const void *const *in = (const void *const *)at;
    if (op == PHX_OP_ALL_REDUCE) reduce_pass(m, at, c->n, 0, in, hi - lo);
    if (op == PHX_OP_REDUCE) reduce_pass(m, &at[root], 1, root, in, hi - lo);
    if (op == PHX_OP_REDUCE_SCATTER) {
      void *own = out + (lo - c->me * m->call->numel) * m->element;
      reduce_pass(m, &own, 1, c->me, in, hi - lo);
    }
  } else if (op == PHX_OP_BROADCAST) {
    part(m, k, r, 0, &lo, &hi);
    if (c->me != root) fetch(m, out + lo * m->element, root, stage(m, k, root, r, 0), (hi - lo) * m->element);
  } else {
    int32_t mine = op == PHX_OP_ALL_TO_ALL ? c->me : 0;
    part(m, k, r, mine, &lo, &hi);
    lo -= mine * m->call->numel;
    hi -= mine * m->call->numel;
    for (int32_t j = 1; j <= c->n; j++) {
      int32_t p = (c->me + j) % c->n;
      char *to = out + p * whole + lo * m->element;
      if (p == c->me && to == (const char *)m->call->src + lo * m->element) continue; /* gathered in place */
      fetch(m, to, p, stage(m, k, p, r, mine), (hi - lo) * m->element);
    }
  }
}

static void stage_out(move *m, const shm_chunks *k, int64_t r) {
  int64_t lo = 0, hi = 0;
  if (m->call->op != PHX_OP_ALL_REDUCE && (m->call->op != PHX_OP_REDUCE || m->call->root != m->c->me)) return;
  for (int32_t q = 0; q < k->pieces; q++) {
    part(m, k, r, q, &lo, &hi);
    if (hi > lo)
      memcpy((char *)m->call->dst + lo * m->element, stage(m, k, m->c->me, r, q), (size_t)((hi - lo) * m->element));
  }
}

static phx_status run_staged(move *m, phx_error *err) {
  const shm_chunks k = shm_chunks_of(m->call);
  int results = m->call->op == PHX_OP_ALL_REDUCE || m->call->op == PHX_OP_REDUCE; /* come back through the staging */
  stage_in(m, &k, 0);
  phx_status status = shm_barrier(m->call, err);
  for (int64_t r = 0; r < k.rounds && status == PHX_OK; r++) {
    stage_work(m, &k, r);
    /* The other half is free: its work ended before the barrier that let us in. */
    if (r + 1 < k.rounds) stage_in(m, &k, r + 1);
    if (r + 1 < k.rounds || results) status = shm_barrier(m->call, err);
    if (status == PHX_OK) stage_out(m, &k, r);
  }
  return status; /* the next staged call fills its first half only after everybody arrived there */
}

/* ---- the same for memory that the CPU cannot reach: the copies in and out are the device's (device.c) ---- */

static move move_of(const shm_call *call) {
  return (move){.call = (shm_call *)(uintptr_t)call, .c = call->comm, .element = (int64_t)phx_dtype_bytes(call->dtype)};
}
static int reduces(int32_t op) {
  return op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE || op == PHX_OP_REDUCE_SCATTER;
}

int shm_staged_in(const shm_call *call, const shm_chunks *k, int64_t round, int32_t q, shm_part *out) {
  const move m = move_of(call);
  int64_t lo = 0, hi = 0;
  if (q >= k->pieces || (call->op == PHX_OP_BROADCAST && call->root != m.c->me)) return 0;
  part(&m, k, round, q, &lo, &hi);
  *out = (shm_part){lo, hi - lo, stage(&m, k, m.c->me, round, q)};
  return 1;
}

int shm_staged_out(const shm_call *call, const shm_chunks *k, int64_t round, int32_t q, shm_part *out) {
  const move m = move_of(call);
  const int32_t op = call->op, me = m.c->me, root = call->root;
  int64_t lo = 0, hi = 0;
  if (op == PHX_OP_ALL_REDUCE || op == PHX_OP_REDUCE) {
    if (q >= k->pieces || (op == PHX_OP_REDUCE && root != me)) return 0;
    part(&m, k, round, q, &lo, &hi);
    *out = (shm_part){lo, hi - lo, stage(&m, k, me, round, q)};
    return 1;
  }
  const int32_t mine = op == PHX_OP_ALL_TO_ALL || op == PHX_OP_REDUCE_SCATTER ? me : 0;
  const int32_t single = op == PHX_OP_REDUCE_SCATTER || op == PHX_OP_BROADCAST;
  if (q >= (single ? 1 : m.c->n) || (op == PHX_OP_BROADCAST && root == me)) return 0;
  int32_t from = (me + 1 + q) % m.c->n;
  if (op == PHX_OP_REDUCE_SCATTER) from = me;
  if (op == PHX_OP_BROADCAST) from = root;
  part(&m, k, round, mine, &lo, &hi);
  *out = (shm_part){(single ? 0 : from * call->numel) + lo - mine * call->numel, hi - lo,
                    stage(&m, k, from, round, mine)};
  return 1;
}

phx_status shm_staged_reduce(shm_call *call, int64_t round, phx_error *err) {
  move m = move_of(call);
  const shm_chunks k = shm_chunks_of(call);
  const int32_t op = call->op, me = m.c->me;
  void *at[PHX_RANKS_MAX];
  const void *const *in = (const void *const *)at;
  int64_t lo = 0, hi = 0;
  shm_part out;
  for (int32_t q = 0; !reduces(op) && shm_staged_out(call, &k, round, q, &out); q++)
    if (out.staging != stage(&m, &k, me, round, op == PHX_OP_ALL_TO_ALL ? me : 0)) call->moved += out.numel * m.element;
  if (!reduces(op)) return PHX_OK;
  for (int32_t p = 0; p < m.c->n; p++) at[p] = stage(&m, &k, p, round, me);
  part(&m, &k, round, me, &lo, &hi);
  if (op == PHX_OP_ALL_REDUCE) reduce_pass(&m, at, m.c->n, 0, in, hi - lo);
  if (op == PHX_OP_REDUCE) reduce_pass(&m, &at[call->root], 1, call->root, in, hi - lo);
  if (op == PHX_OP_REDUCE_SCATTER) reduce_pass(&m, &at[me], 1, me, in, hi - lo);
  return op == PHX_OP_REDUCE_SCATTER ? PHX_OK : shm_barrier(call, err);
}

/* A world of one: copy, or nothing. */
static void run_alone(const shm_call *call, int64_t bytes) {
  if (call->op != PHX_OP_BARRIER && call->dst != call->src && bytes > 0) memmove(call->dst, call->src, (size_t)bytes);
}

phx_status shm_collective(shm_call *call, phx_error *err) {
  shm_comm *c = call->comm;
  move m = {.call = call, .c = c, .element = (int64_t)phx_dtype_bytes(call->dtype)};
  int64_t put = shm_put_bytes(call->op, call->numel, m.element, c->n);
  if (c->n == 1) {
    c->sequence++;
    run_alone(call, put);
    return PHX_OK;
  }
  uint64_t sequence = ++c->sequence;
  shm_lane *lane = c->lane[c->me];
  const int64_t got = shm_got_bytes(call->op, put, c->n);
  shm_record mine = {sequence, call->numel, -1, -1, call->op, call->dtype, call->reduce, call->root};
  int small = put_in_slot(call, put, lane->slot[sequence & 1].data);
  if (!small) {
    mine.src = shm_arena_offset(c, call->src, put);
    mine.dst = shm_arena_offset(c, call->dst, got);
  }
  PHX_TRY(shm_arrive(call, &mine, err));
  if (small) {
    if (put > 0) run_small(&m, sequence);
    return PHX_OK;
  }
  for (int32_t p = 0; p < c->n; p++) m.record[p] = c->lane[p]->slot[sequence & 1].record;
  return is_direct(&m) ? run_direct(&m, err) : run_staged(&m, err);
}
