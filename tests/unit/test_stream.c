/* core/checkpoint/stream.c against plain reads and writes: any order, odd ends, refusals of direct I/O, failures in
 * the thread. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/safetensors.h"
#include "base/sys.h"
#include "temp_dir.h"

enum { ODD = 9 * PHX__STREAM_CHUNK + 12345 }; /* more chunks than buffers */

static temp_dir dir;
static unsigned char *wanted;
static phx__stream_file file;
static phx__stream *stream;
static phx_error err;
static phx__sys_table saved;
static atomic_int calls;
static int turn;

static void setup(void) {
  dir = temp_dir_make();
  wanted = malloc(ODD);
  for (int i = 0; i < ODD; i++) wanted[i] = (unsigned char)(i * 2654435761u >> 13);
  file = (phx__stream_file){.path = (char *)(uintptr_t)temp_dir_path(&dir, "f"), .bytes = ODD};
  file.fd = open(file.path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  err = (phx_error){.struct_size = sizeof err};
  saved = phx__sys;
  atomic_store(&calls, 0);
}
static void teardown(void) {
  phx__sys = saved;
  close(file.fd);
  free(wanted);
  temp_dir_remove(&dir);
}
TestSuite(stream, .init = setup, .fini = teardown, .timeout = 60);

static int refused(int fd, int on) {
  (void)fd;
  errno = EINVAL;
  return on ? -1 : 0;
}
static ssize_t refused_write(int fd, const void *p, size_t n,
                             off_t at) { /* accepts O_DIRECT, and then does not write */
  if (atomic_fetch_add(&calls, 1) != 1) return pwrite(fd, p, n, at);
  errno = EINVAL;
  return -1;
}
static ssize_t short_write(int fd, const void *p, size_t n, off_t at) {
  return pwrite(fd, p, n > 8192 && atomic_fetch_add(&calls, 1) % 2 ? 8192 : n, at);
}
static ssize_t failing_write(int fd, const void *p, size_t n, off_t at) {
  if (atomic_fetch_add(&calls, 1) != turn) return pwrite(fd, p, n, at);
  errno = ENOSPC;
  return -1;
}
static ssize_t failing_read(int fd, void *p, size_t n, off_t at) {
  if (at != 5 * PHX__STREAM_CHUNK) return pread(fd, p, n, at);
  errno = EIO;
  return -1;
}

static void begin(int threads) {
  phx__stream_direct(&file);
  cr_assert_eq(phx__stream_create(ODD, threads, &stream, &err), PHX_OK);
}

static phx_status put(int64_t from, int64_t to) {
  return phx__stream_write(stream, &file, wanted + from, to - from, from, &err);
}

static void check_file(void) {
  unsigned char *got = malloc(ODD);
  cr_assert_eq(lseek(file.fd, 0, SEEK_END), ODD);
  for (int64_t at = 0; at < ODD;) {
    const ssize_t n = pread(file.fd, got + at, (size_t)(ODD - at), at);
    cr_assert_gt(n, 0);
    at += n;
  }
  cr_assert_eq(memcmp(got, wanted, ODD), 0);
  free(got);
}

static void write_all(void) {
  static const int64_t pieces[] = {7, 4096, 333, PHX__STREAM_CHUNK, 3 * PHX__STREAM_CHUNK - 5};
  int64_t at = 0;
  for (int i = 0; at < ODD; i++) {
    const int64_t end = at + pieces[i % 5] < ODD ? at + pieces[i % 5] : ODD;
    cr_assert_eq(put(at, end), PHX_OK, "%s", err.message);
    at = end;
  }
  cr_assert_eq(phx__stream_drain(stream, &file, &err), PHX_OK, "%s", err.message);
  phx__stream_destroy(stream);
  check_file();
}

Test(stream, writes_in_order) {
  begin(1);
  write_all();
}

Test(stream, writes_in_any_order) {
  enum { PIECE = 700001 };
  begin(1);
  for (int64_t k = 0; k < 14; k++) { /* 14 pieces of an odd length, every third first */
    const int64_t at = k * 3 % 14 * PIECE, end = at + PIECE < ODD ? at + PIECE : ODD;
    if (at < end) cr_assert_eq(put(at, end), PHX_OK, "%s", err.message);
  }
  cr_assert_eq(phx__stream_drain(stream, &file, &err), PHX_OK, "%s", err.message);
  phx__stream_destroy(stream);
  check_file();
}

Test(stream, without_direct_io) {
  phx__sys.direct = refused;
  begin(1);
  cr_assert_not(file.direct);
  write_all();
}
Test(stream, direct_io_refused_at_the_write) {
  phx__sys.pwrite = refused_write;
  begin(1);
  write_all();
}
Test(stream, short_writes) {
  phx__sys.pwrite = short_write;
  begin(1);
  write_all();
}

Test(stream, a_failed_write_is_told_and_nothing_follows) {
  for (turn = 0; turn < 10; turn++) {
    atomic_store(&calls, 0);
    phx__sys.pwrite = failing_write;
    begin(1);
    phx_status status = PHX_OK;
    for (int64_t at = 0; at < ODD && !status; at += 4096) status = put(at, at + 4096 < ODD ? at + 4096 : ODD);
    cr_assert_eq(phx__stream_drain(stream, &file, &err), PHX_IO, "call %d", turn);
    cr_assert(strstr(err.message, file.path) && strstr(err.message, "No space left"), "%s", err.message);
    cr_assert_leq(atomic_load(&calls), turn + 1, "it goes on after a failure");
    phx__stream_destroy(stream);
    phx__sys = saved;
  }
}

static const unsigned char *place; /* of the last chunk */

static void check_chunk(int64_t chunk, int64_t last) {
  const int64_t at = chunk * PHX__STREAM_CHUNK, left = ODD - at;
  const size_t bytes = (size_t)(left < PHX__STREAM_CHUNK ? left : PHX__STREAM_CHUNK);
  phx__stream_data data;
  cr_assert_eq(phx__stream_chunk(stream, &file, chunk, last, &data, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(memcmp(data.bytes, wanted + at, bytes), 0);
  cr_assert_eq(data.sum, phx__chunk_sum(wanted + at, bytes));
  place = data.bytes;
}

static void read_all(void) {
  uint32_t random = 1;
  for (int64_t c = 0; c <= 9; c++) check_chunk(c, 9);
  for (int i = 0; i < 60; i++) {
    random = random * 1664525u + 1013904223u;
    const int64_t c = (random >> 16) % 10;
    check_chunk(c, c + (random >> 8) % 6);
  }
}

Test(stream, reads_in_order_and_out_of_it) {
  cr_assert_eq(pwrite(file.fd, wanted, ODD, 0), ODD);
  begin(PHX__STREAM_READERS);
  read_all();
  phx__stream_destroy(stream);
  saved.direct(file.fd, 0);
  phx__sys.direct = refused;
  begin(PHX__STREAM_READERS);
  read_all();
  phx__stream_forget(stream, &file);
  check_chunk(3, 9);
  phx__stream_destroy(stream); /* with others on their way */
}

/* Whole chunks of [at, at + bytes) come to their place, others and what is not aligned to a buffer. */
Test(stream, reads_to_their_place) {
  enum { AT = PHX__STREAM_CHUNK / 2 / 4096 * 4096 + 4096, BYTES = 6 * PHX__STREAM_CHUNK };
  unsigned char *memory = aligned_alloc(4096, BYTES + 8192);
  cr_assert(memory && pwrite(file.fd, wanted, ODD, 0) == ODD);
  begin(PHX__STREAM_READERS);
  for (int off = 0; off < 2; off++) {
    unsigned char *to = memory + 4096 + off * 256;
    memset(memory, 0xa5, BYTES + 8192);
    file.into.at = AT;
    file.into.bytes = BYTES;
    file.into.to = to;
    for (int64_t c = 0; c <= 9; c++) {
      check_chunk(c, 9);
      const int64_t ahead = c * PHX__STREAM_CHUNK - AT;
      const bool whole = ahead >= 0 && ahead + PHX__STREAM_CHUNK <= BYTES;
      cr_assert_eq(place == to + ahead, whole && !off, "chunk %d", (int)c);
    }
    for (int64_t i = -4096; i < BYTES + 3584; i++)
      if (off || i < PHX__STREAM_CHUNK - AT || i >= 6 * PHX__STREAM_CHUNK - AT)
        cr_assert_eq(to[i], 0xa5, "byte %d", (int)i);
    check_chunk(3, 3);
    memset(memory, 0x5a, BYTES + 8192); /* given out once: after another chunk it is read again */
    check_chunk(9, 9);
    check_chunk(3, 9);
    phx__stream_leave(stream, &file); /* with others on their way */
    memset(memory, 0x5a, BYTES + 8192);
    file.into.to = NULL;
    for (int64_t c = 2; c < 6; c++) check_chunk(c, 9);
  }
  phx__stream_destroy(stream);
  free(memory);
}

Test(stream, a_failed_read_is_of_its_chunk_only) {
  phx__stream_data data;
  cr_assert_eq(pwrite(file.fd, wanted, ODD, 0), ODD);
  phx__sys.pread = failing_read;
  begin(PHX__STREAM_READERS);
  for (int64_t c = 0; c < 5; c++) check_chunk(c, 9);
  cr_assert_eq(phx__stream_chunk(stream, &file, 5, 9, &data, &err), PHX_IO);
  cr_assert(strstr(err.message, "Input/output error"), "%s", err.message);
  for (int64_t c = 6; c < 10; c++) check_chunk(c, 9);
  phx__sys = saved;
  check_chunk(5, 5);
  cr_assert_eq(ftruncate(file.fd, 2 * PHX__STREAM_CHUNK), 0);
  phx__stream_forget(stream, &file);
  cr_assert_eq(phx__stream_chunk(stream, &file, 4, 4, &data, &err), PHX_IO);
  cr_assert(strstr(err.message, "too early"), "%s", err.message);
  phx__stream_destroy(stream);
}
