/* core/command_compare.c - `phalanx compare`: the same run under several strategies.  [main] only. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"
#include "commands.h"
#include "compare.h"
#include "report.h"
#include "status.h"

enum { WORDS_MAX = 2 * PHX__OVERRIDES_MOST + 2 };

/* What every run gets: the file and the overrides, as --set. */
static void common_words(const phx__arguments *a, char *words[WORDS_MAX]) {
  size_t n = 0;
  words[n++] = (char *)(uintptr_t)a->file;
  for (size_t i = 0; i < a->n_overrides; i++) {
    words[n++] = (char *)(uintptr_t) "--set";
    words[n++] = a->texts[i];
  }
  words[n] = NULL;
}

int phx__command_compare(int argc, char **argv) {
  phx__arguments arguments;
  phx__config *config = NULL;
  char command[4096], *words[WORDS_MAX];
  phx_error err = PHX_ERROR_INIT;
  int exit_status = PHX__EXIT_REFUSED;
  if (!phx__arguments_parse(argc, argv, PHX__ACCEPT_STEPS | PHX__ACCEPT_STRATEGIES, &arguments))
    return PHX__EXIT_REFUSED;
  const ssize_t length = readlink("/proc/self/exe", command, sizeof command - 1);
  if (length <= 0 || !arguments.strategies) {
    fprintf(stderr, length <= 0 ? "phalanx: cannot find the path of this command\n"
                                : "phalanx: compare needs --strategies, such as ddp,fsdp,zero.stage=2\n");
    goto done;
  }
  command[length] = 0;
  if (phx__config_load(arguments.file, arguments.overrides, arguments.n_overrides, stderr, &config)) goto done;
  if (phx__run_dir_create(config, &err)) {
    fprintf(stderr, "phalanx: %s\n", err.message);
    goto done;
  }
  common_words(&arguments, words);
  exit_status =
      phx__compare(command, words, arguments.strategies, config->s.run.out, config->s.run.deterministic);
done:
  phx__config_free(config);
  phx__arguments_free(&arguments);
  return exit_status;
}
