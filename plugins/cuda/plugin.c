/* plugins/cuda/plugin.c - the cuda device's descriptor: can it run here, which GPU a rank takes, errors.
 *
 * A rank takes the GPU of its local rank among those that CUDA_VISIBLE_DEVICES leaves visible, or, where a launcher
 * shows each rank its own, the one that it sees: ranks tell each other which they took.  Two on one are refused unless
 * [cuda] share says so.  Nothing is taken from the device's memory before the first alloc but what the driver's context
 * and the products' library hold.  [main] */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

/* WORKSPACE_CUDNN: what its backward needs for 32 sequences of 1024 tokens and 768 channels, on sm_80 192 MiB. */
enum { CAPABILITY_LEAST = 80, SCRATCH = 32 << 20, WORKSPACE = 32 << 20, WORKSPACE_CUDNN = 256 << 20 };

struct phx_device_self {
  phx__cuda cuda;
};

phx_status phx__cuda_fail(const phx__cuda *cuda, phx_error *err, phx_status code, const char *format, ...) {
  va_list args;
  const int32_t rank = cuda && cuda->host ? cuda->host->rank : -1;
  if (rank < 0) phx_fail(err, code, "cuda: ");
  else phx_fail(err, code, "cuda: rank %d: ", rank);
  va_start(args, format);
  phx_fail_more_args(err, code, format, args);
  va_end(args);
  return code;
}

phx_status phx__cuda_check(const phx__cuda *cuda, cudaError_t error, const char *what, phx_error *err) {
  if (error == cudaSuccess) return PHX_OK;
  const int fault = error == cudaErrorIllegalAddress || error == cudaErrorLaunchFailure;
  const phx_status code = error == cudaErrorMemoryAllocation ? PHX_NOMEM : PHX_DEVICE;
  phx__cuda_fail(cuda, err, code, "%s: %s (%s)%s", what, cudaGetErrorString(error), cudaGetErrorName(error),
                 fault ? "; the fault is in this operation or in one started before it" : "");
  if (err) err->cause = (int32_t)error;
  (void)cudaGetLastError(); /* reported: the next call starts clean, unless the fault stays */
  return code;
}

void phx__cuda_log(const phx__cuda *cuda, int32_t level, const char *message) {
  if (cuda->host && cuda->host->log) cuda->host->log(cuda->host->ctx, level, message);
}

/* ---- can it run here? ---- */
static phx_status count_devices(const phx__cuda *cuda, int *count, phx_error *err) {
  int driver = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  (void)cudaGetLastError();
  if (error == cudaSuccess && *count > 0) return PHX_OK;
  if (error == cudaErrorInsufficientDriver) {
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
      return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "no NVIDIA driver is installed (libcuda.so.1)");
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED,
                          "the NVIDIA driver supports CUDA %d.%d, this plugin is built for %d.%d: update the driver",
                          driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  }
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (error == cudaSuccess || error == cudaErrorNoDevice)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "no GPU to be seen%s%s%s",
                          visible ? " (CUDA_VISIBLE_DEVICES=" : "", visible ? visible : "", visible ? ")" : "");
  phx__cuda_check(cuda, error, "counting the GPUs", err);
  if (err) err->code = PHX_UNSUPPORTED;
  return PHX_UNSUPPORTED;
}

static phx_status check_capability(const phx__cuda *cuda, int device, phx_error *err) {
  int major = 0, minor = 0;
  phx_status status = phx__cuda_check(cuda, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                                      "asking for the compute capability", err);
  if (status == PHX_OK)
    status = phx__cuda_check(cuda, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                             "asking for the compute capability", err);
  if (status == PHX_OK && 10 * major + minor < CAPABILITY_LEAST)
    status = phx__cuda_fail(cuda, err, PHX_UNSUPPORTED, "GPU %d has compute capability %d.%d, 8.0 is the least", device,
                            major, minor);
  return status;
}

static phx_status device_probe(phx_error *err) {
  int count = 0;
  const phx_status status = count_devices(NULL, &count, err);
  return status == PHX_OK ? check_capability(NULL, 0, err) : status;
}

static int32_t device_count(void) {
  int count = 0;
  return count_devices(NULL, &count, NULL) == PHX_OK ? count : 0;
}

/* ---- create ---- */
typedef struct taken { /* what a rank tells of its GPU */
  char host[40], bus[24];
} taken;

/* The first other rank that took the GPU of this one, or -1.  Without a job (a sample, a test) nobody can be asked. */
static phx_status who_else(const phx__cuda *cuda, int32_t *out, phx_error *err) {
  const phx_host *host = cuda->host;
  const phx_job *job = host->extension ? host->extension(host->ctx, PHX_EXT_JOB) : NULL;
  taken mine = {.host = "", .bus = ""};
  *out = -1;
  if (!job || job->size < 2 || !PHX_HAS(job, phx_job, exchange) || !job->exchange) {
    int count = 0; /* as many as there are: local ranks follow one another */
    const phx_status status = count_devices(cuda, &count, err);
    if (status == PHX_OK && host->local_size > count) *out = host->local_rank % count;
    return status;
  }
  FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re"); /* one per running kernel: containers share GPUs, too */
  if (!f || !fgets(mine.host, sizeof mine.host, f)) mine.host[0] = 0;
  if (f) fclose(f);
  phx_status status = phx__cuda_check(cuda, cudaDeviceGetPCIBusId(mine.bus, (int)sizeof mine.bus, cuda->device_index),
                                      "cudaDeviceGetPCIBusId", err);
  taken *all = calloc((size_t)job->size, sizeof *all);
  if (status == PHX_OK && !all) status = phx__cuda_fail(cuda, err, PHX_NOMEM, "no memory for %d ranks", job->size);
  if (status == PHX_OK) status = job->exchange(job->ctx, "cuda", &mine, (int64_t)sizeof mine, all, err);
  for (int32_t r = 0; status == PHX_OK && r < job->size && *out < 0; r++)
    if (r != job->rank && memcmp(&all[r], &mine, sizeof mine) == 0) *out = r;
  free(all);
  return status;
}

static phx_status choose_device(phx__cuda *cuda, phx_error *err) {
  const phx_host *host = cuda->host;
  int count = 0;
  int32_t other = -1;
  PHX_TRY(count_devices(cuda, &count, err));
  cuda->device_index = host->local_rank % count;
  PHX_TRY(check_capability(cuda, cuda->device_index, err));
  PHX_TRY(who_else(cuda, &other, err));
  cuda->sharing = other >= 0;
  if (cuda->sharing && !cuda->config.share)
    return phx__cuda_fail(cuda, err, PHX_UNSUPPORTED,
                          "there are %d ranks on this machine and %d GPUs to be seen, and rank %d took the one of "
                          "local rank %d: start fewer ranks, let each see a GPU of its own, or set [cuda] share = yes",
                          host->local_size, count, other, host->local_rank);
  return phx__cuda_check(cuda, cudaSetDevice(cuda->device_index), "cudaSetDevice", err);
}

static phx_status describe(phx__cuda *cuda, phx_error *err) {
  struct cudaDeviceProp prop;
  int value = 0;
  PHX_TRY(phx__cuda_check(cuda, cudaGetDeviceProperties(&prop, cuda->device_index), "cudaGetDeviceProperties", err));
  cuda->multiprocessors = prop.multiProcessorCount;
  phx_status status =
      phx__cuda_check(cuda, cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda->device_index),
                      "cudaDeviceGetAttribute", err);
  cuda->shared_limit = value;
  const long long products = (long long)phx__cuda_products_version();
  snprintf(cuda->name, sizeof cuda->name, "cuda:%d (%.64s, sm_%d%d, CUDA %d.%d, cuBLASLt %lld.%lld)",
           cuda->device_index, prop.name, prop.major, prop.minor, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10,
           products / 10000, products / 100 % 100);
  return status;
}

static void announce(const phx__cuda *cuda) {
  if (cuda->config.tf32)
    phx__cuda_log(cuda, PHX_LOG_WARN, "fp32 products round their inputs to TF32 (10 bits): [cuda] tf32 = yes");
  if (cuda->sharing) phx__cuda_log(cuda, PHX_LOG_WARN, "several ranks share this GPU: [cuda] share = yes");
  if (cuda->host->deterministic)
    phx__cuda_log(cuda, PHX_LOG_INFO,
                  cuda->cudnn ? "[run] deterministic: products without an in-place split over k; attention's backward "
                                "in bf16 by our own kernel where cuDNN's would keep a matrix of tokens by tokens, "
                                "which is what it costs (tests/bench/gpu prints how much)"
                              : "[run] deterministic: products without an in-place split over k");
}

static void device_destroy(phx_device_self *self) {
  if (!self) return;
  phx__cuda_profile_end(&self->cuda);
  phx__cuda_streams_end(&self->cuda);
  phx__cuda_attention_end(&self->cuda);
  phx__cuda_products_end(&self->cuda);
  free(self);
}

static phx_status device_create(const phx_host *host, const void *config, int32_t threads, phx_device_self **out,
                                phx_error *err) {
  (void)threads; /* of the host: no operation uses them */
  phx_device_self *self = calloc(1, sizeof *self);
  if (!self) return phx__cuda_fail(NULL, err, PHX_NOMEM, "no memory for the device");
  phx__cuda *cuda = &self->cuda;
  cuda->host = host;
  memcpy(&cuda->config, config, sizeof cuda->config);
  cuda->scratch_bytes = SCRATCH;
  phx_status status = choose_device(cuda, err);
  if (status == PHX_OK) status = phx__cuda_products_begin(cuda, err);
  if (status == PHX_OK) status = describe(cuda, err);
  if (status == PHX_OK) status = phx__cuda_streams_begin(cuda, err);
  if (status == PHX_OK) status = phx__cuda_attention_begin(cuda, err);
  if (cuda->config.workspace < 0) cuda->config.workspace = cuda->cudnn ? WORKSPACE_CUDNN : WORKSPACE;
  if (status == PHX_OK) status = phx__cuda_bytes_in_use(cuda, &cuda->used_before, err);
  if (status != PHX_OK) {
    device_destroy(self);
    return status;
  }
  phx__cuda_device_init(cuda);
  phx__cuda_ops_init(cuda);
  status = phx__cuda_profile_begin(cuda, err);
  if (status != PHX_OK) {
    device_destroy(self);
    return status;
  }
  announce(cuda);
  *out = self;
  return PHX_OK;
}

static const phx_device *device_device(phx_device_self *self) { return &self->cuda.device; }
static const phx_ops *device_ops(phx_device_self *self) { return &self->cuda.ops; }

static phx_status device_alloc(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err) {
  const phx_status status = phx__cuda_take_scratch(&self->cuda, err);
  return status == PHX_OK ? phx__cuda_alloc(&self->cuda, space, bytes, out, err) : status;
}
static void device_free(phx_device_self *self, int32_t space, void *p, int64_t bytes) {
  phx__cuda_free(&self->cuda, space, p, bytes);
}
static int64_t device_driver_bytes(phx_device_self *self) { return phx__cuda_driver_bytes(&self->cuda); }

static int32_t device_shared(const void *config) { return ((const phx__cuda_config *)config)->share; }

static const phx_device_table table = {.struct_size = sizeof(phx_device_table),
                                       .probe = device_probe,
                                       .create = device_create,
                                       .destroy = device_destroy,
                                       .device = device_device,
                                       .ops = device_ops,
                                       .alloc = device_alloc,
                                       .free = device_free,
                                       .driver_bytes = device_driver_bytes,
                                       .count = device_count,
                                       .shared = device_shared};

#define MIB ((int64_t)1 << 20)
static const char *const attention_choices[] = {"auto", "cudnn", "own", NULL};
static const phx_option options[] = {
    PHX_BOOL(phx__cuda_config, share, "no", "More ranks than GPUs: ranks share them, local rank modulo their number."),
    PHX_BOOL(phx__cuda_config, tf32, "no", "Products in fp32 round their inputs to TF32, which is faster."),
    PHX_BOOL(phx__cuda_config, profile, "no",
             "Times each kind of work by events, nccl its own too, and says the milliseconds when the run ends."),
    PHX_ENUM(phx__cuda_config, attention, "auto", attention_choices,
             "Who computes attention in bf16: cuDNN where it is found and has a plan that fits, or own kernels."),
    PHX_BYTES(phx__cuda_config, workspace, "auto", 0, 8192 * MIB, PHX_OPTF_AUTO,
              "What a product or cuDNN's attention may use as scratch; auto: 32 MiB, with cuDNN 256 MiB."),
};

static const phx_plugin plugin = {
    .struct_size = sizeof(phx_plugin),
    .kind = PHX_KIND_DEVICE,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "cuda",
    .version = "0.1.0",
    .summary = "NVIDIA GPUs from compute capability 8.0: own kernels, products by cuBLASLt",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .provides = PHX_CAP_BF16,
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .option_stride = sizeof(phx_option),
    .config_size = sizeof(phx__cuda_config),
    .table = &table,
    .preference = 20};

const phx_plugin *phx_plugin_v1(void) { return &plugin; }
