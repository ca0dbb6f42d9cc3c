/* core/checkpoint/stream.c - see stream.h.
 *
 * A slot holds a chunk of a file, or the part of one that is there.  The bytes of a file lie in a slot at the same
 * place within 4096 as in the file, as direct I/O asks; parts of pages are moved with O_DIRECT off, and no page both
 * ways. Invariant: a slot that is BUSY belongs to a thread, any other to the caller; states change under the lock.
 * What is read to its final place is given out once: whoever asks again reads again, since it may have changed there.
 * What it does not do: compare hashes, flush, or retry what failed. */
#include "checkpoint/stream.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/status.h"
#include "base/sys.h"
#include "plugin/host.h"

enum { FREE, FILLING, QUEUED, BUSY, DONE };

typedef struct slot {
  unsigned char *data;  /* its own */
  unsigned char *place; /* where the file's bytes go: data, or the caller's memory */
  phx__stream_file *file;
  int64_t from, to; /* bytes of the file */
  uint64_t turn;    /* the least goes first */
  int state;
  bool write;
  uint64_t sum;      /* with DONE */
  phx_status status; /* with DONE */
  phx_error error;
} slot;

struct phx__stream {
  pthread_t threads[PHX__STREAM_READERS];
  int n_threads; /* 0: the caller does their work */
  pthread_mutex_t lock;
  pthread_cond_t work, done;
  bool stop;
  unsigned char *memory;
  slot slots[PHX__STREAM_SLOTS];
  int n;
  uint64_t turn;
  slot *current; /* being filled, or given out */
  phx_status status; /* the first failure of a write */
  phx_error error;
};

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t rounded_up(int64_t bytes) {
  return (bytes + PHX__STREAM_ALIGN - 1) / PHX__STREAM_ALIGN * PHX__STREAM_ALIGN;
}

/* ---- one transfer, in a thread or in the caller's ---- */
static void say_buffered(const phx__stream_file *file, int why) {
  char text[700];
  snprintf(text, sizeof text, "%.500s: goes through the page cache, since direct I/O is refused: %s", file->path,
           strerror(why));
  phx__log(0, "checkpoint", PHX_LOG_DEBUG, text);
}

void phx__stream_direct(phx__stream_file *file) {
  file->direct = !phx__sys.direct(file->fd, 1);
  if (!file->direct) say_buffered(file, errno);
}

static void give_up_direct(phx__stream_file *file) {
  file->direct = false;
  phx__sys.direct(file->fd, 0);
}

static phx_status put(slot *k, phx_error *err) {
  phx__stream_file *f = k->file;
  for (int64_t at = k->from; at < k->to;) {
    const int64_t whole = k->to - k->to % PHX__STREAM_ALIGN; /* to here in whole pages */
    const bool direct = f->direct && at % PHX__STREAM_ALIGN == 0 && whole > at;
    int64_t end = k->to;
    if (direct) end = whole;
    else if (f->direct) end = at_most(k->to, rounded_up(at + 1));
    if (f->direct && !direct) phx__sys.direct(f->fd, 0);
    const ssize_t n = phx__sys.pwrite(f->fd, k->data + at % PHX__STREAM_CHUNK, (size_t)(end - at), at);
    const int why = errno;
    if (f->direct && !direct) phx__sys.direct(f->fd, 1);
    if (n < 0 && why == EINTR) continue;
    if (n < 0 && why == EINVAL && direct) {
      give_up_direct(f);
      say_buffered(f, why);
      continue;
    }
    if (n < 0) return phx_fail_errno(err, PHX_IO, why, "cannot write %s at byte %lld", f->path, (long long)at);
    if (n == 0) return phx_fail(err, PHX_IO, "%s takes no more data, at byte %lld", f->path, (long long)at);
    at += n;
  }
  return PHX_OK;
}

static phx_status get(slot *k, phx_error *err) {
  phx__stream_file *f = k->file;
  for (int64_t at = k->from; at < k->to;) {
    const int64_t bytes = f->direct ? rounded_up(k->to - at) : k->to - at; /* there is room behind the file's end */
    const ssize_t n = phx__sys.pread(f->fd, k->place + (at - k->from), (size_t)bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && f->direct) {
      say_buffered(f, errno);
      give_up_direct(f);
      continue;
    }
    if (n < 0) return phx_fail_errno(err, PHX_IO, errno, "cannot read %s at byte %lld", f->path, (long long)at);
    if (n == 0) return phx_fail(err, PHX_IO, "%s ends too early, at byte %lld", f->path, (long long)at);
    at += n;
    if (f->direct && at < k->to && at % PHX__STREAM_ALIGN) give_up_direct(f);
  }
  k->sum = XXH3_64bits(k->place, (size_t)(k->to - k->from));
  return PHX_OK;
}

/* ---- the threads ---- */
static void settle(phx__stream *s, slot *k) {
  if (k->write && k->status && !s->status) {
    s->status = k->status;
    s->error = k->error;
  }
  k->state = k->write ? FREE : DONE;
}

static void *helper(void *arg) {
  phx__stream *s = arg;
  pthread_mutex_lock(&s->lock);
  while (!s->stop) {
    slot *k = NULL;
    for (int i = 0; i < s->n; i++)
      if (s->slots[i].state == QUEUED && (!k || s->slots[i].turn < k->turn)) k = &s->slots[i];
    if (!k) {
      pthread_cond_wait(&s->work, &s->lock);
      continue;
    }
    const bool pointless = k->write && s->status;
    k->state = BUSY;
    pthread_mutex_unlock(&s->lock);
    k->error = (phx_error)PHX_ERROR_INIT;
    k->status = PHX_OK;
    if (!pointless) k->status = k->write ? put(k, &k->error) : get(k, &k->error);
    pthread_mutex_lock(&s->lock);
    settle(s, k);
    pthread_cond_signal(&s->done);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

/* With the lock. */
static void queue(phx__stream *s, slot *k, bool first) {
  k->state = QUEUED;
  k->turn = first ? 0 : ++s->turn;
  if (s->n_threads > 0) {
    pthread_cond_signal(&s->work);
    return;
  }
  k->error = (phx_error)PHX_ERROR_INIT;
  k->status = PHX_OK;
  if (!k->write) k->status = get(k, &k->error);
  else if (!s->status) k->status = put(k, &k->error);
  settle(s, k);
}

phx_status phx__stream_create(int64_t bytes, int threads, phx__stream **out, phx_error *err) {
  sigset_t all, before;
  const int64_t chunks = bytes / PHX__STREAM_CHUNK + 1;
  const int n = (int)at_most(chunks, PHX__STREAM_SLOTS);
  const int64_t room = n == 1 ? rounded_up(bytes) : PHX__STREAM_CHUNK;
  const int64_t align = n == 1 ? PHX__STREAM_ALIGN : PHX__STREAM_HUGE;
  phx__stream *s = phx__calloc(1, sizeof *s);
  unsigned char *memory = phx__calloc(1, (size_t)(n * room + align));
  if (!s || !memory) {
    phx__free(s);
    phx__free(memory);
    return phx_fail(err, PHX_NOMEM, "no memory for the buffers of a file");
  }
  s->memory = memory;
  s->n = n;
  memory += align - (int64_t)((uintptr_t)memory % (uintptr_t)align);
  /* The device moves one run of memory instead of 256 pages: 1.2 times as fast on a virtual disk. */
  if (n > 1) madvise(memory, (size_t)(n * room), MADV_HUGEPAGE);
  for (int i = 0; i < n; i++) s->slots[i].data = memory + i * room;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->work, NULL);
  pthread_cond_init(&s->done, NULL);
  sigfillset(&all); /* signals are the main thread's */
  pthread_sigmask(SIG_BLOCK, &all, &before);
  while (n > 1 && s->n_threads < threads && !pthread_create(&s->threads[s->n_threads], NULL, helper, s))
    s->n_threads++; /* without any it is only slower */
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  *out = s;
  return PHX_OK;
}

void phx__stream_destroy(phx__stream *s) {
  if (!s) return;
  pthread_mutex_lock(&s->lock);
  s->stop = true;
  pthread_cond_broadcast(&s->work);
  pthread_mutex_unlock(&s->lock);
  for (int i = 0; i < s->n_threads; i++) pthread_join(s->threads[i], NULL);
  pthread_cond_destroy(&s->done);
  pthread_cond_destroy(&s->work);
  pthread_mutex_destroy(&s->lock);
  phx__free(s->memory);
  phx__free(s);
}

static void forget(phx__stream *s, const phx__stream_file *file, bool placed_only) {
  pthread_mutex_lock(&s->lock);
  for (int i = 0; i < s->n; i++) {
    slot *k = &s->slots[i];
    if (k->file != file || (placed_only && k->place == k->data)) continue;
    while (k->state == BUSY) pthread_cond_wait(&s->done, &s->lock);
    k->state = FREE;
    k->file = NULL;
    if (s->current == k) s->current = NULL;
  }
  pthread_mutex_unlock(&s->lock);
}

void phx__stream_forget(phx__stream *s, const phx__stream_file *file) { forget(s, file, false); }
void phx__stream_leave(phx__stream *s, const phx__stream_file *file) { forget(s, file, true); }

/* ---- writing ---- */
static void submit(phx__stream *s) {
  pthread_mutex_lock(&s->lock);
  if (s->current) queue(s, s->current, false);
  s->current = NULL;
  pthread_mutex_unlock(&s->lock);
}

static slot *free_slot(phx__stream *s) {
  slot *k = NULL;
  pthread_mutex_lock(&s->lock);
  while (!k) {
    for (int i = 0; i < s->n && !k; i++)
      if (s->slots[i].state == FREE) k = &s->slots[i];
    if (!k) pthread_cond_wait(&s->done, &s->lock);
  }
  k->state = FILLING;
  pthread_mutex_unlock(&s->lock);
  return k;
}

static phx_status first_failure(phx__stream *s, phx_error *err) {
  pthread_mutex_lock(&s->lock);
  const phx_status status = s->status;
  if (status && err) *err = s->error;
  pthread_mutex_unlock(&s->lock);
  return status;
}

phx_status phx__stream_write(phx__stream *s, phx__stream_file *file, const void *data, int64_t bytes, int64_t at,
                             phx_error *err) {
  for (const char *p = data; bytes > 0;) {
    slot *k = s->current;
    if (k && k->to != at) submit(s);
    if (!s->current) {
      k = s->current = free_slot(s);
      k->write = true;
      k->file = file;
      k->from = k->to = at;
    }
    const int64_t inside = at % PHX__STREAM_CHUNK, part = at_most(bytes, PHX__STREAM_CHUNK - inside);
    memcpy(k->data + inside, p, (size_t)part);
    k->to += part;
    if (inside + part == PHX__STREAM_CHUNK) submit(s);
    p += part;
    at += part;
    bytes -= part;
  }
  return first_failure(s, err);
}

phx_status phx__stream_drain(phx__stream *s, phx__stream_file *file, phx_error *err) {
  submit(s);
  pthread_mutex_lock(&s->lock);
  for (int i = 0; i < s->n; i++)
    while (s->slots[i].state != FREE) pthread_cond_wait(&s->done, &s->lock);
  pthread_mutex_unlock(&s->lock);
  if (file->direct) give_up_direct(file);
  return first_failure(s, err);
}

/* ---- reading ---- */
static slot *find(phx__stream *s, const phx__stream_file *file, int64_t chunk) {
  for (int i = 0; i < s->n; i++)
    if (s->slots[i].state != FREE && s->slots[i].file == file && s->slots[i].from / PHX__STREAM_CHUNK == chunk)
      return &s->slots[i];
  return NULL;
}

/* What was given out in its place is not here any more. */
static void hand_over(slot *k) {
  if (!k || k->place == k->data) return;
  k->state = FREE;
  k->file = NULL;
}

/* One that nobody waits for: neither given out nor one of the next chunks; or NULL. */
static slot *spare(phx__stream *s, const phx__stream_file *file, int64_t chunk, int64_t last) {
  slot *found = NULL;
  for (int i = 0; i < s->n; i++) {
    slot *k = &s->slots[i];
    const int64_t holds = k->from / PHX__STREAM_CHUNK;
    if (k->state == FREE) return k;
    if (k->state != BUSY && k != s->current && (k->file != file || holds < chunk || holds > last)) found = k;
  }
  return found;
}

static void aim(slot *k, phx__stream_file *file, int64_t chunk) {
  k->write = false;
  k->file = file;
  k->from = chunk * PHX__STREAM_CHUNK;
  k->to = at_most(k->from + PHX__STREAM_CHUNK, file->bytes);
  k->place = k->data;
  const int64_t ahead = k->from - file->into.at;
  if (!file->into.to || ahead < 0 || ahead + PHX__STREAM_CHUNK > file->into.bytes) return;
  if ((uintptr_t)(file->into.to + ahead) % PHX__STREAM_ALIGN == 0) k->place = file->into.to + ahead;
}

phx_status phx__stream_chunk(phx__stream *s, phx__stream_file *file, int64_t chunk, int64_t last,
                             phx__stream_data *out, phx_error *err) {
  pthread_mutex_lock(&s->lock);
  slot *k = find(s, file, chunk);
  if (k != s->current) hand_over(s->current);
  s->current = NULL;
  last = at_most(at_most(last, chunk + s->n - 1), (file->bytes - 1) / PHX__STREAM_CHUNK);
  while (!k && !(k = spare(s, file, chunk, last))) pthread_cond_wait(&s->done, &s->lock);
  if (k->state == FREE || k->file != file || k->from / PHX__STREAM_CHUNK != chunk) {
    aim(k, file, chunk);
    queue(s, k, true);
  } else if (k->state == QUEUED) {
    k->turn = 0;
  }
  s->current = k;
  for (int64_t c = chunk + 1; s->n_threads && c <= last; c++) {
    slot *next = find(s, file, c) ? NULL : spare(s, file, chunk, last);
    if (!next) continue;
    aim(next, file, c);
    queue(s, next, false);
  }
  while (k->state != DONE) pthread_cond_wait(&s->done, &s->lock);
  const phx_status status = k->status;
  if (status) {
    if (err) *err = k->error;
    k->state = FREE;
    s->current = NULL;
  }
  pthread_mutex_unlock(&s->lock);
  *out = (phx__stream_data){k->place, k->sum};
  return status;
}
