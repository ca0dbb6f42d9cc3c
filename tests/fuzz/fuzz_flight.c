/* Fuzz target: any bytes as the ranks' liveness pages, which a wild write of a rank can leave.
 *
 * Properties: the report and the name of a rank's call end, have a limit, and hold no control character but the ends of
 * lines.  Input: how many ranks, how each ended, then the pages.  With libFuzzer:
 *   build-clang/tests/fuzz_flight tests/fuzz/flight      The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/job/flight.h"
#include "../../core/base/sys.h"
#include "../../core/plugin/where.h"
#include "check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

enum { FLIGHT_RANKS = 3 };

static void check_readable(const char *text) {
  for (const unsigned char *c = (const unsigned char *)text; *c; c++) CHECK(*c == '\n' || (*c >= ' ' && *c != 127));
  CHECK(!strstr(text, "\xc2\x9b")); /* U+009B begins a sequence of a terminal */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static phx_liveness pages[FLIGHT_RANKS];
  phx__rank_end ends[FLIGHT_RANKS] = {{0}};
  if (bytes < 8) return 0;
  const int32_t size = 1 + data[0] % FLIGHT_RANKS;
  for (int r = 0; r < FLIGHT_RANKS; r++)
    ends[r] = (phx__rank_end){.pid = 100 + r, .condition = data[1 + r] % 6, .number = (int8_t)data[4 + r]};
  const int32_t first = (int32_t)(data[7] % (FLIGHT_RANKS + 1)) - 1;
  memset(pages, 0, sizeof pages);
  memcpy(pages, data + 8, bytes - 8 < sizeof pages ? bytes - 8 : sizeof pages);
  const phx__flight_report report = {.size = size, .ends = ends, .pages = pages, .now_ns = UINT64_C(5000000000),
                                     .cause = "a cause", .first_failed = first < size ? first : -1, .run_dir = "run"};
  char *text = phx__flight_text(&report);
  CHECK(text && strncmp(text, "phalanx: the job of ", 20) == 0 && strlen(text) < 64 * 1024);
  check_readable(text);
  phx__free(text);
  for (int r = 0; r < size; r++) {
    (void)phx__flight_is_in(&pages[r]);
    for (size_t room = 1; room < 160; room = room * 2 + 1) {
      char *where = malloc(room);
      const bool is_in = phx__where_text(&pages[r], where, room);
      CHECK(memchr(where, 0, room) && (is_in || !where[0]));
      check_readable(where);
      free(where);
    }
  }
  return 0;
}
