/* The harness must be able to fail: a good strategy (zero) with one thing broken at a time, by a table of its own. */
#include <criterion/criterion.h>
#include <string.h>
#include "harness.h"

static const phx_strategy_table *good; /* of the real plugin */
static phx_strategy_table broken;
static phx_plugin descriptor;
static _Thread_local const phx_host *host; /* a rank is a thread */
static _Thread_local void *kept;

static void expect_found(const char *options, int mode, const char *what) {
  toy *t = toy_odd();
  harness_config c = {.plugin = &descriptor, .toy = t, .ranks = 3, .options = options, .stream_mode = mode};
  harness_result r;
  cr_assert_not(harness_run(&c, &r), "not found: %s", what);
  cr_assert(strstr(r.message, what), "expected '%s', got '%s'", what, r.message);
  harness_free(&r);
  toy_free(t);
}

static void setup(void) {
  phx_error err = {.struct_size = sizeof err};
  const phx_plugin *p = harness_plugin("zero", &err);
  cr_assert(p, "%s", err.message);
  descriptor = *p;
  good = p->table;
  broken = *good;
  descriptor.table = &broken;
}
TestSuite(harness, .init = setup, .timeout = 60);

static phx_status more_bytes(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                             phx_error *err) {
  phx_status status = good->estimate(config, t, m, out, err);
  if (t->rank == 2) out->bytes[PHX_MEM_OPTIMIZER] += 256;
  return status;
}
Test(harness, finds_wrong_plan_of_bytes) {
  broken.estimate = more_bytes;
  expect_found("stage=2", 0, "rank 2: memory kind 3: planned");
}

static phx_status more_sent(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                            phx_error *err) {
  phx_status status = good->estimate(config, t, m, out, err);
  out->sent[PHX_OP_REDUCE] += 4;
  return status;
}
Test(harness, finds_wrong_plan_of_traffic) {
  broken.estimate = more_sent;
  expect_found("stage=2", 0, "reduce: planned");
}

static phx_status norm_twice(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  phx_status status = good->gradient_norm(self, acc, err);
  return status == PHX_OK ? good->gradient_norm(self, acc, err) : status;
}
Test(harness, finds_a_block_normed_twice) {
  broken.gradient_norm = norm_twice;
  expect_found("stage=1", 0, "was added to the norm 2 times");
}

static phx_status no_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  (void)self, (void)step, (void)scale, (void)err;
  return PHX_OK;
}
Test(harness, finds_a_lost_update) {
  broken.update = no_update;
  expect_found("stage=1", 0, "all_gather: planned 1 calls");
}

static phx_status no_rebuild(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}
Test(harness, finds_stale_weights) {
  broken.state_changed = no_rebuild;
  expect_found("stage=1", 0, "as read differs");
}

static phx_status no_wait(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch, phx_stream *stream,
                          const phx_view **out, phx_error *err) {
  phx_status status = good->acquire(self, stage, pass, micro_batch, stream, out, err);
  if (status == PHX_OK) ((phx_view *)(uintptr_t)*out)->ready = NULL;
  return status;
}
Test(harness, finds_weights_read_before_they_came) {
  broken.acquire = no_wait;
  expect_found("stage=3 stage3_param_persistence_threshold=0", LOOPBACK_DEFERRED, "as read differs");
}

static phx_status no_finish(phx_strategy *self, phx_error *err) {
  (void)self, (void)err;
  return PHX_OK;
}
Test(harness, finds_gradients_read_before_they_were_reduced) {
  broken.finish_gradients = no_finish;
  expect_found("stage=2", LOOPBACK_DEFERRED, "given to the norm differs");
}

static phx_status without_last_use(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                                   uint32_t flags, phx_stream *stream, phx_error *err) {
  return good->release(self, stage, pass, micro_batch, flags & ~(uint32_t)PHX_RELEASE_NO_GRADIENT, stream, err);
}
Test(harness, finds_a_gradient_that_was_not_cleared) {
  broken.release = without_last_use;
  expect_found("stage=2 reduce_bucket_size=1000", 0, "differs");
}

static phx_status visit_twice(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  phx_status status = good->visit_state(self, visitor, err);
  return status == PHX_OK ? good->visit_state(self, visitor, err) : status;
}
Test(harness, finds_state_written_twice) {
  broken.visit_state = visit_twice;
  expect_found("stage=1", 0, "was visited 2 times");
}

/* What create did is left as it is; the host is kept for the faults below. */
static phx_status create_more(const phx_host *h, const void *config, const phx_topology *t, const phx_model *m,
                              phx_strategy **out, phx_error *err) {
  phx_memory what = {.struct_size = sizeof what, .bytes = 4096, .kind = PHX_MEM_BUFFER};
  host = h;
  phx_status status = good->create(h, config, t, m, out, err);
  return status == PHX_OK ? h->alloc(h->ctx, &what, &kept, err) : status;
}
Test(harness, finds_a_leak) {
  broken.create = create_more;
  expect_found("stage=1", 0, "4096 bytes were not released");
}

static phx_status plan_kept(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                            phx_error *err) {
  phx_status status = good->estimate(config, t, m, out, err);
  out->bytes[PHX_MEM_BUFFER] += 4096;
  return status;
}
static void destroy_more(phx_strategy *self) {
  good->destroy(self);
  if (host) host->release(host->ctx, kept);
}
static phx_status private_memory(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  const phx_comm *c = host->extension(host->ctx, PHX_EXT_COMM);
  phx_status status = good->visit_state(self, visitor, err);
  return status == PHX_OK ? c->all_reduce(c->ctx, kept, kept, 8, PHX_F32, PHX_SUM, NULL, err) : status;
}
Test(harness, finds_collectives_on_private_memory) {
  broken.estimate = plan_kept;
  broken.create = create_more;
  broken.destroy = destroy_more;
  broken.visit_state = private_memory;
  expect_found("stage=1", 0, "collectives on private memory");
}

static phx_status other_count(phx_strategy *self, phx_error *err) {
  const phx_comm *c = host->extension(host->ctx, PHX_EXT_COMM);
  phx_status status = good->state_changed(self, err);
  return status == PHX_OK ? c->all_reduce(c->ctx, kept, kept, 8 + host->rank, PHX_F32, PHX_SUM, NULL, err) : status;
}
Test(harness, finds_ranks_that_differ) {
  broken.create = create_more;
  broken.destroy = destroy_more;
  broken.state_changed = other_count;
  expect_found("stage=1", 0, "issues all_reduce of");
}

static phx_status alloc_late(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  phx_memory what = {.struct_size = sizeof what, .bytes = 256, .kind = PHX_MEM_OPTIMIZER};
  phx_status status = good->begin_micro_batch(self, index, last, err);
  host->release(host->ctx, kept);
  return status == PHX_OK ? host->alloc(host->ctx, &what, &kept, err) : status;
}
static phx_status plan_more(const void *config, const phx_topology *t, const phx_model *m, phx_estimate *out,
                            phx_error *err) {
  phx_status status = good->estimate(config, t, m, out, err);
  out->bytes[PHX_MEM_BUFFER] += 4096;
  out->bytes[PHX_MEM_OPTIMIZER] += 256;
  return status;
}
Test(harness, finds_allocations_in_the_steady_state) {
  broken.estimate = plan_more;
  broken.create = create_more;
  broken.destroy = destroy_more;
  broken.begin_micro_batch = alloc_late;
  expect_found("stage=1", 0, "allocations in the steady state");
}

/* The order of the reference: T(4) is not left to right, T(3) is. */
Test(harness, the_reduction_order_matters) {
  toy *t = toy_plain(2, 64);
  for (int32_t ranks = 3; ranks <= 4; ranks++) {
    toy_run run = {.data_ranks = ranks, .accumulate = 1, .steps = 2, .optim = {true, 0.01f, 0.1f}};
    toy_reference *tree = toy_reference_run(t, &run, 1), *left = toy_reference_run(t, &run, 0);
    int differ = memcmp(tree->weights[2], left->weights[2], (size_t)t->elements[0] * sizeof(float)) != 0;
    cr_assert_eq(differ, ranks == 4);
    toy_reference_free(tree, &run), toy_reference_free(left, &run);
  }
  toy_free(t);
}

/* Hashes do not depend on who holds what. */
Test(harness, hashes_are_independent_of_placement) {
  toy *t = toy_odd();
  uint64_t hash[2];
  for (int i = 0; i < 2; i++) {
    harness_result r;
    harness_config c = {.strategy = "zero", .toy = t, .ranks = 5, .options = i ? "stage=3" : "stage=1"};
    cr_assert(harness_run(&c, &r), "%s", r.message);
    hash[i] = r.hash[PHX_STATE_WEIGHT] ^ r.hash[5] ^ r.hash[6];
    harness_free(&r);
  }
  cr_assert_eq(hash[0], hash[1]);
  toy_free(t);
}
