/* phalanx data tokenize: what it writes, what it refuses, and that failures leave nothing. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "command/commands.h"
#include "engine/data.h"
#include "base/status.h"
#include "base/sys.h"
#include "temp_dir.h"

static temp_dir dir;
static char messages[4096]; /* stderr of the last command */
static void setup(void) { dir = temp_dir_make(); }
static void teardown(void) { temp_dir_remove(&dir); }
TestSuite(tokenize, .init = setup, .fini = teardown, .timeout = 60);

/* Runs `data ARGUMENTS...` (NULL ends them) with stderr kept in `messages` and stdout dropped. */
static int run(const char *const *arguments) {
  char *argv[32] = {(char *)(uintptr_t)"data"};
  int argc = 1;
  while (arguments[argc - 1]) argv[argc] = (char *)(uintptr_t)arguments[argc - 1], argc++;
  fflush(stdout), fflush(stderr);
  const int out = dup(1), err = dup(2), nothing = open("/dev/null", O_WRONLY), kept = memfd_create("stderr", 0);
  dup2(nothing, 1), dup2(kept, 2);
  const int status = phx__command_data(argc, argv);
  fflush(stdout), fflush(stderr);
  dup2(out, 1), dup2(err, 2);
  const ssize_t n = pread(kept, messages, sizeof messages - 1, 0);
  messages[n > 0 ? n : 0] = 0;
  close(out), close(err), close(nothing), close(kept);
  return status;
}
#define RUN(...) run((const char *const[]){"tokenize", __VA_ARGS__, NULL})

/* Tokens of a file, through the reader. */
static int64_t read_tokens(const char *path, int32_t *out) {
  phx__data *d = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__data_open(path, 1, 257, 1, &d, &err), PHX_OK, "%s", err.message);
  const int64_t n = phx__data_tokens(d);
  for (int64_t i = 0; i + 1 < n; i++)
    cr_assert_eq(phx__data_window(d, i, &out[i], &out[i + 1], &err), PHX_OK);
  phx__data_close(d);
  return n;
}

Test(tokenize, bytes_and_end_of_text_between_files) {
  const char *a = temp_dir_write(&dir, "a.txt", "He\xff", 3), *b = temp_dir_write(&dir, "b.txt", "\0o\n", 3);
  const char *out = temp_dir_path(&dir, "out.bin");
  cr_assert_eq(RUN(a, b, "-o", out), 0, "%s", messages);
  int32_t tokens[16];
  cr_assert_eq(read_tokens(out, tokens), 7);
  const int32_t expected[7] = {'H', 'e', 255, 256, 0, 'o', '\n'};
  cr_expect_arr_eq(tokens, expected, sizeof expected);
  cr_expect_eq(temp_dir_count(&dir), 3, "no temporary file stays");
}

Test(tokenize, a_part_goes_to_validation) {
  char text[200001];
  for (size_t i = 0; i < sizeof text; i++) text[i] = (char)('a' + i % 23);
  const char *a = temp_dir_write(&dir, "a.txt", text, sizeof text);
  const char *out = temp_dir_path(&dir, "out.bin"), *valid = temp_dir_path(&dir, "valid.bin");
  cr_assert_eq(RUN("--valid", "0.1", valid, "-o", out, a), 0, "%s", messages);
  int32_t *tokens = calloc(sizeof text, sizeof *tokens);
  cr_assert_eq(read_tokens(out, tokens), 180001);
  for (int i = 0; i < 180001; i++) cr_assert_eq(tokens[i], text[i]);
  cr_assert_eq(read_tokens(valid, tokens), 20000);
  for (int i = 0; i < 20000; i++) cr_assert_eq(tokens[i], text[180001 + i]);
  free(tokens);
}

Test(tokenize, files_are_not_overwritten_without_force) {
  const char *a = temp_dir_write(&dir, "a.txt", "text of the file", 16), *b = temp_dir_write(&dir, "b.txt", "abc", 3);
  const char *out = temp_dir_path(&dir, "out.bin"), *valid = temp_dir_write(&dir, "v.bin", "precious", 8);
  int32_t tokens[64];
  cr_assert_eq(RUN(a, "-o", out, "--valid", "0.2", valid), 2);
  cr_expect(strstr(messages, "v.bin exists"), "%s", messages);
  cr_expect_neq(access(out, F_OK), 0);
  cr_assert_eq(RUN(a, "-o", out), 0, "%s", messages);
  cr_assert_eq(RUN(b, "-o", out), 2);
  cr_expect(strstr(messages, "exists: choose another name, or give --force"), "%s", messages);
  cr_expect_eq(read_tokens(out, tokens), 16);
  cr_assert_eq(RUN(b, "-o", out, "--force"), 0, "%s", messages);
  cr_expect_eq(read_tokens(out, tokens), 3);
  cr_assert_eq(RUN(b, "-o", b, "--force"), 2);
  cr_expect(strstr(messages, "would be replaced"), "%s", messages);
  cr_assert_eq(RUN(b, "-o", dir.path, "--force"), 2);
  cr_expect(strstr(messages, "not a regular file"), "%s", messages);
  const char *twin = temp_dir_path(&dir, "twin.bin");
  cr_assert_eq(link(out, twin), 0);
  cr_assert_eq(RUN(a, "-o", out, "--valid", "0.5", twin, "--force"), 2);
  cr_expect(strstr(messages, "are the same file"), "%s", messages);
}

Test(tokenize, bad_arguments_are_refused) {
  const char *a = temp_dir_write(&dir, "a.txt", "some text", 9), *empty = temp_dir_write(&dir, "e.txt", "", 0);
  const char *out = temp_dir_path(&dir, "out.bin"), *v = temp_dir_path(&dir, "v.bin");
  char long_name[5000];
  memset(long_name, 'x', sizeof long_name - 1);
  long_name[sizeof long_name - 1] = 0;
  const struct {
    const char *arguments[9], *message;
  } cases[] = {
      {{NULL}, "what is to be done"},
      {{"tokenise", a}, "no command tokenise"},
      {{"tokenize"}, "no text file"},
      {{"tokenize", a}, "-o OUT.bin is missing"},
      {{"tokenize", a, "-o"}, "-o needs the name"},
      {{"tokenize", "-o", out}, "no text file"},
      {{"tokenize", a, "-o", out, "-o", v}, "-o is given twice"},
      {{"tokenize", a, "-o", out, "--vaild", "0.1", v}, "unknown option --vaild"},
      {{"tokenize", a, "-o", out, "--valid", "0.1"}, "--valid needs a fraction and"},
      {{"tokenize", a, "-o", out, "--valid", "1", v}, "between 0 and 1"},
      {{"tokenize", a, "-o", out, "--valid", "0", v}, "between 0 and 1"},
      {{"tokenize", a, "-o", out, "--valid", "nan", v}, "between 0 and 1"},
      {{"tokenize", a, "-o", out, "--valid", "0.1x", v}, "between 0 and 1"},
      {{"tokenize", a, "-o", out, "--valid", "0.5", out}, "name the same file"},
      {{"tokenize", a, "-o", out, "--valid", "0.1", v}, "9 for training and 0 for validation"},
      {{"tokenize", a, "-o", out, "--valid", "0.99", v}, "1 for training and 8 for validation"},
      {{"tokenize", empty, "-o", out}, "is empty"},
      {{"tokenize", a, empty, "-o", out}, "is empty"},
      {{"tokenize", dir.path, "-o", out}, "not a regular file"},
      {{"tokenize", "/nonexistent.txt", "-o", out}, "No such file"},
      {{"tokenize", a, "-o", "/nonexistent/out.bin"}, "cannot create /nonexistent/out.bin"},
      {{"tokenize", a, "-o", long_name}, "longer than 4064 characters"},
      {{"tokenize", a, "-o", "--force"}, "-o needs a value, and --force is an option"},
      {{"tokenize", a, "-o", out, "--valid", "--force", v}, "--valid needs a value, and --force is an option"},
      {{"tokenize", a, "-o", out, "--valid", "0.1", "--force"}, "--valid needs a value, and --force is an option"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    cr_expect_eq(run(cases[i].arguments), 2, "case %zu", i);
    cr_expect(strstr(messages, cases[i].message), "case %zu: %s", i, messages);
    cr_expect_eq(temp_dir_count(&dir), 2, "case %zu left a file", i);
  }
  cr_expect_eq(RUN("--help"), 0);
  cr_expect_eq(RUN("-o", out, "--", a), 0, "%s", messages);
}

Test(tokenize, what_is_no_text_is_refused) {
  static const struct {
    const char *bytes, *message;
    size_t n;
  } kinds[] = {{"\x1f\x8b\x08\0\0\0\0\0", "it is compressed by gzip; take the text out of it", 8},
               {"\x28\xb5\x2f\xfd\0\0\0\0", "it is compressed by zstd", 8},
               {"PK\x03\x04 and more", "it is a zip archive", 13},
               {"\x88\xd8\x34\x01\x01\0\0\0", "it is a token file already; name it in [data] train", 8}};
  const char *out = temp_dir_path(&dir, "out.bin");
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    const char *text = temp_dir_write(&dir, "text", kinds[i].bytes, kinds[i].n);
    cr_expect_eq(RUN(text, "-o", out), 2);
    cr_expect(strstr(messages, kinds[i].message), "no '%s' in %s", kinds[i].message, messages);
    cr_expect_eq(temp_dir_count(&dir), 1);
  }
}

static ssize_t full_write(int fd, const void *bytes, size_t n) {
  (void)fd, (void)bytes, (void)n;
  errno = ENOSPC;
  return -1;
}

Test(tokenize, a_full_disk_is_no_refusal) {
  const char *text = temp_dir_write(&dir, "a.txt", "some text", 9), *out = temp_dir_path(&dir, "out.bin");
  phx__sys.write = full_write;
  cr_expect_eq(RUN(text, "-o", out), 3);
  cr_expect(strstr(messages, "No space left on device"), "%s", messages);
  cr_expect_eq(temp_dir_count(&dir), 1);
}

Test(tokenize, more_tokens_than_the_format_counts_are_refused) {
  const char *big = temp_dir_write(&dir, "big.txt", "x", 1), *out = temp_dir_path(&dir, "out.bin");
  cr_assert_eq(truncate(big, (off_t)INT32_MAX + 1), 0); /* a hole */
  cr_expect_eq(RUN(big, "-o", out), 2);
  cr_expect(strstr(messages, "more than 2147483647 tokens"), "%s", messages);
  cr_expect_neq(access(out, F_OK), 0);
}

/* ---- every system call and allocation fails once ---- */
static int fail_at, calls;
static int fails(void) {
  const int yes = ++calls == fail_at;
  if (yes) errno = EIO;
  return yes;
}
static phx__sys_table real;
static void *f_calloc(size_t n, size_t bytes) { return fails() ? NULL : real.calloc(n, bytes); }
static int f_open(const char *p, int flags, mode_t mode) { return fails() ? -1 : real.open(p, flags, mode); }
static ssize_t f_read(int fd, void *b, size_t n) { return fails() ? -1 : real.read(fd, b, n > 5 ? 5 : n); }
static ssize_t f_write(int fd, const void *b, size_t n) { return fails() ? -1 : real.write(fd, b, n > 700 ? 700 : n); }
static int f_fsync(int fd) { return fails() ? -1 : real.fsync(fd); }
static int f_fstat(int fd, struct stat *out) { return fails() ? -1 : real.fstat(fd, out); }
static int f_rename(const char *from, const char *to) { return fails() ? -1 : real.rename(from, to); }
static int f_close(int fd) {
  real.close(fd);
  return fails() ? -1 : 0;
}

Test(tokenize, every_failure_is_reported_and_leaves_no_file) {
  const char *a = temp_dir_write(&dir, "a.txt", "some text", 9), *b = temp_dir_write(&dir, "b.txt", "more", 4);
  const char *out = temp_dir_path(&dir, "out.bin"), *valid = temp_dir_path(&dir, "v.bin");
  real = phx__sys;
  phx__sys.calloc = f_calloc, phx__sys.open = f_open, phx__sys.read = f_read, phx__sys.write = f_write;
  phx__sys.fsync = f_fsync, phx__sys.fstat = f_fstat, phx__sys.rename = f_rename, phx__sys.close = f_close;
  int failures = 0;
  for (fail_at = 1;; fail_at++) {
    calls = 0;
    const int status = RUN(a, b, "-o", out, "--valid", "0.3", valid);
    const int ended = calls < fail_at;
    if (status) {
      failures++;
      const int second_rename = strstr(messages, "the training file was made") != NULL;
      cr_expect_eq(temp_dir_count(&dir), second_rename ? 3 : 2, "call %d: %s", fail_at, messages);
      cr_expect(messages[0]);
    } else { /* closing a file that was only read may fail unnoticed */
      int32_t tokens[32];
      const phx__sys_table failing = phx__sys;
      phx__sys = real;
      cr_expect_eq(read_tokens(out, tokens) + read_tokens(valid, tokens + 16), 14);
      phx__sys = failing;
    }
    unlink(out), unlink(valid);
    if (ended) break;
  }
  phx__sys = real;
  cr_expect_geq(failures, 20);
}
