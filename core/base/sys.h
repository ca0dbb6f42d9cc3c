/* core/base/sys.h - the core's system calls on files and memory, and its allocations, through one table, so that a test
 * can fail any of them.
 *
 * Every file that a run reads or writes is opened, read, written, renamed and removed through it.  Past it go: finding
 * things (stat, realpath, lists of directories), processes and signals, sockets, /dev/null, what a crash handler says,
 * the watch over memory (memory_watch.c), and what the C library does for itself: text on the screen, its streams'
 * buffers, inih and the dynamic loader.
 *
 * phx__sys is the process's table; tests replace members (one thread, before use).  [any] otherwise: pread, pwrite and
 * direct are also called from threads of stream.c. */
#ifndef PHX__SYS_H
#define PHX__SYS_H
#include <stddef.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>

typedef struct phx__sys_table {
  void *(*calloc)(size_t n, size_t bytes);
  void *(*realloc)(void *p, size_t bytes);
  void (*free)(void *p);
  int (*open)(const char *path, int flags, mode_t mode); /* with O_CREAT: no link is followed */
  int (*openat)(int dir, const char *name, int flags);
  int (*close)(int fd);
  ssize_t (*read)(int fd, void *buffer, size_t bytes);
  ssize_t (*write)(int fd, const void *buffer, size_t bytes);
  ssize_t (*pwrite)(int fd, const void *buffer, size_t bytes, off_t at);
  int (*fsync)(int fd);
  int (*rename)(const char *from, const char *to);
  int (*ftruncate)(int fd, off_t bytes);
  int (*mkdir)(const char *path, mode_t mode);
  void *(*mmap)(void *at, size_t bytes, int prot, int flags, int fd, off_t offset);
  int (*munmap)(void *p, size_t bytes);
  int (*memfd_create)(const char *name, unsigned flags);
  ssize_t (*pread)(int fd, void *buffer, size_t bytes, off_t at);
  int (*fstat)(int fd, struct stat *out);
  int (*unlink)(const char *path);
  int (*unlinkat)(int dir, const char *name, int flags);
  int (*rmdir)(const char *path);
  int (*direct)(int fd, int on); /* sets or clears O_DIRECT */
  int (*statvfs)(const char *path, struct statvfs *out);
  int (*lock)(int fd);           /* the whole file, for writing, by its open file description; does not wait */
  int (*link)(const char *from, const char *to);
  int (*pidfd_open)(pid_t pid);
} phx__sys_table;
extern phx__sys_table phx__sys;

/* phx__sys.calloc, never of 0 bytes. */
void *phx__calloc(size_t n, size_t bytes);
char *phx__strdup(const char *text); /* NULL when out of memory */
void phx__free(void *p);
/* [any], and in signal handlers: the process ends at once, by our own will; _exit is a plugin's (main.c). */
_Noreturn void phx__exit_now(int status);

/* Is this a build with a sanitizer?  They report crashes better, and take memory of their own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PHX__SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define PHX__SANITIZED 1
#endif
#endif
#ifndef PHX__SANITIZED
#define PHX__SANITIZED 0
#endif
#endif
