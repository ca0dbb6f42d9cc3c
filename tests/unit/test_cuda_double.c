/* The double of the CUDA runtime and the emulation of kernels: what the tests of CUDA plugins rest on. */
#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "cuda_double.h"
#include "selftest.h"

static void use(int threads, int guard) {
  cuda_double_config config = cuda_double_defaults();
  config.threads = threads;
  config.guard = guard;
  config.devices = 2;
  cuda_double_configure(&config);
}

static void expect_nothing_left(void) {
  const cuda_double_stats stats = cuda_double_read();
  cr_expect_eq(stats.device_blocks, 0);
  cr_expect_eq(stats.device_bytes, 0);
  cr_expect_eq(stats.pinned_blocks, 0);
  cr_expect_eq(stats.streams, 0);
  cr_expect_eq(stats.events, 0);
  cr_expect_eq(stats.overruns, 0);
}

static void sums(int threads) {
  enum { N = 1000 };
  float *host, *device, *out, total = 0;
  cudaStream_t s;
  use(threads, 1);
  cr_assert_eq(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaSuccess);
  cr_assert_eq(cudaHostAlloc((void **)&host, N * sizeof *host, 0), cudaSuccess);
  cr_assert_eq(cudaMalloc((void **)&device, N * sizeof *device), cudaSuccess);
  cr_assert_eq(cudaMalloc((void **)&out, 3 * sizeof *out), cudaSuccess);
  for (int i = 0; i < N; i++) host[i] = (float)(i % 17);
  for (int i = 0; i < N; i++) total += host[i];
  cr_assert_eq(cudaMemcpyAsync(device, host, N * sizeof *host, cudaMemcpyHostToDevice, s), cudaSuccess);
  cr_assert_eq(selftest_sum(out, device, N, s), cudaSuccess);
  cr_assert_eq(cudaMemcpyAsync(host, out, 3 * sizeof *host, cudaMemcpyDefault, s), cudaSuccess);
  cr_assert_eq(cudaStreamSynchronize(s), cudaSuccess);
  cr_expect_eq(host[0] + host[1] + host[2], total);
  const cuda_double_stats stats = cuda_double_read();
  cr_expect_eq(stats.launches, 1);
  cr_expect_eq(stats.device_bytes, (N + 3) * 4);
  cudaFree(device);
  cudaFree(out);
  cudaFreeHost(host);
  cudaStreamDestroy(s);
  expect_nothing_left();
}

Test(cuda_double, kernels_run_inline, .timeout = 60) { sums(0); }
Test(cuda_double, kernels_run_on_stream_threads, .timeout = 60) { sums(1); }

Test(cuda_double, barriers_votes_and_dynamic_shared_memory, .timeout = 60) {
  enum { THREADS = 96 };
  int host[2 * THREADS], counts[2], *x, *even;
  for (int down = 0; down < 2; down++) {
    setenv("PHX_CUDA_DOUBLE_ORDER", down ? "down" : "up", 1);
    use(0, 1);
    cudaMalloc((void **)&x, sizeof host);
    cudaMalloc((void **)&even, sizeof counts);
    for (int i = 0; i < 2 * THREADS; i++) host[i] = 3 * i;
    cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice);
    cr_assert_eq(selftest_reverse(x, even, THREADS, NULL), cudaSuccess);
    cudaMemcpy(host, x, sizeof host, cudaMemcpyDeviceToHost);
    cudaMemcpy(counts, even, sizeof counts, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 2 * THREADS; i++) cr_assert_eq(host[i], 3 * (2 * THREADS - 1 - i));
    cr_expect_eq(counts[0], THREADS / 2);
    cr_expect_eq((unsigned)counts[1], 0xaaaaaaaau);
    cudaFree(x);
    cudaFree(even);
    expect_nothing_left();
  }
}

Test(cuda_double, too_large_a_block_is_refused, .timeout = 60) {
  use(0, 1);
  cr_expect_eq(selftest_reverse(NULL, NULL, 1025, NULL), cudaErrorInvalidConfiguration);
  cr_expect_eq(cudaGetLastError(), cudaErrorInvalidConfiguration);
  cr_expect_eq(cudaGetLastError(), cudaSuccess);
}

Test(cuda_double, more_than_48_kib_of_shared_memory_is_asked_for, .timeout = 60) {
  void *p = NULL;
  use(0, 1);
  cr_assert_eq(cudaMalloc(&p, 100), cudaSuccess);
  cr_expect_eq(selftest_shared(p, 48 << 10), cudaSuccess);
  cr_expect_eq(selftest_shared(p, (48 << 10) + 1), cudaErrorInvalidValue);
  cr_expect_eq(selftest_ask(100 << 10), cudaSuccess);
  cr_expect_eq(selftest_shared(p, 100 << 10), cudaSuccess);
  cr_expect_eq(selftest_shared(p, 101 << 10), cudaErrorInvalidValue);
  cr_expect_eq(selftest_ask(228 << 10), cudaErrorInvalidValue, "more than a multiprocessor has");
  cr_expect_eq(cudaFree(p), cudaSuccess);
}

/* The signal that ends a child which calls touch(p), or 0. */
static int fatal_signal(void (*touch)(int *p)) {
  int *p, status = 0;
  use(0, 1);
  cudaMalloc((void **)&p, 64);
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGSEGV, SIG_DFL);
    signal(SIGABRT, SIG_DFL);
    close(STDERR_FILENO);
    touch(p);
    _exit(1);
  }
  cr_assert_eq(waitpid(child, &status, 0), child);
  cudaFree(p);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void read_it(int *p) { _exit(*(volatile int *)p == 0 ? 2 : 3); }
static void get_stuck(int *p) { (void)selftest_stuck(p); }

Test(cuda_double, divergent_exchange_ends_the_program, .timeout = 60) {
  cr_expect_eq(fatal_signal(get_stuck), SIGABRT);
}
Test(cuda_double, the_host_cannot_read_device_memory, .timeout = 60) { cr_expect_eq(fatal_signal(read_it), SIGSEGV); }

Test(cuda_double, writes_behind_an_allocation_are_counted, .timeout = 60) {
  char *p;
  use(0, 1);
  cudaMalloc((void **)&p, 100);
  cr_assert_eq(selftest_overrun(p, 99), cudaSuccess);
  cr_expect_eq(cuda_double_read().overruns, 0);
  cr_assert_eq(selftest_overrun(p, 100), cudaSuccess);
  cudaFree(p);
  cr_expect_eq(cuda_double_read().overruns, 1);
}

Test(cuda_double, copies_are_checked, .timeout = 60) {
  char host[64], *p;
  use(0, 1);
  cudaMalloc((void **)&p, 64);
  cr_expect_eq(cudaMemcpy(p, host, 65, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  cr_expect_eq(cudaMemcpy(p, host, 64, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  cr_expect_eq(cudaFree(p + 1), cudaErrorInvalidValue);
  cr_expect_eq(cudaFree(p), cudaSuccess);
  cr_expect_eq(cudaFree(p), cudaErrorInvalidValue);
}

Test(cuda_double, failures_are_injected_by_name_and_number, .timeout = 60) {
  void *p = NULL, *q = NULL;
  use(0, 1);
  cuda_double_fail("cudaMalloc", 2, cudaErrorMemoryAllocation, 0);
  cr_expect_eq(cudaMalloc(&p, 8), cudaSuccess);
  cr_expect_eq(cudaMalloc(&q, 8), cudaErrorMemoryAllocation);
  cr_expect_null(q);
  cr_expect_eq(cudaMalloc(&q, 8), cudaSuccess);
  cuda_double_fail("cudaStreamSynchronize", 1, cudaErrorLaunchFailure, 1);
  cr_expect_eq(cudaStreamSynchronize(NULL), cudaErrorLaunchFailure);
  cr_expect_eq(cudaDeviceSynchronize(), cudaErrorLaunchFailure, "sticky");
}

Test(cuda_double, devices_follow_the_environment, .timeout = 60) {
  int count = -1;
  use(0, 1);
  cr_expect_eq(cudaGetDeviceCount(&count), cudaSuccess);
  cr_expect_eq(count, 2);
  setenv("CUDA_VISIBLE_DEVICES", "1", 1);
  cr_expect_eq(cudaGetDeviceCount(&count), cudaSuccess);
  cr_expect_eq(count, 1);
  cr_expect_eq(cudaSetDevice(1), cudaErrorInvalidDevice);
  setenv("CUDA_VISIBLE_DEVICES", "", 1);
  cr_expect_eq(cudaGetDeviceCount(&count), cudaErrorNoDevice);
}

static void set_flag(void *arg) { *(int *)arg += 1; }

Test(cuda_double, streams_wait_for_events, .timeout = 60) {
  cudaStream_t a, b;
  cudaEvent_t e;
  int flag = 0, *d, *pinned;
  use(1, 0);
  cudaStreamCreate(&a);
  cudaStreamCreate(&b);
  cudaEventCreateWithFlags(&e, cudaEventDisableTiming);
  cudaMalloc((void **)&d, 4);
  cudaHostAlloc((void **)&pinned, 4, 0);
  *pinned = 5;
  for (int i = 0; i < 10; i++) {
    cr_assert_eq(cudaMemcpyAsync(d, pinned, 4, cudaMemcpyDefault, a), cudaSuccess);
    cr_assert_eq(cudaLaunchHostFunc(a, set_flag, &flag), cudaSuccess);
    cr_assert_eq(cudaEventRecord(e, a), cudaSuccess);
    cr_assert_eq(cudaStreamWaitEvent(b, e, 0), cudaSuccess);
    cr_assert_eq(cudaMemcpyAsync(pinned, d, 4, cudaMemcpyDefault, b), cudaSuccess);
    cr_assert_eq(cudaEventRecord(e, b), cudaSuccess);
    cr_assert_eq(cudaEventSynchronize(e), cudaSuccess);
    cr_expect_eq(cudaEventQuery(e), cudaSuccess);
    cr_expect_eq(flag, i + 1);
    cr_expect_eq(*pinned, 5);
  }
  cudaFree(d);
  cudaFreeHost(pinned);
  cudaEventDestroy(e);
  cudaStreamDestroy(a);
  cudaStreamDestroy(b);
  expect_nothing_left();
}

Test(cuda_double, rounding_is_to_nearest_even, .timeout = 60) {
  cr_expect_eq(selftest_bf16(1.0f), 0x3f80);
  cr_expect_eq(selftest_bf16(1.00390625f), 0x3f80, "half way: to even");
  cr_expect_eq(selftest_bf16(1.01171875f), 0x3f82, "half way: to even");
  cr_expect_eq(selftest_bf16(-INFINITY), 0xff80);
  cr_expect_eq(selftest_bf16(NAN), 0x7fff);
  cr_expect_eq(selftest_fp16(1.0f), 0x3c00);
  cr_expect_eq(selftest_fp16(65519.0f), 0x7bff);
  cr_expect_eq(selftest_fp16(65520.0f), 0x7c00);
  cr_expect_eq(selftest_fp16(2.98023224e-8f), 0, "half of the smallest");
  cr_expect_eq(selftest_fp16(5.96046448e-8f), 1);
  for (unsigned i = 0; i < 0x7c00; i++) cr_assert_eq(selftest_fp16(selftest_from_fp16((unsigned short)i)), i);
}
