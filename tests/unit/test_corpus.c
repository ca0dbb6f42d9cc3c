/* The fuzz targets' seeds, and every seed with each byte changed and at every length, under every compiler. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "../fuzz/fuzz_safetensors.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_manifest
#include "../fuzz/fuzz_manifest.c"
#undef LLVMFuzzerTestOneInput

static void one(int (*target)(const uint8_t *, size_t), const uint8_t *data, size_t bytes) {
  uint8_t *exact = malloc(bytes ? bytes : 1);
  if (bytes) memcpy(exact, data, bytes);
  target(exact, bytes);
  free(exact);
}

static int replay(const char *folder, int (*target)(const uint8_t *, size_t)) {
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
    for (size_t i = 0; i < bytes; i++) {
      one(target, data, i);
      for (int how = 0; how < 3; how++) {
        const uint8_t kept = data[i];
        data[i] = how == 0 ? (uint8_t)(kept ^ 1) : how == 1 ? '9' : (uint8_t)(kept ^ 0x80);
        one(target, data, bytes);
        data[i] = kept;
      }
    }
    n++;
  }
  closedir(d);
  return n;
}

Test(corpus, safetensors, .timeout = 120) { cr_assert_geq(replay("safetensors", fuzz_safetensors), 5); }
Test(corpus, manifest, .timeout = 120) { cr_assert_geq(replay("manifest", fuzz_manifest), 3); }
