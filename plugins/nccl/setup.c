/* setup.c - a world from nothing, and back.
 *
 * All ranks meet once through the job: each brings its host, its GPU's PCI address and NCCL's version, rank 0 also
 * the unique id.  Then NCCL joins them (non-blocking, with the job's deadline), and the memory is taken: arena
 * (ncclMemAlloc, registered), staging on the device and pinned.  Everything is given back in the reverse order.
 *
 * NCCL joins one rank per GPU.  Since 2.30.3 it takes several when NCCL_MULTI_RANK_GPU_ENABLE=1 is set, which is
 * for tests of correctness and of failures, not for speed; other cases are refused here, with both ranks' names.
 * [main]. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm_nccl.h"

#define SHARED_GPU_VERSION NCCL_VERSION(2, 30, 3)

typedef struct card { /* what a rank brings to the meeting */
  char host[40], bus[24];
  int32_t version, failed; /* failed: an NCCL status of this rank, 0 */
  ncclUniqueId id;         /* rank 0's */
} card;

phx_status nccl_cuda_fail(phx_error *err, cudaError_t code, const char *what) {
  (void)cudaGetLastError(); /* it would stay for the next call */
  const phx_status status = code == cudaErrorMemoryAllocation ? PHX_NOMEM : PHX_DEVICE;
  phx_fail(err, status, "nccl: %.60s: %s", what, cudaGetErrorString(code));
  if (err) err->cause = (int32_t)code;
  return status;
}
static phx_status nccl_fail(phx_error *err, ncclResult_t code, const char *what) {
  const char *more = ncclGetLastError(NULL);
  phx_fail(err, PHX_COMM, "nccl: %s: %s%s%.200s", what, ncclGetErrorString(code), more && *more ? ": " : "",
           more ? more : "");
  if (err) err->cause = (int32_t)code;
  return PHX_COMM;
}

ncclConfig_t nccl_library_config(void) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return config;
}

/* ---- a communicator's record ---- */

phx_status nccl_comm_new(nccl_world *w, int32_t slot, nccl_comm **out, phx_error *err) {
  nccl_comm *c = calloc(1, sizeof *c);
  if (!c) return phx_fail(err, PHX_NOMEM, "nccl: no memory for a communicator's %zu bytes", sizeof *c);
  c->world = w;
  c->slot = slot;
  c->unit = -1;
  c->n = 1;
  w->slots |= 1u << slot;
  pthread_mutex_lock(&w->lock);
  c->next = w->comms;
  w->comms = c;
  pthread_mutex_unlock(&w->lock);
  const unsigned flags = w->timed ? cudaEventDefault : cudaEventDisableTiming;
  cudaError_t code = cudaSuccess;
  for (int k = 0; k < NCCL_PENDING && code == cudaSuccess; k++) {
    code = cudaEventCreateWithFlags(&c->pending[k].begin, flags);
    if (code == cudaSuccess) code = cudaEventCreateWithFlags(&c->pending[k].end, flags);
  }
  if (code != cudaSuccess) {
    nccl_comm_free(c);
    return nccl_cuda_fail(err, code, "cudaEventCreateWithFlags");
  }
  *out = c;
  return PHX_OK;
}

phx_status nccl_comm_register(nccl_comm *c, phx_error *err) {
  nccl_world *w = c->world;
  ncclResult_t r = ncclSuccess;
  if (!w->config.registered || c->n == 1) return PHX_OK;
  pthread_mutex_lock(&w->calls);
  if (c->nccl) r = ncclCommRegister(c->nccl, w->arena, (size_t)w->arena_bytes, &c->handle);
  pthread_mutex_unlock(&w->calls);
  if (r == ncclSuccess || r == ncclInProgress) return nccl_settle(c, NULL, r, err);
  nccl_fail(err, r, "the arena cannot be registered; [nccl] registered = no goes without");
  return PHX_COMM;
}

/* NCCL's part, in order: what is on its way ends, the arena is given back, then the communicator; or an abort. */
static void leave_nccl(nccl_comm *c) {
  nccl_world *w = c->world;
  phx_error err = {.struct_size = sizeof err};
  int32_t failed = nccl_check_alive(c, &err) != PHX_OK || nccl_drain(c, c->head, &err) != PHX_OK;
  pthread_mutex_lock(&w->calls);
  ncclResult_t r = ncclSuccess;
  if (!failed && c->nccl && c->handle) (void)ncclCommDeregister(c->nccl, c->handle);
  if (!failed && c->nccl) r = ncclCommFinalize(c->nccl);
  pthread_mutex_unlock(&w->calls);
  if (!failed && c->nccl) failed = nccl_settle(c, NULL, r, &err) != PHX_OK;
  pthread_mutex_lock(&w->calls);
  if (c->nccl) (void)(failed ? ncclCommAbort(c->nccl) : ncclCommDestroy(c->nccl));
  c->nccl = NULL;
  pthread_mutex_unlock(&w->calls);
}

void nccl_comm_free(nccl_comm *c) {
  if (!c) return;
  nccl_world *w = c->world;
  leave_nccl(c);
  pthread_mutex_lock(&w->lock);
  nccl_comm **at = &w->comms;
  while (*at != c) at = &(*at)->next;
  *at = c->next;
  while (w->looking) pthread_cond_wait(&w->changed, &w->lock); /* the watchdog may have it in its list */
  pthread_mutex_unlock(&w->lock);
  for (int k = 0; k < NCCL_PENDING; k++) {
    if (c->pending[k].begin) (void)cudaEventDestroy(c->pending[k].begin);
    if (c->pending[k].end) (void)cudaEventDestroy(c->pending[k].end);
  }
  w->slots &= ~(1u << c->slot);
  if (w->all == c) w->all = NULL;
  free(c);
}

/* ---- the meeting ---- */

static phx_status check_host(const nccl_world *w, phx_error *err) {
  const phx_job *job = w->job;
  if (!job || !w->device)
    return phx_fail(err, PHX_STATE, "nccl needs the host extensions %s and %s", PHX_EXT_JOB, PHX_EXT_DEVICE);
  if (job->size < 1 || job->size > PHX_RANKS_MAX)
    return phx_fail(err, PHX_UNSUPPORTED, "nccl joins 1 to %d ranks, not %d", PHX_RANKS_MAX, job->size);
  if (!PHX_HAS(job, phx_job, exchange) || !job->exchange)
    return phx_fail(err, PHX_UNSUPPORTED, "nccl needs a core whose job can exchange bytes (phx_job.exchange)");
  if (!w->device->native_stream || !w->device->native_stream(w->device->ctx, NULL))
    return phx_fail(err, PHX_UNSUPPORTED, "nccl needs a device with CUDA streams, and %s has none: choose [device] "
                    "plugin = cuda, or another [comm] plugin", w->device->name);
  return PHX_OK;
}

static phx_status fill_card(nccl_world *w, card *mine, phx_error *err) {
  memset(mine, 0, sizeof *mine);
  FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re"); /* one per running kernel: containers share GPUs, too */
  if (!f || !fgets(mine->host, sizeof mine->host, f)) gethostname(mine->host, sizeof mine->host - 1);
  if (f) fclose(f);
  NCCL_CUDA(err, cudaGetDevice(&w->cuda_device));
  NCCL_CUDA(err, cudaDeviceGetPCIBusId(mine->bus, (int)sizeof mine->bus, w->cuda_device));
  ncclResult_t r = ncclGetVersion(&mine->version);
  w->version = mine->version;
  if (r == ncclSuccess && w->job->rank == 0) r = ncclGetUniqueId(&mine->id);
  mine->failed = (int32_t)r; /* told to all: nobody waits for a rank that has given up */
  return PHX_OK;
}

static void version_text(int32_t version, char *text, size_t size) {
  snprintf(text, size, "%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
}

static phx_status check_cards(const nccl_world *w, const card *all, phx_error *err) {
  const char *set = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  char ours[24], theirs[24];
  version_text(w->version, ours, sizeof ours);
  for (int32_t r = 0; r < w->job->size; r++) {
    version_text(all[r].version, theirs, sizeof theirs);
    if (all[r].failed)
      return phx_fail(err, PHX_COMM, "rank %d: NCCL does not start: %s", r,
                      ncclGetErrorString((ncclResult_t)all[r].failed));
    if (all[r].version != w->version)
      return phx_fail(err, PHX_UNSUPPORTED, "rank %d has NCCL %s, rank %d has %s: all ranks need the same", r,
                      theirs, w->job->rank, ours);
    for (int32_t q = 0; q < r; q++) {
      if (strcmp(all[q].host, all[r].host) != 0 || strcmp(all[q].bus, all[r].bus) != 0) continue;
      if (w->version >= SHARED_GPU_VERSION && set && strcmp(set, "1") == 0) continue;
      return phx_fail(err, PHX_UNSUPPORTED,
                      "ranks %d and %d are both on GPU %s: NCCL %s joins one rank per GPU (2.30.3 "
                      "and newer join more for tests, with NCCL_MULTI_RANK_GPU_ENABLE=1); use fewer ranks, or "
                      "[comm] plugin = shm",
                      q, r, all[r].bus, ours);
    }
  }
  return PHX_OK;
}

static phx_status meet(nccl_world *w, ncclUniqueId *id, phx_error *err) {
  card mine, *all = calloc((size_t)w->job->size, sizeof *all);
  if (!all) return phx_fail(err, PHX_NOMEM, "nccl: no memory for %d ranks' cards", w->job->size);
  phx_status status = fill_card(w, &mine, err);
  if (status == PHX_OK) status = w->job->exchange(w->job->ctx, "nccl", &mine, (int64_t)sizeof mine, all, err);
  if (status == PHX_OK) status = check_cards(w, all, err);
  if (status == PHX_OK) *id = all[0].id;
  free(all);
  return status;
}

/* ---- the world ---- */

static phx_status take_lanes(nccl_world *w, phx_error *err) {
  void *bases[PHX_RANKS_MAX];
  if (w->job->local_size != w->job->size) return PHX_OK;
  PHX_TRY(w->job->share(w->job->ctx, "nccl", w->config.communicators * (int64_t)sizeof(nccl_lane), bases, err));
  for (int32_t r = 0; r < w->job->size; r++) w->lanes[r] = bases[r];
  w->lanes[w->job->rank][0].comm = 1; /* the world's */
  return PHX_OK;
}

static phx_status take_memory(nccl_world *w, int64_t arena_bytes, phx_error *err) {
  const size_t staging = (size_t)(w->config.communicators * w->config.staging);
  w->arena_bytes = arena_bytes > 0 ? phx_align_bytes(arena_bytes) : PHX_ALIGN;
  const ncclResult_t r = ncclMemAlloc(&w->arena, (size_t)w->arena_bytes);
  if (r != ncclSuccess) {
    w->arena = NULL;
    nccl_fail(err, r, "ncclMemAlloc of the arena");
    err->code = PHX_NOMEM;
    return PHX_NOMEM;
  }
  NCCL_CUDA(err, cudaMemset(w->arena, 0, (size_t)w->arena_bytes));
  NCCL_CUDA(err, cudaMalloc(&w->staging, staging));
  NCCL_CUDA(err, cudaMallocHost(&w->pinned, staging));
  NCCL_CUDA(err, cudaMemset(w->staging, 0, staging)); /* the barrier's word is added up, whatever it holds */
  NCCL_CUDA(err, cudaDeviceSynchronize()); /* nobody else's stream waits for a memset's */
  return PHX_OK;
}

static phx_status join(nccl_world *w, const ncclUniqueId *id, phx_error *err) {
  ncclConfig_t config = nccl_library_config();
  PHX_TRY(nccl_comm_new(w, 0, &w->all, err));
  nccl_comm *c = w->all;
  c->id = 1;
  c->n = w->job->size;
  c->me = w->job->rank;
  for (int32_t r = 0; r < c->n; r++) c->ranks[r] = r;
  nccl_comm_table(c);
  pthread_mutex_lock(&w->calls);
  const ncclResult_t r = ncclCommInitRankConfig(&c->nccl, c->n, *id, c->me, &config);
  pthread_mutex_unlock(&w->calls);
  return nccl_settle(c, NULL, r, err);
}

static void announce(const nccl_world *w) {
  char text[400], version[24];
  version_text(w->version, version, sizeof version);
  snprintf(text, sizeof text, "NCCL %s, arena of %lld MiB%s; %s", version, (long long)(w->arena_bytes >> 20),
           w->config.registered && w->job->size > 1 ? ", registered" : "",
           w->deterministic
               ? "deterministic: sums of floats are exchanged and added in one order; per all_reduce of S "
                 "bytes on n ranks 2 S (n - 1) / n received, as by a ring, and about 3 S (n - 1) / n of device "
                 "memory traffic and n launches a chunk more"
               : "reductions in NCCL's own order: bits may differ from other communicators', and bf16 is "
                 "rounded at every addition");
  w->host->log(w->host->ctx, PHX_LOG_INFO, text);
}

/* In the words of the device's own profile. */
static void say_times(const nccl_world *w) {
  for (int32_t op = 0; op < PHX_OPS; op++) {
    char text[128];
    if (!w->ended[op]) continue;
    snprintf(text, sizeof text, "profile: comm_%s: %.3f ms in %lld calls", phx_op_name(op), w->ms[op],
             (long long)w->ended[op]);
    w->host->log(w->host->ctx, PHX_LOG_INFO, text);
  }
}

phx_status nccl_world_open(nccl_world *w, int64_t arena_bytes, phx_error *err) {
  phx_error own = {.struct_size = sizeof own};
  ncclUniqueId id;
  if (!err) err = &own;
  pthread_mutex_init(&w->calls, NULL);
  pthread_mutex_init(&w->lock, NULL);
  pthread_cond_init(&w->changed, NULL);
  PHX_TRY(check_host(w, err));
  PHX_TRY(meet(w, &id, err));
  PHX_TRY(take_lanes(w, err));
  PHX_TRY(take_memory(w, arena_bytes, err));
  PHX_TRY(join(w, &id, err));
  PHX_TRY(nccl_comm_register(w->all, err));
  PHX_TRY(nccl_watch(w, err));
  if (w->job->rank == 0) announce(w);
  return PHX_OK;
}

void nccl_world_close(nccl_world *w) {
  while (w->comms) nccl_comm_free(w->comms); /* the world's is the oldest, and last */
  nccl_watch_end(w);
  say_times(w);
  if (w->pinned) (void)cudaFreeHost(w->pinned);
  if (w->staging) (void)cudaFree(w->staging);
  if (w->arena) (void)ncclMemFree(w->arena);
  pthread_cond_destroy(&w->changed);
  pthread_mutex_destroy(&w->lock);
  pthread_mutex_destroy(&w->calls);
  free(w);
}
