/* core/checkpoint/checkpoint_fits.c - see checkpoint_fits.h.
 *
 * What changes results without changing a shape is compared here: what the model computes, and which sequence comes
 * when.  A file's name changes nothing, so data may move; ranks and micro-batches may differ: samples are counted. */
#include "checkpoint/checkpoint_fits.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"
#include "engine/data.h"

bool phx__manifest_same_optimizer(const phx__manifest *m, const phx__prepared *p) {
  const phx_optim *now = &p->optim;
  bool same = strcmp(m->optimizer, now->name) == 0 && m->n_states == now->n_states;
  for (uint32_t i = 0; same && i < now->n_states; i++)
    same = strcmp(m->states[i].name, now->states[i].name) == 0 && m->states[i].dtype == now->states[i].dtype;
  return same;
}

/* Nothing was trained yet, as in what `checkpoint import` makes: its states are zero, and any optimizer's begin so. */
static bool untrained(const phx__manifest *m) { return m->step == 0 && m->samples == 0; }

static phx_status fits_optimizer(const char *path, const phx__manifest *m, const phx__prepared *p, phx_error *err) {
  if (phx__manifest_same_optimizer(m, p) || untrained(m)) return PHX_OK;
  return phx_fail(err, PHX_INVALID,
                  "%s was saved with optimizer.name = %s, and this run has %s: its states do not fit", path,
                  m->optimizer, p->optim.name);
}

/* ---- what the model computes ---- */
typedef struct options {
  const phx__manifest *m;
  char text[600]; /* the first that differs; "" */
} options;

static void compare_option(void *arg, const char *section, const char *key, const char *value, const char *source) {
  options *o = arg;
  const char *before = phx__manifest_config_of(o->m, section, key);
  (void)source;
  if (strcmp(section, "model") || !before || !strcmp(before, value) || o->text[0]) return;
  snprintf(o->text, sizeof o->text, "[model] %.60s = %.100s, and this run has %.100s", key, before, value);
}

/* A model that says what it computes may differ in all else; of one that does not, no option may differ. */
static phx_status fits_function(const char *path, const phx__manifest *m, const phx__prepared *p, phx_error *err) {
  const char *before = phx__manifest_identity_of(m, "computes");
  options o = {.m = m, .text = ""};
  if (before && p->computes[0]) {
    if (strcmp(before, p->computes))
      snprintf(o.text, sizeof o.text, "%.140s, and the model of this run has %.140s", before, p->computes);
  } else {
    phx__config_each(p->config, compare_option, &o);
  }
  if (!o.text[0]) return PHX_OK;
  return phx_fail(err, PHX_INVALID,
                  "%s was saved with %s: the same weights would compute something else; write [model] as it was", path,
                  o.text);
}

/* ---- the data ---- */
static void compare_file(const phx__manifest_data *was, const phx__data_file *is, uint32_t i, uint32_t n, char *text,
                         size_t bytes) {
  char which[64] = "";
  const phx__data_scan *now = is->scan;
  if (n > 1) snprintf(which, sizeof which, "file %u of %u: ", i + 1, n);
  if (now->bytes != was->bytes)
    snprintf(text, bytes, "%s%.160s has %" PRId64 " bytes, and %.160s had %" PRId64, which, is->path, now->bytes,
             was->name, was->bytes);
  else if (is->read && (now->high != was->high || now->low != was->low))
    snprintf(text, bytes, "%s%.160s has other contents than %.160s had", which, is->path, was->name);
}

/* The first difference; "" where every sequence is the one it was. */
static void compare_data(const phx__manifest *m, const phx__config *c, const phx__data *data, char *text,
                         size_t bytes) {
  text[0] = 0;
  if (m->data_seed != (uint64_t)c->s.run.seed || m->generator_seed != m->data_seed) {
    snprintf(text, bytes, "it was saved with run.seed = %" PRIu64 ", and this run has %" PRId64, m->data_seed,
             c->s.run.seed);
    return;
  }
  if (m->data_sequence == 0 || !data) return; /* an earlier version's says nothing of them */
  if (m->data_sequence != phx__data_sequence(data)) {
    snprintf(text, bytes, "it was trained on sequences of %" PRId64 " tokens, and batch.sequence is %" PRId64,
             m->data_sequence, phx__data_sequence(data));
    return;
  }
  if (m->n_data != phx__data_files(data)) {
    snprintf(text, bytes, "data.train was %" PRIu32 " file%s, and is %" PRId64, m->n_data, m->n_data == 1 ? "" : "s",
             phx__data_files(data));
    return;
  }
  for (uint32_t i = 0; i < m->n_data && !text[0]; i++) {
    const phx__data_file is = phx__data_file_at(data, i);
    compare_file(&m->data[i], &is, i, m->n_data, text, bytes);
  }
}

static phx_status fits_data(const char *path, const phx__manifest *m, const phx__prepared *p, phx__fit *fit,
                            phx_error *err) {
  if (m->samples == 0) return PHX_OK; /* none was read */
  compare_data(m, p->config, p->train, fit->difference, sizeof fit->difference);
  fit->restart = fit->difference[0] && p->config->s.data.on_change == 1;
  if (!fit->difference[0] || fit->restart) return PHX_OK;
  return phx_fail(err, PHX_INVALID,
                  "%.1000s: %s: the samples would come in another order, so that after the %" PRId64
                  " that were read some come twice and some never; keep the data as they were, or set data.on_change "
                  "= restart to begin their order anew",
                  path, fit->difference, m->samples);
}

phx_status phx__manifest_fits(const char *path, const phx__manifest *m, const phx__prepared *p, phx__fit *fit,
                              phx_error *err) {
  const phx__settings *s = &p->config->s;
  *fit = (phx__fit){.restart = false};
  phx_status status = phx__manifest_match(path, m, p->model, err);
  if (!status) status = fits_function(path, m, p, err);
  if (!status) status = fits_optimizer(path, m, p, err);
  if (!status) status = fits_data(path, m, p, fit, err);
  if (!status && m->step > s->run.steps)
    status = phx_fail(err, PHX_INVALID, "%s is of step %" PRId64 ", and this run ends at run.steps = %" PRId64, path,
                      m->step, s->run.steps);
  return status;
}
