/* The secret of a job on several machines, what a log may show of others' texts, and a run directory's proof. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clean.h"
#include "config/config.h"
#include "command/run_dir.h"
#include "base/secret.h"
#include "base/status.h"
#include "temp_dir.h"

/* RFC 4231, test cases 1, 2, 4 and 6: keys shorter than a block, and one longer. */
Test(secret, proof_is_hmac_sha_256) {
  static const struct {
    const char *key, *data, *proof;
    size_t key_bytes, data_bytes;
    unsigned char filled_key, filled_data; /* 0: the text */
  } rows[] = {{"", "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7", 20, 8, 0x0b, 0},
              {"Jefe", "what do ya want for nothing?",
               "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843", 4, 28, 0, 0},
              {"", "", "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe", 20, 50, 0xaa, 0xdd},
              {"", "Test Using Larger Than Block-Size Key - Hash Key First",
               "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54", 131, 54, 0xaa, 0}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    phx__secret s = {.bytes = rows[i].key_bytes};
    unsigned char data[64], proof[PHX__PROOF_BYTES];
    char hex[65];
    memset(s.key, rows[i].filled_key, rows[i].key_bytes);
    memset(data, rows[i].filled_data, sizeof data);
    if (!rows[i].filled_key) memcpy(s.key, rows[i].key, rows[i].key_bytes);
    if (!rows[i].filled_data) memcpy(data, rows[i].data, rows[i].data_bytes);
    phx__secret_prove(&s, data, rows[i].data_bytes, proof);
    for (int k = 0; k < PHX__PROOF_BYTES; k++) snprintf(hex + 2 * k, 3, "%02x", proof[k]);
    cr_expect_str_eq(hex, rows[i].proof);
  }
}

static void write_file(const char *path, const char *text, int mode) {
  unlink(path);
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  cr_assert(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
  cr_assert_eq(fchmod(fd, (mode_t)mode), 0);
  close(fd);
}
static void refused(const char *text) {
  phx__secret s;
  phx_error err = PHX_ERROR_INIT;
  cr_expect_neq(phx__secret_find(&s, &err), PHX_OK);
  cr_expect(strstr(err.message, text), "not '%s', but: %s", text, err.message);
}
static void found(const char *key) {
  phx__secret s;
  phx_error err = PHX_ERROR_INIT;
  cr_expect_eq(phx__secret_find(&s, &err), PHX_OK, "%s", err.message);
  cr_expect(s.bytes == strlen(key) && memcmp(s.key, key, s.bytes) == 0, "%zu bytes: %s", s.bytes, (char *)s.key);
}
Test(secret, comes_from_the_environment_or_a_file_of_ones_own) {
  const temp_dir dir = temp_dir_make();
  const char *path = temp_dir_path(&dir, "secret");
  char longest[5001];
  found("");
  setenv("PHALANX_SECRET", "0123456789abcdef", 1), found("0123456789abcdef");
  setenv("PHALANX_SECRET", "0123456789abcde", 1), refused("15 bytes; expected 16 to 4096");
  setenv("PHALANX_SECRET", "", 1), refused("0 bytes");
  memset(longest, 'x', 5000), longest[5000] = 0;
  setenv("PHALANX_SECRET", longest, 1), refused("5000 bytes");
  setenv("PHALANX_SECRET_FILE", path, 1), refused("set one of them");
  unsetenv("PHALANX_SECRET");
  refused("No such file");
  write_file(path, "fedcba9876543210\n", 0600), found("fedcba9876543210");
  write_file(path, "fedcba987654321\n", 0400), refused("15 bytes");
  write_file(path, "fedcba9876543210", 0640), refused("is open to others (mode 640): chmod 600 it");
  write_file(path, "fedcba9876543210", 0604), refused("is open to others (mode 604)");
  unlink(path);
  cr_assert_eq(mkfifo(path, 0600), 0);
  refused("not a regular file");
  unsetenv("PHALANX_SECRET_FILE");
  temp_dir_remove(&dir);
}

Test(clean, what_moves_a_cursor_or_ends_a_line_is_replaced) {
  static const char *const rows[][2] = {{"plain ~!", "plain ~!"},
                                        {"a\nb\tc\033[1m\177", "a b c?[1m?"},
                                        {"\xc3\xa4 \xe2\x82\xac", "\xc3\xa4 \xe2\x82\xac"},
                                        {"\xf0\x9f\x90\xa7", "\xf0\x9f\x90\xa7"},
                                        {"\xc2\x9b" "31m", "??31m"}, /* U+009B begins a sequence, like ESC [ */
                                        {"\x9b\xff\xc0\xaf\xe2\x82", "??????"}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    char text[64];
    snprintf(text, sizeof text, "%s", rows[i][0]);
    phx__clean(text, sizeof text);
    cr_expect_str_eq(text, rows[i][1]);
  }
  char cut[4] = {'a', '\n', '\n', '\n'};
  phx__clean(cut, 2);
  cr_expect(cut[1] == ' ' && cut[2] == '\n');
}

/* ---- a run directory's proof: the test is rank 1 of 2, and says what it likes ---- */
typedef struct other {
  phx_job job;
  const char *dir;
  int stays_at; /* 0: it is honest; 1: it has seen nothing; 2: it says so and proves nothing; 3: another rank's proof */
  uint64_t numbers[2];
} other;
static void read_key(const other *o, phx__secret *key) {
  char path[600];
  snprintf(path, sizeof path, "%s/.meeting-%016llx", o->dir, (unsigned long long)o->numbers[0]);
  struct stat info;
  cr_assert_eq(stat(path, &info), 0, "%s", path);
  cr_expect_eq(info.st_mode & 0777, 0600);
  FILE *f = fopen(path, "rb");
  cr_assert_not_null(f, "%s", path);
  key->bytes = fread(key->key, 1, sizeof key->key, f);
  fclose(f);
}
static phx_status exchange(void *ctx, const char *name, const void *mine, int64_t bytes, void *all, phx_error *err) {
  other *o = ctx;
  (void)err;
  unsigned char *theirs = (unsigned char *)all + bytes;
  memcpy(all, mine, (size_t)bytes);
  memset(theirs, 0, (size_t)bytes);
  if (strcmp(name, "the run directory") == 0) {
    memcpy(o->numbers, mine, 8);
    o->numbers[1] = 4711;
    memcpy(theirs, &o->numbers[1], 8);
  }
  if (strcmp(name, "the run directory, seen") != 0 || o->stays_at == 1) return PHX_OK;
  theirs[0] = 1;
  if (o->stays_at == 2) return PHX_OK;
  uint64_t text[1 + PHX_RANKS_MAX] = {o->stays_at == 3 ? 0 : 1, o->numbers[0], o->numbers[1]};
  phx__secret key = {0};
  read_key(o, &key);
  cr_expect_eq(key.bytes, 32);
  phx__secret_prove(&key, text, sizeof text, theirs + 8);
  return PHX_OK;
}
static void meet_as(int stays_at, phx_status status, const char *text) {
  const temp_dir dir = temp_dir_make();
  phx__config config = {0};
  config.s.run.out = dir.path;
  other o = {.dir = dir.path, .stays_at = stays_at};
  o.job = (phx_job){.struct_size = sizeof o.job, .ctx = &o, .rank = 0, .size = 2, .timeout_s = 5, .exchange = exchange};
  phx_error err = PHX_ERROR_INIT;
  cr_expect_eq(phx__run_dir_shared(&config, &o.job, &err), status, "%s", err.message);
  cr_expect(strstr(err.message, text), "not '%s', but: %s", text, err.message);
  cr_expect_eq(temp_dir_count(&dir), 0, "a file is left");
  temp_dir_remove(&dir);
}
Test(run_dir, an_impostor_does_not_know_what_rank_0_wrote) {
  meet_as(0, PHX_OK, "");
  meet_as(1, PHX_INVALID, "rank 1 does not see what rank 0 writes in run.out = ");
  meet_as(2, PHX_INVALID, "rank 1 says that it sees run.out = ");
  meet_as(3, PHX_INVALID, "another user's process may have taken its place");
}
