/* The gpt model: its declaration, its loss and every gradient against the reference, its memory, and what it refuses.
 */
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "gpt_rig.h"
#include "plain_ops.h"

enum { TOKENS = 128 };
static int32_t tokens[TOKENS], targets[TOKENS];

static void make_tokens(int64_t vocab, int64_t from) {
  for (int64_t i = 0; i < TOKENS; i++) {
    tokens[i] = rig_token(from + i, vocab);
    targets[i] = rig_token(from + i + 1, vocab);
  }
}

static double norm_eps = 1e-5; /* of the next reference */

/* A reference with the weights of the rig. */
static reference_gpt *reference_of(gpt_rig *r, int layers, int heads, int width) {
  reference_gpt *g = reference_gpt_create(layers, heads, width, (int)r->facts.context, (int)r->facts.vocabulary);
  g->eps = norm_eps;
  cr_assert_eq((int)r->model.n_params, g->n_tensors);
  for (uint32_t i = 0; i < r->model.n_params; i++) {
    cr_assert_str_eq(g->tensors[i].name, r->params[i].name);
    cr_assert_eq(g->tensors[i].numel, r->params[i].numel);
    for (int64_t k = 0; k < g->tensors[i].numel; k++) g->tensors[i].value[k] = (double)gpt_rig_weight(r, i)[k];
  }
  return g;
}

/* Per tensor: ||dg|| <= 1e-5 ||g|| + 1e-7 ||g of all||; in bf16, where every activation is rounded (2^-9 of it on the
 * average) a dozen times a block, <= 0.03 ||g|| + 0.004 ||g of all||. */
static void compare_gradients(gpt_rig *r, const reference_gpt *g) {
  const int low = r->shape.compute_dtype == PHX_BF16;
  const double of_own = low ? 0.03 : 1e-5, of_all = low ? 0.004 : 1e-7;
  double all = 0, worst = 0;
  const char *worst_name = "";
  for (int i = 0; i < g->n_tensors; i++)
    for (int64_t k = 0; k < g->tensors[i].numel; k++) all += g->tensors[i].gradient[k] * g->tensors[i].gradient[k];
  for (uint32_t i = 0; i < r->model.n_params; i++) {
    const reference_tensor *t = &g->tensors[i];
    if (!gpt_rig_gradient(r, i)) continue;
    double difference = 0, size = 0;
    for (int64_t k = 0; k < t->numel; k++) {
      const double d = (double)gpt_rig_gradient(r, i)[k] - t->gradient[k];
      difference += d * d;
      size += t->gradient[k] * t->gradient[k];
    }
    const double ratio = sqrt(difference) / (of_own * sqrt(size) + of_all * sqrt(all));
    if (!(ratio <= worst)) worst = ratio, worst_name = t->name;
    cr_expect(ratio <= 1, "%s: ||dg|| = %g, ||g|| = %g, ||g of all|| = %g", t->name, sqrt(difference), sqrt(size),
              sqrt(all));
  }
  fprintf(stderr, "largest gradient difference: %.3f of the bound, %s\n", worst, worst_name);
}

static void compare_case_as(int32_t dtype, const char *settings, int layers, int heads, int width, int64_t batch,
                            int64_t sequence, const int *runs, const void *(*extension)(const char *)) {
  gpt_rig *r = gpt_rig_open_as(dtype, settings, batch, sequence, extension);
  /* Attention's scores grow with the width until softmax is nearly a choice of one, where even an exact computation
   * from fp32 activations uses up half of the bound; GPT-2's own weights are far smaller. */
  for (uint32_t i = 0; width > 32 && i < r->model.n_params; i++)
    for (int64_t k = 0; r->params[i].ndim == 2 && k < r->params[i].numel; k++) gpt_rig_weight(r, i)[k] *= 0.5f;
  if (dtype == PHX_BF16) gpt_rig_round(r);
  reference_gpt *g = reference_of(r, layers, heads, width);
  phx_error err = {.struct_size = sizeof err};
  for (int micro = 0; micro < 2; micro++) { /* the second adds */
    double loss = NAN;
    make_tokens(r->facts.vocabulary, micro * 1000);
    cr_assert_eq(gpt_rig_step(r, tokens, targets, batch, sequence, micro == 0, runs, &loss, &err), PHX_OK, "%s",
                 err.message);
    const double expected = reference_gpt_run(g, tokens, targets, (int)batch, (int)sequence, runs, 1, NULL);
    cr_expect(fabs(loss - expected) <= (dtype == PHX_BF16 ? 4e-3 : 1e-5) * expected, "%s: loss %.17g, reference %.17g",
              settings, loss, expected);
    compare_gradients(r, g);
  }
  reference_gpt_destroy(g);
  gpt_rig_close(r);
}

static void compare_case(const char *settings, int layers, int heads, int width, int64_t batch, int64_t sequence,
                         const int *runs, const void *(*extension)(const char *)) {
  compare_case_as(PHX_F32, settings, layers, heads, width, batch, sequence, runs, extension);
}

Test(gpt, gradients_match_the_reference, .timeout = 120) {
  compare_case("layers=2 heads=3 width=30 context=33 vocab=257", 2, 3, 30, 2, 29, NULL, plain_extension);
}

Test(gpt, gradients_match_at_odd_shapes, .timeout = 120) {
  compare_case("layers=1 heads=1 width=7 context=5 vocab=11 vocab_pad=1", 1, 1, 7, 3, 5, NULL, plain_extension);
  compare_case("layers=1 heads=2 width=6 context=9 vocab=64", 1, 2, 6, 5, 1, NULL, plain_extension);
  compare_case("layers=3 heads=5 width=20 context=33 vocab=31 vocab_pad=3", 3, 5, 20, 1, 17, NULL, plain_extension);
}

/* In bf16, against the same reference in double on the rounded weights. */
static void compare_in_bf16(const void *(*extension)(const char *)) {
  const int runs[3] = {1, 0, 1};
  compare_case_as(PHX_BF16, "layers=2 heads=3 width=30 context=33 vocab=257", 2, 3, 30, 2, 29, NULL, extension);
  compare_case_as(PHX_BF16, "layers=1 heads=1 width=7 context=5 vocab=11 vocab_pad=1", 1, 1, 7, 3, 5, NULL, extension);
  compare_case_as(PHX_BF16, "layers=2 heads=4 width=64 context=40 vocab=257", 2, 4, 64, 3, 40, NULL, extension);
  compare_case_as(PHX_BF16, "layers=2 heads=2 width=10 context=8 vocab=33 freeze=*.weight", 2, 2, 10, 2, 7, NULL,
                  extension);
  compare_case_as(PHX_BF16, "layers=2 heads=2 width=10 context=8 vocab=33 freeze=h.?.ln_1.weight,ln_f.bias", 2, 2, 10,
                  2, 7, NULL, extension);
  compare_case_as(PHX_BF16, "layers=3 heads=2 width=10 context=8 vocab=33 layer_drop=0.5", 3, 2, 10, 2, 8, runs,
                  extension);
}
Test(gpt, gradients_match_with_another_norm_eps, .timeout = 120) {
  norm_eps = 0.1;
  compare_case("layers=2 heads=3 width=30 context=33 vocab=257 norm_eps=0.1", 2, 3, 30, 2, 29, NULL, plain_extension);
  norm_eps = 1e-5;
}

Test(gpt, gradients_match_in_bf16, .timeout = 120) {
  compare_in_bf16(plain_extension);
}

Test(gpt, gradients_match_with_frozen_parameters, .timeout = 120) {
  const char *const patterns[] = {"wte.weight", "wpe.*,h.0.*", "*.weight", "*.bias", "h.?.ln_1.weight,ln_f.bias",
                                  "h.1.mlp.c_fc.weight,h.0.ln_2.bias,ln_f.*", "h.*,ln_f.*,wpe.*"};
  for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
    char settings[256];
    snprintf(settings, sizeof settings, "layers=2 heads=2 width=10 context=8 vocab=33 freeze=%s", patterns[i]);
    compare_case(settings, 2, 2, 10, 2, 7, NULL, plain_extension);
  }
}

Test(gpt, gradients_match_with_dropped_layers, .timeout = 120) {
  const char *settings = "layers=3 heads=2 width=10 context=8 vocab=33 layer_drop=0.5";
  for (int mask = 0; mask < 8; mask++) {
    const int runs[3] = {mask & 1, mask >> 1 & 1, mask >> 2 & 1};
    compare_case(settings, 3, 2, 10, 2, 8, runs, plain_extension);
  }
}

/* Guard bytes show that no more is used; this shows that no less is. */
Test(gpt, announced_memory_is_all_used, .timeout = 60) {
  const char *const settings[] = {"layers=1 heads=3 width=30 context=33 vocab=257",
                                  "layers=1 heads=2 width=96 context=8 vocab=33",
                                  "layers=1 heads=2 width=10 context=8 vocab=300 freeze=h.*.weight"};
  for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++) {
    gpt_rig *r = gpt_rig_open(settings[i], 2, 8, plain_extension);
    phx_error err = {.struct_size = sizeof err};
    double loss = 0;
    make_tokens(r->facts.vocabulary, 0);
    cr_assert_eq(gpt_rig_step(r, tokens, targets, 2, 8, 1, NULL, &loss, &err), PHX_OK, "%s", err.message);
    for (uint32_t stage = 0; stage < r->model.n_stages; stage++) cr_expect_eq(gpt_rig_unused_saved(r, stage), 0);
    cr_expect_eq(r->workspace_used, r->workspace.bytes);
    gpt_rig_close(r);
  }
}

/* The cpu plugin's operations, where it is built. */
static const phx_device_table *cpu_table;
static phx_device_self *cpu_self;
static const void *cpu_extension(const char *id) {
  if (!strcmp(id, PHX_EXT_OPS)) return cpu_table->ops(cpu_self);
  if (!strcmp(id, PHX_EXT_DEVICE)) return cpu_table->device(cpu_self);
  return NULL;
}

Test(gpt, gradients_match_on_the_cpu_device, .timeout = 120) {
  if (access(PHX_TEST_PLUGINS "/phx_device_cpu.so", R_OK)) cr_skip_test("the cpu device is not built");
  const phx_plugin *plugin = fake_host_plugin("phx_device_cpu.so");
  void *config = calloc(1, plugin->config_size ? plugin->config_size : 1);
  fake_host host;
  phx_error err = {.struct_size = sizeof err};
  fake_host_init(&host, 0, 1);
  cpu_table = plugin->table;
  cr_assert_eq(cpu_table->create(&host.host, config, 1, &cpu_self, &err), PHX_OK, "%s", err.message);
  compare_case("layers=2 heads=3 width=30 context=33 vocab=257", 2, 3, 30, 2, 29, NULL, cpu_extension);
  compare_case("layers=2 heads=4 width=64 context=40 vocab=257", 2, 4, 64, 3, 40, NULL, cpu_extension);
  compare_case("layers=2 heads=2 width=10 context=8 vocab=33 freeze=*.weight", 2, 2, 10, 2, 7, NULL, cpu_extension);
  compare_case("layers=2 heads=2 width=10 context=8 vocab=33 freeze=*.bias", 2, 2, 10, 2, 7, NULL, cpu_extension);
  compare_in_bf16(cpu_extension);
  cpu_table->destroy(cpu_self);
  free(config);
}

/* The reference itself, element by element, against central differences. */
Test(gpt, reference_gradients_are_numerical_gradients, .timeout = 60) {
  reference_gpt *g = reference_gpt_create(2, 3, 12, 9, 17);
  for (int i = 0; i < g->n_tensors; i++)
    for (int64_t k = 0; k < g->tensors[i].numel; k++) g->tensors[i].value[k] = rig_value(i, k, g->tensors[i].name);
  make_tokens(17, 3);
  reference_gpt_run(g, tokens, targets, 2, 8, NULL, 1, NULL);
  for (int i = 0; i < g->n_tensors; i++) {
    reference_tensor *t = &g->tensors[i];
    for (int64_t n = 0; n < 9; n++) {
      const int64_t k = (n * 7919 + 3) % t->numel;
      const double kept = t->value[k], h = 1e-5;
      t->value[k] = kept + h;
      const double up = reference_gpt_run(g, tokens, targets, 2, 8, NULL, 0, NULL);
      t->value[k] = kept - h;
      const double down = reference_gpt_run(g, tokens, targets, 2, 8, NULL, 0, NULL);
      t->value[k] = kept;
      const double numerical = (up - down) / (2 * h);
      cr_expect(fabs(numerical - t->gradient[k]) <= 1e-7 * (1 + fabs(numerical)), "%s[%lld]: %.12g, numerical %.12g",
                t->name, (long long)k, t->gradient[k], numerical);
    }
  }
  reference_gpt_destroy(g);
}

Test(gpt, evaluation_gives_loss_and_last_logits, .timeout = 60) {
  gpt_rig *r = gpt_rig_open("layers=2 heads=3 width=30 context=33 vocab=257", 3, 20, plain_extension);
  reference_gpt *g = reference_of(r, 2, 3, 30);
  phx_error err = {.struct_size = sizeof err};
  make_tokens(257, 0);
  double *all = calloc(3 * 20 * 257, sizeof *all), loss = NAN;
  float *last = calloc(3 * 257, sizeof *last);
  for (int64_t t = 1; t <= 20; t += 19) {
    const double expected = reference_gpt_run(g, tokens, targets, 3, (int)t, NULL, 0, all);
    loss = NAN;
    cr_assert_eq(gpt_rig_evaluate(r, tokens, targets, 3, t, &loss, NULL, &err), PHX_OK, "%s", err.message);
    cr_expect(fabs(loss - expected) < 1e-5 * expected);
    cr_assert_eq(gpt_rig_evaluate(r, tokens, NULL, 3, t, NULL, last, &err), PHX_OK, "%s", err.message);
    for (int64_t b = 0; b < 3; b++)
      for (int64_t v = 0; v < 257; v++)
        cr_assert_float_eq(last[b * 257 + v], all[((b + 1) * t - 1) * 257 + v], 2e-5, "b %d v %d", (int)b, (int)v);
    loss = NAN;
    cr_assert_eq(gpt_rig_evaluate(r, tokens, targets, 3, t, &loss, last, &err), PHX_OK, "%s", err.message);
    cr_expect(fabs(loss - expected) < 1e-5 * expected);
  }
  cr_expect_eq(gpt_rig_evaluate(r, tokens, NULL, 3, 5, NULL, NULL, &err), PHX_INTERNAL);
  cr_expect_eq(gpt_rig_evaluate(r, tokens, targets, 4, 5, &loss, NULL, &err), PHX_INTERNAL);
  free(last), free(all);
  reference_gpt_destroy(g);
  gpt_rig_close(r);
}

/* The model reads nothing that a device wrote: losses are averaged and logits copied by the device, and until its
 * stream is synchronized neither need be there. */
static phx_device far_device;
static phx_ops far_ops;
static double *late_loss;
static float *late_logits;
static int64_t late_bytes;
static phx_status far_mean(void *ctx, double *out, const float *x, int64_t n, phx_stream *s, phx_error *err) {
  late_loss = out;
  *out = NAN;
  double mean = 0;
  const phx_status status = plain_ops.mean(ctx, &mean, x, n, s, err);
  cr_assert(isfinite(mean));
  return status;
}
static phx_status far_copy(void *ctx, void *dst, const void *src, int64_t bytes, phx_stream *s, phx_error *err) {
  late_logits = dst, late_bytes = bytes;
  return plain_device.copy(ctx, dst, src, bytes, s, err);
}
static const void *far_extension(const char *id) {
  far_device = plain_device;
  far_device.caps = 0;
  far_device.copy = far_copy;
  far_ops = plain_ops;
  far_ops.mean = far_mean;
  return strcmp(id, PHX_EXT_DEVICE) ? &far_ops : (const void *)&far_device;
}

Test(gpt, loss_and_logits_are_left_to_the_device) {
  double loss = 0;
  float logits[2 * 9];
  phx_error err = {.struct_size = sizeof err};
  make_tokens(9, 0);
  gpt_rig *r = gpt_rig_open("layers=1 heads=2 width=8 context=8 vocab=9", 2, 8, far_extension);
  cr_expect_eq(r->host.allocs, 0);
  cr_assert_eq(gpt_rig_step(r, tokens, targets, 2, 8, 1, NULL, &loss, &err), PHX_OK);
  cr_expect_eq(late_loss, &loss);
  cr_expect(isnan(loss));
  cr_assert_eq(gpt_rig_evaluate(r, tokens, NULL, 2, 8, NULL, logits, &err), PHX_OK);
  cr_expect_eq(late_logits, logits);
  cr_expect_eq(late_bytes, (int64_t)sizeof logits);
  gpt_rig_close(r);
}

/* Every operation fails once; each failure comes out with its status, and nothing is written out of bounds. */
static phx_ops failing_ops;
static int fail_at, calls_made;
static int fails(void) { return ++calls_made == fail_at; }
#define FAILING(name, parameters, arguments)    \
  static phx_status fail_##name parameters {    \
    return fails() ? PHX_DEVICE : plain_ops.name arguments; \
  }
FAILING(linear,
        (void *c, int32_t t, void *o, int64_t ld, void *pre, const void *x, const void *w, const void *b, int64_t n,
         int64_t ic, int64_t oc, int32_t g, phx_stream *s, phx_error *e),
        (c, t, o, ld, pre, x, w, b, n, ic, oc, g, s, e))
FAILING(linear_backward_input,
        (void *c, int32_t t, void *dx, const void *d, int64_t ld, const void *w, const void *pre, int64_t n, int64_t ic,
         int64_t oc, int32_t m, phx_stream *s, phx_error *e),
        (c, t, dx, d, ld, w, pre, n, ic, oc, m, s, e))
FAILING(linear_backward_weight,
        (void *c, int32_t t, float *dw, float *db, const void *d, int64_t ld, const void *x, int64_t n, int64_t ic,
         int64_t oc, int32_t wm, int32_t bm, phx_stream *s, phx_error *e),
        (c, t, dw, db, d, ld, x, n, ic, oc, wm, bm, s, e))
FAILING(layer_norm,
        (void *c, int32_t t, void *o, void *sum, float *m, float *r, const void *a, const void *b, const void *w,
         const void *bias, int64_t n, int64_t ch, float eps, phx_stream *s, phx_error *e),
        (c, t, o, sum, m, r, a, b, w, bias, n, ch, eps, s, e))
FAILING(layer_norm_backward,
        (void *c, int32_t t, void *dx, const void *add, float *dw, int32_t wm, float *db, int32_t bm, const void *d,
         const void *x, const void *w, const float *m, const float *r, int64_t n, int64_t ch, phx_stream *s,
         phx_error *e),
        (c, t, dx, add, dw, wm, db, bm, d, x, w, m, r, n, ch, s, e))
FAILING(mean, (void *c, double *o, const float *x, int64_t n, phx_stream *s, phx_error *e), (c, o, x, n, s, e))

static const void *failing_extension(const char *id) {
  if (strcmp(id, PHX_EXT_OPS)) return plain_extension(id);
  failing_ops = plain_ops;
  failing_ops.linear = fail_linear;
  failing_ops.linear_backward_input = fail_linear_backward_input;
  failing_ops.linear_backward_weight = fail_linear_backward_weight;
  failing_ops.layer_norm = fail_layer_norm;
  failing_ops.layer_norm_backward = fail_layer_norm_backward;
  failing_ops.mean = fail_mean;
  return &failing_ops;
}

Test(gpt, a_failing_operation_is_reported, .timeout = 60) {
  gpt_rig *r = gpt_rig_open("layers=1 heads=2 width=8 context=4 vocab=9", 1, 4, failing_extension);
  phx_error err = {.struct_size = sizeof err};
  double loss = 0;
  make_tokens(9, 0);
  int n = 0;
  for (fail_at = 1;; fail_at++, n++) {
    calls_made = 0;
    const phx_status status = gpt_rig_step(r, tokens, targets, 1, 4, 1, NULL, &loss, &err);
    if (status == PHX_OK) break;
    cr_assert_eq(status, PHX_DEVICE);
  }
  cr_expect_eq(n, calls_made);
  cr_expect_geq(n, 20);
  gpt_rig_close(r);
}

static int64_t count_parameters(const phx_model *m) {
  int64_t total = 0;
  for (uint32_t i = 0; i < m->n_params; i++) {
    const phx_param *p = phx_model_param(m, i);
    total += p->shape[0] * p->shape[1] * p->shape[2] * p->shape[3];
  }
  return total;
}

Test(gpt, presets_have_the_published_sizes) {
  const struct {
    const char *settings;
    int64_t parameters, layers;
  } presets[] = {{"size=124M", 124439808, 12},
                 {"size=355M", 354823168, 24},
                 {"size=774M", 774030080, 36},
                 {"size=1558M", 1557611200, 48},
                 {"size=tiny", 859008, 4}};
  for (size_t i = 0; i < sizeof presets / sizeof presets[0]; i++) {
    rig_config c = rig_config_make(presets[i].settings);
    const phx_model_table *table = c.plugin->table;
    const phx_batch_shape shape = {sizeof shape, 4, 256, PHX_F32, 0};
    phx_model m = {.struct_size = sizeof m};
    phx_model_facts f = {.struct_size = sizeof f};
    cr_assert_eq(table->declare(c.values, &m, &f, &shape, NULL), PHX_OK);
    cr_expect_eq(count_parameters(&m), presets[i].parameters, "%s: %lld", presets[i].settings,
                 (long long)count_parameters(&m));
    cr_expect_eq(m.n_stages, presets[i].layers + 2);
    cr_expect_eq(m.n_units, presets[i].layers + 3);
    phx_stage_memory memory = {.struct_size = sizeof memory};
    for (uint32_t s = 0; s < m.n_stages; s++)
      cr_expect_eq(table->stage_memory(c.values, &shape, s, &memory, NULL), PHX_OK);
    cr_expect_neq(table->stage_memory(c.values, &shape, m.n_stages, &memory, NULL), PHX_OK);
    rig_config_free(&c);
  }
}

Test(gpt, declaration_is_gpt2s) {
  rig_config c = rig_config_make("size=124M freeze=h.3.*");
  const phx_model_table *table = c.plugin->table;
  const phx_batch_shape shape = {sizeof shape, 4, 256, PHX_F32, 0};
  phx_model m = {.struct_size = sizeof m};
  phx_model_facts f = {.struct_size = sizeof f};
  cr_assert_eq(table->declare(c.values, &m, &f, &shape, NULL), PHX_OK);
  cr_expect_eq(f.vocabulary, 50257);
  cr_expect_eq(f.context, 1024);
  cr_expect_float_eq(f.flops_per_token, 6 * (12.0 * 12 * 768 * 768 + 50257.0 * 768) + 12.0 * 12 * 768 * 256, 1);
  uint32_t next = 0;
  for (uint32_t u = 0; u < m.n_units; u++) {
    cr_expect_eq(phx_model_unit(&m, u)->first_param, next);
    next += phx_model_unit(&m, u)->n_params;
    for (uint32_t p = phx_model_unit(&m, u)->first_param; p < next; p++) cr_expect_eq(phx_model_param(&m, p)->unit, u);
  }
  cr_expect_eq(next, m.n_params);
  for (uint32_t i = 0; i < m.n_params; i++) {
    const phx_param *p = phx_model_param(&m, i);
    cr_expect_eq(!!(p->flags & PHX_PARAM_DECAY), p->ndim == 2, "%s", p->name);
    cr_expect_eq(!!(p->flags & PHX_PARAM_FROZEN), !strncmp(p->name, "h.3.", 4), "%s", p->name);
    const int norm = strstr(p->name, "ln_") && strstr(p->name, ".weight");
    cr_expect_eq(p->init, p->ndim == 2 ? PHX_INIT_NORMAL : norm ? PHX_INIT_ONE : PHX_INIT_ZERO, "%s", p->name);
    const double std = p->ndim == 1 ? 0 : strstr(p->name, "c_proj") ? 0.02 / sqrt(24) : 0.02;
    cr_expect_float_eq(p->init_std, std, 1e-15, "%s", p->name);
  }
  const phx_param *fc = phx_model_param(&m, 2 + 8);
  cr_expect_str_eq(fc->name, "h.0.mlp.c_fc.weight");
  cr_expect_eq(fc->shape[0], 3072);
  cr_expect_eq(fc->shape[1], 768);
  const phx_stage *embed = phx_model_stage(&m, 0), *frozen = phx_model_stage(&m, 4), *head = phx_model_stage(&m, 13);
  cr_expect_eq(embed->n_uses, 2);
  for (uint32_t i = 0; i < 2; i++)
    cr_expect_eq(phx_model_use(&m, embed->first_use + i)->flags, PHX_USE_FORWARD | PHX_USE_GRADIENT);
  cr_expect_str_eq(frozen->name, "h.3");
  cr_expect_eq(phx_model_use(&m, frozen->first_use)->flags, PHX_USE_FORWARD | PHX_USE_BACKWARD);
  cr_expect_eq(head->n_uses, 2);
  cr_expect_eq(phx_model_use(&m, head->first_use)->unit, 14);
  cr_expect_eq(phx_model_use(&m, head->first_use + 1)->unit, 0, "the head is tied to the embedding");
  cr_expect_eq(phx_model_use(&m, head->first_use + 1)->flags, PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT);
  rig_config_free(&c);
}

Test(gpt, misfits_are_refused) {
  const struct {
    const char *settings, *message;
    int64_t sequence;
  } cases[] = {
      {"layers=2 width=30", "[model] heads, context, vocab not set", 8},
      {"size=none", "layers, heads, width, context, vocab not set: give size = tiny", 8},
      {"layers=2 heads=4 width=30 context=8 vocab=9", "30 = 4 x 7 + 2", 8},
      {"size=tiny heads=3", "width = 128 is not a multiple of heads = 3", 8},
      {"size=tiny", "sequence = 257 does not fit the model's context of 256", 257},
      {"size=tiny", "sequence = 0", 0},
      {"size=tiny freeze=h.4.*", "'h.4.*' matches no parameter", 8},
      {"size=tiny freeze=wte.weight,wpe", "'wpe' matches no parameter", 8},
      {"size=tiny freeze=*", "leaves nothing to train", 8},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    rig_config c = rig_config_make(cases[i].settings);
    const phx_model_table *table = c.plugin->table;
    const phx_batch_shape shape = {sizeof shape, 1, cases[i].sequence, PHX_F32, 0};
    phx_model m = {.struct_size = sizeof m, .n_params = 77};
    phx_model_facts f = {.struct_size = sizeof f};
    phx_error err = {.struct_size = sizeof err};
    cr_expect_eq(table->declare(c.values, &m, &f, &shape, &err), PHX_INVALID, "%s", cases[i].settings);
    cr_expect(strstr(err.message, cases[i].message), "%s: %s", cases[i].settings, err.message);
    cr_expect_eq(m.n_params, 77, "outputs are written only on success");
    rig_config_free(&c);
  }
  rig_config c = rig_config_make("size=1558M");
  const phx_batch_shape huge = {sizeof huge, INT64_MAX / 8, 1024, PHX_F32, 0};
  phx_stage_memory memory = {.struct_size = sizeof memory};
  phx_error err = {.struct_size = sizeof err};
  cr_expect_eq(((const phx_model_table *)c.plugin->table)->stage_memory(c.values, &huge, 1, &memory, &err),
               PHX_INVALID);
  cr_expect(strstr(err.message, "64 bits"), "%s", err.message);
  rig_config_free(&c);
}

Test(gpt, explicit_values_override_the_preset) {
  rig_config c = rig_config_make("size=124M layers=2 vocab=1000 width=96 heads=4");
  const phx_batch_shape shape = {sizeof shape, 1, 1024, PHX_F32, 0};
  phx_model m = {.struct_size = sizeof m};
  phx_model_facts f = {.struct_size = sizeof f};
  cr_assert_eq(((const phx_model_table *)c.plugin->table)->declare(c.values, &m, &f, &shape, NULL), PHX_OK);
  cr_expect_eq(m.n_stages, 4);
  cr_expect_eq(f.vocabulary, 1000);
  cr_expect_eq(f.context, 1024);
  cr_expect_eq(phx_model_param(&m, 0)->shape[1], 96);
  rig_config_free(&c);
}

/* bf16 halves the activations; what stays fp32 is a token's H + 4 floats and rounding to PHX_ALIGN. */
Test(gpt, activations_in_bf16_take_half) {
  rig_config c = rig_config_make("size=124M");
  const phx_model_table *table = c.plugin->table;
  for (uint32_t stage = 0; stage <= 13; stage++) {
    phx_stage_memory m[2] = {{.struct_size = sizeof *m}, {.struct_size = sizeof *m}};
    for (int low = 0; low < 2; low++) {
      const phx_batch_shape shape = {sizeof shape, 4, 1024, low ? PHX_BF16 : PHX_F32, 0};
      cr_assert_eq(table->stage_memory(c.values, &shape, stage, &m[low], NULL), PHX_OK);
    }
    const int64_t kept = stage == 0 ? 0 : stage == 13 ? 2 * 4096 * 4 : 4096 * 16 * 4;
    cr_expect_eq(2 * m[1].output, m[0].output);
    cr_expect_eq(2 * (m[1].saved - kept), m[0].saved - kept, "stage %u", stage);
  }
  const phx_batch_shape other = {sizeof other, 4, 1024, PHX_F16, 0};
  phx_stage_memory m;
  cr_expect_eq(table->stage_memory(c.values, &other, 1, &m, NULL), PHX_UNSUPPORTED);
  rig_config_free(&c);
}

/* Logits of the last position in bf16: those of the loss, in fp32 on their way out. */
Test(gpt, logits_in_bf16) {
  float last[3 * 257];
  double *all = malloc(3 * 5 * 257 * sizeof *all), largest = 0;
  phx_error err = {.struct_size = sizeof err};
  for (int64_t sequence = 1; sequence <= 5; sequence += 4) {
    gpt_rig *r =
        gpt_rig_open_as(PHX_BF16, "layers=1 heads=2 width=12 context=5 vocab=257", 3, sequence, plain_extension);
    reference_gpt *g = reference_of(r, 1, 2, 12);
    make_tokens(257, 0);
    cr_assert_eq(gpt_rig_evaluate(r, tokens, NULL, 3, sequence, NULL, last, &err), PHX_OK, "%s", err.message);
    reference_gpt_run(g, tokens, targets, 3, (int)sequence, NULL, 0, all);
    for (int i = 0; i < 3 * 257; i++) {
      const double want = all[((i / 257 + 1) * sequence - 1) * 257 + i % 257];
      largest = fmax(largest, fabs(want));
      cr_expect(fabs((double)last[i] - want) <= 0.02 * fmax(1, largest), "%d: %g, not %g", i, last[i], want);
    }
    reference_gpt_destroy(g);
    gpt_rig_close(r);
  }
  free(all);
}

Test(gpt, weights_of_another_type_are_refused) {
  gpt_rig *r = gpt_rig_open("layers=1 heads=2 width=8 context=4 vocab=9", 1, 4, plain_extension);
  phx_param_view params[2] = {{.weight = gpt_rig_weight(r, 0), .weight_dtype = PHX_BF16},
                              {.weight = gpt_rig_weight(r, 1), .weight_dtype = PHX_F32}};
  phx_view view = {.struct_size = sizeof view, .params = params, .n_params = 2, .param_stride = sizeof *params};
  phx_error err = {.struct_size = sizeof err};
  make_tokens(9, 0);
  const phx_stage_call call = {.struct_size = sizeof call, .view = &view, .tokens = tokens, .batch = 1, .sequence = 4};
  cr_expect_eq(r->table->forward(r->self, &call, &err), PHX_UNSUPPORTED);
  cr_expect(strstr(err.message, "compute"), "%s", err.message);
  gpt_rig_close(r);
}

Test(gpt, layer_drop_is_a_pure_function_with_the_right_rate) {
  gpt_rig *r = gpt_rig_open("layers=4 heads=2 width=8 context=4 vocab=9 layer_drop=0.25", 1, 4, plain_extension);
  int64_t dropped = 0, same_as_next_rank = 0, n = 0;
  for (int64_t step = 1; step <= 500; step++)
    for (int32_t micro = 0; micro < 3; micro++)
      for (uint32_t stage = 1; stage <= 4; stage++, n++) {
        const int32_t runs = r->table->stage_runs(r->self, stage, 1337, step, micro, 1);
        cr_assert_eq(runs, r->table->stage_runs(r->self, stage, 1337, step, micro, 1));
        dropped += !runs;
        same_as_next_rank += runs == r->table->stage_runs(r->self, stage, 1337, step, micro, 2);
      }
  cr_expect(fabs((double)dropped / (double)n - 0.25) < 0.03, "%lld of %lld", (long long)dropped, (long long)n);
  cr_expect(fabs((double)same_as_next_rank / (double)n - 0.625) < 0.04, "ranks draw on their own: %lld of %lld",
            (long long)same_as_next_rank, (long long)n);
  for (int64_t step = 1; step <= 100; step++) {
    cr_expect_eq(r->table->stage_runs(r->self, 0, 1, step, 0, 0), 1);
    cr_expect_eq(r->table->stage_runs(r->self, 5, 1, step, 0, 0), 1);
  }
  gpt_rig_close(r);
  r = gpt_rig_open("layers=4 heads=2 width=8 context=4 vocab=9 layer_drop=1", 1, 4, plain_extension);
  for (int64_t step = 1; step <= 100; step++) cr_expect_eq(r->table->stage_runs(r->self, 2, 1, step, 0, 0), 0);
  gpt_rig_close(r);
}
