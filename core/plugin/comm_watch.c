/* core/plugin/comm_watch.c - see comm_watch.h.
 *
 * Invariant: `world` is destroyed only while nobody is inside; the lock is held for moments, never in a call.
 * Threads: one for each call, as long as the call.  Each is joined, before the next of its kind or by close,
 * so that nothing of it is left when the run has ended. */
#include "plugin/comm_watch.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "base/crash_text.h"
#include "base/status.h"

enum { CLOSE_S = 1 }; /* how long [main] waits for a call */

typedef struct caller {
  pthread_t thread;
  bool started; /* and not joined */
  int32_t tid;  /* of a thread that is in the call now; 0: none is.  Atomic */
} caller;

static struct comm_watch {
  pthread_mutex_t lock;
  pthread_cond_t left;
  const phx_comm *world; /* NULL: none is there */
  int inside;            /* calls that have not come back */
  bool asking, aborted;
  caller health, abort;
  phx_status failed;
  char reason[sizeof((phx_error *)0)->message];
} at = {.lock = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static bool is_in(const caller *c) { return __atomic_load_n(&c->tid, __ATOMIC_RELAXED) == gettid(); }

const char *phx__comm_watch_inside(void) {
  if (is_in(&at.health)) return "health";
  return is_in(&at.abort) ? "abort" : NULL;
}

void phx__comm_watch_open(const phx_comm *world) {
  pthread_mutex_lock(&at.lock);
  at.world = world;
  at.asking = at.aborted = false;
  at.failed = PHX_OK;
  pthread_mutex_unlock(&at.lock);
}

/* The lock is held.  Who has left does not take the lock again, and is joined; who hangs is given up. */
static void end(caller *c, bool has_left) {
  if (c->started && has_left) pthread_join(c->thread, NULL);
  else if (c->started) pthread_detach(c->thread);
  c->started = false;
}

bool phx__comm_watch_close(void) {
  struct timespec until;
  int late = 0;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += CLOSE_S;
  pthread_mutex_lock(&at.lock);
  at.world = NULL; /* no further call begins */
  while (at.inside > 0 && !late) late = pthread_cond_timedwait(&at.left, &at.lock, &until);
  const bool empty = at.inside == 0;
  end(&at.health, empty);
  end(&at.abort, empty);
  pthread_mutex_unlock(&at.lock);
  return empty;
}

static void leave(void) { /* the lock is held */
  at.inside--;
  pthread_cond_signal(&at.left);
}

static void *call_health(void *arg) {
  const phx_comm *world = arg;
  phx_error err = PHX_ERROR_INIT;
  __atomic_store_n(&at.health.tid, gettid(), __ATOMIC_RELAXED);
  const phx_status status = world->health(world->ctx, &err);
  __atomic_store_n(&at.health.tid, 0, __ATOMIC_RELAXED);
  err.message[sizeof err.message - 1] = 0;
  pthread_mutex_lock(&at.lock);
  at.asking = false;
  at.failed = status;
  if (err.message[0]) snprintf(at.reason, sizeof at.reason, "%s", err.message);
  else snprintf(at.reason, sizeof at.reason, "%s (status %d), without a reason", phx__status_name(status), status);
  leave();
  pthread_mutex_unlock(&at.lock);
  return NULL;
}

static void *call_abort(void *arg) {
  const phx_comm *world = arg;
  __atomic_store_n(&at.abort.tid, gettid(), __ATOMIC_RELAXED);
  world->abort(world->ctx);
  __atomic_store_n(&at.abort.tid, 0, __ATOMIC_RELAXED);
  pthread_mutex_lock(&at.lock);
  leave();
  pthread_mutex_unlock(&at.lock);
  return NULL;
}

/* The lock is held.  False: no thread could be had, and nothing is called. */
static bool start(caller *c, void *(*call)(void *)) {
  sigset_t others, before;
  end(c, true); /* one of a kind at a time: the one before has left */
  sigfillset(&others); /* signals are [main]'s, but for those of a crash */
  for (int i = 0; i < PHX__CRASHES; i++) sigdelset(&others, phx__crash_signals[i]);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  at.inside++;
  c->started = pthread_create(&c->thread, NULL, call, (void *)(uintptr_t)at.world) == 0;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (!c->started) at.inside--;
  return c->started;
}

void phx__comm_ask_health(void) {
  pthread_mutex_lock(&at.lock);
  if (at.world && !at.asking && !at.failed) at.asking = start(&at.health, call_health);
  pthread_mutex_unlock(&at.lock);
}

bool phx__comm_health_failed(char *text, size_t bytes) {
  pthread_mutex_lock(&at.lock);
  const bool failed = at.world && at.failed != PHX_OK;
  if (failed) snprintf(text, bytes, "%s", at.reason);
  pthread_mutex_unlock(&at.lock);
  return failed;
}

void phx__comm_abort(void) {
  pthread_mutex_lock(&at.lock);
  if (at.world && !at.aborted) at.aborted = start(&at.abort, call_abort);
  pthread_mutex_unlock(&at.lock);
}
