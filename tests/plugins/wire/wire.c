/* wire.c - shm on a pretended wire: every collective of the world takes payload / bandwidth longer, without the CPU.
 *
 * What it is for: "is communication hidden behind compute?" at two ranks and more, with real ranks and real data, so
 * that every strategy takes the path that it takes in earnest and its losses can be compared with shm's.  (At world
 * size 1 strategies rightly skip collectives, and there is nothing to hide.)
 *
 * A call on a stream is shm's own call, and behind it on the same stream a sleep of payload / bandwidth, payload being
 * the plan's formula for this rank; a call without a stream sleeps before it returns.  Calls on two streams do not
 * share the bandwidth.  Communicators that were split off (the core's losses and norms) are as fast as ever, and so are
 * send, recv and barrier.  bandwidth = 0: no wire, only shm.  One world per process. */
#define phx_plugin_v1 shm_entry
#include "shm.c"
#undef phx_plugin_v1
#include <errno.h>
#include <time.h>

typedef struct wire_config {
  shm_config shm; /* first: shm reads its part */
  double bandwidth;
} wire_config;

static phx_comm inner; /* shm's own calls */
static const phx_device *wire_device;
static int32_t wire_rank, wire_size;
static double wire_bandwidth;

static phx_status wait_payload(void *arg, phx_error *err) {
  const double seconds = (double)(intptr_t)arg / wire_bandwidth;
  struct timespec t;
  (void)err;
  clock_gettime(CLOCK_MONOTONIC, &t);
  const int64_t until = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec + (int64_t)(seconds * 1e9);
  t = (struct timespec){until / 1000000000, until % 1000000000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) continue;
  return PHX_OK;
}

static phx_status then_wait(phx_status status, int32_t op, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                            phx_error *err) {
  if (status != PHX_OK || wire_bandwidth <= 0) return status;
  void *bytes = (void *)(intptr_t)shm_payload(op, numel, dtype, wire_rank, wire_size, root);
  return s ? wire_device->enqueue(wire_device->ctx, s, wait_payload, bytes, err) : wait_payload(bytes, err);
}

static phx_status wire_all_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                                  phx_stream *s, phx_error *err) {
  return then_wait(inner.all_reduce(ctx, src, dst, numel, dtype, op, s, err), PHX_OP_ALL_REDUCE, numel, dtype, 0, s,
                   err);
}
static phx_status wire_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                              int32_t root, phx_stream *s, phx_error *err) {
  return then_wait(inner.reduce(ctx, src, dst, numel, dtype, op, root, s, err), PHX_OP_REDUCE, numel, dtype, root, s,
                   err);
}
static phx_status wire_reduce_scatter(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                                      phx_stream *s, phx_error *err) {
  return then_wait(inner.reduce_scatter(ctx, src, dst, numel, dtype, op, s, err), PHX_OP_REDUCE_SCATTER, numel, dtype,
                   0, s, err);
}
static phx_status wire_all_gather(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, phx_stream *s,
                                  phx_error *err) {
  return then_wait(inner.all_gather(ctx, src, dst, numel, dtype, s, err), PHX_OP_ALL_GATHER, numel, dtype, 0, s, err);
}
static phx_status wire_broadcast(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                                 phx_error *err) {
  return then_wait(inner.broadcast(ctx, buf, numel, dtype, root, s, err), PHX_OP_BROADCAST, numel, dtype, root, s, err);
}
static phx_status wire_all_to_all(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, phx_stream *s,
                                  phx_error *err) {
  return then_wait(inner.all_to_all(ctx, src, dst, numel, dtype, s, err), PHX_OP_ALL_TO_ALL, numel, dtype, 0, s, err);
}

static phx_status wire_create(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out,
                              phx_error *err) {
  PHX_TRY(create(host, config, arena_bytes, out, err));
  phx_comm *world = *out;
  inner = *world;
  wire_device = host->extension(host->ctx, PHX_EXT_DEVICE);
  wire_bandwidth = ((const wire_config *)config)->bandwidth;
  wire_rank = world->rank;
  wire_size = world->size;
  world->all_reduce = wire_all_reduce;
  world->reduce = wire_reduce;
  world->reduce_scatter = wire_reduce_scatter;
  world->all_gather = wire_all_gather;
  world->broadcast = wire_broadcast;
  world->all_to_all = wire_all_to_all;
  return PHX_OK;
}

PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) {
  enum { SHM_OPTIONS = sizeof options / sizeof *options };
  static phx_option all[SHM_OPTIONS + 1];
  static phx_comm_table wired;
  static phx_plugin renamed;
  memcpy(all, options, sizeof options);
  all[SHM_OPTIONS] =
      (phx_option)PHX_REAL(wire_config, bandwidth, "0", 0, 1e15, "Bytes per second of the pretended wire; 0: no wire.");
  wired = table;
  wired.create = wire_create;
  renamed = *shm_entry();
  renamed.id = "wire";
  renamed.summary = "Test only: shm whose collectives take the time of a wire.";
  renamed.options = all;
  renamed.n_options = SHM_OPTIONS + 1;
  renamed.config_size = sizeof(wire_config);
  renamed.table = &wired;
  return &renamed;
}
