/* core/job/tcp_store.c - see tcp_store.h: a rank's side of the store.
 *
 * [main] finds rank 0, says who it is and waits until all are there; then a thread reads whatever the store sends, so
 * that a failure elsewhere is known at once.  Rank 0 has a connection like everybody's, to the server in its process.
 * Invariant: one exchange is under way at a time; its result is written by the thread to where [main] waits for it.
 * Waiting: every wait has a deadline, later than the server's, which knows who is absent; this one is for a server that
 * does not answer.  Time in which this process was suspended does not count.
 * When the job has failed, the thread gives [main] some time to end this process, and then ends it: a call into a
 * driver may never return, and a launcher ends nobody while nobody has ended.
 * Threads: as tcp_store.h says; `sending` is a lock that a signal handler may give up on. */
#include "job/tcp_store.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/clean.h"
#include "base/clock.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/tcp_store_server.h"
#include "job/tcp_store_wire.h"

enum { SEND_MS = 1000, SEND_TURNS = 200, RETRY_MS = 50, SLICE_MS = 200 };
enum { LAST_LEAST_S = 2, LAST_MOST_S = 10, OWN_END_S = 60 }; /* for [main] to end the process in; see_out */
#define GRACE_S 3 /* longer than the server waits: it knows the names */
#define SUSPENDED_NS UINT64_C(1000000000)

struct phx__store {
  phx__store_place place;
  phx__store_server *server; /* rank 0's */
  int wake;
  uint64_t session;
  phx__claim claim;
  bool proved; /* to this connection's store */
  pthread_t thread;
  bool running;
  uint32_t sending; /* atomic */
  int ends;         /* atomic: the exit status with which [main] ends this process now, or 0 */
  pthread_mutex_t lock;
  pthread_cond_t changed;
  /* under the lock */
  bool failed, leaving;
  uint64_t round, done; /* of exchanges: entered, and finished */
  void *all;
  size_t all_bytes;
  char message[PHX__WIRE_MESSAGE];
  /* the thread's, after open */
  phx__wire wire;
  char places[PHX_RANKS_MAX][PHX__WIRE_PLACE];
  uint8_t body[PHX__WIRE_FROM_STORE];
};

/* ---- a deadline ---- */
typedef struct waited {
  uint64_t start, last;
  double limit_s; /* 0: none */
} waited;
static waited wait_begin(double limit_s) {
  const uint64_t now = phx__now_ns();
  return (waited){now, now, limit_s};
}
static bool wait_is_over(waited *w) {
  const uint64_t now = phx__now_ns();
  if (now - w->last > SUSPENDED_NS) w->start += now - w->last;
  w->last = now;
  return w->limit_s > 0 && (double)(now - w->start) >= w->limit_s * 1e9;
}
static double with_grace(double timeout_s) { return timeout_s > 0 ? timeout_s + GRACE_S : 0; }

void phx__store_who(const phx__store *s, int32_t rank, char *text, size_t bytes) {
  snprintf(text, bytes, s->places[rank][0] ? "rank %d (%s)" : "rank %d", rank, s->places[rank]);
}

/* ---- coming ---- */
static int poll_one(int fd, short events, int ms) {
  struct pollfd ready = {.fd = fd, .events = events};
  return poll(&ready, 1, ms);
}

/* One address, once: a connected socket, or -1 and errno. */
static int connect_one(const struct addrinfo *a) {
  int why = 0;
  socklen_t bytes = sizeof why;
  const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  if (connect(fd, a->ai_addr, a->ai_addrlen) != 0) {
    why = errno;
    if (why == EINPROGRESS) why = poll_one(fd, POLLOUT, 1000) == 1 ? 0 : ETIMEDOUT;
    if (!why && getsockopt(fd, SOL_SOCKET, SO_ERROR, &why, &bytes) != 0) why = errno;
  }
  if (!why) return fd;
  phx__sys.close(fd);
  errno = why;
  return -1;
}

static phx_status fail_unreached(const phx__store_place *place, int why, phx_error *err) {
  return phx_fail_errno(err, PHX_COMM, why,
                        "rank %d did not reach rank 0 at MASTER_ADDR=%s, port %s, within %g s: does rank 0 run there, "
                        "and is the port open?  The last try said", place->rank, place->address, place->port,
                        place->timeout_s);
}

/* Tries every address that the name has, again and again: rank 0 may come later. */
static phx_status reach(const phx__store_place *place, waited *w, int *out, phx_error *err) {
  struct addrinfo *found = NULL;
  int fd = -1, why = 0;
  PHX_TRY(phx__store_resolve(place, &found, err));
  while (fd < 0) {
    for (const struct addrinfo *a = found; a && fd < 0; a = a->ai_next) {
      fd = connect_one(a);
      if (fd < 0) why = errno;
    }
    if (fd >= 0 || wait_is_over(w)) break;
    nanosleep(&(struct timespec){0, RETRY_MS * 1000000L}, NULL);
  }
  freeaddrinfo(found);
  if (fd < 0) return fail_unreached(place, why, err);
  phx__wire_options(fd, place->timeout_s);
  *out = fd;
  return PHX_OK;
}

static bool has_secret(const phx__store *s) { return s->place.secret && s->place.secret->bytes > 0; }

static bool say_hello(phx__store *s) {
  uint8_t frame[PHX__WIRE_HEAD + PHX__WIRE_HELLO_BYTES] = {0}, *body = frame + PHX__WIRE_HEAD;
  const phx__frame head = {PHX__WIRE_HELLO, s->place.rank, s->place.job, 0, PHX__WIRE_HELLO_BYTES};
  phx__frame_head(&head, frame);
  phx__put_u32(body, (uint32_t)s->place.size);
  phx__put_u32(body + 4, (uint32_t)getpid());
  phx__put_u32(body + 8, has_secret(s));
  memcpy(body + 12, s->claim.mine, PHX__WIRE_NONCE);
  (void)gethostname((char *)body + 12 + PHX__WIRE_NONCE, PHX__WIRE_HOST - 1);
  s->proved = false;
  return phx__wire_send(s->wire.fd, frame, sizeof frame, SEND_MS);
}

/* The store asks for a proof, and gives one.  One that cannot is an impostor, or the store of somebody else. */
static phx_status prove(phx__store *s, phx_error *err) {
  uint8_t expected[PHX__PROOF_BYTES], frame[PHX__WIRE_HEAD + PHX__PROOF_BYTES];
  const phx__frame head = {PHX__WIRE_PROOF, s->place.rank, s->place.job, 0, PHX__PROOF_BYTES};
  if (!has_secret(s))
    return phx_fail(err, PHX_INVALID,
                    "rank 0 at %s, port %s, asks rank %d for the job's secret: give every rank the PHALANX_SECRET or "
                    "PHALANX_SECRET_FILE of rank 0 (or another job meets there: give each a MASTER_PORT of its own)",
                    s->place.address, s->place.port, s->place.rank);
  memcpy(s->claim.stores, s->body, PHX__WIRE_NONCE);
  phx__claim_prove(&s->claim, s->place.secret, PHX__PROOF_OF_STORE, expected);
  if (!phx__proofs_are_equal(expected, s->body + PHX__WIRE_NONCE))
    return phx_fail(err, PHX_INVALID,
                    "what listens at MASTER_ADDR=%s, port %s, does not know the secret of rank %d: it has another "
                    "PHALANX_SECRET, or another job meets there: give each job a MASTER_PORT of its own",
                    s->place.address, s->place.port, s->place.rank);
  phx__frame_head(&head, frame);
  phx__claim_prove(&s->claim, s->place.secret, PHX__PROOF_OF_RANK, frame + PHX__WIRE_HEAD);
  s->proved = true;
  (void)phx__wire_send(s->wire.fd, frame, sizeof frame, SEND_MS); /* a broken connection is found by reading */
  return PHX_OK;
}

static phx_status take_answer(phx__store *s, phx_error *err) {
  const phx__frame *f = &s->wire.frame;
  char *text = (char *)s->body;
  if (f->kind == PHX__WIRE_REFUSED || f->kind == PHX__WIRE_FAILED) phx__clean(text, f->bytes);
  if (f->kind == PHX__WIRE_REFUSED)
    return phx_fail(err, PHX_INVALID, "rank %d is refused by rank 0 at %s, port %s: %.*s", s->place.rank,
                    s->place.address, s->place.port, (int)f->bytes, text);
  if (f->kind == PHX__WIRE_FAILED) return phx_fail(err, PHX_COMM, "the ranks did not meet: %.*s", (int)f->bytes, text);
  if (f->kind != PHX__WIRE_WELCOME || f->bytes != (uint32_t)s->place.size * PHX__WIRE_PLACE)
    return phx_fail(err, PHX_COMM, "rank 0 at %s, port %s, gives an answer of another version: all ranks must be the "
                    "same phalanx", s->place.address, s->place.port);
  if (has_secret(s) && !s->proved)
    return phx_fail(err, PHX_INVALID,
                    "what listens at MASTER_ADDR=%s, port %s, lets rank %d in without its secret: it is not rank 0 of "
                    "this job", s->place.address, s->place.port, s->place.rank);
  s->session = f->session;
  memcpy(s->places, s->body, f->bytes);
  for (int32_t r = 0; r < s->place.size; r++) {
    s->places[r][PHX__WIRE_PLACE - 1] = 0;
    phx__clean(s->places[r], PHX__WIRE_PLACE);
  }
  return PHX_OK;
}

static bool is_challenge(const phx__store *s, int got) {
  return got == PHX__WIRE_WHOLE && s->wire.frame.kind == PHX__WIRE_CHALLENGE && !s->proved &&
         s->wire.frame.bytes == PHX__WIRE_NONCE + PHX__PROOF_BYTES;
}

/* Reached, said hello, and all are there.  A connection that is closed without a word is tried again. */
static phx_status come(phx__store *s, phx_error *err) {
  waited all = wait_begin(s->place.timeout_s);
  for (;;) {
    PHX_TRY(reach(&s->place, &all, &s->wire.fd, err));
    waited here = wait_begin(with_grace(s->place.timeout_s));
    int got = say_hello(s) ? PHX__WIRE_MORE : PHX__WIRE_CLOSED;
    while (got == PHX__WIRE_MORE) {
      if (wait_is_over(&here))
        return phx_fail(err, PHX_COMM, "rank %d is connected to %s, port %s, but rank 0 does not answer within %g s",
                        s->place.rank, s->place.address, s->place.port, here.limit_s);
      if (poll_one(s->wire.fd, POLLIN, SLICE_MS) != 0) got = phx__wire_read(&s->wire);
      if (!is_challenge(s, got)) continue;
      PHX_TRY(prove(s, err));
      got = PHX__WIRE_MORE;
    }
    const int why = errno;
    if (got == PHX__WIRE_WHOLE) return take_answer(s, err);
    if (got == PHX__WIRE_GARBAGE)
      return phx_fail(err, PHX_COMM,
                      "what listens at MASTER_ADDR=%s, port %s, is no rank 0 of this version: another program's port? "
                      "Set MASTER_PORT to a free one, on every machine", s->place.address, s->place.port);
    phx__sys.close(s->wire.fd);
    s->wire.fd = -1;
    s->wire.have = 0;
    if (wait_is_over(&all)) return fail_unreached(&s->place, why ? why : ECONNRESET, err);
    nanosleep(&(struct timespec){0, RETRY_MS * 1000000L}, NULL);
  }
}

/* ---- the thread ---- */
static void fall(phx__store *s, int32_t who, const char *message, size_t bytes) {
  if (who < 0 || who >= s->place.size) who = 0;
  if (bytes > sizeof s->message - 1) bytes = sizeof s->message - 1;
  pthread_mutex_lock(&s->lock);
  const bool first = !s->failed && !s->leaving;
  if (first) {
    memcpy(s->message, message, bytes);
    s->message[bytes] = 0;
    phx__clean(s->message, bytes);
    s->failed = true;
  }
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
  if (first && s->place.failed) s->place.failed(s->place.ctx, who, s->message);
}

/* false: nothing more is read. */
static bool take_frame(phx__store *s) {
  const phx__frame *f = &s->wire.frame;
  if (f->kind == PHX__WIRE_FAILED) {
    fall(s, f->rank, (const char *)s->body, f->bytes);
    return false;
  }
  pthread_mutex_lock(&s->lock);
  const bool fits = f->kind == PHX__WIRE_RESULT && f->session == s->session && f->number == s->round &&
                    s->done + 1 == s->round && f->bytes == s->all_bytes && s->all;
  if (fits) {
    memcpy(s->all, s->body, f->bytes);
    s->done = s->round;
    pthread_cond_broadcast(&s->changed);
  }
  pthread_mutex_unlock(&s->lock);
  static const char nonsense[] = "rank 0 sends what no store of this job would";
  if (!fits) fall(s, 0, nonsense, sizeof nonsense - 1);
  return fits;
}

/* After the failure: until phx__store_close. */
static void see_out(phx__store *s) {
  double most = s->place.timeout_s / 2; /* 0: for ever */
  if (most > LAST_MOST_S) most = LAST_MOST_S;
  if (most > 0 && most < LAST_LEAST_S) most = LAST_LEAST_S;
  waited w = wait_begin(most > 0 ? most : 0);
  char text[PHX__WIRE_MESSAGE + 160];
  int status = 0;
  while (poll_one(s->wake, POLLIN, SLICE_MS) <= 0) {
    const int ends = __atomic_load_n(&s->ends, __ATOMIC_ACQUIRE);
    if (ends && !status && w.limit_s > 0) w = wait_begin(OWN_END_S);
    status = ends;
    if (!wait_is_over(&w)) continue;
    const int n = snprintf(text, sizeof text, "phalanx: rank %d: the job has failed: %s; this process did not end by "
                           "itself within %g s, and is ended\n", s->place.rank, s->message, w.limit_s);
    const ssize_t heard = write(STDERR_FILENO, text, (size_t)n);
    (void)heard; /* the same end */
    phx__exit_now(status ? status : PHX__EXIT_RANK);
  }
}

static void *listen_to(void *arg) {
  phx__store *s = arg;
  struct pollfd fds[2] = {{.fd = s->wire.fd, .events = POLLIN}, {.fd = s->wake, .events = POLLIN}};
  char who[PHX__WIRE_PLACE + 32], text[PHX__WIRE_MESSAGE];
  for (;;) {
    if (poll(fds, 2, -1) < 0) continue;
    if (fds[1].revents) return NULL;
    const int got = phx__wire_read(&s->wire);
    if (got == PHX__WIRE_MORE) continue;
    if (got == PHX__WIRE_WHOLE && take_frame(s)) continue;
    if (got != PHX__WIRE_WHOLE) {
      const int why = got == PHX__WIRE_GARBAGE ? EPROTO : errno;
      phx__store_who(s, 0, who, sizeof who);
      snprintf(text, sizeof text, "%s is gone: its connection %s%s", who, why ? "broke: " : "closed",
               why ? strerror(why) : "");
      fall(s, 0, text, strlen(text));
    }
    see_out(s);
    return NULL;
  }
}

/* ---- beginning and end ---- */
static phx_status start(phx__store *s, phx_error *err) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are [main]'s */
  const int code = pthread_create(&s->thread, NULL, listen_to, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (code != 0) return phx_fail_errno(err, PHX_NOMEM, code, "cannot start the thread that listens to the store");
  s->running = true;
  return PHX_OK;
}

static void free_store(phx__store *s) {
  const uint64_t one = 1;
  if (s->running) {
    (void)phx__sys.write(s->wake, &one, sizeof one);
    pthread_join(s->thread, NULL);
  }
  if (s->wire.fd >= 0) phx__sys.close(s->wire.fd);
  if (s->wake >= 0) phx__sys.close(s->wake);
  phx__store_serve_end(s->server);
  pthread_cond_destroy(&s->changed);
  pthread_mutex_destroy(&s->lock);
  phx__free(s);
}

phx_status phx__store_open(const phx__store_place *place, phx__store **out, phx_error *err) {
  phx_status status = PHX_OK;
  pthread_condattr_t monotonic;
  if (place->size < 1 || place->size > PHX_RANKS_MAX || place->rank < 0 || place->rank >= place->size)
    return phx_fail(err, PHX_INVALID, "the store joins 1 to %d ranks; this is rank %d of %d", PHX_RANKS_MAX,
                    place->rank, place->size);
  phx__store *s = phx__calloc(1, sizeof *s);
  if (!s) return phx_fail(err, PHX_NOMEM, "no memory for the store's connection, %zu bytes", sizeof *s);
  s->place = *place;
  s->claim = (phx__claim){.job = place->job, .rank = place->rank, .size = place->size};
  s->wire = (phx__wire){.fd = -1, .limit = sizeof s->body, .body = s->body};
  pthread_mutex_init(&s->lock, NULL);
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&s->changed, &monotonic);
  pthread_condattr_destroy(&monotonic);
  s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (s->wake < 0) {
    status = phx_fail_errno(err, PHX_NOMEM, errno, "the store needs an eventfd");
    goto done;
  }
  PHX_TRY_GOTO(phx__random(s->claim.mine, sizeof s->claim.mine, err), status, done);
  if (place->rank == 0) PHX_TRY_GOTO(phx__store_serve(place, &s->server, err), status, done);
  PHX_TRY_GOTO(come(s, err), status, done);
  s->place.secret = NULL; /* the caller's, until here */
  PHX_TRY_GOTO(start(s, err), status, done);
  *out = s;
  return PHX_OK;
done:
  free_store(s);
  return status;
}

/* ---- sending ---- */
static bool send_frame(phx__store *s, const phx__frame *head, uint8_t *frame) {
  bool sent = false;
  phx__frame_head(head, frame);
  for (int turn = 0; turn < SEND_TURNS; turn++) {
    if (!__atomic_exchange_n(&s->sending, 1, __ATOMIC_ACQUIRE)) {
      sent = phx__wire_send(s->wire.fd, frame, PHX__WIRE_HEAD + head->bytes, SEND_MS);
      __atomic_store_n(&s->sending, 0, __ATOMIC_RELEASE);
      break;
    }
    nanosleep(&(struct timespec){0, 1000000}, NULL);
  }
  return sent;
}

void phx__store_fail(phx__store *s, const char *message) {
  uint8_t frame[PHX__WIRE_HEAD + PHX__WIRE_MESSAGE];
  const size_t bytes = strnlen(message, PHX__WIRE_MESSAGE - 1);
  const phx__frame head = {PHX__WIRE_FAILED, s->place.rank, s->session, 0, (uint32_t)bytes};
  memcpy(frame + PHX__WIRE_HEAD, message, bytes);
  (void)send_frame(s, &head, frame); /* where it cannot be said, the end of the connection says it */
}

void phx__store_ends(phx__store *s, int exit_status) { __atomic_store_n(&s->ends, exit_status, __ATOMIC_RELEASE); }

void phx__store_close(phx__store *s) {
  uint8_t frame[PHX__WIRE_HEAD];
  if (!s) return;
  const phx__frame head = {PHX__WIRE_LEAVE, s->place.rank, s->session, 0, 0};
  pthread_mutex_lock(&s->lock);
  const bool failed = s->failed;
  s->leaving = true;
  pthread_mutex_unlock(&s->lock);
  if (!failed) (void)send_frame(s, &head, frame);
  free_store(s);
}

/* ---- meeting ---- */
/* Under the lock: until the result is there, the job has failed, or the store does not answer. */
static phx_status await(phx__store *s, const char *name, phx_error *err) {
  waited w = wait_begin(with_grace(s->place.timeout_s));
  while (s->done < s->round && !s->failed) {
    struct timespec until;
    if (wait_is_over(&w))
      return phx_fail(err, PHX_COMM, "the store at rank 0 (%s) did not answer in '%s' within %g s", s->places[0], name,
                      w.limit_s);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += SLICE_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
    pthread_cond_timedwait(&s->changed, &s->lock, &until);
  }
  return s->done == s->round ? PHX_OK : phx_fail(err, PHX_COMM, "the job has failed: %s", s->message);
}

phx_status phx__store_exchange(phx__store *s, const char *name, const void *mine, int64_t bytes, void *all,
                               phx_error *err) {
  uint8_t frame[PHX__WIRE_HEAD + PHX__WIRE_TO_STORE] = {0};
  if (bytes < 1 || bytes > PHX_EXCHANGE_MAX)
    return phx_fail(err, PHX_INVALID, "exchange '%s': %lld bytes; expected 1 to %d", name, (long long)bytes,
                    PHX_EXCHANGE_MAX);
  pthread_mutex_lock(&s->lock);
  phx_status status = PHX_OK;
  if (s->failed) {
    status = phx_fail(err, PHX_COMM, "the job has failed: %s", s->message);
    goto done;
  }
  s->round++;
  s->all = all;
  s->all_bytes = (size_t)bytes * (size_t)s->place.size;
  const phx__frame head = {PHX__WIRE_EXCHANGE, s->place.rank, s->session, s->round,
                           (uint32_t)(PHX__STORE_NAME + bytes)};
  snprintf((char *)frame + PHX__WIRE_HEAD, PHX__STORE_NAME, "%s", name);
  memcpy(frame + PHX__WIRE_HEAD + PHX__STORE_NAME, mine, (size_t)bytes);
  (void)send_frame(s, &head, frame); /* a broken connection is the thread's to name */
  status = await(s, name, err);
  s->all = NULL; /* nothing is written there any more */
done:
  pthread_mutex_unlock(&s->lock);
  return status;
}
