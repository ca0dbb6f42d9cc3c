/* core/command/train.h - one run: a rank's life from configuration to final weights, and the launcher's side of
 * it.  [main] */
#ifndef PHX__TRAIN_H
#define PHX__TRAIN_H
#include "config/config.h"

/* A rank: trains and writes the run's files.  Returns the exit status; errors are printed to stderr.  resume: a run's
 * directory or a checkpoint to go on from, "" for run.out's newest; NULL: a new run. */
int phx__train_rank(const phx__config *config, const char *resume);
/* Checks, makes the run's directory, and starts the ranks with argv (or trains here when there is one). */
int phx__train_launch(const phx__config *config, const char *resume, char *const *argv);
#endif
