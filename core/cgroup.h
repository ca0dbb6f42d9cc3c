/* core/cgroup.h - the limits that a container, a batch system or systemd sets for this process: cgroup v1 and v2.
 *
 * Reads only.  A limit counts where it stands and in all that is below, so the least one on the way up is what holds.
 * What cannot be read is no limit.  [any] */
#ifndef PHX__CGROUP_H
#define PHX__CGROUP_H
#include <stdint.h>

typedef struct phx__cgroup {
  double cpus;           /* CPUs' worth of time; 0: no limit */
  int64_t memory;        /* bytes; 0: no limit */
  int64_t memory_free;   /* what is left of `memory`, with the cache that the kernel gives back; 0 without a limit */
} phx__cgroup;

/* root: "" for this process, or a directory that holds proc/self/cgroup, proc/self/mountinfo and what they name. */
void phx__cgroup_read(const char *root, phx__cgroup *out);
#endif
