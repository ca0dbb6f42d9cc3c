/* core/job/job_rendezvous.c - ranks that another launcher started find each other's memory on this machine.
 *
 * Rank 0 makes the segment and listens on an abstract unix socket whose name is made of the user and the job's
 * identity; each other rank connects, says who it is, and receives the memfd (SCM_RIGHTS).  Nothing has a name in the
 * file system.  Both sides check the other's user: an abstract name can be taken by anybody.
 * Threads: [main]; every wait ends at the deadline. */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/clean.h"
#include "base/clock.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/job_segment.h"

enum { SAID_BYTES = 320 };
static const char of_another_job[] = ": does another job have the same name? Under torchrun's variables MASTER_PORT is "
                                     "the name: give each job a port of its own";

typedef struct hello {
  uint64_t magic;
  int32_t rank, size;
} hello;

static socklen_t make_address(const phx__identity *me, struct sockaddr_un *out) {
  memset(out, 0, sizeof *out);
  out->sun_family = AF_UNIX;
  int used = snprintf(out->sun_path + 1, sizeof out->sun_path - 1, "phx-%u-%.90s", (unsigned)geteuid(), me->key);
  if (used > (int)sizeof out->sun_path - 2) used = (int)sizeof out->sun_path - 2;
  return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)used);
}

/* The smaller of what is left and 1 s, in ms; 0 at the deadline. */
static int left_ms(uint64_t start, double timeout_s) {
  if (timeout_s <= 0) return 1000;
  double left = timeout_s - (double)(phx__now_ns() - start) * 1e-9;
  if (left <= 0) return 0;
  return left > 1 ? 1000 : (int)(left * 1000) + 1;
}

static bool is_same_user(int fd) {
  struct ucred peer;
  socklen_t bytes = sizeof peer;
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.uid == geteuid();
}

static bool send_fd(int to, int fd) {
  union {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
  } control;
  memset(&control, 0, sizeof control);
  char byte = 1;
  struct iovec data = {&byte, 1};
  struct msghdr message = {
      .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
  struct cmsghdr *head = CMSG_FIRSTHDR(&message);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(head), &fd, sizeof fd);
  return sendmsg(to, &message, MSG_NOSIGNAL) == 1;
}

/* -1: none came; then `said` is what rank 0 says instead, or "". */
static int receive_fd(int from, char said[SAID_BYTES]) {
  union {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
  } control;
  struct iovec data = {said, SAID_BYTES - 1};
  struct msghdr message = {
      .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
  const ssize_t bytes = recvmsg(from, &message, MSG_CMSG_CLOEXEC);
  said[bytes > 1 ? bytes : 0] = 0;
  phx__clean(said, SAID_BYTES);
  if (bytes != 1) return -1;
  struct cmsghdr *head = CMSG_FIRSTHDR(&message);
  if (!head || head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS ||
      head->cmsg_len != CMSG_LEN(sizeof(int)))
    return -1;
  int fd;
  memcpy(&fd, CMSG_DATA(head), sizeof fd);
  return fd;
}

typedef struct serving {
  bool seen[PHX_RANKS_MAX];
  int32_t refused;
  char last[SAID_BYTES]; /* refused */
} serving;

/* One connection of rank 0: `seen` learns who came.  A stranger is told why, and hung up on: it is another job's rank,
 * and no reason to end this one. */
static void serve_one(const phx__identity *me, int peer, int segment, serving *s) {
  char why[SAID_BYTES];
  hello who = {0};
  struct pollfd ready = {.fd = peer, .events = POLLIN};
  if (!is_same_user(peer) || poll(&ready, 1, 1000) != 1 || recv(peer, &who, sizeof who, 0) != (ssize_t)sizeof who ||
      who.magic != PHX__SEGMENT_MAGIC)
    return;
  if (who.size == me->size && who.rank >= 1 && who.rank < me->size && !s->seen[who.rank]) {
    s->seen[who.rank] = send_fd(peer, segment);
    return;
  }
  if (who.size != me->size || who.rank < 1 || who.rank >= me->size)
    snprintf(why, sizeof why, "a process calls itself rank %d of %d, but job %s has %d ranks%s", who.rank, who.size,
             me->key, me->size, of_another_job);
  else
    snprintf(why, sizeof why, "rank %d of job %s is here already%s", who.rank, me->key, of_another_job);
  (void)send(peer, why, strlen(why), MSG_NOSIGNAL | MSG_DONTWAIT);
  s->refused++;
  memcpy(s->last, why, sizeof why);
}

/* Those that came, or did not; as many as there is room for. */
static void list_ranks(const serving *s, int32_t size, bool came, char *out, size_t bytes) {
  size_t used = 0;
  out[0] = 0;
  for (int32_t r = 0; r < size; r++) {
    if (s->seen[r] != came) continue;
    used += (size_t)snprintf(out + used, bytes - used, used + 16 < bytes ? "%s%d" : "%s...", used ? ", " : "", r);
    if (used + 8 >= bytes) return;
  }
}

/* Of a rank that never came nothing is known here, not even its process: only its launcher knows how it ended. */
static phx_status fail_missing(const phx__identity *me, const serving *s, double timeout_s, phx_error *err) {
  char list[128], came[128];
  list_ranks(s, me->size, false, list, sizeof list);
  list_ranks(s, me->size, true, came, sizeof came);
  if (s->refused)
    return phx_fail(err, PHX_COMM,
                    "rank(s) %s of job %s did not come within %g s, rank(s) %s did; %d processes were refused, the "
                    "last: %s", list, me->key, timeout_s, came, s->refused, s->last);
  return phx_fail(err, PHX_COMM,
                  "rank(s) %s of job %s did not come within %g s, rank(s) %s did: they did not start, or ended before "
                  "they joined, which the launcher's own report says", list, me->key, timeout_s, came);
}

static phx_status serve(const phx__identity *me, double timeout_s, int *fd_out, phx_error *err) {
  struct sockaddr_un address;
  serving come_here = {.seen = {true}};
  uint64_t start = phx__now_ns();
  phx_status status = PHX_OK;
  int segment = -1, listener = -1;
  segment = phx__job_create_segment(me->size, err);
  if (segment < 0) return PHX_NOMEM;
  if (me->size == 1) {
    *fd_out = segment;
    return PHX_OK;
  }
  listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (listener < 0 || bind(listener, (struct sockaddr *)&address, make_address(me, &address)) != 0 ||
      listen(listener, PHX_RANKS_MAX) != 0) {
    status = phx_fail_errno(err, PHX_COMM, errno,
                            "rank 0 cannot listen for the ranks of job %s: is another job of that name starting? "
                            "Under torchrun's variables MASTER_PORT is its name: give each job a port of its own",
                            me->key);
    goto done;
  }
  for (int32_t come = 1; come < me->size;) {
    int left = left_ms(start, timeout_s);
    if (left == 0) {
      status = fail_missing(me, &come_here, timeout_s, err);
      goto done;
    }
    struct pollfd ready = {.fd = listener, .events = POLLIN};
    if (poll(&ready, 1, left) != 1) continue;
    int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (peer < 0) continue;
    serve_one(me, peer, segment, &come_here);
    phx__sys.close(peer);
    come = 0;
    for (int32_t r = 0; r < me->size; r++) come += come_here.seen[r];
  }
  *fd_out = segment;
  segment = -1;
done:
  if (listener >= 0) phx__sys.close(listener);
  if (segment >= 0) phx__sys.close(segment);
  return status;
}

/* One try; -1: not yet (errno says why). */
static int ask_once(const phx__identity *me, int wait_ms, bool *stranger, char said[SAID_BYTES]) {
  struct sockaddr_un address;
  int segment = -1, fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  if (connect(fd, (struct sockaddr *)&address, make_address(me, &address)) == 0) {
    hello who = {PHX__SEGMENT_MAGIC, me->rank, me->size};
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    *stranger = !is_same_user(fd);
    if (!*stranger && send(fd, &who, sizeof who, MSG_NOSIGNAL) == (ssize_t)sizeof who && poll(&ready, 1, wait_ms) == 1)
      segment = receive_fd(fd, said);
  }
  phx__sys.close(fd);
  return segment;
}

static phx_status ask(const phx__identity *me, double timeout_s, int *fd_out, phx_error *err) {
  uint64_t start = phx__now_ns();
  bool stranger = false;
  char said[SAID_BYTES] = "";
  for (int left = left_ms(start, timeout_s); left > 0; left = left_ms(start, timeout_s)) {
    int fd = ask_once(me, left, &stranger, said);
    if (fd >= 0) {
      *fd_out = fd;
      return PHX_OK;
    }
    if (stranger)
      return phx_fail(err, PHX_COMM, "another user's process answers for job %s: choose another port or job", me->key);
    if (said[0])
      return phx_fail(err, PHX_INVALID, "rank %d is refused by rank 0 of job %s: %s", me->rank, me->key, said);
    struct timespec pause = {0, 10000000};
    nanosleep(&pause, NULL);
  }
  return phx_fail(err, PHX_COMM,
                  "rank 0 of job %s did not answer rank %d within %g s: it did not start, or is on another machine",
                  me->key, me->rank, timeout_s);
}

phx_status phx__rendezvous(const phx__identity *identity, double timeout_s, int *fd_out, phx_error *err) {
  return identity->rank == 0 ? serve(identity, timeout_s, fd_out, err) : ask(identity, timeout_s, fd_out, err);
}
