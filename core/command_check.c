/* core/command_check.c - `phalanx check FILE.ini`: the effective configuration with sources, or all its errors. */
#include "cli.h"
#include "commands.h"
#include "status.h"

int phx__command_check(int argc, char **argv) {
  phx__arguments arguments;
  phx__config *config;
  if (!phx__arguments_parse(argc, argv, 0, &arguments)) return PHX__EXIT_REFUSED;
  phx_status status = phx__config_load(arguments.file, arguments.overrides, arguments.n_overrides, stderr, &config);
  if (status == PHX_OK) {
    phx__config_print(config, stdout, true);
    phx__config_free(config);
  }
  phx__arguments_free(&arguments);
  return status == PHX_OK ? PHX__EXIT_OK : PHX__EXIT_REFUSED;
}
