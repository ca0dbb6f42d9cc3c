/* Fuzz target: any bytes as texts for `phalanx data tokenize`.
 *
 * Properties: the token files hold the bytes of the texts, 256 between two of them, divided where --valid says; a text
 * that makes no file of two tokens is refused, and leaves no file, as is one that begins as another format
 * does.  Input: texts, part for validation, then the texts.
 * With libFuzzer:
 *   build-clang/tests/fuzz_tokenize tests/fuzz/tokenize  The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/command/commands.h"
#include "../../core/base/sys.h"
#include "../../core/engine/data_kind.h"
#include "check.h"

#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static int no_sync(int fd) {
  (void)fd;
  return 0;
}

/* The tokens of DIR/name: how many; -1: there is no such file.  Removes it. */
static long take_tokens(const char *path, uint16_t *out, size_t room) {
  int32_t head[256];
  FILE *f = fopen(path, "rb");
  if (!f) return -1;
  CHECK(fread(head, 1, sizeof head, f) == sizeof head && head[0] == 20240520 && head[1] == 1);
  const size_t n = fread(out, 2, room, f);
  CHECK((int32_t)n == head[2] && fgetc(f) == EOF);
  fclose(f);
  unlink(path);
  return (long)n;
}

static void check_outputs(const uint16_t *expected, size_t n, int status, double part, const char *a, const char *b) {
  static uint16_t got[1 << 16];
  long first = take_tokens(a, got, sizeof got / 2);
  if (status != 0) {
    CHECK(first == -1 && access(b, F_OK) != 0);
    return;
  }
  const long second = part > 0 ? take_tokens(b, got + first, sizeof got / 2 - (size_t)first) : 0;
  CHECK(first >= 2 && second >= 0 && (size_t)(first + second) == n && memcmp(got, expected, 2 * n) == 0);
  CHECK(second == (long)((double)n * part));
}

static int is_foreign(const uint8_t *text, size_t n) {
  static const uint8_t tokens[] = {0x88, 0xd8, 0x34, 0x01}; /* 20240520 */
  return phx__data_mark_of(text, n < 512 ? n : 512) || (n >= 4 && !memcmp(text, tokens, 4));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static uint16_t expected[1 << 16];
  static char dir[40] = "", paths[5][64];
  if (bytes < 2 || bytes > 60000) return 0;
  if (!dir[0]) {
    snprintf(dir, sizeof dir, "/tmp/phx-fuzz-XXXXXX");
    CHECK(mkdtemp(dir));
    for (int i = 0; i < 5; i++) snprintf(paths[i], sizeof paths[i], "%s/%d", dir, i);
    phx__sys.fsync = no_sync;
  } else {
    CHECK(mkdir(dir, 0700) == 0);
  }
  const int texts = 1 + data[0] % 3;
  const double part = data[1] % 8 ? (double)(data[1] % 8) / 8 : 0;
  const size_t each = (bytes - 2) / (size_t)texts;
  static char command[] = "data", what[] = "tokenize", out[] = "-o", valid_too[] = "--valid";
  char fraction[32], *argv[] = {command, what, out, paths[3], valid_too, fraction, paths[4], NULL, NULL, NULL};
  size_t n = 0;
  int argc = part > 0 ? 7 : 4, refused = each == 0;
  snprintf(fraction, sizeof fraction, "%.3f", part);
  for (int i = 0; i < texts; i++) {
    const uint8_t *from = data + 2 + (size_t)i * each;
    FILE *f = fopen(paths[i], "wb");
    CHECK(f && fwrite(from, 1, each, f) == each && fclose(f) == 0);
    refused |= is_foreign(from, each);
    if (i) expected[n++] = 256;
    for (size_t k = 0; k < each; k++) expected[n++] = from[k];
    argv[argc++] = paths[i];
  }
  const int status = phx__command_data(argc, argv);
  const long valid = (long)((double)n * part), train = (long)n - valid;
  CHECK(status == (refused || train < 2 || (part > 0 && valid < 2) ? 2 : 0));
  check_outputs(expected, n, status, part, paths[3], paths[4]);
  for (int i = 0; i < texts; i++) unlink(paths[i]);
  CHECK(rmdir(dir) == 0); /* nothing is left */
  return 0;
}
