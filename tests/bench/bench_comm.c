/* tests/bench/bench_comm.c - the communicator shm on two ranks, one per core, beside what memory allows and Open MPI.
 *
 * The bound: both ranks' copies updated in place, a = b = a + b, each process one half: what an all_reduce must at
 * least read and write.  It runs on the same shared arenas, in the same processes, in turn with the all_reduce. Open
 * MPI: several settings are started, each measured once, the best for each line is the comparator.  Buffers in place on
 * both sides.  Ranks that are not asked sleep. */
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include "bench.h"
#include "comm_server.h"
#include "fake_job.h"

#define MAX_BYTES ((int64_t)256 << 20)

/* ---- our ranks ---- */

static const phx_comm_table *table;
static char config[4096] __attribute__((aligned(16)));

static void update_both(float *restrict a, float *restrict b, int64_t numel) {
  for (int64_t i = 0; i < numel; i++) {
    const float x = a[i] + b[i];
    a[i] = x;
    b[i] = x;
  }
}

static phx_status round_of(phx_comm *c, const comm_server *s, float *const *x, phx_error *err) {
  const int64_t numel = s->bytes / 4, part = numel / SERVE_RANKS;
  float *mine = x[c->rank];
  serve_touch(s, mine);
  if (s->what == SERVE_ALL_REDUCE) return c->all_reduce(c->ctx, mine, mine, numel, PHX_F32, PHX_SUM, NULL, err);
  if (s->what == SERVE_REDUCE_SCATTER)
    return c->reduce_scatter(c->ctx, mine, mine + c->rank * part, part, PHX_F32, PHX_SUM, NULL, err);
  if (s->what == SERVE_ALL_GATHER) return c->all_gather(c->ctx, mine + c->rank * part, mine, part, PHX_F32, NULL, err);
  update_both(x[0] + c->rank * part, x[1] + c->rank * part, part);
  return c->barrier(c->ctx, NULL, err);
}

static void serve(fake_rank *rank) {
  comm_server *s = rank->arg;
  phx_error err = {.struct_size = sizeof err};
  phx_comm *c = NULL;
  cpu_set_t cpu;
  float *x[SERVE_RANKS];
  CPU_ZERO(&cpu);
  CPU_SET((unsigned)rank->job.rank, &cpu);
  sched_setaffinity(0, sizeof cpu, &cpu);
  phx_status status = table->create(&rank->host, config, MAX_BYTES, &c, &err);
  FAKE_CHECK(rank, status == PHX_OK, "%s", err.message);
  memset(table->arena(c), 0, (size_t)MAX_BYTES);
  for (int r = 0; r < SERVE_RANKS; r++) /* equal layout: the arena is equally far from every base */
    x[r] = (float *)(void *)((char *)rank->bases_seen[r] +
                             ((char *)table->arena(c) - (char *)rank->bases_seen[rank->job.rank]));
  if (rank->job.rank == 0) snprintf(s->about, sizeof s->about, "shm (%.120s)", rank->log);
  for (uint32_t number = 0;;) {
    number = serve_next(s, number);
    if (s->what == SERVE_QUIT) break;
    status = round_of(c, s, x, &err); /* warm */
    if (status == PHX_OK) status = c->barrier(c->ctx, NULL, &err);
    const double begin = serve_now();
    for (int i = 0; i < s->rounds && status == PHX_OK; i++) status = round_of(c, s, x, &err);
    if (status != PHX_OK) s->failed = 1;
    serve_done(s, rank->job.rank, number, (serve_now() - begin) / s->rounds);
    FAKE_CHECK(rank, status == PHX_OK, "%s", err.message);
  }
  table->destroy(c);
}

/* ---- the driver ---- */

static double ask(comm_server *s, int what, int64_t bytes, int rounds) {
  const uint32_t number = s->number + 1;
  const double limit = bench_now() + 60;
  s->what = what;
  s->bytes = bytes;
  s->rounds = rounds;
  __atomic_store_n(&s->number, number, __ATOMIC_RELEASE);
  if (what == SERVE_QUIT) return 0;
  for (int r = 0; r < SERVE_RANKS; r++) {
    while (__atomic_load_n(&s->done[r], __ATOMIC_ACQUIRE) != number) {
      if (s->failed || bench_now() > limit) return 0;
      nanosleep(&(struct timespec){0, 200000}, NULL);
    }
  }
  return s->seconds[0] > s->seconds[1] ? s->seconds[0] : s->seconds[1];
}

typedef struct question {
  comm_server *server;
  int what, rounds;
  int64_t bytes;
} question;
static double rate(void *arg) { /* bytes per second */
  const question *q = arg;
  const double seconds = ask(q->server, q->what, q->bytes, q->rounds);
  return seconds > 0 ? (double)q->bytes / seconds : 0;
}

/* ---- Open MPI's ranks, under several settings ---- */

typedef struct rival {
  const char *name, *settings;
  comm_server *server;
  pid_t pid;
  char page[64];
} rival;
static rival rivals[] = {
    {.name = "default", .settings = ""},
    {.name = "vader, CMA", .settings = "--mca btl self,vader --mca btl_vader_single_copy_mechanism cma"},
    {.name = "vader, no single copy", .settings = "--mca btl self,vader --mca btl_vader_single_copy_mechanism none"},
    {.name = "ring", .settings = "--mca coll_tuned_use_dynamic_rules 1 --mca coll_tuned_allreduce_algorithm 4"},
    {.name = "coll sm", .settings = "--mca coll_sm_priority 100"},
};
enum { RIVALS = sizeof rivals / sizeof *rivals };

static void rival_start(rival *r) {
  char command[512];
  int fd = -1;
  snprintf(r->page, sizeof r->page, "/tmp/bench-comm-XXXXXX");
  fd = mkstemp(r->page);
  if (fd < 0 || ftruncate(fd, sizeof(comm_server)) != 0) return;
  r->server = mmap(NULL, sizeof(comm_server), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (r->server == MAP_FAILED) {
    r->server = NULL;
    return;
  }
  snprintf(command, sizeof command, "exec mpirun -np %d --bind-to core %s %s %s %lld >/dev/null 2>&1 </dev/null",
           SERVE_RANKS, r->settings, BENCH_OPENMPI, r->page, (long long)MAX_BYTES);
  r->pid = fork();
  if (r->pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
  }
  const double limit = bench_now() + 20;
  while (!*(volatile char *)r->server->about && bench_now() < limit && waitpid(r->pid, NULL, WNOHANG) == 0)
    nanosleep(&(struct timespec){0, 10000000}, NULL);
  if (*(volatile char *)r->server->about) return;
  bench_note("comm", "Open MPI (%s) did not start", r->name);
  kill(r->pid, SIGTERM);
  waitpid(r->pid, NULL, 0);
  r->server = NULL;
}
static void rival_stop(rival *r) {
  if (r->server) {
    ask(r->server, SERVE_QUIT, 0, 0);
    waitpid(r->pid, NULL, 0);
  }
  if (r->page[0]) unlink(r->page);
}
static rival *rival_best(int what, int64_t bytes, int rounds) {
  rival *best = NULL;
  double best_rate = 0;
  for (int i = 0; i < RIVALS; i++) {
    question q = {rivals[i].server, what, rounds, bytes};
    const double got = q.server ? rate(&q) : 0;
    if (got > best_rate) {
      best = &rivals[i];
      best_rate = got;
    }
  }
  return best;
}

static void compare_bound(comm_server *ours, int64_t bytes, int rounds) {
  char name[80];
  snprintf(name, sizeof name, "comm: all_reduce, %lld MiB, 2 ranks", (long long)(bytes >> 20));
  question a = {ours, SERVE_ALL_REDUCE, rounds, bytes}, b = {ours, SERVE_BOUND, rounds, bytes};
  bench_line line = {.name = name, .a = "shm", .b = "a = b = a + b in place", .unit = "GB/s", .divisor = 1e9,
                     .limit = 0.90};
  bench_compare(&line, rate, &a, rate, &b);
  bench_print(&line);
}
static void compare_rival(comm_server *ours, int what, const char *op, int64_t bytes, int rounds, double limit) {
  char name[80], b_name[280];
  snprintf(name, sizeof name, "comm: %s, %lld KiB, 2 ranks", op, (long long)(bytes >> 10));
  if (!bench_wanted(name)) return;
  rival *best = rival_best(what, bytes, rounds);
  if (!best) {
    bench_note(name, "skipped: no Open MPI ranks");
    return;
  }
  snprintf(b_name, sizeof b_name, "%s, %s", best->server->about, best->name);
  question a = {ours, what, rounds, bytes}, b = {best->server, what, rounds, bytes};
  bench_line line = {.name = name, .a = "shm", .b = b_name, .unit = "GB/s", .divisor = 1e9, .limit = limit};
  bench_compare(&line, rate, &a, rate, &b);
  bench_print(&line);
  bench_note(name, "%.2f us against %.2f us", (double)bytes / line.rate_a * 1e6, (double)bytes / line.rate_b * 1e6);
}

/* job->share, remembered: the bound needs every rank's arena, which the communicator does not show. */
static phx_status (*real_share)(void *ctx, const char *name, int64_t bytes, void **bases, phx_error *err);
static phx_status seen_share(void *ctx, const char *name, int64_t bytes, void **bases, phx_error *err) {
  fake_rank *rank = ctx;
  const phx_status status = real_share(ctx, name, bytes, bases, err);
  if (status == PHX_OK) memcpy(rank->bases_seen, bases, sizeof(void *) * (size_t)rank->job.size);
  return status;
}
static void serve_seen(fake_rank *rank) {
  real_share = rank->job.share;
  rank->job.share = seen_share;
  serve(rank);
}

static void run_all(comm_server *ours) {
  const int64_t mib = 1 << 20;
  compare_bound(ours, 32 * mib, 8);
  compare_bound(ours, 256 * mib, 2);
  if (BENCH_OPENMPI[0]) {
    for (int i = 0; i < RIVALS; i++) rival_start(&rivals[i]);
  }
  compare_rival(ours, SERVE_ALL_REDUCE, "all_reduce", 1024, 1000, 1.0);
  compare_rival(ours, SERVE_ALL_REDUCE, "all_reduce", 64 << 10, 500, 0);
  compare_rival(ours, SERVE_ALL_REDUCE, "all_reduce", 32 * mib, 4, 5.0);
  compare_rival(ours, SERVE_ALL_REDUCE, "all_reduce", 256 * mib, 1, 5.0);
  compare_rival(ours, SERVE_REDUCE_SCATTER, "reduce_scatter", 32 * mib, 4, 0);
  compare_rival(ours, SERVE_REDUCE_SCATTER, "reduce_scatter", 256 * mib, 1, 0);
  compare_rival(ours, SERVE_ALL_GATHER, "all_gather", 32 * mib, 4, 0);
  compare_rival(ours, SERVE_ALL_GATHER, "all_gather", 256 * mib, 1, 0);
  for (int i = 0; i < RIVALS; i++) rival_stop(&rivals[i]);
}

int main(int argc, char **argv) {
  bench_init(argc, argv);
  const phx_plugin *plugin = fake_plugin_load(PHX_TEST_PLUGINS "/phx_comm_shm.so", config, sizeof config);
  comm_server *ours = mmap(NULL, sizeof *ours, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (!plugin || ours == MAP_FAILED) return 3;
  table = plugin->table;
  const pid_t pid = fork();
  if (pid == 0) { /* the ranks' parent: waits for them while this process measures */
    static fake_result result;
    fake_setup setup = {.n = SERVE_RANKS, .may_spin = 1, .timeout_s = 30, .limit_s = 3600,
                        .share_bytes = MAX_BYTES + ((int64_t)64 << 20), .arg = ours};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int ran = fake_job_run(&setup, serve_seen, &result);
    fprintf(stderr, "%s", fake_job_report(&result, SERVE_RANKS));
    _exit(ran && !result.report[0][0] && !result.report[1][0] ? 0 : 1);
  }
  const double limit = bench_now() + 30;
  while (!*(volatile char *)ours->about && bench_now() < limit) nanosleep(&(struct timespec){0, 10000000}, NULL);
  bench_note("comm", "%s", ours->about);
  run_all(ours);
  ask(ours, SERVE_QUIT, 0, 0);
  int ended = 0;
  waitpid(pid, &ended, 0);
  return bench_finish() || ended != 0;
}
