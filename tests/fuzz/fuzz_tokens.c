/* Fuzz target: any bytes as a token file.
 *
 * Properties: a file that is accepted has the windows that its bytes make, every one once in an epoch, and each is the
 * bytes of the file; a refusal names the file.  Input: sequence, vocabulary, then the file.  With libFuzzer:
 *   build-clang/tests/fuzz_tokens tests/fuzz/tokens      The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/engine/data.h"
#include "check.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void check_windows(const phx__data *d, const uint8_t *file, size_t bytes, int64_t sequence, int64_t vocabulary) {
  int32_t head[3] = {0}, tokens[9], targets[9];
  phx_error err = {sizeof err, 0, 0, {0}};
  memcpy(head, file, bytes < sizeof head ? bytes : sizeof head);
  const size_t at = bytes >= 1024 && head[0] == 20240520 && head[1] == 1 ? 1024 : 0;
  const int64_t n = (int64_t)(bytes - at) / 2, windows = (n - 1) / sequence;
  uint8_t *seen = calloc((size_t)windows, 1);
  CHECK(phx__data_files(d) == 1 && phx__data_tokens(d) == n && phx__data_windows(d) == windows && windows > 0);
  for (int64_t i = 0; i < windows; i++) {
    const int64_t window = phx__data_order(d, 0, i);
    CHECK(window >= 0 && window < windows && !seen[window]);
    seen[window] = 1;
    CHECK(phx__data_batch(d, i, 0, 1, 0, 1, 1, tokens, targets, &err) == PHX_OK);
    for (int64_t k = 0; k <= sequence; k++) {
      const uint8_t *p = file + at + 2 * (size_t)(window * sequence + k);
      const int32_t token = p[0] | p[1] << 8;
      CHECK(token < vocabulary);
      if (k < sequence) CHECK(tokens[k] == token);
      if (k > 0) CHECK(targets[k - 1] == token);
    }
  }
  free(seen);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static const int64_t vocabularies[] = {2, 257, 50257, 65536};
  static int fd = -1;
  char path[40];
  phx_error err = {sizeof err, 0, 0, {0}};
  phx__data *d = NULL;
  if (bytes < 2) return 0;
  const int64_t sequence = 1 + data[0] % 8, vocabulary = vocabularies[data[1] % 4];
  if (fd < 0) fd = memfd_create("tokens", MFD_CLOEXEC);
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  CHECK(fd >= 0 && ftruncate(fd, 0) == 0 && pwrite(fd, data + 2, bytes - 2, 0) == (ssize_t)(bytes - 2));
  const phx_status status = phx__data_open(path, sequence, vocabulary, 7, &d, &err);
  CHECK(status == PHX_OK || ((status == PHX_INVALID || status == PHX_IO) && strstr(err.message, path)));
  if (status == PHX_OK) check_windows(d, data + 2, bytes - 2, sequence, vocabulary);
  phx__data_close(d);
  return 0;
}
