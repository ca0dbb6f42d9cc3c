/* tests/support/fault_turn.c - see fault_turn.h. */
#include "fault_turn.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/sys.h"

fault_turn fault;
static phx__sys_table real;

enum { UNFLUSHED = 512 };
static struct { /* files whose fsync failed: for good, and directories until fault_end */
  dev_t dev;
  ino_t ino;
  bool dir;
} unflushed[UNFLUSHED];
static int n_unflushed;

static bool fails(fault_kind kind, const char *call) {
  if (!__atomic_load_n(&fault.on, __ATOMIC_ACQUIRE) || kind != fault.kind) return false;
  if (__atomic_add_fetch(&fault.calls, 1, __ATOMIC_RELAXED) != fault.turn) return false;
  fault.call = call;
  fault.fired = true;
  if (kind != FAULT_SHORT) errno = fault.error;
  return true;
}
static bool writing(const char *call) {
  return fails(FAULT_WRITING, call);
}
static bool reading(const char *call) {
  return fails(FAULT_READING, call);
}

static int my_open(const char *path, int flags, mode_t mode) {
  return writing("open") || reading("open") ? -1 : real.open(path, flags, mode);
}
static int my_openat(int dir, const char *name, int flags) {
  return writing("openat") || reading("openat") ? -1 : real.openat(dir, name, flags);
}
static int my_mkdir(const char *path, mode_t mode) {
  return writing("mkdir") ? -1 : real.mkdir(path, mode);
}
static int my_rename(const char *from, const char *to) {
  return writing("rename") ? -1 : real.rename(from, to);
}
static int my_ftruncate(int fd, off_t bytes) {
  return writing("ftruncate") ? -1 : real.ftruncate(fd, bytes);
}
static int my_unlink(const char *path) {
  return writing("unlink") ? -1 : real.unlink(path);
}
static int my_unlinkat(int dir, const char *name, int flags) {
  return writing("unlinkat") ? -1 : real.unlinkat(dir, name, flags);
}
static int my_rmdir(const char *path) {
  return writing("rmdir") ? -1 : real.rmdir(path);
}
static int my_fstat(int fd, struct stat *out) {
  return reading("fstat") ? -1 : real.fstat(fd, out);
}

static int my_statvfs(const char *path, struct statvfs *out) {
  return reading("statvfs") ? -1 : real.statvfs(path, out);
}

/* A mapping keeps the number of a file that is removed from becoming another's. */
static void remember(int fd, const struct stat *st) {
  char path[32];
  if (n_unflushed == UNFLUSHED) abort();
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd); /* fd itself may be for writing only */
  const int again = real.open(path, O_RDONLY | O_CLOEXEC, 0);
  if (again < 0 || (!S_ISDIR(st->st_mode) && real.mmap(NULL, 1, PROT_READ, MAP_SHARED, again, 0) == MAP_FAILED))
    abort();
  real.close(again);
  unflushed[n_unflushed].dev = st->st_dev;
  unflushed[n_unflushed].ino = st->st_ino;
  unflushed[n_unflushed++].dir = S_ISDIR(st->st_mode);
}

static int my_fsync(int fd) {
  struct stat st;
  const bool known = !real.fstat(fd, &st);
  for (int i = 0; known && i < n_unflushed; i++)
    fault.retried += unflushed[i].ino == st.st_ino && unflushed[i].dev == st.st_dev;
  if (!writing("fsync")) return real.fsync(fd);
  if (known) remember(fd, &st);
  errno = fault.error;
  return -1;
}

static size_t part(size_t bytes, const char *call) {
  return bytes > 1 && fails(FAULT_SHORT, call) ? bytes / 2 : bytes;
}
static ssize_t my_write(int fd, const void *data, size_t bytes) {
  return writing("write") ? -1 : real.write(fd, data, part(bytes, "write"));
}
static ssize_t my_pwrite(int fd, const void *data, size_t bytes, off_t at) {
  return writing("pwrite") ? -1 : real.pwrite(fd, data, part(bytes, "pwrite"), at);
}
static ssize_t my_read(int fd, void *data, size_t bytes) {
  return reading("read") ? -1 : real.read(fd, data, part(bytes, "read"));
}
static ssize_t my_pread(int fd, void *data, size_t bytes, off_t at) {
  return reading("pread") ? -1 : real.pread(fd, data, part(bytes, "pread"), at);
}

static void *my_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) {
  if (fault.on) __atomic_add_fetch(&fault.maps, 1, __ATOMIC_RELAXED);
  return writing("mmap") || reading("mmap") ? MAP_FAILED : real.mmap(at, bytes, prot, flags, fd, offset);
}
static void *my_calloc(size_t n, size_t bytes) {
  return fails(FAULT_MEMORY, "calloc") ? NULL : real.calloc(n, bytes);
}
static void *my_realloc(void *p, size_t bytes) {
  return fails(FAULT_MEMORY, "realloc") ? NULL : real.realloc(p, bytes);
}

void fault_install(void) {
  real = phx__sys;
  phx__sys.open = my_open, phx__sys.mkdir = my_mkdir, phx__sys.rename = my_rename, phx__sys.fsync = my_fsync;
  phx__sys.write = my_write, phx__sys.pwrite = my_pwrite, phx__sys.ftruncate = my_ftruncate, phx__sys.mmap = my_mmap;
  phx__sys.unlink = my_unlink, phx__sys.unlinkat = my_unlinkat, phx__sys.rmdir = my_rmdir, phx__sys.fstat = my_fstat;
  phx__sys.read = my_read, phx__sys.pread = my_pread, phx__sys.calloc = my_calloc, phx__sys.realloc = my_realloc;
  phx__sys.openat = my_openat, phx__sys.statvfs = my_statvfs;
}

void fault_begin(fault_kind kind, int error, long turn) {
  fault = (fault_turn){.kind = kind, .error = error, .turn = turn, .call = "none"};
  __atomic_store_n(&fault.on, true, __ATOMIC_RELEASE);
}

void fault_end(void) {
  __atomic_store_n(&fault.on, false, __ATOMIC_RELEASE);
  int kept = 0;
  for (int i = 0; i < n_unflushed; i++)
    if (!unflushed[i].dir) unflushed[kept++] = unflushed[i];
  n_unflushed = kept;
}
