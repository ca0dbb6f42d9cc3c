/* core/base/regular_file.h - opening a file that a user names, for reading: a regular file, or a refusal that says what
 * it is.  Never waits, as opening a FIFO would.  [main] */
#ifndef PHX__REGULAR_FILE_H
#define PHX__REGULAR_FILE_H
#include <phalanx/base.h>
#include <sys/stat.h>

/* what: "the token file"; why: why nothing else will do, after "it is a pipe, and ".  On failure *fd is -1.  PHX_IO: it
 * cannot be opened; PHX_INVALID: it is not a regular file. */
phx_status phx__regular_open(const char *path, const char *what, const char *why, int *fd, struct stat *st,
                             phx_error *err);
/* "a directory", "a pipe", ...; NULL for a regular file. */
const char *phx__irregular(mode_t mode);
#endif
