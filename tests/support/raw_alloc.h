/* tests/support/raw_alloc.h - the n-th allocation that plugins make by themselves, past their host and the core's table
 * of system calls, fails once.
 *
 * A test that uses it has its own calloc, malloc and realloc, which are the real ones but for that call; only callers
 * inside a plugin's shared object (its copy of the kit included) are counted.  [any] thread may allocate; begin and end
 * are the test's. */
#ifndef TEST_RAW_ALLOC_H
#define TEST_RAW_ALLOC_H
#include <stdbool.h>

typedef struct raw_alloc {
  long turn; /* from 1; 0: only counting */
  long calls;
  bool fired;
  bool on;
  char plugin[128]; /* whose call failed */
} raw_alloc;
extern raw_alloc raw;

void raw_alloc_begin(long turn);
void raw_alloc_end(void);
#endif
