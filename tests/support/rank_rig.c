/* tests/support/rank_rig.c - see rank_rig.h. */
#include "rank_rig.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "command.h"
#include "plugin/config_load.h"
#include "job/job.h"
#include "base/job_calls.h"
#include "job/job_segment.h"
#include "engine/prepare.h"
#include "engine/runtime_open.h"
#include "engine/state.h"
#include "base/status.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/lsan_interface.h>
#endif

enum { REPORT = 1024 };

const char rank_rig_model[] =
    "[batch]\nmicro = 1\nsequence = 8\n"
    "[model]\nplugin = gpt\nlayers = 1\nheads = 1\nwidth = 8\ncontext = 8\nvocab = 257\n";

void rank_rig_report(rank_rig *rig, const char *file, int line, const char *what, const char *format, ...) {
  va_list args;
  const char *base = strrchr(file, '/');
  if (rig->report[0]) return;
  const int n =
      snprintf(rig->report, REPORT, "rank %d, %s:%d: not %s: ", rig->rank, base ? base + 1 : file, line, what);
  if (n < 0 || n >= REPORT) return;
  va_start(args, format);
  vsnprintf(rig->report + n, REPORT - (size_t)n, format, args);
  va_end(args);
}

char *rank_rig_dir(void) {
  char name[] = "/dev/shm/phalanx-test-XXXXXX";
  return mkdtemp(name) ? strdup(name) : command_temp_dir();
}

/* ---- a rank ---- */
phx_status rank_rig_open(rank_rig *rig, const char *strategy, const char *out, phx_error *err) {
  char ranks[32], name[64], place[512];
  phx__prepared *prepared = NULL;
  phx_status status = PHX_OK;
  if (!strategy) strategy = "ddp";
  snprintf(ranks, sizeof ranks, "run.ranks=%d", rig->size);
  snprintf(name, sizeof name, "run.strategy=%.*s", (int)strcspn(strategy, "."), strategy);
  snprintf(place, sizeof place, "run.out=%s", out ? out : "out");
  const phx__override overrides[] = {{"plugins.path=" PHX_TEST_PLUGINS, "--set"},
                                     {ranks, "-n"},
                                     {name, "--strategy"},
                                     {place, "--set"},
                                     {"run.steps=1000000", "--set"},
                                     {"optimizer.schedule=constant", "--set"},
                                     {strategy, "--set"}};
  const size_t n = sizeof overrides / sizeof *overrides - !strchr(strategy, '=');
  PHX_TRY_GOTO(phx__config_load("run.ini", overrides, n, stderr, &rig->config), status, done);
  const phx__settings *s = &rig->config->s;
  if (!rig->job) PHX_TRY_GOTO(phx__job_open(s->run.timeout, &rig->job, err), status, done);
  PHX_TRY_GOTO(phx__prepare(rig->config, rig->rank, rig->size, rig->rank, rig->size, 0, 0, &prepared, err), status,
               done);
  PHX_TRY_GOTO(phx__data_open(s->data.train, prepared->shape.sequence, prepared->facts.vocabulary,
                              (uint64_t)s->run.seed, &rig->data, err), status, done);
  phx__prepared *taken = prepared;
  prepared = NULL;
  PHX_TRY_GOTO(phx__runtime_open(rig->config, rig->job, taken, &rig->rt, err), status, done);
  PHX_TRY_GOTO(phx__engine_create(rig->rt, &rig->engine, err), status, done);
  PHX_TRY_GOTO(phx__runtime_initialise(rig->rt, err), status, done);
  rig->step = 0;
done:
  phx__prepared_free(prepared);
  rig->lost = status && rig->engine && rig->size > 1; /* calls may be under way, for which nobody comes */
  if (status) rank_rig_close(rig);
  return status;
}

void rank_rig_close(rank_rig *rig) {
  if (rig->lost) return;
  phx__saver_close(rig->saver);
  phx__engine_destroy(rig->engine);
  phx__runtime_close(rig->rt);
  phx__data_close(rig->data);
  phx__config_free(rig->config);
  rig->saver = NULL, rig->engine = NULL, rig->rt = NULL, rig->data = NULL, rig->config = NULL;
}

phx_status rank_rig_step(rank_rig *rig, phx_error *err) {
  phx__step_result result;
  const phx_status status = phx__engine_step(rig->engine, rig->data, rig->step + 1, &result, err);
  rig->step += !status;
  return status;
}

phx_status rank_rig_save_begin(rank_rig *rig, int64_t keep, phx_error *err) {
  const phx__position at = {.step = rig->step, .samples = rig->step * rig->size};
  rig->retention.keep = keep;
  return phx__saver_begin(rig->saver, &at, err);
}

phx_status rank_rig_save(rank_rig *rig, int64_t keep, phx_error *err) {
  const phx__position at = {.step = rig->step, .samples = rig->step * rig->size};
  phx__save_report report;
  rig->retention.keep = keep;
  if (!rig->saver) return phx__checkpoint_save(rig->rt, rig->config->s.run.out, &at, &rig->retention, NULL, err);
  const phx_status status = phx__saver_begin(rig->saver, &at, err);
  return status ? status : phx__saver_finish(rig->saver, &report, err);
}

phx_status rank_rig_hash(rank_rig *rig, char text[33], phx_error *err) {
  phx__state_hash hash;
  const phx_status status = phx__runtime_state_hash(rig->rt, &hash, err);
  if (!status) phx__state_hash_text(hash, text);
  return status;
}

int64_t rank_rig_most(rank_rig *rig, int64_t value) {
  phx_error err = PHX_ERROR_INIT;
  int64_t most = 0;
  if (!phx__job_max(rig->job, value, &most, &err)) return most;
  rank_rig_report(rig, __FILE__, __LINE__, "met", "%s", err.message);
  _exit(1);
}

int rank_rig_open_files(void) {
  int n = 0;
  DIR *d = opendir("/proc/self/fd");
  while (d && readdir(d)) n++;
  if (d) closedir(d);
  return n;
}

/* ---- all of them ---- */
/* Who waits then sleeps at once: a busy machine makes nobody late. */
static void take_one_cpu(int32_t rank) {
  cpu_set_t here;
  int cpu = 0;
  if (sched_getaffinity(0, sizeof here, &here)) return;
  for (int skip = rank % CPU_COUNT(&here); !CPU_ISSET(cpu, &here) || skip-- > 0; cpu++) continue;
  CPU_ZERO(&here);
  CPU_SET(cpu, &here);
  sched_setaffinity(0, sizeof here, &here);
}

typedef struct life { /* of a rank */
  const rank_rig_run *run;
  rank_rig rig;
} life;

/* A thread of its own: what is suppressed for leaks of the test's framework is not to hide those of a rank, and every
 * allocation of the test's own thread has the framework in its stack. */
static void *live(void *arg) {
  life *l = arg;
  rank_rig *rig = &l->rig;
  phx_error err = PHX_ERROR_INIT;
  phx_status status = l->run->unopened ? PHX_OK : rank_rig_open(rig, l->run->strategy, l->run->out, &err);
  if (!status && l->run->background) /* copies: two blocks of the widest type, so that some are waited for */
    status = phx__saver_open(rig->rt, rig->config->s.run.out, &rig->retention, 2 * PHX_BLOCK * 8, &rig->saver, &err);
  if (status)
    rank_rig_report(rig, __FILE__, __LINE__, "opened", "%s", err.message);
  else
    l->run->body(rig, l->run->arg);
  fflush(stderr);
  if (rig->report[0]) _exit(1); /* it left its body where it stood */
  rank_rig_close(rig);
  return NULL;
}

static void child(const rank_rig_run *run, int32_t rank, int segment, char *report) {
  static const char *const names[] = {"PHALANX_RANK", "PHALANX_WORLD_SIZE", "PHALANX_LOCAL_RANK", "PHALANX_LOCAL_SIZE",
                                      "PHALANX_JOB_FD"};
  const int values[] = {rank, run->size, rank, run->size, segment};
  static life l;
  char text[32];
  pthread_t thread;
  l = (life){.run = run, .rig = {.rank = rank, .size = run->size, .report = report}};
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  take_one_cpu(rank);
  for (int i = 0; i < 5; i++) {
    snprintf(text, sizeof text, "%d", values[i]);
    setenv(names[i], text, 1);
  }
  snprintf(text, sizeof text, "errors.%d", rank);
  if (chdir(run->dir) || !freopen(text, "we", stderr)) _exit(2);
  setvbuf(stderr, NULL, _IOLBF, 0);
  if (pthread_create(&thread, NULL, live, &l) || pthread_join(thread, NULL)) _exit(2);
#ifdef __SANITIZE_ADDRESS__
  /* in a file of its own: after a fork it complains that the parent's thread is not there */
  snprintf(text, sizeof text, "leaks.%d", rank);
  __sanitizer_set_report_path(text);
  if (__lsan_do_recoverable_leak_check())
    rank_rig_report(&l.rig, __FILE__, __LINE__, "clean", "memory is leaked: see %s/%s.%d", run->dir, text,
                    (int)getpid());
#endif
  _exit(report[0] != 0);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool rank_rig_ranks(rank_rig_run *run) {
  phx_error err = PHX_ERROR_INIT;
  pid_t pids[PHX_RANKS_MAX] = {0};
  char(*reports)[REPORT] =
      mmap(NULL, sizeof *reports * (size_t)run->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  const int segment = phx__job_create_segment(run->size, &err);
  if (reports == MAP_FAILED || segment < 0) abort();
  run->message[0] = 0;
  fflush(NULL);
  for (int32_t r = 0; r < run->size; r++)
    if ((pids[r] = fork()) == 0) child(run, r, segment, reports[r]);
  const double end = now() + run->limit_s;
  for (int32_t alive = run->size; alive > 0; usleep(500)) {
    const bool late = now() > end;
    for (int32_t r = 0; r < run->size; r++) {
      int status;
      if (pids[r] <= 0) continue;
      if (late) kill(pids[r], SIGKILL);
      if (waitpid(pids[r], &status, late ? 0 : WNOHANG) != pids[r]) continue;
      pids[r] = 0;
      alive--;
      if ((WIFEXITED(status) && WEXITSTATUS(status) == 0) || run->message[0]) continue;
      snprintf(run->message, sizeof run->message, "rank %d ended with wait status %x%s: %s", r, (unsigned)status,
               late ? ", killed because the time was up" : "", reports[r]);
    }
  }
  for (int32_t r = 0; r < run->size; r++) /* what a check says is more than that a rank ended */
    if (reports[r][0]) {
      snprintf(run->message, sizeof run->message, "%s", reports[r]);
      break;
    }
  close(segment);
  munmap(reports, sizeof *reports * (size_t)run->size);
  return !run->message[0];
}
