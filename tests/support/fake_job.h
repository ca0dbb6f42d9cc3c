/* fake_job.h - "phx.job/1" and a host for tests of communicators: ranks are forked processes, or threads.
 *
 * fake_job_run makes the shared memory, forks `n` children, runs `body` in each, and waits at most limit_s; children
 * that are late are killed.  A child reports with FAKE_CHECK; its text comes back in fake_result.  The job's failed
 * word, liveness pages and share() work as job.h says.  With threads = 1 the ranks are threads of this process (for the
 * thread sanitizer); they must all return. */
#ifndef FAKE_JOB_H
#define FAKE_JOB_H
#include <phalanx/device.h>
#include <phalanx/host.h>
#include <phalanx/job.h>
#include <phalanx/plugin.h>
#include <phalanx/provider.h>
#include <stdbool.h>

typedef struct fake_rank { /* what a body gets */
  phx_host host;           /* extensions: phx.job/1 and phx.device/1 */
  phx_job job;
  const phx_device *device;
  void *arg;
  char *report; /* this rank's text, empty while all is well */
  char log[256]; /* the last line; see fake_said */
  struct fake_memory *memory;
  void *bases_seen[PHX_RANKS_MAX];
  phx_liveness *pages[PHX_RANKS_MAX];
} fake_rank;
typedef void fake_body(fake_rank *rank);

typedef struct fake_setup {
  int32_t n, may_spin, threads;
  double timeout_s, limit_s;
  int64_t share_bytes; /* room for share(), per rank */
  void *arg;
} fake_setup;
typedef struct fake_result {
  int32_t late;                     /* ranks that were killed at the limit */
  int32_t status[PHX_RANKS_MAX];    /* as from waitpid */
  char report[PHX_RANKS_MAX][1024]; /* texts of FAKE_CHECK */
  double seconds;
} fake_result;

/* Fills *out; 0 when the memory or the processes could not be had. */
int fake_job_run(const fake_setup *setup, fake_body *body, fake_result *out);
/* The first report of any rank, or "" */
const char *fake_job_report(const fake_result *result, int32_t n);

#define FAKE_CHECK(rank, condition, ...)                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fake_report((rank), __FILE__, __LINE__, #condition, __VA_ARGS__);                       \
      return;                                                                                 \
    }                                                                                         \
  } while (0)
/* [any] Does the last line of the host's log have this text? */
bool fake_said(fake_rank *rank, const char *text);
void fake_report(fake_rank *rank, const char *file, int line, const char *what, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

/* dlopen's a plugin of the build tree and applies its defaults to a zeroed config of config_bytes; NULL with a message
 * on stderr. */
const phx_plugin *fake_plugin_load(const char *path, void *config, size_t config_bytes);
#endif
