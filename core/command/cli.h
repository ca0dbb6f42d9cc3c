/* core/command/cli.h - the command line: dispatch, and the arguments that train, compare and check share.  [main]
 * only. */
#ifndef PHX__CLI_H
#define PHX__CLI_H
#include "config/config.h"
#include "config/config_store.h"

/* The whole command; returns the exit status. */
int phx__cli_main(int argc, char **argv);

enum {
  PHX__ACCEPT_STEPS = 1u << 0,     /* --steps K */
  PHX__ACCEPT_STRATEGIES = 1u << 1, /* --strategies A,B.key=value,... */
  PHX__ACCEPT_RESUME = 1u << 2     /* --resume [DIR|if-any] */
};
enum { PHX__OVERRIDES_MOST = 64 };

typedef struct phx__arguments {
  const char *file;         /* FILE.ini; with --resume DIR alone, that run's config.ini, and run.out is DIR */
  const char *resume;       /* --resume's DIR or `if-any`, "" without one; NULL: no --resume */
  const char *strategies;   /* --strategies, or NULL; --strategy, -n, --set and --steps became overrides */
  phx__override overrides[PHX__OVERRIDES_MOST]; /* in order; later ones win */
  size_t n_overrides;
  char *texts[PHX__OVERRIDES_MOST]; /* owned */
  char *own_file;           /* owned: `file` is the config.ini of a run; or NULL */
} phx__arguments;

/* FILE.ini [-n RANKS] [--strategy NAME|PATH.so] [--set section.key=value]... and what `accept` adds.  On refusal one
 * line on stderr, false, and nothing to free. */
bool phx__arguments_parse(int argc, char **argv, unsigned accept, phx__arguments *out);
void phx__arguments_free(phx__arguments *arguments);
/* One line on stderr with the nearest of `known` (NULL-terminated); returns PHX__EXIT_REFUSED. */
int phx__cli_unknown(const char *what, const char *word, const char *const *known);
#endif
