/* core/command/run_data.h - the data of one run: opened by everyone, read whole once on each machine, told in one
 * line. */
#ifndef PHX__RUN_DATA_H
#define PHX__RUN_DATA_H
#include <phalanx/job.h>
#include <stdio.h>

#include "engine/data.h"
#include "engine/prepare.h"

typedef struct phx__run_data {
  phx__data *train, *valid; /* valid NULL: none */
} phx__run_data;

/* [main] Headers and sizes; refuses what has too little for a step. */
phx_status phx__run_data_attach(const phx__config *config, const phx__prepared *prepared, phx__run_data *out,
                                phx_error *err);
/* [main] Everything, in this process: for the command before ranks are there.  What takes over a second is said, again
 * and again. */
phx_status phx__run_data_read(phx__run_data *data, phx_error *err);
/* [main][collective] The first rank of each machine reads what was not read there yet; the others wait for it, however
 * long it takes.  Refuses machines whose files differ.  Afterwards rank 0 knows every file's contents. */
phx_status phx__run_data_meet(phx__run_data *data, const phx_job *job, phx_error *err);
void phx__run_data_close(phx__run_data *data);
/* Warns of a held-out file whose contents a training file has, too; of files that were read. */
void phx__run_data_say_same(const phx__run_data *data);
/* Format, tokens, windows, epochs, parameters: one line. */
void phx__run_data_line(const phx__config *config, const phx__prepared *prepared, const phx__run_data *data, char *text,
                        size_t bytes);
#endif
