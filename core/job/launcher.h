/* core/job/launcher.h - starts N ranks on this machine and watches them: a death, a stop or a missing rank ends them
 * all, with a table of who was where.  [main] only. */
#ifndef PHX__LAUNCHER_H
#define PHX__LAUNCHER_H
#include <phalanx/base.h>
#include <stdbool.h>

typedef struct phx__outcome {
  bool failed;     /* a rank failed: a restart may help.  Not set when the user ended the job or it was refused */
  int32_t lost;    /* ranks that were killed, stopped for too long, or never came, before the job was ended */
  bool no_memory;  /* a rank was killed, and the kernel has counted a kill for lack of memory */
  char cause[1400]; /* one line: what failed first, and where */
} phx__outcome;

typedef struct phx__launch {
  int32_t ranks;
  int32_t threads;         /* per rank, for pinning; 0: do not pin */
  double timeout_s;
  const char *run_dir;     /* rank r > 0 writes stdout and stderr to run_dir/rank-R.log; rank 0 inherits */
  const char *memory;      /* what the plan takes and what there was at the start, as text, or NULL */
  char *const *argv;       /* of a rank: argv[0] is the command's own path */
  phx__outcome *outcome;   /* filled in, or NULL */
  int32_t saves; /* 1: SIGTERM, SIGUSR1, SIGINT and SIGHUP are passed on to the ranks, which save and stop; a second
                  * SIGTERM or SIGINT (stop.h says when it is one) ends the job */
} phx__launch;

/* Returns the exit status of the job: 0, or what the ranks agreed on (2: refused, 5: saved and stopped as a signal
 * asked), or 3 after a failure. */
int phx__launch_run(const phx__launch *launch);
#endif
