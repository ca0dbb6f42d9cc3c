/* core/base/sha256.h - SHA-256 (FIPS 180-4): names the exact plugin file that a run used, and proves a secret
 * (secret.h). [any] thread. */
#ifndef PHX__SHA256_H
#define PHX__SHA256_H
#include <phalanx/base.h>

typedef struct phx__sha256 {
  uint32_t state[8];
  uint64_t bytes;       /* hashed so far */
  unsigned char block[64];
} phx__sha256;

void phx__sha256_begin(phx__sha256 *hash);
void phx__sha256_add(phx__sha256 *hash, const void *data, size_t bytes);
void phx__sha256_end(phx__sha256 *hash, char hex[65]);
void phx__sha256_end_bytes(phx__sha256 *hash, uint8_t digest[32]);
/* Of a whole file that is open; path: for messages. */
phx_status phx__sha256_fd(int fd, const char *path, char hex[65], phx_error *err);
/* Of a whole file. */
phx_status phx__sha256_file(const char *path, char hex[65], phx_error *err);
#endif
