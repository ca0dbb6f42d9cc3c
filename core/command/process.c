/* core/command/process.c - see process.h. */
#include "command/process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/status.h"
#include "engine/cpus.h"

/* The lowest free number is what open() gives, so 0, 1 and 2 are taken in turn.  Where there is no /dev/null, the root
 * directory holds the place: opened as a path, it can be neither read nor written. */
static int hold_standard_descriptors(void) {
  for (int wanted = STDIN_FILENO; wanted <= STDERR_FILENO; wanted++) {
    if (fcntl(wanted, F_GETFD) >= 0 || errno != EBADF) continue;
    int fd = open("/dev/null", O_RDWR);
    if (fd < 0) fd = open("/", O_PATH | O_DIRECTORY);
    if (fd != wanted) return -1;
  }
  return 0;
}

static void raise_open_files(void) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur >= limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit); /* a wish: what is opened at a time stays below any usual limit */
}

int phx__process_begin(void) {
  if (hold_standard_descriptors()) return PHX__EXIT_REFUSED; /* there is nothing to say it on */
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  raise_open_files();
  phx__cpus_remember();
  return PHX__EXIT_OK;
}

/* A pipe or socket whose other end is closed. */
static bool reader_is_gone(void) {
  struct pollfd out = {.fd = STDOUT_FILENO, .events = POLLOUT};
  return poll(&out, 1, 0) == 1 && (out.revents & (POLLERR | POLLHUP));
}

int phx__process_end(int status, bool prints) {
  const bool before = ferror(stdout) != 0;
  errno = 0;
  const bool now = fflush(stdout) != 0;
  const int cause = errno;
  if (!before && !now) return status;
  if (cause == EPIPE || reader_is_gone()) return status;
  phx__complain("standard output could not be written%s%s", cause ? ": " : "",
          cause ? strerror(cause) : "");
  return prints && status == PHX__EXIT_OK ? PHX__EXIT_RANK : status;
}
