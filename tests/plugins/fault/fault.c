/* fault.c - shm with a fault in one rank: what a broken strategy, a broken memory or a dying process would do.
 *
 * In step `step` (and later, with lasting = yes), rank `rank`, at its first collective on fp32 data in the world that
 * `on` names:
 *   skip   the call is left out             count  it has one element less       op     it is a barrier
 *   nan    the first element that it sends is NaN
 *   flip   the first element that it receives is changed afterwards
 *   crash  a bad memory access              kill   SIGKILL                       exit   it leaves with status 9
 *   abort  an assertion                     bus    a mapped file that is cut     hang   it never comes, and lives
 *   leave  exit(0)                          vanish _exit(0)                      stop   SIGSTOP
 *   busy   it computes for `seconds` and then comes
 *   await  it waits until abort is called, and fails then
 * What ends or holds a process may also be `at` create or destroy; rank = -1 is all of them.
 * Its health, asked while it is held, is `health`: as shm's, sick (it says why), mute (it fails without a word), hang
 * or crash.  Calls of abort are logged.
 * With once = FILE nothing happens when the file is there, and it is made when something does: the next attempt of a
 * job runs through.  One world per process. */
#define phx_plugin_v1 shm_entry
#include "shm.c"
#undef phx_plugin_v1
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
  NONE, SKIP, COUNT, OP, NOT_A_NUMBER, FLIP, CRASH, KILL, EXIT, ABORT, BUS, HANG, LEAVE, VANISH, STOP, BUSY, AWAIT
};
enum { HEALTH_OK, HEALTH_SICK, HEALTH_MUTE, HEALTH_HANG, HEALTH_CRASH };
enum { AT_CALL, AT_CREATE, AT_DESTROY };
enum { ON_ANY, ON_REDUCTION, ON_GATHER };
typedef struct fault_config {
  shm_config shm; /* first: shm reads its part */
  int64_t rank, step, seconds;
  int32_t what, on, lasting, at, health;
  const char *once;
} fault_config;

static phx_comm inner; /* shm's own calls */
static const phx_device *fault_device;
static const phx_job *fault_job;
static const phx_host *fault_host;
static int32_t aborts;
static fault_config fault;
static int64_t done_in_step;

/* Whether the fault is in this call. */
static int is_here(int gather, int64_t numel, int32_t dtype) {
  const int64_t step = fault_job->mine->step;
  if (fault.what == NONE || fault.at || numel == 0 || dtype != PHX_F32) return 0;
  if (fault.rank >= 0 && fault_job->rank != fault.rank) return 0;
  if (fault.on && gather != (fault.on == ON_GATHER)) return 0;
  if (fault.lasting ? step < fault.step : step != fault.step || done_in_step == step) return 0;
  if (fault.once[0]) {
    const int fd = open(fault.once, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0) return 0;
    close(fd);
  }
  done_in_step = step;
  return 1;
}

__attribute__((noinline)) static void crash_here(void) {
  volatile int *nowhere = (volatile int *)(uintptr_t)(64 * fault_job->size); /* no address anybody has */
  *nowhere = 1;
}

__attribute__((noinline)) static void cut_a_mapped_file(void) {
  const int fd = memfd_create("cut", MFD_CLOEXEC);
  volatile char *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (fd < 0 || at == MAP_FAILED) _exit(9);
  *at = 1; /* behind the file's end, which is at 0 */
}

static phx_status flip(void *at, phx_error *err) {
  uint32_t word;
  (void)err;
  memcpy(&word, at, sizeof word);
  word ^= 1u << 20;
  memcpy(at, &word, sizeof word);
  return PHX_OK;
}

static double seconds_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void be_busy(void) {
  volatile unsigned turns = 0;
  for (const double end = seconds_now() + (double)fault.seconds; seconds_now() < end; turns++) continue;
}

static phx_status await_abort(phx_error *err) {
  while (!__atomic_load_n(&aborts, __ATOMIC_ACQUIRE)) nanosleep(&(struct timespec){0, 5000000}, NULL);
  if (err) snprintf(err->message, sizeof err->message, "fault: its wait has ended with an abort");
  return PHX_COMM;
}

/* Before the call; returns 1 when the call is not to be made. */
static int before(const void *src, phx_stream *s, phx_status *status, phx_error *err) {
  switch (fault.what) {
    case SKIP: *status = PHX_OK; return 1;
    case OP: *status = inner.barrier(inner.ctx, s, err); return 1;
    case NOT_A_NUMBER: *(float *)(uintptr_t)src = __builtin_nanf(""); return 0;
    case CRASH: crash_here(); return 0;
    case KILL: raise(SIGKILL); return 0;
    case EXIT: _exit(9);
    case ABORT: abort();
    case BUS: cut_a_mapped_file(); return 0;
    case HANG:
      for (;;) pause();
    case LEAVE: exit(0);
    case VANISH: _exit(0);
    case STOP: raise(SIGSTOP); return 0;
    case BUSY: be_busy(); return 0;
    case AWAIT: *status = await_abort(err); return 1;
    default: return 0;
  }
}
static phx_status after(phx_status status, int here, void *dst, phx_stream *s, phx_error *err) {
  if (status != PHX_OK || !here || fault.what != FLIP) return status;
  return s ? fault_device->enqueue(fault_device->ctx, s, flip, dst, err) : flip(dst, err);
}
#define LESS(numel) ((numel) - (here && fault.what == COUNT))

static phx_status fault_all_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                                   phx_stream *s, phx_error *err) {
  phx_status status = PHX_OK;
  const int here = is_here(0, numel, dtype);
  if (here && before(src, s, &status, err)) return status;
  return after(inner.all_reduce(ctx, src, dst, LESS(numel), dtype, op, s, err), here, dst, s, err);
}
static phx_status fault_reduce(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                               int32_t root, phx_stream *s, phx_error *err) {
  phx_status status = PHX_OK;
  const int here = is_here(0, numel, dtype);
  if (here && before(src, s, &status, err)) return status;
  return inner.reduce(ctx, src, dst, LESS(numel), dtype, op, root, s, err);
}
static phx_status fault_reduce_scatter(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, int32_t op,
                                       phx_stream *s, phx_error *err) {
  phx_status status = PHX_OK;
  const int here = is_here(0, numel, dtype);
  if (here && before(src, s, &status, err)) return status;
  return after(inner.reduce_scatter(ctx, src, dst, LESS(numel), dtype, op, s, err), here, dst, s, err);
}
static phx_status fault_all_gather(void *ctx, const void *src, void *dst, int64_t numel, int32_t dtype, phx_stream *s,
                                   phx_error *err) {
  phx_status status = PHX_OK;
  const int here = is_here(1, numel, dtype);
  if (here && before(src, s, &status, err)) return status;
  return after(inner.all_gather(ctx, src, dst, LESS(numel), dtype, s, err), here, dst, s, err);
}
static phx_status fault_broadcast(void *ctx, void *buf, int64_t numel, int32_t dtype, int32_t root, phx_stream *s,
                                  phx_error *err) {
  phx_status status = PHX_OK;
  const int here = (fault.what != FLIP || root != fault.rank) && is_here(1, numel, dtype);
  if (here && before(buf, s, &status, err)) return status;
  return after(inner.broadcast(ctx, buf, LESS(numel), dtype, root, s, err), here, buf, s, err);
}

static void at(int32_t where) {
  phx_status status = PHX_OK;
  if (fault.at == where && (fault.rank < 0 || fault.rank == fault_job->rank)) (void)before(NULL, NULL, &status, NULL);
}

static phx_status fault_health(void *ctx, phx_error *err) {
  if (fault.rank >= 0 && fault_job->rank != fault.rank) return inner.health(ctx, err);
  switch (fault.health) {
    case HEALTH_SICK: snprintf(err->message, sizeof err->message, "link 3 is down"); return PHX_COMM;
    case HEALTH_MUTE: return PHX_DEVICE;
    case HEALTH_HANG:
      for (;;) pause();
    case HEALTH_CRASH: crash_here(); return PHX_OK;
    default: return inner.health(ctx, err);
  }
}
static void fault_abort(void *ctx) {
  char text[64];
  snprintf(text, sizeof text, "abort, call %d", __atomic_add_fetch(&aborts, 1, __ATOMIC_ACQ_REL));
  fault_host->log(fault_host->ctx, PHX_LOG_WARN, text);
  inner.abort(ctx);
}

static void fault_destroy(phx_comm *world) {
  at(AT_DESTROY);
  destroy(world);
}

static phx_status fault_create(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out,
                               phx_error *err) {
  fault = *(const fault_config *)config;
  fault_host = host;
  fault_device = host->extension(host->ctx, PHX_EXT_DEVICE);
  fault_job = host->extension(host->ctx, PHX_EXT_JOB);
  at(AT_CREATE);
  PHX_TRY(create(host, config, arena_bytes, out, err));
  phx_comm *world = *out;
  inner = *world;
  world->all_reduce = fault_all_reduce;
  world->reduce = fault_reduce;
  world->reduce_scatter = fault_reduce_scatter;
  world->all_gather = fault_all_gather;
  world->broadcast = fault_broadcast;
  world->health = fault_health;
  world->abort = fault_abort;
  return PHX_OK;
}

PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) {
  static const char *const what[] = {"none", "skip", "count", "op", "nan", "flip", "crash", "kill", "exit",
                                     "abort", "bus", "hang", "leave", "vanish", "stop", "busy", "await",
                                     NULL};
  static const char *const health[] = {"ok", "sick", "mute", "hang", "crash", NULL};
  static const char *const places[] = {"call", "create", "destroy", NULL};
  static const char *const on[] = {"any", "reduction", "gather", NULL};
  static const phx_option own[] = {
      PHX_INT(fault_config, rank, "1", -1, PHX_RANKS_MAX, NULL, 0, "Who has it; -1: all."),
      PHX_INT(fault_config, seconds, "0", 0, 1000, NULL, 0, "How long it computes."),
      PHX_ENUM(fault_config, at, "call", places, "Where: in a collective, create or destroy."),
      PHX_INT(fault_config, step, "5", 0, 1000000, NULL, 0, "When."),
      PHX_ENUM(fault_config, what, "none", what, "What."),
      PHX_ENUM(fault_config, on, "any", on, "In which calls."),
      PHX_ENUM(fault_config, health, "ok", health, "What its health is."),
      PHX_BOOL(fault_config, lasting, "no", "In every such call from this step on."),
      PHX_STRING(fault_config, once, "", 0, "A file that says it has happened."),
  };
  enum { SHM_OPTIONS = sizeof options / sizeof *options, OWN_OPTIONS = sizeof own / sizeof *own };
  static phx_option all[SHM_OPTIONS + OWN_OPTIONS];
  static phx_comm_table faulty;
  static phx_plugin renamed;
  memcpy(all, options, sizeof options);
  memcpy(all + SHM_OPTIONS, own, sizeof own);
  faulty = table;
  faulty.create = fault_create;
  faulty.destroy = fault_destroy;
  renamed = *shm_entry();
  renamed.id = "fault";
  renamed.summary = "Test only: shm with a fault of choice in one rank.";
  renamed.options = all;
  renamed.n_options = SHM_OPTIONS + OWN_OPTIONS;
  renamed.config_size = sizeof(fault_config);
  renamed.table = &faulty;
  return &renamed;
}
