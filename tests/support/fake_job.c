/* fake_job.c - see fake_job.h.  Shared memory is one anonymous shared mapping made before the fork. */
#include "fake_job.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "loopback.h"
#include "plugin_file.h"
#include "base/status.h"

typedef struct fake_memory {
  uint32_t failed;
  char report[PHX_RANKS_MAX][1024];
  uint32_t shared; /* arrivals of share() and exchange() */
  phx_liveness pages[PHX_RANKS_MAX];
  int64_t share_bytes, used[PHX_RANKS_MAX];
  char *area; /* n * share_bytes */
} fake_memory;

static double seconds_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void arrive(fake_rank *r) {
  fake_memory *m = r->memory;
  uint32_t mine = __atomic_fetch_add(&m->shared, 1, __ATOMIC_ACQ_REL), all = (uint32_t)r->job.size;
  while (__atomic_load_n(&m->shared, __ATOMIC_ACQUIRE) < (mine / all + 1) * all)
    nanosleep(&(struct timespec){0, 100000}, NULL); /* a rank that never comes: the limit of fake_job_run */
}

static phx_status share(void *ctx, const char *name, int64_t bytes, void **bases, phx_error *err) {
  fake_rank *r = ctx;
  fake_memory *m = r->memory;
  int64_t at = m->used[r->job.rank], size = (bytes + 4095) / 4096 * 4096;
  (void)name;
  if (at + size > m->share_bytes) {
    if (err) err->code = PHX_NOMEM;
    return PHX_NOMEM;
  }
  m->used[r->job.rank] = at + size;
  for (int32_t i = 0; i < r->job.size; i++) bases[i] = m->area + i * m->share_bytes + at;
  memset(bases[r->job.rank], 0, (size_t)size); /* pre-faulted by its owner; nobody may use it before */
  arrive(r);
  return PHX_OK;
}

static void fail(void *ctx, const char *message) {
  fake_rank *r = ctx;
  uint32_t none = 0;
  if (__atomic_load_n(&r->job.mine->state, __ATOMIC_ACQUIRE) != 4) {
    snprintf(r->job.mine->message, sizeof r->job.mine->message, "%s", message);
    __atomic_store_n(&r->job.mine->state, 4, __ATOMIC_RELEASE);
  }
  __atomic_compare_exchange_n(&r->memory->failed, &none, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, &r->memory->failed, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static phx_status exchange(void *ctx, const char *name, const void *mine, int64_t bytes, void *all, phx_error *err) {
  fake_rank *r = ctx;
  void *bases[PHX_RANKS_MAX];
  PHX_TRY(share(ctx, name, bytes, bases, err));
  memcpy(bases[r->job.rank], mine, (size_t)bytes);
  arrive(r);
  for (int32_t i = 0; i < r->job.size; i++) memcpy((char *)all + i * bytes, bases[i], (size_t)bytes);
  return PHX_OK;
}

static const void *extension(void *ctx, const char *id) {
  fake_rank *r = ctx;
  if (strcmp(id, PHX_EXT_JOB) == 0) return &r->job;
  if (strcmp(id, PHX_EXT_DEVICE) == 0) return r->device;
  return NULL;
}
/* A communicator's own thread writes, too. */
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static void host_log(void *ctx, int32_t level, const char *message) {
  fake_rank *r = ctx;
  (void)level;
  pthread_mutex_lock(&log_lock);
  snprintf(r->log, sizeof r->log, "%s", message);
  pthread_mutex_unlock(&log_lock);
}
bool fake_said(fake_rank *rank, const char *text) {
  pthread_mutex_lock(&log_lock);
  const bool said = strstr(rank->log, text) != NULL;
  pthread_mutex_unlock(&log_lock);
  return said;
}

void fake_report(fake_rank *rank, const char *file, int line, const char *what, const char *format, ...) {
  va_list args;
  const char *base = strrchr(file, '/');
  int n = snprintf(rank->report, 1024, "rank %d, %s:%d: not %s: ", rank->job.rank, base ? base + 1 : file, line, what);
  if (n < 0 || n >= 1024) return;
  va_start(args, format);
  vsnprintf(rank->report + n, 1024 - (size_t)n, format, args);
  va_end(args);
}

/* Streams are threads; it lives as long as the process. */
static phx_device *device;
static void device_make(void) { device = loopback_device_create(LOOPBACK_THREADS); }
static const phx_device *device_of_process(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, device_make);
  return device;
}

static void rank_fill(fake_rank *r, fake_memory *m, const fake_setup *s, int32_t rank) {
  memset(r, 0, sizeof *r);
  r->memory = m;
  r->arg = s->arg;
  r->report = m->report[rank];
  for (int32_t i = 0; i < s->n; i++) r->pages[i] = &m->pages[i];
  r->job = (phx_job){.struct_size = sizeof(phx_job), .ctx = r, .rank = rank, .size = s->n, .local_rank = rank,
                     .local_size = s->n, .timeout_s = s->timeout_s, .mine = r->pages[rank], .ranks = r->pages,
                     .failed = &m->failed, .may_spin = s->may_spin, .share = share, .fail = fail, .exchange = exchange};
  r->host = (phx_host){.struct_size = sizeof(phx_host), .abi_major = PHX_ABI_MAJOR, .abi_minor = PHX_ABI_MINOR,
                       .ctx = r, .rank = rank, .world_size = s->n, .local_rank = rank, .local_size = s->n,
                       .log = host_log, .extension = extension};
  r->device = device_of_process();
  __atomic_store_n(&r->job.mine->pid, (int32_t)getpid(), __ATOMIC_RELAXED);
  __atomic_store_n(&r->job.mine->state, 2, __ATOMIC_RELAXED);
}

typedef struct thread_start {
  fake_rank rank;
  fake_body *body;
} thread_start;
static void *thread_main(void *arg) {
  thread_start *t = arg;
  t->body(&t->rank);
  return NULL;
}
static void run_threads(const fake_setup *s, fake_memory *m, fake_body *body) {
  thread_start *t = calloc((size_t)s->n, sizeof *t);
  pthread_t id[PHX_RANKS_MAX];
  for (int32_t i = 0; i < s->n; i++) {
    rank_fill(&t[i].rank, m, s, i);
    t[i].body = body;
    pthread_create(&id[i], NULL, thread_main, &t[i]);
  }
  for (int32_t i = 0; i < s->n; i++) pthread_join(id[i], NULL);
  free(t);
}

static void run_processes(const fake_setup *s, fake_memory *m, fake_body *body, fake_result *out) {
  pid_t pid[PHX_RANKS_MAX];
  int32_t alive = s->n;
  double deadline = seconds_now() + s->limit_s;
  fflush(NULL);
  for (int32_t i = 0; i < s->n; i++) {
    pid[i] = fork();
    if (pid[i] == 0) {
      fake_rank *r = malloc(sizeof *r);
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      rank_fill(r, m, s, i);
      body(r);
      _exit(m->report[i][0] ? 1 : 0);
    }
  }
  while (alive > 0) {
    for (int32_t i = 0; i < s->n; i++) {
      if (pid[i] > 0 && waitpid(pid[i], &out->status[i], WNOHANG) == pid[i]) {
        pid[i] = 0;
        alive--;
      }
    }
    if (alive > 0 && seconds_now() > deadline) {
      for (int32_t i = 0; i < s->n; i++) {
        if (pid[i] <= 0) continue;
        kill(pid[i], SIGKILL);
        waitpid(pid[i], &out->status[i], 0);
        out->late++;
        alive--;
      }
    }
    if (alive > 0) nanosleep(&(struct timespec){0, 1000000}, NULL);
  }
}

int fake_job_run(const fake_setup *s, fake_body *body, fake_result *out) {
  size_t head = (sizeof(fake_memory) + 4095) / 4096 * 4096, total = head + (size_t)(s->n * s->share_bytes);
  char *p = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  memset(out, 0, sizeof *out);
  if (p == MAP_FAILED) return 0;
  fake_memory *m = (fake_memory *)(void *)p;
  m->share_bytes = s->share_bytes;
  m->area = p + head;
  double begin = seconds_now();
  if (s->threads)
    run_threads(s, m, body);
  else
    run_processes(s, m, body, out);
  out->seconds = seconds_now() - begin;
  memcpy(out->report, m->report, sizeof out->report);
  munmap(p, total);
  return 1;
}

const char *fake_job_report(const fake_result *result, int32_t n) {
  static char text[128];
  for (int32_t i = 0; i < n; i++) {
    if (result->report[i][0]) return result->report[i];
  }
  for (int32_t i = 0; i < n; i++) {
    if (result->status[i] == 0) continue;
    snprintf(text, sizeof text, "rank %d ended with wait status %d, %d ranks were late", i, result->status[i],
             result->late);
    return text;
  }
  return "";
}

const phx_plugin *fake_plugin_load(const char *path, void *config, size_t config_bytes) {
  phx_error err = {.struct_size = sizeof err};
  char none[1] = "";
  const phx_plugin *plugin = plugin_file_open(path, &err);
  if (plugin && plugin->config_size > config_bytes) {
    phx_fail(&err, PHX_INVALID, "%s: its configuration takes %zu bytes", path, (size_t)plugin->config_size);
    plugin = NULL;
  }
  if (plugin) {
    memset(config, 0, config_bytes);
    if (plugin_file_config(plugin, none, config, &err)) plugin = NULL;
  }
  if (!plugin) fprintf(stderr, "%s\n", err.message);
  return plugin;
}
