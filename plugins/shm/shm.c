/* shm.c - the communicator plugin "shm": ranks are processes of one machine, and reach each other's memory in place.
 *
 * create() asks the job for one shared region per rank: control words and staging of a pool of communicators, then the
 * arena, from which the core serves host->alloc(comm).  A buffer in an arena is read and written by peers where it is;
 * other memory passes through the staging.  Where the CPU cannot reach the device's memory there is no arena, and the
 * device copies to and from the staging (device.c).  Nothing is shared, allocated or mapped after create(), split()
 * included (a communicator's own record comes from calloc).
 *
 * The files in reading order: shm.h (the data), collective.c (how bytes move), reduce.c (kernels), wait.c and report.c
 * (waiting, and what is said when it is in vain), p2p.c, split.c, issue.c (the table, streams, stats).
 *
 * Does not: work across machines.  Invariant: create() and destroy() leave nothing behind; the job owns the mapping.
 * Threads: [main]. */
#include "shm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static int64_t round_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }
static int64_t staging_bytes(const shm_config *config) { return round_up(config->staging, PAGE); }
/* lane | two halves of staging for collectives | two quarters for send */
static int64_t group_bytes(const shm_config *config) {
  return round_up((int64_t)sizeof(shm_lane), PAGE) + round_up(staging_bytes(config) / 2 * 3, PAGE);
}

/* ---- communicators ---- */

shm_comm *shm_comm_new(shm_world *w, int32_t group, uint64_t id, int32_t n, const int32_t *ranks) {
  shm_comm *c = calloc(1, sizeof *c);
  shm_group *g = &w->groups[group];
  if (!c) return NULL;
  c->world = w;
  c->id = id;
  c->group = group;
  c->n = n;
  c->unit = -1;
  for (int32_t i = 0; i < n; i++) {
    char *at = w->base[ranks[i]] + group * w->group_bytes;
    c->ranks[i] = g->ranks[i] = ranks[i];
    c->lane[i] = (shm_lane *)(void *)at;
    c->staging[i] = at + round_up((int64_t)sizeof(shm_lane), PAGE);
    c->arena[i] = w->base[ranks[i]] + w->arena_at;
    if (ranks[i] == w->job->rank) c->me = i;
  }
  g->used = 1;
  g->n = n;
  g->id = id;
  c->next = w->comms;
  w->comms = c;
  shm_comm_table(c);
  return c;
}

void shm_comm_free(shm_comm *c) {
  if (!c) return;
  shm_world *w = c->world;
  shm_comm **at = &w->comms;
  shm_drain(c, c->issued);
  __atomic_store_n(&c->lane[c->me]->left, c->id, __ATOMIC_RELEASE);
  w->groups[c->group].used = 0;
  while (*at != c) at = &(*at)->next;
  *at = c->next;
  free(c);
}

/* ---- pages ---- */

/* Bytes of the largest pages that map the address: from /proc/self/smaps; 0: unknown. */
static int64_t page_bytes_at(const void *p) {
  FILE *f = fopen("/proc/self/smaps", "re");
  char line[512];
  int64_t found = 0, kib = 0;
  int inside = 0;
  if (!f) return 0;
  while (fgets(line, sizeof line, f)) {
    unsigned long begin = 0, end = 0;
    if (sscanf(line, "%lx-%lx ", &begin, &end) == 2) {
      if (inside) break;
      inside = (uintptr_t)p >= begin && (uintptr_t)p < end;
    } else if (inside && sscanf(line, "KernelPageSize: %ld kB", &kib) == 1) {
      found = kib * 1024;
    } else if (inside && (sscanf(line, "ShmemPmdMapped: %ld kB", &kib) == 1 ||
                          sscanf(line, "FilePmdMapped: %ld kB", &kib) == 1 ||
                          sscanf(line, "AnonHugePages: %ld kB", &kib) == 1) && kib > 0) {
      found = 2 << 20;
    }
  }
  fclose(f);
  return found;
}

/* Advice on a shared mapping may return success and do nothing: say what was obtained. */
static void advise(const shm_world *w, char *arena) {
  char text[160];
  int64_t bytes = w->arena_bytes / PAGE * PAGE;
  if (bytes == 0) return;
  if (w->config.huge_pages) {
    (void)madvise(arena, (size_t)bytes, MADV_HUGEPAGE);
    (void)madvise(arena, (size_t)bytes, MADV_COLLAPSE);
  }
  snprintf(text, sizeof text, "arena of %lld MiB, pages of %lld KiB, %s kernels", (long long)(w->arena_bytes >> 20),
           (long long)(page_bytes_at(arena + bytes / 2) >> 10), w->kernels->isa);
  w->host->log(w->host->ctx, PHX_LOG_INFO, text);
}

/* ---- the provider's table ---- */

static phx_status probe(phx_error *err) {
  (void)err;
  return PHX_OK; /* shared memory and futexes are everywhere Linux is */
}

int64_t shm_payload(int32_t op, int64_t numel, int32_t dtype, int32_t rank, int32_t size, int32_t root) {
  int64_t element = (int64_t)phx_dtype_bytes(dtype), bytes = numel * element, others = size - 1, lo = 0, hi = 0;
  if (op == PHX_OP_RECV) return bytes; /* the receiver reads */
  if (size <= 1 || bytes <= 0) return 0;
  int small = shm_put_bytes(op, numel, element, size) <= SHM_SMALL;
  shm_cut(numel, element, size, rank, &lo, &hi);
  switch (op) {
    case PHX_OP_ALL_REDUCE: return small ? others * bytes : 2 * others * (hi - lo) * element;
    case PHX_OP_REDUCE:
      if (small) return rank == root ? others * bytes : 0;
      return (others + (rank != root)) * (hi - lo) * element;
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
  return shm_payload(op, numel, dtype, rank, size, root);
}

static int64_t buffer_bytes(const void *config, int32_t size) {
  const shm_config *k = config;
  (void)size; /* every rank has its own part of each communicator, whatever their number */
  return k->communicators * group_bytes(k);
}

static phx_status check_host(const phx_host *host, const phx_job *job, const phx_device *device, phx_error *err) {
  (void)host;
  if (!job || !device)
    return phx_fail(err, PHX_STATE, "shm needs the host extensions %s and %s", PHX_EXT_JOB, PHX_EXT_DEVICE);
  if (job->size < 1 || job->size > PHX_RANKS_MAX)
    return phx_fail(err, PHX_UNSUPPORTED, "shm joins 1 to %d ranks, not %d", PHX_RANKS_MAX, job->size);
  if (job->local_size != job->size)
    return phx_fail(err, PHX_UNSUPPORTED, "shm joins ranks of one machine; %d of %d are on this one: choose "
                    "another [comm] plugin", job->local_size, job->size);
  if (!(device->caps & PHX_DEVICE_HOST_MEMORY) &&
      (!PHX_HAS(device, phx_device, unpin) || !device->space || !device->pin || !device->unpin))
    return phx_fail(err, PHX_UNSUPPORTED,
                    "shm cannot stage for device %s, which does not tell its memory from the host's "
                    "or cannot pin: choose another [comm] plugin",
                    device->name);
  return PHX_OK;
}

static phx_status create(const phx_host *host, const void *config, int64_t arena_bytes, phx_comm **out,
                         phx_error *err) {
  const phx_job *job = host->extension(host->ctx, PHX_EXT_JOB);
  const phx_device *device = host->extension(host->ctx, PHX_EXT_DEVICE);
  phx_status status = check_host(host, job, device, err);
  if (status != PHX_OK) return status;
  if (arena_bytes < 0) return phx_fail(err, PHX_INVALID, "shm: an arena of %lld bytes", (long long)arena_bytes);
  shm_world *w = calloc(1, sizeof *w);
  if (!w) return phx_fail(err, PHX_NOMEM, "shm: no memory for %zu bytes", sizeof *w);
  w->host = host;
  w->job = job;
  w->device = device;
  w->kernels = shm_kernels_pick();
  w->config = *(const shm_config *)config;
  w->group_bytes = group_bytes(&w->config);
  w->config.staging = staging_bytes(&w->config);
  w->arena_at = w->config.communicators * w->group_bytes;
  w->far = !(device->caps & PHX_DEVICE_HOST_MEMORY);
  w->arena_bytes = w->far ? 0 : round_up(arena_bytes, PAGE); /* the device's memory is no peer's: it is staged */
  w->next_id = 2;
  void *bases[PHX_RANKS_MAX];
  PHX_TRY_GOTO(job->share(job->ctx, "shm", w->arena_at + w->arena_bytes, bases, err), status, fail);
  int32_t ranks[PHX_RANKS_MAX];
  for (int32_t r = 0; r < job->size; r++) {
    w->base[r] = bases[r];
    ranks[r] = r;
  }
  PHX_TRY_GOTO(shm_device_open(w, err), status, fail);
  w->all = shm_comm_new(w, 0, 1, job->size, ranks);
  if (!w->all) {
    status = phx_fail(err, PHX_NOMEM, "shm: no memory for %zu bytes", sizeof(shm_comm));
    goto fail;
  }
  advise(w, w->base[job->rank] + w->arena_at);
  *out = &w->all->table;
  return PHX_OK;
fail:
  shm_device_close(w);
  free(w);
  return status;
}

static void destroy(phx_comm *world) {
  if (!world) return;
  shm_world *w = ((shm_comm *)(void *)world)->world;
  while (w->comms) shm_comm_free(w->comms);
  shm_device_close(w);
  free(w);
}

static void *arena(phx_comm *world) {
  const shm_comm *c = (shm_comm *)(void *)world;
  return c->world->far ? NULL : c->arena[c->me];
}

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
    PHX_BYTES(shm_config, staging, "1MiB", 64 << 10, 1 << 30, 0,
              "Staging per rank and communicator for buffers outside the arena; half as much again serves send."),
    PHX_INT(shm_config, spin, "20000", 0, 1000000000, "polls", PHX_OPTF_PER_RANK,
            "Polls before a waiting rank sleeps, where it has a core to wait on; at most 64 on a stream's thread."),
    PHX_INT(shm_config, communicators, "8", 1, SHM_GROUPS_MAX, NULL, 0,
            "Communicators that can live at once on a rank, the world included; split() takes the others."),
    PHX_BOOL(shm_config, huge_pages, "yes", "Ask for huge pages for the arena; the log says what was obtained."),
};
static const char *const extensions[] = {PHX_EXT_JOB, PHX_EXT_DEVICE, NULL};
static const phx_plugin plugin = {
    .struct_size = sizeof(phx_plugin),
    .kind = PHX_KIND_COMM,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "shm",
    .version = "1.0",
    .summary = "Collectives over shared memory, for ranks on one machine.",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .provides = PHX_CAP_DETERMINISTIC,
    .needs = PHX_NEED_ONE_MACHINE,
    .extensions = extensions,
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .option_stride = sizeof(phx_option),
    .config_size = sizeof(shm_config),
    .table = &table,
    .preference = 10,
};
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
