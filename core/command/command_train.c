/* core/command/command_train.c - `phalanx train`: one run.  Started by a launcher, this process is one of its ranks;
 * else it checks the run, makes its directory and starts the ranks.  [main] only. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/identity.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/cli.h"
#include "command/commands.h"
#include "command/train.h"
#include "plugin/config_load.h"

/* Another launcher knows how many ranks it has started: -n need not say it again. */
static void add_ranks(phx__arguments *a, char text[32]) {
  const char *launcher = NULL;
  const int32_t size = phx__job_foreign_size(&launcher);
  if (size == 0 || a->n_overrides == PHX__OVERRIDES_MOST) return;
  snprintf(text, 32, "?run.ranks=%d", size); /* weaker than the file and -n */
  a->overrides[a->n_overrides++] = (phx__override){.text = text, .flag = launcher};
}

/* What one process says for all, the others say only when it made them fail. */
static phx_status load(const phx__arguments *a, phx__config **config) {
  char *text = NULL;
  size_t bytes = 0;
  FILE *report = phx__job_speaks() ? NULL : open_memstream(&text, &bytes);
  FILE *out = report ? report : stderr;
  phx_status status = a->own_file ? phx__config_load_found(a->file, a->overrides, a->n_overrides, out, config)
                                  : phx__config_load(a->file, a->overrides, a->n_overrides, out, config);
  if (report) fclose(report);
  if (status && text) fputs(text, stderr);
  free(text);
  return status;
}

int phx__command_train(int argc, char **argv) {
  phx__arguments arguments;
  phx__config *config = NULL;
  if (!phx__arguments_parse(argc, argv, PHX__ACCEPT_STEPS | PHX__ACCEPT_RESUME, &arguments)) return PHX__EXIT_REFUSED;
  int exit_status = PHX__EXIT_REFUSED;
  char command[4096], ranks[32];
  char **again = phx__calloc((size_t)argc + 2, sizeof *again);
  const ssize_t length = readlink("/proc/self/exe", command, sizeof command - 1);
  if (!again || length <= 0) {
    phx__complain("cannot find the path of this command");
    goto done;
  }
  command[length] = 0;
  again[0] = command;
  for (int i = 0; i < argc; i++) again[i + 1] = argv[i];
  add_ranks(&arguments, ranks);
  if (load(&arguments, &config)) goto done;
  exit_status = phx__job_is_rank() ? phx__train_rank(config, arguments.resume)
                                   : phx__train_launch(config, arguments.resume, again);
done:
  phx__config_free(config);
  phx__free(again);
  phx__arguments_free(&arguments);
  return exit_status;
}
