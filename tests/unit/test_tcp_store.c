/* The store where ranks of several machines meet: ranks are threads here, each with its own connection over 127.0.0.1;
 * strangers, liars and the dead are sockets that the test drives itself, byte by byte. */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/secret.h"
#include "base/status.h"
#include "job/tcp_store.h"

enum { RANKS = 7, JOB = 77 };

static void sleep_ms(long ms) { nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL); }
static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A listening socket on a port of the kernel's choice; kept open, or closed to leave a free port. */
static int listen_anywhere(char port[8]) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t bytes = sizeof at;
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  cr_assert_geq(fd, 0);
  cr_assert_eq(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
  cr_assert_eq(listen(fd, 16), 0);
  cr_assert_eq(getsockname(fd, (struct sockaddr *)&at, &bytes), 0);
  snprintf(port, 8, "%d", ntohs(at.sin_port));
  return fd;
}
static void free_port(char port[8]) { close(listen_anywhere(port)); }

/* ---- ranks as threads ---- */
typedef struct rank {
  phx__store_place place;
  phx__store *store;
  phx_error err;
  phx_status status; /* of open, then of what the body did last */
  phx_status (*body)(struct rank *r);
  int late_ms;
  pthread_t thread;
  pthread_mutex_t lock;
  int times_failed, failed_rank; /* under the lock */
  char failed[600];
  double took; /* seconds from the start of the body to its end */
} rank;

static void on_failed(void *ctx, int32_t who, const char *message) {
  rank *r = ctx;
  pthread_mutex_lock(&r->lock);
  r->times_failed++;
  r->failed_rank = who;
  snprintf(r->failed, sizeof r->failed, "%s", message);
  pthread_mutex_unlock(&r->lock);
}
static int times_failed(rank *r) {
  pthread_mutex_lock(&r->lock);
  const int n = r->times_failed;
  pthread_mutex_unlock(&r->lock);
  return n;
}
static void await_failure(rank *r) {
  for (int i = 0; i < 1000 && !times_failed(r); i++) sleep_ms(10);
}

static void *run_rank(void *arg) {
  rank *r = arg;
  if (r->late_ms) sleep_ms(r->late_ms);
  const double begin = seconds();
  r->status = phx__store_open(&r->place, &r->store, &r->err);
  if (r->status == PHX_OK && r->body) r->status = r->body(r);
  phx__store_close(r->store);
  r->took = seconds() - begin;
  return NULL;
}

static void begin(rank *r, const char *address, const char *port, int number, int size, double timeout_s,
                  phx_status (*body)(rank *)) {
  memset(r, 0, sizeof *r);
  r->err.struct_size = sizeof r->err;
  r->place = (phx__store_place){.address = address, .port = port, .job = JOB, .rank = number, .size = size,
                                .timeout_s = timeout_s, .failed = on_failed, .ctx = r};
  r->body = body;
  pthread_mutex_init(&r->lock, NULL);
}
static void begin_with(rank *r, const char *port, int number, int size, const phx__secret *secret,
                       phx_status (*body)(rank *)) {
  begin(r, "127.0.0.1", port, number, size, 20, body);
  r->place.secret = secret;
}
static void go(rank *r) { cr_assert_eq(pthread_create(&r->thread, NULL, run_rank, r), 0); }
static void end(rank *r) { cr_assert_eq(pthread_join(r->thread, NULL), 0); }

/* Ranks 0 to n - 1 of n, all at once, from beginning to end. */
static void everyone(rank *ranks, int n, phx_status (*body)(rank *)) {
  char port[8];
  free_port(port);
  for (int i = 0; i < n; i++) begin(&ranks[i], "127.0.0.1", port, i, n, 30, body), go(&ranks[i]);
  for (int i = 0; i < n; i++) end(&ranks[i]);
}

#define MUST_SAY(r, text) \
  cr_expect(strstr((r)->err.message, text), "rank %d says: %s", (r)->place.rank, (r)->err.message)

/* ---- what goes well ---- */
static phx_status meet(rank *r) {
  static const int64_t sizes[] = {1, 8, 47, 4095, PHX_EXCHANGE_MAX};
  static const char long_name[] = "a name that is longer than what an exchange keeps of it";
  unsigned char mine[PHX_EXCHANGE_MAX], all[RANKS * PHX_EXCHANGE_MAX + 1];
  const int n = r->place.size;
  for (int round = 0; round < 25; round++) {
    const int64_t bytes = sizes[round % 5];
    for (int64_t i = 0; i < bytes; i++) mine[i] = (unsigned char)(i * 7 + r->place.rank * 31 + round);
    all[n * bytes] = 0xA5;
    PHX_TRY(phx__store_exchange(r->store, round % 2 ? "bytes" : long_name, mine, bytes, all, &r->err));
    for (int q = 0; q < n; q++)
      for (int64_t i = 0; i < bytes; i++)
        if (all[q * bytes + i] != (unsigned char)(i * 7 + q * 31 + round))
          return phx_fail(&r->err, PHX_STATE, "round %d: byte %d of rank %d is wrong", round, (int)i, q);
    if (all[n * bytes] != 0xA5) return phx_fail(&r->err, PHX_STATE, "round %d: written behind the end", round);
  }
  return times_failed(r) ? PHX_STATE : PHX_OK;
}
static void everybody_meets(const char *address, int size) {
  rank ranks[RANKS];
  char port[8];
  free_port(port);
  for (int i = size - 1; i >= 0; i--) { /* rank 0 is the last to come */
    begin(&ranks[i], address, port, i, size, 20, meet);
    ranks[i].late_ms = i == 0 ? 100 : 0;
    go(&ranks[i]);
  }
  for (int i = 0; i < size; i++) end(&ranks[i]);
  for (int i = 0; i < size; i++)
    cr_expect_eq(ranks[i].status, PHX_OK, "%s, rank %d of %d: %s", address, i, size, ranks[i].err.message);
}
Test(tcp_store, everybody_gets_everybodys_bytes, .timeout = 60) {
  everybody_meets("127.0.0.1", 1);
  everybody_meets("127.0.0.1", 2);
  everybody_meets("localhost", 3);
  everybody_meets("127.0.0.1", RANKS);
}
Test(tcp_store, over_ipv6, .timeout = 60) {
  struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
  const int fd = socket(AF_INET6, SOCK_STREAM, 0);
  const int there = fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at) == 0;
  if (fd >= 0) close(fd);
  if (!there) cr_skip_test("no IPv6 loopback here");
  everybody_meets("::1", 3);
}

/* ---- who does not come ---- */
Test(tcp_store, absent_ranks_are_named, .timeout = 60) {
  rank ranks[3];
  char port[8], where[48];
  free_port(port);
  snprintf(where, sizeof where, "ranks 2, 4 never came to 127.0.0.1:%s", port);
  static const int numbers[] = {0, 1, 3};
  for (int i = 0; i < 3; i++) begin(&ranks[i], "127.0.0.1", port, numbers[i], 5, 0.7, meet), go(&ranks[i]);
  for (int i = 0; i < 3; i++) end(&ranks[i]);
  for (int i = 0; i < 3; i++) {
    cr_expect_eq(ranks[i].status, PHX_COMM);
    MUST_SAY(&ranks[i], where);
    MUST_SAY(&ranks[i], "3 of 5 are here");
    MUST_SAY(&ranks[i], "this machine's own"); /* 127.0.0.1 */
    cr_expect_lt(ranks[i].took, 5);
  }
}
Test(tcp_store, without_rank_0_the_address_is_named, .timeout = 60) {
  rank r;
  char port[8];
  free_port(port);
  begin(&r, "127.0.0.1", port, 1, 2, 0.4, meet), go(&r), end(&r);
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "rank 1 did not reach rank 0 at MASTER_ADDR=127.0.0.1, port");
  MUST_SAY(&r, "refused");
  begin(&r, "no-such-host.invalid", port, 1, 2, 0.4, meet), go(&r), end(&r);
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "MASTER_ADDR=no-such-host.invalid");
}
Test(tcp_store, a_port_in_use_and_a_foreign_address, .timeout = 60) {
  rank r;
  char port[8];
  const int taken = listen_anywhere(port);
  begin(&r, "127.0.0.1", port, 0, 2, 5, meet), go(&r), end(&r);
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "is in use");
  MUST_SAY(&r, "MASTER_PORT");
  close(taken);
  begin(&r, "192.0.2.1", port, 0, 2, 5, meet), go(&r), end(&r); /* of no machine: RFC 5737 */
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "MASTER_ADDR=192.0.2.1 is no address of ");
  begin(&r, "127.0.0.1", port, 2, 2, 5, meet), go(&r), end(&r);
  cr_expect_eq(r.status, PHX_INVALID);
}

/* ---- frames by hand ---- */
static void put(unsigned char *to, uint64_t value, int n) {
  for (int i = 0; i < n; i++) to[i] = (unsigned char)(value >> 8 * i);
}
/* As tcp_store_wire.h has it, written once more. */
static void head(unsigned char out[32], int kind, int who, uint64_t session, uint64_t number, uint32_t bytes) {
  memcpy(out, "PHXS", 4);
  put(out + 4, 2, 2);
  put(out + 6, (uint64_t)kind, 2);
  put(out + 8, session, 8);
  put(out + 16, number, 8);
  put(out + 24, (uint32_t)who, 4);
  put(out + 28, bytes, 4);
}
static int knock(const char *port) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)},
                           .sin_port = htons((uint16_t)atoi(port))};
  struct timeval limit = {10, 0};
  for (int i = 0; i < 500; i++) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (connect(fd, (struct sockaddr *)&at, sizeof at) == 0) return fd;
    close(fd);
    sleep_ms(10);
  }
  cr_assert_fail("nobody listens at %s", port);
  return -1;
}
static void tell(int fd, const void *bytes, size_t n) {
  cr_assert_eq(send(fd, bytes, n, MSG_NOSIGNAL), (ssize_t)n);
}
static void say_hello_as(int fd, int number, int size, uint64_t job, bool has_secret, const char *host) {
  unsigned char frame[32 + 108] = {0};
  head(frame, 1, number, job, 0, 108);
  put(frame + 32, (uint64_t)size, 4);
  put(frame + 36, 4242, 4);
  put(frame + 40, has_secret, 4);
  memset(frame + 44, 7, 32); /* the nonce */
  memcpy(frame + 76, host, strlen(host));
  for (size_t i = 0; i < sizeof frame; i += 17) /* in pieces */
    tell(fd, frame + i, sizeof frame - i < 17 ? sizeof frame - i : 17);
}
static void say_hello(int fd, int number, int size, uint64_t job) {
  say_hello_as(fd, number, size, job, false, "by-hand");
}
/* A whole frame's payload; its kind, or 0: closed. */
static int hear(int fd, unsigned char *body, size_t room, uint64_t *session) {
  unsigned char h[32];
  uint32_t bytes = 0;
  if (recv(fd, h, 32, MSG_WAITALL) != 32) return 0;
  for (int i = 0; i < 4; i++) bytes |= (uint32_t)h[28 + i] << 8 * i;
  *session = 0;
  for (int i = 0; i < 8; i++) *session |= (uint64_t)h[8 + i] << 8 * i;
  cr_assert_leq(bytes, room);
  if (bytes) cr_assert_eq(recv(fd, body, bytes, MSG_WAITALL), (ssize_t)bytes);
  body[bytes < room ? bytes : room - 1] = 0;
  return h[6] | h[7] << 8;
}

/* Ranks 0 and 1 of 3 are threads; rank 2 is fd, which has been welcomed. */
static uint64_t join_by_hand(rank ranks[2], char port[8], int *fd, double timeout_s, phx_status (*body)(rank *)) {
  static unsigned char answer[8192];
  uint64_t session = 0;
  free_port(port);
  for (int i = 0; i < 2; i++) begin(&ranks[i], "127.0.0.1", port, i, 3, timeout_s, body), go(&ranks[i]);
  *fd = knock(port);
  say_hello(*fd, 2, 3, JOB);
  cr_assert_eq(hear(*fd, answer, sizeof answer, &session), 2);
  cr_expect(strstr((char *)answer + 256, "by-hand, 127.0.0.1, pid 4242"), "%s", (char *)answer + 256);
  return session;
}
static void both_say(rank ranks[2], const char *text) {
  for (int i = 0; i < 2; i++) {
    end(&ranks[i]);
    cr_expect_eq(ranks[i].status, PHX_COMM);
    MUST_SAY(&ranks[i], text);
    cr_expect_eq(ranks[i].times_failed, 1);
    cr_expect_eq(ranks[i].failed_rank, 2);
    cr_expect(strstr(ranks[i].failed, text), "%s", ranks[i].failed);
    cr_expect_lt(ranks[i].took, 8, "%g s", ranks[i].took);
  }
}
static phx_status exchange_once(rank *r) {
  unsigned char mine[8] = {0}, all[RANKS * 8];
  return phx__store_exchange(r->store, "once", mine, 8, all, &r->err);
}

/* ---- who dies ---- */
Test(tcp_store, a_rank_that_dies_is_named, .timeout = 60) {
  rank ranks[2];
  char port[8];
  int fd;
  join_by_hand(ranks, port, &fd, 30, exchange_once);
  sleep_ms(50);
  close(fd);
  both_say(ranks, "rank 2 (by-hand, 127.0.0.1, pid 4242) is gone");
}
/* Nobody is in a meeting: the failure comes by itself. */
static phx_status wait_for_failure(rank *r) {
  await_failure(r);
  return exchange_once(r);
}
Test(tcp_store, a_death_between_meetings_is_noticed, .timeout = 60) {
  rank ranks[2];
  char port[8];
  int fd;
  join_by_hand(ranks, port, &fd, 30, wait_for_failure);
  const struct linger at_once = {1, 0}; /* a reset instead of an end */
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  close(fd);
  both_say(ranks, "rank 2 (by-hand, 127.0.0.1, pid 4242) is gone: its connection broke: Connection reset");
}
Test(tcp_store, a_late_rank_is_named, .timeout = 60) {
  rank ranks[2];
  char port[8];
  int fd;
  join_by_hand(ranks, port, &fd, 0.5, exchange_once);
  both_say(ranks, "rank 2 (by-hand, 127.0.0.1, pid 4242) did not come to 'once' within 0.5 s");
  close(fd);
}
Test(tcp_store, who_leaves_early_is_named, .timeout = 60) {
  rank ranks[2];
  char port[8];
  unsigned char frame[32];
  int fd;
  const uint64_t session = join_by_hand(ranks, port, &fd, 30, exchange_once);
  head(frame, 7, 2, session, 0, 0);
  tell(fd, frame, sizeof frame);
  close(fd);
  both_say(ranks, "rank 2 (by-hand, 127.0.0.1, pid 4242) has left");
}
static phx_status fail_or_wait(rank *r) {
  if (r->place.rank == 2) phx__store_fail(r->store, "the GPU fell off the bus");
  await_failure(r);
  return exchange_once(r);
}
Test(tcp_store, a_failure_is_told_to_all, .timeout = 60) {
  rank ranks[4];
  everyone(ranks, 4, fail_or_wait);
  for (int i = 0; i < 4; i++) {
    cr_expect_eq(ranks[i].status, PHX_COMM);
    MUST_SAY(&ranks[i], "the GPU fell off the bus");
    cr_expect_eq(ranks[i].times_failed, 1);
    cr_expect_eq(ranks[i].failed_rank, 2);
  }
}
/* rank 0 is by hand: a listener that welcomes the one rank that there is beside it, as session 99. */
static int welcome_one(int listener) {
  unsigned char frame[32 + 2 * 128] = {0}, body[256];
  uint64_t session;
  const int fd = accept(listener, NULL, NULL);
  cr_assert_eq(hear(fd, body, sizeof body, &session), 1);
  cr_expect_eq(session, JOB);
  head(frame, 2, -1, 99, 0, 256);
  memcpy(frame + 32, "node0, 10.0.0.1, pid 1", 22);
  tell(fd, frame, sizeof frame);
  return fd;
}
Test(tcp_store, the_death_of_rank_0_is_named, .timeout = 60) {
  rank r;
  char port[8];
  unsigned char frame[32 + 2 * 128] = {0};
  uint64_t session;
  const int listener = listen_anywhere(port);
  begin(&r, "127.0.0.1", port, 1, 2, 30, exchange_once), go(&r);
  const int fd = welcome_one(listener);
  cr_assert_eq(hear(fd, frame, sizeof frame, &session), 4); /* it is in its meeting */
  cr_expect_eq(session, 99);
  close(fd);
  close(listener);
  end(&r);
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "rank 0 (node0, 10.0.0.1, pid 1) is gone");
}

/* [main] stands in a call that never returns: nothing but the store's thread can end this process. */
Test(tcp_store, a_process_that_does_not_end_by_itself_is_ended, .timeout = 60) {
  char port[8], text[1200];
  int says[2], raw = 0;
  const int listener = listen_anywhere(port);
  cr_assert_eq(pipe(says), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    rank r;
    begin(&r, "127.0.0.1", port, 1, 2, 3, NULL);
    if (dup2(says[1], STDERR_FILENO) < 0 || phx__store_open(&r.place, &r.store, &r.err) != PHX_OK) _exit(100);
    for (;;) pause();
  }
  close(says[1]);
  const int fd = welcome_one(listener);
  const double from = seconds();
  close(fd);
  cr_assert_eq(waitpid(pid, &raw, 0), pid);
  cr_expect(seconds() - from >= 1.9, "%g s", seconds() - from);
  cr_expect(WIFEXITED(raw) && WEXITSTATUS(raw) == PHX__EXIT_RANK, "status %x", (unsigned)raw);
  const ssize_t n = read(says[0], text, sizeof text - 1);
  text[n > 0 ? n : 0] = 0;
  cr_expect(strstr(text, "rank 1: the job has failed: rank 0 (node0, 10.0.0.1, pid 1) is gone"), "%s", text);
  cr_expect(strstr(text, "did not end by itself within 2 s"), "%s", text);
  close(says[0]);
  close(listener);
}

/* ---- strangers ---- */
Test(tcp_store, strangers_do_not_disturb, .timeout = 60) {
  static const char http[] = "GET / HTTP/1.1\r\nHost: somebody\r\n\r\n and more than a head's worth of it";
  static unsigned char answer[4096];
  rank ranks[3];
  char port[8];
  unsigned char huge[32];
  uint64_t session;
  int idle[40];
  free_port(port);
  begin(&ranks[0], "127.0.0.1", port, 0, 3, 20, meet), go(&ranks[0]);
  for (int i = 0; i < 40; i++) idle[i] = knock(port); /* more than it keeps */
  int fd = knock(port);
  tell(fd, http, sizeof http);
  cr_expect_eq(hear(fd, answer, sizeof answer, &session), 0);
  close(fd);
  fd = knock(port);
  head(huge, 1, 1, JOB, 0, 1u << 30);
  tell(fd, huge, sizeof huge);
  cr_expect_eq(hear(fd, answer, sizeof answer, &session), 0, "an oversized frame is not read");
  close(fd);
  fd = knock(port);
  say_hello(fd, 1, 3, JOB + 1);
  cr_expect_eq(hear(fd, answer, sizeof answer, &session), 3);
  cr_expect(strstr((char *)answer, "another job"), "%s", (char *)answer);
  close(fd);
  fd = knock(port);
  say_hello(fd, 1, 4, JOB);
  cr_expect_eq(hear(fd, answer, sizeof answer, &session), 3);
  cr_expect(strstr((char *)answer, "rank 1 of 4"), "%s", (char *)answer);
  close(fd);
  fd = knock(port);
  say_hello(fd, 0, 3, JOB); /* rank 0 is there, the real one */
  cr_expect_eq(hear(fd, answer, sizeof answer, &session), 3);
  cr_expect(strstr((char *)answer, "rank 0 is here already"), "%s", (char *)answer);
  cr_expect(strstr((char *)answer, "does another job use MASTER_PORT="), "%s", (char *)answer);
  close(fd);
  for (int i = 1; i < 3; i++) begin(&ranks[i], "127.0.0.1", port, i, 3, 20, meet), go(&ranks[i]);
  for (int i = 0; i < 3; i++) end(&ranks[i]);
  for (int i = 0; i < 3; i++) cr_expect_eq(ranks[i].status, PHX_OK, "%s", ranks[i].err.message);
  for (int i = 0; i < 40; i++) close(idle[i]);
}
Test(tcp_store, a_rank_of_another_job_is_told_so, .timeout = 60) {
  rank ranks[3];
  char port[8];
  free_port(port);
  for (int i = 0; i < 2; i++) begin(&ranks[i], "127.0.0.1", port, i, 2, 20, meet);
  begin(&ranks[2], "127.0.0.1", port, 1, 2, 20, meet);
  ranks[2].place.job = JOB + 1;
  go(&ranks[0]), go(&ranks[2]), end(&ranks[2]);
  cr_expect_eq(ranks[2].status, PHX_INVALID);
  MUST_SAY(&ranks[2], "another job meets at 127.0.0.1:");
  go(&ranks[1]), end(&ranks[0]), end(&ranks[1]);
  for (int i = 0; i < 2; i++) cr_expect_eq(ranks[i].status, PHX_OK, "%s", ranks[i].err.message);
}
Test(tcp_store, strangers_are_in_the_report_on_the_absent, .timeout = 60) {
  rank r;
  char port[8];
  free_port(port);
  begin(&r, "127.0.0.1", port, 0, 2, 0.7, meet), go(&r);
  const int fd = knock(port);
  say_hello(fd, 1, 2, JOB + 1);
  end(&r);
  close(fd);
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "rank 1 never came");
  MUST_SAY(&r, "1 connections were refused, the last from 127.0.0.1: another job");
}
Test(tcp_store, another_programs_port_is_named, .timeout = 60) {
  rank r;
  char port[8];
  const int listener = listen_anywhere(port);
  begin(&r, "127.0.0.1", port, 1, 2, 20, meet), go(&r);
  const int fd = accept(listener, NULL, NULL);
  tell(fd, "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n", 40);
  end(&r);
  close(fd);
  close(listener);
  cr_expect_eq(r.status, PHX_COMM);
  MUST_SAY(&r, "another program's port");
}

/* ---- ranks that do what they must not ---- */
static void misbehave(int kind, uint64_t number, uint32_t said, size_t sent, int wrong_session, const char *text) {
  static unsigned char frame[32 + 5000];
  rank ranks[2];
  char port[8];
  int fd;
  const uint64_t session = join_by_hand(ranks, port, &fd, 30, wait_for_failure);
  memset(frame, 0, sizeof frame);
  head(frame, kind, 2, session + (uint64_t)wrong_session, number, said);
  memcpy(frame + 32, "once", 4);
  tell(fd, frame, 32 + sent);
  both_say(ranks, text);
  close(fd);
}
Test(tcp_store, what_no_rank_would_send_ends_the_job, .timeout = 60) {
  misbehave(4, 1, 1u << 20, 0, 0, "is gone: its connection broke: Protocol error"); /* oversized */
  misbehave(4, 1, 4145, 100, 0, "Protocol error");                                  /* by one byte */
  misbehave(4, 2, 56, 56, 0, "speaks out of turn");
  misbehave(4, 1, 48, 48, 0, "speaks out of turn"); /* nothing but a name */
  misbehave(4, 1, 56, 56, 1, "sends what no rank");
  misbehave(5, 1, 56, 56, 0, "sends what no rank");
  misbehave(20, 1, 56, 56, 0, "Protocol error");
}
static phx_status take_ways(rank *r) {
  unsigned char mine[16] = {0}, all[RANKS * 16];
  if (r->place.rank == 1) sleep_ms(200);
  return phx__store_exchange(r->store, r->place.rank == 1 ? "left" : "right", mine, r->place.rank == 1 ? 16 : 8, all,
                             &r->err);
}
Test(tcp_store, different_meetings_are_named, .timeout = 60) {
  rank ranks[3];
  everyone(ranks, 3, take_ways);
  for (int i = 0; i < 3; i++) {
    cr_expect_eq(ranks[i].status, PHX_COMM);
    MUST_SAY(&ranks[i], "the ranks take different ways: rank 1 (");
    MUST_SAY(&ranks[i], "brings 16 bytes to 'left'");
  }
}
static phx_status wrong_sizes(rank *r) {
  unsigned char mine[8] = {0}, all[8];
  if (phx__store_exchange(r->store, "none", mine, 0, all, &r->err) != PHX_INVALID) return PHX_STATE;
  if (phx__store_exchange(r->store, "many", mine, PHX_EXCHANGE_MAX + 1, all, &r->err) != PHX_INVALID) return PHX_STATE;
  return exchange_once(r);
}
Test(tcp_store, sizes_out_of_range_are_refused, .timeout = 60) {
  rank r;
  everyone(&r, 1, wrong_sizes);
  cr_expect_eq(r.status, PHX_OK, "%s", r.err.message);
}

/* ---- a secret ---- */
static const phx__secret a_secret = {.bytes = 20, .key = "only this job has it"};
static const phx__secret another = {.bytes = 20, .key = "only that job has it"};

Test(tcp_store, with_one_secret_everybody_meets, .timeout = 60) {
  rank ranks[3];
  char port[8];
  free_port(port);
  for (int i = 2; i >= 0; i--) begin_with(&ranks[i], port, i, 3, &a_secret, meet), go(&ranks[i]);
  for (int i = 0; i < 3; i++) end(&ranks[i]);
  for (int i = 0; i < 3; i++) cr_expect_eq(ranks[i].status, PHX_OK, "%s", ranks[i].err.message);
}
/* What an impostor hears, who has the port and the job's id; the real ranks then meet. */
Test(tcp_store, without_the_secret_nobody_takes_a_rank, .timeout = 60) {
  static unsigned char answer[4096], once_good[32];
  unsigned char frame[32 + 32], text[8 + 8 + 4 + 4 + 32 + 32] = "phx rank";
  rank ranks[2];
  char port[8];
  uint64_t session;
  free_port(port);
  begin_with(&ranks[0], port, 0, 2, &a_secret, meet), go(&ranks[0]);
  int fd = knock(port);
  say_hello(fd, 1, 2, JOB);
  cr_expect_eq(hear(fd, answer, sizeof answer, &session), 3);
  cr_expect(strstr((char *)answer, "rank 0 has a PHALANX_SECRET, this rank has none"), "%s", (char *)answer);
  close(fd);
  put(text + 8, JOB, 8), put(text + 16, 1, 4), put(text + 20, 2, 4), memset(text + 24, 7, 32);
  for (int turn = 0; turn < 3; turn++) { /* a guess; the store's own proof; a good proof of the turn before */
    fd = knock(port);
    say_hello_as(fd, 1, 2, JOB, true, "impostor");
    cr_assert_eq(hear(fd, answer, sizeof answer, &session), 8);
    memcpy(text + 56, answer, 32);
    head(frame, 9, 1, JOB, 0, 32);
    memset(frame + 32, 0x5A, 32);
    if (turn == 1) memcpy(frame + 32, answer + 32, 32);
    if (turn == 2) memcpy(frame + 32, once_good, 32);
    phx__secret_prove(&a_secret, text, sizeof text, once_good);
    tell(fd, frame, sizeof frame);
    cr_expect_eq(hear(fd, answer, sizeof answer, &session), 3);
    cr_expect(strstr((char *)answer, "does not know the job's secret"), "%s", (char *)answer);
    close(fd);
  }
  begin_with(&ranks[1], port, 1, 2, &a_secret, meet), go(&ranks[1]);
  for (int i = 0; i < 2; i++) end(&ranks[i]);
  for (int i = 0; i < 2; i++) cr_expect_eq(ranks[i].status, PHX_OK, "%s", ranks[i].err.message);
}
Test(tcp_store, a_rank_with_another_secret_is_told_so, .timeout = 60) {
  rank ranks[3];
  char port[8];
  free_port(port);
  begin_with(&ranks[0], port, 0, 2, &a_secret, meet), go(&ranks[0]);
  begin_with(&ranks[2], port, 1, 2, &another, meet), go(&ranks[2]), end(&ranks[2]);
  cr_expect_eq(ranks[2].status, PHX_INVALID);
  MUST_SAY(&ranks[2], "does not know the secret of rank 1");
  MUST_SAY(&ranks[2], "MASTER_PORT of its own");
  begin_with(&ranks[2], port, 1, 2, NULL, meet), go(&ranks[2]), end(&ranks[2]);
  cr_expect_eq(ranks[2].status, PHX_INVALID);
  MUST_SAY(&ranks[2], "rank 0 has a PHALANX_SECRET, this rank has none");
  begin_with(&ranks[1], port, 1, 2, &a_secret, meet), go(&ranks[1]);
  for (int i = 0; i < 2; i++) end(&ranks[i]);
  for (int i = 0; i < 2; i++) cr_expect_eq(ranks[i].status, PHX_OK, "%s", ranks[i].err.message);
}
/* A rank of 2 with the secret, and a rank 0 by hand that does not know it. */
static void false_store(int kind, const char *text) {
  unsigned char frame[32 + 256] = {0}, body[256];
  rank r;
  char port[8];
  uint64_t session;
  const int listener = listen_anywhere(port);
  begin_with(&r, port, 1, 2, &a_secret, exchange_once), go(&r);
  const int fd = accept(listener, NULL, NULL);
  cr_assert_eq(hear(fd, body, sizeof body, &session), 1);
  head(frame, kind, -1, 99, 0, kind == 8 ? 64 : 256);
  tell(fd, frame, kind == 8 ? 32 + 64 : sizeof frame);
  end(&r);
  close(fd);
  close(listener);
  cr_expect_eq(r.status, PHX_INVALID);
  MUST_SAY(&r, text);
}
Test(tcp_store, a_store_without_the_secret_is_left, .timeout = 60) {
  false_store(2, "lets rank 1 in without its secret");
  false_store(8, "does not know the secret of rank 1");
}

/* ---- addresses and texts ---- */
Test(tcp_store, every_address_is_no_address, .timeout = 60) {
  static const char *const all[] = {"0.0.0.0", "0", "::", "::ffff:0.0.0.0"};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    for (int number = 0; number < 2; number++) {
      rank r;
      char port[8];
      free_port(port);
      begin(&r, all[i], port, number, 2, 5, meet), go(&r), end(&r);
      cr_expect_eq(r.status, PHX_INVALID, "%s", all[i]);
      MUST_SAY(&r, "means every address of a machine");
    }
}
static bool is_clean(const char *text) {
  for (; *text; text++)
    if ((unsigned char)*text < ' ' || *text == 127) return false;
  return true;
}
static phx_status fail_with_escapes(rank *r) {
  if (r->place.rank == 1) phx__store_fail(r->store, "red \033[31m\nphalanx: rank 0: all is well\r");
  await_failure(r);
  return exchange_once(r);
}
Test(tcp_store, texts_of_others_are_cleaned, .timeout = 60) {
  rank ranks[2];
  char port[8];
  unsigned char answer[4096];
  uint64_t session;
  everyone(ranks, 2, fail_with_escapes);
  for (int i = 0; i < 2; i++) {
    MUST_SAY(&ranks[i], "red ?[31m phalanx: rank 0: all is well ");
    cr_expect(is_clean(ranks[i].failed), "%s", ranks[i].failed);
  }
  free_port(port); /* a host's name */
  begin(&ranks[0], "127.0.0.1", port, 0, 2, 20, wait_for_failure), go(&ranks[0]);
  int fd = knock(port);
  say_hello_as(fd, 1, 2, JOB, false, "h\033]0;x\007\n");
  cr_assert_eq(hear(fd, answer, sizeof answer, &session), 2);
  cr_expect(strstr((char *)answer + 128, "h?]0;x? , 127.0.0.1"), "%s", (char *)answer + 128);
  close(fd);
  end(&ranks[0]);
  const int listener = listen_anywhere(port); /* a refusal */
  begin(&ranks[0], "127.0.0.1", port, 1, 2, 20, NULL), go(&ranks[0]);
  fd = accept(listener, NULL, NULL);
  cr_assert_eq(hear(fd, answer, sizeof answer, &session), 1);
  head(answer, 3, -1, 0, 0, 9);
  memcpy(answer + 32, "no\033[2J\b\r", 9);
  tell(fd, answer, 32 + 9);
  end(&ranks[0]);
  close(fd);
  close(listener);
  MUST_SAY(&ranks[0], "no?[2J? ");
}
