/* Token files: formats, bad files, the order, batches, files that change under a run, and a long reading. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include "command/run_data.h"
#include "engine/data.h"
#include "base/status.h"
#include "base/sys.h"
#include "temp_dir.h"

static temp_dir dir;
static void setup(void) { dir = temp_dir_make(); }
static void teardown(void) { temp_dir_remove(&dir); }
TestSuite(data, .init = setup, .fini = teardown, .timeout = 60);

/* Tokens base, base + 1, ... modulo 251. */
static const char *raw_file(const char *name, int64_t n, int64_t base) {
  uint16_t *t = calloc((size_t)n + 1, sizeof *t);
  for (int64_t i = 0; i < n; i++) t[i] = (uint16_t)((base + i) % 251);
  const char *path = temp_dir_write(&dir, name, t, (size_t)n * 2);
  free(t);
  return path;
}

/* llm.c's format; `announced` tokens in the header, n behind it. */
static const char *llmc_file(const char *name, int32_t magic, int32_t version, int32_t announced, int64_t n) {
  unsigned char *bytes = calloc(1, 1024 + 2 * (size_t)n + 1);
  const int32_t head[3] = {magic, version, announced};
  memcpy(bytes, head, sizeof head);
  for (int64_t i = 0; i < n; i++) bytes[1024 + 2 * i] = (unsigned char)(i % 251);
  const char *path = temp_dir_write(&dir, name, bytes, 1024 + 2 * (size_t)n);
  free(bytes);
  return path;
}

Test(data, both_formats_are_read) {
  const char *files[] = {raw_file("a.bin", 101, 0), llmc_file("b.bin", PHX__TOKENS_MAGIC, 1, 101, 101)};
  for (int k = 0; k < 2; k++) {
    phx__data *d = NULL;
    phx_error err = PHX_ERROR_INIT;
    cr_assert_eq(phx__data_open(files[k], 20, 257, 1, &d, &err), PHX_OK, "%s", err.message);
    cr_expect_eq(phx__data_tokens(d), 101);
    cr_expect_eq(phx__data_windows(d), 5);
    int32_t tokens[20], targets[20];
    for (int64_t window = 1; window < 5; window++) {
      cr_assert_eq(phx__data_window(d, window, tokens, targets, &err), PHX_OK, "%s", err.message);
      for (int i = 0; i < 20; i++) {
        cr_expect_eq(tokens[i], 20 * window + i);
        cr_expect_eq(targets[i], 20 * window + i + 1);
      }
    }
    cr_expect_eq(phx__data_window(d, 5, tokens, targets, &err), PHX_INVALID);
    cr_expect_eq(phx__data_window(d, -1, tokens, targets, &err), PHX_INVALID);
    cr_expect_eq(targets[19], 100);
    phx__data_close(d);
  }
}

static void refused(const char *path, int64_t sequence, int64_t vocabulary, const char *message) {
  phx__data *d = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_expect_neq(phx__data_open(path, sequence, vocabulary, 1, &d, &err), PHX_OK, "%s was taken", path);
  cr_expect_null(d);
  cr_expect(strstr(err.message, message), "'%s' lacks '%s'", err.message, message);
  cr_expect(strstr(err.message, strrchr(path, '/') + 1) || strchr(path, '*'), "no name: %s", err.message);
}

Test(data, bad_files_are_refused) {
  unsigned char odd[1001] = {0};
  refused(temp_dir_path(&dir, "absent.bin"), 8, 257, "there is no file");
  refused(temp_dir_path(&dir, "*.nothing"), 8, 257, "there is no file");
  refused(temp_dir_write(&dir, "empty.bin", "", 0), 8, 257, "is empty");
  refused(temp_dir_write(&dir, "odd.bin", odd, sizeof odd), 8, 257, "1001 bytes are not a whole number");
  refused(temp_dir_write(&dir, "one.bin", odd, 1), 8, 257, "not a whole number");
  refused(llmc_file("magic.bin", 20240521, 1, 100, 100), 8, 257, "wrong magic 20240521");
  refused(llmc_file("llama.bin", 20240801, 7, 100, 200), 8, 257, "Llama 3");
  refused(llmc_file("swapped.bin", (int32_t)__builtin_bswap32(PHX__TOKENS_MAGIC), 1 << 24, 100, 100), 8, 257,
          "other byte order");
  refused(llmc_file("version.bin", PHX__TOKENS_MAGIC, 2, 100, 100), 8, 257, "version 2");
  refused(llmc_file("short.bin", PHX__TOKENS_MAGIC, 1, 101, 100), 8, 257,
          "1226 bytes, but it has 1224: it is truncated");
  refused(llmc_file("long.bin", PHX__TOKENS_MAGIC, 1, 99, 100), 8, 257, "too long");
  refused(llmc_file("negative.bin", PHX__TOKENS_MAGIC, 1, -1, 100), 8, 257, "announces -1 tokens");
  refused(llmc_file("none.bin", PHX__TOKENS_MAGIC, 1, 0, 0), 8, 257, "has 0 tokens");
  refused(temp_dir_write(&dir, "head.bin", (const int32_t[4]){PHX__TOKENS_MAGIC, 1, 100}, 16), 8, 257, "truncated");
  refused(raw_file("few.bin", 20, 0), 20, 257, "has 20 tokens, one sample of sequence = 20 needs 21");
  refused(raw_file("vocab.bin", 300, 0), 8, 250,
          "token 250 at position 250 (byte 500) is not below the vocabulary of 250");
  refused(llmc_file("vocab2.bin", PHX__TOKENS_MAGIC, 1, 300, 300), 8, 250, "token 250 at position 250 (byte 1524)");
  refused(dir.path, 8, 257, "not a regular file");
}

Test(data, the_last_token_is_checked_too) {
  uint16_t *t = calloc(200001, sizeof *t);
  t[200000] = 257;
  const char *path = temp_dir_write(&dir, "late.bin", t, 400002);
  refused(path, 8, 257, "token 257 at position 200000");
  phx__data *d = NULL;
  cr_assert_eq(phx__data_open(path, 8, 258, 1, &d, NULL), PHX_OK);
  phx__data_close(d);
  free(t);
}

Test(data, arguments_are_checked) {
  phx__data *d = NULL;
  phx_error err = PHX_ERROR_INIT;
  const char *path = raw_file("a.bin", 100, 0);
  cr_expect_eq(phx__data_open(path, 0, 257, 1, &d, &err), PHX_INVALID);
  cr_expect_eq(phx__data_open(path, 8, 0, 1, &d, &err), PHX_INVALID);
  cr_expect_eq(phx__data_open(path, INT64_MAX, 257, 1, &d, &err), PHX_INVALID);
  phx__data_close(NULL);
}

Test(data, a_glob_is_sorted_and_windows_stay_inside_files) {
  raw_file("s_10.bin", 25, 100);
  raw_file("s_02.bin", 31, 200);
  raw_file("other.bin", 400, 0);
  raw_file("s_01.bin", 21, 0);
  phx__data *d = NULL;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__data_open(temp_dir_path(&dir, "s_*.bin"), 10, 257, 1, &d, &err), PHX_OK, "%s", err.message);
  cr_expect_eq(phx__data_files(d), 3);
  cr_expect_eq(phx__data_windows(d), 2 + 3 + 2);
  const int32_t expected[7] = {0, 10, 200, 210, 220, 100, 110};
  for (int64_t i = 0; i < 7; i++) {
    int32_t tokens[10], targets[10];
    cr_assert_eq(phx__data_window(d, i, tokens, targets, &err), PHX_OK);
    for (int k = 0; k < 10; k++) {
      cr_expect_eq(tokens[k], (expected[i] + k) % 251);
      cr_expect_eq(targets[k], (expected[i] + k + 1) % 251);
    }
  }
  phx__data_close(d);
}

Test(data, a_file_with_glob_characters_is_found) {
  raw_file("a1.bin", 50, 7);
  const char *path = raw_file("a[1].bin", 100, 0);
  phx__data *d = NULL;
  cr_assert_eq(phx__data_open(path, 10, 257, 1, &d, NULL), PHX_OK);
  cr_expect_eq(phx__data_tokens(d), 100);
  phx__data_close(d);
}

Test(data, each_epoch_is_a_permutation_of_its_own) {
  const int64_t sizes[] = {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000};
  for (size_t n = 0; n < sizeof sizes / sizeof sizes[0]; n++) {
    phx__data *d = NULL, *other = NULL;
    const char *path = raw_file("a.bin", sizes[n] * 2 + 1, 0);
    cr_assert_eq(phx__data_open(path, 2, 257, 42, &d, NULL), PHX_OK);
    cr_assert_eq(phx__data_open(path, 2, 257, 43, &other, NULL), PHX_OK);
    cr_assert_eq(phx__data_windows(d), sizes[n]);
    int64_t same_epoch = 0, same_seed = 0, in_place = 0;
    for (int64_t epoch = 0; epoch < 3; epoch++) {
      unsigned char seen[1000] = {0};
      for (int64_t i = 0; i < sizes[n]; i++) {
        const int64_t w = phx__data_order(d, epoch, i);
        cr_assert(w >= 0 && w < sizes[n]);
        cr_assert(!seen[w], "window %d twice in epoch %d of %d", (int)w, (int)epoch, (int)sizes[n]);
        seen[w] = 1;
        in_place += w == i;
        same_epoch += w == phx__data_order(d, epoch + 1, i);
        same_seed += w == phx__data_order(other, epoch, i);
      }
    }
    if (sizes[n] == 1000) { /* about one in a thousand agrees by chance: 3 of 3000 */
      cr_expect_leq(in_place, 15);
      cr_expect_leq(same_epoch, 15);
      cr_expect_leq(same_seed, 15);
    }
    phx__data_close(other);
    phx__data_close(d);
  }
}

/* First tokens of the samples of one step, as (ranks x accumulate) read them, sorted. */
static int compare_ints(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }
static void step_samples(const phx__data *d, int64_t first, int32_t ranks, int32_t accumulate, int64_t micro,
                         int32_t *out) {
  int32_t tokens[64], targets[64];
  int64_t n = 0;
  for (int32_t m = 0; m < accumulate; m++)
    for (int32_t r = 0; r < ranks; r++) {
      phx_error err = PHX_ERROR_INIT;
      cr_assert_eq(phx__data_batch(d, first, m, accumulate, r, ranks, micro, tokens, targets, &err), PHX_OK, "%s",
                   err.message);
      for (int64_t i = 0; i < micro; i++) {
        cr_assert_eq(targets[i * 3], tokens[i * 3 + 1]);
        out[n++] = tokens[i * 3];
      }
    }
  qsort(out, (size_t)n, sizeof *out, compare_ints);
}

Test(data, a_step_is_the_same_samples_however_it_is_divided) {
  phx__data *d = NULL;
  const char *path = raw_file("a.bin", 3 * 83 + 1, 0); /* 83 windows with 83 different first tokens */
  cr_assert_eq(phx__data_open(path, 3, 257, 9, &d, NULL), PHX_OK);
  const struct {
    int32_t ranks, accumulate;
    int64_t micro;
  } ways[] = {{1, 1, 12}, {12, 1, 1}, {1, 12, 1}, {3, 2, 2}, {2, 3, 2}, {4, 1, 3}, {6, 2, 1}};
  int seen[257] = {0};
  for (int64_t step = 0; step < 14; step++) {
    int32_t first[12], other[12];
    step_samples(d, 12 * step, 1, 1, 12, first);
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
      step_samples(d, 12 * step, ways[w].ranks, ways[w].accumulate, ways[w].micro, other);
      cr_assert_arr_eq(first, other, sizeof first);
    }
    for (int i = 0; i < 12 && step * 12 + i < 83; i++) seen[first[i]] += step < 6;
    if (step == 6) /* 72 samples so far, all different */
      for (int v = 0, total = 0; v < 257; v++) {
        cr_assert_leq(seen[v], 1);
        total += seen[v];
        if (v == 256) cr_assert_eq(total, 72);
      }
  }
  phx__data_close(d);
}

/* Two ranks, three, two again: samples go on where they stood, though no batch before divides them. */
Test(data, another_batch_size_reads_nothing_twice_and_leaves_nothing_out) {
  phx__data *d = NULL;
  const struct {
    int64_t steps;
    int32_t ranks;
  } parts[] = {{3, 2}, {4, 3}, {5, 2}};
  int32_t got[12], order[56];
  int64_t first = 0;
  cr_assert_eq(phx__data_open(raw_file("a.bin", 3 * 83 + 1, 0), 3, 257, 9, &d, NULL), PHX_OK);
  for (int i = 0; i < 56; i++) step_samples(d, i, 1, 1, 1, &order[i]);
  for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++)
    for (int64_t s = 0; s < parts[p].steps; s++) {
      const int32_t n = 2 * parts[p].ranks;
      int32_t wanted[12];
      step_samples(d, first, parts[p].ranks, 1, 2, got);
      memcpy(wanted, order + first, (size_t)n * sizeof *wanted);
      qsort(wanted, (size_t)n, sizeof *wanted, compare_ints);
      cr_assert_arr_eq(got, wanted, (size_t)n * sizeof *got, "from sample %lld", (long long)first);
      first += n;
    }
  cr_assert_eq(first, 12 + 24 + 20);
  phx__data_close(d);
}

Test(data, too_little_for_a_step_is_refused_with_the_arithmetic) {
  phx__data *d = NULL;
  phx_error err = PHX_ERROR_INIT;
  int32_t tokens[64], targets[64];
  cr_assert_eq(phx__data_open(raw_file("a.bin", 101, 0), 10, 257, 9, &d, NULL), PHX_OK);
  cr_expect_eq(phx__data_check_batch(d, 5, 1, 2, &err), PHX_OK);
  cr_expect_eq(phx__data_check_batch(d, 4, 3, 1, &err), PHX_INVALID);
  cr_expect(
      strstr(err.message, "micro 4 x accumulate 3 x ranks 1 = 12 samples, but 101 tokens in 1 file(s) make only 10"),
      "%s", err.message);
  cr_expect_eq(phx__data_batch(d, 0, 0, 3, 0, 1, 4, tokens, targets, &err), PHX_INVALID);
  cr_expect_eq(phx__data_check_batch(d, INT64_MAX, 3, 2, &err), PHX_INVALID);
  cr_expect_eq(phx__data_check_batch(d, 0, 1, 1, &err), PHX_INVALID);
  cr_expect_eq(phx__data_batch(d, INT64_MAX, 0, 1, 0, 2, 2, tokens, targets, &err), PHX_INTERNAL);
  cr_expect_eq(phx__data_batch(d, 0, 1, 1, 0, 2, 2, tokens, targets, &err), PHX_INTERNAL);
  cr_expect_eq(phx__data_batch(d, 0, 0, 1, 2, 2, 2, tokens, targets, &err), PHX_INTERNAL);
  cr_expect_eq(phx__data_batch(d, -1, 0, 1, 0, 2, 2, tokens, targets, &err), PHX_INTERNAL);
  phx__data_close(d);
}

static void unreadable(const phx__data *d, int64_t window, const char *message) {
  phx_error err = PHX_ERROR_INIT;
  int32_t tokens[16], targets[16];
  cr_expect_eq(phx__data_window(d, window, tokens, targets, &err), PHX_IO);
  cr_expect(strstr(err.message, message), "no '%s' in: %s", message, err.message);
}

Test(data, a_file_that_changes_under_a_run_is_an_error) {
  phx__data *d = NULL;
  struct stat was;
  const char *path = raw_file("a.bin", 101, 0);
  cr_assert_eq(stat(path, &was), 0);
  cr_assert_eq(phx__data_open(path, 10, 257, 9, &d, NULL), PHX_OK);
  cr_assert_eq(truncate(path, 150), 0);
  unreadable(d, 0, "a.bin is not as it was when the run opened it: it was written to (150 bytes now, 202 then)");
  uint16_t bad[101];
  memset(bad, 0xff, sizeof bad);
  temp_dir_write(&dir, "a.bin", bad, sizeof bad);
  cr_assert_eq(utimensat(AT_FDCWD, path, (struct timespec[2]){was.st_atim, was.st_mtim}, 0), 0);
  unreadable(d, 0, "token 65535 at position 0"); /* within a tick of the clock */
  phx__data_close(d);
}

/* A long list of files takes few descriptors, and a file that is opened again must be the same. */
Test(data, many_files_are_open_one_after_the_other) {
  enum { SHARDS = 1500, TOKENS = 21 };
  const struct rlimit few = {256, 256};
  phx__data *d = NULL;
  phx_error err = PHX_ERROR_INIT;
  char name[24];
  for (int i = 0; i < SHARDS; i++) {
    snprintf(name, sizeof name, "s_%04d.bin", i);
    raw_file(name, TOKENS, i);
  }
  cr_assert_eq(setrlimit(RLIMIT_NOFILE, &few), 0);
  cr_assert_eq(phx__data_open(temp_dir_path(&dir, "s_*.bin"), 10, 257, 1, &d, &err), PHX_OK, "%s", err.message);
  cr_assert_eq(phx__data_windows(d), 2 * SHARDS);
  for (int64_t i = 0; i < 2 * SHARDS; i++) {
    int32_t tokens[10], targets[10];
    const int64_t window = phx__data_order(d, 0, i);
    cr_assert_eq(phx__data_window(d, window, tokens, targets, &err), PHX_OK, "%s", err.message);
    cr_assert_eq(tokens[0], (window / 2 + 10 * (window % 2)) % 251);
  }
  raw_file("new.bin", TOKENS, 7);
  cr_assert_eq(rename(temp_dir_path(&dir, "new.bin"), temp_dir_path(&dir, "s_0007.bin")), 0);
  for (int64_t i = 100; i < 200; i++) { /* now the seventh is not open */
    int32_t tokens[10], targets[10];
    cr_assert_eq(phx__data_window(d, 2 * i, tokens, targets, &err), PHX_OK, "%s", err.message);
  }
  unreadable(d, 14, "s_0007.bin is not as it was when the run opened it: another file took its place");
  cr_assert_eq(unlink(temp_dir_path(&dir, "s_0008.bin")), 0);
  unreadable(d, 16, "cannot open the token file");
  phx__data_close(d);
}

/* ---- every system call and allocation fails once ---- */
static int fail_at, calls;
static int fails(void) { return ++calls == fail_at; }
static void *failing_calloc(size_t n, size_t bytes) { return fails() ? NULL : calloc(n, bytes); }
static int (*real_open)(const char *, int, mode_t);
static int failing_open(const char *path, int flags, mode_t mode) {
  if (!fails()) return real_open(path, flags, mode);
  errno = EACCES;
  return -1;
}
static ssize_t failing_pread(int fd, void *buffer, size_t bytes, off_t at) {
  if (!fails()) return pread(fd, buffer, bytes > 100 ? 100 : bytes, at); /* short reads as well */
  errno = EIO;
  return -1;
}
static int failing_fstat(int fd, struct stat *out) {
  if (!fails()) return fstat(fd, out);
  errno = EIO;
  return -1;
}
static int open_descriptors(void) {
  int n = 0;
  for (int fd = 0; fd < 256; fd++) n += fcntl(fd, F_GETFD) >= 0;
  return n;
}

static int no_memfd(const char *name, unsigned flags) {
  (void)name, (void)flags;
  errno = ENFILE;
  return -1;
}

Test(data, every_failure_is_reported_and_leaks_nothing) {
  real_open = phx__sys.open;
  phx__sys.memfd_create = no_memfd; /* nothing is kept: a failure to keep it is none */
  phx__sys.calloc = failing_calloc;
  phx__sys.open = failing_open;
  phx__sys.pread = failing_pread;
  phx__sys.fstat = failing_fstat;
  raw_file("s_1.bin", 101, 0);
  raw_file("s_2.bin", 301, 0);
  const char *patterns[] = {temp_dir_path(&dir, "s_*.bin"), temp_dir_path(&dir, "s_1.bin")};
  const int descriptors = open_descriptors();
  for (int k = 0; k < 2; k++) {
    for (fail_at = 1;; fail_at++) {
      phx__data *d = NULL;
      phx_error err = PHX_ERROR_INIT;
      calls = 0;
      const phx_status status = phx__data_open(patterns[k], 10, 257, 1, &d, &err);
      if (calls < fail_at) {
        cr_assert_eq(status, PHX_OK, "%s", err.message);
        phx__data_close(d);
        break;
      }
      if (status == PHX_OK) { /* the look whether the pattern is a file's name may fail: then it is a glob */
        cr_expect_leq(fail_at, 2);
        phx__data_close(d);
      } else {
        cr_expect_null(d);
        cr_expect(err.message[0]);
      }
      cr_expect_eq(open_descriptors(), descriptors);
    }
    cr_expect_geq(fail_at, 8);
  }
}

/* ---- a reading that takes long ---- */

static ssize_t slow_pread(int fd, void *out, size_t bytes, off_t at) {
  if (bytes > 1 << 16) usleep(110000);
  return pread(fd, out, bytes, at);
}

static phx_status exchange_alone(void *ctx, const char *what, const void *mine, int64_t bytes, void *all,
                                 phx_error *err) {
  (void)ctx, (void)what, (void)err;
  memcpy(all, mine, (size_t)bytes);
  return PHX_OK;
}

static phx_status read_before_ranks(phx__run_data *data, phx_error *err) { return phx__run_data_read(data, err); }
static phx_status read_by_a_rank(phx__run_data *data, phx_error *err) {
  const phx_job job = {.struct_size = sizeof job, .size = 1, .local_size = 1, .exchange = exchange_alone};
  return phx__run_data_meet(data, &job, err);
}

/* What is left, by each line that says so; returns how many there are. */
static int amounts_left(const char *text, double left[8]) {
  static const char before[] = "reads the token files once, to check and hash them: ";
  int n = 0;
  for (const char *at = text; n < 8 && (at = strstr(at, before)); n++) left[n] = strtod(at += sizeof before - 1, NULL);
  return n;
}

Test(data, a_long_reading_is_said_and_goes_on) {
  phx_status (*const readers[])(phx__run_data *, phx_error *) = {read_before_ranks, read_by_a_rank};
  static const char *const names[] = {"before.bin", "by-a-rank.bin"};
  phx__sys.pread = slow_pread;
  for (int k = 0; k < 2; k++) {
    phx__run_data data = {NULL, NULL};
    phx_error err = PHX_ERROR_INIT;
    double left[8];
    char text[2000] = "";
    const char *path = raw_file(names[k], 24 << 17, 0);
    cr_assert_eq(phx__data_attach(path, 10, 257, 1, &data.train, &err), PHX_OK, "%s", err.message);
    fflush(stderr);
    const int screen = dup(2), said = open(temp_dir_path(&dir, "said"), O_RDWR | O_CREAT | O_TRUNC, 0600);
    dup2(said, 2);
    const phx_status status = readers[k](&data, &err);
    fflush(stderr);
    dup2(screen, 2);
    cr_assert_eq(status, PHX_OK, "%s", err.message);
    cr_assert_eq(phx__data_unread(data.train), 0);
    cr_assert_gt(pread(said, text, sizeof text - 1, 0), 0, "nothing was said");
    const int n = amounts_left(text, left);
    cr_expect(n >= 2 && n <= 5, "%s: %d lines\n%s", names[k], n, text);
    for (int i = 1; i < n; i++) cr_expect_lt(left[i], left[i - 1], "%s", text);
    close(said);
    close(screen);
    phx__run_data_close(&data);
  }
}
