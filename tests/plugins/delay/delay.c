/* comm_delay - a communicator that only takes time, for experiments with overlap (tests only).
 *
 * What it is for: "is communication hidden behind compute?" needs communication that costs time and no CPU, which shared
 * memory on a full machine cannot offer.  Runs at world size 1.  Data stay local: every collective does what it does in
 * a world of one (a copy, or nothing).  The time is that of a world of two on a wire: a call ends `latency` seconds plus
 * payload / bandwidth after it begins, where payload is this rank's part in a world of 2 (all_reduce: all bytes; reduce:
 * half, and half again unless root; reduce_scatter, all_gather, all_to_all: one rank's part; broadcast, recv: all;
 * barrier: 0).  Two calls on two streams do not share the bandwidth: each has a wire of its own.
 *
 * payload() therefore tells what size asks for with size 1 taken as 2, and stats count exactly that.  send, recv and
 * split off ranks do not exist in a world of one: send and recv are refused; split gives a communicator of one that
 * counts into its own stats and, as shm does, into the world's.
 *
 * The wait is clock_nanosleep to an absolute deadline.  abort() ends waits within 10 ms.  Threads: as phx_comm says; a
 * call on a stream takes a record from a ring of RING, and issuing waits when all are pending. */
#include <errno.h>
#include <phalanx/provider.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RING 256
#define SLICE_NS 10000000

typedef struct delay_config {
  double bandwidth; /* bytes per second */
  double latency;   /* seconds per call */
} delay_config;

typedef struct delay_comm delay_comm;
typedef struct delay_call {
  delay_comm *comm;
  const void *src;
  void *dst;
  int64_t bytes, payload; /* bytes: of the local copy */
  int32_t op, pending;
} delay_call;
struct delay_comm {
  phx_comm table;
  const phx_host *host;
  const phx_device *device;
  delay_config config;
  delay_comm *world;
  void *arena;
  int64_t calls[PHX_OPS], bytes[PHX_OPS];
  uint32_t aborted;
  uint64_t issued;
  delay_call ring[RING];
};

static phx_status fail(phx_error *err, phx_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static phx_status fail(phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  if (!err) return code;
  va_start(args, format);
  vsnprintf(err->message, sizeof err->message, format, args);
  va_end(args);
  err->code = code;
  err->cause = 0;
  return code;
}

static int64_t payload(int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size, int32_t root) {
  int64_t bytes = numel * (int64_t)phx_dtype_bytes(dtype), others = size < 2 ? 1 : size - 1, half = bytes / (others + 1);
  switch (op) {
    case PHX_OP_ALL_REDUCE: return 2 * others * half;
    case PHX_OP_REDUCE: return (others + (rank != root)) * half;
    case PHX_OP_REDUCE_SCATTER:
    case PHX_OP_ALL_GATHER:
    case PHX_OP_ALL_TO_ALL: return others * bytes;
    case PHX_OP_BROADCAST:
    case PHX_OP_RECV: return bytes;
    default: return 0;
  }
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static int is_aborted(const delay_comm *c) {
  return __atomic_load_n(&c->aborted, __ATOMIC_ACQUIRE) || __atomic_load_n(&c->world->aborted, __ATOMIC_ACQUIRE);
}

static phx_status run(void *arg, phx_error *err) {
  delay_call *call = arg;
  delay_comm *c = call->comm;
  double seconds = c->config.latency + (double)call->payload / c->config.bandwidth;
  int64_t deadline = now_ns() + (int64_t)(seconds * 1e9), now;
  if (call->bytes > 0 && call->src != call->dst) memcpy(call->dst, call->src, (size_t)call->bytes);
  while ((now = now_ns()) < deadline && !is_aborted(c)) {
    int64_t until = deadline - now > SLICE_NS ? now + SLICE_NS : deadline;
    struct timespec t = {until / 1000000000, until % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
  }
  phx_status status = is_aborted(c) ? fail(err, PHX_COMM, "delay: %s was aborted", phx_op_name(call->op)) : PHX_OK;
  if (status == PHX_OK) {
    for (delay_comm *k = c;; k = c->world) {
      __atomic_fetch_add(&k->calls[call->op], 1, __ATOMIC_RELAXED);
      __atomic_fetch_add(&k->bytes[call->op], call->payload, __ATOMIC_RELAXED);
      if (k == c->world) break;
    }
  }
  __atomic_store_n(&call->pending, 0, __ATOMIC_RELEASE);
  return status;
}

static phx_status issue(delay_comm *c, int32_t op, const void *src, void *dst, int64_t numel, int32_t dtype,
                        int32_t root, phx_stream *s, phx_error *err) {
  int64_t element = (int64_t)phx_dtype_bytes(dtype);
  if (op != PHX_OP_BARRIER) {
    if (element == 0) return fail(err, PHX_INVALID, "%s: %d is no dtype", phx_op_name(op), dtype);
    if (numel < 0) return fail(err, PHX_INVALID, "%s: %lld elements", phx_op_name(op), (long long)numel);
    if (root != 0) return fail(err, PHX_INVALID, "%s: rank %d, but there is only rank 0", phx_op_name(op), root);
    if (numel > 0 && (!src || !dst)) return fail(err, PHX_INVALID, "%s: a buffer is NULL", phx_op_name(op));
  }
  delay_call call = {.comm = c, .src = src, .dst = dst, .bytes = numel * element, .op = op,
                     .payload = op == PHX_OP_BARRIER ? 0 : payload(op, numel, dtype, 0, 1, 0)};
  if (!s) return run(&call, err);
  delay_call *record = &c->ring[c->issued % RING];
  while (__atomic_load_n(&record->pending, __ATOMIC_ACQUIRE)) nanosleep(&(struct timespec){0, 50000}, NULL);
  *record = call;
  record->pending = 1;
  phx_status status = c->device->enqueue(c->device->ctx, s, run, record, err);
  if (status == PHX_OK)
    c->issued++;
  else
    record->pending = 0;
  return status;
}

static phx_status all_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                             phx_stream *s, phx_error *err) {
  (void)op;
  return issue(ctx, PHX_OP_ALL_REDUCE, src, dst, numel, dtype, 0, s, err);
}
static phx_status reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op, int32_t root,
                         phx_stream *s, phx_error *err) {
  (void)op;
  return issue(ctx, PHX_OP_REDUCE, src, dst, numel, dtype, root, s, err);
}
static phx_status reduce_scatter(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                                 phx_stream *s, phx_error *err) {
  (void)op;
  return issue(ctx, PHX_OP_REDUCE_SCATTER, src, dst, numel, dtype, 0, s, err);
}
static phx_status all_gather(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, phx_stream *s,
                             phx_error *err) {
  return issue(ctx, PHX_OP_ALL_GATHER, src, dst, numel, dtype, 0, s, err);
}
static phx_status broadcast(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                            phx_error *err) {
  return issue(ctx, PHX_OP_BROADCAST, buf, buf, numel, dtype, root, s, err);
}
static phx_status no_peer(const char *what, int32_t peer, phx_error *err) {
  return fail(err, PHX_INVALID, "%s: there is no rank %d in a world of one", what, peer);
}
static phx_status send_to(void *ctx, const void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                          phx_error *err) {
  (void)ctx, (void)buf, (void)numel, (void)dtype, (void)s;
  return no_peer("send", peer, err);
}
static phx_status recv_from(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t peer, phx_stream *s,
                            phx_error *err) {
  (void)ctx, (void)buf, (void)numel, (void)dtype, (void)s;
  return no_peer("recv", peer, err);
}
static phx_status all_to_all(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, phx_stream *s,
                             phx_error *err) {
  return issue(ctx, PHX_OP_ALL_TO_ALL, src, dst, numel, dtype, 0, s, err);
}
static phx_status barrier(void *ctx, phx_stream *s, phx_error *err) {
  return issue(ctx, PHX_OP_BARRIER, NULL, NULL, 0, PHX_U8, 0, s, err);
}

static delay_comm *new_comm(const phx_host *host, const delay_config *config, delay_comm *world);
static phx_status split(void *ctx, int32_t color, int32_t key, phx_comm **out, phx_error *err) {
  delay_comm *c = ctx, *child = NULL;
  (void)key;
  if (color >= 0) {
    child = new_comm(c->host, &c->config, c->world);
    if (!child) return fail(err, PHX_NOMEM, "delay: no memory for a communicator");
  }
  __atomic_fetch_add(&c->world->calls[PHX_OP_SPLIT], 1, __ATOMIC_RELAXED);
  *out = child ? &child->table : NULL;
  return PHX_OK;
}
static void wait_all(delay_comm *c) {
  for (int32_t i = 0; i < RING; i++) {
    while (__atomic_load_n(&c->ring[i].pending, __ATOMIC_ACQUIRE)) nanosleep(&(struct timespec){0, 50000}, NULL);
  }
}
static void destroy_split(phx_comm *comm) {
  delay_comm *c = (delay_comm *)(void *)comm;
  if (!c || c == c->world) return;
  wait_all(c);
  free(c);
}
static void annotate(void *ctx, int32_t unit) { (void)ctx, (void)unit; /* there is no flight record of one rank */ }
static void stats(void *ctx, phx_comm_stats *out) {
  const delay_comm *c = ctx;
  out->struct_size = sizeof *out;
  for (int32_t i = 0; i < PHX_OPS; i++) {
    out->calls[i] = __atomic_load_n(&c->calls[i], __ATOMIC_RELAXED);
    out->bytes[i] = __atomic_load_n(&c->bytes[i], __ATOMIC_RELAXED);
  }
  out->wait_ns = 0; /* no peers */
}
static phx_status health(void *ctx, phx_error *err) {
  return is_aborted(ctx) ? fail(err, PHX_COMM, "delay: aborted") : PHX_OK;
}
static void abort_calls(void *ctx) { __atomic_store_n(&((delay_comm *)ctx)->aborted, 1, __ATOMIC_RELEASE); }

static delay_comm *new_comm(const phx_host *host, const delay_config *config, delay_comm *world) {
  delay_comm *c = calloc(1, sizeof *c);
  if (!c) return NULL;
  c->table = (phx_comm){.struct_size = sizeof(phx_comm), .ctx = c, .rank = 0, .size = 1, .all_reduce = all_reduce,
                        .reduce = reduce, .reduce_scatter = reduce_scatter, .all_gather = all_gather,
                        .broadcast = broadcast, .send = send_to, .recv = recv_from, .all_to_all = all_to_all,
                        .barrier = barrier, .split = split, .destroy = destroy_split, .annotate = annotate,
                        .stats = stats, .health = health, .abort = abort_calls};
  c->host = host;
  c->device = host->extension(host->ctx, PHX_EXT_DEVICE);
  c->config = *config;
  c->world = world ? world : c;
  return c;
}

/* ---- the provider's table ---- */

static phx_status probe(phx_error *err) {
  (void)err;
  return PHX_OK;
}
static int64_t buffer_bytes(const void *config, int32_t size) {
  (void)config, (void)size;
  return 0;
}
static phx_status create(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out,
                         phx_error *err) {
  if (host->world_size != 1)
    return fail(err, PHX_UNSUPPORTED, "delay pretends a world of two and runs at size 1, not %d", host->world_size);
  delay_comm *c = new_comm(host, config, NULL);
  if (!c) return fail(err, PHX_NOMEM, "delay: no memory for a communicator");
  if (!c->device) {
    free(c);
    return fail(err, PHX_STATE, "delay needs the host extension %s", PHX_EXT_DEVICE);
  }
  c->arena = aligned_alloc(4096, (size_t)((arena_bytes + 4095) / 4096 * 4096 + 4096));
  if (!c->arena) {
    free(c);
    return fail(err, PHX_NOMEM, "delay: no memory for an arena of %lld bytes", (long long)arena_bytes);
  }
  memset(c->arena, 0, (size_t)arena_bytes);
  *out = &c->table;
  return PHX_OK;
}
static void destroy(phx_comm *world) {
  delay_comm *c = (delay_comm *)(void *)world;
  if (!c) return;
  wait_all(c);
  free(c->arena);
  free(c);
}
static void *arena(phx_comm *world) { return ((delay_comm *)(void *)world)->arena; }

static const phx_comm_table table = {.struct_size = sizeof(phx_comm_table), .probe = probe, .payload = payload,
                                     .buffer_bytes = buffer_bytes, .create = create, .destroy = destroy,
                                     .arena = arena};
static const phx_option options[] = {
    PHX_REAL(delay_config, bandwidth, "1e9", 1, 1e15, "Bytes per second of the pretended wire."),
    PHX_REAL(delay_config, latency, "0", 0, 60, "Seconds that every call takes besides."),
};
static const char *const extensions[] = {PHX_EXT_DEVICE, NULL};
static const phx_plugin plugin = {
    .struct_size = sizeof(phx_plugin), .kind = PHX_KIND_COMM, .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR, .id = "delay", .version = "1.0", .vendor = "Phalanx tests", .license = "unspecified",
    .summary = "Test only: a world of one whose collectives take the time of a wire.", .build = __VERSION__,
    .provides = PHX_CAP_DETERMINISTIC, .needs = PHX_NEED_HOST_MEMORY, .extensions = extensions, .options = options,
    .n_options = sizeof options / sizeof *options, .option_stride = sizeof(phx_option),
    .config_size = sizeof(delay_config), .table = &table,
};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
