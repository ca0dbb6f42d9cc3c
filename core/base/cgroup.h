/* core/base/cgroup.h - the limits that a container, a batch system or systemd sets for this process: cgroup v1 and v2.
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
  int64_t oom_kills;     /* processes of the group that the kernel has killed for lack of memory; -1: not known */
} phx__cgroup;

/* root: "" for this process, or a directory that holds proc/self/cgroup, proc/self/mountinfo and what they name. */
void phx__cgroup_read(const char *root, phx__cgroup *out);
/* The group's oom_kills, or the whole machine's where the group has no such count; -1: not known.  Only the difference
 * of two means something. */
int64_t phx__oom_kills(const char *root);
#endif
