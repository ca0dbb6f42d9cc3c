/* tests/support/temp_dir.h - a directory of a test's own, and files in it.  Ends the test program on failure. */
#ifndef PHX__TEMP_DIR_H
#define PHX__TEMP_DIR_H
#include <stddef.h>

typedef struct temp_dir {
  char path[256];
} temp_dir;
temp_dir temp_dir_make(void);
void temp_dir_remove(const temp_dir *dir); /* with the files in it; no directories */
/* DIR/name, in one of eight static buffers. */
const char *temp_dir_path(const temp_dir *dir, const char *name);
const char *temp_dir_write(const temp_dir *dir, const char *name, const void *bytes, size_t n);
int temp_dir_count(const temp_dir *dir); /* files */
#endif
