/* The reference GPT and the gpt plugin against numbers that PyTorch computed (tests/golden/). */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../golden/golden_gpt.h"
#include "gpt_rig.h"
#include "plain_ops.h"

enum { TOKENS = GOLDEN_BATCH * GOLDEN_LENGTH, TENSORS = sizeof golden_gradients / sizeof golden_gradients[0] };
static int32_t tokens[TOKENS], targets[TOKENS];

static void make_tokens(void) {
  for (int i = 0; i < TOKENS; i++) {
    tokens[i] = rig_token(i, GOLDEN_VOCAB);
    targets[i] = rig_token(i + 1, GOLDEN_VOCAB);
  }
}

static void near(double value, double expected, double tolerance, const char *what) {
  cr_expect(fabs(value - expected) <= tolerance, "%s: %.17g, PyTorch %.17g", what, value, expected);
}

static int decays(const char *name) { return strstr(name, ".weight") && !strstr(name, "ln_"); }

Test(golden, reference_agrees_with_pytorch, .timeout = 60) {
  reference_gpt *g =
      reference_gpt_create(GOLDEN_LAYERS, GOLDEN_HEADS, GOLDEN_WIDTH, GOLDEN_CONTEXT, GOLDEN_VOCAB);
  double *m[TENSORS], *v[TENSORS];
  make_tokens();
  cr_assert_eq(g->n_tensors, TENSORS);
  for (int i = 0; i < TENSORS; i++) {
    reference_tensor *t = &g->tensors[i];
    cr_assert_str_eq(t->name, golden_gradients[i].name);
    m[i] = calloc((size_t)t->numel, sizeof(double));
    v[i] = calloc((size_t)t->numel, sizeof(double));
    for (int64_t k = 0; k < t->numel; k++) t->value[k] = rig_value(i, k, t->name);
  }
  for (int step = 0; step <= GOLDEN_STEPS; step++) {
    for (int i = 0; i < TENSORS; i++)
      memset(g->tensors[i].gradient, 0, (size_t)g->tensors[i].numel * sizeof(double));
    const double loss = reference_gpt_run(g, tokens, targets, GOLDEN_BATCH, GOLDEN_LENGTH, NULL, 1, NULL);
    near(loss, golden_losses[step], step ? 1e-9 : 1e-13, "loss");
    for (int i = 0; i < TENSORS; i++) {
      reference_tensor *t = &g->tensors[i];
      double norm = 0;
      for (int64_t k = 0; k < t->numel; k++) {
        const double d = t->gradient[k];
        norm += d * d;
        m[i][k] = golden_beta1 * m[i][k] + (1 - golden_beta1) * d;
        v[i][k] = golden_beta2 * v[i][k] + (1 - golden_beta2) * d * d;
        const double m_hat = m[i][k] / (1 - pow(golden_beta1, step + 1));
        const double v_hat = v[i][k] / (1 - pow(golden_beta2, step + 1));
        t->value[k] -= golden_lr * (m_hat / (sqrt(v_hat) + golden_eps) +
                                    (decays(t->name) ? golden_decay : 0) * t->value[k]);
      }
      if (step) continue;
      near(sqrt(norm), golden_gradients[i].norm, 1e-13, t->name);
      near(t->gradient[0], golden_gradients[i].first, 1e-13, t->name);
      near(t->gradient[t->numel / 2], golden_gradients[i].middle, 1e-13, t->name);
      near(t->gradient[t->numel - 1], golden_gradients[i].last, 1e-13, t->name);
    }
  }
  for (int i = 0; i < TENSORS; i++) free(m[i]), free(v[i]);
  reference_gpt_destroy(g);
}

Test(golden, plugin_agrees_with_pytorch, .timeout = 60) {
  char settings[128];
  snprintf(settings, sizeof settings, "layers=%d heads=%d width=%d context=%d vocab=%d", GOLDEN_LAYERS, GOLDEN_HEADS,
           GOLDEN_WIDTH, GOLDEN_CONTEXT, GOLDEN_VOCAB);
  gpt_rig *r = gpt_rig_open(settings, GOLDEN_BATCH, GOLDEN_LENGTH, plain_extension);
  phx_error err = {.struct_size = sizeof err};
  float *m[TENSORS], *v[TENSORS];
  make_tokens();
  cr_assert_eq(r->model.n_params, TENSORS);
  for (uint32_t i = 0; i < TENSORS; i++) {
    m[i] = calloc((size_t)r->params[i].numel, sizeof(float));
    v[i] = calloc((size_t)r->params[i].numel, sizeof(float));
  }
  for (int step = 0; step <= GOLDEN_STEPS; step++) {
    double loss = NAN;
    cr_assert_eq(gpt_rig_step(r, tokens, targets, GOLDEN_BATCH, GOLDEN_LENGTH, 1, NULL, &loss, &err), PHX_OK, "%s",
                 err.message);
    near(loss, golden_losses[step], step ? 2e-5 : 2e-6, "loss");
    for (uint32_t i = 0; i < TENSORS; i++) {
      const phx_param *p = &r->params[i];
      const float *g = gpt_rig_gradient(r, i);
      double norm = 0;
      for (int64_t k = 0; k < p->numel; k++) norm += (double)g[k] * (double)g[k];
      if (!step) {
        const double size = golden_gradients[i].norm;
        near(sqrt(norm), size, 1e-5 * size, p->name);
        near((double)g[0], golden_gradients[i].first, 1e-5 * size, p->name);
        near((double)g[p->numel / 2], golden_gradients[i].middle, 1e-5 * size, p->name);
        near((double)g[p->numel - 1], golden_gradients[i].last, 1e-5 * size, p->name);
      }
      cr_expect_eq(!!(p->flags & PHX_PARAM_DECAY), decays(p->name));
      plain_ops.adamw(NULL, gpt_rig_weight(r, i), g, m[i], v[i], NULL, 0, p->numel, 1, (float)golden_lr,
                      (float)golden_beta1, (float)golden_beta2, (float)(1 - pow(golden_beta1, step + 1)),
                      (float)(1 - pow(golden_beta2, step + 1)), (float)golden_eps,
                      p->flags & PHX_PARAM_DECAY ? (float)golden_decay : 0, NULL, NULL);
    }
  }
  for (int i = 0; i < TENSORS; i++) free(m[i]), free(v[i]);
  gpt_rig_close(r);
}
