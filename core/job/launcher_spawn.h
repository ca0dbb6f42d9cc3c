/* core/job/launcher_spawn.h - one rank's process; for launcher.c only. */
#ifndef PHX__LAUNCHER_SPAWN_H
#define PHX__LAUNCHER_SPAWN_H
#include <signal.h>
#include <stdbool.h>
#include <sys/types.h>

#include "engine/cpus.h"
#include "job/job_segment.h"

typedef struct phx__spawn {
  char *const *argv;   /* of a rank: argv[0] is the command's own path */
  const char *run_dir; /* rank r > 0 writes stdout and stderr to run_dir/rank-R.log; rank 0 inherits */
  int32_t ranks, threads;
  phx__segment *segment;
  int memfd;
  const phx__cpus *cpus; /* NULL: do not pin */
  sigset_t mask;         /* the ranks' signal mask */
} phx__spawn;

/* [main] Starts rank `rank`.  It dies with this process, whatever happens.  A rank whose exec fails says so in its
 * liveness page and exits with 127. */
phx_status phx__spawn_rank(const phx__spawn *spawn, int32_t rank, pid_t *out, phx_error *err);
#endif
