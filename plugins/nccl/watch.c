/* watch.c - every wait of the communicator, the watchdog, and what happens on failure.
 *
 * A call is pending from its launch until its end event has passed.  The deadline runs from the moment its begin
 * event was seen to have passed: compute that the stream must do first is nobody's absence.  [main] looks while it
 * waits (memory of the host, a full ring, split); the watchdog looks at everything else, every LOOK_NS while
 * something is pending and not at all while nothing is: ends are stamped into the flight record, NCCL is asked for
 * asynchronous errors, the job's failed word and abort() are obeyed, and who is absent is named.  That holds for a
 * call whose launch does not return, too.  Time in which this process did not run moves the deadline.
 *
 * The first failure ends the job (job->fail) and aborts every communicator, which ends NCCL's kernels: whoever
 * waits for a stream comes back, and the next call on a communicator returns PHX_COMM.  If [main] is in a call of
 * NCCL that does not return, the abort is given up after LOCK_S, and the core ends the process.
 *
 * Invariant: the watchdog waits for nothing that [main] may hold while it is blocked.  It asks NCCL only when nobody is
 * in a call of it, and takes world.lock, under which nothing blocks.
 *
 * Threads: [main] and the watchdog; nccl_is_aborted, and storing the aborted words, [any]. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "comm_nccl.h"

#define LOOK_NS 2000000
#define NAP_NS 200000 /* the longest of [main] */
#define SUSPENDED_NS 1000000000
#define LOCK_S 5

typedef struct clock_of { /* of one wait */
  int64_t begin, last, deadline; /* deadline 0: it does not run yet */
  int64_t nap;
} clock_of;

static void nap(clock_of *k) {
  nanosleep(&(struct timespec){0, k->nap}, NULL);
  if (k->nap < NAP_NS) k->nap *= 2;
}
static void clock_start(const nccl_world *w, clock_of *k, int64_t now) {
  if (w->job->timeout_s > 0 && !k->deadline) k->deadline = now + (int64_t)(w->job->timeout_s * 1e9);
}
/* 1: the deadline is over. */
static int clock_look(nccl_world *w, clock_of *k) {
  const int64_t now = phx_kit_now_ns();
  if (now - k->last > SUSPENDED_NS && k->deadline) k->deadline += now - k->last;
  if (now - k->last > SUSPENDED_NS) k->begin += now - k->last;
  k->last = now;
  __atomic_store_n(&w->job->mine->heartbeat_ns, (uint64_t)now, __ATOMIC_RELAXED);
  __atomic_store_n(&w->main_ns, now, __ATOMIC_RELAXED);
  return k->deadline && now >= k->deadline;
}

/* ---- failure ---- */

int nccl_is_aborted(const nccl_comm *c) {
  return __atomic_load_n(&c->aborted, __ATOMIC_ACQUIRE) || __atomic_load_n(&c->world->aborted, __ATOMIC_ACQUIRE);
}
static int must_give_up(const nccl_comm *c) {
  return __atomic_load_n(c->world->job->failed, __ATOMIC_ACQUIRE) != 0 || nccl_is_aborted(c);
}

static int enter_within(nccl_world *w) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += LOCK_S;
  return pthread_mutex_timedlock(&w->calls, &until) == 0;
}

/* All that are alive.  They stay so: [main] frees one only when the watchdog does not look, and [main] is here. */
static int list_comms(nccl_world *w, nccl_comm *list[NCCL_COMMS_MAX]) {
  int n = 0;
  pthread_mutex_lock(&w->lock);
  for (nccl_comm *c = w->comms; c && n < NCCL_COMMS_MAX; c = c->next) list[n++] = c;
  pthread_mutex_unlock(&w->lock);
  return n;
}

static _Thread_local int is_watchdog; /* else [main]: nobody else takes `calls` */

void nccl_abort_now(nccl_world *w) {
  nccl_comm *list[NCCL_COMMS_MAX];
  if (!enter_within(w)) {
    if (__atomic_exchange_n(&w->stuck, 1, __ATOMIC_ACQ_REL)) return; /* said before */
    w->host->log(w->host->ctx, PHX_LOG_ERROR,
                 is_watchdog ? "cannot abort NCCL: [main] is in a call that does not return"
                             : "cannot abort NCCL: the watchdog is in a call that does not return");
    return;
  }
  __atomic_store_n(&w->stuck, 0, __ATOMIC_RELEASE); /* it has returned */
  const int n = list_comms(w, list);
  for (int i = 0; i < n; i++) {
    ncclComm_t nccl = list[i]->nccl;
    if (!nccl || !nccl_is_aborted(list[i])) continue;
    list[i]->nccl = NULL;
    (void)ncclCommAbort(nccl); /* what it says changes nothing any more */
  }
  pthread_mutex_unlock(&w->calls);
}

phx_status nccl_end_job(nccl_world *w, phx_error *err, const char *message) {
  w->job->fail(w->job->ctx, message);
  __atomic_store_n(&w->aborted, 1, __ATOMIC_RELEASE);
  nccl_abort_now(w);
  return phx_fail(err, PHX_COMM, "%s", message);
}

static void say_why(const nccl_comm *c, char *text, size_t size) {
  if (__atomic_load_n(c->world->job->failed, __ATOMIC_ACQUIRE))
    phx_kit_job_failure(c->world->job, text, size);
  else
    snprintf(text, size, "the communicator was aborted");
}
phx_status nccl_check_alive(nccl_comm *c, phx_error *err) {
  char why[300] = "";
  if (!must_give_up(c)) return PHX_OK;
  say_why(c, why, sizeof why);
  return phx_fail(err, PHX_COMM, "communicator %llu: %s", (unsigned long long)c->id, why);
}

static void say_own(phx_kit_text *t, const nccl_comm *c, const phx_kit_call *shown) {
  if (shown)
    phx_kit_say_own(t, c->world->job->rank, shown);
  else
    phx_kit_say(t, "rank %d: while NCCL joins %d ranks", c->world->job->rank, c->n);
}
static phx_status report_given_up(nccl_comm *c, const phx_kit_call *shown, phx_error *err) {
  char message[496], why[300] = "";
  phx_kit_text t = {message, sizeof message};
  say_why(c, why, sizeof why);
  say_own(&t, c, shown);
  phx_kit_say(&t, ": given up, %s", why);
  __atomic_store_n(&c->world->aborted, 1, __ATOMIC_RELEASE); /* the ranks no longer agree on where they are */
  nccl_abort_now(c->world);
  return phx_fail(err, PHX_COMM, "%s", message);
}
static phx_status report_absent(const nccl_call *call, int64_t waited_ns, phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  phx_kit_say_own(&t, call->comm->world->job->rank, &call->shown);
  phx_kit_say(&t, ": absent after %.1f s: ", (double)waited_ns * 1e-9);
  nccl_say_absent(&t, call);
  return nccl_end_job(call->comm->world, err, message);
}
static phx_status report_nccl(nccl_comm *c, const phx_kit_call *shown, ncclResult_t r, const char *more,
                              phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  say_own(&t, c, shown);
  phx_kit_say(&t, ": NCCL reports: %s", ncclGetErrorString(r));
  if (more[0]) phx_kit_say(&t, " (%.200s)", more);
  const phx_status status = nccl_end_job(c->world, err, message);
  if (err) err->cause = (int32_t)r;
  return status;
}
static phx_status report_cuda(nccl_comm *c, const phx_kit_call *shown, cudaError_t code, phx_error *err) {
  char message[496];
  phx_kit_text t = {message, sizeof message};
  say_own(&t, c, shown);
  phx_kit_say(&t, ": the device failed while it waited: %s", cudaGetErrorString(code));
  nccl_end_job(c->world, err, message);
  if (err) err->code = PHX_DEVICE, err->cause = (int32_t)code;
  return PHX_DEVICE;
}

/* ---- asynchronous errors ---- */

/* NCCL's state of c; text: its last message when that is an error.  ncclSuccess when it was aborted: see must_give_up.
 * The watchdog does not wait for who is in a call: it is told that all is on its way. */
static ncclResult_t ask(nccl_comm *c, int is_main, char *text, size_t size) {
  ncclResult_t state = ncclSuccess;
  text[0] = 0;
  if (is_main) pthread_mutex_lock(&c->world->calls);
  else if (pthread_mutex_trylock(&c->world->calls) != 0) return ncclInProgress;
  if (c->nccl) {
    const ncclResult_t r = ncclCommGetAsyncError(c->nccl, &state);
    if (r != ncclSuccess) state = r;
    if (state != ncclSuccess && state != ncclInProgress) {
      const char *more = ncclGetLastError(c->nccl);
      snprintf(text, size, "%s", more ? more : "");
    }
  }
  pthread_mutex_unlock(&c->world->calls);
  return state;
}

phx_status nccl_health(nccl_comm *c, phx_error *err) {
  char text[256];
  PHX_TRY(nccl_check_alive(c, err));
  const ncclResult_t state = ask(c, 0, text, sizeof text);
  if (state == ncclSuccess || state == ncclInProgress) return PHX_OK;
  const phx_status status =
      phx_fail(err, PHX_COMM, "communicator %llu: NCCL reports: %s%s%.200s", (unsigned long long)c->id,
               ncclGetErrorString(state), text[0] ? ": " : "", text);
  if (err) err->cause = (int32_t)state;
  return status;
}

phx_status nccl_settle(nccl_comm *c, const phx_kit_call *shown, ncclResult_t r, phx_error *err) {
  char text[256] = "";
  clock_of k = {phx_kit_now_ns(), phx_kit_now_ns(), 0, 20000};
  if (r == ncclSuccess) return PHX_OK;
  clock_start(c->world, &k, k.begin);
  while (r == ncclInProgress) {
    if (must_give_up(c)) return report_given_up(c, shown, err);
    r = ask(c, 1, text, sizeof text);
    if (r != ncclInProgress) break;
    if (clock_look(c->world, &k)) {
      char message[496];
      phx_kit_text t = {message, sizeof message};
      say_own(&t, c, shown);
      phx_kit_say(&t, ": NCCL did not get ready within %g s", c->world->job->timeout_s);
      for (int32_t p = 0; p < c->n; p++) {
        phx_kit_say(&t, "; ");
        phx_kit_say_rank(&t, c->world->job, c->ranks[p]);
      }
      return nccl_end_job(c->world, err, message);
    }
    nap(&k);
  }
  if (r == ncclSuccess) return must_give_up(c) ? report_given_up(c, shown, err) : PHX_OK;
  if (!text[0]) (void)ask(c, 1, text, sizeof text);
  return report_nccl(c, shown, r, text, err);
}

/* ---- waiting for the device ---- */

static phx_status await(const nccl_call *call, cudaEvent_t begin, cudaEvent_t end, phx_error *err) {
  nccl_comm *c = call->comm;
  phx_status status = PHX_OK;
  char text[256];
  clock_of k = {phx_kit_now_ns(), phx_kit_now_ns(), 0, 10000};
  for (int i = 0;; i++) {
    const cudaError_t done = cudaEventQuery(end);
    if (done == cudaSuccess) break;
    if (done != cudaErrorNotReady) status = report_cuda(c, &call->shown, done, err);
    if (done != cudaErrorNotReady) break;
    if (i < 50) continue;
    if (!k.deadline && cudaEventQuery(begin) == cudaSuccess) clock_start(c->world, &k, phx_kit_now_ns());
    const int over = clock_look(c->world, &k);
    const ncclResult_t state = ask(c, 1, text, sizeof text);
    if (must_give_up(c))
      status = report_given_up(c, &call->shown, err);
    else if (state != ncclSuccess && state != ncclInProgress)
      status = report_nccl(c, &call->shown, state, text, err);
    else if (over && cudaEventQuery(end) != cudaSuccess)
      status = report_absent(call, k.last - k.begin, err);
    if (status != PHX_OK) break;
    nap(&k);
  }
  const int64_t waited = phx_kit_now_ns() - k.begin; /* begin moves by the time in which this process was stopped */
  phx_kit_count_wait(&c->counters, &c->world->all->counters, waited);
  /* An abort also ends the work: what was waited for did not happen. */
  return status == PHX_OK && must_give_up(c) ? report_given_up(c, &call->shown, err) : status;
}

phx_status nccl_wait(const nccl_call *call, phx_error *err) {
  NCCL_CUDA(err, cudaEventRecord(call->end, call->stream));
  return await(call, call->begin, call->end, err);
}

/* Milliseconds between a call's events; less than 0: not known. */
static float time_of(const nccl_world *w, cudaEvent_t begin, cudaEvent_t end) {
  float ms = -1;
  if (!w->timed || cudaEventElapsedTime(&ms, begin, end) == cudaSuccess) return ms;
  (void)cudaGetLastError(); /* it would stay for the next call; what failed is found elsewhere */
  return -1;
}

/* pending[at] is over; it may have been retired by the other thread meanwhile. */
static void retire(nccl_comm *c, uint64_t at, float ms) {
  nccl_world *w = c->world;
  pthread_mutex_lock(&w->lock);
  const nccl_pending *p = &c->pending[at % NCCL_PENDING];
  if (c->tail == at) {
    phx_kit_flight_end(w->job, p->flight);
    if (ms >= 0) w->ms[p->call.op] += (double)ms, w->ended[p->call.op]++;
    c->tail++;
  }
  pthread_mutex_unlock(&w->lock);
}

phx_status nccl_drain(nccl_comm *c, uint64_t upto, phx_error *err) {
  nccl_world *w = c->world;
  for (;;) {
    nccl_call call;
    pthread_mutex_lock(&w->lock);
    const uint64_t at = c->tail;
    call = c->pending[at % NCCL_PENDING].call;
    pthread_mutex_unlock(&w->lock);
    if (at >= upto) return PHX_OK;
    PHX_TRY(await(&call, call.begin, call.end, err));
    retire(c, at, time_of(w, call.begin, call.end));
  }
}

/* ---- the watchdog ---- */

typedef struct glance { /* at the oldest pending call */
  uint64_t at;
  nccl_call call;
  int64_t began_ns;
  int32_t launched;
} glance;

static int oldest(nccl_comm *c, glance *g) {
  pthread_mutex_lock(&c->world->lock);
  const nccl_pending *p = &c->pending[c->tail % NCCL_PENDING];
  const int any = c->tail < c->head;
  if (any) *g = (glance){c->tail, p->call, p->began_ns, p->launched};
  pthread_mutex_unlock(&c->world->lock);
  return any;
}

/* Its work has begun on the device. */
static void note_begin(nccl_comm *c, glance *g) {
  pthread_mutex_lock(&c->world->lock);
  nccl_pending *p = &c->pending[g->at % NCCL_PENDING];
  if (c->tail == g->at && !p->began_ns) {
    p->began_ns = phx_kit_now_ns();
    phx_kit_flight_started(c->world->job, p->flight, p->began_ns);
  }
  g->began_ns = p->began_ns;
  pthread_mutex_unlock(&c->world->lock);
}

/* Retires what is over.  1: *g is the oldest call that is not, and *code what its end event said. */
static int find_pending(nccl_comm *c, glance *g, cudaError_t *code) {
  while (oldest(c, g)) {
    *code = g->launched ? cudaEventQuery(g->call.end) : cudaErrorNotReady;
    if (*code == cudaSuccess) {
      retire(c, g->at, time_of(c->world, g->call.begin, g->call.end));
      continue;
    }
    if (!g->began_ns && cudaEventQuery(g->call.begin) == cudaSuccess) note_begin(c, g);
    return 1;
  }
  return 0;
}

/* Time in which this process did not run is nobody's absence. */
static void put_off(nccl_comm *c, int64_t asleep_ns) {
  pthread_mutex_lock(&c->world->lock);
  for (uint64_t k = c->tail; k < c->head; k++)
    if (c->pending[k % NCCL_PENDING].began_ns) c->pending[k % NCCL_PENDING].began_ns += asleep_ns;
  pthread_mutex_unlock(&c->world->lock);
}

/* One communicator; 1: a failure was found and the job is ended.  asleep_ns: how long this process did not run. */
static int look_at(nccl_comm *c, int64_t asleep_ns) {
  nccl_world *w = c->world;
  glance g;
  char text[256];
  cudaError_t code = cudaSuccess;
  if (asleep_ns) put_off(c, asleep_ns);
  if (!find_pending(c, &g, &code)) return 0;
  const ncclResult_t state = ask(c, 0, text, sizeof text);
  if (must_give_up(c)) return 0; /* the caller sees to it */
  if (state != ncclSuccess && state != ncclInProgress)
    return report_nccl(c, &g.call.shown, state, text, NULL) != PHX_OK;
  if (code != cudaErrorNotReady) return report_cuda(c, &g.call.shown, code, NULL) != PHX_OK;
  if (!g.began_ns) return 0; /* work of this rank comes first, and has no deadline: no heartbeat either */
  const int64_t now = phx_kit_now_ns(), main_ns = __atomic_load_n(&w->main_ns, __ATOMIC_RELAXED);
  /* before it is launched [main] may be in waits of its own, each with a deadline */
  const int64_t since = !g.launched && main_ns > g.began_ns ? main_ns : g.began_ns;
  __atomic_store_n(&w->job->mine->heartbeat_ns, (uint64_t)now, __ATOMIC_RELAXED);
  if (w->job->timeout_s <= 0 || now - since < (int64_t)(w->job->timeout_s * 1e9)) return 0;
  return report_absent(&g.call, now - g.began_ns, NULL) != PHX_OK;
}

/* Under the lock. */
static int is_anything_pending(const nccl_world *w) {
  for (const nccl_comm *c = w->comms; c; c = c->next)
    if (c->tail < c->head) return 1;
  return w->busy;
}

static void *watch(void *arg) {
  nccl_world *w = arg;
  int64_t last = phx_kit_now_ns();
  is_watchdog = 1;
  const cudaError_t set = cudaSetDevice(w->cuda_device);
  if (set != cudaSuccess) {
    char message[160];
    snprintf(message, sizeof message, "rank %d: the watchdog cannot use GPU %d: %s", w->job->rank, w->cuda_device,
             cudaGetErrorString(set));
    (void)nccl_end_job(w, NULL, message);
  }
  pthread_mutex_lock(&w->lock);
  while (!w->stop) {
    if (!is_anything_pending(w)) {
      pthread_cond_wait(&w->changed, &w->lock);
      last = phx_kit_now_ns();
      continue;
    }
    nccl_comm *list[NCCL_COMMS_MAX];
    int give_up = 0;
    w->looking = 1; /* [main] frees none meanwhile: see nccl_comm_free */
    pthread_mutex_unlock(&w->lock);
    const int n = list_comms(w, list);
    const int64_t now = phx_kit_now_ns(), asleep = now - last > SUSPENDED_NS ? now - last : 0;
    last = now;
    for (int i = 0; i < n && !give_up; i++) give_up = look_at(list[i], asleep);
    if (__atomic_load_n(w->job->failed, __ATOMIC_ACQUIRE)) __atomic_store_n(&w->aborted, 1, __ATOMIC_RELEASE);
    const int all_gone = __atomic_load_n(&w->aborted, __ATOMIC_ACQUIRE) != 0;
    for (int i = 0; i < n; i++) give_up |= nccl_is_aborted(list[i]);
    if (give_up || all_gone) nccl_abort_now(w);
    pthread_mutex_lock(&w->lock);
    w->looking = 0;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    nanosleep(&(struct timespec){0, LOOK_NS}, NULL);
    pthread_mutex_lock(&w->lock);
    if (all_gone && !w->stop && !w->busy) pthread_cond_wait(&w->changed, &w->lock); /* nothing more will come */
  }
  pthread_mutex_unlock(&w->lock);
  return NULL;
}

phx_status nccl_watch(nccl_world *w, phx_error *err) {
  const int code = pthread_create(&w->watchdog, NULL, watch, w);
  if (code != 0) return phx_fail_errno(err, PHX_NOMEM, code, "nccl: cannot start the watchdog's thread");
  w->watched = 1;
  return PHX_OK;
}
void nccl_watch_end(nccl_world *w) {
  if (!w->watched) return;
  pthread_mutex_lock(&w->lock);
  w->stop = 1;
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->lock);
  pthread_join(w->watchdog, NULL);
  w->watched = 0;
}
