/* Structs that the caller owns and the callee fills in (phalanx/base.h, "Growth"), between sides of different ages.
 *
 * Every filler of such a struct is called with a struct that ends earlier than today's, behind which lies poison, and
 * with one that is longer.  The caller's struct_size and the poison stay; what both sides know is as in a struct of
 * today's size; what only the caller knows is as it was, or zero. */
#include <criterion/criterion.h>
#include <phalanx/kit.h>
#include <phalanx/kit_comm.h>
#include <phalanx/provider.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"
#include "plugin/descriptor.h"
#include "plugin_file.h"
#include "toy.h"

enum { POISON = 0xA5, LONGEST = 4096, LONGER = 40 };

/* ---- the fillers ---- */
static const phx_plugin *plugin_of(const char *file) {
  char path[512];
  phx_error err = PHX_ERROR_INIT;
  snprintf(path, sizeof path, "%s/%s", PHX_TEST_PLUGINS, file);
  const phx_plugin *p = plugin_file_open(path, &err);
  cr_assert_not_null(p, "%s", err.message);
  return p;
}

static void *config_of(const phx_plugin *p, const char *options) {
  static _Alignas(64) char config[LONGEST];
  static char text[256];
  phx_error err = PHX_ERROR_INIT;
  memset(config, 0, sizeof config);
  snprintf(text, sizeof text, "%s", options);
  cr_assert_leq(p->config_size, sizeof config);
  cr_assert_eq(plugin_file_config(p, text, config, &err), PHX_OK, "%s", err.message);
  return config;
}

static void fill_stats(void *out) {
  phx_kit_counters counters = {.wait_ns = 7};
  for (int i = 0; i < PHX_OPS; i++) counters.calls[i] = 10 + i, counters.bytes[i] = 100 + i;
  phx_kit_counters_read(&counters, out);
}

static const phx_batch_shape shape = {.struct_size = sizeof shape, .micro = 2, .sequence = 16,
                                      .compute_dtype = PHX_F32};

/* One of declare's two outputs is the one that is tested, the other has today's size. */
static void declare(phx_model *model, phx_model_facts *facts) {
  const phx_plugin *p = plugin_of("phx_model_gpt.so");
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(((const phx_model_table *)p->table)->declare(config_of(p, "size=tiny"), model, facts, &shape, &err),
               PHX_OK, "%s", err.message);
}
static void fill_model(void *out) {
  phx_model_facts facts = {.struct_size = sizeof facts};
  declare(out, &facts);
}
static void fill_facts(void *out) {
  phx_model model = {.struct_size = sizeof model};
  declare(&model, out);
}
static void fill_stage_memory(void *out) {
  const phx_plugin *p = plugin_of("phx_model_gpt.so");
  phx_error err = PHX_ERROR_INIT;
  const phx_status status =
      ((const phx_model_table *)p->table)->stage_memory(config_of(p, "size=tiny"), &shape, 1, out, &err);
  cr_assert_eq(status, PHX_OK, "%s", err.message);
}

static void describe(const char *file, void *out) {
  const phx_plugin *p = plugin_of(file);
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(((const phx_optimizer_table *)p->table)->describe(config_of(p, ""), out, &err), PHX_OK, "%s",
               err.message);
}
static void fill_adamw(void *out) { describe("phx_optimizer_adamw.so", out); }

static int64_t payload(const void *ctx, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                       int32_t root) {
  (void)ctx, (void)op, (void)rank, (void)size, (void)root;
  return numel * (int64_t)phx_dtype_bytes(dtype);
}
static void estimate(const char *file, const char *options, void *out) {
  const phx_plugin *p = plugin_of(file);
  phx_error err = PHX_ERROR_INIT;
  toy *t = toy_plain(3, 40);
  const phx_topology topology = {.struct_size = sizeof topology, .rank = 1, .world_size = 2, .local_rank = 1,
                                 .local_size = 2, .accumulate = 1, .compute_dtype = PHX_F32, .reduce_dtype = PHX_F32,
                                 .overlaps = 1, .n_optim_states = 2, .optim_dtype = {PHX_F32, PHX_F32},
                                 .payload = payload};
  const phx_status status = ((const phx_strategy_table *)p->table)
                                ->estimate(config_of(p, options), &topology, &t->model, out, &err);
  cr_assert_eq(status, PHX_OK, "%s: %s", file, err.message);
  toy_free(t);
}
static void fill_ddp(void *out) { estimate("phx_strategy_ddp.so", "", out); }
static void fill_fsdp(void *out) { estimate("phx_strategy_fsdp.so", "", out); }
static void fill_zero(void *out) { estimate("phx_strategy_zero.so", "stage=3", out); }

/* What the core takes from a plugin: a slice as the visitor sees it. */
static phx_slice older_slice;
static void take_slice(void *out) { phx_struct_take(out, &older_slice); }

typedef struct filler {
  const char *name;
  size_t size, shorter; /* of today's struct, and up to its last field */
  void (*fill)(void *out);
} filler;
#define FILLER(type, last, fill) {#type " by " #fill, sizeof(type), offsetof(type, last), fill}
static const filler fillers[] = {
    FILLER(phx_comm_stats, wait_ns, fill_stats), FILLER(phx_model, total_blocks, fill_model),
    FILLER(phx_model_facts, computes, fill_facts), FILLER(phx_stage_memory, workspace, fill_stage_memory),
    FILLER(phx_estimate, state_bytes, fill_ddp), FILLER(phx_estimate, state_bytes, fill_fsdp),
    FILLER(phx_estimate, state_bytes, fill_zero), FILLER(phx_estimate, grain, fill_ddp),
    FILLER(phx_optimizer_facts, states, fill_adamw),
};

/* out is of `size` bytes for the filler, zero, and LONGEST bytes are there. */
static void run(const filler *f, size_t size, unsigned char *out) {
  memset(out, POISON, LONGEST);
  memset(out, 0, size);
  memcpy(out, &size, sizeof size);
  f->fill(out);
  size_t kept;
  memcpy(&kept, out, sizeof kept);
  cr_expect_eq(kept, size, "%s: struct_size was %zu and is %zu", f->name, size, kept);
  for (size_t i = size; i < LONGEST; i++)
    cr_assert_eq(out[i], POISON, "%s: byte %zu behind a struct of %zu was written", f->name, i - size, size);
}

Test(growth, whoever_fills_a_struct_stays_inside_it) {
  static _Alignas(64) unsigned char today[LONGEST], old[LONGEST], later[LONGEST];
  for (size_t i = 0; i < sizeof fillers / sizeof *fillers; i++) {
    const filler *f = &fillers[i];
    const size_t head = sizeof(size_t);
    run(f, f->size, today);
    run(f, f->shorter, old);
    run(f, f->size + LONGER, later);
    bool filled = false;
    for (size_t k = head; k < f->size; k++) filled = filled || today[k];
    cr_expect(filled, "%s filled nothing", f->name);
    /* pointers into memory of the callee may differ between two calls of declare */
    if (f->fill != fill_model) {
      cr_expect_arr_eq(old + head, today + head, f->shorter - head, "%s: an older caller got something else", f->name);
      cr_expect_arr_eq(later + head, today + head, f->size - head, "%s: a newer caller got something else", f->name);
    }
    for (size_t k = f->size; k < f->size + LONGER; k++)
      cr_assert_eq(later[k], 0, "%s: byte %zu that it does not know is not zero", f->name, k);
  }
}

/* An older plugin's struct ends before ours, and poison lies behind it. */
Test(growth, what_the_other_side_does_not_know_is_zero) {
  phx_slice slice;
  memset(&older_slice, POISON, sizeof older_slice);
  older_slice.struct_size = offsetof(phx_slice, where);
  older_slice.unit = 5;
  slice = (phx_slice){.struct_size = sizeof slice};
  take_slice(&slice);
  cr_expect_eq(slice.struct_size, sizeof slice);
  cr_expect_eq(slice.unit, 5u);
  cr_expect_null(slice.where);
  cr_expect_eq(slice.numel, 0);
}

Test(growth, reserved_fields_are_zero_and_old_minors_refused) {
  phx_plugin d = *plugin_of("phx_strategy_ddp.so");
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__descriptor_check(&d, PHX_KIND_STRATEGY, NULL, &err), PHX_OK, "%s", err.message);
  d.reserved0 = 3;
  cr_expect_eq(phx__descriptor_check(&d, PHX_KIND_STRATEGY, NULL, &err), PHX_INVALID);
  cr_expect_not_null(strstr(err.message, "reserved0 = 3, reserved1 = 0; expected 0"), "%s", err.message);
  d.reserved0 = 0;
  d.table_minor = PHX_ABI_MINOR_OLDEST - 1;
  cr_expect_eq(phx__descriptor_check(&d, PHX_KIND_STRATEGY, NULL, &err), PHX_UNSUPPORTED);
  cr_expect_not_null(strstr(err.message, "was built for ABI 1.1, and the oldest that is taken is 1.2"), "%s",
                     err.message);
}
