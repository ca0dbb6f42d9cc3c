/* tests/emulation/driver_double.c - a libcuda.so.1 with which cuDNN makes plans on a machine without a GPU.
 *
 * Plans are compiled for the GPU that a device's properties name; the only thing then asked of the driver is to load
 * the machine code, which is accepted here if it is an ELF image.  Nothing can be launched: every other entry exists,
 * since cuDNN looks for them all, and fails. */
#include <stddef.h>
#include <string.h>

enum { INVALID_IMAGE = 200, NOT_SUPPORTED = 801 };
#define EXPORT __attribute__((visibility("default")))
static char library, kernel;

#define DECLARE(name, ...) EXPORT int name(__VA_ARGS__); EXPORT int name(__VA_ARGS__)
DECLARE(cuLibraryLoadData, void **out, const void *code, int *options, void **values, unsigned n, int *more,
        void **more_values, unsigned n_more) {
  (void)options, (void)values, (void)n, (void)more, (void)more_values, (void)n_more;
  if (!code || memcmp(code, "\177ELF", 4) != 0) return INVALID_IMAGE;
  *out = &library;
  return 0;
}
DECLARE(cuLibraryGetKernel, void **out, void *from, const char *name) {
  if (from != &library || !name || !*name) return NOT_SUPPORTED;
  *out = &kernel;
  return 0;
}
DECLARE(cuLibraryUnload, void *what) { return what == &library ? 0 : NOT_SUPPORTED; }
DECLARE(cuKernelSetAttribute, int attribute, int value, void *of, int device) {
  (void)attribute, (void)value, (void)device;
  return of == &kernel ? 0 : NOT_SUPPORTED;
}
DECLARE(cuKernelGetAttribute, int *out, int attribute, void *of, int device) {
  (void)attribute, (void)device;
  *out = 0;
  return of == &kernel ? 0 : NOT_SUPPORTED;
}

#define ABSENT(name) \
  DECLARE(name, void) { return NOT_SUPPORTED; }
ABSENT(cuCtxGetCurrent)
ABSENT(cuCtxGetLimit)
ABSENT(cuCtxPopCurrent)
ABSENT(cuCtxPushCurrent)
ABSENT(cuDeviceGet)
ABSENT(cuDeviceGetCount)
ABSENT(cuDriverGetVersion)
ABSENT(cuFuncGetName)
ABSENT(cuGetErrorName)
ABSENT(cuGetErrorString)
ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuLaunchKernel)
ABSENT(cuLaunchKernelEx)
ABSENT(cuLibraryLoadFromFile)
ABSENT(cuLinkAddData)
ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate)
ABSENT(cuLinkDestroy)
ABSENT(cuOccupancyMaxPotentialClusterSize)
ABSENT(cuStreamGetCtx)
