/* core/checkpoint/checkpoint_describe.c - see checkpoint.h: what a manifest says of the run, before anything of its
 * state. [main] */
#include <string.h>
#include <time.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/manifest.h"
#include "engine/data.h"

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

/* What the samples are counted in; nothing where nothing is trained on, as in `checkpoint import`. */
static phx_status describe_data(phx__manifest *m, const phx__prepared *p, phx_error *err) {
  if (!p->train) return PHX_OK;
  m->data_sequence = phx__data_sequence(p->train);
  m->data_batch = p->shape.micro * p->topology.accumulate * p->layout.data_size;
  for (int64_t i = 0; i < phx__data_files(p->train); i++) {
    const phx__data_file f = phx__data_file_at(p->train, i);
    const phx__manifest_data d = {.name = (char *)(uintptr_t)f.path, .bytes = f.scan->bytes, .windows = f.windows,
                                  .high = f.scan->high, .low = f.scan->low};
    PHX_TRY(phx__manifest_add_data(m, &d, err));
  }
  return PHX_OK;
}

phx_status phx__checkpoint_describe(phx__manifest *m, const phx__prepared *p, int32_t ranks, phx_error *err) {
  const phx__config *c = p->config;
  const phx_optim *optim = &p->optim;
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
  if (!whole) return phx_fail(err, PHX_NOMEM, "no memory for the manifest of a checkpoint");
  PHX_TRY(add_plugin(m, "strategy", c->strategy.plugin, err));
  PHX_TRY(add_plugin(m, "model", c->model.plugin, err));
  PHX_TRY(add_plugin(m, "device", c->device.plugin, err));
  PHX_TRY(add_plugin(m, "comm", c->comm.plugin, err));
  PHX_TRY(add_plugin(m, "optimizer", c->optimizer.plugin, err));
  PHX_TRY(phx__manifest_set_model(m, p->model, err));
  PHX_TRY(describe_data(m, p, err));
  if (p->computes[0]) PHX_TRY(phx__manifest_add_identity(m, "computes", p->computes, err));
  phx__config_each(c, add_pair, &sink);
  return sink.status;
}
