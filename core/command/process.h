/* core/command/process.h - what a process of the command is given by whoever started it, made into what the rest relies
 * on.
 *
 * Called by main() alone: a library does not change its process.  [main] */
#ifndef PHX__PROCESS_H
#define PHX__PROCESS_H
#include <stdbool.h>

/* First of all, before anything is opened and any plugin is loaded:
 * - descriptors 0, 1 and 2 that are closed become /dev/null: else the next file that is opened, such as the job's
 *   memory, gets that number, and what is printed is written into it;
 * - a write to a pipe without a reader, or beyond the limit of a file's size, is an error of that write, not the end of
 *   the process (SIGPIPE, SIGXFSZ);
 * - the soft limit of open files is raised to the hard one.
 * Returns 0, or an exit status where not even /dev/null can be had. */
int phx__process_begin(void);
/* Last of all: is what was printed where it should be?  If not, that is said; and a command whose result is what it
 * `prints` has failed, where `status` says that it is done.  A reader that left (| head) is no failure.  Returns the
 * exit status. */
int phx__process_end(int status, bool prints);
#endif
