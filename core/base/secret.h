/* core/base/secret.h - what only the processes of one job know: ranks of several machines prove it to each other. */
#ifndef PHX__SECRET_H
#define PHX__SECRET_H
#include <phalanx/base.h>

enum { PHX__SECRET_LEAST = 16, PHX__SECRET_MOST = 4096, PHX__PROOF_BYTES = 32 };
typedef struct phx__secret {
  size_t bytes; /* 0: there is none */
  uint8_t key[PHX__SECRET_MOST];
} phx__secret;

/* [main] From PHALANX_SECRET or the file PHALANX_SECRET_FILE; neither: none. */
phx_status phx__secret_find(phx__secret *out, phx_error *err);
/* [any] HMAC-SHA-256 (RFC 2104) of data under the secret: shows that one knows it without saying it. */
void phx__secret_prove(const phx__secret *secret, const void *data, size_t bytes, uint8_t proof[PHX__PROOF_BYTES]);
/* [any] In a time that does not depend on where they differ. */
int phx__proofs_are_equal(const uint8_t *a, const uint8_t *b);
/* [any] PHX_IO when the kernel has no random numbers yet. */
phx_status phx__random(void *out, size_t bytes, phx_error *err);
#endif
