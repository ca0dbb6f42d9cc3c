/* core/command/command_checkpoint.h - what the parts of `phalanx checkpoint` share.  [main] */
#ifndef PHX__COMMAND_CHECKPOINT_H
#define PHX__COMMAND_CHECKPOINT_H
#include <phalanx/base.h>
#include <stdio.h>

/* argv[0] is the part's name. */
int phx__checkpoint_export(int argc, char **argv);
int phx__checkpoint_import(int argc, char **argv);
int phx__checkpoint_diff(int argc, char **argv);

/* The status of a call that writes: what is PHX_IO there is no damage, but PHX_STATE here. */
phx_status phx__writing(phx_status status);
/* Prints the error; 4 for damage (PHX_IO), 3 for what could not be written (PHX_STATE), else 2. */
int phx__checkpoint_refuse(phx_status status, const phx_error *err);
/* Message, newline, status 2. */
int phx__checkpoint_usage(const char *usage);
#endif
