/* harness_host.c - what a strategy under test calls back: memory, extensions, collectives as they are issued, the
 * optimizer's update and the norm.  Threads: the rank's, and for updates a stream's; what ranks share is under
 * run.lock. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "harness_inner.h"

static void h_log(void *ctx, int32_t level, const char *message) {
  (void)ctx;
  if (level <= PHX_LOG_INFO && getenv("HARNESS_LOG")) fprintf(stderr, "%s\n", message);
}
static void h_metric(void *ctx, const char *name, double value) {
  (void)ctx, (void)name, (void)value;
}

static phx_status h_alloc(void *ctx, const phx_memory *what, void **out, phx_error *err) {
  rank_state *k = ctx;
  const harness_config *c = k->run->c;
  harness_rank *o = k->out;
  int64_t bytes = phx_align_bytes(what->bytes);
  o->allocations++;
  if (k->steady) o->steady_allocations++;
  if (what->bytes <= 0 || what->kind < 0 || what->kind >= PHX_MEM_KINDS || k->n_live == ALLOCATIONS)
    return phx_fail(err, PHX_INVALID, "alloc of %lld bytes, kind %d", (long long)what->bytes, what->kind);
  if (o->allocations == c->fail_alloc && (c->fail_rank < 0 || c->fail_rank == k->rank))
    return phx_fail(err, PHX_NOMEM, "allocation %lld was made to fail", (long long)o->allocations);
  void *p = aligned_alloc(PHX_ALIGN, (size_t)bytes);
  if (!p) return phx_fail(err, PHX_NOMEM, "%lld bytes", (long long)bytes);
  memset(p, 0, (size_t)bytes);
  k->live[k->n_live++] = (allocation){p, bytes, what->kind, what->comm != NULL};
  k->bytes[what->kind] += bytes;
  if (k->bytes[what->kind] > o->peak[what->kind]) o->peak[what->kind] = k->bytes[what->kind];
  if (what->comm) {
    k->arena += bytes;
    if (k->arena > o->arena_peak) o->arena_peak = k->arena;
    o->arena_order = toy_mix(o->arena_order ^ (uint64_t)bytes);
  }
  *out = p;
  return PHX_OK;
}

static void h_release(void *ctx, void *p) {
  rank_state *k = ctx;
  if (!p) return;
  for (int i = 0; i < k->n_live; i++) {
    if (k->live[i].p != p) continue;
    k->bytes[k->live[i].kind] -= k->live[i].bytes;
    if (k->live[i].arena) k->arena -= k->live[i].bytes;
    k->live[i] = k->live[--k->n_live];
    free(p);
    return;
  }
  harness__note(k->run, "rank %d releases memory that it does not hold", k->rank);
}

static const void *h_extension(void *ctx, const char *id) {
  rank_state *k = ctx;
  if (strcmp(id, PHX_EXT_DEVICE) == 0) return k->device;
  if (strcmp(id, PHX_EXT_COMM) == 0) return k->comm;
  if (strcmp(id, PHX_EXT_OPTIM) == 0) return &k->optim;
  return NULL;
}

static bool in_arena(const rank_state *k, const void *p) {
  for (int i = 0; i < k->n_live; i++)
    if ((const char *)p >= (const char *)k->live[i].p &&
        (const char *)p < (const char *)k->live[i].p + k->live[i].bytes)
      return k->live[i].arena;
  return false;
}

static void on_issue(void *ctx, int32_t op, int64_t numel, int64_t payload, bool on_stream, const void *src,
                     const void *dst) {
  rank_state *k = ctx;
  harness_rank *o = k->out;
  o->calls[op]++;
  o->sent[op] += payload;
  if (k->steady && numel > 0 && k->topology.world_size > 1 && op != PHX_OP_SEND && op != PHX_OP_RECV &&
      op != PHX_OP_BARRIER &&
      (!in_arena(k, src) || (op == PHX_OP_ALL_REDUCE && !in_arena(k, dst)) ||
       (op == PHX_OP_ALL_GATHER && !in_arena(k, dst))))
    o->staged_calls++;
  if (o->n_trace == k->trace_room) {
    k->trace_room = k->trace_room ? 2 * k->trace_room : 256;
    o->trace = realloc(o->trace, k->trace_room * sizeof *o->trace);
    if (!o->trace) abort();
  }
  o->trace[o->n_trace++] =
      (harness_call){op, numel, payload, on_stream, (int32_t)k->step, k->pass, k->stage, k->in_acquire};
}

/* ---- optimizer ---- */
typedef struct update_call {
  rank_state *k;
  int64_t step;
  float scale;
  phx_ticket t;
} update_call;

static phx_status update_fn(void *arg, phx_error *err) {
  update_call *u = arg;
  run *r = u->k->run;
  const phx_ticket *t = &u->t;
  int64_t base = toy_first(r->t, t->unit, 0) + t->first;
  float *w = t->master ? t->master : t->weight;
  uint16_t *low = t->master ? t->weight : NULL;
  const float *g = t->gradient;
  (void)err;
  if (!harness__same_bits(r, g, r->ref->gradients[u->step - 1] + base, t->numel)) {
    int64_t e = harness__first_different(g, r->ref->gradients[u->step - 1] + base, t->numel);
    harness__note(r, "step %lld rank %d: ticket's gradient of unit %u differs at element %lld: %.9g, expected %.9g",
                  (long long)u->step, u->k->rank, t->unit, (long long)(t->first + e), (double)g[e],
                  (double)r->ref->gradients[u->step - 1][base + e]);
  }
  if (!harness__same_bits(r, w, r->ref->weights[u->step - 1] + base, t->numel))
    harness__note(r, "step %lld rank %d: ticket's weight of unit %u differs", (long long)u->step, u->k->rank, t->unit);
  if (low) harness__check_low(u->k, low, w, t->numel, "ticket", t->unit);
  for (int64_t e = 0; e < t->numel;) { /* split at parameter borders */
    int32_t owner = r->t->owner[0][base + e];
    int64_t n = 1;
    while (e + n < t->numel && r->t->owner[0][base + e + n] == owner) n++;
    if (owner >= 0)
      toy_optim_update(&r->what.optim, u->step, r->t->params[owner].flags & PHX_PARAM_DECAY, u->scale, w + e, g + e,
                       r->what.optim.adamw ? (float *)t->states[0] + e : NULL,
                       r->what.optim.adamw ? (float *)t->states[1] + e : NULL, n);
    for (int64_t i = e; low && owner >= 0 && i < e + n; i++) low[i] = toy_bf16(w[i]);
    e += n;
  }
  return PHX_OK;
}

static phx_status o_update(void *ctx, const phx_ticket *t, float scale, phx_error *err) {
  rank_state *k = ctx;
  run *r = k->run;
  harness_rank *o = k->out;
  if (t->unit >= r->t->model.n_units || t->numel <= 0 || t->first < 0 ||
      t->weight_dtype != (harness__masters(r) ? PHX_BF16 : PHX_F32) || (t->master != NULL) != harness__masters(r) ||
      !t->weight || t->gradient_dtype != PHX_F32 || t->first + t->numel > r->t->units[t->unit].blocks[0] * PHX_BLOCK)
    return phx_fail(err, PHX_INVALID, "a ticket of unit %u, elements %lld + %lld", t->unit, (long long)t->first,
                    (long long)t->numel);
  pthread_mutex_lock(&r->lock);
  for (int64_t e = 0; e < t->numel; e++)
    r->update_cover[(k->step - 1) * r->t->elements[0] + toy_first(r->t, t->unit, 0) + t->first + e]++;
  pthread_mutex_unlock(&r->lock);
  if (o->n_tickets == k->ticket_room) {
    k->ticket_room = k->ticket_room ? 2 * k->ticket_room : 64;
    o->tickets = realloc(o->tickets, k->ticket_room * sizeof *o->tickets);
    if (!o->tickets) abort();
  }
  o->tickets[o->n_tickets++] = (harness_ticket){(int32_t)k->step, t->unit, t->first, t->numel, t->gradient};
  update_call u = {k, k->step, scale, *t};
  return loopback_submit(k->device, t->stream, update_fn, &u, sizeof u, err);
}

/* ---- norm ---- */
phx_status harness__norm_add(void *ctx, uint32_t unit, int64_t first_block, int64_t blocks, const float *gradient,
                             phx_stream *stream, phx_error *err) {
  rank_state *k = ctx;
  run *r = k->run;
  if (unit >= r->t->model.n_units || first_block < 0 || blocks <= 0 ||
      first_block + blocks > r->t->units[unit].blocks[0])
    return phx_fail(err, PHX_INVALID, "norm of unit %u, blocks %lld + %lld", unit, (long long)first_block,
                    (long long)blocks);
  PHX_TRY(k->device->stream_synchronize(k->device->ctx, stream, err));
  int64_t block = r->t->units[unit].first_block[0] + first_block;
  const float *want = r->ref->gradients[k->step - 1] + block * PHX_BLOCK;
  if (!harness__same_bits(r, gradient, want, blocks * PHX_BLOCK)) {
    int64_t e = harness__first_different(gradient, want, blocks * PHX_BLOCK);
    harness__note(
        r, "step %lld rank %d: gradient of unit %u given to the norm differs at element %lld: %.9g, expected %.9g",
        (long long)k->step, k->rank, unit, (long long)(first_block * PHX_BLOCK + e), (double)gradient[e],
        (double)want[e]);
  }
  pthread_mutex_lock(&r->lock);
  for (int64_t b = 0; b < blocks; b++) r->norm_cover[(k->step - 1) * r->blocks + block + b]++;
  pthread_mutex_unlock(&r->lock);
  k->out->norm_blocks += blocks;
  return PHX_OK;
}

void harness__host(rank_state *k) {
  const harness_config *c = k->run->c;
  k->watch = (loopback_watch){k, on_issue};
  k->host = (phx_host){.struct_size = sizeof(phx_host),
                       .abi_major = PHX_ABI_MAJOR,
                       .abi_minor = PHX_ABI_MINOR,
                       .ctx = k,
                       .rank = k->rank,
                       .world_size = c->ranks,
                       .local_rank = k->rank,
                       .local_size = c->ranks,
                       .log = h_log,
                       .alloc = h_alloc,
                       .release = h_release,
                       .extension = h_extension,
                       .metric = h_metric};
  k->optim = (phx_optim){.struct_size = sizeof(phx_optim),
                         .ctx = k,
                         .name = c->sgd ? "sgd" : "adamw",
                         .grain = PHX_GRAIN_ELEMENT,
                         .n_states = c->sgd ? 0 : 2,
                         .states = {{"m", PHX_F32, 0}, {"v", PHX_F32, 0}},
                         .update = o_update};
}
