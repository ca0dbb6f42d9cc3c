/* cuda_double.c - the double's settings, injected failures, and what the CUDA runtime says of devices and errors.
 *
 * Threads: any, like the runtime; one lock for counters and injections. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "double_inner.h"

enum { FAULTS = 16, DEVICES = 8 };
typedef struct fault {
  char name[64];
  int64_t left; /* calls until it strikes; 0: free */
  cudaError_t error;
  int sticky;
} fault;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static cuda_double_config config;
static fault faults[FAULTS];
static cudaError_t sticky_error;
cuda_double_stats double__stats;
static _Thread_local cudaError_t last_error;
static _Thread_local int current_device;

cuda_double_config cuda_double_defaults(void) {
  return (cuda_double_config){
      .devices = 1, .threads = 0, .guard = 1, .capability = 90, .memory = (int64_t)4 << 30, .driver = cudaSuccess};
}

static void add_fault(const char *name, int64_t nth, cudaError_t error, int sticky) {
  for (int i = 0; i < FAULTS; i++) {
    if (faults[i].left) continue;
    faults[i].left = nth;
    faults[i].error = error;
    faults[i].sticky = sticky;
    snprintf(faults[i].name, sizeof faults[i].name, "%s", name);
    return;
  }
  fprintf(stderr, "cuda double: more than %d injections\n", FAULTS);
  abort();
}

static void read_setting(const char *text) {
  char name[64];
  long long value, error;
  if (sscanf(text, "devices=%lld", &value) == 1) config.devices = (int)value;
  else if (sscanf(text, "threads=%lld", &value) == 1) config.threads = (int)value;
  else if (sscanf(text, "guard=%lld", &value) == 1) config.guard = (int)value;
  else if (sscanf(text, "memory=%lld", &value) == 1) config.memory = value << 20;
  else if (sscanf(text, "capability=%lld", &value) == 1) config.capability = (int)value;
  else if (sscanf(text, "driver=%lld", &value) == 1) config.driver = (cudaError_t)value;
  else if (sscanf(text, "fail=%63[A-Za-z_]:%lld:%lld", name, &value, &error) == 3)
    add_fault(name, value, (cudaError_t)error, 0);
  else {
    fprintf(stderr, "cuda double: PHX_CUDA_DOUBLE has \"%s\"\n", text);
    abort();
  }
}

static void read_environment(void) {
  const char *text = getenv("PHX_CUDA_DOUBLE");
  config = cuda_double_defaults();
  while (text && *text) {
    char part[160];
    const size_t length = strcspn(text, ",");
    snprintf(part, sizeof part, "%.*s", (int)length, text);
    read_setting(part);
    text += length + (text[length] == ',');
  }
}

void cuda_double_configure(const cuda_double_config *wanted) {
  pthread_once(&once, read_environment);
  double__memory_reset(); /* ends the program when something is in use */
  pthread_mutex_lock(&lock);
  config = *wanted;
  memset(faults, 0, sizeof faults);
  memset(&double__stats, 0, sizeof double__stats);
  sticky_error = cudaSuccess;
  pthread_mutex_unlock(&lock);
  last_error = cudaSuccess;
  current_device = 0;
}

const cuda_double_config *double__config(void) {
  pthread_once(&once, read_environment);
  return &config;
}

cuda_double_stats cuda_double_read(void) {
  double__check_all();
  pthread_mutex_lock(&lock);
  const cuda_double_stats stats = double__stats;
  pthread_mutex_unlock(&lock);
  return stats;
}

void double__count(int64_t *counter, int64_t by) {
  pthread_mutex_lock(&lock);
  *counter += by;
  if (double__stats.device_peak < double__stats.device_bytes) double__stats.device_peak = double__stats.device_bytes;
  pthread_mutex_unlock(&lock);
}

void cuda_double_count_launch(void) { double__count(&double__stats.launches, 1); }

void cuda_double_fail(const char *name, int64_t nth, cudaError_t error, int sticky) {
  pthread_once(&once, read_environment);
  pthread_mutex_lock(&lock);
  add_fault(name, nth, error, sticky);
  pthread_mutex_unlock(&lock);
}

cudaError_t double__sticky(void) {
  pthread_mutex_lock(&lock);
  const cudaError_t error = sticky_error;
  pthread_mutex_unlock(&lock);
  return error;
}

cudaError_t cuda_double_return(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

static int is_meant(const char *wanted, const char *name, const char *kernel) {
  return !wanted[0] || strcmp(wanted, name) == 0 || (kernel && strstr(kernel, wanted));
}

static cudaError_t enter(const char *name, const char *kernel) {
  pthread_once(&once, read_environment);
  cudaError_t error = config.driver;
  pthread_mutex_lock(&lock);
  double__stats.calls++;
  if (error == cudaSuccess) error = sticky_error;
  for (int i = 0; i < FAULTS; i++) {
    if (!faults[i].left || !is_meant(faults[i].name, name, kernel)) continue;
    if (--faults[i].left) continue;
    error = faults[i].error;
    if (faults[i].sticky) sticky_error = error;
  }
  pthread_mutex_unlock(&lock);
  return cuda_double_return(error);
}
cudaError_t cuda_double_enter(const char *name) { return enter(name, NULL); }
cudaError_t cuda_double_enter_launch(const char *kernel) { return enter("cudaLaunchKernel", kernel); }

/* ---- devices ---- */
/* How many, and (index not NULL) which one of all the device is that is seen as `device`. */
static int visible(int device, int *index) {
  const char *list = getenv("CUDA_VISIBLE_DEVICES");
  int count = 0;
  if (index) *index = device;
  if (!list) return config.devices;
  while (*list) {
    char *end;
    const long at = strtol(list, &end, 10);
    if (end == list || at < 0 || at >= config.devices) break; /* the driver stops at the first it does not know */
    if (index && count == device) *index = (int)at;
    count++;
    list = end + (*end == ',');
  }
  return count;
}
static int visible_devices(void) { return visible(0, NULL); }

cudaError_t cudaGetDeviceCount(int *count) {
  ENTER("cudaGetDeviceCount");
  *count = visible_devices();
  return cuda_double_return(*count ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
  ENTER("cudaSetDevice");
  if (device < 0 || device >= visible_devices()) return cuda_double_return(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

int double__device(void) { return current_device; }

cudaError_t cudaGetDevice(int *device) {
  ENTER("cudaGetDevice");
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = config.driver == cudaSuccess ? CUDART_VERSION : 0; /* 0 without a driver, as the runtime says */
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device) {
  ENTER("cudaDeviceGetAttribute");
  if (device < 0 || device >= visible_devices()) return cuda_double_return(cudaErrorInvalidDevice);
  switch (attr) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = config.capability >= 90 ? 227 << 10 : 163 << 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = config.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = config.capability % 10; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: return cuda_double_return(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device) {
  ENTER("cudaGetDeviceProperties");
  if (device < 0 || device >= visible_devices()) return cuda_double_return(cudaErrorInvalidDevice);
  memset(prop, 0, sizeof *prop);
  snprintf(prop->name, sizeof prop->name, "emulated device");
  prop->totalGlobalMem = (size_t)config.memory;
  prop->major = config.capability / 10;
  prop->minor = config.capability % 10;
  prop->multiProcessorCount = 4;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  ENTER("cudaDeviceGetPCIBusId");
  int index;
  if (device < 0 || device >= visible(device, &index) || length < 13) return cuda_double_return(cudaErrorInvalidValue);
  snprintf(id, (size_t)length, "0000:%02x:00.0", index + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  ENTER("cudaDeviceGetStreamPriorityRange");
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  ENTER("cudaThreadExchangeStreamCaptureMode");
  *mode = cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}

/* ---- errors ---- */
cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error != cudaSuccess ? error : double__sticky();
}

cudaError_t cudaPeekAtLastError(void) { return last_error != cudaSuccess ? last_error : double__sticky(); }

static const struct {
  cudaError_t error;
  const char *name, *text;
} error_texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

const char *cudaGetErrorName(cudaError_t error) {
  for (size_t i = 0; i < sizeof error_texts / sizeof *error_texts; i++)
    if (error_texts[i].error == error) return error_texts[i].name;
  return "cudaErrorUnknown";
}

const char *cudaGetErrorString(cudaError_t error) {
  for (size_t i = 0; i < sizeof error_texts / sizeof *error_texts; i++)
    if (error_texts[i].error == error) return error_texts[i].text;
  return "unknown error";
}
