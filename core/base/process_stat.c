/* core/base/process_stat.c - see process_stat.h. */
#include "base/process_stat.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "base/sys.h"

bool phx__process_stat_read(long pid, phx__process_stat *out) {
  char path[64], text[1024];
  *out = (phx__process_stat){0};
  snprintf(path, sizeof path, "/proc/%ld/stat", pid);
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  if (fd < 0) return false;
  const ssize_t n = phx__sys.read(fd, text, sizeof text - 1);
  phx__sys.close(fd);
  if (n <= 0) return false;
  text[n] = 0;
  const char *at = strrchr(text, ')'); /* a command's name may hold anything */
  if (!at || at[1] != ' ') return false;
  const char state = at[2];
  for (int field = 2; at && field < 22; field++) at = strchr(at + 1, ' ');
  if (!at || sscanf(at, "%" SCNu64, &out->start) != 1) return false;
  out->state = state;
  return true;
}

bool phx__process_has_ended(long pid, uint64_t start) {
  phx__process_stat now;
  if (phx__process_stat_read(pid, &now))
    return now.state == 'Z' || now.state == 'X' || (start && now.start != start);
  return kill((pid_t)pid, 0) != 0 && errno == ESRCH;
}
