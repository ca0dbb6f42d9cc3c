/* The communicator "nccl" on doubles of NCCL and of the CUDA runtime: the suite of every communicator, in both orders
 * of reduction, and what only nccl has: joining, GPUs in common, asynchronous errors, hangs, abort, what is left
 * behind. */
#include <criterion/criterion.h>
#include <cuda_double.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "comm_suite.h"
#include "nccl_double.h"
#include "said.h"
#include "sanitizer.h"

typedef struct config { int64_t staging, communicators; int32_t registered, reserved0; } config; /* as comm_nccl.h */

static const phx_comm_table *table;
static config cfg;
static double_control *control;
static int deterministic = 1;
static int32_t far_arena; /* the suite treats the arena as a GPU's, which the CPU cannot touch */

static void enter(fake_rank *rank) {
  rank->device = double_device_open(rank->job.rank);
  rank->host.deterministic = deterministic;
}
static void leave(fake_rank *rank) { double_device_close(rank->device); }

static void load(void) {
  const phx_plugin *plugin = fake_plugin_load(PHX_TEST_ONLY_PLUGINS "/phx_comm_nccl_double.so", &cfg, sizeof cfg);
  cr_assert_not_null(plugin);
  cr_assert_eq(plugin->config_size, sizeof cfg);
  table = plugin->table;
  cfg.staging = 1 << 20;
  cfg.communicators = 8;
  control = double_setup();
  cr_assert_not_null(control);
  comm_suite = (comm_suite_setup){.table = table, .config = &cfg, .communicators = 8, .enter = enter, .leave = leave};
}
static void run_limited(int n, double timeout_s, double limit_s, fake_body *body, void *arg, fake_result *result) {
  fake_setup s = {.n = n, .timeout_s = timeout_s, .limit_s = limit_s, .share_bytes = (int64_t)32 << 20, .arg = arg};
  cr_assert(fake_job_run(&s, body, result));
}
static void nothing_left(void) {
  cr_expect_eq(control->live_comms, 0, "%d communicators are left", control->live_comms);
  cr_expect_eq(control->live_registrations, 0, "%d registrations are left", control->live_registrations);
  cr_expect_eq(control->live_memory, 0, "%d arenas are left", control->live_memory);
  cr_expect_eq(control->late_operations, 0, "%d operations on aborted communicators", control->late_operations);
}
static void run(int n, double limit_s, fake_body *body) {
  static fake_result result;
  load();
  comm_suite.any_order = !deterministic;
  comm_suite.far_arena = far_arena;
  run_limited(n, 60, limit_s, body, NULL, &result);
  const char *report = fake_job_report(&result, n);
  cr_assert_eq(result.late, 0, "%d of %d ranks were late; %s", result.late, n, report);
  cr_assert_eq(report[0], 0, "%d ranks: %s", n, report);
  nothing_left();
}

/* ---- the suite ---- */

Test(nccl, battery_1, .timeout = 120) { run(1, 100, comm_suite_battery); }
Test(nccl, battery_3, .timeout = 120) { run(3, 100, comm_suite_battery); }
#if !UNDER_TSAN /* minutes there, and what is in one process is the same */
Test(nccl, battery_2, .timeout = 120) { run(2, 100, comm_suite_battery); }
Test(nccl, battery_4, .timeout = 120) { run(4, 100, comm_suite_battery); }
Test(nccl, battery_5, .timeout = 240) { run(5, 200, comm_suite_battery); }
Test(nccl, battery_in_nccls_own_order_2, .timeout = 120) {
  deterministic = 0;
  far_arena = 1;
  run(2, 100, comm_suite_battery);
}
Test(nccl, battery_in_nccls_own_order_3, .timeout = 120) { deterministic = 0; run(3, 100, comm_suite_battery); }
#endif
Test(nccl, many_chunks, .timeout = 60) { run(3, 50, comm_suite_tiny_staging); run(7, 50, comm_suite_tiny_staging); }
Test(nccl, send_recv_ring, .timeout = 60) { run(2, 50, comm_suite_pairs); run(5, 50, comm_suite_pairs); }
Test(nccl, streams_and_events, .timeout = 60) { run(1, 50, comm_suite_streams); run(3, 50, comm_suite_streams); }
Test(nccl, split_and_two_orders_at_once, .timeout = 60) {
  run(2, 50, comm_suite_splits);
  run(5, 50, comm_suite_splits);
}
Test(nccl, split_beyond_the_pool_is_refused, .timeout = 30) { run(3, 20, comm_suite_pool_empty); }
Test(nccl, wrong_arguments_are_refused_and_harmless, .timeout = 20) { run(2, 10, comm_suite_arguments); }

/* Negative control: the double's own order is another one, so that the battery can tell it from the canonical. */
Test(nccl, the_double_adds_in_another_order, .timeout = 60) {
  static fake_result result;
  deterministic = 0;
  load();
  run_limited(5, 60, 50, comm_suite_tiny_staging, NULL, &result);
  cr_expect(strstr(fake_job_report(&result, 5), "element"), "%s", fake_job_report(&result, 5));
}

Test(nccl, mismatch_names_both_ranks_and_calls, .timeout = 60) {
  static fake_result result;
  for (int kind = 0; kind < 6; kind++) { /* crossed sends are found by the deadline */
    load();
    run_limited(2, 30, 8, comm_suite_mismatch, &kind, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "%s", report);
    cr_expect_lt(result.seconds, 6.0, "kind %d took %g s", kind, result.seconds);
  }
}
Test(nccl, absent_rank_is_named_within_the_timeout, .timeout = 30) {
  static fake_result result;
  load();
  run_limited(3, 2, 20, comm_suite_absent, NULL, &result);
  const char *report = fake_job_report(&result, 3);
  cr_expect_eq(report[0], 0, "%s", report);
  cr_expect(result.seconds > 1.9 && result.seconds < 8.0, "%g s", result.seconds);
}
Test(nccl, late_is_not_absent, .timeout = 30) {
  static fake_result result;
  for (int k = 0; k < 2; k++) {
    load();
    run_limited(2, k ? 0 : 3, 20, comm_suite_late, NULL, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "%s", report);
  }
}
Test(nccl, time_in_which_a_rank_was_suspended_is_nobodys_absence, .timeout = 30) {
  static fake_result result;
  load();
  run_limited(2, 2, 20, comm_suite_suspended, NULL, &result);
  const char *report = fake_job_report(&result, 2);
  cr_expect_eq(report[0], 0, "%s", report);
  cr_expect_eq(result.late, 0);
}
Test(nccl, killed_peer_ends_waits_quickly, .timeout = 30) {
  static fake_result result;
  load();
  run_limited(3, 60, 10, comm_suite_killed, NULL, &result);
  cr_expect_eq(result.late, 0, "%d ranks hung", result.late);
  cr_expect(result.report[0][0] == 0 && result.report[2][0] == 0, "%s %s", result.report[0], result.report[2]);
  cr_expect_lt(result.seconds, 8.0);
}
Test(nccl, ranks_as_threads, .timeout = 240) {
  static fake_result result;
  load();
  fake_setup s = {.n = 3, .threads = 1, .timeout_s = 60, .share_bytes = (int64_t)64 << 20};
  cr_assert(fake_job_run(&s, comm_suite_as_threads, &result));
  const char *report = fake_job_report(&result, 3);
  cr_assert_eq(report[0], 0, "%s", report);
  nothing_left();
  const cuda_double_stats left = cuda_double_read();
  cr_expect(
      left.device_blocks == 0 && left.pinned_blocks == 0 && left.events == 0 && left.streams == 0 && left.overruns == 0,
      "%lld blocks, %lld pinned, %lld events, %lld streams", (long long)left.device_blocks,
      (long long)left.pinned_blocks, (long long)left.events, (long long)left.streams);
}

/* ---- grouping ---- */

static void grouped(fake_rank *rank) {
  rig g;
  if (!comm_suite_rig_open(&g, rank, 1 << 20)) return;
  phx_comm *c = g.comm;
  float *x = (float *)(void *)g.arena;
  FAKE_CHECK(rank, c->all_to_all(c->ctx, x, x + 4096, 100, PHX_F32, NULL, &g.err) == PHX_OK, "%s", g.err.message);
  FAKE_CHECK(rank, c->all_reduce(c->ctx, x, x, 1000, PHX_F32, PHX_SUM, NULL, &g.err) == PHX_OK, "%s", g.err.message);
  FAKE_CHECK(rank, c->all_reduce(c->ctx, x, x, 1000, PHX_I32, PHX_SUM, NULL, &g.err) == PHX_OK, "%s", g.err.message);
  FAKE_CHECK(rank, c->barrier(c->ctx, NULL, &g.err) == PHX_OK, "%s", g.err.message);
  comm_suite_rig_close(&g);
}
Test(nccl, an_exchange_is_one_group, .timeout = 20) {
  run(3, 10, grouped);
  cr_expect_eq(control->groups, 3 * 3, "%d groups",
               control->groups); /* all_to_all 1, canonical all_reduce 2, each rank */
  cr_expect_eq(control->operations, 3 * 5, "%d operations", control->operations);
  deterministic = 0;
  run(3, 10, grouped);
  cr_expect_eq(control->groups, 3, "%d groups", control->groups);
  cr_expect_eq(control->operations, 3 * 4, "%d operations", control->operations);
}

/* ---- the time of calls, where the device is timed ---- */
static void timed(fake_rank *rank) {
  phx_comm *c = NULL, *half = NULL;
  phx_error err = {.struct_size = sizeof err};
  double value = 1;
  const int is_timed = rank->arg != NULL;
  enter(rank);
  phx_device device = *rank->device;
  if (is_timed) device.caps |= PHX_DEVICE_TIMED;
  const phx_device *plain = rank->device;
  rank->device = &device;
  said_keep(&rank->host);
  FAKE_CHECK(rank, table->create(&rank->host, &cfg, 1 << 20, &c, &err) == PHX_OK, "%s", err.message);
  float *x = table->arena(c);
  FAKE_CHECK(rank, c->split(c->ctx, 0, rank->job.rank, &half, &err) == PHX_OK, "%s", err.message);
  for (int i = 0; i < 5; i++) { /* of both communicators, on the device and on the host */
    FAKE_CHECK(rank, c->all_reduce(c->ctx, x, x, 1000, PHX_F32, PHX_SUM, NULL, &err) == PHX_OK, "%s", err.message);
    FAKE_CHECK(rank, half->all_reduce(half->ctx, &value, &value, 1, PHX_F64, PHX_SUM, NULL, &err) == PHX_OK, "%s",
               err.message);
  }
  FAKE_CHECK(rank, c->broadcast(c->ctx, x, 1000, PHX_F32, 0, NULL, &err) == PHX_OK, "%s", err.message);
  table->destroy(c);
  rank->device = plain;
  leave(rank);
  static const struct { const char *kind; int calls; } kinds[] = {
      {"comm_all_reduce", 10}, {"comm_broadcast", 1}, {"comm_split", 1}, {"comm_barrier", 0}};
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    long long calls;
    const double ms = said_ms(kinds[i].kind, &calls);
    FAKE_CHECK(rank, calls == (is_timed ? kinds[i].calls : 0), "%s: %lld calls\n%s", kinds[i].kind, calls, said());
    FAKE_CHECK(rank, calls == 0 || ms > 0, "%s: %g ms", kinds[i].kind, ms);
  }
}
Test(nccl, calls_are_timed_where_the_device_is, .timeout = 20) {
  static fake_result result;
  for (int is_timed = 0; is_timed < 2; is_timed++) {
    load();
    run_limited(2, 10, 10, timed, is_timed ? &result : NULL, &result);
    cr_assert_eq(fake_job_report(&result, 2)[0], 0, "%s", fake_job_report(&result, 2));
    nothing_left();
  }
}

/* ---- joining ---- */

typedef struct refusal { int fault, rank; const char *cuda; int nth; const char *text; } refusal;

static void refused(fake_rank *rank) {
  const refusal *r = rank->arg;
  phx_comm *c = NULL;
  phx_error err = {.struct_size = sizeof err};
  enter(rank);
  if (r->cuda && rank->job.rank == r->rank) cuda_double_fail(r->cuda, r->nth, cudaErrorMemoryAllocation, 0);
  const phx_status status = table->create(&rank->host, &cfg, 1 << 20, &c, &err);
  if (status != PHX_OK && rank->job.rank == r->rank) /* as a rank ends */
    rank->job.fail(rank->job.ctx, err.message);
  if (status == PHX_OK && rank->job.rank != r->rank) { /* a failure of one rank's own, after NCCL had joined them */
    for (int k = 0; k < 3000 && !*(volatile const uint32_t *)rank->job.failed; k++) usleep(1000);
    FAKE_CHECK(rank, c->health(c->ctx, &err) == PHX_COMM, "healthy");
    table->destroy(c);
    c = NULL;
  } else {
    FAKE_CHECK(rank, status != PHX_OK, "create succeeded");
  }
  FAKE_CHECK(rank, rank->job.rank != r->rank || strstr(err.message, r->text), "%s", err.message);
  FAKE_CHECK(rank, c == NULL, "an output was written");
  leave(rank);
  const cuda_double_stats left = cuda_double_read();
  FAKE_CHECK(rank, left.device_blocks == 0 && left.pinned_blocks == 0 && left.events == 0 && left.streams == 0,
             "%lld blocks, %lld pinned, %lld events", (long long)left.device_blocks, (long long)left.pinned_blocks,
             (long long)left.events);
}
Test(nccl, a_world_that_cannot_be_is_refused_and_leaves_nothing, .timeout = 60) {
  static const refusal all[] = {{DOUBLE_INIT_HANGS, 1, NULL, 0, "did not get ready within 2 s"},
                                {DOUBLE_INIT_FAILS, 1, NULL, 0, "unhandled system error (the double said so)"},
                                {DOUBLE_MEMORY_FAILS, 0, NULL, 0, "ncclMemAlloc of the arena"},
                                {DOUBLE_ID_FAILS, 0, NULL, 0, "rank 0: NCCL does not start"},
                                {DOUBLE_REGISTER_FAILS, 1, NULL, 0, "registered = no"},
                                {DOUBLE_OTHER_VERSION, 1, NULL, 0, "rank 0 has NCCL 2.28.9, rank 1 has 2.29.9"},
                                {0, 1, "cudaMalloc", 1, "ncclMemAlloc of the arena"},
                                {0, 1, "cudaMalloc", 2, "out of memory"},
                                {0, 1, "cudaHostAlloc", 1, "out of memory"},
                                {0, 1, "cudaEventCreateWithFlags", 9, "out of memory"}};
  static fake_result result;
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    load();
    control->fault = all[i].fault;
    control->rank = all[i].rank;
    refusal r = all[i];
    run_limited(2, 2, 16, refused, &r, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "case %zu: %s", i, report);
    nothing_left();
  }
}

static void one_gpu(fake_rank *rank) {
  phx_comm *c = NULL;
  phx_error err = {.struct_size = sizeof err};
  const char *text = rank->arg;
  enter(rank);
  const phx_status status = table->create(&rank->host, &cfg, 4096, &c, &err);
  if (!text) {
    FAKE_CHECK(rank, status == PHX_OK, "%s", err.message);
    FAKE_CHECK(rank, c->barrier(c->ctx, NULL, &err) == PHX_OK, "%s", err.message);
    table->destroy(c);
  } else {
    FAKE_CHECK(rank, status == PHX_UNSUPPORTED && strstr(err.message, text), "%d %s", status, err.message);
    FAKE_CHECK(rank, strstr(err.message, "NCCL_MULTI_RANK_GPU_ENABLE") && strstr(err.message, "shm"), "%s",
               err.message);
  }
  leave(rank);
}
Test(nccl, a_gpu_in_common_is_refused_but_where_nccl_takes_it, .timeout = 60) {
  static const struct { int version; const char *set, *text;
  } all[] = {{22809, NULL, "ranks 0 and 1 are both on GPU 0000:01:00.0: NCCL 2.28.9"},
             {22809, "1", "NCCL 2.28.9"},
             {23002, "1", "NCCL 2.30.2"},
             {23003, NULL, "NCCL 2.30.3"},
             {23003, "0", "NCCL 2.30.3"},
             {23003, "1", NULL},
             {23104, "1", NULL}};
  static fake_result result;
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    load();
    control->one_gpu = 1;
    control->version = all[i].version;
    unsetenv("NCCL_MULTI_RANK_GPU_ENABLE");
    if (all[i].set) setenv("NCCL_MULTI_RANK_GPU_ENABLE", all[i].set, 1);
    run_limited(2, 10, 8, one_gpu, (void *)(uintptr_t)all[i].text, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "case %zu: %s", i, report);
  }
  unsetenv("NCCL_MULTI_RANK_GPU_ENABLE");
}

/* ---- what goes wrong on the way ---- */

/* Three calls on a stream, which nobody waits for but the watchdog; the second goes wrong on rank 1. */
static void on_the_way(fake_rank *rank) {
  rig g;
  phx_stream *s;
  const char *text = rank->arg;
  if (!comm_suite_rig_open(&g, rank, 1 << 20)) return;
  phx_comm *c = g.comm;
  const phx_device *d = rank->device;
  int32_t *x = (int32_t *)(void *)g.arena;
  FAKE_CHECK(rank, d->stream_create(d->ctx, "comm", &s, &g.err) == PHX_OK, "a stream");
  (void)c->barrier(c->ctx, NULL, &g.err); /* the other rank may have failed before this one is back */
  for (int k = 0; k < 3; k++) (void)c->all_reduce(c->ctx, x, x, 1000, PHX_I32, PHX_SUM, s, &g.err);
  d->stream_synchronize(d->ctx, s, &g.err); /* comes back when NCCL was aborted */
  for (int k = 0; k < 2000 && c->health(c->ctx, &g.err) == PHX_OK; k++) nanosleep(&(struct timespec){0, 1000000}, NULL);
  FAKE_CHECK(rank, c->health(c->ctx, &g.err) == PHX_COMM, "healthy");
  FAKE_CHECK(rank, strstr(g.err.message, text), "%s", g.err.message);
  FAKE_CHECK(rank, c->all_reduce(c->ctx, x, x, 1, PHX_I32, PHX_SUM, s, &g.err) == PHX_COMM, "a call after the failure");
  FAKE_CHECK(rank, *rank->job.failed, "the job goes on");
  d->stream_destroy(d->ctx, s);
  comm_suite_rig_close(&g);
  const cuda_double_stats left = cuda_double_read();
  FAKE_CHECK(rank, left.device_blocks == 0 && left.pinned_blocks == 0 && left.events == 0, "something is left");
}
Test(nccl, hangs_and_asynchronous_errors_end_the_job_by_name, .timeout = 60) {
  static const struct { int fault; const char *text; } all[] = {
      {DOUBLE_OP_HANGS, "all_reduce(1000 i32, sum), call 3 of communicator 1"},
      {DOUBLE_ASYNC_ERROR, "NCCL reports: remote process exited"},
      {DOUBLE_CALL_FAILS, "NCCL reports: unhandled cuda error"}};
  static fake_result result;
  for (size_t i = 0; i < 3; i++) {
    load();
    control->fault = all[i].fault;
    control->rank = 1;
    control->at = 3;
    run_limited(2, 2, 20, on_the_way, (void *)(uintptr_t)all[i].text, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "case %zu: %s", i, report);
    cr_expect_lt(result.seconds, 10.0, "case %zu took %g s", i, result.seconds);
    cr_expect_eq(control->aborts, 2, "%d aborts", control->aborts);
    nothing_left();
  }
}

/* Nothing is pending, so that the plugin's own watchdog sleeps: health asks NCCL itself. */
static void unwell(fake_rank *rank) {
  rig g;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  FAKE_CHECK(rank, c->health(c->ctx, &g.err) == PHX_OK, "%s", g.err.message);
  __atomic_store_n(&control->sick, 1, __ATOMIC_RELEASE);
  FAKE_CHECK(rank, c->health(c->ctx, &g.err) == PHX_COMM, "healthy");
  FAKE_CHECK(rank, g.err.cause == 6 /* ncclRemoteError */, "cause %d", g.err.cause);
  FAKE_CHECK(rank, strstr(g.err.message, "NCCL reports: remote process exited"), "%s", g.err.message);
  FAKE_CHECK(rank, !*rank->job.failed, "asking has ended the job");
  __atomic_store_n(&control->sick, 0, __ATOMIC_RELEASE);
  comm_suite_rig_close(&g);
}
Test(nccl, health_asks_nccl, .timeout = 30) {
  static fake_result result;
  load();
  run_limited(1, 5, 10, unwell, NULL, &result);
  const char *report = fake_job_report(&result, 1);
  cr_expect_eq(report[0], 0, "%s", report);
  nothing_left();
}

typedef struct seen { /* when the job failed */
  const uint32_t *failed;
  int64_t ns;
} seen;
static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}
static void *look_for_failure(void *arg) {
  seen *s = arg;
  for (int k = 0; k < 10000 && !__atomic_load_n(s->failed, __ATOMIC_ACQUIRE); k++)
    nanosleep(&(struct timespec){0, 1000000}, NULL);
  s->ns = now_ns();
  return NULL;
}
/* [main] of all ranks is in a call of NCCL that does not return for 8 s, as behind a full queue; the timeout is 1 s. */
static void blocks(fake_rank *rank) {
  rig g;
  pthread_t thread;
  seen s = {rank->job.failed, 0};
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  FAKE_CHECK(rank, c->barrier(c->ctx, NULL, &g.err) == PHX_OK, "%s", g.err.message);
  const int64_t begin = now_ns();
  pthread_create(&thread, NULL, look_for_failure, &s);
  const phx_status status = c->all_reduce(c->ctx, g.arena, g.arena, 8, PHX_I32, PHX_SUM, NULL, &g.err);
  pthread_join(thread, NULL);
  FAKE_CHECK(rank, status == PHX_COMM, "%d", status);
  FAKE_CHECK(rank, s.ns - begin < INT64_C(3500000000), "found after %.1f s", (double)(s.ns - begin) * 1e-9);
  FAKE_CHECK(rank, fake_said(rank, "cannot abort NCCL: [main] is in a call"), "its last words are others");
  comm_suite_rig_close(&g);
}
Test(nccl, a_call_that_blocks_does_not_stop_the_watchdog, .timeout = 60) {
  static fake_result result;
  load();
  control->fault = DOUBLE_CALL_BLOCKS;
  control->rank = DOUBLE_RANKS;
  control->at = 2;
  control->seconds = 8; /* longer than the watchdog tries to abort */
  run_limited(2, 1, 30, blocks, NULL, &result);
  const char *report = fake_job_report(&result, 2);
  cr_expect_eq(result.late, 0);
  cr_expect_eq(report[0], 0, "%s", report);
}

static void split_fails(fake_rank *rank) {
  rig g;
  phx_comm *half = NULL;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  FAKE_CHECK(rank, c->split(c->ctx, 0, 0, &half, &g.err) == PHX_COMM && !half, "%s", g.err.message);
  FAKE_CHECK(rank, strstr(g.err.message, "unhandled system error"), "%s", g.err.message);
  comm_suite_rig_close(&g);
}
Test(nccl, a_split_that_fails_ends_the_job, .timeout = 30) {
  static fake_result result;
  load();
  control->fault = DOUBLE_SPLIT_FAILS;
  control->rank = 1;
  run_limited(2, 5, 10, split_fails, NULL, &result);
  const char *report = fake_job_report(&result, 2);
  cr_expect_eq(report[0], 0, "%s", report);
  nothing_left();
}

static void *abort_soon(void *arg) {
  phx_comm *c = arg;
  nanosleep(&(struct timespec){0, 200000000}, NULL);
  c->abort(c->ctx);
  return NULL;
}
/* Rank 0 waits for a rank that does not come, with memory of the host and with a stream; another thread aborts. */
static void aborted(fake_rank *rank) {
  rig g;
  float x = 1;
  pthread_t thread;
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  if (rank->job.rank == 0) {
    const int on_stream = *(const int *)rank->arg;
    pthread_create(&thread, NULL, abort_soon, c);
    const phx_status status = on_stream ? c->all_reduce(c->ctx, g.arena, g.arena, 8, PHX_I32, PHX_SUM, NULL, &g.err)
                                        : c->all_reduce(c->ctx, &x, &x, 1, PHX_F32, PHX_SUM, NULL, &g.err);
    FAKE_CHECK(rank, status == (on_stream ? PHX_OK : PHX_COMM), "%d %s", status, g.err.message);
    if (on_stream) rank->device->stream_synchronize(rank->device->ctx, NULL, &g.err);
    FAKE_CHECK(rank, c->health(c->ctx, &g.err) == PHX_COMM && strstr(g.err.message, "aborted"), "%s", g.err.message);
    pthread_join(thread, NULL);
  }
  comm_suite_rig_close(&g);
}
Test(nccl, abort_wakes_who_waits, .timeout = 30) {
  static fake_result result;
  for (int on_stream = 0; on_stream < 2; on_stream++) {
    load();
    run_limited(2, 5, 10, aborted, &on_stream, &result);
    const char *report = fake_job_report(&result, 2);
    cr_expect_eq(report[0], 0, "%s", report);
    nothing_left();
  }
}

static void kinds_of_memory(fake_rank *rank) {
  rig g;
  float x[8] = {0};
  if (!comm_suite_rig_open(&g, rank, 4096)) return;
  phx_comm *c = g.comm;
  float *p = rank->job.rank == 0 ? x : (float *)(void *)g.arena;
  phx_status status = c->all_reduce(c->ctx, p, p, 8, PHX_F32, PHX_SUM, NULL, &g.err);
  for (int k = 0; k < 2000 && status == PHX_OK; k++) { /* on the device's side it may be launched first */
    nanosleep(&(struct timespec){0, 1000000}, NULL);
    status = c->health(c->ctx, &g.err);
  }
  FAKE_CHECK(rank, status == PHX_COMM && strstr(g.err.message, "in memory of the host") &&
                       strstr(g.err.message, "in memory of the device"), "%s", g.err.message);
  comm_suite_rig_close(&g);
}
Test(nccl, ranks_must_bring_the_same_kind_of_memory, .timeout = 30) {
  static fake_result result;
  load();
  run_limited(2, 5, 10, kinds_of_memory, NULL, &result);
  const char *report = fake_job_report(&result, 2);
  cr_expect_eq(report[0], 0, "%s", report);
}

/* ---- pure functions ---- */

Test(nccl, payload_adds_up) {
  load();
  for (int32_t n = 1; n <= 64; n++) {
    for (int64_t numel = 0; numel < 200000; numel = numel * 3 + 1031) {
      int64_t sum = 0, down = 0, bytes = numel * 4;
      for (int32_t r = 0; r < n; r++) sum += table->payload(NULL, PHX_OP_ALL_REDUCE, numel, PHX_F32, r, n, 0);
      cr_assert_eq(sum, 2 * (n - 1) * bytes, "%d ranks, %lld", n, (long long)numel);
      for (int32_t r = 0; r < n; r++) down += table->payload(NULL, PHX_OP_BROADCAST, numel, PHX_F32, r, n, n / 2);
      cr_assert_eq(down, (n - 1) * bytes);
    }
  }
  config small = cfg;
  small.communicators = 4;
  cr_assert_eq(table->buffer_bytes(&cfg, 4), 2 * table->buffer_bytes(&small, 64));
  cr_assert_eq(table->buffer_bytes(&cfg, 4), 2 * 8 * cfg.staging);
}
Test(nccl, no_gpu_is_said) {
  load();
  cuda_double_config none = cuda_double_defaults();
  phx_error err = {.struct_size = sizeof err};
  cr_assert_eq(table->probe(&err), PHX_OK);
  none.devices = 0;
  cuda_double_configure(&none);
  cr_assert_eq(table->probe(&err), PHX_UNSUPPORTED);
  cr_assert(strstr(err.message, "this machine offers none"), "%s", err.message);
  cr_assert_eq(table->probe(NULL), PHX_UNSUPPORTED);
}
