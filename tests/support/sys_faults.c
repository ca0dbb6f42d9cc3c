/* See sys_faults.h. */
#include "sys_faults.h"

#include <errno.h>
#include <sys/mman.h>

int fail_memfd(const char *name, unsigned flags) {
  (void)name, (void)flags;
  errno = EMFILE;
  return -1;
}
int fail_ftruncate(int fd, off_t bytes) {
  (void)fd, (void)bytes;
  errno = ENOSPC;
  return -1;
}
void *fail_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) {
  (void)at, (void)bytes, (void)prot, (void)flags, (void)fd, (void)offset;
  errno = ENOMEM;
  return MAP_FAILED;
}
int fail_pidfd_open(pid_t pid) {
  (void)pid;
  errno = EPERM;
  return -1;
}
