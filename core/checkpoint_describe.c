/* core/checkpoint_describe.c - see checkpoint.h: what a manifest says of the run, before anything of its state.
 * [main] */
#include <string.h>
#include <time.h>

#include "checkpoint.h"
#include "manifest.h"
#include "status.h"
#include "sys.h"

typedef struct pair_sink {
  phx__manifest *manifest;
  phx_status status;
  phx_error *err;
} pair_sink;
static void add_pair(void *arg, const char *section, const char *key, const char *value, const char *source) {
  pair_sink *sink = arg;
  (void)source;
  if (!sink->status) sink->status = phx__manifest_add_config(sink->manifest, section, key, value, sink->err);
}

static phx_status add_plugin(phx__manifest *m, const char *kind, const phx__plugin *p, phx_error *err) {
  return phx__manifest_add_plugin(m, kind, p->descriptor->id, p->descriptor->version, p->sha256, err);
}

phx_status phx__checkpoint_describe(phx__manifest *m, const phx__config *c, const phx_optim *optim,
                                    const phx_model *model, int32_t ranks, phx_error *err) {
  phx_status status = PHX_OK;
  pair_sink sink = {m, PHX_OK, err};
  m->data_seed = m->generator_seed = (uint64_t)c->s.run.seed;
  m->ranks = ranks;
  m->time = (int64_t)time(NULL);
  m->n_states = optim->n_states;
  m->optimizer = phx__strdup(optim->name);
  bool whole = m->optimizer != NULL;
  for (uint32_t i = 0; i < optim->n_states; i++) {
    m->states[i].name = phx__strdup(optim->states[i].name);
    m->states[i].dtype = optim->states[i].dtype;
    whole = whole && m->states[i].name;
  }
  if (!whole) return phx__fail(err, PHX_NOMEM, "no memory for the manifest of a checkpoint");
  PHX__TRY(add_plugin(m, "strategy", c->strategy.plugin, err));
  PHX__TRY(add_plugin(m, "model", c->model.plugin, err));
  PHX__TRY(add_plugin(m, "device", c->device.plugin, err));
  PHX__TRY(add_plugin(m, "comm", c->comm.plugin, err));
  PHX__TRY(phx__manifest_set_model(m, model, err));
  phx__config_each(c, add_pair, &sink);
  PHX__TRY(sink.status);
done:
  return status;
}
