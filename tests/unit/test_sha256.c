/* SHA-256 against the vectors of FIPS 180-4 / NIST CAVP, in one piece and in many. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/sha256.h"
#include "base/status.h"
#include "base/sys.h"

static void expect(const void *data, size_t bytes, const char *hex) {
  for (size_t piece = 1; piece <= 129; piece += 32) { /* 1, 33, 65, 97, 129 */
    phx__sha256 hash;
    char got[65];
    phx__sha256_begin(&hash);
    for (size_t at = 0; at < bytes; at += piece)
      phx__sha256_add(&hash, (const char *)data + at, bytes - at < piece ? bytes - at : piece);
    phx__sha256_end(&hash, got);
    cr_expect_str_eq(got, hex);
  }
}

Test(sha256, vectors) {
  expect("", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  expect("abc", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const char *two = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  expect(two, strlen(two), "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  char *million = malloc(1000000);
  memset(million, 'a', 1000000);
  expect(million, 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  free(million);
}

/* Every length around the block border against the system's sha256sum. */
Test(sha256, file_against_sha256sum, .timeout = 60) {
  char path[] = "/tmp/phx-sha-XXXXXX", command[100], theirs[80], ours[65];
  phx_error err = PHX_ERROR_INIT;
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  static const size_t lengths[] = {0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 16384, 16385, 40000};
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
    FILE *f = fopen(path, "w");
    for (size_t k = 0; k < lengths[i]; k++) fputc((int)(k * 31 % 251), f);
    fclose(f);
    snprintf(command, sizeof command, "sha256sum %s", path);
    FILE *p = popen(command, "r");
    cr_assert(p && fgets(theirs, sizeof theirs, p));
    pclose(p);
    theirs[64] = 0;
    cr_assert_eq(phx__sha256_file(path, ours, &err), PHX_OK);
    cr_expect_str_eq(ours, theirs);
  }
  unlink(path);
}

static ssize_t failing_pread(int fd, void *buffer, size_t bytes, off_t at) {
  (void)fd, (void)buffer, (void)bytes, (void)at;
  errno = EIO;
  return -1;
}

Test(sha256, failures) {
  char hex[65] = "unchanged";
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__sha256_file("/nonexistent/x", hex, &err), PHX_IO);
  cr_assert_eq(err.cause, ENOENT);
  phx__sys.pread = failing_pread;
  cr_assert_eq(phx__sha256_file("/proc/self/exe", hex, &err), PHX_IO);
  cr_assert_eq(err.cause, EIO);
  cr_assert_str_eq(hex, "unchanged");
}
