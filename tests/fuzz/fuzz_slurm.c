/* Fuzz target: any text as one of srun's lists.
 *
 * Properties: a number of tasks is what a plain expansion of the list gives, node by node, and nothing else is
 * accepted; a machine's name is printable, without brackets and commas, and fits.  With libFuzzer:
 *   build-clang/tests/fuzz_slurm tests/fuzz/slurm        The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/base/slurm_list.h"
#include "check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

enum { SLURM_NODES = 40, SLURM_MOST = 64 };

/* The list as numbers, one a node, as far as it follows the grammar; those of a piece that does not are 0. */
static void expand(const char *list, int tasks[SLURM_NODES]) {
  int n = 0;
  memset(tasks, 0, SLURM_NODES * sizeof *tasks);
  while (n < SLURM_NODES) {
    char piece[64], form[64];
    unsigned long each = 0, times = 1;
    const size_t length = strcspn(list, ",");
    if (length == 0 || length >= sizeof piece - 1) return;
    memcpy(piece, list, length);
    piece[length] = 0;
    if (strspn(piece, "0123456789()x") != length) return;
    const int got = sscanf(piece, "%lu(x%lu)", &each, &times);
    snprintf(form, sizeof form, got == 2 ? "%lu(x%lu)" : "%lu", each, times);
    if (got < 1 || (got == 2 && times < 1) || strcmp(form, piece) != 0) return;
    for (unsigned long i = 0; i < times && n < SLURM_NODES; i++) tasks[n++] = each <= SLURM_MOST ? (int)each : 0;
    list += length;
    if (*list++ != ',') return;
  }
}

static int is_plain(const char *text) { /* no leading zeros and no long numbers: where the expansion above is right */
  for (const char *c = text; *c; c++)
    if (*c == '0' && (c == text || c[-1] < '0' || c[-1] > '9')) return 0;
  size_t digits = 0;
  for (const char *c = text; *c; c++) {
    digits = *c >= '0' && *c <= '9' ? digits + 1 : 0;
    if (digits > 8) return 0;
  }
  return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  char list[301], host[32], longer[301];
  int expected[SLURM_NODES];
  if (bytes > 300) bytes = 300;
  memcpy(list, data, bytes);
  list[bytes] = 0;
  expand(list, expected);
  for (int32_t node = 0; node < SLURM_NODES; node++) {
    const int32_t got = phx__slurm_tasks(list, node, SLURM_MOST);
    CHECK(got >= 0 && got <= SLURM_MOST);
    if (is_plain(list)) CHECK(got == expected[node]);
  }
  CHECK(phx__slurm_tasks(list, INT32_MAX, SLURM_MOST) >= 0);
  const bool is_long = phx__slurm_first_host(list, longer, sizeof longer);
  const bool is_short = phx__slurm_first_host(list, host, sizeof host);
  if (is_short) CHECK(is_long && strcmp(host, longer) == 0 && strlen(host) < 32);
  if (is_long && strlen(longer) < 32) CHECK(is_short);
  if (!is_long) return 0;
  CHECK(longer[0] && strcspn(longer, "[], \t\n") == strlen(longer));
  if (!strpbrk(list, "[")) CHECK(strncmp(list, longer, strlen(longer)) == 0);
  return 0;
}
