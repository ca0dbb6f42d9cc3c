/* harness.c - see harness.h: ranks as threads, made here and joined.  `run` is shared, its mutable part under run.lock.
 */
#include "harness.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "harness_inner.h"
#include "plugin_file.h"
#include "root.h"

const phx_plugin *harness_plugin(const char *strategy, phx_error *err) {
  char path[4096];
  if (strchr(strategy, '/'))
    snprintf(path, sizeof path, "%s", strategy);
  else
    snprintf(path, sizeof path, "%s/lib/phalanx/phx_strategy_%s.so", test_root(), strategy);
  return plugin_file_open(path, err);
}

static phx_status open_run(run *r, const harness_config *c, char *text, phx_error *err) {
  r->c = c;
  r->t = c->toy;
  r->plugin = c->plugin ? c->plugin : harness_plugin(c->strategy, err);
  if (!r->plugin) return PHX_INVALID;
  r->table = r->plugin->table;
  r->config = calloc(1, r->plugin->config_size + 1);
  if (!r->config) abort();
  PHX_TRY(plugin_file_config(r->plugin, text, r->config, err));
  return PHX_OK;
}

phx_status harness_estimate(const harness_config *c, int32_t rank, phx_estimate *out, phx_error *err) {
  run r = {0};
  char *text = strdup(c->options ? c->options : "");
  phx_topology topology;
  phx_layout layout;
  uint8_t stages[TOY_STAGES], units[TOY_UNITS];
  phx_estimate e = {.struct_size = sizeof e};
  phx_status status = PHX_OK;
  PHX_TRY_GOTO(open_run(&r, c, text, err), status, done);
  PHX_TRY_GOTO(harness__topology(&r, rank, &topology, &layout, stages, units, err), status, done);
  PHX_TRY_GOTO(r.table->estimate(r.config, &topology, &c->toy->model, &e, err), status, done);
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
  PHX_TRY(harness__topology(r, 0, &topology, &layout, stages, units, err));
  r->what = (toy_run){.data_ranks = layout.data_size,
                      .accumulate = topology.accumulate,
                      .reduce = c->reduce,
                      .steps = c->steps ? c->steps : 2,
                      .discard_step = c->discard_step,
                      .low_weights = harness__masters(r),
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
    if (pthread_create(&threads[i], NULL, harness__rank, &r->ranks[i])) abort();
  }
  for (int32_t i = 0; i < r->c->ranks; i++) pthread_join(threads[i], NULL);
  for (int32_t i = 0; i < r->c->ranks; i++) { /* a rank that ended because another did is not the cause */
    if (out->rank[i].status == PHX_OK) continue;
    if (first < 0 || (out->rank[first].status == PHX_COMM && out->rank[i].status != PHX_COMM)) first = i;
  }
  if (first >= 0) {
    out->status = out->rank[first].status;
    bool secondary = out->status == PHX_COMM && loopback_why(r->world)[0]; /* the first reason is the cause */
    harness__note(r, "rank %d: %s", first, secondary ? loopback_why(r->world) : out->rank[first].error.message);
  }
  loopback_world_destroy(r->world);
  for (int32_t i = 0; i < r->c->ranks; i++)
    if (out->rank[i].leaked_bytes)
      harness__note(r, "rank %d: %lld bytes were not released", i, (long long)out->rank[i].leaked_bytes);
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
    harness__note(r, "%s", err.message);
  }
  if (status == PHX_OK && out->status == PHX_OK) {
    harness__check_coverage(r);
    harness__check_ranks(r);
    if (c->tolerance > 0 && !(out->max_difference <= c->tolerance))
      harness__note(r, "weights differ by %.3g, allowed %.3g", out->max_difference, c->tolerance);
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

/* The first n at which nothing fails any more, or 0. */
static int32_t fail_allocations_of(harness_config c, int32_t rank, char message[640]) {
  c.fail_rank = rank;
  for (int32_t n = 1; n < 100; n++) {
    harness_result r;
    int64_t leaked = 0;
    c.fail_alloc = n;
    bool good = harness_run(&c, &r);
    for (int32_t i = 0; i < c.ranks; i++) leaked += r.rank[i].leaked_bytes;
    harness_free(&r);
    snprintf(message, sizeof r.message, "rank %d, allocation %d: %lld bytes leaked: %.500s", rank, n, (long long)leaked,
             r.message);
    if (leaked || (!good && r.status != PHX_NOMEM)) return 0;
    if (good) return n;
  }
  return 0;
}

int32_t harness_fail_allocations(harness_config c, int32_t one, int32_t other, char message[640]) {
  const int32_t n = fail_allocations_of(c, one, message);
  const int32_t m = n && other != one ? fail_allocations_of(c, other, message) : n;
  return m == 0 || m > n ? m : n;
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
