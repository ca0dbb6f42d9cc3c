/* Optimizer plugins against references: adamw and sgd in odd slices against double precision; and every ticket of whole
 * runs, under several strategies and ranks, against plain fp32 code that knows parameters by name and shape only. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "command.h"
#include "engine/layout.h"
#include "fake_host.h"
#include "plain_ops.h"
#include "plugin_file.h"
#include "random_array.h"
#include "rank_rig.h"
#include "training.h"

/* ---- a plugin alone ---- */
enum { NUMEL = 4999, STEPS = 7 };
static const double beta1 = 0.8, beta2 = 0.99, eps = 1e-6, lr = 3e-3, decay = 0.05;
static const float scale = 0.37f;
static unsigned long state = 11;

typedef struct arrays {
  float *w, *g, *m, *v, *low;
} arrays;
static arrays arrays_make(void) {
  return (arrays){random_array(NUMEL, 1, &state), NULL, calloc(NUMEL, 4), calloc(NUMEL, 4), calloc(NUMEL, 4)};
}
static void arrays_free(arrays *a) { free(a->w), free(a->m), free(a->v), free(a->low); }

typedef struct opened {
  const phx_optimizer_table *table;
  phx_optimizer_self *self;
  fake_host host;
  double config[8];
} opened;

static void open_plugin(opened *o, const char *file, const char *options) {
  static const phx_model no_model = {.struct_size = sizeof no_model};
  char text[128];
  phx_error err = PHX_ERROR_INIT;
  const phx_plugin *p = fake_host_plugin(file);
  snprintf(text, sizeof text, "%s", options);
  cr_assert_leq(p->config_size, sizeof o->config);
  cr_assert_eq(plugin_file_config(p, text, o->config, &err), PHX_OK, "%s", err.message);
  fake_host_init(&o->host, 0, 1);
  o->host.extension = plain_extension;
  o->table = p->table;
  cr_assert_eq(o->table->create(&o->host.host, o->config, &no_model, &o->self, &err), PHX_OK, "%s", err.message);
}

/* The whole step, or in slices of random length that begin anywhere. */
static void step_in_slices(opened *o, arrays *a, int64_t step, bool whole) {
  phx_error err = PHX_ERROR_INIT;
  for (int64_t at = 0, n; at < NUMEL; at += n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    n = whole ? NUMEL : 1 + (int64_t)(state >> 33) % 700;
    if (n > NUMEL - at) n = NUMEL - at;
    const phx_piece piece = {.struct_size = sizeof piece, .first = at, .numel = n, .weight = a->w + at,
                             .low = a->low + at, .low_dtype = PHX_F32, .gradient = a->g + at,
                             .states = {a->m + at, a->v + at}, .scale = scale, .lr = lr, .decay = decay,
                             .step = step};
    cr_assert_eq(o->table->update(o->self, &piece, &err), PHX_OK, "%s", err.message);
  }
}

static void check_plugin(const char *file, const char *options, bool adam) {
  opened o = {0};
  open_plugin(&o, file, options);
  arrays sliced = arrays_make(), whole = arrays_make();
  memcpy(whole.w, sliced.w, NUMEL * sizeof(float));
  double *w = calloc(NUMEL, sizeof *w), *m = calloc(NUMEL, sizeof *m), *v = calloc(NUMEL, sizeof *v);
  for (int i = 0; i < NUMEL; i++) w[i] = (double)sliced.w[i];
  for (int step = 1; step <= STEPS; step++) {
    float *g = random_array(NUMEL, 1, &state);
    sliced.g = whole.g = g;
    step_in_slices(&o, &sliced, step, false);
    step_in_slices(&o, &whole, step, true);
    for (int i = 0; i < NUMEL; i++) {
      const double d = (double)g[i] * (double)scale;
      m[i] = beta1 * m[i] + (1 - beta1) * d;
      v[i] = beta2 * v[i] + (1 - beta2) * d * d;
      const double by = m[i] / (1 - pow(beta1, step)) / (sqrt(v[i] / (1 - pow(beta2, step))) + eps);
      w[i] -= lr * ((adam ? by : d) + decay * w[i]);
    }
    free(g);
  }
  for (int i = 0; i < NUMEL; i++)
    cr_assert(fabs((double)sliced.w[i] - w[i]) < 2e-6 * STEPS, "%s: element %d is %.9g, expected %.9g", file, i,
              (double)sliced.w[i], w[i]);
  cr_expect_arr_eq(sliced.w, whole.w, NUMEL * sizeof(float), "%s: slices change the bits", file);
  cr_expect_arr_eq(sliced.low, sliced.w, NUMEL * sizeof(float), "%s: the copy is not the weight", file);
  cr_expect_arr_eq(sliced.m, whole.m, NUMEL * sizeof(float));
  cr_expect_arr_eq(sliced.v, whole.v, NUMEL * sizeof(float));
  o.table->destroy(o.self);
  arrays_free(&sliced), arrays_free(&whole);
  free(w), free(m), free(v);
}

Test(optimizers, adamw_is_its_paper_in_odd_slices) {
  check_plugin("phx_optimizer_adamw.so", "beta1=0.8 beta2=0.99 eps=1e-6", true);
}
Test(optimizers, sgd_is_its_formula_in_odd_slices) { check_plugin("phx_optimizer_sgd.so", "", false); }

/* ---- every ticket of a run ---- */
/* One parameter's part of a ticket, as it was before. */
typedef struct before {
  float *weight, *gradient, *states[2];
} before;

typedef struct watcher {
  rank_rig *rig;
  phx_status (*next)(void *arg, const phx_ticket *ticket, float scale, phx_error *err);
  void *next_arg;
  before was; /* of the whole ticket */
  float scale;
  int64_t tickets, elements;
} watcher;

static float *copy_of(const float *from, int64_t n) {
  float *to = malloc((size_t)n * sizeof *to);
  return memcpy(to, from, (size_t)n * sizeof *to);
}
static void forget(before *b) {
  free(b->weight), free(b->gradient), free(b->states[0]), free(b->states[1]);
  *b = (before){0};
}

static phx_status keep(void *arg, const phx_ticket *t, float given, phx_error *err) {
  watcher *w = arg;
  PHX_TRY(w->next(w->next_arg, t, given, err));
  forget(&w->was);
  w->scale = given;
  w->was.weight = copy_of(t->weight, t->numel);
  w->was.gradient = copy_of(t->gradient, t->numel);
  for (uint32_t k = 0; k < w->rig->rt->optim.table.n_states; k++) w->was.states[k] = copy_of(t->states[k], t->numel);
  return PHX_OK;
}

/* fp32, one operation after the other; the tests are compiled without contraction. */
static void plain_adamw(const watcher *w, before *b, int64_t at, int64_t n, float rate, float by_decay) {
  const double b1 = 0.9, b2 = 0.95;
  const double step = (double)(w->rig->step + 1);
  const float c1 = (float)(1 - pow(b1, step)), c2 = (float)(1 - pow(b2, step));
  for (int64_t i = at; i < at + n; i++) {
    const float g = b->gradient[i] * w->scale;
    b->states[0][i] = (float)b1 * b->states[0][i] + (1.0f - (float)b1) * g;
    b->states[1][i] = (float)b2 * b->states[1][i] + (1.0f - (float)b2) * (g * g);
    b->weight[i] -= rate * (b->states[0][i] / c1 / (sqrtf(b->states[1][i] / c2) + 1e-8f) + by_decay * b->weight[i]);
  }
}

static void plain_sgd(const watcher *w, before *b, int64_t at, int64_t n, float rate, float by_decay) {
  for (int64_t i = at; i < at + n; i++)
    b->weight[i] -= rate * (b->gradient[i] * w->scale + by_decay * b->weight[i]);
}

static void plain_frobenius(const watcher *w, before *b, int64_t at, int64_t n, float rate, float by_decay) {
  double sum = 0;
  for (int64_t i = at; i < at + n; i++) {
    const double g = (double)(b->gradient[i] * w->scale);
    sum += g * g;
  }
  const float norm = (float)(sqrt(sum) + 1e-30);
  for (int64_t i = at; i < at + n; i++) {
    b->states[0][i] = 0.9f * b->states[0][i] + b->gradient[i] * w->scale / norm;
    b->weight[i] -= rate * (b->states[0][i] + by_decay * b->weight[i]);
  }
}

/* The reference knows parameters by name: attn.c_attn.weight is three matrices, other *.c_*.weight are one. */
static void plain_update(const watcher *w, before *b, int64_t at, const phx__range *r) {
  const phx__settings *s = &w->rig->config->s;
  const char *name = r->param->name, *dot = strrchr(name, '.');
  const bool matrix = strstr(name, ".c_") && !strcmp(dot, ".weight"), two = r->param->ndim == 2;
  const float rate = (float)phx__optim_lr(s, w->rig->step + 1), by = two ? (float)s->optimizer.weight_decay : 0;
  const char *optimizer = w->rig->rt->optim.table.name;
  const int64_t parts = strstr(name, "c_attn") ? 3 : 1, each = r->numel / parts;
  if (!strcmp(optimizer, "adamw")) plain_adamw(w, b, at, r->numel, rate, by);
  else if (!strcmp(optimizer, "sgd") || !matrix) plain_sgd(w, b, at, r->numel, rate, by);
  else
    for (int64_t i = 0; i < parts; i++) plain_frobenius(w, b, at + i * each, each, rate, by);
}

static phx_status compare(void *arg, const phx_ticket *t, phx_error *err) {
  watcher *w = arg;
  phx__range r = {0};
  const size_t bytes = (size_t)t->numel * sizeof(float);
  while (phx__layout_next(w->rig->rt->prepared->model, t->unit, PHX_FLAT_TRAINABLE, t->first, t->numel, &r)) {
    plain_update(w, &w->was, r.first - t->first, &r);
    w->elements += r.numel;
  }
  w->tickets++;
  if (memcmp(w->was.weight, t->weight, bytes))
    return phx_fail(err, PHX_INTERNAL, "unit %u: the reference has other weights", t->unit);
  for (uint32_t k = 0; k < w->rig->rt->optim.table.n_states; k++)
    if (memcmp(w->was.states[k], t->states[k], bytes))
      return phx_fail(err, PHX_INTERNAL, "unit %u: the reference has another state %u", t->unit, k);
  return PHX_OK;
}

static void watch_run(rank_rig *rig, void *arg) {
  phx_error err = PHX_ERROR_INIT;
  watcher w = {.rig = rig, .next = rig->rt->optim.on_ticket, .next_arg = rig->rt->optim.on_ticket_arg};
  const phx_model *m = rig->rt->prepared->model;
  int64_t all = 0;
  (void)arg;
  RIG_CHECK(rig, w.next, "nobody looks at tickets");
  rig->rt->optim.on_ticket = keep;
  rig->rt->optim.on_ticket_arg = &w;
  rig->rt->optim.after_ticket = compare;
  rig->rt->optim.after_ticket_arg = &w;
  for (int i = 0; i < 3; i++) RIG_CHECK(rig, !rank_rig_step(rig, &err), "%s", err.message);
  rig->rt->optim.on_ticket = w.next;
  rig->rt->optim.on_ticket_arg = w.next_arg;
  rig->rt->optim.after_ticket = NULL;
  forget(&w.was);
  for (uint32_t i = 0; i < m->n_params; i++) all += phx_model_param(m, i)->numel;
  RIG_CHECK(rig, w.tickets >= 3 && w.elements > 0 && w.elements <= 3 * all, "%lld tickets, %lld elements",
            (long long)w.tickets, (long long)w.elements);
}

static void run_each(const char *optimizer, const char *const *strategies) {
  for (int ranks = 1; ranks <= 3; ranks++)
    for (int i = 0; strategies[i]; i++) {
      char extra[1024], *dir = rank_rig_dir();
      rank_rig_run run = {.size = ranks, .dir = dir, .strategy = strategies[i], .limit_s = 100, .body = watch_run};
      snprintf(extra, sizeof extra, "name = %s\n%s", optimizer, training_odd_model);
      training_files(dir, extra);
      cr_expect(rank_rig_ranks(&run), "%s under %s, %d ranks: %s", optimizer, strategies[i], ranks, run.message);
      command_remove_dir(dir);
    }
}

static const char *const all[] = {"ddp",          "fsdp", "fsdp.sharding=none",
                                  "zero.stage=1", "zero.sub_group_size=5000", NULL};
static const char *const whole_tensors[] = {"ddp", "fsdp.sharding=none", NULL};
Test(optimizers, adamw_in_runs, .timeout = 300) { run_each("adamw", all); }
Test(optimizers, sgd_in_runs, .timeout = 300) { run_each("sgd", all); }
Test(optimizers, whole_tensors_in_runs, .timeout = 300) {
  run_each(PHX_TEST_ONLY_PLUGINS "/phx_optimizer_frobenius.so", whole_tensors);
}
