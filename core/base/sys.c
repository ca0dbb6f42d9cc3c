/* core/base/sys.c - see sys.h. */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int sys_direct(int fd, int on) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return -1;
  return fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT);
}

/* What is written is a file of its own: where somebody else has put a link or a pipe of that name, it is neither
 * followed (ELOOP) nor waited for. */
static int sys_open(const char *path, int flags, mode_t mode) {
  struct stat st;
  if (!(flags & O_CREAT)) return open(path, flags | O_CLOEXEC, mode);
  const int fd = open(path, flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, mode);
  if (fd < 0 || fstat(fd, &st) || S_ISREG(st.st_mode)) return fd;
  close(fd);
  errno = EPERM;
  return -1;
}

static int sys_openat(int dir, const char *name, int flags) { return openat(dir, name, flags | O_CLOEXEC); }

static int sys_lock(int fd) {
  struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  return fcntl(fd, F_OFD_SETLK, &whole);
}

static int sys_pidfd_open(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }

phx__sys_table phx__sys = {
    .calloc = calloc, .realloc = realloc, .free = free, .open = sys_open, .close = close, .read = read, .write = write,
    .pwrite = pwrite, .fsync = fsync, .rename = rename, .ftruncate = ftruncate, .mkdir = mkdir, .mmap = mmap,
    .munmap = munmap, .memfd_create = memfd_create, .pread = pread, .fstat = fstat, .unlink = unlink,
    .unlinkat = unlinkat, .rmdir = rmdir, .direct = sys_direct, .openat = sys_openat, .lock = sys_lock,
    .link = link, .statvfs = statvfs, .pidfd_open = sys_pidfd_open,
};

void *phx__calloc(size_t n, size_t bytes) { return phx__sys.calloc(n ? n : 1, bytes ? bytes : 1); }

char *phx__strdup(const char *text) {
  size_t bytes = strlen(text) + 1;
  char *copy = phx__calloc(1, bytes);
  if (copy) memcpy(copy, text, bytes);
  return copy;
}

void phx__free(void *p) { phx__sys.free(p); }

_Noreturn void phx__exit_now(int status) {
  for (;;) {
    if (PHX__SANITIZED) _exit(status); /* the sanitizer reports in its own */
    syscall(SYS_exit_group, status);
  }
}
