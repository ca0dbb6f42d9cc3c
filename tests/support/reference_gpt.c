/* The reference GPT-2 of the tests: see reference_gpt.h.  Everything is kept, nothing is fused, one sequence at a time.
 * One thread. */
#include "reference_gpt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LN1W, LN1B, QKVW, QKVB, PROJW, PROJB, LN2W, LN2B, FCW, FCB, OUTW, OUTB, PER_BLOCK };

static double *zeros(int64_t n) {
  double *p = calloc((size_t)n, sizeof *p);
  if (!p) abort();
  return p;
}

static void add_tensor(reference_gpt *g, const char *name, int64_t numel) {
  reference_tensor *t = &g->tensors[g->n_tensors++];
  snprintf(t->name, sizeof t->name, "%s", name);
  t->numel = numel;
  t->value = zeros(numel);
  t->gradient = zeros(numel);
}

reference_gpt *reference_gpt_create(int layers, int heads, int width, int context, int vocab) {
  static const char *const names[PER_BLOCK] = {"ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
                                               "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
                                               "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
                                               "mlp.c_proj.bias"};
  const int64_t c = width, numel[PER_BLOCK] = {c, c, 3 * c * c, 3 * c, c * c, c, c, c, 4 * c * c, 4 * c, 4 * c * c, c};
  reference_gpt *g = calloc(1, sizeof *g);
  if (!g) abort();
  *g = (reference_gpt){.layers = layers, .heads = heads, .width = width, .context = context, .vocab = vocab,
                       .eps = 1e-5};
  g->tensors = calloc((size_t)(PER_BLOCK * layers + 4), sizeof *g->tensors);
  if (!g->tensors) abort();
  add_tensor(g, "wte.weight", (int64_t)vocab * c);
  add_tensor(g, "wpe.weight", (int64_t)context * c);
  for (int l = 0; l < layers; l++)
    for (int i = 0; i < PER_BLOCK; i++) {
      char name[40];
      snprintf(name, sizeof name, "h.%d.%s", l, names[i]);
      add_tensor(g, name, numel[i]);
    }
  add_tensor(g, "ln_f.weight", c);
  add_tensor(g, "ln_f.bias", c);
  return g;
}

void reference_gpt_destroy(reference_gpt *g) {
  if (!g) return;
  for (int i = 0; i < g->n_tensors; i++) {
    free(g->tensors[i].value);
    free(g->tensors[i].gradient);
  }
  free(g->tensors);
  free(g);
}

reference_tensor *reference_gpt_find(reference_gpt *g, const char *name) {
  for (int i = 0; i < g->n_tensors; i++)
    if (!strcmp(g->tensors[i].name, name)) return &g->tensors[i];
  return NULL;
}

/* y(n, oc) = x(n, ic) w(oc, ic)^T + b */
static void linear(double *y, const double *x, const double *w, const double *b, int n, int ic, int oc) {
  for (int i = 0; i < n; i++)
    for (int o = 0; o < oc; o++) {
      double sum = b ? b[o] : 0;
      for (int k = 0; k < ic; k++) sum += x[i * ic + k] * w[(int64_t)o * ic + k];
      y[i * oc + o] = sum;
    }
}

/* Adds to dx, dw, db. */
static void linear_back(double *dx, double *dw, double *db, const double *dy, const double *x, const double *w, int n,
                        int ic, int oc) {
  for (int i = 0; i < n; i++)
    for (int o = 0; o < oc; o++) {
      const double d = dy[i * oc + o];
      if (db) db[o] += d;
      for (int k = 0; k < ic; k++) {
        dx[i * ic + k] += d * w[(int64_t)o * ic + k];
        dw[(int64_t)o * ic + k] += d * x[i * ic + k];
      }
    }
}

static void norm(const reference_gpt *g, double *y, const double *x, const double *w, const double *b, int n) {
  const int c = g->width;
  for (int i = 0; i < n; i++) {
    double mean = 0, var = 0;
    for (int k = 0; k < c; k++) mean += x[i * c + k] / c;
    for (int k = 0; k < c; k++) var += (x[i * c + k] - mean) * (x[i * c + k] - mean) / c;
    for (int k = 0; k < c; k++) y[i * c + k] = (x[i * c + k] - mean) / sqrt(var + g->eps) * w[k] + b[k];
  }
}

static void norm_back(const reference_gpt *g, double *dx, double *dw, double *db, const double *dy, const double *x,
                      const double *w, int n) {
  const int c = g->width;
  for (int i = 0; i < n; i++) {
    double mean = 0, var = 0, d_var = 0, d_mean = 0;
    for (int k = 0; k < c; k++) mean += x[i * c + k] / c;
    for (int k = 0; k < c; k++) var += (x[i * c + k] - mean) * (x[i * c + k] - mean) / c;
    const double s = sqrt(var + g->eps);
    for (int k = 0; k < c; k++) {
      const double d_hat = dy[i * c + k] * w[k];
      dw[k] += dy[i * c + k] * (x[i * c + k] - mean) / s;
      db[k] += dy[i * c + k];
      d_var += d_hat * (x[i * c + k] - mean) * -0.5 / (s * s * s);
      d_mean += -d_hat / s;
      dx[i * c + k] += d_hat / s;
    }
    for (int k = 0; k < c; k++) dx[i * c + k] += d_var * 2 * (x[i * c + k] - mean) / c + d_mean / c;
  }
}

/* p(heads, t, t): the weights; out(t, c) */
static void attend(double *out, double *p, const double *qkv, int t, int c, int heads) {
  const int hs = c / heads;
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < t; i++) {
      double *row = p + (h * t + i) * t, sum = 0;
      for (int j = 0; j <= i; j++) {
        double dot = 0;
        for (int d = 0; d < hs; d++) dot += qkv[i * 3 * c + h * hs + d] * qkv[j * 3 * c + c + h * hs + d];
        row[j] = exp(dot / sqrt(hs));
        sum += row[j];
      }
      for (int j = 0; j <= i; j++) row[j] /= sum;
      for (int d = 0; d < hs; d++) {
        double o = 0;
        for (int j = 0; j <= i; j++) o += row[j] * qkv[j * 3 * c + 2 * c + h * hs + d];
        out[i * c + h * hs + d] = o;
      }
    }
}

static void attend_back(double *dqkv, const double *dout, const double *p, const double *qkv, int t, int c, int heads) {
  const int hs = c / heads;
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < t; i++) {
      const double *row = p + (h * t + i) * t;
      double *dp = zeros(t), mixed = 0;
      for (int j = 0; j <= i; j++) {
        for (int d = 0; d < hs; d++) {
          dp[j] += dout[i * c + h * hs + d] * qkv[j * 3 * c + 2 * c + h * hs + d];
          dqkv[j * 3 * c + 2 * c + h * hs + d] += row[j] * dout[i * c + h * hs + d];
        }
        mixed += row[j] * dp[j];
      }
      for (int j = 0; j <= i; j++) {
        const double ds = row[j] * (dp[j] - mixed) / sqrt(hs);
        for (int d = 0; d < hs; d++) {
          dqkv[i * 3 * c + h * hs + d] += ds * qkv[j * 3 * c + c + h * hs + d];
          dqkv[j * 3 * c + c + h * hs + d] += ds * qkv[i * 3 * c + h * hs + d];
        }
      }
      free(dp);
    }
}

typedef struct block_state { /* of one sequence; all kept */
  double *ln1, *qkv, *p, *att, *proj, *res, *ln2, *pre, *act, *out;
} block_state;

static void block_forward(const reference_gpt *g, const reference_tensor *w, block_state *s, const double *x, int t) {
  const int c = g->width, heads = g->heads;
  s->ln1 = zeros(t * c), s->qkv = zeros(t * 3 * c), s->p = zeros(heads * t * t), s->att = zeros(t * c);
  s->proj = zeros(t * c), s->res = zeros(t * c), s->ln2 = zeros(t * c), s->pre = zeros(t * 4 * c);
  s->act = zeros(t * 4 * c), s->out = zeros(t * c);
  norm(g, s->ln1, x, w[LN1W].value, w[LN1B].value, t);
  linear(s->qkv, s->ln1, w[QKVW].value, w[QKVB].value, t, c, 3 * c);
  attend(s->att, s->p, s->qkv, t, c, heads);
  linear(s->proj, s->att, w[PROJW].value, w[PROJB].value, t, c, c);
  for (int i = 0; i < t * c; i++) s->res[i] = x[i] + s->proj[i];
  norm(g, s->ln2, s->res, w[LN2W].value, w[LN2B].value, t);
  linear(s->pre, s->ln2, w[FCW].value, w[FCB].value, t, c, 4 * c);
  for (int i = 0; i < t * 4 * c; i++) {
    const double v = s->pre[i];
    s->act[i] = 0.5 * v * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
  }
  linear(s->out, s->act, w[OUTW].value, w[OUTB].value, t, 4 * c, c);
  for (int i = 0; i < t * c; i++) s->out[i] += s->res[i];
}

/* d(t, c): gradient of the output; becomes the gradient of x. */
static void block_backward(const reference_gpt *g, reference_tensor *w, const block_state *s, const double *x,
                           double *d, int t) {
  const int c = g->width, heads = g->heads;
  double *dact = zeros(t * 4 * c), *dln = zeros(t * c), *datt = zeros(t * c), *dqkv = zeros(t * 3 * c);
  linear_back(dact, w[OUTW].gradient, w[OUTB].gradient, d, s->act, w[OUTW].value, t, 4 * c, c);
  for (int i = 0; i < t * 4 * c; i++) {
    const double v = s->pre[i], k = sqrt(2 / M_PI), th = tanh(k * (v + 0.044715 * v * v * v));
    dact[i] *= 0.5 * (1 + th) + 0.5 * v * (1 - th * th) * k * (1 + 0.134145 * v * v);
  }
  linear_back(dln, w[FCW].gradient, w[FCB].gradient, dact, s->ln2, w[FCW].value, t, c, 4 * c);
  norm_back(g, d, w[LN2W].gradient, w[LN2B].gradient, dln, s->res, w[LN2W].value, t);
  linear_back(datt, w[PROJW].gradient, w[PROJB].gradient, d, s->att, w[PROJW].value, t, c, c);
  attend_back(dqkv, datt, s->p, s->qkv, t, c, heads);
  memset(dln, 0, sizeof *dln * (size_t)(t * c));
  linear_back(dln, w[QKVW].gradient, w[QKVB].gradient, dqkv, s->ln1, w[QKVW].value, t, c, 3 * c);
  norm_back(g, d, w[LN1W].gradient, w[LN1B].gradient, dln, x, w[LN1W].value, t);
  free(dact), free(dln), free(datt), free(dqkv);
}

static void block_free(block_state *s) {
  double *all[] = {s->ln1, s->qkv, s->p, s->att, s->proj, s->res, s->ln2, s->pre, s->act, s->out};
  for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

/* The sum of one sequence's losses; gradients are of loss * scale. */
static double run_sequence(reference_gpt *g, const int32_t *tokens, const int32_t *targets, int t, const int *runs,
                           int backward, double scale, double *logits) {
  const int c = g->width, v = g->vocab, l = g->layers;
  reference_tensor *wte = &g->tensors[0], *wpe = &g->tensors[1], *lnf = &g->tensors[2 + PER_BLOCK * l];
  double *x0 = zeros(t * c), *ln = zeros(t * c), *d = zeros(t * c), *dln = zeros(t * c), loss = 0;
  block_state *blocks = calloc((size_t)l + 1, sizeof *blocks);
  const double **xs = calloc((size_t)l + 1, sizeof *xs); /* xs[i] goes into block i; xs[l] into ln_f */
  if (!blocks || !xs) abort();
  for (int i = 0; i < t * c; i++)
    x0[i] = wte->value[(int64_t)tokens[i / c] * c + i % c] + wpe->value[i];
  xs[0] = x0;
  for (int i = 0; i < l; i++) {
    xs[i + 1] = xs[i];
    if (runs && !runs[i]) continue;
    block_forward(g, &g->tensors[2 + PER_BLOCK * i], &blocks[i], xs[i], t);
    xs[i + 1] = blocks[i].out;
  }
  norm(g, ln, xs[l], lnf[0].value, lnf[1].value, t);
  linear(logits, ln, wte->value, NULL, t, c, v);
  double *dlogits = zeros((int64_t)t * v);
  for (int i = 0; i < t; i++) {
    double sum = 0;
    for (int k = 0; k < v; k++) sum += exp(logits[i * v + k]);
    loss += log(sum) - logits[i * v + targets[i]];
    for (int k = 0; k < v; k++) dlogits[i * v + k] = (exp(logits[i * v + k]) / sum - (k == targets[i])) * scale;
  }
  if (backward) {
    linear_back(dln, wte->gradient, NULL, dlogits, ln, wte->value, t, c, v);
    norm_back(g, d, lnf[0].gradient, lnf[1].gradient, dln, xs[l], lnf[0].value, t);
    for (int i = l - 1; i >= 0; i--)
      if (blocks[i].out) block_backward(g, &g->tensors[2 + PER_BLOCK * i], &blocks[i], xs[i], d, t);
    for (int i = 0; i < t * c; i++) {
      wte->gradient[(int64_t)tokens[i / c] * c + i % c] += d[i];
      wpe->gradient[i] += d[i];
    }
  }
  for (int i = 0; i < l; i++) block_free(&blocks[i]);
  free(dlogits), free(xs), free(blocks), free(dln), free(d), free(ln), free(x0);
  return loss;
}

double reference_gpt_run(reference_gpt *g, const int32_t *tokens, const int32_t *targets, int batch, int length,
                         const int *runs, int backward, double *logits) {
  const double scale = 1.0 / ((double)batch * length);
  double *own = logits ? NULL : zeros((int64_t)length * g->vocab), loss = 0;
  for (int b = 0; b < batch; b++)
    loss += run_sequence(g, tokens + b * length, targets + b * length, length, runs, backward, scale,
                         logits ? logits + (int64_t)b * length * g->vocab : own);
  free(own);
  return loss * scale;
}
