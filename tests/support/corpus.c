/* tests/support/corpus.c - see corpus.h. */
#include "corpus.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LONG_RUN = 16 };

/* In memory of its very size, so that a sanitizer sees the end. */
static void one(int (*target)(const uint8_t *, size_t), const uint8_t *data, size_t bytes) {
  uint8_t *exact = malloc(bytes ? bytes : 1);
  cr_assert_not_null(exact);
  if (bytes) memcpy(exact, data, bytes);
  target(exact, bytes);
  free(exact);
}

static int is_inside_run(const uint8_t *data, size_t bytes, size_t at) {
  if (at < LONG_RUN / 2 || at + LONG_RUN / 2 >= bytes) return 0;
  for (size_t i = at - LONG_RUN / 2; i <= at + LONG_RUN / 2; i++)
    if (data[i] != data[at]) return 0;
  return 1;
}

static void change_everywhere(int (*target)(const uint8_t *, size_t), uint8_t *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) {
    const uint8_t kept = data[i];
    const uint8_t ways[] = {(uint8_t)(kept ^ 1), '9', (uint8_t)(kept ^ 0x80)};
    if (is_inside_run(data, bytes, i)) continue;
    one(target, data, i);
    for (size_t how = 0; how < sizeof ways; how++) {
      data[i] = ways[how];
      one(target, data, bytes);
    }
    data[i] = kept;
  }
}

int corpus_replay(const char *folder, int (*target)(const uint8_t *, size_t)) {
  static uint8_t data[1 << 16];
  char path[4096];
  int n = 0;
  snprintf(path, sizeof path, "%s/tests/fuzz/%s", PHX_TEST_SOURCE, folder);
  DIR *d = opendir(path);
  cr_assert_not_null(d, "%s", path);
  for (struct dirent *e; (e = readdir(d));) {
    if (e->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "%s/tests/fuzz/%s/%s", PHX_TEST_SOURCE, folder, e->d_name);
    FILE *f = fopen(path, "rb");
    cr_assert_not_null(f, "%s", path);
    const size_t bytes = fread(data, 1, sizeof data, f);
    fclose(f);
    one(target, data, bytes);
    change_everywhere(target, data, bytes);
    n++;
  }
  closedir(d);
  return n;
}
