/* Fuzz target: any bytes as a manifest without its checksum, which is added, so that what lies behind it is reached.
 *
 * Properties: what is accepted prints to a text that is accepted and prints to the same text; every block of the
 * weights and of each optimizer state is found in exactly one slice that lies inside its file.  With libFuzzer:
 *   build-clang/tests/fuzz_manifest tests/fuzz/manifest     The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/checkpoint/manifest.h"
#include "../../core/checkpoint/manifest_inner.h"
#include "../../core/base/sys.h"
#include "check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void check_found(const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit, uint32_t flat) {
  for (int64_t b = 0; b < m->units[unit].blocks[flat];) {
    const phx__manifest_slice *s = phx__manifest_find(m, kind, index, unit, flat, b);
    CHECK(s && s->first_block == b && s->file < m->n_files);
    CHECK(s->offset + s->blocks * PHX_BLOCK * 4 <= m->files[s->file].bytes);
    b += s->blocks;
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  phx_error err = {sizeof err, 0, 0, {0}};
  phx__manifest *m = NULL, *again = NULL;
  char digits[33], *text = NULL, *second = NULL;
  size_t n = 0, n_second = 0;
  char *sealed = malloc(bytes + 100);
  if (bytes) memcpy(sealed, data, bytes);
  phx__manifest_checksum(sealed, bytes, digits);
  const int more = snprintf(sealed + bytes, 100, PHX__MANIFEST_BEFORE_SUM "%s" PHX__MANIFEST_AFTER_SUM, digits);
  phx_status status = phx__manifest_parse("fuzz", sealed, bytes + (size_t)more, &m, &err);
  free(sealed);
  CHECK(status == PHX_OK || ((status == PHX_IO || status == PHX_UNSUPPORTED) && strstr(err.message, "fuzz")));
  if (status) return 0;
  for (uint32_t u = 0; u < m->n_units; u++) {
    for (uint32_t f = 0; f < PHX_FLATS; f++) check_found(m, PHX_STATE_WEIGHT, 0, u, f);
    for (uint32_t i = 0; i < m->n_states; i++) check_found(m, PHX_STATE_OPTIM, i, u, PHX_FLAT_TRAINABLE);
  }
  CHECK(!phx__manifest_print("fuzz", m, &text, &n, &err));
  CHECK(!phx__manifest_parse("fuzz", text, n, &again, &err));
  CHECK(!phx__manifest_print("fuzz", again, &second, &n_second, &err));
  CHECK(n == n_second && !memcmp(text, second, n));
  phx__free(text);
  phx__free(second);
  phx__manifest_free(m);
  phx__manifest_free(again);
  return 0;
}
