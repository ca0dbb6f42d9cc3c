/* core/main.c - the `phalanx` command; everything is in cli.c and the commands. */
#include <string.h>

#include "command/cli.h"
#include "command/process.h"

int main(int argc, char **argv) {
  const int refused = phx__process_begin();
  const bool trains = argc > 1 && strcmp(argv[1], "train") == 0; /* its result is in run.out */
  return refused ? refused : phx__process_end(phx__cli_main(argc, argv), !trains);
}
