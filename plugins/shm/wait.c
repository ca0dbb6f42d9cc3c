/* wait.c - every wait of the communicator: a bounded spin, then a shared futex, with a deadline.
 *
 * A rank publishes by storing a word of its own lane and, when somebody sleeps there, waking them.  A waiter polls
 * `spin` times (once when the job gives this rank no core to wait on; at most 64 times on a stream's thread, whose
 * core belongs to the thread that computes), then announces itself in `sleepers` and sleeps on the word in slices of
 * 10 ms.  Between slices it looks at the job's failed word, at abort(), at orders that can never meet, and at the
 * deadline, and stamps its heartbeat: a rank that waits is alive.  The slice also bounds what a wake that got lost
 * with a killed process can cost.
 *
 * Invariant: a wait is given up only after its condition was looked at once more; so a process that was itself stopped
 * for long does not accuse a peer who came meanwhile.  Time in which this process did not run (Ctrl-Z, then fg) is
 * nobody's absence: a look that comes SUSPENDED_NS after the one before moves the deadline by as much.
 *
 * Threads: the one that runs the call; shm_drain is [main]. */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shm.h"

#define SLICE_NS 10000000
#define SUSPENDED_NS 1000000000 /* looks are 10 ms apart */
#define STREAM_SPIN 64
#define FIRST_POLLS 64 /* before the clock is read: a peer who is a fraction of a microsecond behind costs no more */

void shm_sleep(const uint32_t *word, uint32_t seen, int64_t ns) {
  struct timespec t = {ns / 1000000000, ns % 1000000000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0); /* every outcome leads to another look at the word */
}
void shm_wake(const uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

void shm_post(shm_lane *mine, uint32_t *word, uint32_t value) {
  /* Sequentially consistent on both sides: either the waiter sees the value, or we see the waiter. */
  __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&mine->sleepers, __ATOMIC_SEQ_CST)) shm_wake(word);
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/* Orders that can never meet: this rank waits for a peer who waits for this rank in another call.  The counters of both
 * sides stand still in that case, so there is no false alarm. */
static int crossed(const shm_call *call, int32_t peer) {
  const shm_comm *c = call->comm;
  shm_lane *mine = c->lane[c->me], *theirs = c->lane[peer];
  const shm_pair *out = &mine->pair[c->ranks[peer]], *in = &theirs->pair[c->ranks[c->me]];
  uint32_t sends = __atomic_load_n(&in->sends, __ATOMIC_ACQUIRE), recvs = __atomic_load_n(&in->recvs, __ATOMIC_ACQUIRE);
  int theirs_send = (int32_t)(sends - out->recvs) > 0, theirs_recv = (int32_t)(recvs - out->sends) > 0;
  if (call->op == PHX_OP_SEND || call->op == PHX_OP_RECV) {
    uint64_t begun = __atomic_load_n(&theirs->begun, __ATOMIC_ACQUIRE);
    if (begun > c->sequence) return 1;
    if (call->op == PHX_OP_SEND) return theirs_send && recvs != out->sends;
    return theirs_recv && sends != out->recvs;
  }
  return theirs_send || theirs_recv;
}

static phx_status await_slow(shm_call *call, int32_t peer, const uint32_t *word, uint32_t target, phx_error *err) {
  shm_comm *c = call->comm;
  const phx_job *job = c->world->job;
  int64_t begin = phx_kit_now_ns(), now = begin, last = begin, suspended = 0;
  int64_t deadline = job->timeout_s > 0 ? begin + (int64_t)(job->timeout_s * 1e9) : INT64_MAX;
  int64_t spin = job->may_spin ? c->world->config.spin : 0;
  phx_status status = PHX_OK;
  if (call->on_stream && spin > STREAM_SPIN) spin = STREAM_SPIN;
  for (int64_t i = 0; i < spin; i++) {
    relax();
    if (shm_reached(word, target)) goto done;
  }
  while (!shm_reached(word, target)) {
    now = phx_kit_now_ns();
    if (now - last > SUSPENDED_NS) {
      suspended += now - last;
      if (deadline < INT64_MAX) deadline += now - last;
    }
    last = now;
    __atomic_store_n(&job->mine->heartbeat_ns, (uint64_t)now, __ATOMIC_RELAXED);
    int over = now >= deadline;
    int failed = __atomic_load_n(job->failed, __ATOMIC_ACQUIRE) != 0 ||
                 __atomic_load_n(&c->aborted, __ATOMIC_ACQUIRE) ||
                 __atomic_load_n(&c->world->all->aborted, __ATOMIC_ACQUIRE);
    int cross = !failed && crossed(call, peer);
    if ((over || failed || cross) && !shm_reached(word, target)) {
      if (failed) status = shm_report_failed(call, err);
      else if (cross) status = shm_report_crossed(call, peer, err);
      else status = shm_report_absent(call, now - begin - suspended, err);
      break;
    }
    uint32_t *sleepers = &c->lane[peer]->sleepers;
    __atomic_fetch_add(sleepers, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    if ((int32_t)(seen - target) < 0) shm_sleep(word, seen, deadline - now < SLICE_NS ? deadline - now : SLICE_NS);
    __atomic_fetch_sub(sleepers, 1, __ATOMIC_SEQ_CST);
  }
done:
  now = phx_kit_now_ns() - suspended;
  phx_kit_count_wait(&c->counters, &c->world->all->counters, now - begin);
  return status;
}

phx_status shm_await(shm_call *call, int32_t peer, const uint32_t *word, uint32_t target, phx_error *err) {
  int32_t polls = call->comm->world->job->may_spin ? FIRST_POLLS : 1;
  for (int32_t i = 0; i < polls; i++) {
    if (shm_reached(word, target)) return PHX_OK;
  }
  return await_slow(call, peer, word, target, err);
}

void shm_step(shm_comm *c) {
  c->steps++;
  shm_post(c->lane[c->me], &c->lane[c->me]->phase, c->base[c->me] + c->steps);
}

phx_status shm_step_of(shm_call *call, int32_t peer, phx_error *err) {
  shm_comm *c = call->comm;
  return shm_await(call, peer, &c->lane[peer]->phase, c->base[peer] + c->steps, err);
}

phx_status shm_barrier(shm_call *call, phx_error *err) {
  phx_status status = PHX_OK;
  shm_step(call->comm);
  for (int32_t p = 0; p < call->comm->n && status == PHX_OK; p++) status = shm_step_of(call, p, err);
  return status;
}

void shm_drain(shm_comm *c, uint64_t ticket) {
  while (__atomic_load_n(&c->done, __ATOMIC_ACQUIRE) < ticket) {
    uint32_t seen = __atomic_load_n(&c->done_word, __ATOMIC_SEQ_CST);
    __atomic_store_n(&c->main_waits, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->done, __ATOMIC_SEQ_CST) < ticket) shm_sleep(&c->done_word, seen, SLICE_NS);
    __atomic_store_n(&c->main_waits, 0, __ATOMIC_SEQ_CST);
  }
}
