/* core/base/secret.c - see secret.h.
 *
 * A secret in a file must be the user's own and closed to everybody else, as ssh wants its keys: one that others can
 * read is none.  It is never printed, sent or written.
 * Does not encrypt or sign what travels afterwards.  No state. */
#include "base/secret.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sha256.h"
#include "base/status.h"
#include "base/sys.h"

static phx_status check_length(const phx__secret *s, const char *variable, phx_error *err) {
  if (s->bytes >= PHX__SECRET_LEAST) return PHX_OK;
  return phx_fail(err, PHX_INVALID,
                  "%s gives a secret of %zu bytes; expected %d to %d: take, for example, the output of "
                  "`openssl rand -hex 16`", variable, s->bytes, PHX__SECRET_LEAST, PHX__SECRET_MOST);
}

static phx_status check_file(int fd, const char *path, phx_error *err) {
  struct stat info;
  if (fstat(fd, &info) != 0) return phx_fail_errno(err, PHX_IO, errno, "PHALANX_SECRET_FILE=%.300s", path);
  if (!S_ISREG(info.st_mode))
    return phx_fail(err, PHX_INVALID, "PHALANX_SECRET_FILE=%.300s: not a regular file", path);
  if (info.st_uid != geteuid() && info.st_uid != 0)
    return phx_fail(err, PHX_INVALID, "PHALANX_SECRET_FILE=%.300s belongs to user %u, who knows it, too", path,
                    (unsigned)info.st_uid);
  if (info.st_mode & 077)
    return phx_fail(err, PHX_INVALID, "PHALANX_SECRET_FILE=%.300s is open to others (mode %o): chmod 600 it", path,
                    (unsigned)info.st_mode & 0777);
  return PHX_OK;
}

static phx_status read_file(const char *path, phx__secret *out, phx_error *err) {
  phx_status status = PHX_OK;
  const int fd = phx__sys.open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd < 0) return phx_fail_errno(err, PHX_INVALID, errno, "PHALANX_SECRET_FILE=%.300s", path);
  PHX_TRY_GOTO(check_file(fd, path, err), status, done);
  for (ssize_t got = 1; got != 0 && out->bytes < sizeof out->key;) {
    got = phx__sys.read(fd, out->key + out->bytes, sizeof out->key - out->bytes);
    if (got > 0) out->bytes += (size_t)got;
    if (got >= 0 || errno == EINTR) continue;
    status = phx_fail_errno(err, PHX_IO, errno, "PHALANX_SECRET_FILE=%.300s cannot be read", path);
    goto done;
  }
  /* an editor's end of line is no part of it */
  while (out->bytes && (out->key[out->bytes - 1] == '\n' || out->key[out->bytes - 1] == '\r')) out->bytes--;
  status = check_length(out, "PHALANX_SECRET_FILE", err);
done:
  phx__sys.close(fd);
  return status;
}

phx_status phx__secret_find(phx__secret *out, phx_error *err) {
  const char *text = getenv("PHALANX_SECRET"), *path = getenv("PHALANX_SECRET_FILE");
  memset(out, 0, sizeof *out);
  if (text && path)
    return phx_fail(err, PHX_INVALID, "the environment has PHALANX_SECRET and PHALANX_SECRET_FILE: set one of them");
  if (path) return read_file(path, out, err);
  if (!text) return PHX_OK;
  out->bytes = strlen(text);
  if (out->bytes > sizeof out->key)
    return phx_fail(err, PHX_INVALID, "PHALANX_SECRET has %zu bytes; expected %d to %d", out->bytes, PHX__SECRET_LEAST,
                    PHX__SECRET_MOST);
  memcpy(out->key, text, out->bytes);
  return check_length(out, "PHALANX_SECRET", err);
}

void phx__secret_prove(const phx__secret *secret, const void *data, size_t bytes, uint8_t proof[PHX__PROOF_BYTES]) {
  uint8_t block[64] = {0}, pad[64];
  phx__sha256 hash;
  if (secret->bytes > sizeof block) {
    phx__sha256_begin(&hash);
    phx__sha256_add(&hash, secret->key, secret->bytes);
    phx__sha256_end_bytes(&hash, block);
  } else {
    memcpy(block, secret->key, secret->bytes);
  }
  for (size_t i = 0; i < sizeof pad; i++) pad[i] = block[i] ^ 0x36;
  phx__sha256_begin(&hash);
  phx__sha256_add(&hash, pad, sizeof pad);
  phx__sha256_add(&hash, data, bytes);
  phx__sha256_end_bytes(&hash, proof);
  for (size_t i = 0; i < sizeof pad; i++) pad[i] = block[i] ^ 0x5c;
  phx__sha256_begin(&hash);
  phx__sha256_add(&hash, pad, sizeof pad);
  phx__sha256_add(&hash, proof, PHX__PROOF_BYTES);
  phx__sha256_end_bytes(&hash, proof);
}

int phx__proofs_are_equal(const uint8_t *a, const uint8_t *b) {
  unsigned differ = 0;
  for (int i = 0; i < PHX__PROOF_BYTES; i++) differ |= a[i] ^ b[i];
  return differ == 0;
}

phx_status phx__random(void *out, size_t bytes, phx_error *err) {
  ssize_t got;
  do got = getrandom(out, bytes, 0);
  while (got < 0 && errno == EINTR);
  if (got == (ssize_t)bytes) return PHX_OK;
  return phx_fail_errno(err, PHX_IO, got < 0 ? errno : EIO, "the kernel gives no random numbers");
}
