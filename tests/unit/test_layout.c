/* Declarations that a model plugin got wrong: each is refused by name, and nothing is allocated for it. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "engine/layout.h"
#include "base/status.h"
#include "base/sys.h"

static phx_param params[3];
static phx_unit units[2];
static phx_stage stages[2];
static phx_use uses[2];
static phx_model model;

static void setup(void) {
  memcpy(params,
         (phx_param[]){{.name = "a", .unit = 0, .ndim = 2, .shape = {5, 7}},
                       {.name = "b", .unit = 1, .ndim = 1, .shape = {1500}},
                       {.name = "c", .unit = 1, .ndim = 1, .shape = {3}, .flags = PHX_PARAM_FROZEN}},
         sizeof params);
  memcpy(units,
         (phx_unit[]){{.name = "u", .first_param = 0, .n_params = 1}, {.name = "w", .first_param = 1, .n_params = 2}},
         sizeof units);
  memcpy(stages, (phx_stage[]){{.name = "s", .first_use = 0, .n_uses = 1}, {.name = "t", .first_use = 1, .n_uses = 1}},
         sizeof stages);
  memcpy(uses, (phx_use[]){{.unit = 0, .flags = PHX_USE_GRADIENT}, {.unit = 1, .flags = PHX_USE_GRADIENT}},
         sizeof uses);
  model = (phx_model){.struct_size = sizeof model, .params = params, .units = units, .stages = stages, .uses = uses,
                      .n_params = 3, .n_units = 2, .n_stages = 2, .n_uses = 2, .param_stride = sizeof *params,
                      .unit_stride = sizeof *units, .stage_stride = sizeof *stages, .use_stride = sizeof *uses};
}
TestSuite(layout_faults, .init = setup, .timeout = 20);

static void expect_refused(const char *message) {
  phx_model *out = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_expect_eq(phx__layout_build(&model, &out, &err), PHX_INVALID, "accepted: %s", message);
  cr_expect(strstr(err.message, message), "'%s' lacks '%s'", err.message, message);
  cr_expect_null(out);
  setup();
}

Test(layout_faults, each_is_named) {
  phx_model *out = NULL;
  cr_assert_eq(phx__layout_build(&model, &out, NULL), PHX_OK);
  cr_assert_eq(out->total_blocks[PHX_FLAT_TRAINABLE], 3);
  phx__layout_free(out);
  model.n_stages = 0;
  expect_refused("2 units and 0 stages: none may be 0");
  model.n_params = 0;
  expect_refused("0 parameters");
  params[0].role = PHX_ROLES;
  expect_refused("parameter a has role 6 and reserved0 = 0; expected 0 to 5, and 0");
  params[0].reserved0 = 7;
  expect_refused("parameter a has role 0 and reserved0 = 7");
  params[0].role = PHX_ROLE_VECTOR;
  expect_refused("parameter a has role 5 and 2 dimensions");
  params[1].role = PHX_ROLE_MATRIX;
  expect_refused("parameter b has role 1 and 1 dimensions");
  params[0].row_parts = 2;
  expect_refused("parameter a: 5 rows of 7 do not come apart in 2 x 1 equal parts");
  params[0].column_parts = 3;
  expect_refused("parameter a: 5 rows of 7 do not come apart in 1 x 3 equal parts");
  params[1].ndim = 0;
  expect_refused("parameter b has 0 dimensions");
  params[1].ndim = PHX_PARAM_DIMS + 1;
  expect_refused("parameter b has");
  params[0].shape[1] = -1;
  expect_refused("parameter a: dimension 1 = -1");
  params[0].shape[0] = params[0].shape[1] = INT64_C(1) << 33;
  expect_refused("parameter a: dimension 1");
  params[1].unit = 0;
  expect_refused("parameter b says unit 0 but stands in unit 1");
  units[1].first_param = 2;
  expect_refused("unit w: its parameters do not follow");
  units[1].n_params = UINT32_MAX;
  expect_refused("unit w: its parameters do not follow");
  units[1].n_params = 1;
  expect_refused("1 parameters belong to no unit");
  stages[1].n_uses = 2;
  expect_refused("stage t uses units out of range");
  stages[1].first_use = UINT32_MAX;
  expect_refused("stage t uses units out of range");
  uses[1].unit = 2;
  expect_refused("stage t uses unit 2 of 2");
  uses[1].flags = 0;
  expect_refused("unit w has trainable parameters, but no stage writes their gradient");
}

static int left;
static void *few_callocs(size_t n, size_t bytes) { return left-- > 0 ? calloc(n, bytes) : NULL; }

/* A model of before roles: its parameters are shorter, and what lies behind them is of the next one. */
Test(layout_faults, shorter_parameters_have_no_role) {
  enum { OLD = offsetof(phx_param, role) };
  static _Alignas(8) char packed[3 * OLD];
  phx_model *out = NULL;
  for (int i = 0; i < 3; i++) memcpy(packed + i * OLD, &params[i], OLD);
  model.params = (const phx_param *)(const void *)packed;
  model.param_stride = OLD;
  cr_assert_eq(phx__layout_build(&model, &out, NULL), PHX_OK);
  for (uint32_t i = 0; i < 3; i++) {
    const phx_param *p = phx_model_param(out, i);
    cr_expect_str_eq(p->name, params[i].name);
    cr_expect(p->role == PHX_ROLE_UNKNOWN && p->row_parts == 0 && p->column_parts == 0 && p->reserved0 == 0);
  }
  phx__layout_free(out);
}

Test(layout_faults, no_memory) {
  void *(*real)(size_t, size_t) = phx__sys.calloc;
  phx_model *out = NULL;
  int refused = 0;
  phx__sys.calloc = few_callocs;
  for (left = 0; phx__layout_build(&model, &out, NULL) == PHX_NOMEM; left = refused) cr_assert_lt(++refused, 20);
  phx__sys.calloc = real;
  cr_assert_gt(refused, 3);
  cr_assert_not_null(out);
  phx__layout_free(out);
}
