/* tests/bench/unfused.c - causal attention as separate operations: oneDNN's products over blocks of query rows, each
 * only as wide as the causal mask leaves it, a vectorised softmax in place, and the T x T probabilities kept from
 * forward to backward.  Backward needs four products then, the fused one five. */
#include <dnnl.h>
#include <math.h>
#include "unfused.h"
#include "../../plugins/cpu/simd.h"

static int64_t least(int64_t x, int64_t y) {
  return x < y ? x : y;
}

/* x[0 .. n) becomes softmax(x), x[n .. end) zero. */
static void softmax(float *x, int64_t n, int64_t end) {
  float top = -INFINITY, sum = 0.0f;
  phx__vf best = phx__splat(-INFINITY), total = {0};
  int64_t i = 0;
  for (; i + PHX__LANES <= n; i += PHX__LANES) {
    const phx__vf y = phx__load(x + i);
    best = phx__choose(y > best, y, best);
  }
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int l = 0; l < PHX__LANES; l++) top = best[l] > top ? best[l] : top;
  for (i = 0; i + PHX__LANES <= n; i += PHX__LANES) {
    const phx__vf e = phx__vexp(phx__load(x + i) - top);
    phx__store(x + i, e);
    total += e;
  }
  for (; i < n; i++) sum += x[i] = expf(x[i] - top);
  for (int l = 0; l < PHX__LANES; l++) sum += total[l];
  const float by = 1.0f / sum;
  for (i = 0; i + PHX__LANES <= n; i += PHX__LANES) phx__store(x + i, phx__load(x + i) * by);
  for (; i < n; i++) x[i] *= by;
  for (; i < end; i++) x[i] = 0.0f;
}

/* One operation on one block of rows of one head. */
typedef struct block {
  const unfused *u;
  int64_t head, first, n, end; /* rows [first, first + n); columns below end = first + n */
} block;
typedef void operation(const block *k);

static int64_t model_at(const block *k) {
  const unfused *u = k->u;
  return k->head / u->heads * u->t * 3 * u->c + k->head % u->heads * (u->c / u->heads);
}
static int64_t out_at(const block *k) {
  const unfused *u = k->u;
  return (k->head / u->heads * u->t + k->first) * u->c + k->head % u->heads * (u->c / u->heads);
}
static float *square_at(const block *k, float *p) { return p + (k->head * k->u->t + k->first) * k->u->t; }
static float scale_of(const unfused *u) { return 1.0f / sqrtf((float)(u->c / u->heads)); }

static void scores(const block *k) {
  const unfused *u = k->u;
  const float *q = u->qkv + model_at(k);
  dnnl_sgemm('N', 'T', k->n, k->end, u->c / u->heads, scale_of(u), q + k->first * 3 * u->c, 3 * u->c, q + u->c,
             3 * u->c, 0.0f, square_at(k, u->p), u->t);
}
static void probabilities(const block *k) {
  for (int64_t y = 0; y < k->n; y++) softmax(square_at(k, k->u->p) + y * k->u->t, k->first + y + 1, k->end);
}
static void values(const block *k) {
  const unfused *u = k->u;
  dnnl_sgemm('N', 'N', k->n, u->c / u->heads, k->end, 1.0f, square_at(k, u->p), u->t, u->qkv + model_at(k) + 2 * u->c,
             3 * u->c, 0.0f, u->out + out_at(k), u->c);
}

/* Blocks come from the last down: the first product then writes every row of dk and dv, later ones add. */
static float adds(const block *k) { return k->end < k->u->t ? 1.0f : 0.0f; }
static void values_gradient(const block *k) {
  const unfused *u = k->u;
  dnnl_sgemm('T', 'N', k->end, u->c / u->heads, k->n, 1.0f, square_at(k, u->p), u->t, u->dout + out_at(k), u->c,
             adds(k), u->dqkv + model_at(k) + 2 * u->c, 3 * u->c);
}
static void probabilities_gradient(const block *k) {
  const unfused *u = k->u;
  dnnl_sgemm('N', 'T', k->n, k->end, u->c / u->heads, 1.0f, u->dout + out_at(k), u->c,
             u->qkv + model_at(k) + 2 * u->c, 3 * u->c, 0.0f, square_at(k, u->dp), u->t);
}
static void scores_gradient(const block *k) {
  const unfused *u = k->u;
  const float *g = u->dout + out_at(k), *o = u->out + out_at(k);
  for (int64_t y = 0; y < k->n; y++) {
    const float *s = square_at(k, u->p) + y * u->t;
    float *d = square_at(k, u->dp) + y * u->t, dot = 0.0f;
    int64_t x = 0;
    for (int64_t i = 0; i < u->c / u->heads; i++) dot += g[y * u->c + i] * o[y * u->c + i];
    for (; x + PHX__LANES <= k->end; x += PHX__LANES)
      phx__store(d + x, phx__load(s + x) * (phx__load(d + x) - dot));
    for (; x < k->end; x++) d[x] = s[x] * (d[x] - dot);
  }
}
static void queries_gradient(const block *k) {
  const unfused *u = k->u;
  dnnl_sgemm('N', 'N', k->n, u->c / u->heads, k->end, scale_of(u), square_at(k, u->dp), u->t,
             u->qkv + model_at(k) + u->c, 3 * u->c, 0.0f, u->dqkv + model_at(k) + k->first * 3 * u->c, 3 * u->c);
}
static void keys_gradient(const block *k) {
  const unfused *u = k->u;
  dnnl_sgemm('T', 'N', k->end, u->c / u->heads, k->n, scale_of(u), square_at(k, u->dp), u->t,
             u->qkv + model_at(k) + k->first * 3 * u->c, 3 * u->c, adds(k), u->dqkv + model_at(k) + u->c, 3 * u->c);
}

static void run_block(const unfused *u, int64_t head, int64_t first, operation *const *list, int n) {
  const block k = {u, head, first, least(u->rows, u->t - first), first + least(u->rows, u->t - first)};
  for (int i = 0; i < n; i++) list[i](&k);
}
static void run_all(const unfused *u, operation *const *list, int n) {
  const int at_once = u->by_blocks ? n : 1;
  for (int i = 0; i < n; i += at_once)
    for (int64_t head = 0; head < u->b * u->heads; head++)
      for (int64_t first = (u->t - 1) / u->rows * u->rows; first >= 0; first -= u->rows)
        run_block(u, head, first, list + i, at_once);
}

void unfused_forward(const unfused *u) {
  static operation *const list[] = {scores, probabilities, values};
  run_all(u, list, 3);
}
void unfused_backward(const unfused *u) {
  static operation *const list[] = {values_gradient,  probabilities_gradient, scores_gradient,
                                    queries_gradient, keys_gradient};
  run_all(u, list, 5);
}
