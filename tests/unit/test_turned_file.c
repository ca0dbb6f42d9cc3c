/* A matrix that comes in odd parts and stands turned in a file: every element at its place, whatever the buffer holds
 * when it is written. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/status.h"
#include "checkpoint/turned_file.h"

enum { ROWS = 2100, COLUMNS = 1001, PLACE = 4096 }; /* more than the buffer's 2 Mi elements */

static float value(int64_t element) { return (float)(element % 1000003); }

/* Elements [from, to) in parts of `part`, over whatever is in the file. */
static void put(phx__turned_file *t, int64_t from, int64_t to, int64_t part) {
  static const int64_t shape[2] = {ROWS, COLUMNS};
  phx_error err = PHX_ERROR_INIT;
  float *data = malloc((size_t)part * sizeof *data);
  for (int64_t at = from; at < to; at += part) {
    const int64_t n = to - at < part ? to - at : part;
    for (int64_t i = 0; i < n; i++) data[i] = value(at + i);
    cr_assert_eq(phx__turned_write(t, shape, PLACE, at, n, data, &err), PHX_OK, "%s", err.message);
  }
  free(data);
}

static void check(int fd) {
  const size_t bytes = PLACE + (size_t)ROWS * COLUMNS * 4;
  const char *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
  cr_assert(map != MAP_FAILED);
  for (size_t i = 0; i < PLACE; i++) cr_assert_eq(map[i], 0, "byte %zu was written", i);
  const float *turned = (const float *)(const void *)(map + PLACE);
  for (int64_t r = 0; r < ROWS; r++)
    for (int64_t c = 0; c < COLUMNS; c++)
      cr_assert_eq(turned[c * ROWS + r], value(r * COLUMNS + c), "row %d, column %d", (int)r, (int)c);
  munmap((void *)(uintptr_t)map, bytes);
}

static void run(const int64_t (*parts)[3], int n) {
  phx_error err = PHX_ERROR_INIT;
  phx__turned_file t;
  const int fd = memfd_create("turned", MFD_CLOEXEC);
  cr_assert_eq(ftruncate(fd, PLACE + (off_t)ROWS * COLUMNS * 4), 0);
  cr_assert_eq(phx__turned_open(&t, fd, "turned", &err), PHX_OK);
  for (int i = 0; i < n; i++) put(&t, parts[i][0], parts[i][1], parts[i][2]);
  cr_assert_eq(phx__turned_flush(&t, &err), PHX_OK);
  phx__turned_close(&t);
  check(fd);
  close(fd);
}

Test(turned_file, every_element_is_at_its_place, .timeout = 60) {
  const int64_t all = (int64_t)ROWS * COLUMNS, middle = all / 3 + 17;
  run((const int64_t[][3]){{0, all, all}}, 1);
  run((const int64_t[][3]){{0, all, 262144}}, 1);
  run((const int64_t[][3]){{0, all, 65537}}, 1);
  run((const int64_t[][3]){{middle, all, 262144}, {0, middle, 10007}}, 2); /* as if two ranks had parts of a row */
  run((const int64_t[][3]){{500, 503, 1}, {503, 1400, 900}, {1400, all, all}, {0, 500, 1}}, 4); /* within a row */
}

Test(turned_file, a_failure_is_told, .timeout = 10) {
  static const int64_t shape[2] = {2, 2};
  static const float data[4] = {1, 2, 3, 4};
  phx_error err = PHX_ERROR_INIT;
  phx__turned_file t;
  const int fd = open("/dev/full", O_RDWR);
  cr_assert_eq(phx__turned_open(&t, fd, "full", &err), PHX_OK);
  phx_status status = phx__turned_write(&t, shape, 0, 0, 4, data, &err);
  if (!status) status = phx__turned_flush(&t, &err);
  cr_assert_eq(status, PHX_IO);
  phx__turned_close(&t);
  close(fd);
}
