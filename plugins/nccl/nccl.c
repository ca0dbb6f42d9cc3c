/* nccl.c - the communicator plugin "nccl": collectives between GPUs, by NCCL.
 *
 * create() lets all ranks meet through the job, joins them in one non-blocking NCCL communicator, and takes the
 * arena (ncclMemAlloc, registered) and the staging.  A call on device memory is launched on the caller's stream and
 * returns; a call on other memory (losses, norms, tables: whatever the device does not own) passes through the
 * staging in chunks and returns when its work is done, and so does a barrier on the compute stream.
 *
 * Reductions are NCCL's own, whose order of additions depends on topology and size, and which round bf16 at every
 * hop; with [run] deterministic = yes they are an exchange in the order T(n) of phalanx/comm.h, with the bits of any
 * other deterministic communicator (canonical.c says what that costs).
 *
 * Payload: the bytes a rank receives when every collective takes the way that is best for bandwidth (a ring, or the
 * exchange).  NCCL may choose another way (trees, in-network reduction); the plan and the stats count by one formula.
 *
 * The files in reading order: comm_nccl.h (the data), setup.c, issue.c (the table), collective.c, canonical.c,
 * tree.c, watch.c (waiting, the watchdog, failure), lane.c (who is in which call), split.c.  Threads: [main], and the
 * watchdog. */
#include "comm_nccl.h"

#include <stdio.h>
#include <stdlib.h>

static phx_status probe(phx_error *err) {
  int count = 0;
  cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && count > 0) return PHX_OK;
  (void)cudaGetLastError(); /* it would stay for the next call */
  phx_fail(err, PHX_UNSUPPORTED, "nccl joins NVIDIA GPUs, and this machine offers none: %s",
           code == cudaSuccess ? "the driver counts 0 devices" : cudaGetErrorString(code));
  if (err) err->cause = (int32_t)code;
  return PHX_UNSUPPORTED;
}

int64_t nccl_payload(int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size, int32_t root) {
  int64_t element = (int64_t)phx_dtype_bytes(dtype), bytes = numel * element, others = size - 1, lo = 0, hi = 0;
  if (op == PHX_OP_RECV) return bytes; /* the receiver's */
  if (size <= 1 || bytes <= 0) return 0;
  nccl_cut(numel, size, rank, &lo, &hi);
  const int64_t own = (hi - lo) * element;
  switch (op) {
    case PHX_OP_ALL_REDUCE: return others * own + bytes - own; /* the parts of its slice, and the others' sums */
    case PHX_OP_REDUCE: return others * own + (rank == root ? bytes - own : 0);
    case PHX_OP_REDUCE_SCATTER:
    case PHX_OP_ALL_GATHER:
    case PHX_OP_ALL_TO_ALL: return others * bytes;
    case PHX_OP_BROADCAST: return rank == root ? 0 : bytes;
    default: return 0; /* send, barrier, split */
  }
}
static int64_t payload(const void *config, int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size,
                       int32_t root) {
  (void)config; /* no option changes it */
  return nccl_payload(op, numel, dtype, rank, size, root);
}

static int64_t buffer_bytes(const void *config, int32_t size) {
  const nccl_config *k = config;
  (void)size; /* the staging is cut by the ranks, it does not grow with them */
  return 2 * k->communicators * phx_align_bytes(k->staging); /* on the device, and pinned */
}

static phx_status create(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out,
                         phx_error *err) {
  if (arena_bytes < 0) return phx_fail(err, PHX_INVALID, "nccl: an arena of %lld bytes", (long long)arena_bytes);
  nccl_world *w = calloc(1, sizeof *w);
  if (!w) return phx_fail(err, PHX_NOMEM, "nccl: no memory for %zu bytes", sizeof *w);
  w->host = host;
  w->job = host->extension(host->ctx, PHX_EXT_JOB);
  w->device = host->extension(host->ctx, PHX_EXT_DEVICE);
  w->config = *(const nccl_config *)config;
  w->config.staging = phx_align_bytes(w->config.staging);
  w->deterministic = PHX_HAS(host, phx_host, deterministic) ? host->deterministic : 0;
  w->timed = w->device && (w->device->caps & PHX_DEVICE_TIMED) != 0;
  w->next_id = 2;
  const phx_status status = nccl_world_open(w, arena_bytes, err);
  if (status == PHX_OK)
    *out = &w->all->table;
  else
    nccl_world_close(w);
  return status;
}

static void destroy(phx_comm *world) {
  if (world) nccl_world_close(((nccl_comm *)(void *)world)->world);
}
static void *arena(phx_comm *world) { return ((nccl_comm *)(void *)world)->world->arena; }

static const phx_comm_table table = {
    .struct_size = sizeof(phx_comm_table),
    .probe = probe,
    .payload = payload,
    .buffer_bytes = buffer_bytes,
    .create = create,
    .destroy = destroy,
    .arena = arena,
};
static const phx_option options[] = {
    PHX_BYTES(
        nccl_config, staging, "16MiB", 1 << 20, 1 << 30, 0,
        "Staging per communicator, on the device and as much pinned: for memory of the host, and for the exchange "
        "of [run] deterministic."),
    PHX_INT(nccl_config, communicators, "4", 1, NCCL_COMMS_MAX, NULL, 0,
            "Communicators that can live at once on a rank, the world included; split() takes the others."),
    PHX_BOOL(nccl_config, registered, "yes", "Register the arena with NCCL, which then sends from it without a copy."),
};
static const char *const extensions[] = {PHX_EXT_JOB, PHX_EXT_DEVICE, NULL};
static const phx_plugin plugin = {
    .struct_size = sizeof(phx_plugin),
    .kind = PHX_KIND_COMM,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "nccl",
    .version = "1.0",
    .summary = "Collectives between NVIDIA GPUs, by NCCL.",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .provides = PHX_CAP_DETERMINISTIC,
    .needs = PHX_NEED_OWN_DEVICE,
    .extensions = extensions,
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .option_stride = sizeof(phx_option),
    .config_size = sizeof(nccl_config),
    .table = &table,
    .preference = 20,
    .device = "cuda",
};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
