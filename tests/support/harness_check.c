/* harness_check.c - what the harness compares: weights as read, gradients, states, coverage, plans.  Threads: any
 * rank's; what ranks share is under run.lock. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "harness_inner.h"

void harness__note(run *r, const char *format, ...) {
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

bool harness__same_bits(run *r, const float *got, const float *want, int64_t n) {
  return r->c->tolerance > 0 || memcmp(got, want, (size_t)n * sizeof(float)) == 0;
}

int64_t harness__first_different(const float *got, const float *want, int64_t n) {
  for (int64_t e = 0; e < n; e++)
    if (memcmp(got + e, want + e, sizeof *got) != 0) return e;
  return n;
}

/* The low-precision copy: always the master's value, rounded. */
void harness__check_low(rank_state *k, const uint16_t *low, const float *master, int64_t n, const char *where,
                        uint32_t unit) {
  if (k->run->c->tolerance > 0) return;
  for (int64_t e = 0; e < n; e++)
    if (low[e] != toy_bf16(master[e])) {
      harness__note(k->run, "step %lld rank %d: %s: low-precision weight %lld of unit %u is %.9g, its master %.9g",
                    (long long)k->step, k->rank, where, (long long)e, unit, (double)toy_from_bf16(low[e]),
                    (double)master[e]);
      return;
    }
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
  if (!harness__same_bits(r, p, want, s->blocks * PHX_BLOCK)) {
    int64_t e = harness__first_different(p, want, s->blocks * PHX_BLOCK);
    harness__note(
        r,
        "at the end, rank %d: state kind %d index %u of unit %u flat %u differs at element %lld: %.9g, expected %.9g",
        k->rank, s->kind, s->state_index, s->unit, s->flat, (long long)(s->first_block * PHX_BLOCK + e), (double)p[e],
        (double)want[e]);
  }
  pthread_mutex_lock(&r->lock);
  if (s->kind == PHX_STATE_OPTIM)
    r->result->hash[5 + s->state_index] += sum;
  else
    r->result->hash[s->kind] += sum;
  if (s->kind == (harness__masters(r) ? PHX_STATE_MASTER : PHX_STATE_WEIGHT) && !(worst <= r->result->max_difference))
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
  bool low = s->kind == PHX_STATE_WEIGHT && harness__masters(r);
  int32_t values = harness__masters(r) ? PHX_STATE_MASTER : PHX_STATE_WEIGHT;
  void *p = NULL;
  if (s->kind == PHX_STATE_PRIVATE) return PHX_OK;
  if (row < 0 || s->flat >= PHX_FLATS || s->unit >= r->t->model.n_units || s->blocks <= 0 || s->first_block < 0 ||
      s->first_block + s->blocks > r->t->units[s->unit].blocks[s->flat] || s->dtype != (low ? PHX_BF16 : PHX_F32) ||
      s->place == PHX_SPACE_PINNED)
    return phx_fail(err, PHX_INVALID, "slice kind %d unit %u flat %u blocks %lld + %lld dtype %d", s->kind, s->unit,
                    s->flat, (long long)s->first_block, (long long)s->blocks, s->dtype);
  int64_t block = r->t->units[s->unit].first_block[s->flat] + s->first_block;
  PHX_TRY(r->table->map(k->strategy, s, mode, &p, err));
  float *x = p;
  for (int64_t e = 0; v->init && !low && e < s->blocks * PHX_BLOCK; e++) {
    int32_t owner = r->t->owner[s->flat][block * PHX_BLOCK + e];
    int64_t at = owner < 0 ? 0 : s->first_block * PHX_BLOCK + e - r->t->params[owner].offset;
    x[e] = owner < 0 || s->kind != values ? 0 : toy_initial(r->t, r->c->seed, (uint32_t)owner, at);
  }
  if (!v->init && !low) compare_state(k, s, x, block * PHX_BLOCK);
  if (!v->init && low)
    harness__check_low(k, p, (s->flat ? r->ref->frozen : r->ref->weights[r->what.steps]) + block * PHX_BLOCK,
                       s->blocks * PHX_BLOCK, "at the end", s->unit);
  PHX_TRY(r->table->unmap(k->strategy, s, mode, p, err));
  if (!v->init) {
    pthread_mutex_lock(&r->lock);
    for (int64_t b = 0; b < s->blocks; b++) r->state_cover[row][s->flat][block + b]++;
    pthread_mutex_unlock(&r->lock);
  }
  return PHX_OK;
}

phx_status harness__visit_state(rank_state *k, bool init, phx_error *err) {
  visit v = {k, init};
  phx_visitor visitor = {sizeof visitor, &v, v_slice};
  return k->run->table->visit_state(k->strategy, &visitor, err);
}

/* ---- views ---- */
void harness__check_view(rank_state *k, uint32_t stage, int32_t pass, const phx_view *view) {
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
        harness__note(
            r,
            "step %lld rank %d stage %u pass %d: view of param %u is wrong (param %u, weight %p, gradient %p mode %d)",
            (long long)k->step, k->rank, stage, pass, p, v->param, v->weight, v->gradient, v->gradient_mode);
        abort(); /* running on would crash elsewhere */
      }
      if (read && harness__masters(r) && v->weight_dtype == PHX_BF16) {
        harness__check_low(k, v->weight, want, r->t->params[p].numel, "as read", use->unit);
        continue;
      }
      if (read && (v->weight_dtype != PHX_F32 || harness__masters(r) ||
                   !harness__same_bits(r, v->weight, want, r->t->params[p].numel)))
        harness__note(r, "step %lld rank %d stage %u pass %d: weight of %s as read differs at element %lld",
                      (long long)k->step, k->rank, stage, pass, r->t->params[p].name,
                      (long long)harness__first_different(v->weight, want, r->t->params[p].numel));
    }
  }
  if (n != view->n_params) harness__note(r, "stage %u: the view has %u params, expected %u", stage, view->n_params, n);
}

/* ---- plans and coverage ---- */
void harness__check_traffic(rank_state *k) {
  run *r = k->run;
  const phx_estimate *e = &k->out->planned;
  if (r->c->ignore_plan) return;
  for (int i = 0; i < PHX_OPS; i++) {
    if (e->sent[i] != k->out->sent[i] || e->calls[i] != k->out->calls[i])
      harness__note(r, "step %lld rank %d: %s: planned %lld calls and %lld bytes, measured %lld and %lld",
                    (long long)k->step, k->rank, phx_op_name(i), (long long)e->calls[i], (long long)e->sent[i],
                    (long long)k->out->calls[i], (long long)k->out->sent[i]);
  }
}

void harness__check_coverage(run *r) {
  int want = r->c->replicas ? r->c->ranks : 1;
  for (int64_t s = 0; s < r->what.steps; s++) {
    bool skipped = s + 1 == r->c->discard_step;
    for (int64_t b = 0; b < r->blocks && !(skipped && r->c->discard_early); b++)
      if (r->norm_cover[s * r->blocks + b] != 1)
        harness__note(r, "step %lld: block %lld of the model was added to the norm %d times", (long long)s + 1,
                      (long long)b, r->norm_cover[s * r->blocks + b]);
    for (int64_t e = 0; e < r->t->elements[0] && !skipped; e++)
      if (r->t->owner[0][e] >= 0 && r->update_cover[s * r->t->elements[0] + e] != want)
        harness__note(r, "step %lld: element %lld of the model was updated %d times", (long long)s + 1, (long long)e,
                      r->update_cover[s * r->t->elements[0] + e]);
  }
  for (int row = 0; row < 4; row++)
    for (int f = 0; f < PHX_FLATS; f++)
      for (int64_t b = 0; b < r->t->model.total_blocks[f]; b++) {
        int visits = row == 0 || (row == 1 && harness__masters(r)) || (row >= 2 && f == 0 && !r->c->sgd);
        if (r->state_cover[row][f][b] != visits)
          harness__note(r, "state %d, flat %d, block %lld was visited %d times, expected %d", row, f, (long long)b,
                        r->state_cover[row][f][b], visits);
      }
}

void harness__check_ranks(run *r) {
  for (int32_t i = 0; i < r->c->ranks; i++) {
    const harness_rank *o = &r->result->rank[i];
    for (int m = 0; m < PHX_MEM_KINDS && !r->c->ignore_plan; m++)
      if (o->planned.bytes[m] != o->peak[m])
        harness__note(r, "rank %d: memory kind %d: planned %lld bytes, measured %lld", i, m,
                      (long long)o->planned.bytes[m], (long long)o->peak[m]);
    if (o->planned.arena_bytes != o->arena_peak && !r->c->ignore_plan)
      harness__note(r, "rank %d: arena: planned %lld bytes, measured %lld", i, (long long)o->planned.arena_bytes,
                    (long long)o->arena_peak);
    if (o->steady_allocations)
      harness__note(r, "rank %d: %lld allocations in the steady state", i, (long long)o->steady_allocations);
    if (o->staged_calls) harness__note(r, "rank %d: %lld collectives on private memory", i, (long long)o->staged_calls);
    if (o->arena_order != r->result->rank[0].arena_order)
      harness__note(r, "rank %d asks for other arena memory than rank 0", i);
  }
}
