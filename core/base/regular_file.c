/* core/base/regular_file.c - see regular_file.h. */
#include "base/regular_file.h"

#include <errno.h>
#include <fcntl.h>

#include "base/status.h"
#include "base/sys.h"

const char *phx__irregular(mode_t mode) {
  if (S_ISREG(mode)) return NULL;
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

phx_status phx__regular_open(const char *path, const char *what, const char *why, int *fd, struct stat *st,
                             phx_error *err) {
  phx_status status = PHX_OK;
  *fd = phx__sys.open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0);
  if (*fd < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot open %s %s", what, path);
  if (phx__sys.fstat(*fd, st)) status = phx_fail_errno(err, PHX_IO, errno, "cannot stat %s", path);
  if (!status && phx__irregular(st->st_mode))
    status = phx_fail(err, PHX_INVALID, "%s is not a regular file: it is %s, and %s", path,
                      phx__irregular(st->st_mode), why);
  if (!status) return PHX_OK;
  phx__sys.close(*fd);
  *fd = -1;
  return status;
}
