/* core/engine/cpus.h - how many CPUs this process may use, and how many threads each rank gets of them.
 *
 * A plugin's libraries may change the affinity mask of the process that loads them (OpenMP does, under OMP_PROC_BIND
 * or GOMP_CPU_AFFINITY), so the mask is remembered before any is loaded.  [main] */
#ifndef PHX__CPUS_H
#define PHX__CPUS_H
#include <phalanx/job.h>
#include <sched.h>
#include <stdint.h>

#include "config/config.h"

/* The CPUs of this process in the order in which ranks get them: whole cores first, their second threads after. */
typedef struct phx__cpus {
  int count;
  int ids[CPU_SETSIZE];
} phx__cpus;

void phx__cpus_remember(void);        /* the mask as it is now is what the others below speak of */
void phx__cpus_mask(cpu_set_t *out);  /* the one remembered, else as it is now; empty when it is not known */
void phx__cpus_read(phx__cpus *out);
int32_t phx__cpus_count(void);        /* of the mask, >= 1 */
/* How many of the CPUs are busy all the time under the cgroup's quota, rounded up; never more than phx__cpus_count. */
int32_t phx__cpus_worth(void);

/* Threads per rank: device.threads, or what this machine has, shared out among its ranks. */
int32_t phx__threads(const phx__config *config, int32_t local_ranks);
/* [collective] The same for this rank, once the job is open: CPUs that only this rank may use are all its own. */
phx_status phx__threads_of_rank(const phx__config *config, const phx_job *job, int32_t *out, phx_error *err);
/* What rank `me` of n gets, when each rank may run on masks[rank]: its CPUs, each divided by how many ranks have it. */
int32_t phx__cpus_share(const cpu_set_t *masks, int32_t n, int32_t me);
/* On a device that computes on CPUs: says where ranks * threads are more than the CPUs, or a quota is what decides. */
void phx__cpus_say(const phx__config *config, int32_t local_ranks);
#endif
