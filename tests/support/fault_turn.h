/* tests/support/fault_turn.h - the n-th call that the core makes fails once, whichever it is.
 *
 * fault_install replaces this process's table of system calls; between fault_begin and fault_end they are counted, and
 * the n-th of the kind fails.  [any] thread may make the calls; begin and end are the test's. */
#ifndef TEST_FAULT_TURN_H
#define TEST_FAULT_TURN_H
#include <stdbool.h>

typedef enum fault_kind {
  FAULT_WRITING, /* open, openat, mkdir, rename, fsync, write, pwrite, ftruncate, unlink, unlinkat, rmdir, mmap:
                    with `error` */
  FAULT_READING, /* open, openat, read, pread, fstat, statvfs, mmap: with `error` */
  FAULT_SHORT,   /* write, pwrite, read, pread: half of it, and no error */
  FAULT_MEMORY   /* calloc, realloc */
} fault_kind;

typedef struct fault_turn {
  fault_kind kind;
  int error;
  long turn; /* from 1; 0: only counting */
  long calls;
  bool fired;
  const char *call; /* the one that failed */
  long maps;        /* calls of mmap */
  long retried;     /* calls of fsync for a file for which one had failed, from begin on; that of a directory: until
                       end */
  bool on;
} fault_turn;
extern fault_turn fault;

void fault_install(void);
void fault_begin(fault_kind kind, int error, long turn);
void fault_end(void);
#endif
