/* tests/soak/reference_steps.c - the first steps of a run in double precision, on one thread: reference_steps FILE.ini
 * RANKS STEPS prints a line "step loss norm" for each.
 *
 * Forward, backward and AdamW are the tests' own (tests/support/reference_gpt.c, which agrees with PyTorch to 1e-13,
 * tests/unit/test_golden.c); no device and no strategy takes part.  What a run begins with is the core's: the settings,
 * the initial weights by name and seed, and which sequences a step takes.  The file names [model] layers, heads, width,
 * context and vocab. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin/config_load.h"
#include "engine/data.h"
#include "engine/optim.h"
#include "engine/prepare.h"
#include "reference_gpt.h"
#include "base/rng.h"
#include "base/status.h"

static long model_value[5];
static const char *const model_key[5] = {"layers", "heads", "width", "context", "vocab"};

static double adamw[3];
static const char *const adamw_key[3] = {"beta1", "beta2", "eps"};

static void keep_options(void *arg, const char *section, const char *key, const char *value, const char *source) {
  (void)arg, (void)source;
  for (int i = 0; i < 5; i++)
    if (!strcmp(section, "model") && !strcmp(key, model_key[i])) model_value[i] = strtol(value, NULL, 10);
  for (int i = 0; i < 3; i++)
    if (!strcmp(section, "optimizer") && !strcmp(key, adamw_key[i])) adamw[i] = strtod(value, NULL);
}

static void need(phx_status status, const phx_error *err) {
  if (!status) return;
  fprintf(stderr, "reference_steps: %s\n", err->message);
  exit(1);
}

static void *room(size_t n, size_t bytes) {
  void *p = calloc(n, bytes);
  if (!p) abort();
  return p;
}

static void begin(reference_gpt *g, const phx__prepared *p, uint64_t seed) {
  for (uint32_t i = 0; i < p->model->n_params; i++) {
    const phx_param *param = &p->model->params[i];
    const reference_tensor *t = reference_gpt_find(g, param->name);
    if (!t || t->numel != param->numel) {
      fprintf(stderr, "reference_steps: no tensor %s of this size\n", param->name);
      exit(1);
    }
    float *values = room((size_t)t->numel, sizeof *values);
    if (param->init == PHX_INIT_NORMAL)
      phx__rng_normal(values, 0, t->numel, seed, phx__rng_stream(param->name), param->init_std);
    for (int64_t k = 0; k < t->numel; k++) t->value[k] = param->init == PHX_INIT_ONE ? 1 : (double)values[k];
    free(values);
  }
}

typedef struct moments {
  double *m, *v;
} moments;

static void update(reference_gpt *g, const phx__prepared *p, moments *all, int64_t step, double factor) {
  const phx__settings *s = &p->config->s;
  const double b1 = adamw[0], b2 = adamw[1], lr = phx__optim_lr(s, step);
  for (uint32_t i = 0; i < p->model->n_params; i++) {
    const reference_tensor *t = reference_gpt_find(g, p->model->params[i].name);
    const double decay = p->model->params[i].flags & PHX_PARAM_DECAY ? s->optimizer.weight_decay : 0;
    for (int64_t k = 0; k < t->numel; k++) {
      const double d = t->gradient[k] * factor;
      all[i].m[k] = b1 * all[i].m[k] + (1 - b1) * d;
      all[i].v[k] = b2 * all[i].v[k] + (1 - b2) * d * d;
      const double m_hat = all[i].m[k] / (1 - pow(b1, (double)step)), v_hat = all[i].v[k] / (1 - pow(b2, (double)step));
      t->value[k] -= lr * (m_hat / (sqrt(v_hat) + adamw[2]) + decay * t->value[k]);
    }
  }
}

/* Loss and gradient of the step, both means over its micro-batches. */
static double gradient(reference_gpt *g, const phx__prepared *p, phx__data *data, int64_t step) {
  const int64_t micro = p->shape.micro, n = p->shape.sequence, batch = micro * p->topology.accumulate *
                                                                       p->topology.world_size;
  const int32_t parts = p->topology.accumulate, ranks = p->topology.world_size;
  int32_t *tokens = room((size_t)(2 * micro * n), sizeof *tokens), *targets = tokens + micro * n;
  phx_error err = PHX_ERROR_INIT;
  double loss = 0;
  for (int i = 0; i < g->n_tensors; i++)
    memset(g->tensors[i].gradient, 0, (size_t)g->tensors[i].numel * sizeof(double));
  for (int32_t part = 0; part < parts * ranks; part++) {
    need(phx__data_batch(data, (step - 1) * batch, part % parts, parts, part / parts, ranks, micro, tokens, targets,
                         &err), &err);
    loss += reference_gpt_run(g, tokens, targets, (int)micro, (int)n, NULL, 1, NULL) / (parts * ranks);
  }
  for (int i = 0; i < g->n_tensors; i++)
    for (int64_t k = 0; k < g->tensors[i].numel; k++) g->tensors[i].gradient[k] /= parts * ranks;
  free(tokens);
  return loss;
}

int main(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  phx__config *config = NULL;
  phx__prepared *p = NULL;
  phx__data *data = NULL;
  if (argc != 4) {
    fprintf(stderr, "usage: reference_steps FILE.ini RANKS STEPS\n");
    return 2;
  }
  const int32_t ranks = (int32_t)strtol(argv[2], NULL, 10);
  if (phx__config_load(argv[1], NULL, 0, stderr, &config)) return 1;
  phx__config_each(config, keep_options, NULL);
  need(phx__prepare(config, 0, ranks, 0, ranks, 0, 0, &p, &err), &err);
  const uint64_t seed = (uint64_t)config->s.run.seed;
  need(phx__data_open(config->s.data.train, p->shape.sequence, p->facts.vocabulary, seed, &data, &err), &err);
  reference_gpt *g = reference_gpt_create((int)model_value[0], (int)model_value[1], (int)model_value[2],
                                          (int)model_value[3], (int)model_value[4]);
  begin(g, p, seed);
  moments *all = room(p->model->n_params, sizeof *all);
  for (uint32_t i = 0; i < p->model->n_params; i++) {
    all[i].m = room((size_t)p->model->params[i].numel, sizeof(double));
    all[i].v = room((size_t)p->model->params[i].numel, sizeof(double));
  }
  for (int64_t step = 1; step <= strtol(argv[3], NULL, 10); step++) {
    double square = 0;
    const double loss = gradient(g, p, data, step);
    for (int i = 0; i < g->n_tensors; i++)
      for (int64_t k = 0; k < g->tensors[i].numel; k++) square += g->tensors[i].gradient[k] * g->tensors[i].gradient[k];
    const double norm = sqrt(square), clip = config->s.optimizer.clip;
    printf("%lld %.12g %.12g\n", (long long)step, loss, norm);
    update(g, p, all, step, clip > 0 && norm > clip ? clip / norm : 1);
  }
  for (uint32_t i = 0; i < p->model->n_params; i++) free(all[i].m), free(all[i].v);
  free(all);
  reference_gpt_destroy(g);
  phx__data_close(data);
  phx__prepared_free(p);
  phx__config_free(config);
  return 0;
}
