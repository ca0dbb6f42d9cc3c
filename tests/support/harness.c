/* harness.c - see harness.h.  Each rank is a thread; `run` is shared and its mutable part is under run.lock. */
#include "harness.h"
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "root.h"
#include "status.h"

typedef struct allocation {
  void *p;
  int64_t bytes;
  int32_t kind;
  bool arena;
} allocation;
enum { ALLOCATIONS = 512, SLOTS = 16 };

typedef struct run run;
typedef struct rank_state {
  run *run;
  int32_t rank;
  harness_rank *out;
  phx_host host;
  phx_optim optim;
  phx_device *device;
  phx_comm *comm;
  phx_topology topology;
  phx_layout layout;
  uint8_t stage_owned[TOY_STAGES], unit_owned[TOY_UNITS];
  loopback_watch watch;
  allocation live[ALLOCATIONS];
  int n_live;
  int64_t bytes[PHX_MEM_KINDS], arena;
  bool steady;
  int64_t step; /* from 1 */
  int32_t pass, stage;
  bool in_acquire;
  size_t trace_room, ticket_room;
  float boundary[SLOTS][TOY_STAGES + 1][2][TOY_BOUNDARY]; /* [slot][stage + 1][gradient]; stage -1 is the data */
  phx_strategy *strategy;
  int32_t micro_batch;
} rank_state;

struct run {
  const harness_config *c;
  toy_run what;
  const toy *t;
  toy_reference *ref;
  const phx_plugin *plugin;
  const phx_strategy_table *table;
  void *config;
  loopback_world *world;
  pthread_mutex_t lock;
  harness_result *result;
  uint8_t *norm_cover, *update_cover; /* (steps, blocks), (steps, elements) */
  uint8_t *state_cover[7][PHX_FLATS]; /* by state: weight, master, four optimizer states, buffer */
  int64_t blocks;
  rank_state ranks[HARNESS_RANKS];
};

/* The first difference is kept. */
static void note(run *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void note(run *r, const char *format, ...) {
  va_list ap;
  pthread_mutex_lock(&r->lock);
  if (r->result->ok) {
    va_start(ap, format);
    vsnprintf(r->result->message, sizeof r->result->message, format, ap);
    va_end(ap);
    r->result->ok = false;
  }
  pthread_mutex_unlock(&r->lock);
}

/* ---- options ---- */
static phx_status parse_scalar(const phx_option *o, const char *text, void *config, phx_error *err) {
  char *at = (char *)config + o->offset, *end = NULL;
  if (o->type == PHX_OPT_STRING) {
    memcpy(at, &text, sizeof text);
    return PHX_OK;
  }
  if (o->type == PHX_OPT_ENUM || o->type == PHX_OPT_BOOL) {
    static const char *const truth[] = {"no", "yes", NULL};
    const char *const *choices = o->type == PHX_OPT_ENUM ? o->choices : truth;
    for (int32_t i = 0; choices[i]; i++) {
      if (strcmp(choices[i], text) != 0) continue;
      memcpy(at, &i, sizeof i);
      return PHX_OK;
    }
    return phx__fail(err, PHX_INVALID, "%s = %s: no such choice", o->name, text);
  }
  if (o->type == PHX_OPT_REAL) {
    double x = strtod(text, &end);
    if (*end || x < o->rmin || x > o->rmax) return phx__fail(err, PHX_INVALID, "%s = %s", o->name, text);
    memcpy(at, &x, sizeof x);
    return PHX_OK;
  }
  int64_t x = -1;
  if (!(strcmp(text, "auto") == 0 && (o->flags & PHX_OPTF_AUTO))) {
    double d = strtod(text, &end);
    x = (int64_t)d;
    while (*end == ' ') end++;
    if (o->type == PHX_OPT_BYTES && *end) {
      x *= *end == 'K' ? 1 << 10 : *end == 'M' ? 1 << 20 : *end == 'G' ? 1 << 30 : 1;
      end += strlen(end);
    }
    if (*end || x < o->imin || x > o->imax)
      return phx__fail(err, PHX_INVALID, "%s = %s is outside %lld .. %lld", o->name, text, (long long)o->imin,
                       (long long)o->imax);
  }
  memcpy(at, &x, sizeof x);
  return PHX_OK;
}

static const phx_option *option(const phx_plugin *p, uint32_t i) {
  return (const phx_option *)(const void *)((const char *)p->options + (size_t)i * p->option_stride);
}

/* text is cut at its spaces and '=' and must outlive the config. */
static phx_status parse_options(const phx_plugin *p, char *text, void *config, phx_error *err) {
  phx_status status = PHX_OK;
  for (uint32_t i = 0; i < p->n_options; i++)
    if (option(p, i)->dflt) PHX__TRY(parse_scalar(option(p, i), option(p, i)->dflt, config, err));
  for (char *save = NULL, *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
    char *value = strchr(word, '=');
    const phx_option *found = NULL;
    if (value) *value++ = 0;
    for (uint32_t i = 0; i < p->n_options; i++)
      if (strcmp(option(p, i)->name, word) == 0) found = option(p, i);
    if (!found || !value) {
      status = phx__fail(err, PHX_INVALID, "unknown option %s", word);
      goto done;
    }
    PHX__TRY(parse_scalar(found, value, config, err));
  }
done:
  return status;
}

const phx_plugin *harness_plugin(const char *strategy, phx_error *err) {
  char path[4096];
  if (strchr(strategy, '/'))
    snprintf(path, sizeof path, "%s", strategy);
  else
    snprintf(path, sizeof path, "%s/lib/phalanx/phx_strategy_%s.so", test_root(), strategy);
  void *so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void *entry = so ? dlsym(so, PHX_ENTRY_SYMBOL) : NULL;
  phx_plugin_entry *call = NULL;
  if (!entry) {
    phx__fail(err, PHX_INVALID, "%s", dlerror());
    return NULL;
  }
  memcpy(&call, &entry, sizeof call);
  return call();
}

/* ---- host ---- */
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
    return phx__fail(err, PHX_INVALID, "alloc of %lld bytes, kind %d", (long long)what->bytes, what->kind);
  if (o->allocations == c->fail_alloc && (c->fail_rank < 0 || c->fail_rank == k->rank))
    return phx__fail(err, PHX_NOMEM, "allocation %lld was made to fail", (long long)o->allocations);
  void *p = aligned_alloc(PHX_ALIGN, (size_t)bytes);
  if (!p) return phx__fail(err, PHX_NOMEM, "%lld bytes", (long long)bytes);
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
  note(k->run, "rank %d releases memory that it does not hold", k->rank);
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
  if (numel > 0 && k->topology.world_size > 1 && op != PHX_OP_SEND && op != PHX_OP_RECV && op != PHX_OP_BARRIER &&
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

/* ---- comparing with the reference ---- */
static bool same_bits(run *r, const float *got, const float *want, int64_t n) {
  return r->c->tolerance > 0 || memcmp(got, want, (size_t)n * sizeof(float)) == 0;
}

static int64_t first_different(const float *got, const float *want, int64_t n) {
  for (int64_t e = 0; e < n; e++)
    if (memcmp(got + e, want + e, sizeof *got) != 0) return e;
  return n;
}

/* The low-precision copy: always the master's value, rounded. */
static void check_low(rank_state *k, const uint16_t *low, const float *master, int64_t n, const char *where,
                      uint32_t unit) {
  if (k->run->c->tolerance > 0) return;
  for (int64_t e = 0; e < n; e++)
    if (low[e] != toy_bf16(master[e])) {
      note(k->run, "step %lld rank %d: %s: low-precision weight %lld of unit %u is %.9g, its master %.9g",
           (long long)k->step, k->rank, where, (long long)e, unit, (double)toy_from_bf16(low[e]), (double)master[e]);
      return;
    }
}

static bool masters(const run *r) { return r->c->compute_dtype == PHX_BF16; }

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
  if (!same_bits(r, g, r->ref->gradients[u->step - 1] + base, t->numel)) {
    int64_t e = first_different(g, r->ref->gradients[u->step - 1] + base, t->numel);
    note(r, "step %lld rank %d: ticket's gradient of unit %u differs at element %lld: %.9g, expected %.9g",
         (long long)u->step, u->k->rank, t->unit, (long long)(t->first + e), (double)g[e],
         (double)r->ref->gradients[u->step - 1][base + e]);
  }
  if (!same_bits(r, w, r->ref->weights[u->step - 1] + base, t->numel))
    note(r, "step %lld rank %d: ticket's weight of unit %u differs", (long long)u->step, u->k->rank, t->unit);
  if (low) check_low(u->k, low, w, t->numel, "ticket", t->unit);
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
      t->weight_dtype != (masters(r) ? PHX_BF16 : PHX_F32) || (t->master != NULL) != masters(r) || !t->weight ||
      t->gradient_dtype != PHX_F32 || t->first + t->numel > r->t->units[t->unit].blocks[0] * PHX_BLOCK)
    return phx__fail(err, PHX_INVALID, "a ticket of unit %u, elements %lld + %lld", t->unit, (long long)t->first,
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
static phx_status n_add(void *ctx, uint32_t unit, int64_t first_block, int64_t blocks, const float *gradient,
                        phx_stream *stream, phx_error *err) {
  rank_state *k = ctx;
  run *r = k->run;
  phx_status status = PHX_OK;
  if (unit >= r->t->model.n_units || first_block < 0 || blocks <= 0 ||
      first_block + blocks > r->t->units[unit].blocks[0])
    return phx__fail(err, PHX_INVALID, "norm of unit %u, blocks %lld + %lld", unit, (long long)first_block,
                     (long long)blocks);
  PHX__TRY(k->device->stream_synchronize(k->device->ctx, stream, err));
  int64_t block = r->t->units[unit].first_block[0] + first_block;
  const float *want = r->ref->gradients[k->step - 1] + block * PHX_BLOCK;
  if (!same_bits(r, gradient, want, blocks * PHX_BLOCK)) {
    int64_t e = first_different(gradient, want, blocks * PHX_BLOCK);
    note(r, "step %lld rank %d: gradient of unit %u given to the norm differs at element %lld: %.9g, expected %.9g",
         (long long)k->step, k->rank, unit, (long long)(first_block * PHX_BLOCK + e), (double)gradient[e],
         (double)want[e]);
  }
  pthread_mutex_lock(&r->lock);
  for (int64_t b = 0; b < blocks; b++) r->norm_cover[(k->step - 1) * r->blocks + block + b]++;
  pthread_mutex_unlock(&r->lock);
  k->out->norm_blocks += blocks;
done:
  return status;
}

/* ---- state ---- */
static int state_row(const phx_slice *s) {
  if (s->kind == PHX_STATE_OPTIM) return s->state_index < PHX_OPTIM_STATES_MAX ? 2 + (int)s->state_index : -1;
  return s->kind == PHX_STATE_WEIGHT ? 0 : s->kind == PHX_STATE_MASTER ? 1 : s->kind == PHX_STATE_BUFFER ? 6 : -1;
}

static void compare_state(rank_state *k, const phx_slice *s, const float *p, int64_t base) {
  run *r = k->run;
  const float *want = s->kind == PHX_STATE_OPTIM ? (s->state_index ? r->ref->v : r->ref->m)
                      : s->flat                  ? r->ref->frozen
                                                 : r->ref->weights[r->what.steps];
  uint64_t sum = 0;
  double worst = 0;
  want += base;
  for (int64_t b = 0; b < s->blocks; b++) {
    uint64_t h =
        toy_mix(((uint64_t)s->kind * 8 + s->state_index) * 1000003u + (uint64_t)(base / PHX_BLOCK + b) * 2 + s->flat);
    for (int64_t e = b * PHX_BLOCK; e < (b + 1) * PHX_BLOCK; e++) {
      uint32_t bits;
      if (r->t->owner[s->flat][base + e] < 0) continue;
      memcpy(&bits, p + e, sizeof bits);
      h = toy_mix(h ^ bits);
      double d = fabs((double)p[e] - (double)want[e]);
      worst = d > worst || isnan(d) ? d : worst;
    }
    sum += h;
  }
  if (!same_bits(r, p, want, s->blocks * PHX_BLOCK)) {
    int64_t e = first_different(p, want, s->blocks * PHX_BLOCK);
    note(r,
         "at the end, rank %d: state kind %d index %u of unit %u flat %u differs at element %lld: %.9g, expected %.9g",
         k->rank, s->kind, s->state_index, s->unit, s->flat, (long long)(s->first_block * PHX_BLOCK + e), (double)p[e],
         (double)want[e]);
  }
  pthread_mutex_lock(&r->lock);
  if (s->kind == PHX_STATE_OPTIM)
    r->result->hash[5 + s->state_index] += sum;
  else
    r->result->hash[s->kind] += sum;
  if (s->kind == (masters(r) ? PHX_STATE_MASTER : PHX_STATE_WEIGHT) && !(worst <= r->result->max_difference))
    r->result->max_difference = worst;
  pthread_mutex_unlock(&r->lock);
}

typedef struct visit {
  rank_state *k;
  bool init;
} visit;

static phx_status v_slice(void *ctx, const phx_slice *s, phx_error *err) {
  visit *v = ctx;
  rank_state *k = v->k;
  run *r = k->run;
  int32_t mode = v->init ? PHX_MAP_WRITE : PHX_MAP_READ;
  int row = state_row(s);
  bool low = s->kind == PHX_STATE_WEIGHT && masters(r);
  int32_t values = masters(r) ? PHX_STATE_MASTER : PHX_STATE_WEIGHT;
  void *p = NULL;
  phx_status status = PHX_OK;
  if (s->kind == PHX_STATE_PRIVATE) return PHX_OK;
  if (row < 0 || s->flat >= PHX_FLATS || s->unit >= r->t->model.n_units || s->blocks <= 0 || s->first_block < 0 ||
      s->first_block + s->blocks > r->t->units[s->unit].blocks[s->flat] || s->dtype != (low ? PHX_BF16 : PHX_F32) ||
      s->place == PHX_SPACE_PINNED)
    return phx__fail(err, PHX_INVALID, "slice kind %d unit %u flat %u blocks %lld + %lld dtype %d", s->kind, s->unit,
                     s->flat, (long long)s->first_block, (long long)s->blocks, s->dtype);
  int64_t block = r->t->units[s->unit].first_block[s->flat] + s->first_block;
  PHX__TRY(r->table->map(k->strategy, s, mode, &p, err));
  float *x = p;
  for (int64_t e = 0; v->init && !low && e < s->blocks * PHX_BLOCK; e++) {
    int32_t owner = r->t->owner[s->flat][block * PHX_BLOCK + e];
    int64_t at = owner < 0 ? 0 : s->first_block * PHX_BLOCK + e - r->t->params[owner].offset;
    x[e] = owner < 0 || s->kind != values ? 0 : toy_initial(r->t, r->c->seed, (uint32_t)owner, at);
  }
  if (!v->init && !low) compare_state(k, s, x, block * PHX_BLOCK);
  if (!v->init && low)
    check_low(k, p, (s->flat ? r->ref->frozen : r->ref->weights[r->what.steps]) + block * PHX_BLOCK,
              s->blocks * PHX_BLOCK, "at the end", s->unit);
  PHX__TRY(r->table->unmap(k->strategy, s, mode, p, err));
  if (!v->init) {
    pthread_mutex_lock(&r->lock);
    for (int64_t b = 0; b < s->blocks; b++) r->state_cover[row][s->flat][block + b]++;
    pthread_mutex_unlock(&r->lock);
  }
done:
  return status;
}

static phx_status visit_all(rank_state *k, bool init, phx_error *err) {
  visit v = {k, init};
  phx_visitor visitor = {sizeof visitor, &v, v_slice};
  return k->run->table->visit_state(k->strategy, &visitor, err);
}

/* ---- running stages ---- */
static void check_view(rank_state *k, uint32_t stage, int32_t pass, const phx_view *view) {
  run *r = k->run;
  const phx_stage *s = &r->t->stages[stage];
  uint32_t n = 0;
  bool update_done = pass == PHX_PASS_EVALUATE; /* an evaluation follows the update of its step */
  const float *weights = r->ref->weights[update_done ? k->step : k->step - 1];
  for (uint32_t i = 0; i < s->n_uses; i++) {
    const phx_use *use = &r->t->uses[s->first_use + i];
    const phx_unit *u = &r->t->units[use->unit];
    bool read = pass == PHX_PASS_BACKWARD ? use->flags & PHX_USE_BACKWARD : use->flags & PHX_USE_FORWARD;
    for (uint32_t p = u->first_param; p < u->first_param + u->n_params; p++, n++) {
      if (n >= view->n_params) break;
      const phx_param_view *v =
          (const phx_param_view *)(const void *)((const char *)view->params + n * view->param_stride);
      bool frozen = (r->t->params[p].flags & PHX_PARAM_FROZEN) != 0;
      bool wants = pass == PHX_PASS_BACKWARD && (use->flags & PHX_USE_GRADIENT) && !frozen;
      const float *want =
          (frozen ? r->ref->frozen : weights) + toy_first(r->t, use->unit, frozen) + r->t->params[p].offset;
      if (v->param != p || (v->gradient != NULL) != wants || (read && !v->weight) ||
          (wants && v->gradient_mode != PHX_GRAD_WRITE && v->gradient_mode != PHX_GRAD_ADD)) {
        note(r,
             "step %lld rank %d stage %u pass %d: view of param %u is wrong (param %u, weight %p, gradient %p mode %d)",
             (long long)k->step, k->rank, stage, pass, p, v->param, v->weight, v->gradient, v->gradient_mode);
        abort(); /* running on would crash elsewhere */
      }
      if (read && masters(r) && v->weight_dtype == PHX_BF16) {
        check_low(k, v->weight, want, r->t->params[p].numel, "as read", use->unit);
        continue;
      }
      if (read && (v->weight_dtype != PHX_F32 || masters(r) || !same_bits(r, v->weight, want, r->t->params[p].numel)))
        note(r, "step %lld rank %d stage %u pass %d: weight of %s as read differs at element %lld", (long long)k->step,
             k->rank, stage, pass, r->t->params[p].name,
             (long long)first_different(v->weight, want, r->t->params[p].numel));
    }
  }
  if (n != view->n_params) note(r, "stage %u: the view has %u params, expected %u", stage, view->n_params, n);
}

static void run_stage(rank_state *k, uint32_t stage, int32_t pass, int32_t mb, int32_t slot, const phx_view *view) {
  const toy *t = k->run->t;
  bool back = pass == PHX_PASS_BACKWARD;
  int32_t data_rank = k->layout.data_rank;
  float(*in)[TOY_BOUNDARY] = k->boundary[slot][stage], (*out)[TOY_BOUNDARY] = k->boundary[slot][stage + 1];
  if (stage == 0 && !back) toy_data(in[0], k->step, mb, data_rank);
  toy_call c = {.t = t,
                .stage = stage,
                .step = k->step,
                .micro_batch = mb,
                .data_rank = data_rank,
                .params = view->params,
                .n_params = view->n_params,
                .param_stride = view->param_stride,
                .input = in[0],
                .output = out[0],
                .d_output = stage + 1 < t->model.n_stages ? out[1] : NULL,
                .d_input = stage ? in[1] : NULL};
  bool runs = !t->runs || t->runs(stage, k->step, mb, data_rank);
  if (runs && back) toy_backward(&c);
  if (runs && !back) toy_forward(&c);
  if (!runs && back && stage) memcpy(in[1], out[1], sizeof in[1]);
  if (!runs && !back) memcpy(out[0], in[0], sizeof in[0]);
}

static int64_t count_in_flight(const rank_state *k) {
  phx_comm_stats stats = {.struct_size = sizeof stats};
  int64_t n = (int64_t)k->out->n_trace;
  k->comm->stats(k->comm->ctx, &stats);
  for (int i = 0; i < PHX_OPS; i++) n -= stats.calls[i];
  return n;
}

static phx_status pass_stage(rank_state *k, uint32_t stage, int32_t pass, int32_t mb, phx_error *err) {
  run *r = k->run;
  const phx_view *view = NULL;
  phx_status status = PHX_OK;
  bool runs = !r->t->runs || r->t->runs(stage, k->step, mb, k->layout.data_rank);
  uint32_t flags = pass != PHX_PASS_BACKWARD ? 0 : PHX_RELEASE_LAST_USE | (runs ? 0 : PHX_RELEASE_NO_GRADIENT);
  k->pass = pass, k->stage = (int32_t)stage, k->in_acquire = true;
  PHX__TRY(r->table->acquire(k->strategy, stage, pass, mb, NULL, &view, err));
  k->in_acquire = false;
  if (!view) {
    status = phx__fail(err, PHX_INTERNAL, "acquire of stage %u gave no view", stage);
    goto done;
  }
  if (runs || pass == PHX_PASS_EVALUATE) { /* a stage that does not run waits for nothing and reads nothing */
    if (view->ready) PHX__TRY(k->device->stream_wait(k->device->ctx, NULL, view->ready, err));
    if (pass == PHX_PASS_FORWARD) k->out->forward_in_flight[stage] = count_in_flight(k);
    check_view(k, stage, pass, view);
  }
  if (pass != PHX_PASS_RECOMPUTE) run_stage(k, stage, pass, mb, 0, view);
  PHX__TRY(r->table->release(k->strategy, stage, pass, mb, flags, NULL, err));
  int64_t in_flight = pass == PHX_PASS_BACKWARD ? count_in_flight(k) : 0;
  if (in_flight > k->out->most_in_flight) k->out->most_in_flight = in_flight;
done:
  k->pass = k->stage = -1;
  return status;
}

/* A stage is worth recomputing when its backward pass reads what its forward pass reads (not an embedding). */
static bool recomputes(const run *r, uint32_t stage) {
  const phx_stage *s = &r->t->stages[stage];
  for (uint32_t i = 0; i < s->n_uses; i++) {
    uint32_t flags = r->t->uses[s->first_use + i].flags;
    if ((flags & PHX_USE_FORWARD) && !(flags & PHX_USE_BACKWARD)) return false;
  }
  return r->c->recompute;
}

static phx_status micro_batches(rank_state *k, phx_error *err) {
  run *r = k->run;
  uint32_t n = r->t->model.n_stages;
  phx_status status = PHX_OK;
  for (int32_t mb = 0; mb < r->what.accumulate; mb++) {
    PHX__TRY(r->table->begin_micro_batch(k->strategy, mb, mb + 1 == r->what.accumulate, err));
    for (uint32_t s = 0; s < n; s++) PHX__TRY(pass_stage(k, s, PHX_PASS_FORWARD, mb, err));
    for (uint32_t s = n; s-- > 0;) {
      if (recomputes(r, s)) PHX__TRY(pass_stage(k, s, PHX_PASS_RECOMPUTE, mb, err));
      PHX__TRY(pass_stage(k, s, PHX_PASS_BACKWARD, mb, err));
    }
  }
done:
  return status;
}

/* ---- executor of run_step ---- */
static int64_t x_boundary_bytes(void *ctx, uint32_t stage) {
  (void)ctx, (void)stage;
  return TOY_BOUNDARY * 4;
}
static void *x_boundary(void *ctx, uint32_t stage, int32_t slot, int32_t gradient) {
  return ((rank_state *)ctx)->boundary[slot][stage + 1][gradient];
}
static phx_status x_run(rank_state *k, uint32_t stage, int32_t pass, int32_t mb, int32_t slot, const phx_view *view,
                        phx_error *err) {
  phx_status status = PHX_OK;
  if (slot < 0 || slot >= SLOTS || slot >= k->layout.activation_slots || !k->stage_owned[stage])
    return phx__fail(err, PHX_INVALID, "stage %u in slot %d", stage, slot);
  if (view->ready) PHX__TRY(k->device->stream_wait(k->device->ctx, NULL, view->ready, err));
  check_view(k, stage, pass, view);
  run_stage(k, stage, pass, mb, slot, view);
done:
  return status;
}
static phx_status x_forward(void *ctx, uint32_t stage, int32_t mb, int32_t slot, const phx_view *view, phx_error *err) {
  return x_run(ctx, stage, PHX_PASS_FORWARD, mb, slot, view, err);
}
static phx_status x_backward(void *ctx, uint32_t stage, int32_t mb, int32_t slot, const phx_view *view,
                             phx_error *err) {
  return x_run(ctx, stage, PHX_PASS_BACKWARD, mb, slot, view, err);
}

static int32_t x_runs(void *ctx, uint32_t stage, int32_t mb) {
  const rank_state *k = ctx;
  return !k->run->t->runs || k->run->t->runs(stage, k->step, mb, k->layout.data_rank);
}

/* ---- a rank ---- */
static void compare_plan(rank_state *k) {
  run *r = k->run;
  const phx_estimate *e = &k->out->planned;
  if (r->c->ignore_plan) return;
  for (int i = 0; i < PHX_OPS; i++) {
    if (e->sent[i] != k->out->sent[i] || e->calls[i] != k->out->calls[i])
      note(r, "step %lld rank %d: %s: planned %lld calls and %lld bytes, measured %lld and %lld", (long long)k->step,
           k->rank, phx_op_name(i), (long long)e->calls[i], (long long)e->sent[i], (long long)k->out->calls[i],
           (long long)k->out->sent[i]);
  }
}

static phx_status one_step(rank_state *k, phx_error *err) {
  run *r = k->run;
  const phx_strategy_table *t = r->table;
  phx_status status = PHX_OK;
  bool discard = k->step == r->c->discard_step;
  phx_accumulator acc = {sizeof acc, k, n_add};
  int64_t calls[PHX_OPS], sent[PHX_OPS];
  memcpy(calls, k->out->calls, sizeof calls), memcpy(sent, k->out->sent, sizeof sent);
  memset(k->out->calls, 0, sizeof calls), memset(k->out->sent, 0, sizeof sent);
  k->out->norm_blocks = 0;
  if (t->run_step) {
    phx_executor x = {.struct_size = sizeof x,
                      .ctx = k,
                      .micro_batches = r->what.accumulate,
                      .n_stages = r->t->model.n_stages,
                      .boundary_bytes = x_boundary_bytes,
                      .boundary = x_boundary,
                      .forward = x_forward,
                      .backward = x_backward,
                      .runs = x_runs};
    PHX__TRY(t->run_step(k->strategy, &x, err));
  } else {
    PHX__TRY(micro_batches(k, err));
  }
  if (discard && r->c->discard_early) {
    PHX__TRY(t->discard_gradients(k->strategy, err));
  } else {
    PHX__TRY(t->finish_gradients(k->strategy, err));
    PHX__TRY(t->gradient_norm(k->strategy, &acc, err));
    if (discard) PHX__TRY(t->discard_gradients(k->strategy, err));
  }
  if (discard) goto done;
  PHX__TRY(t->update(k->strategy, k->step, (float)(1.0 / ((double)r->what.data_ranks * r->what.accumulate)), err));
  compare_plan(k);
done:
  if (discard) memcpy(k->out->calls, calls, sizeof calls), memcpy(k->out->sent, sent, sizeof sent);
  return status;
}

static phx_status evaluate(rank_state *k, phx_error *err) {
  phx_status status = PHX_OK;
  int64_t calls[PHX_OPS], sent[PHX_OPS];
  memcpy(calls, k->out->calls, sizeof calls), memcpy(sent, k->out->sent, sizeof sent);
  for (uint32_t s = 0; s < k->run->t->model.n_stages; s++) PHX__TRY(pass_stage(k, s, PHX_PASS_EVALUATE, 0, err));
  memcpy(k->out->calls, calls, sizeof calls), memcpy(k->out->sent, sent, sizeof sent);
done:
  return status;
}

#define SIX TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4, TOY_BOUNDARY * 4
static const int64_t boundary_bytes[TOY_STAGES] = {SIX, SIX, SIX, SIX};

static phx_status fill_topology(run *r, int32_t rank, phx_topology *t, phx_layout *l, uint8_t *stages, uint8_t *units,
                                phx_error *err) {
  const harness_config *c = r->c;
  *t = (phx_topology){.struct_size = sizeof *t,
                      .rank = rank,
                      .world_size = c->ranks,
                      .local_rank = rank,
                      .local_size = c->ranks,
                      .accumulate = c->accumulate ? c->accumulate : 1,
                      .reduce = c->reduce,
                      .compute_dtype = c->compute_dtype ? c->compute_dtype : PHX_F32,
                      .reduce_dtype = c->reduce_dtype ? c->reduce_dtype : PHX_F32,
                      .overlaps = 1,
                      .n_optim_states = c->sgd ? 0 : 2,
                      .optim_dtype = {PHX_F32, PHX_F32},
                      .payload = loopback_payload,
                      .boundary_bytes = boundary_bytes};
  *l = (phx_layout){.struct_size = sizeof *l,
                    .data_rank = rank,
                    .data_size = c->ranks,
                    .activation_slots = 1,
                    .n_axes = 1,
                    .axes = {{"data", c->ranks, rank}},
                    .stage_owned = stages,
                    .unit_owned = units};
  memset(stages, 1, r->t->model.n_stages);
  memset(units, 1, r->t->model.n_units);
  return r->table->layout ? r->table->layout(r->config, t, &r->t->model, l, err) : PHX_OK;
}

static phx_status rank_body(rank_state *k, phx_error *err) {
  run *r = k->run;
  const phx_strategy_table *t = r->table;
  phx_status status = PHX_OK;
  PHX__TRY(fill_topology(r, k->rank, &k->topology, &k->layout, k->stage_owned, k->unit_owned, err));
  k->out->planned.struct_size = sizeof k->out->planned;
  PHX__TRY(t->estimate(r->config, &k->topology, &r->t->model, &k->out->planned, err));
  PHX__TRY(t->create(&k->host, r->config, &k->topology, &r->t->model, &k->strategy, err));
  PHX__TRY(visit_all(k, true, err));
  PHX__TRY(t->state_changed(k->strategy, err));
  k->steady = true;
  for (k->step = 1; k->step <= r->what.steps; k->step++) {
    PHX__TRY(one_step(k, err));
    if (r->c->evaluate) PHX__TRY(evaluate(k, err));
  }
  k->step = r->what.steps;
  PHX__TRY(visit_all(k, false, err));
  if (count_in_flight(k) != 0)
    note(r, "rank %d: %lld collectives were in flight while state was visited", k->rank,
         (long long)count_in_flight(k));
  if (t->health) PHX__TRY(t->health(k->strategy, err));
done:
  return status;
}

static void *rank_main(void *arg) {
  rank_state *k = arg;
  run *r = k->run;
  phx_error err = PHX_ERROR_INIT;
  k->device = loopback_device_create(r->c->stream_mode);
  k->watch = (loopback_watch){k, on_issue};
  k->comm = loopback_comm(r->world, k->rank, k->device, &k->watch);
  k->pass = k->stage = -1;
  k->host = (phx_host){.struct_size = sizeof(phx_host),
                       .abi_major = PHX_ABI_MAJOR,
                       .abi_minor = PHX_ABI_MINOR,
                       .ctx = k,
                       .rank = k->rank,
                       .world_size = r->c->ranks,
                       .local_rank = k->rank,
                       .local_size = r->c->ranks,
                       .log = h_log,
                       .alloc = h_alloc,
                       .release = h_release,
                       .extension = h_extension,
                       .metric = h_metric};
  k->optim = (phx_optim){.struct_size = sizeof(phx_optim),
                         .ctx = k,
                         .name = r->c->sgd ? "sgd" : "adamw",
                         .grain = PHX_GRAIN_ELEMENT,
                         .n_states = r->c->sgd ? 0 : 2,
                         .states = {{"m", PHX_F32, 0}, {"v", PHX_F32, 0}},
                         .update = o_update};
  k->out->status = rank_body(k, &err);
  k->out->error = err;
  if (k->out->status != PHX_OK) loopback_abort(r->world, err.message);
  r->table->destroy(k->strategy);
  for (int i = 0; i < k->n_live; i++) k->out->leaked_bytes += k->live[i].bytes, free(k->live[i].p);
  k->comm->destroy(k->comm);
  loopback_device_destroy(k->device);
  return NULL;
}

/* ---- the whole ---- */
static void check_coverage(run *r) {
  int want = r->c->replicas ? r->c->ranks : 1;
  for (int64_t s = 0; s < r->what.steps; s++) {
    bool skipped = s + 1 == r->c->discard_step;
    for (int64_t b = 0; b < r->blocks && !(skipped && r->c->discard_early); b++)
      if (r->norm_cover[s * r->blocks + b] != 1)
        note(r, "step %lld: block %lld of the model was added to the norm %d times", (long long)s + 1, (long long)b,
             r->norm_cover[s * r->blocks + b]);
    for (int64_t e = 0; e < r->t->elements[0] && !skipped; e++)
      if (r->t->owner[0][e] >= 0 && r->update_cover[s * r->t->elements[0] + e] != want)
        note(r, "step %lld: element %lld of the model was updated %d times", (long long)s + 1, (long long)e,
             r->update_cover[s * r->t->elements[0] + e]);
  }
  for (int row = 0; row < 4; row++)
    for (int f = 0; f < PHX_FLATS; f++)
      for (int64_t b = 0; b < r->t->model.total_blocks[f]; b++) {
        int visits = row == 0 || (row == 1 && masters(r)) || (row >= 2 && f == 0 && !r->c->sgd);
        if (r->state_cover[row][f][b] != visits)
          note(r, "state %d, flat %d, block %lld was visited %d times, expected %d", row, f, (long long)b,
               r->state_cover[row][f][b], visits);
      }
}

static void check_ranks(run *r) {
  for (int32_t i = 0; i < r->c->ranks; i++) {
    const harness_rank *o = &r->result->rank[i];
    for (int m = 0; m < PHX_MEM_KINDS && !r->c->ignore_plan; m++)
      if (o->planned.bytes[m] != o->peak[m])
        note(r, "rank %d: memory kind %d: planned %lld bytes, measured %lld", i, m, (long long)o->planned.bytes[m],
             (long long)o->peak[m]);
    if (o->planned.arena_bytes != o->arena_peak && !r->c->ignore_plan)
      note(r, "rank %d: arena: planned %lld bytes, measured %lld", i, (long long)o->planned.arena_bytes,
           (long long)o->arena_peak);
    if (o->steady_allocations)
      note(r, "rank %d: %lld allocations in the steady state", i, (long long)o->steady_allocations);
    if (o->staged_calls) note(r, "rank %d: %lld collectives on private memory", i, (long long)o->staged_calls);
    if (o->arena_order != r->result->rank[0].arena_order) note(r, "rank %d asks for other arena memory than rank 0", i);
  }
}

static phx_status open_run(run *r, const harness_config *c, char *text, phx_error *err) {
  phx_status status = PHX_OK;
  r->c = c;
  r->t = c->toy;
  r->plugin = c->plugin ? c->plugin : harness_plugin(c->strategy, err);
  if (!r->plugin) return PHX_INVALID;
  r->table = r->plugin->table;
  r->config = calloc(1, r->plugin->config_size + 1);
  if (!r->config) abort();
  PHX__TRY(parse_options(r->plugin, text, r->config, err));
done:
  return status;
}

phx_status harness_estimate(const harness_config *c, int32_t rank, phx_estimate *out, phx_error *err) {
  run r = {0};
  char *text = strdup(c->options ? c->options : "");
  phx_topology topology;
  phx_layout layout;
  uint8_t stages[TOY_STAGES], units[TOY_UNITS];
  phx_estimate e = {.struct_size = sizeof e};
  phx_status status = PHX_OK;
  PHX__TRY(open_run(&r, c, text, err));
  PHX__TRY(fill_topology(&r, rank, &topology, &layout, stages, units, err));
  PHX__TRY(r.table->estimate(r.config, &topology, &c->toy->model, &e, err));
  *out = e;
done:
  free(r.config);
  free(text);
  return status;
}

static phx_status prepare(run *r, phx_error *err) {
  const harness_config *c = r->c;
  phx_topology topology;
  phx_layout layout;
  uint8_t stages[TOY_STAGES], units[TOY_UNITS];
  phx_status status = fill_topology(r, 0, &topology, &layout, stages, units, err);
  if (status != PHX_OK) return status;
  r->what = (toy_run){.data_ranks = layout.data_size,
                      .accumulate = topology.accumulate,
                      .reduce = c->reduce,
                      .steps = c->steps ? c->steps : 2,
                      .discard_step = c->discard_step,
                      .low_weights = masters(r),
                      .low_gradients = topology.reduce_dtype == PHX_BF16,
                      .seed = c->seed,
                      .optim = {!c->sgd, c->sgd ? 0.5f : 0.01f, 0.1f}};
  r->ref = toy_reference_run(r->t, &r->what, 1);
  r->blocks = r->t->model.total_blocks[0];
  r->norm_cover = calloc((size_t)r->what.steps, (size_t)r->blocks + 1);
  r->update_cover = calloc((size_t)r->what.steps, (size_t)r->t->elements[0] + 1);
  for (int i = 0; i < 7; i++)
    for (int f = 0; f < PHX_FLATS; f++) r->state_cover[i][f] = calloc(1, (size_t)r->t->model.total_blocks[f] + 1);
  return PHX_OK;
}

static void run_ranks(run *r) {
  pthread_t threads[HARNESS_RANKS];
  harness_result *out = r->result;
  int32_t first = -1;
  r->world = loopback_world_create(r->c->ranks);
  for (int32_t i = 0; i < r->c->ranks; i++) {
    r->ranks[i].run = r, r->ranks[i].rank = i, r->ranks[i].out = &out->rank[i];
    if (pthread_create(&threads[i], NULL, rank_main, &r->ranks[i])) abort();
  }
  for (int32_t i = 0; i < r->c->ranks; i++) pthread_join(threads[i], NULL);
  for (int32_t i = 0; i < r->c->ranks; i++) { /* a rank that ended because another did is not the cause */
    if (out->rank[i].status == PHX_OK) continue;
    if (first < 0 || (out->rank[first].status == PHX_COMM && out->rank[i].status != PHX_COMM)) first = i;
  }
  if (first >= 0) {
    out->status = out->rank[first].status;
    bool secondary = out->status == PHX_COMM && loopback_why(r->world)[0]; /* the first reason is the cause */
    note(r, "rank %d: %s", first, secondary ? loopback_why(r->world) : out->rank[first].error.message);
  }
  loopback_world_destroy(r->world);
  for (int32_t i = 0; i < r->c->ranks; i++)
    if (out->rank[i].leaked_bytes)
      note(r, "rank %d: %lld bytes were not released", i, (long long)out->rank[i].leaked_bytes);
}

bool harness_run(const harness_config *c, harness_result *out) {
  phx_error err = PHX_ERROR_INIT;
  run *r = calloc(1, sizeof *r);
  char *text = strdup(c->options ? c->options : "");
  if (!r || !text || c->ranks < 1 || c->ranks > HARNESS_RANKS) abort();
  memset(out, 0, sizeof *out);
  out->ok = true;
  out->ranks = c->ranks;
  r->result = out;
  pthread_mutex_init(&r->lock, NULL);
  phx_status status = open_run(r, c, text, &err);
  if (status == PHX_OK) status = prepare(r, &err);
  if (status == PHX_OK) run_ranks(r);
  if (status != PHX_OK) {
    out->status = status;
    note(r, "%s", err.message);
  }
  if (status == PHX_OK && out->status == PHX_OK) {
    check_coverage(r);
    check_ranks(r);
    if (c->tolerance > 0 && !(out->max_difference <= c->tolerance))
      note(r, "weights differ by %.3g, allowed %.3g", out->max_difference, c->tolerance);
  }
  for (int i = 0; i < 7; i++)
    for (int f = 0; f < PHX_FLATS; f++) free(r->state_cover[i][f]);
  free(r->norm_cover), free(r->update_cover);
  toy_reference_free(r->ref, &r->what);
  pthread_mutex_destroy(&r->lock);
  free(r->config);
  free(text);
  free(r);
  return out->ok;
}

void harness_free(harness_result *r) {
  for (int32_t i = 0; i < r->ranks; i++) {
    free(r->rank[i].trace);
    free(r->rank[i].tickets);
    r->rank[i].trace = NULL, r->rank[i].tickets = NULL;
  }
}

int64_t harness_count(const harness_rank *r, int32_t op, int32_t step, int64_t *largest) {
  int64_t n = 0, most = 0;
  for (size_t i = 0; i < r->n_trace; i++) {
    if ((op >= 0 && r->trace[i].op != op) || (step && r->trace[i].step != step)) continue;
    n++;
    if (r->trace[i].numel > most) most = r->trace[i].numel;
  }
  if (largest) *largest = most;
  return n;
}
