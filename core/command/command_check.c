/* core/command/command_check.c - `phalanx check FILE.ini`: the effective configuration with sources, or all its errors;
 * and the plan of memory and traffic, in comments. */
#include <stdlib.h>

#include "base/complain.h"
#include "base/status.h"
#include "command/cli.h"
#include "command/commands.h"
#include "command/memory_room.h"
#include "command/plan.h"
#include "command/run_data.h"
#include "command/run_dir.h"
#include "engine/prepare.h"
#include "plugin/config_load.h"

/* The data as `train` opens them, and their line. */
static phx_status check_data(const phx__config *config, phx_error *err) {
  const int32_t size = (int32_t)config->s.run.ranks;
  phx__prepared *p = NULL;
  phx__run_data data = {NULL, NULL};
  char line[400];
  phx_status status = phx__prepare(config, 0, size, 0, size, 0, 0, &p, err);
  if (!status) status = phx__run_data_attach(config, p, &data, err);
  if (!status) status = phx__run_data_read(&data, err);
  if (!status) {
    phx__run_data_line(config, p, &data, line, sizeof line);
    printf("\n; The data: %s\n", line);
    phx__run_data_say_same(&data);
  }
  if (data.train) phx__run_data_close(&data);
  phx__prepared_free(p);
  return status;
}

/* A refusal stands alone: what cannot be planned prints no configuration.  What is planned and does not fit is printed,
 * and refused as `train` refuses it. */
static phx_status print_all(const phx__config *config) {
  phx_error err = PHX_ERROR_INIT;
  char *plan = NULL;
  size_t bytes = 0;
  FILE *text = open_memstream(&plan, &bytes);
  phx_status status = text ? phx__plan_print(config, text, &err)
                           : phx_fail(&err, PHX_NOMEM, "no memory for the plan");
  if (text && (fclose(text) || !plan) && !status) status = phx_fail(&err, PHX_NOMEM, "no memory for the plan");
  if (!status) phx__config_print(config, stdout, true);
  if (!status) fputs(plan, stdout);
  phx__room room;
  phx__room_read("", &room);
  if (!status) status = check_data(config, &err);
  if (!status) status = phx__room_check(config, &room, &err);
  if (!status) status = phx__run_dir_check(config, &err);
  if (status) phx__complain("%s", err.message);
  free(plan);
  return status;
}

int phx__command_check(int argc, char **argv) {
  phx__arguments arguments;
  phx__config *config;
  if (!phx__arguments_parse(argc, argv, 0, &arguments)) return PHX__EXIT_REFUSED;
  phx_status status = phx__config_load(arguments.file, arguments.overrides, arguments.n_overrides, stderr, &config);
  if (status == PHX_OK) {
    status = print_all(config);
    phx__config_free(config);
  }
  phx__arguments_free(&arguments);
  return status == PHX_OK ? PHX__EXIT_OK : PHX__EXIT_REFUSED;
}
