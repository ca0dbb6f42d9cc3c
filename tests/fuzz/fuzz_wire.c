/* Fuzz target: any bytes on a connection of the store, in pieces of any size.
 *
 * Properties: what is read as frames is what the bytes say, however they come; a payload is never larger than what the
 * reader takes; a frame's head is made of a frame with the same bytes.  Input: the limit, the pieces' size, then the
 * bytes.  With libFuzzer:
 *   build-clang/tests/fuzz_wire tests/fuzz/wire          The corpus is replayed by tests/unit/test_corpus.c. */
#include "../../core/job/tcp_store_wire.h"
#include "check.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* The frame at data[at], which must be whole and begin there. */
static size_t check_frame(const phx__wire *w, const uint8_t *data, size_t bytes, size_t at) {
  uint8_t head[PHX__WIRE_HEAD];
  CHECK(at + PHX__WIRE_HEAD + w->frame.bytes <= bytes && w->frame.bytes <= w->limit);
  phx__frame_head(&w->frame, head);
  CHECK(memcmp(head, data + at, sizeof head) == 0);
  CHECK(memcmp(w->body, data + at + sizeof head, w->frame.bytes) == 0);
  return at + PHX__WIRE_HEAD + w->frame.bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  int ends[2];
  if (bytes < 2) return 0;
  const size_t limit = data[0], piece = 1 + data[1] % 64u;
  uint8_t *body = malloc(limit ? limit : 1);
  data += 2, bytes -= 2;
  if (bytes > 4000) bytes = 4000;
  CHECK(body && socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
  phx__wire wire = {.fd = ends[0], .limit = limit, .body = body};
  size_t whole = 0;
  int got = PHX__WIRE_MORE;
  for (size_t at = 0; at < bytes && got != PHX__WIRE_GARBAGE; at += piece) {
    CHECK(phx__wire_send(ends[1], data + at, bytes - at < piece ? bytes - at : piece, 0));
    got = PHX__WIRE_WHOLE;
    while (got == PHX__WIRE_WHOLE) {
      got = phx__wire_read(&wire);
      CHECK(got != PHX__WIRE_CLOSED);
      if (got == PHX__WIRE_WHOLE) whole = check_frame(&wire, data, bytes, whole);
    }
  }
  close(ends[1]);
  if (got == PHX__WIRE_MORE) CHECK(phx__wire_read(&wire) == PHX__WIRE_CLOSED && bytes - whole < PHX__WIRE_HEAD + limit);
  close(ends[0]);
  free(body);
  return 0;
}
