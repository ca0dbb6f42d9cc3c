/* core/checkpoint/saver.c - see saver.h.
 *
 * The state is cut into chunks (1 MiB at most), in the order of the file.  Each is in one of these, under one lock:
 *   LIVE     to be written, from the state itself
 *   BUSY     the writer reads the state itself; [main] waits, and copies others meanwhile
 *   COPYING  [main] copies it, since the state is about to change; the writer waits for it
 *   COPIED   to be written, from the copy
 *   DONE     nothing is read any more
 * LIVE -> BUSY -> DONE by the writer; LIVE -> COPYING -> COPIED by [main] in before_change, -> DONE by the writer.
 * Invariant: before_change returns for a range only when every chunk that touches it is COPIED or DONE, or the writer
 * has ended; so the state never changes while it is read, and what is written is of the step that the save began with.
 * [main] waits only while it holds no chunk in COPYING, and the writer only for COPYING: neither waits for the other.
 * What it does not do: decide when to save, or say anything (checkpoint_run.c).
 * Threads: [main] and one writer, which calls no plugin: phx__save_write, flush and publish. */
#include "checkpoint/saver.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/job_calls.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/manifest.h"
#include "engine/handed.h"
#include "engine/prepare.h"
#include "engine/state_visit.h"
#include "plugin/where.h"

enum { LIVE = 0, BUSY, COPYING, COPIED, DONE }; /* a chunk */
enum { NOTHING = 0, WRITE, PUBLISH, QUIT };     /* what the thread is asked for */
enum { IDLE = 0, WRITING, PUBLISHING };         /* the save, the same on all ranks */
enum { WAIT_MS = 100 };

typedef struct chunk {
  size_t slice;
  int64_t first, blocks, bytes;
  const char *live;
  char *copy; /* its place in the pool; NULL: none yet, or none at all */
  int state;
} chunk;

struct phx__saver {
  phx__runtime *rt;
  const char *run_dir;
  const phx__retention *retention;
  /* the pool: a place for every chunk, or places that are taken and given back */
  char *pool;
  int64_t pool_bytes, chunk_bytes, n_places;
  bool place_for_each;
  char **free_places; /* (n_places) the first n_free are free; under the lock */
  int64_t n_free;
  /* the save in flight */
  phx__save *save;
  void **mapped; /* (phx__save_n) */
  size_t n_mapped;
  chunk *chunks; /* (n_chunks) */
  chunk **by_address;
  size_t n_chunks, ahead; /* ahead: of the chunks, what [main] looked at in copying ahead */
  int phase;
  double began;
  phx__save_report report;
  /* shared with the thread, under the lock */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t to_writer, to_main;
  bool started, reading, cancelled;
  int asked;    /* NOTHING: the thread has done what it was asked for */
  double ended; /* when it was published */
};

bool phx__saver_possible(const phx__runtime *rt, const char **why) {
  *why = NULL;
  if (!(rt->device->caps & PHX_DEVICE_HOST_MEMORY)) *why = "the CPU cannot read the device's memory";
  if (!(rt->config->strategy.plugin->descriptor->provides & PHX_CAP_LIVE_STATE))
    *why = "the strategy does not say that its state can be read meanwhile (PHX_CAP_LIVE_STATE)";
  return !*why;
}

/* ---- the thread ---- */
static void write_chunk(phx__saver *v, chunk *c) { /* the lock is held, but while it writes */
  while (c->state == COPYING) pthread_cond_wait(&v->to_writer, &v->lock);
  const bool copied = c->state == COPIED;
  if (!copied) c->state = BUSY;
  pthread_mutex_unlock(&v->lock);
  const phx_status failed = phx__save_write(v->save, c->slice, c->first, c->blocks, copied ? c->copy : c->live, NULL);
  pthread_mutex_lock(&v->lock);
  c->state = DONE;
  if (copied && !v->place_for_each) v->free_places[v->n_free++] = c->copy;
  if (failed) v->reading = false; /* gather tells why */
  pthread_cond_signal(&v->to_main);
}

static void write_all(phx__saver *v) {
  for (size_t i = 0; i < v->n_chunks && v->reading && !v->cancelled; i++) write_chunk(v, &v->chunks[i]);
  v->reading = false;
  pthread_cond_signal(&v->to_main);
  if (v->cancelled) return;
  pthread_mutex_unlock(&v->lock);
  phx__save_flush(v->save, NULL);
  pthread_mutex_lock(&v->lock);
}

static void *work(void *arg) {
  phx__saver *v = arg;
  pthread_mutex_lock(&v->lock);
  while (v->asked != QUIT) {
    if (v->asked == WRITE) write_all(v);
    if (v->asked == PUBLISH) {
      pthread_mutex_unlock(&v->lock);
      phx__save_publish(v->save, v->retention);
      pthread_mutex_lock(&v->lock);
    }
    v->ended = phx__now();
    if (v->asked != QUIT) v->asked = NOTHING;
    pthread_cond_signal(&v->to_main);
    while (v->asked == NOTHING) pthread_cond_wait(&v->to_writer, &v->lock);
  }
  pthread_mutex_unlock(&v->lock);
  return NULL;
}

static void ask(phx__saver *v, int what) {
  pthread_mutex_lock(&v->lock);
  v->asked = what;
  pthread_cond_signal(&v->to_writer);
  pthread_mutex_unlock(&v->lock);
}

/* Signals are for [main]; those of a crash come to the thread that crashes. */
static phx_status start(phx__saver *v, phx_error *err) {
  pthread_condattr_t clock;
  sigset_t all, before;
  sigfillset(&all);
  const int crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
  for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++) sigdelset(&all, crashes[i]);
  pthread_mutex_init(&v->lock, NULL);
  pthread_condattr_init(&clock);
  pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  pthread_cond_init(&v->to_main, &clock);
  pthread_cond_init(&v->to_writer, &clock);
  pthread_condattr_destroy(&clock);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(&v->thread, NULL, work, v);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  v->started = !failed;
  return failed ? phx_fail_errno(err, PHX_NOMEM, failed, "cannot start the thread that saves checkpoints") : PHX_OK;
}

/* ---- waiting ---- */
/* The lock is held.  A rank that waits for its disk is alive, and hears when the job fails. */
static phx_status wait_a_moment(phx__saver *v, phx_error *err) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += WAIT_MS * 1000000L;
  if (until.tv_nsec >= 1000000000L) {
    until.tv_nsec -= 1000000000L;
    until.tv_sec++;
  }
  pthread_cond_timedwait(&v->to_main, &v->lock, &until);
  phx__job_heartbeat(v->rt->job);
  if (!__atomic_load_n(v->rt->job->failed, __ATOMIC_ACQUIRE)) return PHX_OK;
  return phx_fail(err, PHX_COMM, "the job failed while a checkpoint was being written");
}

static phx_status wait_for_thread(phx__saver *v, phx_error *err) {
  const double begin = phx__now();
  phx_status status = PHX_OK;
  pthread_mutex_lock(&v->lock);
  while (v->asked != NOTHING && !status) status = wait_a_moment(v, err);
  pthread_mutex_unlock(&v->lock);
  v->report.waits += phx__now() - begin;
  return status;
}

/* ---- before state changes ---- */
static bool take_place(phx__saver *v, chunk *c) {
  if (!v->place_for_each) c->copy = v->n_free > 0 ? v->free_places[--v->n_free] : NULL;
  return c->copy != NULL;
}

/* LIVE -> COPIED; the lock is held, but while it copies. */
static void copy_chunk(phx__saver *v, chunk *c) {
  const double begin = phx__now();
  c->state = COPYING;
  pthread_mutex_unlock(&v->lock);
  memcpy(c->copy, c->live, (size_t)c->bytes);
  pthread_mutex_lock(&v->lock);
  c->state = COPIED;
  pthread_cond_signal(&v->to_writer);
  v->report.copies += phx__now() - begin;
}

/* Updates come in the order of the file, too: who only waited for the chunk in BUSY would wait for the next again, and
 * so for the whole disk.  So the time goes into the chunks behind it, which the same update is going to change. */
static bool copy_ahead(phx__saver *v, const chunk *c) {
  const size_t behind = (size_t)(c - v->chunks) + 1;
  if (v->ahead < behind) v->ahead = behind;
  while (v->ahead < v->n_chunks && v->chunks[v->ahead].state != LIVE) v->ahead++;
  if (v->ahead == v->n_chunks || !take_place(v, &v->chunks[v->ahead])) return false;
  copy_chunk(v, &v->chunks[v->ahead]);
  return true;
}

static phx_status keep_chunk(phx__saver *v, chunk *c, phx_error *err) { /* the lock is held */
  phx_status status = PHX_OK;
  while (v->reading && c->state != DONE && c->state != COPIED && !status) {
    if (c->state == LIVE && take_place(v, c)) {
      copy_chunk(v, c);
    } else if (c->state != BUSY || !copy_ahead(v, c)) {
      const double begin = phx__now();
      status = wait_a_moment(v, err);
      v->report.waits += phx__now() - begin;
    }
  }
  return status;
}

/* The first chunk, by address, that ends behind p. */
static size_t first_behind(const phx__saver *v, const char *p) {
  size_t low = 0, high = v->n_chunks;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    if (v->by_address[middle]->live + v->by_address[middle]->bytes > p)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

static phx_status before_change(void *arg, const void *p, int64_t bytes, phx_error *err) {
  phx__saver *v = arg;
  phx_status status = PHX_OK;
  if (v->phase != WRITING) return PHX_OK;
  pthread_mutex_lock(&v->lock);
  const char *from = p, *to = from ? from + bytes : NULL;
  for (size_t i = from ? first_behind(v, from) : 0; i < v->n_chunks && v->reading && !status; i++) {
    if (to && v->by_address[i]->live >= to) break;
    status = keep_chunk(v, v->by_address[i], err);
  }
  pthread_mutex_unlock(&v->lock);
  return status;
}

/* ---- the pool ---- */
typedef struct sizes {
  int64_t all;
} sizes;

static int64_t slice_bytes(const phx_slice *s) {
  return s->blocks * PHX_BLOCK * (int64_t)phx_dtype_bytes(s->dtype);
}

static phx_status add_size(void *ctx, const phx_slice *slice, phx_error *err) {
  (void)err;
  if (!phx__state_derived(slice)) ((sizes *)ctx)->all += slice_bytes(slice);
  return PHX_OK;
}

static phx_status take_pool(phx__saver *v, int64_t copy, phx_error *err) {
  phx__runtime *rt = v->rt;
  sizes s = {0};
  PHX_TRY(phx__state_visit(rt, add_size, &s, err));
  v->place_for_each = copy < 0 || copy >= s.all;
  v->pool_bytes = phx__copy_pool(copy, s.all, &v->chunk_bytes);
  if (!v->place_for_each) {
    v->n_places = v->pool_bytes / v->chunk_bytes;
    v->free_places = phx__calloc((size_t)v->n_places, sizeof *v->free_places);
    if (!v->free_places) return phx_fail(err, PHX_NOMEM, "no memory for the list of a checkpoint's copies");
  }
  if (v->pool_bytes == 0) return PHX_OK;
  const phx_memory what = {
      .struct_size = sizeof what, .bytes = v->pool_bytes, .kind = PHX_MEM_BUFFER, .space = PHX_SPACE_HOST};
  void *pool = NULL;
  PHX_TRY(rt->core_host.table.alloc(rt->core_host.table.ctx, &what, &pool, err));
  v->pool = pool;
  if (rt->prepared->copy_bytes == 0) /* the strategy or the device did not say enough before */
    rt->prepared->planned[PHX_MEM_BUFFER] += phx_align_bytes(v->pool_bytes);
  return PHX_OK;
}

phx_status phx__saver_open(phx__runtime *rt, const char *run_dir, const phx__retention *retention, int64_t copy,
                           phx__saver **out, phx_error *err) {
  phx__saver *v = phx__calloc(1, sizeof *v);
  if (!v) return phx_fail(err, PHX_NOMEM, "no memory to save checkpoints");
  v->rt = rt;
  v->run_dir = run_dir;
  v->retention = retention;
  phx_status status = take_pool(v, copy, err);
  if (!status) status = start(v, err);
  if (status) {
    phx__saver_close(v);
    return status;
  }
  rt->optim.before_change = before_change;
  rt->optim.before_change_arg = v;
  *out = v;
  return PHX_OK;
}

/* ---- one save ---- */
static int by_address(const void *a, const void *b) {
  const char *x = (*(chunk *const *)a)->live, *y = (*(chunk *const *)b)->live;
  return (x > y) - (x < y);
}

static size_t count_chunks(const phx__saver *v) {
  size_t n = 0;
  for (size_t i = 0; i < phx__save_n(v->save); i++)
    n += (size_t)((slice_bytes(phx__save_slice(v->save, i)) + v->chunk_bytes - 1) / v->chunk_bytes);
  return n;
}

static void cut_slice(phx__saver *v, size_t i, int64_t *at) {
  const phx_slice *s = phx__save_slice(v->save, i);
  const int64_t block = PHX_BLOCK * (int64_t)phx_dtype_bytes(s->dtype), most = v->chunk_bytes / block;
  for (int64_t first = 0; first < s->blocks; first += most) {
    chunk *c = &v->chunks[v->n_chunks];
    const int64_t blocks = s->blocks - first < most ? s->blocks - first : most;
    *c = (chunk){.slice = i,
                 .first = first,
                 .blocks = blocks,
                 .bytes = blocks * block,
                 .live = (const char *)v->mapped[i] + first * block};
    if (v->place_for_each && *at + c->bytes <= v->pool_bytes) c->copy = v->pool + *at;
    *at += c->bytes;
    v->by_address[v->n_chunks++] = c;
  }
}

static void forget_chunks(phx__saver *v) {
  phx__free(v->by_address);
  phx__free(v->chunks);
  phx__free(v->mapped);
  v->by_address = NULL;
  v->chunks = NULL;
  v->mapped = NULL;
  v->n_chunks = v->n_mapped = 0;
}

static phx_status map_all(phx__saver *v, phx_error *err) {
  const phx__runtime *rt = v->rt;
  const size_t n = phx__save_n(v->save);
  int64_t at = 0;
  const size_t room = count_chunks(v);
  v->ahead = 0;
  v->mapped = phx__calloc(n, sizeof *v->mapped);
  v->chunks = phx__calloc(room, sizeof *v->chunks);
  v->by_address = phx__calloc(room, sizeof *v->by_address);
  if (!v->mapped || !v->chunks || !v->by_address)
    return phx_fail(err, PHX_NOMEM, "no memory for the table of a checkpoint's chunks");
  for (; v->n_mapped < n; v->n_mapped++) {
    const phx_slice *slice = phx__save_slice(v->save, v->n_mapped);
    void **out = &v->mapped[v->n_mapped];
    PHX_TRY(PHX__IN_STRATEGY(rt->job, PHX_IN_STATE, -1,
                             rt->prepared->strategy->map(rt->strategy, slice, PHX_MAP_READ, out, err)));
    PHX_TRY(phx__handed_map(rt, slice, *out, err));
    cut_slice(v, v->n_mapped, &at);
  }
  if (v->n_chunks > 1) qsort(v->by_address, v->n_chunks, sizeof *v->by_address, by_address);
  for (v->n_free = 0; v->n_free < v->n_places; v->n_free++)
    v->free_places[v->n_free] = v->pool + v->n_free * v->chunk_bytes;
  return PHX_OK;
}

static void unmap_all(phx__saver *v) {
  const phx__runtime *rt = v->rt;
  phx_error why = PHX_ERROR_INIT;
  while (v->n_mapped > 0) {
    const size_t i = --v->n_mapped;
    const phx_status status = PHX__IN_STRATEGY(
        rt->job, PHX_IN_STATE, -1,
        rt->prepared->strategy->unmap(rt->strategy, phx__save_slice(v->save, i), PHX_MAP_READ, v->mapped[i], &why));
    if (status) phx__save_fail(v->save, status, &why);
  }
}

bool phx__saver_busy(const phx__saver *v) {
  return v->phase != IDLE;
}

bool phx__saver_ready(phx__saver *v) {
  pthread_mutex_lock(&v->lock);
  const bool ready = v->asked == NOTHING;
  pthread_mutex_unlock(&v->lock);
  return ready;
}

phx_status phx__saver_begin(phx__saver *v, const phx__position *at, phx_error *err) {
  phx_error why = PHX_ERROR_INIT;
  v->began = phx__now();
  v->report = (phx__save_report){.step = at->step};
  PHX_TRY(phx__save_begin(v->rt, v->run_dir, at, &v->save, err));
  phx_status status = map_all(v, &why);
  if (status) phx__save_fail(v->save, status, &why); /* gather tells the others */
  v->phase = WRITING;
  v->reading = !status; /* the thread sleeps */
  ask(v, WRITE);
  v->report.begin = phx__now() - v->began;
  return PHX_OK;
}

static phx_status gather(phx__saver *v, phx_error *err) {
  unmap_all(v);
  forget_chunks(v);
  const phx_status status = phx__save_gather(v->save, err);
  if (status) {
    v->save = NULL;
    v->phase = IDLE;
    return status;
  }
  v->report.bytes = phx__save_all_bytes(v->save);
  v->phase = PUBLISHING;
  if (v->rt->job->rank == 0) ask(v, PUBLISH);
  return PHX_OK;
}

static phx_status end(phx__saver *v, double since, phx__save_report *out, phx_error *err) {
  phx__save_report *r = &v->report;
  int64_t most = (int64_t)(1e9 * (r->begin + r->copies + r->waits + r->commit + phx__now() - since));
  const phx_status status = phx__save_end(v->save, &most, err);
  v->save = NULL;
  v->phase = IDLE;
  if (status) return status;
  r->stall = 1e-9 * (double)most;
  r->seconds = (v->rt->job->rank == 0 ? v->ended : phx__now()) - v->began;
  r->commit += phx__now() - since;
  *out = *r;
  return PHX_OK;
}

phx_status phx__saver_advance(phx__saver *v, bool *ended, phx__save_report *out, phx_error *err) {
  const double begin = phx__now();
  if (v->phase == PUBLISHING) {
    *ended = true;
    return end(v, begin, out, err);
  }
  const phx_status status = gather(v, err);
  v->report.commit += phx__now() - begin;
  *ended = status != PHX_OK;
  return status;
}

phx_status phx__saver_finish(phx__saver *v, phx__save_report *out, phx_error *err) {
  phx_status status = PHX_OK;
  for (bool ended = !phx__saver_busy(v); !ended && !status;) {
    status = wait_for_thread(v, err);
    if (!status) status = phx__saver_advance(v, &ended, out, err);
  }
  return status;
}

void phx__saver_close(phx__saver *v) {
  if (!v) return;
  if (v->rt->optim.before_change_arg == v) v->rt->optim.before_change = NULL;
  if (v->started) {
    pthread_mutex_lock(&v->lock);
    v->cancelled = true;
    while (v->asked != NOTHING) pthread_cond_wait(&v->to_main, &v->lock);
    v->asked = QUIT;
    pthread_cond_signal(&v->to_writer);
    pthread_mutex_unlock(&v->lock);
    pthread_join(v->thread, NULL);
    pthread_cond_destroy(&v->to_writer);
    pthread_cond_destroy(&v->to_main);
    pthread_mutex_destroy(&v->lock);
  }
  phx__save_abandon(v->save);
  forget_chunks(v);
  v->rt->core_host.table.release(v->rt->core_host.table.ctx, v->pool);
  phx__free(v->free_places);
  phx__free(v);
}
