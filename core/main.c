/* core/main.c - the `phalanx` command; everything is in cli.c and the commands.
 *
 * exit() has handlers that find out a plugin which ends the process; past them goes _exit().  The command has its own,
 * which plugins get instead of the C library's, since symbols of the command go first. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/sys.h"
#include "command/cli.h"
#include "command/process.h"
#include "job/job_watch.h"
#include "plugin/suspect.h"

int main(int argc, char **argv) {
  const int refused = phx__process_begin();
  const bool trains = argc > 1 && strcmp(argv[1], "train") == 0; /* its result is in run.out */
  return refused ? refused : phx__process_end(phx__cli_main(argc, argv), !trains);
}

#if !PHX__SANITIZED
#define FOR_PLUGINS __attribute__((visibility("default")))
FOR_PLUGINS void _exit(int status) {
  phx__suspect_exits();
  phx__watch_exits(status);
  phx__exit_now(status);
}
FOR_PLUGINS void _Exit(int status) { _exit(status); }
#endif
