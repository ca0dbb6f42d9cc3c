/* See temp_dir.h.  One thread. */
#include "temp_dir.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

temp_dir temp_dir_make(void) {
  temp_dir dir;
  const char *base = getenv("TMPDIR");
  snprintf(dir.path, sizeof dir.path, "%s/phalanx-test-XXXXXX", base && *base ? base : "/tmp");
  if (!mkdtemp(dir.path)) {
    perror(dir.path);
    abort();
  }
  return dir;
}

const char *temp_dir_path(const temp_dir *dir, const char *name) {
  static char paths[8][512];
  static int next;
  char *path = paths[next++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", dir->path, name);
  return path;
}

static int each(const temp_dir *dir, int remove_them) {
  int n = 0;
  DIR *d = opendir(dir->path);
  for (struct dirent *e; d && (e = readdir(d));) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    n++;
    if (remove_them) unlink(temp_dir_path(dir, e->d_name));
  }
  if (d) closedir(d);
  return n;
}

int temp_dir_count(const temp_dir *dir) { return each(dir, 0); }

void temp_dir_remove(const temp_dir *dir) {
  each(dir, 1);
  rmdir(dir->path);
}

const char *temp_dir_write(const temp_dir *dir, const char *name, const void *bytes, size_t n) {
  const char *path = temp_dir_path(dir, name);
  FILE *f = fopen(path, "wb");
  if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) {
    perror(path);
    abort();
  }
  return path;
}
