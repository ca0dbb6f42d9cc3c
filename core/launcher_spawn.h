/* core/launcher_spawn.h - one rank's process; for launcher.c only. */
#ifndef PHX__LAUNCHER_SPAWN_H
#define PHX__LAUNCHER_SPAWN_H
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/types.h>

#include "job_segment.h"
#include "launcher.h"

/* The CPUs of this process in the order in which ranks get them: whole cores first, their second threads after. */
typedef struct phx__cpus {
  int count;
  int ids[CPU_SETSIZE];
} phx__cpus;
void phx__cpus_read(phx__cpus *out);

typedef struct phx__spawn {
  const phx__launch *launch;
  phx__segment *segment;
  int memfd;
  const phx__cpus *cpus; /* NULL: do not pin */
  sigset_t mask;         /* the ranks' signal mask */
} phx__spawn;

/* [main] Starts rank `rank`.  It dies with this process, whatever happens.  A rank whose exec fails says so in its
 * liveness page and exits with 127. */
phx_status phx__spawn_rank(const phx__spawn *spawn, int32_t rank, pid_t *out, phx_error *err);
#endif
