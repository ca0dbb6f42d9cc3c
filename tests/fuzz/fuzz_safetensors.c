/* Fuzz target: any bytes as a safetensors file (length, header, data).
 *
 * Properties of what is accepted: tensors follow each other without holes up to the end, every one is found by its
 * name, and laying the same tensors out again gives a header that is accepted with the same tensors.  With libFuzzer:
 *   build-clang/tests/fuzz_safetensors tests/fuzz/safetensors     The corpus is replayed by tests/unit/test_corpus.c.
 */
#include "../../core/checkpoint/safetensors.h"
#include "../../core/base/sys.h"
#include "check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void check_again(const phx__safetensors *st) {
  phx__tensor *copy = calloc(st->n + 1, sizeof *copy);
  char *head = NULL;
  int64_t head_bytes = 0, file_bytes = 0;
  phx__safetensors *again = NULL;
  bool known = true;
  for (uint32_t i = 0; i < st->n; i++) {
    copy[i] = st->tensors[i];
    known = known && copy[i].dtype;
  }
  if (known && !phx__safetensors_layout("again", copy, st->n, NULL, &head, &head_bytes, &file_bytes, NULL)) {
    CHECK(!phx__safetensors_parse("again", head + 8, (size_t)head_bytes - 8, file_bytes - head_bytes, &again, NULL));
    CHECK(again->n == st->n);
    for (uint32_t i = 0; i < st->n; i++) {
      const phx__tensor *t = phx__safetensors_find(again, st->tensors[i].name);
      CHECK(t && t->bytes == st->tensors[i].bytes && t->begin == copy[i].begin && t->ndim == st->tensors[i].ndim);
    }
  }
  phx__safetensors_close(again);
  phx__free(head);
  free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  phx_error err = {sizeof err, 0, 0, {0}};
  phx__safetensors *st = NULL;
  uint64_t length = 0;
  if (bytes < 8) return 0;
  for (int i = 7; i >= 0; i--) length = length << 8 | data[i];
  if (length > bytes - 8) length = bytes - 8; /* as if it had been true: the rules behind it are to be reached */
  phx_status status =
      phx__safetensors_parse("fuzz", (const char *)data + 8, (size_t)length, (int64_t)(bytes - 8 - length), &st, &err);
  CHECK(status == PHX_OK || (status == PHX_IO && err.message[0] && strstr(err.message, "fuzz")));
  if (status) return 0;
  int64_t at = st->data_at;
  for (uint32_t i = 0; i < st->n; i++) {
    CHECK(st->tensors[i].begin == at && phx__safetensors_find(st, st->tensors[i].name) == &st->tensors[i]);
    at += st->tensors[i].bytes;
  }
  CHECK(at == st->file_bytes);
  check_again(st);
  phx__safetensors_close(st);
  return 0;
}
