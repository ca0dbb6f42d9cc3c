/* tests/plugins/stub.h - plugins that can be loaded, listed and configured, and refuse to run.
 *
 * For tests of the loader and of the configuration; every call that would do work says PHX_UNSUPPORTED. */
#ifndef TEST_STUB_H
#define TEST_STUB_H
#include <phalanx/error.h>
#include <phalanx/provider.h>

#define STUB_UNUSED __attribute__((unused))

STUB_UNUSED static phx_status stub_refuse(phx_error *err) {
  return phx_fail(err, PHX_UNSUPPORTED, "%s is for tests of the loader: it cannot run", STUB_ID);
}

/* ---- strategy ---- */
STUB_UNUSED static phx_status stub_estimate(const void *config, const phx_topology *topology, const phx_model *model,
                                            phx_estimate *out, phx_error *err) {
  (void)config, (void)topology, (void)model, (void)out;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_create(const phx_host *host, const void *config, const phx_topology *topology,
                                          const phx_model *model, phx_strategy **out, phx_error *err) {
  (void)host, (void)config, (void)topology, (void)model, (void)out;
  return stub_refuse(err);
}
STUB_UNUSED static void stub_destroy(phx_strategy *self) { (void)self; }
STUB_UNUSED static phx_status stub_visit_state(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  (void)self, (void)visitor;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out,
                                       phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)out;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p,
                                         phx_error *err) {
  (void)self, (void)slice, (void)mode, (void)p;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_self(phx_strategy *self, phx_error *err) {
  (void)self;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_begin(phx_strategy *self, int32_t index, int32_t last, phx_error *err) {
  (void)self, (void)index, (void)last;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_acquire(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                                           phx_stream *stream, const phx_view **out, phx_error *err) {
  (void)self, (void)stage, (void)pass, (void)micro_batch, (void)stream, (void)out;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_release(phx_strategy *self, uint32_t stage, int32_t pass, int32_t micro_batch,
                                           uint32_t flags, phx_stream *stream, phx_error *err) {
  (void)self, (void)stage, (void)pass, (void)micro_batch, (void)flags, (void)stream;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_norm(phx_strategy *self, const phx_accumulator *acc, phx_error *err) {
  (void)self, (void)acc;
  return stub_refuse(err);
}
STUB_UNUSED static phx_status stub_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  (void)self, (void)step, (void)scale;
  return stub_refuse(err);
}
#define STUB_STRATEGY_CALLS                                                                                    \
  .estimate = stub_estimate, .create = stub_create, .destroy = stub_destroy, .visit_state = stub_visit_state,  \
  .map = stub_map, .unmap = stub_unmap, .state_changed = stub_self, .begin_micro_batch = stub_begin,           \
  .acquire = stub_acquire, .release = stub_release, .finish_gradients = stub_self,                             \
  .discard_gradients = stub_self, .gradient_norm = stub_norm, .update = stub_update

/* ---- descriptor: all but options, table and what a test varies ---- */
#define STUB_DESCRIPTOR(plugin_kind)                                                                           \
  .struct_size = sizeof(phx_plugin), .kind = plugin_kind, .table_major = PHX_ABI_MAJOR,                        \
  .table_minor = PHX_ABI_MINOR, .version = "1.0", .summary = "For tests.", .vendor = "phalanx",                \
  .license = "unspecified", .build = "test", .preference = STUB_PREFERENCE
#ifndef STUB_PREFERENCE
#define STUB_PREFERENCE 10
#endif
#endif
