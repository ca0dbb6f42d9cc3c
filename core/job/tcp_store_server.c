/* core/job/tcp_store_server.c - the store itself: who has come, what each brought, who is gone.  A thread at rank 0.
 *
 * It listens on the address of MASTER_ADDR only, until all ranks have come.  Until a connection has said which rank of
 * which job it is, and has proved it where the job has a secret, it is a stranger: at most STRANGERS of them,
 * STRANGER_NS each, so a port scan disturbs nobody.
 * Invariant: a rank enters round k + 1 only when it has all of round k's result, so one result buffer serves everybody;
 * what is gathered lies in another.  The first failure is told to all, and nothing else is after it.
 * Threads: all state is the thread's, but `closing`; no call on a socket waits, only poll does. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "job/tcp_store_server.h"
#include "base/clean.h"
#include "base/clock.h"
#include "base/secret.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/tcp_store_wire.h"

enum { STRANGERS = 16, LOOK_MS = 200 };
#define STRANGER_NS UINT64_C(5000000000)
#define SUSPENDED_NS UINT64_C(1000000000)
#define TOLD_NS UINT64_C(1000000000) /* after a failure: until the others have read of it */

typedef struct peer {
  phx__wire wire; /* fd -1: not here */
  uint64_t since_ns;
  bool come, left, told, brought; /* brought: to the round that is gathered */
  const uint8_t *out;             /* what is on its way to it */
  size_t out_left;
  char place[PHX__WIRE_PLACE]; /* "node7, 10.0.0.7, pid 123" */
  phx__claim claim; /* a stranger's that said hello and is to prove it; rank -1: none */
} peer;

struct phx__store_server {
  phx__store_place place;
  phx__secret secret; /* bytes 0: none */
  char address[128]; /* as resolved, with the port */
  int listener, wake;
  pthread_t thread;
  bool is_local, failed;
  uint32_t closing; /* atomic */
  uint64_t session, started_ns, round, round_ns, closing_ns, last_ns;
  int32_t come, brought, refused;
  peer ranks[PHX_RANKS_MAX], strangers[STRANGERS];
  char name[PHX__STORE_NAME], last_refused[128];
  uint32_t bytes;
  int32_t first; /* who came first to this round, and so said its name and bytes */
  size_t result_bytes, welcome_bytes, failure_bytes;
  uint8_t hellos[STRANGERS][PHX__WIRE_HELLO_BYTES];
  uint8_t failure[PHX__WIRE_HEAD + PHX__WIRE_MESSAGE];
  uint8_t welcome[PHX__WIRE_HEAD + PHX_RANKS_MAX * PHX__WIRE_PLACE];
  uint8_t bodies[PHX_RANKS_MAX][PHX__WIRE_TO_STORE];
  uint8_t gathered[PHX__WIRE_FROM_STORE], result[PHX__WIRE_HEAD + PHX__WIRE_FROM_STORE];
};

/* ---- failure ---- */
static void fail(phx__store_server *s, int32_t who, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void fail(phx__store_server *s, int32_t who, const char *format, ...) {
  char *text = (char *)s->failure + PHX__WIRE_HEAD;
  va_list args;
  if (s->failed) return;
  s->failed = true;
  va_start(args, format);
  vsnprintf(text, PHX__WIRE_MESSAGE, format, args);
  va_end(args);
  phx__clean(text, PHX__WIRE_MESSAGE);
  const phx__frame head = {PHX__WIRE_FAILED, who, s->session, 0, (uint32_t)strlen(text)};
  phx__frame_head(&head, s->failure);
  s->failure_bytes = PHX__WIRE_HEAD + head.bytes;
}

static void fail_absent(phx__store_server *s, bool at_start) {
  char list[160] = "", more[200] = "";
  size_t used = 0;
  int32_t n = 0, who = -1;
  for (int32_t r = 0; r < s->place.size; r++) {
    const peer *p = &s->ranks[r];
    if (at_start ? p->come : p->brought) continue;
    if (n++ == 0) who = r;
    if (used + 100 < sizeof list && !at_start)
      used += (size_t)snprintf(list + used, sizeof list - used, "%s%d (%.80s)", used ? ", " : "", r, p->place);
    else if (used + 8 < sizeof list)
      used += (size_t)snprintf(list + used, sizeof list - used, "%s%d", used ? ", " : "", r);
  }
  if (s->refused)
    snprintf(more, sizeof more, "; %d connections were refused, the last from %.110s", s->refused, s->last_refused);
  else if (s->is_local)
    snprintf(more, sizeof more, "; that address is this machine's own: others cannot reach it");
  if (at_start)
    fail(s, who, "%s %s never came to %s within %g s, %d of %d are here: do they run, and with this MASTER_ADDR and "
         "MASTER_PORT?%s", n == 1 ? "rank" : "ranks", list, s->address, s->place.timeout_s, s->come, s->place.size,
         more);
  else
    fail(s, who, "%s %s did not come to '%s' within %g s", n == 1 ? "rank" : "ranks", list, s->name,
         s->place.timeout_s);
}

/* ---- strangers ---- */
static void hang_up(peer *p) {
  if (p->wire.fd >= 0) phx__sys.close(p->wire.fd);
  p->wire.fd = -1;
}

static void peer_address(int fd, char *text, size_t bytes) {
  struct sockaddr_storage from;
  socklen_t length = sizeof from;
  if (getpeername(fd, (struct sockaddr *)&from, &length) != 0 ||
      getnameinfo((struct sockaddr *)&from, length, text, (socklen_t)bytes, NULL, 0, NI_NUMERICHOST) != 0)
    snprintf(text, bytes, "an unknown address");
}

/* why NULL: it did not even speak our language, so it is not answered. */
static void refuse(phx__store_server *s, peer *p, const char *why) {
  uint8_t frame[PHX__WIRE_HEAD + PHX__WIRE_MESSAGE];
  char from[64];
  peer_address(p->wire.fd, from, sizeof from);
  s->refused++;
  snprintf(s->last_refused, sizeof s->last_refused, "%s: %.50s", from, why ? why : "no rank of this version");
  if (why) {
    const phx__frame head = {PHX__WIRE_REFUSED, -1, 0, 0, (uint32_t)strnlen(why, PHX__WIRE_MESSAGE)};
    phx__frame_head(&head, frame);
    memcpy(frame + PHX__WIRE_HEAD, why, head.bytes);
    (void)phx__wire_send(p->wire.fd, frame, PHX__WIRE_HEAD + head.bytes, 0);
  }
  hang_up(p);
}

static void welcome_all(phx__store_server *s) {
  const phx__frame head = {PHX__WIRE_WELCOME, -1, s->session, 0, (uint32_t)s->place.size * PHX__WIRE_PLACE};
  phx__frame_head(&head, s->welcome);
  s->welcome_bytes = PHX__WIRE_HEAD + head.bytes;
  for (int32_t r = 0; r < s->place.size; r++) {
    memcpy(s->welcome + PHX__WIRE_HEAD + r * PHX__WIRE_PLACE, s->ranks[r].place, PHX__WIRE_PLACE);
    s->ranks[r].out = s->welcome;
    s->ranks[r].out_left = s->welcome_bytes;
  }
  phx__sys.close(s->listener); /* nobody else is expected */
  s->listener = -1;
}

/* What is wrong with a claim; "": nothing. */
static void judge(const phx__store_server *s, const phx__claim *c, char *why, size_t bytes) {
  why[0] = 0;
  if (c->job != s->place.job)
    snprintf(why, bytes, "another job meets at %s: give this one a MASTER_PORT of its own", s->address);
  else if (c->size != s->place.size || c->rank < 0 || c->rank >= c->size)
    snprintf(why, bytes,
             "rank %d of %d is told, but this job has %d ranks (or another job meets at %s: give each a MASTER_PORT of "
             "its own)", c->rank, c->size, s->place.size, s->address);
  else if (!c->has_secret != !s->secret.bytes)
    snprintf(why, bytes, "%s has a PHALANX_SECRET, %s has none: give all ranks the same, or none",
             c->has_secret ? "this rank" : "rank 0", c->has_secret ? "rank 0" : "this rank");
}

/* It is a rank from now on, unless somebody else is that rank. */
static void let_in(phx__store_server *s, peer *p) {
  const phx__claim *c = &p->claim;
  char why[PHX__WIRE_MESSAGE], from[64];
  peer *mine = &s->ranks[c->rank];
  if (mine->come) {
    snprintf(why, sizeof why,
             "rank %d is here already (%s): does another job use MASTER_PORT=%s, too? Give each a port of its own",
             c->rank, mine->place, s->place.port);
    refuse(s, p, why);
    return;
  }
  peer_address(p->wire.fd, from, sizeof from);
  mine->wire.fd = p->wire.fd;
  mine->come = true;
  p->wire.fd = -1;
  snprintf(mine->place, sizeof mine->place, "%.45s, %.60s, pid %d", c->host[0] ? c->host : "no name", from, c->pid);
  s->come++;
  if (s->come == s->place.size && !s->failed) welcome_all(s);
}

/* The store proves itself at once, so that it can be left by a rank that asks too much of it. */
static void challenge(phx__store_server *s, peer *p) {
  uint8_t frame[PHX__WIRE_HEAD + PHX__WIRE_NONCE + PHX__PROOF_BYTES], *body = frame + PHX__WIRE_HEAD;
  const phx__frame head = {PHX__WIRE_CHALLENGE, -1, 0, 0, PHX__WIRE_NONCE + PHX__PROOF_BYTES};
  if (phx__random(p->claim.stores, sizeof p->claim.stores, NULL) != PHX_OK) {
    refuse(s, p, "rank 0 has no random numbers");
    return;
  }
  phx__frame_head(&head, frame);
  memcpy(body, p->claim.stores, PHX__WIRE_NONCE);
  phx__claim_prove(&p->claim, &s->secret, PHX__PROOF_OF_STORE, body + PHX__WIRE_NONCE);
  if (!phx__wire_send(p->wire.fd, frame, sizeof frame, 0)) refuse(s, p, NULL);
}

static void hello(phx__store_server *s, peer *p) {
  const phx__frame *f = &p->wire.frame;
  const uint8_t *body = p->wire.body;
  char why[PHX__WIRE_MESSAGE];
  p->claim = (phx__claim){.job = f->session,
                          .rank = f->rank,
                          .size = (int32_t)phx__get_u32(body),
                          .pid = (int32_t)phx__get_u32(body + 4),
                          .has_secret = phx__get_u32(body + 8) != 0};
  memcpy(p->claim.mine, body + 12, PHX__WIRE_NONCE);
  memcpy(p->claim.host, body + 12 + PHX__WIRE_NONCE, PHX__WIRE_HOST - 1);
  phx__clean(p->claim.host, PHX__WIRE_HOST);
  judge(s, &p->claim, why, sizeof why);
  if (why[0])
    refuse(s, p, why);
  else if (s->secret.bytes)
    challenge(s, p);
  else
    let_in(s, p);
}

static void check_proof(phx__store_server *s, peer *p) {
  uint8_t expected[PHX__PROOF_BYTES];
  phx__claim_prove(&p->claim, &s->secret, PHX__PROOF_OF_RANK, expected);
  if (phx__proofs_are_equal(expected, p->wire.body))
    let_in(s, p);
  else
    refuse(s, p, "it does not know the job's secret: give all ranks the same PHALANX_SECRET");
}

static void take_stranger(phx__store_server *s, peer *p) {
  const phx__frame *f = &p->wire.frame;
  if (f->kind == PHX__WIRE_HELLO && f->bytes == PHX__WIRE_HELLO_BYTES && p->claim.rank < 0)
    hello(s, p);
  else if (f->kind == PHX__WIRE_PROOF && f->bytes == PHX__PROOF_BYTES && p->claim.rank >= 0)
    check_proof(s, p);
  else
    refuse(s, p, NULL);
}

static void take_connection(phx__store_server *s, int fd) {
  int oldest = 0;
  for (int i = 0; i < STRANGERS; i++) {
    if (s->strangers[i].wire.fd < 0) {
      oldest = i;
      break;
    }
    if (s->strangers[i].since_ns < s->strangers[oldest].since_ns) oldest = i;
  }
  peer *p = &s->strangers[oldest];
  if (p->wire.fd >= 0) refuse(s, p, NULL);
  phx__wire_options(fd, s->place.timeout_s);
  *p = (peer){.wire = {.fd = fd, .limit = PHX__WIRE_HELLO_BYTES, .body = s->hellos[oldest]},
              .since_ns = s->last_ns,
              .claim = {.rank = -1}};
}

static void accept_one(phx__store_server *s) {
  const int fd = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd >= 0) take_connection(s, fd);
}

static void read_stranger(phx__store_server *s, peer *p) {
  const int got = phx__wire_read(&p->wire);
  if (got == PHX__WIRE_WHOLE)
    take_stranger(s, p);
  else if (got != PHX__WIRE_MORE)
    refuse(s, p, NULL);
}

/* ---- ranks ---- */
static void finish_round(phx__store_server *s) {
  const phx__frame head = {PHX__WIRE_RESULT, -1, s->session, s->round, s->bytes * (uint32_t)s->place.size};
  phx__frame_head(&head, s->result);
  memcpy(s->result + PHX__WIRE_HEAD, s->gathered, head.bytes);
  for (int32_t r = 0; r < s->place.size; r++) {
    s->ranks[r].out = s->result;
    s->ranks[r].out_left = PHX__WIRE_HEAD + head.bytes;
    s->ranks[r].brought = false;
  }
  s->brought = 0;
  s->round++;
}

static void bring(phx__store_server *s, int32_t r) {
  peer *p = &s->ranks[r];
  const phx__frame *f = &p->wire.frame;
  const uint32_t bytes = f->bytes - PHX__STORE_NAME;
  char name[PHX__STORE_NAME];
  if (f->bytes <= PHX__STORE_NAME || f->number != s->round || p->brought || p->out_left || p->left) {
    fail(s, r, "rank %d (%s) speaks out of turn", r, p->place);
    return;
  }
  memcpy(name, p->wire.body, sizeof name);
  name[sizeof name - 1] = 0;
  phx__clean(name, sizeof name);
  if (s->brought == 0) {
    memcpy(s->name, name, sizeof name);
    s->bytes = bytes;
    s->first = r;
    s->round_ns = s->last_ns;
  }
  if (bytes != s->bytes || strcmp(name, s->name) != 0) {
    fail(s, r, "the ranks take different ways: rank %d (%.80s) brings %u bytes to '%s', rank %d %u bytes to '%s'", r,
         p->place, bytes, name, s->first, s->bytes, s->name);
    return;
  }
  memcpy(s->gathered + (size_t)r * bytes, p->wire.body + PHX__STORE_NAME, bytes);
  p->brought = true;
  if (++s->brought == s->place.size) finish_round(s);
}

static void take_frame(phx__store_server *s, int32_t r) {
  peer *p = &s->ranks[r];
  const phx__frame *f = &p->wire.frame;
  if (f->kind == PHX__WIRE_FAILED && f->session == s->session) {
    if (f->bytes > 0 && p->wire.body[0])
      fail(s, r, "%.*s", (int)f->bytes, (const char *)p->wire.body);
    else
      fail(s, r, "rank %d (%s) has failed and does not say why", r, p->place);
  } else if (f->kind == PHX__WIRE_LEAVE) {
    p->left = true;
  } else if (f->kind == PHX__WIRE_EXCHANGE && f->session == s->session) {
    bring(s, r);
  } else {
    fail(s, r, "rank %d (%s) sends what no rank of this job would", r, p->place);
  }
}

static void read_rank(phx__store_server *s, int32_t r) {
  peer *p = &s->ranks[r];
  int got = PHX__WIRE_WHOLE;
  while (got == PHX__WIRE_WHOLE) {
    got = phx__wire_read(&p->wire);
    if (got == PHX__WIRE_WHOLE && !s->failed) take_frame(s, r);
  }
  if (got == PHX__WIRE_MORE) return;
  const int why = got == PHX__WIRE_GARBAGE ? EPROTO : errno;
  hang_up(p);
  if (!p->left)
    fail(s, r, "rank %d (%s) is gone: its connection %s%s", r, p->place, why ? "broke: " : "closed",
         why ? strerror(why) : "");
}

static void write_rank(phx__store_server *s, peer *p) {
  if (p->out_left == 0 && s->failed && !p->told) {
    p->out = s->failure;
    p->out_left = s->failure_bytes;
    p->told = true;
  }
  while (p->out_left > 0) {
    const ssize_t n = send(p->wire.fd, p->out, p->out_left, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return; /* later; a broken connection is found by reading */
    p->out += n;
    p->out_left -= (size_t)n;
  }
}

/* ---- the thread ---- */
static void look_at_clocks(phx__store_server *s) {
  const uint64_t now = phx__now_ns();
  const uint64_t limit = s->place.timeout_s > 0 ? (uint64_t)(s->place.timeout_s * 1e9) : UINT64_MAX;
  if (now - s->last_ns > SUSPENDED_NS) { /* this process did not run: nobody's absence */
    s->started_ns += now - s->last_ns;
    s->round_ns += now - s->last_ns;
  }
  s->last_ns = now;
  for (int i = 0; i < STRANGERS; i++)
    if (s->strangers[i].wire.fd >= 0 && now - s->strangers[i].since_ns > STRANGER_NS) refuse(s, &s->strangers[i], NULL);
  if (s->failed) return;
  if (s->come < s->place.size && now - s->started_ns >= limit) fail_absent(s, true);
  if (s->brought > 0 && now - s->round_ns >= limit) fail_absent(s, false);
  for (int32_t r = 0; s->brought > 0 && r < s->place.size; r++)
    if (s->ranks[r].left && !s->ranks[r].brought)
      fail(s, r, "rank %d (%s) has left, and rank %d waits for it in '%s'", r, s->ranks[r].place, s->first, s->name);
}

static bool is_over(phx__store_server *s) {
  if (!__atomic_load_n(&s->closing, __ATOMIC_ACQUIRE)) return false;
  if (!s->closing_ns) s->closing_ns = s->last_ns;
  bool here = false;
  for (int32_t r = 0; r < s->place.size; r++) here |= s->ranks[r].wire.fd >= 0;
  if (!here) return true;
  const double waited = (double)(s->last_ns - s->closing_ns);
  return s->failed ? waited >= (double)TOLD_NS : s->place.timeout_s > 0 && waited >= s->place.timeout_s * 1e9;
}

/* Whatever is there to be read, written or timed out; waits for it at most wait_ms. */
static void turn(phx__store_server *s, int wait_ms) {
  struct pollfd fds[2 + STRANGERS + PHX_RANKS_MAX];
  fds[0] = (struct pollfd){.fd = s->wake, .events = POLLIN};
  fds[1] = (struct pollfd){.fd = s->listener, .events = POLLIN}; /* -1 is passed over */
  struct pollfd *strangers = fds + 2, *ranks = strangers + STRANGERS;
  for (int i = 0; i < STRANGERS; i++)
    strangers[i] = (struct pollfd){.fd = s->strangers[i].wire.fd, .events = POLLIN};
  for (int32_t r = 0; r < s->place.size; r++) {
    const peer *p = &s->ranks[r];
    const bool writes = p->out_left > 0 || (s->failed && !p->told);
    ranks[r] = (struct pollfd){.fd = p->wire.fd, .events = (short)(POLLIN | (writes ? POLLOUT : 0))};
  }
  uint64_t woken;
  const int n = poll(fds, (nfds_t)(2 + STRANGERS + s->place.size), wait_ms);
  look_at_clocks(s);
  if (n <= 0) return;
  if (fds[0].revents && phx__sys.read(s->wake, &woken, sizeof woken) < 0) return;
  for (int32_t r = 0; r < s->place.size; r++) {
    if (ranks[r].revents & ~POLLOUT) read_rank(s, r);
    if ((ranks[r].revents & POLLOUT) && s->ranks[r].wire.fd >= 0) write_rank(s, &s->ranks[r]);
  }
  for (int i = 0; i < STRANGERS; i++)
    if (strangers[i].revents && s->strangers[i].wire.fd >= 0) read_stranger(s, &s->strangers[i]);
  if (fds[1].revents && s->listener >= 0) accept_one(s);
}

static void *serve(void *arg) {
  phx__store_server *s = arg;
  while (!is_over(s)) turn(s, LOOK_MS);
  return NULL;
}

/* ---- beginning and end ---- */
static phx_status fail_listen(const phx__store_place *place, int why, phx_error *err) {
  char host[64] = "this machine";
  gethostname(host, sizeof host - 1);
  if (why == EADDRINUSE)
    return phx_fail(err, PHX_COMM,
                    "port %s of %s is in use: another job meets there, or another program listens; set MASTER_PORT to "
                    "a free port, on every machine", place->port, place->address);
  if (why == EADDRNOTAVAIL)
    return phx_fail(err, PHX_COMM,
                    "MASTER_ADDR=%s is no address of %s, where rank 0 runs: set it to one of this machine's that the "
                    "others reach, on every machine", place->address, host);
  return phx_fail_errno(err, PHX_COMM, why, "rank 0 cannot listen at MASTER_ADDR=%s, port %s", place->address,
                        place->port);
}

static phx_status listen_at(phx__store_server *s, phx_error *err) {
  const phx__store_place *place = &s->place;
  struct addrinfo *found = NULL;
  int why = 0, yes = 1;
  PHX_TRY(phx__store_resolve(place, &found, err));
  for (struct addrinfo *a = found; a && s->listener < 0; a = a->ai_next) {
    char host[64] = "";
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) != 0 ||
        bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, 2 * PHX_RANKS_MAX) != 0) {
      if (!why || errno == EADDRINUSE) why = errno;
      if (fd >= 0) phx__sys.close(fd);
      continue;
    }
    s->listener = fd;
    (void)getnameinfo(a->ai_addr, a->ai_addrlen, host, sizeof host, NULL, 0, NI_NUMERICHOST);
    s->is_local = strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0;
    snprintf(s->address, sizeof s->address, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, place->port);
  }
  freeaddrinfo(found);
  return s->listener < 0 ? fail_listen(place, why, err) : PHX_OK;
}

static void set_up(phx__store_server *s, const phx__store_place *place) {
  s->place = *place;
  s->place.secret = NULL; /* it lasts no longer than this call */
  if (place->secret) s->secret = *place->secret;
  s->listener = s->wake = -1;
  s->round = 1;
  s->started_ns = s->last_ns = phx__now_ns();
  for (int i = 0; i < STRANGERS; i++) s->strangers[i].wire.fd = -1;
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++)
    s->ranks[r].wire = (phx__wire){.fd = -1, .limit = PHX__WIRE_TO_STORE, .body = s->bodies[r]};
}

static void free_server(phx__store_server *s) {
  for (int i = 0; i < STRANGERS; i++) hang_up(&s->strangers[i]);
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) hang_up(&s->ranks[r]);
  if (s->listener >= 0) phx__sys.close(s->listener);
  if (s->wake >= 0) phx__sys.close(s->wake);
  phx__free(s);
}

phx_status phx__store_serve(const phx__store_place *place, phx__store_server **out, phx_error *err) {
  phx__store_server *s = phx__calloc(1, sizeof *s);
  phx_status status = PHX_OK;
  sigset_t all, before;
  if (!s) return phx_fail(err, PHX_NOMEM, "no memory for the store of %d ranks, %zu bytes", place->size, sizeof *s);
  set_up(s, place);
  if (getrandom(&s->session, sizeof s->session, GRND_NONBLOCK) < 0) s->session = s->started_ns;
  s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (s->wake < 0) {
    status = phx_fail_errno(err, PHX_NOMEM, errno, "the store needs an eventfd");
    goto done;
  }
  PHX_TRY_GOTO(listen_at(s, err), status, done);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are [main]'s */
  const int code = pthread_create(&s->thread, NULL, serve, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (code != 0) {
    status = phx_fail_errno(err, PHX_NOMEM, code, "cannot start the store's thread");
    goto done;
  }
  *out = s;
  return PHX_OK;
done:
  free_server(s);
  return status;
}

void phx__store_serve_end(phx__store_server *s) {
  const uint64_t one = 1;
  if (!s) return;
  __atomic_store_n(&s->closing, 1, __ATOMIC_RELEASE);
  (void)phx__sys.write(s->wake, &one, sizeof one); /* else it looks by itself, LOOK_MS later */
  pthread_join(s->thread, NULL);
  free_server(s);
}
