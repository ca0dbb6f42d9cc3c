/* Fuzz target: several connections to the store's server, which say anything in any order; no thread, no address.
 *
 * The input is a program: connections come, send bytes or whole frames (with the right magic, version, job and session,
 * so that what lies behind is reached), and go.  Properties: the server's counts fit its connections; with a secret
 * nobody becomes a rank; what it says of others is readable; what it sends are frames.  With libFuzzer:
 *   build-clang/tests/fuzz_store tests/fuzz/store        The corpus is replayed by tests/unit/test_corpus_store.c. */
#include "../../core/job/tcp_store_server.c"
#include "check.h"

#include <stddef.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

enum { ENDS = 16, SIZE = 3, FUZZ_JOB = 77, FUZZ_SESSION = 99, STEPS_MOST = 200 };

static void check_server(const phx__store_server *s) {
  int32_t come = 0, brought = 0;
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) {
    const peer *p = &s->ranks[r];
    come += p->come;
    brought += p->brought;
    CHECK(r < s->place.size || (p->wire.fd < 0 && !p->come));
    CHECK(memchr(p->place, 0, sizeof p->place));
  }
  CHECK(come == s->come && brought == s->brought && brought < SIZE);
  if (s->secret.bytes) CHECK(come == 0);
  if (!s->failed) return;
  const char *text = (const char *)s->failure + PHX__WIRE_HEAD;
  CHECK(s->failure_bytes > PHX__WIRE_HEAD && s->failure_bytes < sizeof s->failure);
  for (size_t i = 0; i < s->failure_bytes - PHX__WIRE_HEAD; i++) CHECK((uint8_t)text[i] >= ' ' && text[i] != 127);
}

/* A rank's side reads what came, as tcp_store.c does. */
static void read_all(phx__wire *wire) {
  int got = PHX__WIRE_WHOLE;
  while (got == PHX__WIRE_WHOLE) got = phx__wire_read(wire);
  CHECK(got != PHX__WIRE_GARBAGE);
}

typedef struct client {
  phx__wire wire; /* fd -1: none */
} client;

static void come_new(phx__store_server *s, client *c, uint8_t *body) {
  int ends[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
  c->wire = (phx__wire){.fd = ends[0], .limit = PHX__WIRE_FROM_STORE, .body = body};
  take_connection(s, ends[1]);
}

/* A frame that fits the protocol but for what the input says. */
static size_t make_frame(const uint8_t *say, uint8_t *frame) {
  const uint32_t sizes[] = {PHX__WIRE_HELLO_BYTES, PHX__STORE_NAME + 8, 0, PHX__PROOF_BYTES, say[5], 40};
  phx__frame head = {.kind = 1 + say[0] % 11, .rank = (int8_t)(say[1] % 6) - 1, .number = say[2] % 4};
  head.session = head.kind == PHX__WIRE_HELLO ? FUZZ_JOB : FUZZ_SESSION;
  if (say[3] % 16 == 0) head.session++;
  head.bytes = sizes[say[4] % 6];
  if (head.kind == PHX__WIRE_HELLO) head.bytes = sizes[0];
  if (head.kind == PHX__WIRE_EXCHANGE) head.bytes = sizes[1];
  memset(frame, say[5], PHX__WIRE_HEAD + head.bytes);
  phx__frame_head(&head, frame);
  phx__put_u32(frame + PHX__WIRE_HEAD, say[3] % 8 ? SIZE : say[5]);
  phx__put_u32(frame + PHX__WIRE_HEAD + 8, say[6] % 2);
  return PHX__WIRE_HEAD + head.bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static uint8_t bodies[PHX__WIRE_FROM_STORE], frame[PHX__WIRE_HEAD + 512];
  client clients[ENDS];
  if (bytes < 2) return 0;
  const phx__secret secret = {.bytes = 16, .key = "nobody knows it."};
  const phx__store_place place = {.address = "here", .port = "1", .job = FUZZ_JOB, .size = SIZE, .timeout_s = 0,
                                  .secret = data[0] % 4 == 0 ? &secret : NULL};
  phx__store_server *s = phx__calloc(1, sizeof *s);
  CHECK(s);
  set_up(s, &place);
  s->session = FUZZ_SESSION;
  for (int i = 0; i < ENDS; i++) clients[i].wire.fd = -1;
  const uint8_t *at = data + 1, *end = data + bytes;
  for (int step = 0; at < end && step < STEPS_MOST; step++) {
    const uint8_t op = *at++;
    client *c = &clients[op >> 3 & 15];
    const bool here = c->wire.fd >= 0;
    if (op % 8 <= 1 && !here) {
      come_new(s, c, bodies);
    } else if (op % 8 == 2 && here) {
      phx__sys.close(c->wire.fd);
      c->wire.fd = -1;
    } else if (op % 8 <= 4 && here && at < end) { /* bytes */
      const size_t n = 1 + *at % 64u, left = (size_t)(end - at - 1);
      (void)phx__wire_send(c->wire.fd, at + 1, n < left ? n : left, 0);
      at += 1 + (n < left ? n : left);
    } else if (here && end - at >= 7) {
      (void)phx__wire_send(c->wire.fd, frame, make_frame(at, frame), 0);
      at += 7;
    }
    turn(s, 0);
    check_server(s);
    for (int i = 0; i < ENDS; i++)
      if (clients[i].wire.fd >= 0) read_all(&clients[i].wire);
  }
  for (int i = 0; i < ENDS; i++)
    if (clients[i].wire.fd >= 0) phx__sys.close(clients[i].wire.fd);
  for (int i = 0; i < 3; i++) turn(s, 0);
  check_server(s);
  free_server(s);
  return 0;
}
