/* core/command/command_compare.c - `phalanx compare`: the same run under several strategies.  [main] only. */
#include <stdio.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/status.h"
#include "command/cli.h"
#include "command/commands.h"
#include "command/compare.h"

int phx__command_compare(int argc, char **argv) {
  phx__arguments arguments;
  char command[4096];
  int exit_status = PHX__EXIT_REFUSED;
  if (!phx__arguments_parse(argc, argv, PHX__ACCEPT_STEPS | PHX__ACCEPT_STRATEGIES, &arguments))
    return PHX__EXIT_REFUSED;
  const ssize_t length = readlink("/proc/self/exe", command, sizeof command - 1);
  if (length <= 0 || !arguments.strategies) {
    phx__complain("%s", length <= 0 ? "cannot find the path of this command"
                                    : "compare needs --strategies, such as ddp,fsdp,zero.stage=2");
  } else {
    command[length] = 0;
    exit_status = phx__compare(&(phx__compare_plan){.command = command, .file = arguments.file,
                                                    .variants = arguments.strategies, .overrides = arguments.overrides,
                                                    .n_overrides = arguments.n_overrides});
  }
  phx__arguments_free(&arguments);
  return exit_status;
}
