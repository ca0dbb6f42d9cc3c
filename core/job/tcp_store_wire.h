/* core/job/tcp_store_wire.h - frames of the store, for tcp_store*.c only.
 *
 * A frame is a head of 32 bytes, little-endian: magic u32, version u16, kind u16, session u64, number u64, rank i32,
 * bytes u32; then `bytes` of payload, never more than the reader said it takes. */
#ifndef PHX__TCP_STORE_WIRE_H
#define PHX__TCP_STORE_WIRE_H
#include <phalanx/job.h>
#include <stdbool.h>

#include "base/secret.h"
#include "job/tcp_store_place.h"

enum {
  PHX__WIRE_HELLO = 1, /* to the store; session: the job's id; payload: phx__hello */
  PHX__WIRE_WELCOME,   /* all have come; session: from now on; payload: size texts of PHX__WIRE_PLACE bytes */
  PHX__WIRE_REFUSED,   /* no rank of this job; payload: why */
  PHX__WIRE_EXCHANGE,  /* to the store; number: of the round, from 1; payload: name, bytes */
  PHX__WIRE_RESULT,    /* payload: everybody's bytes */
  PHX__WIRE_FAILED,    /* both ways; rank: whose failure, or -1; payload: the message */
  PHX__WIRE_LEAVE,     /* to the store: this rank is done */
  PHX__WIRE_CHALLENGE, /* to a rank, after its hello, where the job has a secret; payload: nonce, the store's proof */
  PHX__WIRE_PROOF      /* to the store; payload: the rank's proof */
};
enum {
  PHX__WIRE_HEAD = 32,
  PHX__WIRE_PLACE = 128,
  PHX__WIRE_NONCE = 32,
  PHX__WIRE_HOST = 64,
  PHX__WIRE_HELLO_BYTES = 12 + PHX__WIRE_NONCE + PHX__WIRE_HOST, /* size i32, pid i32, has a secret u32, nonce, host */
  PHX__WIRE_MESSAGE = 512,
  PHX__WIRE_TO_STORE = PHX__STORE_NAME + PHX_EXCHANGE_MAX, /* the largest payload, either way */
  PHX__WIRE_FROM_STORE = PHX_RANKS_MAX * PHX_EXCHANGE_MAX
};

typedef struct phx__frame {
  int32_t kind, rank;
  uint64_t session, number;
  uint32_t bytes;
} phx__frame;

/* One connection's incoming side: a frame is read whole, however it arrives. */
typedef struct phx__wire {
  int fd;
  phx__frame frame;   /* of the last whole head */
  size_t have, limit; /* bytes read of this frame; the largest payload taken */
  uint8_t head[PHX__WIRE_HEAD];
  uint8_t *body; /* (limit) */
} phx__wire;
/* One frame: PHX__WIRE_WHOLE, PHX__WIRE_MORE (later), PHX__WIRE_CLOSED (errno, 0: by the peer) or PHX__WIRE_GARBAGE. */
enum { PHX__WIRE_WHOLE, PHX__WIRE_MORE, PHX__WIRE_CLOSED, PHX__WIRE_GARBAGE };
int phx__wire_read(phx__wire *wire);

/* Who wants to be a rank, and the two random numbers by which a proof is good for this connection only. */
typedef struct phx__claim {
  uint64_t job;
  int32_t rank, size, pid;
  bool has_secret;
  uint8_t mine[PHX__WIRE_NONCE], stores[PHX__WIRE_NONCE]; /* the rank's nonce, and the store's */
  char host[PHX__WIRE_HOST];
} phx__claim;
/* That the store (to the rank), or the rank (to the store), knows the secret. */
enum { PHX__PROOF_OF_STORE, PHX__PROOF_OF_RANK };
void phx__claim_prove(const phx__claim *claim, const phx__secret *secret, int of, uint8_t proof[PHX__PROOF_BYTES]);

void phx__put_u32(uint8_t *to, uint32_t value);
uint32_t phx__get_u32(const uint8_t *from);
void phx__frame_head(const phx__frame *frame, uint8_t head[PHX__WIRE_HEAD]);
/* Closed when the process ends elsewhere; small frames at once; a peer whose machine is gone, or the way to it, is
 * found within half of timeout_s, before collectives' deadlines: 4 s at least, 20 s at most and without a timeout. */
void phx__wire_options(int fd, double timeout_s);
/* [any], signal handlers too: head and payload whole within ms, or false.  The socket does not block. */
bool phx__wire_send(int fd, const uint8_t *bytes, size_t n, int ms);

#endif
