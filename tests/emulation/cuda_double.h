/* tests/emulation/cuda_double.h - the other side of the CUDA runtime's double: what a test sets and reads.
 *
 * The double runs on the processor, one per process.  Device memory comes from one reserved range of addresses, holds
 * 0xFF (NaN) when it is handed out, and has 256 guarded bytes behind each allocation.  Two modes of streams:
 * - inline (default): every call does its work at once, and device memory cannot be read or written outside of device
 *   work: a plugin that touches it from the host gets SIGSEGV;
 * - threads: every stream is a thread that runs late, so that a missing wait shows (also to the thread sanitizer).
 * Without a call to cuda_double_configure the environment decides:
 * PHX_CUDA_DOUBLE=devices=2,threads=1,guard=0,memory=MIB,capability=90,driver=ERROR,fail=NAME:NTH:ERROR */
#ifndef PHX__CUDA_DOUBLE_H
#define PHX__CUDA_DOUBLE_H
#include <cuda_runtime_api.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct cuda_double_config {
  int devices;          /* 1 to 8, or 0 */
  int threads;          /* 1: streams are threads */
  int guard;            /* 1: device memory is out of the host's reach (inline mode only) */
  int capability;       /* 90: sm_90 */
  int64_t memory;       /* bytes per device, all devices together below 64 GiB */
  cudaError_t driver;   /* what every call returns where there is no driver, or cudaSuccess */
} cuda_double_config;

typedef struct cuda_double_stats {
  int64_t calls, launches;
  int64_t device_bytes, device_peak, device_blocks; /* of all devices */
  int64_t pinned_bytes, pinned_blocks, streams, events;
  int64_t overruns; /* allocations whose guarded bytes were written, so far */
} cuda_double_stats;

cuda_double_config cuda_double_defaults(void);
/* Between tests: nothing may be in use.  Clears injections, the sticky error and the statistics. */
void cuda_double_configure(const cuda_double_config *config);
cuda_double_stats cuda_double_read(void); /* checks the guarded bytes of everything that is allocated */

/* The nth (1: the next) call of `name` returns `error`; name "" counts every call, a part of a kernel's
 * name its launches.  At most 16 at a time.
 * sticky: every later call that can see it returns it too, as after a kernel's fault. */
void cuda_double_fail(const char *name, int64_t nth, cudaError_t error, int sticky);

/* ---- for doubles of libraries on top (cuBLASLt, NCCL) and for the launch of emulated kernels ---- */
/* Counts a call by name; what an injection or a missing driver wants returned. */
cudaError_t cuda_double_enter(const char *name);
cudaError_t cuda_double_enter_launch(const char *kernel); /* "cudaLaunchKernel" */
/* Keeps the error for cudaGetLastError and returns it. */
cudaError_t cuda_double_return(cudaError_t error);
/* run(arg) in stream order, then drop(arg) (may be NULL).  Takes arg over in any case.  Not counted as a call. */
cudaError_t cuda_double_submit(cudaStream_t stream, void (*run)(void *arg), void (*drop)(void *arg), void *arg);
/* Around work that reads or writes device memory outside of a submitted function. */
void cuda_double_reach(void);
void cuda_double_leave(void);
void cuda_double_count_launch(void);

#ifdef __cplusplus
}
#endif
#endif
