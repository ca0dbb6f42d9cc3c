/* See ops_suite.h.  The reference is plain_ops (double precision) on fp32 copies of the rounded inputs. */
#include "ops_suite.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plain_ops.h"

enum { GUARD = 256, ARRAYS = 16, SIZES = 6 };
#define LEAST 0.25

typedef struct array { /* on the device, and what it should hold, in fp32 */
  void *device;
  float *want;
  int64_t n, bytes;
  int32_t dtype;
} array;

typedef struct bench { /* the state of a run */
  const ops_suite *suite;
  const phx_device *device;
  const phx_ops *ops;
  uint64_t random;
  int32_t dtype, failures;
  const char *name; /* of the case */
  const int64_t *size;
  int32_t variant;
  array arrays[ARRAYS];
  int32_t n_arrays;
  double worst; /* part of the bound that was used */
  double least; /* what a floor is relative to, at least: inputs are about 1, and may cancel in every element */
} bench;

#define MUST(call)                                                                                     \
  do {                                                                                                 \
    if ((call) != PHX_OK) {                                                                            \
      fprintf(stderr, "ops_suite: %s, variant %d: %s: %s\n", t->name, t->variant, #call, err.message); \
      exit(3);                                                                                         \
    }                                                                                                  \
  } while (0)

static void complain(bench *t, const char *format, ...) {
  char text[256];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  t->failures++;
  if (t->failures <= 20)
    fprintf(stderr, "ops_suite: %s in dtype %d, size %lld %lld %lld %lld %lld, variant %d: %s (PHX_TEST_SEED=%llu)\n",
            t->name, t->dtype, (long long)t->size[0], (long long)t->size[1], (long long)t->size[2],
            (long long)t->size[3], (long long)t->size[4], t->variant, text, (unsigned long long)t->suite->seed);
}

/* ---- memory ---- */

static void *take(const bench *t, int32_t space, int64_t bytes) {
  phx_error err = {.struct_size = sizeof err};
  void *p = NULL;
  MUST(t->suite->table->alloc(t->suite->self, space, phx_align_bytes(bytes), &p, &err));
  return p;
}

/* Through pinned memory, in one direction. */
static void move(const bench *t, void *device, void *host, int64_t bytes, int in) {
  phx_error err = {.struct_size = sizeof err};
  void *pinned = take(t, PHX_SPACE_PINNED, bytes);
  if (in) memcpy(pinned, host, (size_t)bytes);
  MUST(t->device->copy(t->device->ctx, in ? device : pinned, in ? pinned : device, bytes, NULL, &err));
  MUST(t->device->stream_synchronize(t->device->ctx, NULL, &err));
  if (!in) memcpy(host, pinned, (size_t)bytes);
  t->suite->table->free(t->suite->self, PHX_SPACE_PINNED, pinned, phx_align_bytes(bytes));
}

static void *room(int64_t bytes) {
  void *p = malloc((size_t)bytes);
  if (!p) abort();
  return p;
}

/* An array of n elements behind which GUARD bytes are poisoned; values: fp32, or NULL for poison. */
static array *make(bench *t, int32_t dtype, int64_t n, const float *values) {
  phx_error err = {.struct_size = sizeof err};
  if (t->n_arrays == ARRAYS) abort();
  array *a = &t->arrays[t->n_arrays++];
  *a = (array){.n = n, .dtype = dtype, .bytes = n * (int64_t)phx_dtype_bytes(dtype)};
  a->device = take(t, PHX_SPACE_DEVICE, a->bytes + GUARD);
  a->want = room(n * 4);
  char *stored = room(a->bytes + GUARD);
  memset(stored, 0xff, (size_t)(a->bytes + GUARD)); /* NaN in every dtype */
  if (values) {
    MUST(plain_device.cast(NULL, stored, dtype, values, PHX_F32, n, NULL, &err));
    MUST(plain_device.cast(NULL, a->want, PHX_F32, stored, dtype, n, NULL, &err));
  } else {
    memset(a->want, 0xff, (size_t)n * 4);
  }
  move(t, a->device, stored, a->bytes + GUARD, 1);
  free(stored);
  return a;
}

static array *poisoned(bench *t, int32_t dtype, int64_t n) {
  return make(t, dtype, n, NULL);
}

static float number(bench *t) { /* uniform in -1 .. 1 */
  uint64_t z = t->random += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}

static array *random_like(bench *t, int32_t dtype, int64_t n, float scale, float offset) {
  float *values = room(n * 4);
  for (int64_t i = 0; i < n; i++) values[i] = offset + scale * number(t);
  array *a = make(t, dtype, n, values);
  free(values);
  return a;
}
static array *numbers(bench *t, int64_t n, float scale) {
  return random_like(t, t->dtype, n, scale, 0);
}
/* What an operation writes or adds to. */
static array *target(bench *t, int32_t dtype, int64_t n, int32_t mode) {
  return mode == PHX_GRAD_ADD ? random_like(t, dtype, n, 1, 0) : poisoned(t, dtype, n);
}

/* Indices below `below`, on the device and in *host. */
static int32_t *indices(bench *t, int64_t n, int64_t below, int32_t **host) {
  array *a = poisoned(t, PHX_F32, n);
  *host = (int32_t *)(void *)a->want;
  for (int64_t i = 0; i < n; i++) (*host)[i] = (int32_t)((double)(number(t) + 1) / 2 * (double)(below - 1));
  move(t, a->device, *host, n * 4, 1);
  return a->device;
}

static void forget(bench *t) {
  while (t->n_arrays) {
    array *a = &t->arrays[--t->n_arrays];
    t->suite->table->free(t->suite->self, PHX_SPACE_DEVICE, a->device, phx_align_bytes(a->bytes + GUARD));
    free(a->want);
  }
}

static double half_unit(int32_t dtype, double x) { /* half the distance of two numbers of dtype at x */
  return isfinite(x) && x != 0 ? ldexp(1, ilogb(x) - (dtype == PHX_F32 ? 24 : dtype == PHX_BF16 ? 8 : 11)) : 0;
}

/* What the device holds against what it should hold; NaN where nothing may be written. */
static void compare(bench *t, const char *what, const array *a, double floor32, double floor16) {
  phx_error err = {.struct_size = sizeof err};
  unsigned char *stored = room(a->bytes + GUARD);
  float *got = room(a->n * 4);
  double largest = t->least, worst = 0;
  int64_t at = -1;
  move(t, a->device, stored, a->bytes + GUARD, 0);
  MUST(plain_device.cast(NULL, got, PHX_F32, stored, a->dtype, a->n, NULL, &err));
  for (int64_t i = 0; i < a->n; i++) largest = fmax(largest, isfinite(a->want[i]) ? fabs((double)a->want[i]) : 0);
  const double floor = (t->dtype == PHX_BF16 ? floor16 : floor32) * t->suite->slack * largest + 1e-37;
  for (int64_t i = 0; i < a->n; i++) {
    const double want = (double)a->want[i], bound = half_unit(a->dtype, want) * 1.01 + floor;
    const double part = isnan(want)     ? (isnan(got[i]) ? 0 : INFINITY)
                        : isnan(got[i]) ? INFINITY
                                        : fabs((double)got[i] - want) / bound;
    if (part > worst) worst = part, at = i;
  }
  if (worst > 1)
    complain(t, "%s[%lld] is %.9g, not %.9g: %.3g times the bound (largest %.3g)", what, (long long)at, (double)got[at],
             (double)a->want[at], worst, largest);
  for (int64_t i = a->bytes; i < a->bytes + GUARD; i++)
    if (stored[i] != 0xff) {
      complain(t, "%s: byte %lld past its end was written", what, (long long)(i - a->bytes));
      break;
    }
  if (worst > t->worst) t->worst = worst;
  free(stored), free(got);
}

/* What the device holds is right; the next operation's reference reads just that. */
static void adopt(bench *t, array *a) {
  phx_error err = {.struct_size = sizeof err};
  void *stored = room(a->bytes);
  move(t, a->device, stored, a->bytes, 0);
  MUST(plain_device.cast(NULL, a->want, PHX_F32, stored, a->dtype, a->n, NULL, &err));
  free(stored);
}

/* Both calls, with the same arguments but for the arrays: D(x) and W(x) are x on the device and in the reference. */
#define D(x) ((x) ? (x)->device : NULL)
#define W(x) ((x) ? (x)->want : NULL)
#define BOTH(op, device_arguments, plain_arguments)                  \
  do {                                                               \
    phx_error err = {.struct_size = sizeof err};                     \
    const phx_ops *o = t->ops;                                       \
    MUST(o->op device_arguments);                                    \
    MUST(t->device->stream_synchronize(t->device->ctx, NULL, &err)); \
    MUST(plain_ops.op plain_arguments);                              \
  } while (0)

/* ---- linear ---- size: rows, ic, oc, padding of the output's rows */

static void linear(bench *t) {
  const int64_t n = t->size[0], ic = t->size[1], oc = t->size[2], ld = oc + t->size[3], given = t->size[3] ? ld : 0;
  const int32_t gelu = t->variant >> 1 & 1, dt = t->dtype;
  array *x = numbers(t, n * ic, 1), *w = numbers(t, oc * ic, 1), *bias = t->variant & 1 ? numbers(t, oc, 1) : NULL;
  array *out = poisoned(t, dt, n * ld), *pre = t->variant & 4 ? poisoned(t, dt, n * oc) : NULL;
  BOTH(linear, (o->ctx, dt, D(out), given, D(pre), D(x), D(w), D(bias), n, ic, oc, gelu, NULL, &err),
       (NULL, PHX_F32, W(out), given, W(pre), W(x), W(w), W(bias), n, ic, oc, gelu, NULL, &err));
  compare(t, "out", out, 4e-6, 4e-6);
  if (pre) compare(t, "pre", pre, 4e-6, 4e-6);
}

static void linear_backward_input(bench *t) {
  const int64_t n = t->size[0], ic = t->size[1], oc = t->size[2], ld = oc + t->size[3], given = t->size[3] ? ld : 0;
  const int32_t mode = t->variant & 1 ? PHX_GRAD_ADD : PHX_GRAD_WRITE, dt = t->dtype;
  array *dout = numbers(t, n * ld, 1), *w = numbers(t, oc * ic, 1);
  array *pre = t->variant & 2 ? numbers(t, n * ic, 3) : NULL, *dx = target(t, dt, n * ic, mode);
  BOTH(linear_backward_input, (o->ctx, dt, D(dx), D(dout), given, D(w), D(pre), n, ic, oc, mode, NULL, &err),
       (NULL, PHX_F32, W(dx), W(dout), given, W(w), W(pre), n, ic, oc, mode, NULL, &err));
  compare(t, "dx", dx, 4e-6, 4e-6);
}

static void linear_backward_weight(bench *t) {
  const int64_t n = t->size[0], ic = t->size[1], oc = t->size[2], ld = oc + t->size[3], given = t->size[3] ? ld : 0;
  const int32_t w_mode = t->variant & 1 ? PHX_GRAD_ADD : PHX_GRAD_WRITE, dt = t->dtype;
  const int32_t b_mode = t->variant & 2 ? PHX_GRAD_ADD : PHX_GRAD_WRITE;
  array *dout = numbers(t, n * ld, 1), *x = numbers(t, n * ic, 1), *dw = target(t, PHX_F32, oc * ic, w_mode);
  array *db = t->variant & 4 ? target(t, PHX_F32, oc, b_mode) : NULL;
  BOTH(linear_backward_weight, (o->ctx, dt, D(dw), D(db), D(dout), given, D(x), n, ic, oc, w_mode, b_mode, NULL, &err),
       (NULL, PHX_F32, W(dw), W(db), W(dout), given, W(x), n, ic, oc, w_mode, b_mode, NULL, &err));
  compare(t, "dw", dw, 4e-6, 4e-6);
  if (db) compare(t, "db", db, 4e-6, 4e-6);
}

/* ---- embedding ---- size: batch, sequence, channels, vocabulary, positions */

static void embedding(bench *t) {
  const int64_t b = t->size[0], s = t->size[1], c = t->size[2], v = t->size[3], max_t = t->size[4];
  int32_t *host, *tokens = indices(t, b * s, v, &host);
  array *wte = numbers(t, v * c, 1), *wpe = numbers(t, max_t * c, 1), *out = poisoned(t, t->dtype, b * s * c);
  BOTH(embedding, (o->ctx, t->dtype, D(out), tokens, D(wte), D(wpe), b, s, c, NULL, &err),
       (NULL, PHX_F32, W(out), host, W(wte), W(wpe), b, s, c, NULL, &err));
  compare(t, "out", out, 0, 0);
}

static void embedding_backward(bench *t) {
  const int64_t b = t->size[0], s = t->size[1], c = t->size[2], v = t->size[3], max_t = t->size[4];
  const int32_t te = t->variant & 1 ? PHX_GRAD_ADD : PHX_GRAD_WRITE, dt = t->dtype;
  const int32_t pe = t->variant & 2 ? PHX_GRAD_ADD : PHX_GRAD_WRITE;
  int32_t *host, *tokens = indices(t, b * s, v, &host);
  array *dwte = t->variant == 4 ? NULL : target(t, PHX_F32, v * c, te), *dout = numbers(t, b * s * c, 1);
  array *dwpe = t->variant == 5 ? NULL : target(t, PHX_F32, max_t * c, pe);
  BOTH(embedding_backward, (o->ctx, dt, D(dwte), te, D(dwpe), pe, D(dout), tokens, b, s, c, v, max_t, NULL, &err),
       (NULL, PHX_F32, W(dwte), te, W(dwpe), pe, W(dout), host, b, s, c, v, max_t, NULL, &err));
  if (dwte) compare(t, "dwte", dwte, 2e-6, 2e-6);
  if (dwpe) compare(t, "dwpe", dwpe, 2e-6, 2e-6);
}

/* ---- layer norm ---- size: rows, channels */

static void layer_norm(bench *t) { /* variant 0: a; 1: a, kept; 2: a + b */
  const int64_t n = t->size[0], c = t->size[1];
  const int32_t dt = t->dtype;
  array *a = random_like(t, dt, n * c, 2, 0.5f), *b = t->variant == 2 ? numbers(t, n * c, 1) : NULL;
  array *w = numbers(t, c, 1), *bias = numbers(t, c, 1), *out = poisoned(t, dt, n * c);
  array *sum = t->variant ? poisoned(t, dt, n * c) : NULL;
  array *mean = poisoned(t, PHX_F32, n), *rstd = poisoned(t, PHX_F32, n);
  BOTH(layer_norm, (o->ctx, dt, D(out), D(sum), D(mean), D(rstd), D(a), D(b), D(w), D(bias), n, c, 1e-5f, NULL, &err),
       (NULL, PHX_F32, W(out), W(sum), W(mean), W(rstd), W(a), W(b), W(w), W(bias), n, c, 1e-5f, NULL, &err));
  if (t->variant == 2 && dt == PHX_BF16) {
    uint16_t *stored = room(n * c * 2);
    plain_device.cast(NULL, stored, dt, W(sum), PHX_F32, n * c, NULL, NULL);
    plain_device.cast(NULL, W(a), PHX_F32, stored, dt, n * c, NULL, NULL);
    plain_ops.layer_norm(NULL, PHX_F32, W(out), NULL, W(mean), W(rstd), W(a), NULL, W(w), W(bias), n, c, 1e-5f, NULL,
                         NULL);
    free(stored);
  }
  /* with b, the norm is that of a sum which is rounded, or about to be */
  const double rounded = t->variant == 2 ? 0x1p-7 : 4e-6;
  compare(t, "out", out, 4e-6, rounded);
  if (sum) compare(t, "sum", sum, 1e-7, 1e-7);
  t->least = 1;
  compare(t, "mean", mean, 4e-6, rounded);
  t->least = LEAST;
  compare(t, "rstd", rstd, 4e-6, rounded);
}

static void layer_norm_backward(bench *t) { /* variant: 1 add, 2 adds dw, 4 adds db, 8 frozen, 16 dx is add */
  const int64_t n = t->size[0], c = t->size[1];
  const int32_t w_mode = t->variant & 2 ? PHX_GRAD_ADD : PHX_GRAD_WRITE, dt = t->dtype, frozen = t->variant & 8;
  const int32_t b_mode = t->variant & 4 ? PHX_GRAD_ADD : PHX_GRAD_WRITE;
  array *x = random_like(t, dt, n * c, 2, 0.5f), *w = numbers(t, c, 1), *dout = numbers(t, n * c, 1);
  array *add = t->variant & 17 ? numbers(t, n * c, 1) : NULL, *dx = t->variant & 16 ? add : poisoned(t, dt, n * c);
  array *dw = frozen ? NULL : target(t, PHX_F32, c, w_mode), *db = frozen ? NULL : target(t, PHX_F32, c, b_mode);
  float *mean = room(n * 4), *rstd = room(n * 4), *scratch = room(n * c * 4);
  plain_ops.layer_norm(NULL, PHX_F32, scratch, NULL, mean, rstd, W(x), NULL, W(w), W(w), n, c, 1e-5f, NULL, NULL);
  array *means = make(t, PHX_F32, n, mean), *rstds = make(t, PHX_F32, n, rstd);
  free(mean), free(rstd), free(scratch);
  BOTH(layer_norm_backward,
       (o->ctx, dt, D(dx), D(add), D(dw), w_mode, D(db), b_mode, D(dout), D(x), D(w), D(means), D(rstds), n, c, NULL,
        &err),
       (NULL, PHX_F32, W(dx), W(add), W(dw), w_mode, W(db), b_mode, W(dout), W(x), W(w), W(means), W(rstds), n, c, NULL,
        &err));
  compare(t, "dx", dx, 4e-6, 4e-6);
  if (dw) compare(t, "dw", dw, 4e-6, 4e-6);
  if (db) compare(t, "db", db, 4e-6, 4e-6);
}

static void add(bench *t) { /* variant 0: apart; 1: into a; 2: into b */
  const int64_t n = t->size[0];
  array *a = numbers(t, n, 1), *b = numbers(t, n, 0.01f);
  array *out = t->variant == 1 ? a : t->variant == 2 ? b : poisoned(t, t->dtype, n);
  BOTH(add, (o->ctx, t->dtype, D(out), D(a), D(b), n, NULL, &err), (NULL, PHX_F32, W(out), W(a), W(b), n, NULL, &err));
  compare(t, "out", out, 0, 0);
}

/* ---- attention ---- size: batch, sequence, channels, heads */

static void attention(bench *t) {
  const int64_t b = t->size[0], s = t->size[1], c = t->size[2], heads = t->size[3], n = b * s * c;
  const int32_t dt = t->dtype;
  array *qkv = numbers(t, 3 * n, 2), *dout = numbers(t, n, 1), *out = poisoned(t, dt, n);
  array *lse = poisoned(t, PHX_F32, b * heads * s), *work = poisoned(t, PHX_F32, b * heads * s);
  array *dqkv = poisoned(t, dt, 3 * n);
  BOTH(attention, (o->ctx, dt, D(out), D(lse), D(qkv), b, s, c, heads, NULL, &err),
       (NULL, PHX_F32, W(out), W(lse), W(qkv), b, s, c, heads, NULL, &err));
  /* probabilities may be rounded to bf16 on their way to the second product */
  compare(t, "out", out, 4e-6, 0x1p-8);
  compare(t, "lse", lse, 4e-6, 1e-5);
  adopt(t, out), adopt(t, lse); /* the backward pass sums products with a rounded output over all rows */
  BOTH(attention_backward, (o->ctx, dt, D(dqkv), D(dout), D(qkv), D(out), D(lse), D(work), b, s, c, heads, NULL, &err),
       (NULL, PHX_F32, W(dqkv), W(dout), W(qkv), W(out), W(lse), W(work), b, s, c, heads, NULL, &err));
  compare(t, "dqkv", dqkv, 1e-5, 0x1p-7);
}

/* ---- cross-entropy ---- size: rows, classes, row length */

static void cross_entropy(bench *t) {
  const int64_t n = t->size[0], v = t->size[1], vp = t->size[2];
  const int32_t gradient = t->variant & 1;
  int32_t *host, *targets = indices(t, n, v, &host);
  float *values = room(n * vp * 4);
  for (int64_t i = 0; i < n * vp; i++) values[i] = i % vp < v ? 6 * number(t) : NAN; /* padding is not read */
  array *logits = make(t, t->dtype, n * vp, values), *losses = poisoned(t, PHX_F32, n);
  free(values);
  BOTH(cross_entropy, (o->ctx, t->dtype, D(logits), D(losses), targets, n, v, vp, gradient, 0.125f, NULL, &err),
       (NULL, PHX_F32, W(logits), W(losses), host, n, v, vp, gradient, 0.125f, NULL, &err));
  compare(t, "losses", losses, 2e-6, 2e-6);
  compare(t, "logits", logits, 2e-6, 2e-6);
}

/* ---- optimizers and sums: fp32, dtype is that of the weights' copy ---- size: elements */

static void optimizers(bench *t) {
  const int64_t n = t->size[0];
  const int32_t dt = t->dtype;
  array *w = random_like(t, PHX_F32, n, 1, 0), *g = random_like(t, PHX_F32, n, 1, 0),
        *m = random_like(t, PHX_F32, n, 1, 0);
  array *v = random_like(t, PHX_F32, n, 1, 1.5f), *low = poisoned(t, dt, n);
  BOTH(adamw,
       (o->ctx, D(w), D(g), D(m), D(v), D(low), dt, n, 0.5f, 1e-2f, 0.9f, 0.95f, 0.271f, 0.142f, 1e-8f, 0.1f, NULL,
        &err),
       (NULL, W(w), W(g), W(m), W(v), W(low), PHX_F32, n, 0.5f, 1e-2f, 0.9f, 0.95f, 0.271f, 0.142f, 1e-8f, 0.1f, NULL,
        &err));
  compare(t, "w", w, 2e-7, 2e-7), compare(t, "m", m, 2e-7, 2e-7), compare(t, "v", v, 2e-7, 2e-7);
  compare(t, "low", low, 2e-7, 2e-7);
  BOTH(sgd, (o->ctx, D(w), D(g), D(low), dt, n, 0.5f, 1e-2f, 0.1f, NULL, &err),
       (NULL, W(w), W(g), W(low), PHX_F32, n, 0.5f, 1e-2f, 0.1f, NULL, &err));
  compare(t, "w after sgd", w, 4e-7, 4e-7);
  compare(t, "low after sgd", low, 4e-7, 4e-7);
}

static void sums(bench *t) {
  const int64_t blocks = t->size[0], n = blocks * PHX_BLOCK - 5;
  array *x = random_like(t, PHX_F32, blocks * PHX_BLOCK, 1, 0.25f);
  double *got = take(t, PHX_SPACE_PINNED, (blocks + 2) * 8), *want = room((blocks + 1) * 8);
  for (int64_t i = 0; i < blocks + 2; i++) got[i] = -1;
  BOTH(block_norms, (o->ctx, got, D(x), blocks, NULL, &err), (NULL, want, W(x), blocks, NULL, &err));
  BOTH(mean, (o->ctx, got + blocks, D(x), n, NULL, &err), (NULL, want + blocks, W(x), n, NULL, &err));
  for (int64_t i = 0; i <= blocks; i++)
    if (!(fabs(got[i] - want[i]) <= 1e-12 * fabs(want[i])))
      complain(t, "sum %lld of %lld is %.17g, not %.17g", (long long)i, (long long)blocks, got[i], want[i]);
  if (got[blocks + 1] != -1) complain(t, "a number past the sums was written");
  free(want);
  t->suite->table->free(t->suite->self, PHX_SPACE_PINNED, got, phx_align_bytes((blocks + 2) * 8));
}

/* ---- the table ---- */

static const struct {
  const char *name;
  void (*run)(bench *t);
  int32_t variants; /* 0 .. variants - 1 */
  int64_t size[SIZES];
} cases[] = {
    {"linear", linear, 8, {1, 1, 1}},
    {"linear", linear, 8, {5, 30, 257}},
    {"linear", linear, 8, {67, 48, 33, 3}},
    {"linear", linear, 2, {130, 257, 64, 64}},
    {"linear", linear, 4, {70, 40, 209, 47}}, /* padded rows of an odd length, as a vocabulary's */
    {"linear", linear, 8, {70, 3, 12001}},
    {"linear", linear, 8, {1030, 7, 9}},
    {"linear", linear, 8, {256, 64, 256}}, /* sizes that fit every vector width and tile */
    {"linear_backward_input", linear_backward_input, 4, {1, 1, 1}},
    {"linear_backward_input", linear_backward_input, 4, {5, 30, 257}},
    {"linear_backward_input", linear_backward_input, 4, {67, 48, 33, 3}},
    {"linear_backward_input", linear_backward_input, 4, {70, 40, 209, 47}},
    {"linear_backward_input", linear_backward_input, 4, {70, 12001, 3}},
    {"linear_backward_input", linear_backward_input, 4, {1030, 7, 9, 5}},
    {"linear_backward_input", linear_backward_input, 4, {128, 64, 192}},
    {"linear_backward_weight", linear_backward_weight, 8, {1, 1, 1}},
    {"linear_backward_weight", linear_backward_weight, 8, {5, 30, 257}},
    {"linear_backward_weight", linear_backward_weight, 8, {67, 48, 33, 3}},
    {"linear_backward_weight", linear_backward_weight, 8, {300, 65, 130, 62}},
    {"linear_backward_weight", linear_backward_weight, 8, {128, 64, 192}},
    {"embedding", embedding, 1, {3, 5, 30, 257, 8}},
    {"embedding", embedding, 1, {2, 40, 64, 90, 50}},
    {"embedding", embedding, 1, {1, 33, 129, 11, 33}},
    {"embedding_backward", embedding_backward, 6, {3, 5, 30, 257, 8}},
    {"embedding_backward", embedding_backward, 6, {2, 70, 129, 3, 70}},
    {"embedding_backward", embedding_backward, 6, {3, 700, 64, 300, 700}}, /* more tokens than a chunk of the sort */
    {"layer_norm", layer_norm, 3, {1, 37}},
    {"layer_norm", layer_norm, 3, {5, 30}},
    {"layer_norm", layer_norm, 3, {3, 257}},
    {"layer_norm", layer_norm, 3, {21, 1600}},
    {"layer_norm", layer_norm, 3, {2, 12000}}, /* a row does not fit in shared memory */
    {"layer_norm_backward", layer_norm_backward, 24, {2, 5}},
    {"layer_norm_backward", layer_norm_backward, 24, {69, 30}},
    {"layer_norm_backward", layer_norm_backward, 24, {7, 257}},
    {"layer_norm_backward", layer_norm_backward, 8, {600, 64}},
    {"layer_norm_backward", layer_norm_backward, 8, {3, 6000}},
    {"add", add, 3, {1}},
    {"add", add, 3, {4099}},
    {"attention", attention, 1, {1, 1, 10, 1}},
    {"attention", attention, 1, {2, 33, 30, 3}},
    {"attention", attention, 1, {3, 17, 7, 7}},
    {"attention", attention, 1, {1, 130, 128, 2}},
    {"attention", attention, 1, {1, 331, 16, 1}},
    {"attention", attention, 1, {1, 270, 128, 1}},
    {"cross_entropy", cross_entropy, 2, {1, 1, 1}},
    {"cross_entropy", cross_entropy, 2, {7, 257, 320}},
    {"cross_entropy", cross_entropy, 2, {2, 5000, 5056}},
    {"cross_entropy", cross_entropy, 2, {3, 1025, 1025}},
    {"cross_entropy", cross_entropy, 2, {2, 60001, 60032}}, /* fits in a multiprocessor's memory in bf16 only */
    {"optimizers", optimizers, 1, {1}},
    {"optimizers", optimizers, 1, {4099}},
    {"sums", sums, 1, {1}},
    {"sums", sums, 1, {5}},
};

int ops_suite_run(const ops_suite *suite, int32_t dtype) {
  const char *only = getenv("PHX_TEST_CASE");
  bench run = {.suite = suite,
               .device = suite->table->device(suite->self),
               .ops = suite->table->ops(suite->self),
               .dtype = dtype,
               .least = LEAST};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (only && strcmp(only, cases[i].name)) continue;
    run.name = cases[i].name, run.size = cases[i].size, run.worst = 0;
    run.random = suite->seed + (i << 40); /* a case's numbers do not depend on the cases before it */
    for (run.variant = 0; run.variant < cases[i].variants; run.variant++) {
      cases[i].run(&run);
      forget(&run);
    }
    if (suite->print)
      fprintf(stderr, "%-24s %5lld %5lld %5lld %5lld  dtype %d: %.2f of the bound\n", run.name, (long long)run.size[0],
              (long long)run.size[1], (long long)run.size[2], (long long)run.size[3], dtype, run.worst);
  }
  return run.failures;
}

uint64_t ops_suite_seed(void) {
  const char *given = getenv("PHX_TEST_SEED");
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  const uint64_t seed =
      given && *given ? strtoull(given, NULL, 10) : (uint64_t)now.tv_sec * 1000003u + (uint64_t)now.tv_nsec;
  fprintf(stderr, "PHX_TEST_SEED=%llu\n", (unsigned long long)seed);
  return seed;
}
