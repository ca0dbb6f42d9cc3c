/* plugins/cuda/memory.c - device memory in stream order, pinned memory, the operations' scratch.
 *
 * Device memory comes from the device's pool, which keeps what is freed, so later allocations cost no synchronization
 * of the device; managed memory is never used.  Fresh memory is zero and complete when alloc returns: any stream may
 * use it.  Free waits for all streams.  [main] */
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

static phx_status alloc_device(phx__cuda *cuda, int64_t bytes, void **out, phx_error *err) {
  void *p = NULL;
  size_t free_bytes = 0, total = 0;
  const cudaError_t error = cudaMallocAsync(&p, (size_t)bytes, cuda->compute);
  if (error != cudaSuccess) {
    const phx_status status = phx__cuda_check(cuda, error, "cudaMallocAsync", err);
    if (status != PHX_NOMEM || cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) return status;
    phx__cuda_fail(cuda, err, PHX_NOMEM,
                   "no memory for %lld bytes on GPU %d (%zu of %zu MiB are free); make the model or the batch smaller",
                   (long long)bytes, cuda->device_index, free_bytes >> 20, total >> 20);
    if (err) err->cause = (int32_t)error;
    return status;
  }
  phx_status status =
      phx__cuda_check(cuda, cudaMemsetAsync(p, 0, (size_t)bytes, cuda->compute), "cudaMemsetAsync", err);
  if (status == PHX_OK)
    status = phx__cuda_check(cuda, cudaStreamSynchronize(cuda->compute), "clearing fresh memory", err);
  if (status == PHX_OK)
    *out = p;
  else
    (void)cudaFreeAsync(p, cuda->compute); /* the first failure is the one to report */
  return status;
}

static phx_status alloc_pinned(phx__cuda *cuda, int64_t bytes, void **out, phx_error *err) {
  void *p = NULL;
  PHX_TRY(phx__cuda_check(cuda, cudaHostAlloc(&p, (size_t)bytes, cudaHostAllocPortable), "cudaHostAlloc", err));
  memset(p, 0, (size_t)bytes);
  *out = p;
  return PHX_OK;
}

static phx_status alloc_host(phx__cuda *cuda, int64_t bytes, void **out, phx_error *err) {
  void *p = aligned_alloc(PHX_ALIGN, (size_t)phx_align_bytes(bytes));
  if (!p) return phx__cuda_fail(cuda, err, PHX_NOMEM, "no host memory for %lld bytes", (long long)bytes);
  memset(p, 0, (size_t)bytes);
  *out = p;
  return PHX_OK;
}

phx_status phx__cuda_alloc(phx__cuda *cuda, int32_t space, int64_t bytes, void **out, phx_error *err) {
  if (bytes <= 0 || bytes > INT64_MAX / 2)
    return phx__cuda_fail(cuda, err, bytes <= 0 ? PHX_INVALID : PHX_NOMEM, "alloc of %lld bytes", (long long)bytes);
  switch (space) {
    case PHX_SPACE_DEVICE: return alloc_device(cuda, bytes, out, err);
    case PHX_SPACE_PINNED: return alloc_pinned(cuda, bytes, out, err);
    case PHX_SPACE_HOST: return alloc_host(cuda, bytes, out, err);
    default: return phx__cuda_fail(cuda, err, PHX_INVALID, "alloc in space %d", space);
  }
}

void phx__cuda_free(phx__cuda *cuda, int32_t space, void *p, int64_t bytes) {
  (void)bytes;
  if (!p) return;
  cudaError_t error = cudaSuccess;
  if (space == PHX_SPACE_HOST) {
    free(p);
    return;
  }
  if (space == PHX_SPACE_PINNED) {
    error = cudaFreeHost(p);
  } else {
    error = cudaDeviceSynchronize();
    const cudaError_t freed = cudaFreeAsync(p, cuda->compute);
    if (error == cudaSuccess) error = freed;
  }
  if (error != cudaSuccess && !cuda->failed_call) {
    phx_error why = {.struct_size = sizeof why};
    cuda->failed_call = 1; /* after a fault every call fails: one line is enough */
    phx__cuda_check(cuda, error, "freeing memory", &why);
    phx__cuda_log(cuda, PHX_LOG_WARN, why.message);
  }
}

/* ---- what the communicator asks ---- */
int32_t phx__cuda_space(void *ctx, const void *p) {
  struct cudaPointerAttributes found;
  (void)ctx;
  if (cudaPointerGetAttributes(&found, p) != cudaSuccess) {
    (void)cudaGetLastError(); /* older runtimes say so of ordinary memory */
    return PHX_SPACE_HOST;
  }
  if (found.type == cudaMemoryTypeDevice) return PHX_SPACE_DEVICE;
  return found.type == cudaMemoryTypeHost ? PHX_SPACE_PINNED : PHX_SPACE_HOST;
}

phx_status phx__cuda_pin(void *ctx, void *p, int64_t bytes, phx_error *err) {
  return phx__cuda_check(ctx, cudaHostRegister(p, (size_t)bytes, cudaHostRegisterPortable), "cudaHostRegister", err);
}

void phx__cuda_unpin(void *ctx, void *p) {
  (void)ctx;
  (void)cudaHostUnregister(p); /* nothing is left to be done about it */
  (void)cudaGetLastError();
}

phx_status phx__cuda_take_scratch(phx__cuda *cuda, phx_error *err) {
  if (cuda->scratch) return PHX_OK;
  return alloc_device(cuda, cuda->scratch_bytes + cuda->config.workspace, &cuda->scratch, err);
}

phx_status phx__cuda_scratch(phx__cuda *cuda, cudaStream_t s, int64_t bytes, const char *what, void **out,
                             phx_error *err) {
  if (bytes > cuda->scratch_bytes)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "%s: needs %lld bytes of scratch, there are %lld", what,
                          (long long)bytes, (long long)cuda->scratch_bytes);
  phx_status status = phx__cuda_take_scratch(cuda, err);
  if (status == PHX_OK && s != cuda->scratch_stream) {
    status = phx__cuda_check(cuda, cudaEventRecord(cuda->scratch_event, cuda->scratch_stream), what, err);
    if (status == PHX_OK) status = phx__cuda_check(cuda, cudaStreamWaitEvent(s, cuda->scratch_event, 0), what, err);
    if (status == PHX_OK) cuda->scratch_stream = s;
  }
  if (status == PHX_OK) *out = cuda->scratch;
  return status;
}

phx_status phx__cuda_bytes_in_use(const phx__cuda *cuda, int64_t *out, phx_error *err) {
  size_t free_bytes = 0, total = 0;
  const phx_status status = phx__cuda_check(cuda, cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo", err);
  if (status == PHX_OK) *out = (int64_t)(total - free_bytes);
  return status;
}

/* The driver counts the whole device: what came since we did is taken as ours, unless others of the job are there. */
int64_t phx__cuda_driver_bytes(const phx__cuda *cuda) {
  int64_t now = 0;
  if (cuda->sharing || phx__cuda_bytes_in_use(cuda, &now, NULL) != PHX_OK) return -1;
  return now > cuda->used_before ? now - cuda->used_before : 0;
}
