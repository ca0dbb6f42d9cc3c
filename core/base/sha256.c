/* core/base/sha256.c - SHA-256 as in FIPS 180-4, section 6.2.
 *
 * For provenance (which file was loaded) and for proofs of a secret: plain and portable rather than fast.  No state
 * between calls; any thread. */
#include "base/sha256.h"
#include "base/status.h"
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, unsigned by) { return x >> by | x << (32 - by); }

static void compress(uint32_t state[8], const unsigned char block[64]) {
  uint32_t w[64];
  for (unsigned i = 0; i < 16; i++)
    w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
           block[4 * i + 3];
  for (unsigned i = 16; i < 64; i++) {
    const uint32_t small0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
    const uint32_t small1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + small0 + w[i - 7] + small1;
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (unsigned i = 0; i < 64; i++) {
    const uint32_t big1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
    const uint32_t t1 = h + big1 + ((e & f) ^ (~e & g)) + round_constants[i] + w[i];
    const uint32_t big0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
    const uint32_t t2 = big0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1;
    d = c, c = b, b = a, a = t1 + t2;
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

void phx__sha256_begin(phx__sha256 *hash) {
  static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(hash->state, start, sizeof start);
  hash->bytes = 0;
}

void phx__sha256_add(phx__sha256 *hash, const void *data, size_t bytes) {
  const unsigned char *p = data;
  while (bytes) {
    size_t at = (size_t)(hash->bytes % 64), n = 64 - at < bytes ? 64 - at : bytes;
    memcpy(hash->block + at, p, n);
    hash->bytes += n;
    p += n;
    bytes -= n;
    if (at + n == 64) compress(hash->state, hash->block);
  }
}

static void finish(phx__sha256 *hash) {
  uint64_t bits = hash->bytes * 8;
  unsigned char length[8];
  for (unsigned i = 0; i < 8; i++) length[i] = (unsigned char)(bits >> (56 - 8 * i));
  phx__sha256_add(hash, "\x80", 1);
  while (hash->bytes % 64 != 56) phx__sha256_add(hash, "", 1);
  phx__sha256_add(hash, length, sizeof length);
}

void phx__sha256_end(phx__sha256 *hash, char hex[65]) {
  finish(hash);
  for (unsigned i = 0; i < 64; i++) hex[i] = "0123456789abcdef"[hash->state[i / 8] >> (28 - 4 * (i % 8)) & 15];
  hex[64] = 0;
}

void phx__sha256_end_bytes(phx__sha256 *hash, uint8_t digest[32]) {
  finish(hash);
  for (unsigned i = 0; i < 32; i++) digest[i] = (uint8_t)(hash->state[i / 4] >> (24 - 8 * (i % 4)));
}

phx_status phx__sha256_fd(int fd, const char *path, char hex[65], phx_error *err) {
  phx__sha256 hash;
  unsigned char buffer[16384];
  ssize_t got;
  off_t at = 0;
  phx__sha256_begin(&hash);
  while ((got = phx__sys.pread(fd, buffer, sizeof buffer, at)) != 0) {
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return phx_fail_errno(err, PHX_IO, errno, "%s cannot be read", path);
    phx__sha256_add(&hash, buffer, (size_t)got);
    at += got;
  }
  phx__sha256_end(&hash, hex);
  return PHX_OK;
}

phx_status phx__sha256_file(const char *path, char hex[65], phx_error *err) {
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  if (fd < 0) return phx_fail_errno(err, PHX_IO, errno, "%s cannot be opened", path);
  const phx_status status = phx__sha256_fd(fd, path, hex, err);
  phx__sys.close(fd);
  return status;
}
