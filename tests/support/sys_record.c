/* tests/support/sys_record.c - see sys_record.h.
 *
 * The real call is made under the lock, so that the order of the entries is the order of the calls.  Objects are told
 * by device and inode; a number that is used again belongs to the object that was made last. */
#include "sys_record.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sys.h"

enum { DATA_BYTES = 256 << 20 }; /* address space; what is not written costs nothing */

static sys_record *record;
static int32_t self;
static phx__sys_table real;

static void refuse(const char *why, const char *path) {
  fprintf(stderr, "sys_record: %s (%s): tell the recorder what it does to a power cut's states\n", why, path);
  fflush(stderr);
  abort();
}

static void enter(void) {
  int32_t none = 0;
  while (!__atomic_compare_exchange_n(&record->lock, &none, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
    none = 0;
    sched_yield();
  }
}
static void leave(void) {
  __atomic_store_n(&record->lock, 0, __ATOMIC_RELEASE);
}

static sys_record_entry *add(sys_record_kind kind, int32_t dir, int32_t object, const char *name) {
  if (record->n_entries == SYS_RECORD_ENTRIES) refuse("too many entries", name);
  sys_record_entry *e = &record->entries[record->n_entries++];
  *e = (sys_record_entry){.kind = kind, .rank = self, .object = object, .dir = dir};
  if (snprintf(e->name, sizeof e->name, "%s", name) >= (int)sizeof e->name) refuse("a long name", name);
  return e;
}

/* -1: not one of ours */
static int32_t object_of(const struct stat *st) {
  for (int32_t i = record->n_objects - 1; i >= 0; i--)
    if (record->objects[i].inode == st->st_ino && record->objects[i].device == st->st_dev) return i;
  return -1;
}
static int32_t object_of_fd(int fd) {
  struct stat st;
  return fstat(fd, &st) ? -1 : object_of(&st);
}

static int32_t new_object(const struct stat *st) {
  if (record->n_objects == SYS_RECORD_OBJECTS) refuse("too many objects", "");
  record->objects[record->n_objects].device = st->st_dev;
  record->objects[record->n_objects].inode = st->st_ino;
  record->objects[record->n_objects].is_dir = S_ISDIR(st->st_mode);
  return record->n_objects++;
}

typedef struct place { /* of a path, before the call */
  int32_t dir;         /* -1: not in the recorded directory */
  int32_t object;      /* -1: nothing is there */
  char name[SYS_RECORD_NAME];
} place;

static place find(const char *path) {
  char parent[PATH_MAX];
  struct stat st;
  place p = {-1, -1, ""};
  if (snprintf(parent, sizeof parent, "%s", path) >= (int)sizeof parent) refuse("a long path", path);
  char *slash = strrchr(parent, '/');
  if (slash)
    *(slash == parent ? slash + 1 : slash) = 0;
  else
    memcpy(parent, ".", 2);
  if (stat(parent, &st)) return p;
  p.dir = object_of(&st);
  if (p.dir < 0) return p;
  const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
  if (snprintf(p.name, sizeof p.name, "%s", name) >= (int)sizeof p.name || !*name) refuse("a name", path);
  if (lstat(path, &st)) return p;
  p.object = object_of(&st);
  if (p.object < 0) refuse("something that was there before the recording, or came past the table", path);
  return p;
}

/* ---- the calls ---- */
static int my_open(const char *path, int flags, mode_t mode) {
  struct stat st;
  enter();
  place p = find(path);
  if (p.dir >= 0 && (flags & O_TMPFILE) == O_TMPFILE) refuse("O_TMPFILE", path);
  const int fd = real.open(path, flags, mode), error = errno;
  if (fd >= 0 && p.dir >= 0 && fstat(fd, &st)) refuse("fstat", path);
  if (fd >= 0 && p.dir >= 0 && p.object < 0) {
    p.object = new_object(&st);
    add(SYS_RECORD_CREATE, p.dir, p.object, p.name);
  } else if (fd >= 0 && p.dir >= 0 && (flags & O_TRUNC)) {
    add(SYS_RECORD_SIZE, p.dir, p.object, p.name);
  }
  leave();
  errno = error;
  return fd;
}

static void add_write(int fd, const void *data, ssize_t n, off_t at) {
  const int32_t object = n > 0 ? object_of_fd(fd) : -1;
  if (object < 0) return;
  if (record->n_data + n > DATA_BYTES) refuse("too much data", "");
  sys_record_entry *e = add(SYS_RECORD_WRITE, 0, object, "");
  e->at = at;
  e->bytes = n;
  e->data = record->n_data;
  memcpy(record->data + record->n_data, data, (size_t)n);
  record->n_data += n;
}

static ssize_t my_pwrite(int fd, const void *data, size_t bytes, off_t at) {
  enter();
  const ssize_t n = real.pwrite(fd, data, bytes, at);
  const int error = errno;
  add_write(fd, data, n, at);
  leave();
  errno = error;
  return n;
}

static ssize_t my_write(int fd, const void *data, size_t bytes) {
  enter();
  const ssize_t n = real.write(fd, data, bytes);
  const int error = errno;
  add_write(fd, data, n, lseek(fd, 0, SEEK_CUR) - (n > 0 ? n : 0)); /* with O_APPEND, too: the place is the end */
  leave();
  errno = error;
  return n;
}

static int my_ftruncate(int fd, off_t bytes) {
  enter();
  const int status = real.ftruncate(fd, bytes), error = errno;
  const int32_t object = status ? -1 : object_of_fd(fd);
  if (object >= 0) add(SYS_RECORD_SIZE, 0, object, "")->at = bytes;
  leave();
  errno = error;
  return status;
}

static int my_fsync(int fd) {
  enter();
  const int status = real.fsync(fd), error = errno;
  const int32_t object = status ? -1 : object_of_fd(fd);
  if (object >= 0) add(SYS_RECORD_SYNC, 0, object, "");
  leave();
  errno = error;
  return status;
}

static int my_mkdir(const char *path, mode_t mode) {
  struct stat st;
  enter();
  const place p = find(path);
  const int status = real.mkdir(path, mode), error = errno;
  if (!status && p.dir >= 0) {
    if (lstat(path, &st)) refuse("lstat", path);
    add(SYS_RECORD_MKDIR, p.dir, new_object(&st), p.name);
  }
  leave();
  errno = error;
  return status;
}

static int my_rename(const char *from, const char *to) {
  enter();
  const place a = find(from), b = find(to);
  if (a.dir != b.dir) refuse("a rename from one directory to another", to);
  const int status = real.rename(from, to), error = errno;
  if (!status && a.dir >= 0)
    if (snprintf(add(SYS_RECORD_RENAME, a.dir, a.object, a.name)->to, SYS_RECORD_NAME, "%s", b.name) < 0) abort();
  leave();
  errno = error;
  return status;
}

static int removed(const place *p, int status, int error) {
  if (!status && p->dir >= 0) add(SYS_RECORD_REMOVE, p->dir, p->object, p->name);
  leave();
  errno = error;
  return status;
}
static int my_unlink(const char *path) {
  enter();
  const place p = find(path);
  const int status = real.unlink(path);
  return removed(&p, status, errno);
}
static int my_rmdir(const char *path) {
  enter();
  const place p = find(path);
  const int status = real.rmdir(path);
  return removed(&p, status, errno);
}
static int my_unlinkat(int dir, const char *name, int flags) {
  struct stat st;
  enter();
  place p = {.dir = object_of_fd(dir), .object = -1};
  if (p.dir >= 0 && snprintf(p.name, sizeof p.name, "%s", name) >= (int)sizeof p.name) refuse("a name", name);
  if (p.dir >= 0 && !fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW)) p.object = object_of(&st);
  const int status = real.unlinkat(dir, name, flags);
  return removed(&p, status, errno);
}

static void *my_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset) {
  if (fd >= 0 && (prot & PROT_WRITE) && (flags & MAP_TYPE) != MAP_PRIVATE) {
    enter();
    if (object_of_fd(fd) >= 0) refuse("a shared writable mapping", "mmap");
    leave();
  }
  return real.mmap(at, bytes, prot, flags, fd, offset);
}

/* Two names of one file are not modelled: this is a file system without links. */
static int my_link(const char *from, const char *to) {
  (void)from, (void)to;
  errno = EPERM;
  return -1;
}

static void unknown_call(void) {
  refuse("a call of phx__sys that is not modelled", "core/base/sys.h");
}

/* ---- the recording ---- */
sys_record *sys_record_create(const char *dir) {
  struct stat st;
  sys_record *r =
      mmap(NULL, sizeof *r + DATA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (r == MAP_FAILED || stat(dir, &st)) abort();
  record = r;
  new_object(&st);
  return r;
}

void sys_record_destroy(sys_record *r) {
  munmap(r, sizeof *r + DATA_BYTES);
}

void sys_record_install(sys_record *r, int32_t rank) {
  enum { SLOTS = sizeof(phx__sys_table) / sizeof(void (*)(void)) };
  /* those that change nothing on the disk, by themselves */
  static const size_t harmless[] = {
      offsetof(phx__sys_table, calloc), offsetof(phx__sys_table, realloc), offsetof(phx__sys_table, free),
      offsetof(phx__sys_table, close),  offsetof(phx__sys_table, read),    offsetof(phx__sys_table, pread),
      offsetof(phx__sys_table, fstat),  offsetof(phx__sys_table, munmap),  offsetof(phx__sys_table, memfd_create),
      offsetof(phx__sys_table, direct), offsetof(phx__sys_table, openat),  offsetof(phx__sys_table, lock),
      offsetof(phx__sys_table, statvfs), offsetof(phx__sys_table, pidfd_open)};
  void (*const trap)(void) = unknown_call;
  record = r;
  self = rank;
  real = phx__sys;
  for (size_t i = 0; i < SLOTS; i++) memcpy((char *)&phx__sys + i * sizeof trap, &trap, sizeof trap);
  for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
    memcpy((char *)&phx__sys + harmless[i], (char *)&real + harmless[i], sizeof trap);
  phx__sys.open = my_open, phx__sys.write = my_write, phx__sys.pwrite = my_pwrite, phx__sys.fsync = my_fsync;
  phx__sys.rename = my_rename, phx__sys.ftruncate = my_ftruncate, phx__sys.mkdir = my_mkdir, phx__sys.mmap = my_mmap;
  phx__sys.unlink = my_unlink, phx__sys.unlinkat = my_unlinkat, phx__sys.rmdir = my_rmdir;
  phx__sys.link = my_link;
}

void sys_record_uninstall(void) {
  phx__sys = real;
}

void sys_record_mark(sys_record *r, int64_t value) {
  enter();
  add(SYS_RECORD_MARK, 0, 0, "")->at = value;
  (void)r;
  leave();
}
