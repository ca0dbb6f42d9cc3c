/* The generator, the exact sum, the layout, the state hash, the schedule: what equal bits rest on. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/layout.h"
#include "engine/norm.h"
#include "engine/optim.h"
#include "base/rng.h"
#include "engine/state_hash.h"
#include "base/status.h"

Test(rng, philox_known_answers) { /* from Random123's kat_vectors */
  const struct {
    uint64_t key, stream, counter;
    uint32_t want[4];
  } kat[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~0ull, ~0ull, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
    uint32_t out[4];
    phx__philox(out, kat[i].key, kat[i].stream, kat[i].counter);
    cr_assert_arr_eq(out, kat[i].want, sizeof out);
  }
}

Test(rng, normals_do_not_depend_on_slicing) {
  enum { N = 4099 };
  static float whole[N], part[N];
  phx__rng_normal(whole, 0, N, 1337, 42, 0.02);
  for (int64_t at = 0, step = 1; at < N; at += step, step = step % 13 + 1)
    phx__rng_normal(part + at, at, at + step <= N ? step : N - at, 1337, 42, 0.02);
  cr_assert_arr_eq(whole, part, sizeof whole);
  double sum = 0, squares = 0;
  for (int i = 0; i < N; i++) sum += whole[i], squares += (double)whole[i] * whole[i];
  cr_assert_lt(fabs(sum / N), 4 * 0.02 / sqrt(N));
  cr_assert_lt(fabs(sqrt(squares / N) / 0.02 - 1), 0.05);
  static float other[N];
  phx__rng_normal(other, 0, N, 1337, 43, 0.02);
  cr_assert(memcmp(whole, other, sizeof whole) != 0);
}

Test(norm, order_does_not_matter) {
  enum { N = 1000 };
  double x[N];
  for (int i = 0; i < N; i++) x[i] = phx__rng_uniform(1, 2, (uint64_t)i) * ldexp(1, (i * 37) % 200 - 100);
  phx__exact_sum forward = {{0}, 0}, backward = {{0}, 0};
  double left_to_right = 0, right_to_left = 0;
  for (int i = 0; i < N; i++) phx__exact_sum_add(&forward, x[i]), left_to_right += x[i];
  for (int i = N - 1; i >= 0; i--) phx__exact_sum_add(&backward, x[i]), right_to_left += x[i];
  cr_assert_eq(phx__exact_sum_value(&forward), phx__exact_sum_value(&backward));
  cr_assert_float_eq(phx__exact_sum_value(&forward) / left_to_right, 1, 1e-12);
}

Test(norm, exact_where_doubles_round) {
  phx__exact_sum sum = {{0}, 0};
  phx__exact_sum_add(&sum, 1.0);
  for (int i = 0; i < 1 << 12; i++) phx__exact_sum_add(&sum, 0x1p-60); /* each alone is lost in double */
  cr_assert_eq(phx__exact_sum_value(&sum), 1.0 + 0x1p-48);
  phx__exact_sum tiny = {{0}, 0};
  phx__exact_sum_add(&tiny, 0x1p-1074);
  phx__exact_sum_add(&tiny, 0x1p-1074);
  cr_assert_eq(phx__exact_sum_value(&tiny), 0x1p-1073);
  phx__exact_sum large = {{0}, 0};
  phx__exact_sum_add(&large, 0x1.fffffffffffffp1022);
  cr_assert_eq(phx__exact_sum_value(&large), 0x1.fffffffffffffp1022);
  cr_assert_eq(phx__exact_sum_value(&(phx__exact_sum){{0}, 0}), 0.0);
}

Test(norm, numbers_below_zero_are_subtracted) {
  const double terms[] = {1.5, -0x1p-60, -3.25, 0x1p80, -0x1p80, 0x1p-1074, 0x1p-60, -0x1p-1074};
  phx__exact_sum sum = {{0}, 0}, half[2] = {{{0}, 0}, {{0}, 0}};
  for (size_t i = 0; i < 8; i++) phx__exact_sum_add(&sum, terms[i]), phx__exact_sum_add(&half[i % 2], terms[i]);
  cr_assert_eq(phx__exact_sum_value(&sum), -1.75);
  for (int i = 0; i < PHX__SUM_LIMBS; i++) half[0].limbs[i] += half[1].limbs[i];
  cr_assert_eq(phx__exact_sum_value(&half[0]), -1.75);
  phx__exact_sum_add(&sum, 1.75 + 0x1p-40);
  cr_assert_eq(phx__exact_sum_value(&sum), 0x1p-40);
  phx__exact_sum_add(&sum, -0x1p-40);
  cr_assert_eq(phx__exact_sum_value(&sum), 0.0);
}

Test(norm, not_finite_is_flagged) {
  phx__exact_sum sum = {{0}, 0};
  phx__exact_sum_add(&sum, 1.0);
  phx__exact_sum_add(&sum, INFINITY);
  phx__exact_sum_add(&sum, NAN);
  cr_assert_eq(sum.not_finite, 2);
  cr_assert(isnan(phx__exact_sum_value(&sum)));
}

/* A tied unit (0), a unit with a frozen parameter (1), a small one (2). */
static const phx_param params[] = {
    {.name = "wte",
     .shape = {257, 30},
     .ndim = 2,
     .flags = PHX_PARAM_DECAY,
     .unit = 0,
     .init = PHX_INIT_NORMAL,
     .init_std = 0.02},
    {.name = "a", .shape = {100}, .ndim = 1, .unit = 1, .init = PHX_INIT_ONE},
    {.name = "b", .shape = {7, 9}, .ndim = 2, .flags = PHX_PARAM_FROZEN, .unit = 1},
    {.name = "c", .shape = {1000}, .ndim = 1, .unit = 1},
    {.name = "ln", .shape = {1}, .ndim = 1, .unit = 2},
};
static const phx_unit units[] = {{.name = "wte", .first_param = 0, .n_params = 1},
                                 {.name = "h.0", .first_param = 1, .n_params = 3},
                                 {.name = "ln_f", .first_param = 4, .n_params = 1}};
static const phx_use uses[] = {{0, PHX_USE_FORWARD | PHX_USE_GRADIENT},
                               {1, PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT},
                               {2, PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT},
                               {0, PHX_USE_FORWARD | PHX_USE_BACKWARD | PHX_USE_GRADIENT}};
static const phx_stage stages[] = {{"embed", 0, 1}, {"h.0", 1, 1}, {"head", 2, 2}};
static phx_model declared(void) {
  return (phx_model){.struct_size = sizeof(phx_model), .params = params, .units = units, .stages = stages, .uses = uses,
                     .n_params = 5, .n_units = 3, .n_stages = 3, .n_uses = 4, .param_stride = sizeof *params,
                     .unit_stride = sizeof *units, .stage_stride = sizeof *stages, .use_stride = sizeof *uses};
}

Test(layout, offsets_blocks_and_last_use) {
  phx_model d = declared(), *m = NULL;
  cr_assert_eq(phx__layout_build(&d, &m, NULL), PHX_OK);
  cr_assert_eq(phx_model_unit(m, 0)->blocks[0], 8); /* 7710 elements */
  cr_assert_eq(phx_model_param(m, 3)->offset, 128); /* 100 rounded up to 256 bytes; the frozen one is elsewhere */
  cr_assert_eq(phx_model_unit(m, 1)->blocks[PHX_FLAT_TRAINABLE], 2);
  cr_assert_eq(phx_model_unit(m, 1)->blocks[PHX_FLAT_FROZEN], 1);
  cr_assert_eq(phx_model_unit(m, 2)->first_block[0], 10);
  cr_assert_eq(m->total_blocks[0], 11);
  cr_assert_eq(m->total_blocks[1], 1);
  cr_assert(phx_model_use(m, 0)->flags & PHX_USE_LAST);
  cr_assert_not(phx_model_use(m, 3)->flags & PHX_USE_LAST);
  cr_assert_eq(phx__layout_parameters(m), 257 * 30 + 100 + 63 + 1000 + 1);
  phx__range r = {0};
  cr_assert(phx__layout_next(m, 1, 0, 90, 100, &r));
  cr_assert_eq(r.first, 90);
  cr_assert_eq(r.numel, 10);
  cr_assert(phx__layout_next(m, 1, 0, 90, 100, &r));
  cr_assert_eq(r.first, 128);
  cr_assert_eq(r.numel, 62);
  cr_assert_eq(r.in_param, 0);
  cr_assert_not(phx__layout_next(m, 1, 0, 90, 100, &r));
  phx__layout_free(m);
}

Test(layout, refusals) {
  phx_param copy[5];
  phx_error err = PHX_ERROR_INIT;
  phx_model d = declared(), *m = NULL;
  memcpy(copy, params, sizeof copy);
  d.params = copy;
  copy[3].name = "a";
  cr_assert_eq(phx__layout_build(&d, &m, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "two parameters are called a"));
  copy[3].name = "c";
  copy[3].shape[0] = 0;
  cr_assert_eq(phx__layout_build(&d, &m, &err), PHX_INVALID);
  copy[3].ndim = 4;
  for (int i = 0; i < 4; i++) copy[3].shape[i] = 1ll << 40;
  cr_assert_eq(phx__layout_build(&d, &m, &err), PHX_INVALID);
  cr_assert(strstr(err.message, "c: dimension"));
  cr_assert_null(m);
}

static phx__state_hash hash_slices(const phx_model *m, const float *data, int64_t blocks, int64_t cut) {
  phx__state_hash sum = {0, 0};
  for (int64_t at = 0; at < blocks; at += cut) {
    phx_slice s = {.struct_size = sizeof s, .kind = PHX_STATE_WEIGHT, .unit = 1, .first_block = at,
                   .blocks = at + cut <= blocks ? cut : blocks - at, .dtype = PHX_F32};
    phx__state_hash_slice(&sum, m, &s, data + at * PHX_BLOCK);
  }
  return sum;
}

Test(hash, placement_and_padding_do_not_matter_but_values_do) {
  phx_model d = declared(), *m = NULL;
  cr_assert_eq(phx__layout_build(&d, &m, NULL), PHX_OK);
  static float data[2 * PHX_BLOCK];
  phx__rng_normal(data, 0, 2 * PHX_BLOCK, 1, 1, 1);
  phx__state_hash a = hash_slices(m, data, 2, 1), b = hash_slices(m, data, 2, 2);
  cr_assert(a.low == b.low && a.high == b.high);
  phx_slice master = {.struct_size = sizeof master, .kind = PHX_STATE_MASTER, .unit = 1, .blocks = 2, .dtype = PHX_F32};
  b = (phx__state_hash){0, 0};
  phx__state_hash_slice(&b, m, &master, data);
  cr_assert(a.low == b.low && a.high == b.high, "a master is the weight it stands behind");
  data[110] = 5; /* padding between two parameters */
  b = hash_slices(m, data, 2, 2);
  cr_assert(a.low == b.low && a.high == b.high);
  data[128] = nextafterf(data[128], 1);
  b = hash_slices(m, data, 2, 2);
  cr_assert_not(a.low == b.low && a.high == b.high);
  phx__layout_free(m);
}

Test(optim, schedules) {
  phx__settings s;
  memset(&s, 0, sizeof s);
  s.run.steps = 110;
  s.optimizer.lr = 1e-3;
  s.optimizer.final = 0.1;
  s.optimizer.warmup = 10;
  s.optimizer.schedule = 2;
  cr_assert_float_eq(phx__optim_lr(&s, 1), 1e-4, 1e-12);
  cr_assert_float_eq(phx__optim_lr(&s, 10), 1e-3, 1e-12);
  cr_assert_float_eq(phx__optim_lr(&s, 60), 0.55e-3, 1e-9);
  cr_assert_float_eq(phx__optim_lr(&s, 110), 1e-4, 1e-12);
  s.optimizer.schedule = 1;
  cr_assert_float_eq(phx__optim_lr(&s, 60), 0.55e-3, 1e-9);
  s.optimizer.schedule = 0;
  cr_assert_float_eq(phx__optim_lr(&s, 110), 1e-3, 1e-12);
}
