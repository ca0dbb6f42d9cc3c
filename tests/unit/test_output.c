/* Files that are whole or not there: every call of the writing fails once, and the name keeps what it held. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fault_turn.h"
#include "base/json.h"
#include "base/output.h"
#include "command/report.h"
#include "base/status.h"
#include "base/sys.h"
#include "temp_dir.h"

static temp_dir dir;
static phx__sys_table real;
static void setup(void) {
  dir = temp_dir_make();
  real = phx__sys;
}
static void teardown(void) {
  phx__sys = real;
  temp_dir_remove(&dir);
}
TestSuite(output, .init = setup, .fini = teardown, .timeout = 20);

static int refuse_open(const char *path, int flags, mode_t mode) {
  (void)path, (void)flags, (void)mode;
  errno = EACCES;
  return -1;
}
static ssize_t few_bytes(int fd, const void *p, size_t n) { return write(fd, p, n < 3 ? n : 3); }
static ssize_t full(int fd, const void *p, size_t n) {
  static size_t taken;
  if (taken < 6) return (ssize_t)(taken += (size_t)write(fd, p, n < 6 ? n : 6));
  errno = ENOSPC;
  return -1;
}
static int refuse_fsync(int fd) {
  (void)fd;
  errno = EIO;
  return -1;
}
static int refuse_close(int fd) {
  close(fd);
  errno = ENOSPC;
  return -1;
}
static int refuse_rename(const char *from, const char *to) {
  (void)from, (void)to;
  errno = EXDEV;
  return -1;
}

static void check_holds(const char *path, const char *text) {
  char got[64] = "";
  FILE *f = fopen(path, "r");
  cr_assert_not_null(f);
  got[fread(got, 1, sizeof got - 1, f)] = 0;
  fclose(f);
  cr_assert_str_eq(got, text);
  cr_assert_eq(temp_dir_count(&dir), 1);
}

Test(output, is_written_whole_in_short_writes) {
  const char *path = temp_dir_path(&dir, "a");
  phx__sys.write = few_bytes;
  cr_assert_eq(phx__text_write(path, "old and longer", NULL), PHX_OK);
  cr_assert_eq(phx__text_write(path, "new text", NULL), PHX_OK);
  check_holds(path, "new text");
}

static void expect_refused(const char *what, const char *message) {
  phx_error err = PHX_ERROR_INIT;
  const char *path = temp_dir_path(&dir, "a");
  cr_assert_eq(phx__text_write(path, "the new text", &err), PHX_IO, "%s", what);
  cr_assert(strstr(err.message, message), "%s: %s", what, err.message);
  phx__sys = real;
  check_holds(path, "old");
}

Test(output, a_failure_keeps_what_was_there) {
  cr_assert_eq(phx__text_write(temp_dir_path(&dir, "a"), "old", NULL), PHX_OK);
  phx__sys.open = refuse_open;
  expect_refused("open", "Permission denied");
  phx__sys.write = full;
  expect_refused("write", "No space left on device");
  phx__sys.fsync = refuse_fsync;
  expect_refused("fsync", "Input/output error");
  phx__sys.close = refuse_close;
  expect_refused("close", "No space left on device");
  phx__sys.rename = refuse_rename;
  expect_refused("rename", "cannot rename");
}

static int left;
static void *few_callocs(size_t n, size_t bytes) { return left-- > 0 ? calloc(n, bytes) : NULL; }

/* cJSON drops members it has no memory for, without a word: none of that may reach a file. */
/* The n-th call fails: the text is whole, or said to be lost. */
Test(output, a_text_in_memory_is_whole_or_lost) {
  fault_install();
  for (long turn = 1;; turn++) {
    phx__text text;
    fault_begin(FAULT_MEMORY, ENOMEM, turn);
    FILE *f = phx__text_stream(&text);
    for (int i = 0; f && i < 5000; i++) fprintf(f, "%04d\n", i);
    const int failed = f && fclose(f);
    fault_end();
    cr_assert_eq(fault.fired, !f || failed || text.failed);
    if (f && !text.failed) {
      cr_assert_eq(strlen(text.data), 25000);
      cr_assert_str_eq(text.data + 24995, "4999\n");
    }
    phx__free(text.data);
    if (!fault.fired) break;
  }
}

Test(output, a_file_is_read_whole_or_not) {
  static char long_text[200001];
  static const fault_kind kinds[] = {FAULT_READING, FAULT_SHORT, FAULT_MEMORY};
  char name[300];
  memset(long_text, 'x', sizeof long_text - 1);
  snprintf(name, sizeof name, "%s/text", dir.path);
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__text_write(name, long_text, &err), PHX_OK, "%s", err.message);
  fault_install();
  for (int k = 0; k < 3; k++)
    for (long turn = 1;; turn++) {
      fault_begin(kinds[k], EIO, turn);
      char *text = phx__file_text(name);
      fault_end();
      cr_assert_eq(text == NULL, fault.fired && kinds[k] != FAULT_SHORT, "%s", fault.call);
      if (text) cr_assert_str_eq(text, long_text);
      phx__free(text);
      if (!fault.fired) break;
    }
  for (long turn = 1;; turn++) {
    fault_begin(FAULT_READING, EIO, turn);
    const int64_t pss = phx__pss_bytes();
    fault_end();
    cr_assert_eq(pss > 0, !fault.fired, "%lld", (long long)pss);
    if (!fault.fired) break;
  }
}

Test(output, json_with_lost_members_is_refused) {
  const char *path = temp_dir_path(&dir, "a.json");
  int refused = 0;
  phx_error err = PHX_ERROR_INIT;
  phx_status status = PHX_NOMEM;
  for (int allowed = 0; status; allowed++) {
    cr_assert_lt(allowed, 50);
    left = allowed;
    phx__sys.calloc = few_callocs;
    phx__json_begin();
    cJSON *root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "one", 1);
    cJSON_AddStringToObject(root, "two", "2");
    status = phx__json_write(path, root, &err);
    cJSON_Delete(root);
    phx__sys = real;
    if (!status) break;
    refused++;
    cr_assert_eq(status, PHX_NOMEM);
    cr_assert(strstr(err.message, "no memory to write"));
    cr_assert_eq(temp_dir_count(&dir), 0, "something was written with %d allocations", allowed);
  }
  cr_assert_gt(refused, 5);
  check_holds(path, "{\n\t\"one\":\t1,\n\t\"two\":\t\"2\"\n}\n");
}
