/* plugins/cpu/parallel.c - parallel loops of the operations, what OpenMP really gives, and error messages.
 *
 * The only file that speaks OpenMP.  OpenMP may give a loop fewer threads than it asks for: OMP_THREAD_LIMIT,
 * OMP_DYNAMIC, OMP_MAX_ACTIVE_LEVELS, or a plugin that changes the same settings by calls.  A loop here takes the team
 * as it is.  oneDNN does not: it cuts a product by omp_get_max_threads(), and what the missing threads should write
 * stays unwritten.  So the device sets what can be set, runs one parallel region at create, and takes the size of that
 * team as its threads (phx__cpu_team); before every product the settings are made again (phx__cpu_settle).
 *
 * Invariant: one contiguous range per thread, cut by arithmetic alone.  One thread starts no other.
 * [main] */
#include <omp.h>
#include <sched.h>
#include <stdio.h>
#include "cpu.h"

void phx__cpu_parallel(const phx__cpu *cpu, int64_t items, int64_t grain, phx__cpu_body *body, void *arg) {
  const int64_t grains = (items + grain - 1) / grain;
  const int threads = (int)(grains < cpu->threads ? grains : cpu->threads);
  if (items <= 0) return;
  if (threads <= 1) {
    body(arg, 0, items, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t first = grains * t / n * grain, last = grains * (t + 1) / n * grain;
    if (first < last) body(arg, first, last < items ? last : items, (int32_t)t);
  }
}

static void settle(int32_t threads) {
  if (omp_get_dynamic()) omp_set_dynamic(0);
  if (omp_get_max_active_levels() < 1) omp_set_max_active_levels(1);
  if (omp_get_max_threads() != threads) omp_set_num_threads(threads);
}

void phx__cpu_settle(const phx__cpu *cpu) {
  settle(cpu->threads);
}

int32_t phx__cpu_team(int32_t threads, int32_t *cpus, int32_t *available) {
  cpu_set_t all;
  int32_t team = 1;
  CPU_ZERO(&all);
  settle(threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    cpu_set_t mine;
    CPU_ZERO(&mine);
    const int known = sched_getaffinity(0, sizeof mine, &mine) == 0;
#pragma omp critical
    {
      team = omp_get_num_threads();
      if (known) CPU_OR(&all, &all, &mine);
    }
  }
  *available = omp_get_num_procs(); /* before OpenMP bound the first thread */
  *cpus = CPU_COUNT(&all) > 0 ? CPU_COUNT(&all) : *available;
  settle(team);
  return team;
}

void phx__cpu_parallel_end(const phx__cpu *cpu) {
  if (cpu->threads > 1) omp_pause_resource_all(omp_pause_hard);
}
