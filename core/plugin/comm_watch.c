/* core/plugin/comm_watch.c - see comm_watch.h.
 *
 * Invariant: `world` is destroyed only while nobody is inside; the lock is held for moments, never in a call.
 * Threads: one for each call, as long as the call. */
#include "plugin/comm_watch.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>

#include "base/crash_text.h"
#include "base/status.h"

enum { CLOSE_S = 1 }; /* how long [main] waits for a call */

static struct comm_watch {
  pthread_mutex_t lock;
  pthread_cond_t left;
  const phx_comm *world; /* NULL: none is there */
  int inside;            /* calls that have not come back */
  bool asking, aborted;
  phx_status failed;
  char reason[sizeof((phx_error *)0)->message];
} at = {.lock = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static _Thread_local const char *inside_call;

const char *phx__comm_watch_inside(void) { return inside_call; }

void phx__comm_watch_open(const phx_comm *world) {
  pthread_mutex_lock(&at.lock);
  at.world = world;
  at.asking = at.aborted = false;
  at.failed = PHX_OK;
  pthread_mutex_unlock(&at.lock);
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
  inside_call = "health";
  const phx_status status = world->health(world->ctx, &err);
  inside_call = NULL;
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
  inside_call = "abort";
  world->abort(world->ctx);
  inside_call = NULL;
  pthread_mutex_lock(&at.lock);
  leave();
  pthread_mutex_unlock(&at.lock);
  return NULL;
}

/* The lock is held.  False: no thread could be had, and nothing is called. */
static bool start(void *(*call)(void *)) {
  pthread_t thread;
  sigset_t others, before;
  sigfillset(&others); /* signals are [main]'s, but for those of a crash */
  for (int i = 0; i < PHX__CRASHES; i++) sigdelset(&others, phx__crash_signals[i]);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  at.inside++;
  const bool started = pthread_create(&thread, NULL, call, (void *)(uintptr_t)at.world) == 0;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (started) pthread_detach(thread);
  else at.inside--;
  return started;
}

void phx__comm_ask_health(void) {
  pthread_mutex_lock(&at.lock);
  if (at.world && !at.asking && !at.failed) at.asking = start(call_health);
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
  if (at.world && !at.aborted) at.aborted = start(call_abort);
  pthread_mutex_unlock(&at.lock);
}
