/* core/job/tcp_store_wire.c - frames of the store on a socket: encoded, read piece by piece, and checked.
 *
 * Whatever comes in is judged by its head before a byte of payload is kept: a stranger costs 32 bytes of reading.
 * Threads: [any]; a phx__wire has one reader. */
#include "job/tcp_store_wire.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "base/status.h"

enum { MAGIC = 0x53584850 /* "PHXS" */, VERSION = 2 };

static void put(uint8_t *to, uint64_t value, int n) {
  for (int i = 0; i < n; i++) to[i] = (uint8_t)(value >> 8 * i);
}
static uint64_t get(const uint8_t *from, int n) {
  uint64_t value = 0;
  for (int i = 0; i < n; i++) value |= (uint64_t)from[i] << 8 * i;
  return value;
}
void phx__put_u32(uint8_t *to, uint32_t value) { put(to, value, 4); }
uint32_t phx__get_u32(const uint8_t *from) { return (uint32_t)get(from, 4); }

void phx__frame_head(const phx__frame *f, uint8_t head[PHX__WIRE_HEAD]) {
  put(head, MAGIC, 4);
  put(head + 4, VERSION, 2);
  put(head + 6, (uint64_t)f->kind, 2);
  put(head + 8, f->session, 8);
  put(head + 16, f->number, 8);
  put(head + 24, (uint32_t)f->rank, 4);
  put(head + 28, f->bytes, 4);
}

void phx__claim_prove(const phx__claim *c, const phx__secret *secret, int of, uint8_t proof[PHX__PROOF_BYTES]) {
  uint8_t text[8 + 16 + 2 * PHX__WIRE_NONCE];
  memcpy(text, of == PHX__PROOF_OF_STORE ? "phxstore" : "phx rank", 8);
  put(text + 8, c->job, 8);
  put(text + 16, (uint32_t)c->rank, 4);
  put(text + 20, (uint32_t)c->size, 4);
  memcpy(text + 24, c->mine, PHX__WIRE_NONCE);
  memcpy(text + 24 + PHX__WIRE_NONCE, c->stores, PHX__WIRE_NONCE);
  phx__secret_prove(secret, text, sizeof text, proof);
}

static bool parse(phx__wire *w) {
  if (get(w->head, 4) != MAGIC || get(w->head + 4, 2) != VERSION) return false;
  w->frame = (phx__frame){.kind = (int32_t)get(w->head + 6, 2),
                          .rank = (int32_t)get(w->head + 24, 4),
                          .session = get(w->head + 8, 8),
                          .number = get(w->head + 16, 8),
                          .bytes = (uint32_t)get(w->head + 28, 4)};
  return w->frame.kind >= PHX__WIRE_HELLO && w->frame.kind <= PHX__WIRE_PROOF && w->frame.bytes <= w->limit;
}

int phx__wire_read(phx__wire *w) {
  if (w->have >= PHX__WIRE_HEAD && w->have == PHX__WIRE_HEAD + w->frame.bytes) w->have = 0; /* the last one is taken */
  for (;;) {
    const bool in_head = w->have < PHX__WIRE_HEAD;
    uint8_t *to = in_head ? w->head + w->have : w->body + (w->have - PHX__WIRE_HEAD);
    const size_t want = (in_head ? PHX__WIRE_HEAD : PHX__WIRE_HEAD + w->frame.bytes) - w->have;
    const ssize_t n = recv(w->fd, to, want, 0);
    if (n == 0) errno = 0;
    if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN)) return PHX__WIRE_CLOSED;
    if (n < 0 && errno == EAGAIN) return PHX__WIRE_MORE;
    if (n < 0) continue;
    w->have += (size_t)n;
    if (w->have == PHX__WIRE_HEAD && in_head && !parse(w)) return PHX__WIRE_GARBAGE;
    if (w->have >= PHX__WIRE_HEAD && w->have == PHX__WIRE_HEAD + w->frame.bytes) return PHX__WIRE_WHOLE;
  }
}

void phx__wire_options(int fd, double timeout_s) {
  enum { PROBES = 3, SLOWEST = 5 };
  const double share = timeout_s / 2 / (1 + PROBES);
  int every = share > 1 ? (int)share : 1;
  if (timeout_s <= 0 || share >= SLOWEST) every = SLOWEST;
  const int yes = 1, idle = every, interval = every, probes = PROBES, unanswered_ms = 1000 * every * (1 + PROBES);
  /* A kernel that refuses one of these finds a lost machine later, by the deadlines. */
  (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered_ms, sizeof unanswered_ms);
}

bool phx__wire_send(int fd, const uint8_t *bytes, size_t n, int ms) {
  while (n > 0) {
    const ssize_t sent = send(fd, bytes, n, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno != EAGAIN) return false;
    if (sent < 0) {
      struct pollfd ready = {.fd = fd, .events = POLLOUT};
      if (poll(&ready, 1, ms) != 1) return false;
      continue;
    }
    bytes += sent;
    n -= (size_t)sent;
  }
  return true;
}
