/* meddle.c - see meddle.h.  One plugin at a time; what differs between ranks is in the strategy. */
#include "meddle.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "harness.h"
#include "base/status.h"

static meddle how;
static const phx_strategy_table *inner;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static char log_text[2048];

struct phx_strategy {
  phx_strategy *self; /* the real one */
  const phx_model *model;
  phx_host host;
  const phx_host *real_host;
  phx_param_view params[TOY_PARAMS];
  phx_view view;
};

static const void *m_extension(void *ctx, const char *id) {
  phx_strategy *m = ctx;
  return m->real_host->extension(m->real_host->ctx, id);
}
static phx_status m_alloc(void *ctx, const phx_memory *what, void **out, phx_error *err) {
  phx_strategy *m = ctx;
  return m->real_host->alloc(m->real_host->ctx, what, out, err);
}
static void m_release_memory(void *ctx, void *p) {
  phx_strategy *m = ctx;
  m->real_host->release(m->real_host->ctx, p);
}
static void m_log(void *ctx, int32_t level, const char *message) {
  (void)ctx, (void)level;
  pthread_mutex_lock(&log_lock);
  size_t used = strlen(log_text);
  snprintf(log_text + used, sizeof log_text - used, "%s\n", message);
  pthread_mutex_unlock(&log_lock);
}
const char *meddle_log(void) {
  return log_text;
}

static void m_destroy(phx_strategy *m) {
  if (!m) return;
  inner->destroy(m->self);
  free(m);
}

static phx_status m_create(const phx_host *host, const void *config, const phx_topology *topology,
                           const phx_model *model, phx_strategy **out, phx_error *err) {
  phx_strategy *m = calloc(1, sizeof *m);
  if (!m) abort();
  m->model = model;
  m->real_host = host;
  m->host = *host;
  m->host.ctx = m;
  m->host.extension = m_extension;
  m->host.alloc = m_alloc;
  m->host.release = m_release_memory;
  m->host.log = m_log;
  phx_status status = inner->create(&m->host, config, topology, model, &m->self, err);
  if (status == PHX_OK)
    *out = m;
  else
    m_destroy(m);
  return status;
}

/* Is the stage's backward left out?  Its view then has the params and nothing else. */
static bool left_out(phx_strategy *m, uint32_t stage, int32_t pass) {
  const phx_stage *s = phx_model_stage(m->model, stage);
  if (!how.skip_backward || pass != PHX_PASS_BACKWARD) return false;
  m->view = (phx_view){.struct_size = sizeof m->view, .params = m->params, .param_stride = sizeof m->params[0]};
  for (uint32_t i = 0; i < s->n_uses; i++) {
    const phx_unit *unit = phx_model_unit(m->model, phx_model_use(m->model, s->first_use + i)->unit);
    if (unit->blocks[PHX_FLAT_TRAINABLE] > 0) return false;
    for (uint32_t k = 0; k < unit->n_params; k++)
      m->params[m->view.n_params++] = (phx_param_view){.param = unit->first_param + k};
  }
  return true;
}

static phx_status m_acquire(phx_strategy *m, uint32_t stage, int32_t pass, int32_t mb, phx_stream *s,
                            const phx_view **out, phx_error *err) {
  if (left_out(m, stage, pass)) {
    *out = &m->view;
    return PHX_OK;
  }
  if (how.swap_forward && pass == PHX_PASS_FORWARD && stage == 0) {
    PHX_TRY(inner->acquire(m->self, 1, pass, mb, s, out, err));
    PHX_TRY(inner->release(m->self, 1, pass, mb, 0, s, err));
  }
  if (how.recompute_all && pass == PHX_PASS_BACKWARD)
    PHX_TRY(inner->acquire(m->self, stage, PHX_PASS_RECOMPUTE, mb, s, out, err));
  return inner->acquire(m->self, stage, pass, mb, s, out, err);
}
static phx_status m_release(phx_strategy *m, uint32_t stage, int32_t pass, int32_t mb, uint32_t flags, phx_stream *s,
                            phx_error *err) {
  if (left_out(m, stage, pass)) return PHX_OK;
  if (how.lost_stage < 0 || how.lost_stage == (int32_t)stage) flags &= ~how.lost_flags;
  return inner->release(m->self, stage, pass, mb, flags, s, err);
}
static phx_status m_update(phx_strategy *m, int64_t step, float scale, phx_error *err) {
  return inner->update(m->self, step, scale, err);
}
static phx_status m_visit(phx_strategy *m, const phx_visitor *v, phx_error *err) {
  return inner->visit_state(m->self, v, err);
}
static phx_status m_map(phx_strategy *m, const phx_slice *s, int32_t mode, void **out, phx_error *err) {
  return inner->map(m->self, s, mode, out, err);
}
static phx_status m_unmap(phx_strategy *m, const phx_slice *s, int32_t mode, void *p, phx_error *err) {
  return inner->unmap(m->self, s, mode, p, err);
}
static phx_status m_state_changed(phx_strategy *m, phx_error *err) {
  return inner->state_changed(m->self, err);
}
static phx_status m_begin(phx_strategy *m, int32_t index, int32_t last, phx_error *err) {
  return inner->begin_micro_batch(m->self, index, last, err);
}
static phx_status m_finish(phx_strategy *m, phx_error *err) {
  return inner->finish_gradients(m->self, err);
}
static phx_status m_discard(phx_strategy *m, phx_error *err) {
  return inner->discard_gradients(m->self, err);
}
static phx_status m_norm(phx_strategy *m, const phx_accumulator *a, phx_error *err) {
  return inner->gradient_norm(m->self, a, err);
}

const phx_plugin *meddle_plugin(const char *strategy, const meddle *with) {
  static phx_strategy_table table;
  static phx_plugin plugin;
  phx_error err = PHX_ERROR_INIT;
  const phx_plugin *real = harness_plugin(strategy, &err);
  if (!real) abort();
  how = *with;
  log_text[0] = 0;
  inner = real->table;
  table = (phx_strategy_table){.struct_size = sizeof table,
                               .estimate = inner->estimate,
                               .create = m_create,
                               .destroy = m_destroy,
                               .visit_state = m_visit,
                               .map = m_map,
                               .unmap = m_unmap,
                               .state_changed = m_state_changed,
                               .begin_micro_batch = m_begin,
                               .acquire = m_acquire,
                               .release = m_release,
                               .finish_gradients = m_finish,
                               .discard_gradients = m_discard,
                               .gradient_norm = m_norm,
                               .update = m_update};
  plugin = *real;
  plugin.table = &table;
  return &plugin;
}
