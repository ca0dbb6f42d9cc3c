/* Files of tensors: every rule of the format, what is written, and checksums on the way. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/safetensors.h"
#include "base/status.h"
#include "base/sys.h"
#include "temp_dir.h"

static phx_status parse(const char *header, int64_t data_bytes, phx_error *err) {
  phx__safetensors *st = NULL;
  phx_status status = phx__safetensors_parse("x.safetensors", header, strlen(header), data_bytes, &st, err);
  phx__safetensors_close(st);
  return status;
}

#define T(name, rest) "\"" name "\":{\"dtype\":\"F32\"," rest "}"

Test(safetensors, every_rule_of_the_format) {
  static const struct {
    const char *header;
    int64_t data;
    const char *says; /* NULL: good */
  } cases[] = {
      {"{}", 0, NULL},
      {"{}   ", 0, NULL},
      {"{" T("a", "\"shape\":[2],\"data_offsets\":[0,8]") "}", 8, NULL},
      {"{" T("a", "\"shape\":[],\"data_offsets\":[0,4]") "}", 4, NULL},
      {"{" T("a", "\"shape\":[0,9],\"data_offsets\":[0,0]") "}", 0, NULL},
      {"{\"__metadata__\":{\"format\":\"pt\"}," T("a", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, NULL},
      {"{" T("b", "\"shape\":[1],\"data_offsets\":[4,8]") "," T("a", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 8,
       NULL},
      {" {}", 0, "begin with '{'"},
      {"[]", 0, "begin with '{'"},
      {"{\"a\":1}", 0, "tensor a"},
      {"{" T("a", "\"shape\":[2],\"data_offsets\":[0,4]") "}", 4, "its shape 8"},
      {"{" T("a", "\"shape\":[2],\"data_offsets\":[0,8]") "}", 4, "outside the file"},
      {"{" T("a", "\"shape\":[2],\"data_offsets\":[8,0]") "}", 8, "data_offsets are wrong"},
      {"{" T("a", "\"shape\":[2],\"data_offsets\":[0,8]") "}", 12, "4 bytes behind"},
      {"{" T("a", "\"shape\":[1],\"data_offsets\":[4,8]") "}", 8, "behind a hole"},
      {"{" T("a", "\"shape\":[2],\"data_offsets\":[0,8]") "," T("b", "\"shape\":[1],\"data_offsets\":[4,8]") "}", 8,
       "tensor b begins at byte"},
      {"{" T("a", "\"shape\":[1],\"data_offsets\":[0,4]") "," T("a", "\"shape\":[1],\"data_offsets\":[4,8]") "}", 8,
       "'a' stands twice"},
      {"{" T("a", "\"shape\":[1],\"data_offsets\":[0,4]") "," T("\\u0061", "\"shape\":[1],\"data_offsets\":[4,8]") "}",
       8, "'a' stands twice"},
      {"{" T("a", "\"shape\":[-1],\"data_offsets\":[0,4]") "}", 4, "dimension 0"},
      {"{" T("a", "\"shape\":[1.0],\"data_offsets\":[0,4]") "}", 4, "not an integer"},
      {"{" T("a", "\"shape\":[1e0],\"data_offsets\":[0,4]") "}", 4, "not an integer"},
      {"{" T("a", "\"shape\":[01],\"data_offsets\":[0,4]") "}", 4, "begins with 0"},
      {"{" T("a", "\"shape\":[9007199254740993],\"data_offsets\":[0,4]") "}", 4, "2^53"},
      {"{" T("a", "\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,0]") "}", 0, "overflows"},
      {"{" T("a", "\"shape\":[9007199254740992,512],\"data_offsets\":[0,0]") "}", 0, "overflows"},
      {"{" T("a", "\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]") "}", 4, "more than 8"},
      {"{" T("a", "\"shape\":[1],\"data_offsets\":[0,4],\"more\":1") "}", 4, "is not {dtype"},
      {"{" T("a", "\"shape\":[1],\"data_offsets\":[0,4,4]") "}", 4, "data_offsets are wrong"},
      {"{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "'F33'"},
      {"{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype"},
      {"{" T("", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "0 bytes"},
      {"{" T("a\\u0000b", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "zero character"},
      {"{" T("a\\u001bb", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "control character"},
      {"{" T("a\xff", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "UTF-8"},
      {"{" T("a\xc0\x80", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "UTF-8"},
      {"{" T("a\xed\xa0\x80", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "UTF-8"},
      {"{" T("a\\ud800", "\"shape\":[1],\"data_offsets\":[0,4]") "}", 4, "surrogate"},
      {"{\"__metadata__\":{\"x\":1}}", 0, "'x' is not a text"},
      {"{\"__metadata__\":7}", 0, "not an object"},
      {"{\"a\":[[[[[[1]]]]]]}", 0, "too many levels"},
      {"{}{}", 0, "follows"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}", 4, "does not end"},
      {"{,}", 0, "needs a name"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    phx_error err = PHX_ERROR_INIT;
    const phx_status status = parse(cases[i].header, cases[i].data, &err);
    if (!cases[i].says) {
      cr_expect_eq(status, PHX_OK, "%s: %s", cases[i].header, err.message);
      continue;
    }
    cr_expect_eq(status, PHX_IO, "%s was taken", cases[i].header);
    cr_expect(strstr(err.message, cases[i].says), "%s: said '%s', not '%s'", cases[i].header, err.message,
              cases[i].says);
    cr_expect(strstr(err.message, "x.safetensors"), "the file is not named: %s", err.message);
  }
}

static const phx__tensor wanted[3] = {
    {.name = "first \"quoted\" \xc3\xa9", .dtype = PHX_F32, .ndim = 2, .shape = {300, 1000}},
    {.name = "scalar", .dtype = PHX_F64, .ndim = 0},
    {.name = "half", .dtype = PHX_BF16, .ndim = 1, .shape = {700001}},
};

static uint64_t write_sample(const char *path, int order, uint64_t sums[8], int *n_sums) {
  phx_error err = PHX_ERROR_INIT;
  phx__safetensors_writer *w = NULL;
  cr_assert_eq(phx__safetensors_create(path, wanted, 3, (const char *const[]){"format", "pt", NULL}, true, &w, &err),
               PHX_OK, "%s", err.message);
  cr_assert_eq(w->tensors[0].begin % PHX__SAFETENSORS_ALIGN, 0);
  for (int k = 0; k < 3; k++) {
    const uint32_t t = (uint32_t)(order ? 2 - k : k);
    const int64_t bytes = w->tensors[t].bytes;
    unsigned char *data = malloc((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++) data[i] = (unsigned char)(i * 7 + i / 251 + t);
    for (int64_t at = 0; at < bytes; at += 65537)
      cr_assert_eq(phx__safetensors_write(w, t, at, bytes - at < 65537 ? bytes - at : 65537, data + at, &err), PHX_OK);
    free(data);
  }
  *n_sums = (int)phx__chunks_count(w->file.bytes);
  cr_assert_eq(phx__safetensors_finish(w, sums, &err), PHX_OK, "%s", err.message);
  phx__safetensors_writer_close(w);
  return 0;
}

Test(safetensors, what_is_written_is_read) {
  temp_dir dir = temp_dir_make();
  phx_error err = PHX_ERROR_INIT;
  for (int order = 0; order < 2; order++) { /* in order, and out of order: chunks are read back */
    const char *path = temp_dir_path(&dir, "a.safetensors");
    uint64_t sums[8];
    int n = 0;
    write_sample(path, order, sums, &n);
    cr_assert_eq(n, 3);
    phx__safetensors *st = NULL;
    cr_assert_eq(phx__safetensors_open(path, &st, &err), PHX_OK, "%s", err.message);
    cr_assert_eq(st->n, 3);
    cr_assert_str_eq(phx__safetensors_metadata(st, "format"), "pt");
    cr_assert_null(phx__safetensors_find(st, "other"));
    for (uint32_t t = 0; t < 3; t++) {
      const phx__tensor *found = phx__safetensors_find(st, wanted[t].name);
      cr_assert_not_null(found);
      cr_assert_eq(found->dtype, wanted[t].dtype);
      cr_assert_eq(found->ndim, wanted[t].ndim);
      unsigned char *data = malloc((size_t)found->bytes);
      cr_assert_eq(phx__safetensors_read(st, found, 0, found->bytes, data, &err), PHX_OK);
      for (int64_t i = 0; i < found->bytes; i++) cr_assert_eq(data[i], (unsigned char)(i * 7 + i / 251 + t));
      cr_assert_eq(phx__safetensors_read(st, found, found->bytes - 1, 2, data, &err), PHX_INTERNAL);
      free(data);
    }
    unsigned char *all = calloc(1, (size_t)st->file_bytes);
    cr_assert_eq(phx__file_read(st->fd, path, all, st->file_bytes, 0, &err), PHX_OK);
    for (int c = 0; c < n; c++) {
      const int64_t at = (int64_t)c << 20, left = st->file_bytes - at;
      cr_assert_eq(sums[c], phx__chunk_sum(all + at, (size_t)(left < 1 << 20 ? left : 1 << 20)), "chunk %d", c);
    }
    free(all);
    phx__safetensors_close(st);
  }
  temp_dir_remove(&dir);
}

Test(safetensors, a_gap_in_what_was_written_is_found) {
  temp_dir dir = temp_dir_make();
  phx_error err = PHX_ERROR_INIT;
  phx__safetensors_writer *w = NULL;
  uint64_t sums[8];
  char byte = 1;
  cr_assert_eq(phx__safetensors_create(temp_dir_path(&dir, "a"), wanted, 3, NULL, true, &w, &err), PHX_OK);
  cr_assert_eq(phx__safetensors_write(w, 0, 0, 1, &byte, &err), PHX_OK);
  cr_assert_eq(phx__safetensors_write(w, 0, 1200000, 1, &byte, &err), PHX_INTERNAL);
  cr_assert_eq(phx__safetensors_finish(w, sums, &err), PHX_INTERNAL);
  phx__safetensors_writer_close(w);
  temp_dir_remove(&dir);
}

Test(safetensors, tensors_that_cannot_be_written) {
  phx_error err = PHX_ERROR_INIT;
  const phx__tensor bad[] = {
      {.name = "", .dtype = PHX_F32},
      {.name = "__metadata__", .dtype = PHX_F32},
      {.name = "a", .dtype = 99},
      {.name = "a", .dtype = PHX_F32, .ndim = 1, .shape = {-1}},
      {.name = "a", .dtype = PHX_F32, .ndim = 2, .shape = {INT64_MAX / 2, 4}},
      {.name = "a", .dtype = PHX_F32, .ndim = 1, .shape = {INT64_MAX / 4}},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    phx__tensor one = bad[i];
    char *head = NULL;
    int64_t head_bytes, file_bytes;
    cr_expect_eq(phx__safetensors_layout("f", &one, 1, NULL, &head, &head_bytes, &file_bytes, &err), PHX_INVALID,
                 "tensor %zu was taken", i);
    cr_expect_null(head);
  }
}

/* ---- system calls and allocations that fail, each in its turn ---- */
static int64_t turn, calls;
static bool fails(void) { return ++calls == turn; }
static void *failing_calloc(size_t n, size_t bytes) { return fails() ? NULL : calloc(n, bytes); }
static void *failing_realloc(void *p, size_t bytes) { return fails() ? NULL : realloc(p, bytes); }
static ssize_t failing_pwrite(int fd, const void *p, size_t n, off_t at) {
  if (!fails()) return pwrite(fd, p, n > 1000 ? 1000 : n, at); /* and short writes always */
  errno = ENOSPC;
  return -1;
}
static int failing_fsync(int fd) {
  if (!fails()) return fsync(fd);
  errno = EIO;
  return -1;
}
static int failing_ftruncate(int fd, off_t n) {
  if (!fails()) return ftruncate(fd, n);
  errno = ENOSPC;
  return -1;
}

static phx_status write_small(const char *path, phx_error *err) {
  const phx__tensor one = {.name = "a", .dtype = PHX_F32, .ndim = 1, .shape = {500}};
  float data[500] = {0};
  uint64_t sum;
  phx__safetensors_writer *w = NULL;
  phx_status status = phx__safetensors_create(path, &one, 1, NULL, true, &w, err);
  if (!status) status = phx__safetensors_write(w, 0, 0, sizeof data, data, err);
  if (!status) status = phx__safetensors_finish(w, &sum, err);
  phx__safetensors_writer_close(w);
  return status;
}

Test(safetensors, every_failure_of_writing_is_an_error) {
  temp_dir dir = temp_dir_make();
  const char *path = temp_dir_path(&dir, "a");
  phx__sys_table saved = phx__sys;
  phx__sys.calloc = failing_calloc;
  phx__sys.realloc = failing_realloc;
  phx__sys.pwrite = failing_pwrite;
  phx__sys.fsync = failing_fsync;
  phx__sys.ftruncate = failing_ftruncate;
  int failed = 0;
  for (turn = 1; turn < 1000; turn++) {
    phx_error err = PHX_ERROR_INIT;
    calls = 0;
    const phx_status status = write_small(path, &err);
    if (calls < turn) {
      cr_assert_eq(status, PHX_OK, "%s", err.message);
      break;
    }
    cr_expect(status == PHX_NOMEM || status == PHX_IO, "failure %lld: status %d", (long long)turn, status);
    cr_expect(err.message[0]);
    failed++;
  }
  phx__sys = saved;
  cr_assert_gt(failed, 8);
  temp_dir_remove(&dir);
}

Test(safetensors, other_things_than_files, .timeout = 20) {
  temp_dir dir = temp_dir_make();
  phx_error err = PHX_ERROR_INIT;
  phx__safetensors *st = NULL;
  cr_assert_eq(phx__safetensors_open(dir.path, &st, &err), PHX_IO);
  cr_assert(strstr(err.message, "regular"), "%s", err.message);
  cr_assert_eq(phx__safetensors_open(temp_dir_path(&dir, "none"), &st, &err), PHX_IO);
  const char *pipe_path = temp_dir_path(&dir, "pipe");
  cr_assert_eq(mkfifo(pipe_path, 0600), 0);
  cr_assert_eq(phx__safetensors_open(pipe_path, &st, &err), PHX_IO); /* does not wait for a writer */
  cr_assert_eq(phx__safetensors_open(temp_dir_write(&dir, "short", "\1\0\0", 3), &st, &err), PHX_IO);
  cr_assert_eq(phx__safetensors_open(temp_dir_write(&dir, "huge", "\0\0\0\0\0\0\0\x80{}", 10), &st, &err), PHX_IO);
  cr_assert(strstr(err.message, "9223372036854775808"), "%s", err.message);
  temp_dir_remove(&dir);
}
