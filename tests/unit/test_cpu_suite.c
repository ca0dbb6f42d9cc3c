/* The operation suite (tests/support/ops_suite.h) on the cpu device: every instruction set of the machine, one thread
 * and three, fp32 and bf16; and that in bf16, too, bits depend neither on the place in memory nor, but for products,
 * on the instruction set. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "device_ops.h"
#include "ops_suite.h"

/* One instruction set per process: oneDNN keeps its first. */
static void run_suite(const char *isa, int32_t threads, int32_t dtype) {
  device_ops d;
  if (!device_ops_have(&d, threads, isa)) cr_skip_test("this machine has no %s", isa);
  const ops_suite suite = {d.table, d.self, ops_suite_seed(), 1, getenv("PHX_TEST_PRINT") != NULL};
  cr_expect_eq(ops_suite_run(&suite, dtype), 0, "see above");
  device_ops_close(&d);
}

Test(cpu_suite, fp32_base, .timeout = 120) {
  run_suite("base", 1, PHX_F32);
}
Test(cpu_suite, fp32_avx2, .timeout = 120) {
  run_suite("avx2", 1, PHX_F32);
}
Test(cpu_suite, fp32_avx512, .timeout = 120) {
  run_suite("avx512", 1, PHX_F32);
}
Test(cpu_suite, fp32_three_threads, .timeout = 120) {
  run_suite(NULL, 3, PHX_F32);
}
Test(cpu_suite, bf16_base, .timeout = 120) {
  run_suite("base", 1, PHX_BF16);
}
Test(cpu_suite, bf16_avx2, .timeout = 120) {
  run_suite("avx2", 1, PHX_BF16);
}
Test(cpu_suite, bf16_avx512, .timeout = 120) {
  run_suite("avx512", 1, PHX_BF16);
}
Test(cpu_suite, bf16_three_threads, .timeout = 120) {
  run_suite(NULL, 3, PHX_BF16);
}

/* ---- bits in bf16 ---- */

enum { ROWS = 130, WIDTH = 96, HEADS = 2 };

/* Operations without a product, attention's own included: FNV-1a of what they leave. */
static uint64_t own_bits(const phx_ops *o, uint64_t h, int with_attention) {
  static uint16_t x[ROWS * 3 * WIDTH], w[WIDTH], out[ROWS * 3 * WIDTH], sum[ROWS * WIDTH], back[ROWS * 3 * WIDTH];
  static float mean[ROWS], rstd[ROWS], dw[WIDTH], db[WIDTH], dwte[40 * WIDTH], dwpe[ROWS * WIDTH], lse[ROWS * HEADS];
  static int32_t tokens[ROWS];
  phx_error err = {.struct_size = sizeof err};
  const int32_t t = PHX_BF16;
  int bad = 0;
  for (int i = 0; i < ROWS * 3 * WIDTH; i++) x[i] = (uint16_t)(0x3f00 + i * 7919 % 157 + (i * 31 % 2 << 15));
  for (int i = 0; i < WIDTH; i++) w[i] = (uint16_t)(0x3f80 + i % 91);
  for (int i = 0; i < ROWS; i++) tokens[i] = i * 7 % 40;
  bad |= o->layer_norm(o->ctx, t, out, sum, mean, rstd, x, x + ROWS * WIDTH, w, w, ROWS, WIDTH, 1e-5f, NULL, &err);
  bad |= o->layer_norm_backward(o->ctx, t, back, x, dw, PHX_GRAD_WRITE, db, PHX_GRAD_WRITE, x, sum, w, mean, rstd, ROWS,
                                WIDTH, NULL, &err);
  bad |= o->add(o->ctx, t, back + ROWS * WIDTH, x, out, ROWS * WIDTH, NULL, &err);
  bad |= o->embedding(o->ctx, t, back + 2 * ROWS * WIDTH, tokens, x, x + ROWS * WIDTH, 1, ROWS, WIDTH, NULL, &err);
  bad |= o->embedding_backward(o->ctx, t, dwte, PHX_GRAD_WRITE, dwpe, PHX_GRAD_WRITE, x, tokens, 1, ROWS, WIDTH, 40,
                               ROWS, NULL, &err);
  const struct {
    const void *p;
    size_t bytes;
  } parts[] = {{out, ROWS * WIDTH * 2}, {sum, sizeof sum},   {back, sizeof back}, {dw, sizeof dw},    {db, sizeof db},
               {dwte, sizeof dwte},     {dwpe, sizeof dwpe}, {mean, sizeof mean}, {rstd, sizeof rstd}};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
    for (size_t k = 0; k < parts[i].bytes; k++) h = (h ^ ((const unsigned char *)parts[i].p)[k]) * 0x100000001b3u;
  bad |= o->cross_entropy(o->ctx, t, back, mean, tokens, ROWS, 3 * WIDTH, 3 * WIDTH, 1, 1.0f, NULL, &err);
  for (size_t k = 0; k < sizeof back; k++) h = (h ^ ((const unsigned char *)back)[k]) * 0x100000001b3u;
  if (with_attention) {
    bad |= o->attention(o->ctx, t, out, lse, x, 1, ROWS, WIDTH, HEADS, NULL, &err);
    bad |= o->attention_backward(o->ctx, t, back, out, x, out, lse, dwpe, 1, ROWS, WIDTH, HEADS, NULL, &err);
    for (size_t k = 0; k < sizeof back; k++) h = (h ^ ((const unsigned char *)back)[k]) * 0x100000001b3u;
  }
  cr_assert_eq(bad, 0, "%s", err.message);
  return h;
}

static uint64_t device_bits(const char *isa, int32_t threads, int with_attention) {
  device_ops d;
  if (!device_ops_have(&d, threads, isa)) return 0;
  const uint64_t h = own_bits(d.ops, 0xcbf29ce484222325u, with_attention);
  device_ops_close(&d);
  return h;
}

Test(cpu_suite, bf16_bits_do_not_depend_on_threads, .timeout = 60) {
  const uint64_t first = device_bits(NULL, 1, 1);
  cr_expect_eq(device_bits(NULL, 2, 1), first);
  cr_expect_eq(device_bits(NULL, 3, 1), first);
}
Test(cpu_suite, bf16_bits_of_base_and_avx512, .timeout = 60) {
  const uint64_t low = device_bits("base", 1, 0), high = device_bits("avx512", 1, 0);
  if (!high) cr_skip_test("this machine has no avx512");
  cr_expect_eq(low, high);
}
Test(cpu_suite, bf16_bits_of_avx2_and_avx512, .timeout = 60) {
  const uint64_t low = device_bits("avx2", 1, 0), high = device_bits("avx512", 1, 0);
  if (!high) cr_skip_test("this machine has no avx512");
  cr_expect_eq(low, high);
}

/* Products: equal bits again and again (a kept primitive, a new device), at any place in memory. */
Test(cpu_suite, bf16_products_repeat, .timeout = 60) {
  enum { N = 70, IC = 96, OC = 160, MOVES = 4 };
  static uint16_t first[N * OC];
  static float first_dw[OC * IC];
  for (int move = 0; move < MOVES; move++) {
    device_ops d;
    void *room = NULL;
    phx_error err = {.struct_size = sizeof err};
    cr_assert_eq(device_ops_open(&d, 1, NULL, &err), PHX_OK, "%s", err.message);
    cr_assert_eq(posix_memalign(&room, 4096, 1 << 20), 0);
    uint16_t *x = (uint16_t *)room + 128 * move, *w = x + 8192, *out = w + 16384 + 128 * move;
    float *dw = (float *)(void *)(out + 16384);
    for (int i = 0; i < N * IC; i++) x[i] = (uint16_t)(0x3f00 + i * 7919 % 157 + (i * 31 % 2 << 15));
    for (int i = 0; i < OC * IC; i++) w[i] = (uint16_t)(0x3e00 + i * 104729 % 151 + (i * 17 % 3 % 2 << 15));
    for (int turn = 0; turn < 2; turn++) {
      cr_assert_eq(d.ops->linear(d.ops->ctx, PHX_BF16, out, 0, NULL, x, w, NULL, N, IC, OC, 1, NULL, &err), PHX_OK);
      cr_assert_eq(d.ops->linear_backward_weight(d.ops->ctx, PHX_BF16, dw, NULL, out, 0, x, N, IC, OC, PHX_GRAD_WRITE,
                                                 PHX_GRAD_NONE, NULL, &err),
                   PHX_OK, "%s", err.message);
      if (move + turn == 0) memcpy(first, out, sizeof first), memcpy(first_dw, dw, sizeof first_dw);
      cr_expect_eq(memcmp(first, out, sizeof first), 0, "move %d", move);
      cr_expect_eq(memcmp(first_dw, dw, sizeof first_dw), 0, "move %d", move);
    }
    free(room);
    device_ops_close(&d);
  }
}

Test(cpu_suite, refuses_other_dtypes) {
  device_ops d;
  phx_error err = {.struct_size = sizeof err};
  uint16_t x[4] = {0};
  cr_assert_eq(device_ops_open(&d, 1, NULL, &err), PHX_OK);
  cr_expect_eq(d.ops->add(d.ops->ctx, PHX_F16, x, x, x, 4, NULL, &err), PHX_UNSUPPORTED);
  cr_expect(strstr(err.message, "bf16"), "%s", err.message);
  device_ops_close(&d);
}

/* What bf16 costs is told before a device is created, and only where the processor, or a limit, forbids its products.
 * The device's name says the same. */
static void expect_cost(const char *variable, const char *limit, int has) {
  device_ops d;
  phx_error err = {.struct_size = sizeof err};
  if (variable) setenv(variable, limit, 1);
  const phx_device_table *table = fake_host_plugin("phx_device_cpu.so")->table;
  const char *cost = table->cost(PHX_BF16);
  cr_expect_eq(!cost, has, "%s", cost ? cost : "no cost");
  cr_expect(!cost || (strstr(cost, "bf16 instructions: products are widened to fp32") &&
                      strstr(cost, "saves memory and no time")), "%s", cost);
  cr_expect_null(table->cost(PHX_F32));
  cr_assert_eq(device_ops_open(&d, 1, NULL, &err), PHX_OK, "%s", err.message);
  cr_expect_eq(strstr(d.device->name, "with bf16") != NULL, has, "%s", d.device->name);
  device_ops_close(&d);
}
Test(cpu_suite, says_what_bf16_costs) { expect_cost("PHALANX_ISA", "avx2", 0); }
Test(cpu_suite, says_what_a_limit_of_onednn_costs) { expect_cost("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", 0); }
Test(cpu_suite, bf16_costs_nothing_where_the_processor_has_it) {
  __builtin_cpu_init();
  expect_cost(NULL, NULL, __builtin_cpu_supports("avx512bf16") != 0);
}
