/* core/engine/cpus.c - see cpus.h. */
#include "engine/cpus.h"

#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/cgroup.h"
#include "base/status.h"
#include "base/sys.h"
#include "plugin/host.h"

static cpu_set_t remembered;
static bool is_remembered;

void phx__cpus_remember(void) {
  CPU_ZERO(&remembered);
  is_remembered = sched_getaffinity(0, sizeof remembered, &remembered) == 0;
}

void phx__cpus_mask(cpu_set_t *out) {
  if (is_remembered) {
    *out = remembered;
    return;
  }
  CPU_ZERO(out);
  if (sched_getaffinity(0, sizeof *out, out)) CPU_ZERO(out);
}

int32_t phx__cpus_count(void) {
  cpu_set_t mask;
  phx__cpus_mask(&mask);
  const int32_t count = CPU_COUNT(&mask);
  return count > 0 ? count : 1;
}

int32_t phx__cpus_worth(void) {
  phx__cgroup group;
  const int32_t count = phx__cpus_count();
  phx__cgroup_read("", &group);
  return group.cpus > 0 && group.cpus < count ? (int32_t)ceil(group.cpus) : count;
}

/* ---- in which order ---- */

/* The first of the CPUs that share a core with `cpu`; cpu itself where the kernel does not say. */
static int first_sibling(int cpu) {
  char path[96], text[64];
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
  int fd = phx__sys.open(path, O_RDONLY, 0), first = cpu;
  if (fd < 0) return cpu;
  ssize_t n = phx__sys.read(fd, text, sizeof text - 1);
  phx__sys.close(fd);
  if (n <= 0) return cpu;
  text[n] = 0;
  return sscanf(text, "%d", &first) == 1 ? first : cpu;
}

void phx__cpus_read(phx__cpus *out) {
  cpu_set_t mask, cores;
  out->count = 0;
  CPU_ZERO(&cores);
  phx__cpus_mask(&mask);
  for (int pass = 0; pass < 2; pass++)
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
      if (!CPU_ISSET(cpu, &mask)) continue;
      int core = first_sibling(cpu);
      if (core < 0 || core >= CPU_SETSIZE) core = cpu;
      if (pass == 0 && CPU_ISSET(core, &cores)) continue; /* a second thread: in the second pass */
      CPU_SET(core, &cores);
      CPU_CLR(cpu, &mask);
      out->ids[out->count++] = cpu;
    }
}

/* ---- threads ---- */
static int32_t at_least_one(int32_t n) { return n > 1 ? n : 1; }

int32_t phx__threads(const phx__config *config, int32_t local_ranks) {
  if (config->s.device.threads > 0) return (int32_t)config->s.device.threads;
  return at_least_one(phx__cpus_worth() / at_least_one(local_ranks));
}

int32_t phx__cpus_share(const cpu_set_t *masks, int32_t n, int32_t me) {
  double share = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    int32_t users = 0;
    if (!CPU_ISSET(cpu, &masks[me])) continue;
    for (int32_t r = 0; r < n; r++) users += CPU_ISSET(cpu, &masks[r]) != 0;
    share += 1.0 / users;
  }
  return at_least_one((int32_t)(share + 1e-6));
}

typedef struct place { /* where a rank may run */
  char machine[48];
  cpu_set_t mask;
} place;

static void find_place(place *out) {
  memset(out, 0, sizeof *out);
  phx__cpus_mask(&out->mask);
  const int fd = phx__sys.open("/proc/sys/kernel/random/boot_id", O_RDONLY, 0);
  if (fd < 0) return;
  if (phx__sys.read(fd, out->machine, sizeof out->machine - 1) < 0) out->machine[0] = 0;
  phx__sys.close(fd);
}

phx_status phx__threads_of_rank(const phx__config *config, const phx_job *job, int32_t *out, phx_error *err) {
  place mine, all[PHX_RANKS_MAX];
  cpu_set_t masks[PHX_RANKS_MAX];
  int32_t n = 0, me = 0;
  *out = phx__threads(config, job->local_size);
  if (config->s.device.threads > 0 || job->size == 1) return PHX_OK;
  find_place(&mine);
  PHX_TRY(job->exchange(job->ctx, "cpus", &mine, sizeof mine, all, err));
  for (int32_t r = 0; r < job->size; r++) {
    if (memcmp(all[r].machine, mine.machine, sizeof mine.machine) != 0) continue;
    if (r == job->rank) me = n;
    masks[n++] = all[r].mask;
  }
  const int32_t share = phx__cpus_share(masks, n, me), count = phx__cpus_count(), worth = phx__cpus_worth();
  *out = share;
  if (worth < count) { /* one quota for all ranks here, in whatever way their CPUs are shared */
    const int32_t part = at_least_one(worth / n);
    *out = part < share ? part : share;
  }
  return PHX_OK;
}

void phx__cpus_say(const phx__config *config, int32_t local_ranks) {
  const int32_t count = phx__cpus_count(), worth = phx__cpus_worth(), threads = phx__threads(config, local_ranks);
  char text[300];
  if (!(config->device.plugin->descriptor->provides & PHX_CAP_HOST_MEMORY)) return; /* it computes elsewhere */
  if (worth < count) {
    snprintf(text, sizeof text, "the cgroup's quota is worth %d of %d CPUs: %d thread%s for each of %d rank%s here",
             worth, count, threads, threads == 1 ? "" : "s", local_ranks, local_ranks == 1 ? "" : "s");
    phx__log(0, "core", PHX_LOG_INFO, text);
  }
  if ((int64_t)threads * local_ranks <= worth) return;
  snprintf(text, sizeof text,
           "%d rank%s of %d thread%s on %s%d CPU%s: they wait for each other, which is slow; lower run.ranks or "
           "device.threads",
           local_ranks, local_ranks == 1 ? "" : "s", threads, threads == 1 ? "" : "s", worth < count ? "the worth of " :
           "", worth, worth == 1 ? "" : "s");
  phx__log(0, "core", PHX_LOG_WARN, text);
}
