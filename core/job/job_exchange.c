/* core/job/job_exchange.c - all ranks meet: each brings a post and reads everybody's.
 *
 * What it is for: agreeing on configuration, sizes and shared memory at start; it is not a fast collective.
 * Invariant: a rank's slot is written by that rank only.  Round k's post lies in posts[k & 1]; nobody can enter round
 * k + 2 before everybody has entered k + 1, that is, has read round k: so two posts are enough.
 * Waiting: a short spin where a core is to be had, then sleep on the shared bell with a deadline on the monotonic
 * clock.  A sleeper looks up every 50 ms for what rings no bell: a peer that died under a foreign launcher.  Time in
 * which this process itself was suspended (Ctrl-Z, then fg) does not count.
 * Threads: [main]. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/futex.h"
#include "base/process_stat.h"
#include "base/status.h"
#include "base/sys.h"
#include "job/job_segment.h"

enum { SPINS = 2000 /* about 20 us: longer than a wake-up of a peer that is nearly here, too short to be felt */ };
#define SLICE_NS UINT64_C(50000000)
#define SUSPENDED_NS UINT64_C(1000000000)
/* A death is the launcher's to name: it knows the status.  Peers speak up only where it did not act. */
#define LAUNCHER_ACTS_NS UINT64_C(1000000000)

static const char *kind_name(int32_t kind) {
  static const char *const names[] = {"nothing", "agree", "share", "share (grown)", "share (mapped)",
                                      "bytes"};
  return kind >= 0 && kind <= PHX__POST_BYTES ? names[kind] : "nonsense";
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int32_t first_absent(const phx__segment *segment, int32_t size, uint64_t round) {
  for (int32_t r = 0; r < size; r++)
    if (__atomic_load_n(&segment->slots[r].round, __ATOMIC_ACQUIRE) < round) return r;
  return -1;
}

/* A joined peer whose process has ended; zombies count.  Not asked of peers that never joined. */
static bool is_dead(const phx__segment *segment, int32_t rank) {
  int32_t pid = __atomic_load_n(&segment->pages[rank].alive.pid, __ATOMIC_ACQUIRE);
  if (pid <= 0) return false;
  int fd = phx__sys.pidfd_open(pid);
  if (fd < 0) return errno == ESRCH || phx__process_has_ended(pid, 0);
  struct pollfd ready = {.fd = fd, .events = POLLIN};
  bool dead = poll(&ready, 1, 0) == 1;
  phx__sys.close(fd);
  return dead;
}

static phx_status fail_failed(const phx__segment *segment, uint32_t failed, phx_error *err) {
  if (failed >= 1 && failed <= (uint32_t)segment->size) {
    char text[sizeof segment->message];
    memcpy(text, segment->pages[failed - 1].alive.message, sizeof text);
    text[sizeof text - 1] = 0;
    return phx_fail(err, PHX_COMM, "the job has failed: rank %u: %.400s", failed - 1, text[0] ? text : "no message");
  }
  return phx_fail(err, PHX_COMM, "the launcher ends the job: %.400s", segment->message);
}

static phx_status fail_absent(const phx__member *me, uint64_t round, const phx__post *mine, phx_error *err) {
  char list[192] = "";
  int count = 0;
  size_t used = 0;
  for (int32_t r = 0; r < me->size; r++) {
    const phx_liveness *page = &me->segment->pages[r].alive;
    if (__atomic_load_n(&me->segment->slots[r].round, __ATOMIC_ACQUIRE) >= round) continue;
    count++;
    if (used + 40 > sizeof list) continue;
    int32_t pid = __atomic_load_n(&page->pid, __ATOMIC_ACQUIRE);
    char how[24] = "never came";
    if (pid) snprintf(how, sizeof how, "pid %d", pid);
    used += (size_t)snprintf(list + used, sizeof list - used, "%s%d (%s)", used ? ", " : "", r, how);
  }
  return phx_fail(err, PHX_COMM, "%s %s did not come to %s '%s' within %g s", count == 1 ? "rank" : "ranks", list,
                  kind_name(mine->kind), mine->name, me->timeout_s);
}

static phx_status wait_round(phx__member *me, uint64_t round, const phx__post *mine, phx_error *err) {
  phx__segment *segment = me->segment;
  int spins = me->may_spin ? SPINS : 0;
  uint64_t start = phx__now_ns(), last = start, dead_ns = 0;
  uint64_t limit = me->timeout_s > 0 ? (uint64_t)(me->timeout_s * 1e9) : UINT64_MAX;
  for (;;) {
    uint32_t bell = __atomic_load_n(&segment->bell, __ATOMIC_ACQUIRE);
    int32_t absent = first_absent(segment, me->size, round);
    if (absent < 0) return PHX_OK;
    uint32_t failed = __atomic_load_n(&segment->failed, __ATOMIC_ACQUIRE);
    if (failed) return fail_failed(segment, failed, err);
    if (spins > 0) {
      spins--;
      relax();
      continue;
    }
    uint64_t now = phx__now_ns();
    if (now - last > SUSPENDED_NS) start += now - last;
    __atomic_store_n(&segment->pages[me->rank].alive.heartbeat_ns, now, __ATOMIC_RELAXED);
    last = now;
    if (now - start >= limit) return fail_absent(me, round, mine, err);
    if (!is_dead(segment, absent) || first_absent(segment, me->size, round) != absent)
      dead_ns = 0;
    else if (!dead_ns)
      dead_ns = now;
    if (dead_ns && now - dead_ns >= (segment->launcher_pid ? LAUNCHER_ACTS_NS : 0))
      return phx_fail(err, PHX_COMM, "rank %d (pid %d) is dead; rank %d waited for it in %s '%s'", absent,
                      segment->pages[absent].alive.pid, me->rank, kind_name(mine->kind), mine->name);
    phx__futex_wait(&segment->bell, bell, limit - (now - start) < SLICE_NS ? limit - (now - start) : SLICE_NS);
  }
}

phx_status phx__exchange(phx__member *me, const phx__post *mine, phx__post *all, phx_error *err) {
  phx__segment *segment = me->segment;
  phx__slot *slot = &segment->slots[me->rank];
  uint64_t round = __atomic_load_n(&slot->round, __ATOMIC_RELAXED) + 1;
  slot->posts[round & 1] = *mine;
  __atomic_store_n(&slot->round, round, __ATOMIC_RELEASE);
  __atomic_add_fetch(&segment->bell, 1, __ATOMIC_RELEASE);
  phx__futex_wake(&segment->bell);
  PHX_TRY(wait_round(me, round, mine, err));
  for (int32_t r = 0; r < me->size; r++) all[r] = segment->slots[r].posts[round & 1];
  for (int32_t r = 1; r < me->size; r++)
    if (all[r].kind != all[0].kind)
      return phx_fail(err, PHX_COMM, "the ranks take different ways: rank %d is in %s '%s', rank 0 in %s '%s'", r,
                      kind_name(all[r].kind), all[r].name, kind_name(all[0].kind), all[0].name);
  return PHX_OK;
}

/* The bytes travel in the posts' names, a name's length at a time: nothing is mapped for a few hundred bytes. */
phx_status phx__segment_exchange(phx__member *me, const char *name, const void *mine, int64_t bytes, void *all,
                                 phx_error *err) {
  enum { PIECE = sizeof(((phx__post *)0)->name) };
  phx__post posts[PHX_RANKS_MAX], post = {.kind = PHX__POST_BYTES, .value = (uint64_t)bytes};
  char *out = all;
  if (bytes < 1 || bytes > PHX_EXCHANGE_MAX)
    return phx_fail(err, PHX_INVALID, "exchange '%s': %lld bytes; expected 1 to %d", name, (long long)bytes,
                    PHX_EXCHANGE_MAX);
  snprintf(post.name, sizeof post.name, "%s", name); /* first: do all mean the same? */
  for (int64_t at = -PIECE; at < bytes; at += PIECE) {
    size_t n = bytes - at < PIECE ? (size_t)(bytes - at) : PIECE;
    if (at >= 0) memcpy(post.name, (const char *)mine + at, n);
    PHX_TRY(phx__exchange(me, &post, posts, err));
    for (int32_t r = 0; r < me->size; r++) {
      if (posts[r].value != post.value || (at < 0 && strncmp(posts[r].name, post.name, PIECE) != 0))
        return phx_fail(err, PHX_COMM, "the ranks disagree: rank %d exchanges %lld bytes, rank %d %lld, of '%s'", r,
                        (long long)posts[r].value, me->rank, (long long)bytes, name);
      if (at >= 0) memcpy(out + r * bytes + at, posts[r].name, n);
    }
  }
  return PHX_OK;
}
