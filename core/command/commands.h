/* core/command/commands.h - the commands of `phalanx`, one function each.  argv[0] is the command's name.
 *
 * Returns the exit status: PHX__EXIT_*.  Results go to stdout, problems to stderr.  [main].
 * To add a command: declare it here, and give it a row in the table of cli.c. */
#ifndef PHX__COMMANDS_H
#define PHX__COMMANDS_H

int phx__command_check(int argc, char **argv);
int phx__command_plugins(int argc, char **argv);
int phx__command_help(int argc, char **argv);
int phx__command_train(int argc, char **argv);
int phx__command_compare(int argc, char **argv);
int phx__command_data(int argc, char **argv);
int phx__command_sample(int argc, char **argv);
int phx__command_checkpoint(int argc, char **argv);
#endif
