/* tests/support/root.c - see root.h. */
#include "root.h"

#include <stdio.h>
#include <stdlib.h>

const char *test_root(void) {
  const char *root = getenv("PHX_TEST_ROOT");
  return root && *root ? root : PHX_TEST_BUILD;
}

const char *test_path(const char *relative) {
  static char paths[8][4096];
  static unsigned next;
  char *path = paths[next++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", test_root(), relative);
  return path;
}
