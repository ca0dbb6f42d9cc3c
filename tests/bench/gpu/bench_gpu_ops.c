/* tests/bench/gpu/bench_gpu_ops.c - what a device plugin's operations reach, through its table: the rate of a large
 * product, the bandwidth of a copy, of AdamW and of the operations of a GPT-2 124M step, in bf16.
 *
 *   bench_gpu_ops [--device cuda] [--small]
 *
 * Times are host clocks around launches that fill some tens of milliseconds, synchronized; the median of seven, after
 * one that is not counted.  Inputs are random: products of zeros are faster.  Bytes are those that must move, each
 * array once.  Lines "rate NAME VALUE UNIT" are for programs.  Exit status 77 where the device is not available. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <phalanx/provider.h>

#include "fake_host.h"
#include "fake_job.h"
#include "root.h"

enum { ROUNDS = 7, POOL = 24 };

typedef struct bench {
  fake_host fake;
  const phx_device_table *table;
  phx_device_self *self;
  const phx_device *device;
  const phx_ops *ops;
  void *taken[POOL];
  int64_t bytes[POOL];
  int n_taken;
  int64_t divide; /* sizes by this: --small */
  phx_error err;
} bench;
static bench b = {.divide = 1, .err = {.struct_size = sizeof(phx_error)}};

static void must(phx_status status) {
  if (status == PHX_OK) return;
  fprintf(stderr, "%s\n", b.err.message);
  exit(status == PHX_UNSUPPORTED ? 77 : 3);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* n values of dtype, uniform in [-size, size): random once, repeated. */
static void *values(int64_t n, int32_t dtype, float size) {
  enum { CHUNK = 1 << 20 };
  static float *host;
  static uint64_t state = 88172645463325252u;
  void *device, *staged, *pinned = host;
  const int64_t element = (int64_t)phx_dtype_bytes(dtype), bytes = n * element;
  if (!host) must(b.table->alloc(b.self, PHX_SPACE_PINNED, CHUNK * (int64_t)sizeof(float), &pinned, &b.err));
  host = pinned;
  must(b.table->alloc(b.self, PHX_SPACE_DEVICE, CHUNK * (int64_t)sizeof(float), &staged, &b.err));
  must(b.table->alloc(b.self, PHX_SPACE_DEVICE, bytes, &device, &b.err));
  for (int64_t at = 0; at < n; at += CHUNK) {
    const int64_t part = n - at < CHUNK ? n - at : CHUNK;
    for (int64_t i = 0; i < part; i++) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      host[i] = size * ((float)(state >> 40) * 0x1p-23f - 1.0f);
    }
    must(b.device->copy(b.device->ctx, staged, host, part * (int64_t)sizeof(float), NULL, &b.err));
    must(b.device->cast(b.device->ctx, (char *)device + at * element, dtype, staged, PHX_F32, part, NULL, &b.err));
    must(b.device->stream_synchronize(b.device->ctx, NULL, &b.err));
  }
  b.table->free(b.self, PHX_SPACE_DEVICE, staged, CHUNK * (int64_t)sizeof(float));
  b.taken[b.n_taken] = device;
  b.bytes[b.n_taken++] = bytes;
  return device;
}

static void give_back(void) {
  while (b.n_taken > 0) {
    b.n_taken--;
    b.table->free(b.self, PHX_SPACE_DEVICE, b.taken[b.n_taken], b.bytes[b.n_taken]);
  }
}

static int by_value(const void *x, const void *y) {
  const double a = *(const double *)x, c = *(const double *)y;
  return (a > c) - (a < c);
}

typedef void body(void *arg);
/* work: operations or bytes of one call of fn, in 1e12 operations or 1e9 bytes a second by `unit`. */
static void measure(const char *name, body *fn, void *arg, double work, const char *unit) {
  double seconds[ROUNDS];
  int calls = 1;
  for (int i = -1; i < ROUNDS; i++) {
    const double begin = now();
    for (int k = 0; k < calls; k++) fn(arg);
    must(b.device->stream_synchronize(b.device->ctx, NULL, &b.err));
    const double took = now() - begin;
    if (i >= 0) seconds[i] = took / calls;
    else if (took < 0.03) calls = 1 + (int)(0.03 / (took + 1e-6));
  }
  qsort(seconds, ROUNDS, sizeof *seconds, by_value);
  const double rate = work / seconds[ROUNDS / 2];
  printf("%-28s %10.3f ms  %9.1f %s (%.1f .. %.1f)\n", name, 1e3 * seconds[ROUNDS / 2],
         rate / (unit[0] == 'T' ? 1e12 : 1e9), unit, work / seconds[ROUNDS - 1] / (unit[0] == 'T' ? 1e12 : 1e9),
         work / seconds[0] / (unit[0] == 'T' ? 1e12 : 1e9));
  printf("rate %s %.6e %s\n", name, rate, unit[0] == 'T' ? "FLOP/s" : "B/s");
  give_back();
}

typedef struct arrays {
  void *x, *y, *z, *w, *v, *out;
  float *f, *g, *m, *s;
  int32_t *tokens;
  int64_t n, c, k, ld;
} arrays;

/* out(n, c; ld) = x(n, k) w(c, k)' */
static void run_product(void *arg) {
  const arrays *a = arg;
  must(b.ops->linear(b.ops->ctx, PHX_BF16, a->out, a->ld, NULL, a->x, a->w, NULL, a->n, a->k, a->c, 0, NULL, &b.err));
}
static void run_product_input(void *arg) {
  const arrays *a = arg;
  must(b.ops->linear_backward_input(b.ops->ctx, PHX_BF16, a->x, a->out, a->ld, a->w, NULL, a->n, a->k, a->c,
                                    PHX_GRAD_WRITE, NULL, &b.err));
}
static void run_product_weight(void *arg) {
  const arrays *a = arg;
  must(b.ops->linear_backward_weight(b.ops->ctx, PHX_BF16, a->f, NULL, a->out, a->ld, a->x, a->n, a->k, a->c,
                                     PHX_GRAD_WRITE, PHX_GRAD_NONE, NULL, &b.err));
}
static void product(const char *name, body *run, int64_t n, int64_t k, int64_t c, int64_t ld) {
  arrays a = {.n = n, .k = k, .c = c, .ld = ld};
  a.x = values(n * k, PHX_BF16, 1), a.w = values(c * k, PHX_BF16, 1), a.out = values(n * (ld ? ld : c), PHX_BF16, 1);
  a.f = values(c * k, PHX_F32, 1);
  measure(name, run, &a, 2.0 * (double)n * (double)k * (double)c, "TFLOP/s");
}

static void run_copy(void *arg) {
  const arrays *a = arg;
  must(b.device->copy(b.device->ctx, a->out, a->x, 4 * a->n, NULL, &b.err));
}
static void copy(int64_t n) {
  arrays a = {.n = n};
  a.x = values(n, PHX_F32, 1), a.out = values(n, PHX_F32, 1);
  measure("copy", run_copy, &a, 8.0 * (double)n, "GB/s");
}

static void run_adamw(void *arg) {
  const arrays *a = arg;
  must(b.ops->adamw(b.ops->ctx, a->f, a->g, a->m, a->s, a->out, PHX_BF16, a->n, 1.0f, 1e-4f, 0.9f, 0.95f, 0.1f, 0.05f,
                    1e-8f, 0.1f, NULL, &b.err));
}
static void adamw(int64_t n) { /* weight, m and v read and written, gradient read, bf16 weight written */
  arrays a = {.n = n};
  a.f = values(n, PHX_F32, 0.1f), a.g = values(n, PHX_F32, 0.01f), a.m = values(n, PHX_F32, 0.01f);
  a.s = values(n, PHX_F32, 0.0f), a.out = values(n, PHX_BF16, 0.1f);
  measure("adamw", run_adamw, &a, 30.0 * (double)n, "GB/s");
}

static void run_layer_norm(void *arg) {
  const arrays *a = arg;
  must(b.ops->layer_norm(b.ops->ctx, PHX_BF16, a->out, a->z, a->m, a->s, a->x, a->y, a->w, a->v, a->n, a->c, 1e-5f,
                         NULL, &b.err));
}
static void run_layer_norm_backward(void *arg) {
  const arrays *a = arg;
  must(b.ops->layer_norm_backward(b.ops->ctx, PHX_BF16, a->out, a->y, a->f, PHX_GRAD_WRITE, a->g, PHX_GRAD_WRITE, a->z,
                                  a->x, a->w, a->m, a->s, a->n, a->c, NULL, &b.err));
}
static void layer_norm(int backward, int64_t n, int64_t c) { /* bf16 arrays (N, C): two in, two out; or three and one */
  arrays a = {.n = n, .c = c};
  a.x = values(n * c, PHX_BF16, 1), a.y = values(n * c, PHX_BF16, 1), a.z = values(n * c, PHX_BF16, 1);
  a.out = values(n * c, PHX_BF16, 1), a.w = values(c, PHX_BF16, 1), a.v = values(c, PHX_BF16, 1);
  a.m = values(n, PHX_F32, 1), a.s = values(n, PHX_F32, 1), a.f = values(c, PHX_F32, 1), a.g = values(c, PHX_F32, 1);
  if (backward) measure("layer_norm_backward", run_layer_norm_backward, &a, 8.0 * (double)(n * c), "GB/s");
  else measure("layer_norm", run_layer_norm, &a, 8.0 * (double)(n * c), "GB/s");
}

static void run_attention(void *arg) {
  const arrays *a = arg;
  must(b.ops->attention(b.ops->ctx, PHX_BF16, a->out, a->f, a->x, a->n / 1024, 1024, a->c, a->k, NULL, &b.err));
}
static void run_attention_backward(void *arg) {
  const arrays *a = arg;
  must(b.ops->attention_backward(b.ops->ctx, PHX_BF16, a->y, a->z, a->x, a->out, a->f, a->g, a->n / 1024, 1024, a->c,
                                 a->k, NULL, &b.err));
}
/* Causal: half of T x T.  Forward two products of it, backward five. */
static void attention(int backward, int64_t sequences, int64_t c, int64_t heads) {
  const int64_t n = sequences * 1024;
  arrays a = {.n = n, .c = c, .k = heads};
  const double half = 1024.0 * 1024.0 / 2 * (double)c * 2 * (double)sequences;
  a.x = values(n * 3 * c, PHX_BF16, 1), a.y = values(n * 3 * c, PHX_BF16, 1), a.z = values(n * c, PHX_BF16, 1);
  a.out = values(n * c, PHX_BF16, 1), a.f = values(n * heads, PHX_F32, 1), a.g = values(n * heads, PHX_F32, 1);
  run_attention(&a);
  if (backward) measure("attention_backward", run_attention_backward, &a, 5 * half, "TFLOP/s");
  else measure("attention", run_attention, &a, 2 * half, "TFLOP/s");
}

static void run_cross_entropy(void *arg) {
  const arrays *a = arg;
  must(b.ops->cross_entropy(b.ops->ctx, PHX_BF16, a->x, a->f, a->tokens, a->n, 50257, a->c, 1, 1e-4f, NULL, &b.err));
}
static void cross_entropy(int64_t n) { /* logits read and written */
  arrays a = {.n = n, .c = 50304};
  a.x = values(n * a.c, PHX_BF16, 1), a.f = values(n, PHX_F32, 1);
  a.tokens = values(n, PHX_F32, 0);
  must(b.device->zero(b.device->ctx, a.tokens, 4 * n, NULL, &b.err));
  measure("cross_entropy", run_cross_entropy, &a, 4.0 * (double)n * (double)a.c, "GB/s");
}

int main(int argc, char **argv) {
  const char *name = "cuda";
  static _Alignas(16) char config[4096];
  char file[64];
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--small") == 0) b.divide = 16;
    else if (strcmp(argv[i], "--device") == 0 && i + 1 < argc) name = argv[++i];
    else return fprintf(stderr, "usage: %s [--device NAME] [--small]\n", argv[0]), 2;
  }
  snprintf(file, sizeof file, "lib/phalanx/phx_device_%s.so", name);
  const phx_plugin *plugin = fake_plugin_load(test_path(file), config, sizeof config);
  if (!plugin) return 77; /* it said why */
  b.table = plugin->table;
  must(b.table->probe(&b.err));
  fake_host_init(&b.fake, 0, 1);
  must(b.table->create(&b.fake.host, config, 1, &b.self, &b.err));
  b.device = b.table->device(b.self);
  b.ops = b.table->ops(b.self);
  const int64_t d = b.divide, rows = 32 * 1024 / d; /* of GPT-2 124M at micro = 32, sequence = 1024 */
  printf("device: %s\n", b.device->name);
  product("product", run_product, 8192 / d, 8192 / d, 8192 / d, 0);
  product("product_mlp", run_product, rows, 768, 3072, 0);
  product("product_head", run_product, rows, 768, 50257, 50304);
  product("product_head_input", run_product_input, rows, 768, 50257, 50304);
  product("product_head_weight", run_product_weight, rows, 768, 50257, 50304);
  copy((INT64_C(1) << 30) / d);
  adamw((INT64_C(1) << 28) / d);
  layer_norm(0, rows, 768);
  layer_norm(1, rows, 768);
  attention(0, rows / 1024, 768, 12);
  attention(1, rows / 1024, 768, 12);
  cross_entropy(rows);
  b.table->destroy(b.self);
  return 0;
}
