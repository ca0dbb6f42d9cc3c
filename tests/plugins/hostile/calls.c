/* calls.c - see hostile.h: a call that crashes, fails without a word, or fails with a number that is no status. */
#include <signal.h>

#include "hostile.h"

static phx_strategy_table next;

/* PHX_OK: the call goes on. */
static phx_status ends(enum hostile_call call) {
  if (hostile.c.call != (int32_t)call) return PHX_OK;
  if (is(HOSTILE_crash)) raise(SIGSEGV);
  if (is(HOSTILE_silent)) return PHX_COMM;
  return is(HOSTILE_odd_code) ? 77 : PHX_OK;
}
#define WRAPPED(name, parameters, ...)             \
  static phx_status name parameters {              \
    const phx_status status = ends(HOSTILE_IN_##name); \
    return status ? status : next.name(__VA_ARGS__);   \
  }

static phx_status layout(const void *config, const phx_topology *topology, const phx_model *model, phx_layout *out,
                         phx_error *err) {
  hostile_configure(config, topology);
  const phx_status status = ends(HOSTILE_IN_layout);
  return status ? status : next.layout(config, topology, model, out, err);
}
static phx_status estimate(const void *config, const phx_topology *topology, const phx_model *model, phx_estimate *out,
                           phx_error *err) {
  hostile_configure(config, topology);
  const phx_status status = ends(HOSTILE_IN_estimate);
  return status ? status : next.estimate(config, topology, model, out, err);
}
static void destroy(phx_strategy *self) {
  (void)ends(HOSTILE_IN_destroy);
  next.destroy(self);
}
WRAPPED(create, (const phx_host *host, const void *config, const phx_topology *topology, const phx_model *model,
                 phx_strategy **out, phx_error *err), host, config, topology, model, out, err)
WRAPPED(visit_state, (phx_strategy *self, const phx_visitor *visitor, phx_error *err), self, visitor, err)
WRAPPED(map, (phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err), self, slice, mode,
        out, err)
WRAPPED(unmap, (phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err), self, slice, mode,
        p, err)
WRAPPED(state_changed, (phx_strategy *self, phx_error *err), self, err)
WRAPPED(begin_micro_batch, (phx_strategy *self, int32_t index, int32_t last, phx_error *err), self, index, last, err)
WRAPPED(acquire, (phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, phx_stream *stream,
                  const phx_view **out, phx_error *err), self, stage, pass, micro_batch, stream, out, err)
WRAPPED(release, (phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, uint32_t flags,
                  phx_stream *stream, phx_error *err), self, stage, pass, micro_batch, flags, stream, err)
WRAPPED(finish_gradients, (phx_strategy *self, phx_error *err), self, err)
WRAPPED(discard_gradients, (phx_strategy *self, phx_error *err), self, err)
WRAPPED(gradient_norm, (phx_strategy *self, const phx_accumulator *acc, phx_error *err), self, acc, err)
WRAPPED(update, (phx_strategy *self, int64_t step, float scale, phx_error *err), self, step, scale, err)

void hostile_end_calls(phx_strategy_table *t) {
  next = *t;
  t->layout = layout;
  t->estimate = estimate;
  t->create = create;
  t->destroy = destroy;
  t->visit_state = visit_state;
  t->map = map;
  t->unmap = unmap;
  t->state_changed = state_changed;
  t->begin_micro_batch = begin_micro_batch;
  t->acquire = acquire;
  t->release = release;
  t->finish_gradients = finish_gradients;
  t->discard_gradients = discard_gradients;
  t->gradient_norm = gradient_norm;
  t->update = update;
}
