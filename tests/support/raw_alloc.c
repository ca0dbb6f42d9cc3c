/* tests/support/raw_alloc.c - see raw_alloc.h.  Only tests that name it are linked with it.
 *
 * The real functions are called by the names that the C library and the address sanitizer give them besides: asking for
 * them with dlsym may itself allocate. */
#include "raw_alloc.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __SANITIZE_ADDRESS__
#define REAL(name) __interceptor_##name
#define EARLY __attribute__((visibility("default"), no_sanitize("address", "undefined")))
#else
#define REAL(name) __libc_##name
#define EARLY __attribute__((visibility("default"))) /* plugins are to find it */
#endif
extern void *REAL(calloc)(size_t n, size_t bytes);
extern void *REAL(malloc)(size_t bytes);
extern void *REAL(realloc)(void *p, size_t bytes);
EARLY void *calloc(size_t n, size_t bytes);
EARLY void *malloc(size_t bytes);
EARLY void *realloc(void *p, size_t bytes);

raw_alloc raw;

static bool fails(const void *caller) {
  Dl_info info;
  if (!dladdr(caller, &info) || !info.dli_fname) return false;
  const char *base = strrchr(info.dli_fname, '/');
  if (!base || strncmp(base, "/phx_", 5) != 0) return false;
  if (__atomic_add_fetch(&raw.calls, 1, __ATOMIC_RELAXED) != raw.turn) return false;
  snprintf(raw.plugin, sizeof raw.plugin, "%s", base + 1);
  raw.fired = true;
  return true;
}
#define FAILS() (__atomic_load_n(&raw.on, __ATOMIC_ACQUIRE) && fails(__builtin_return_address(0)))

void *calloc(size_t n, size_t bytes) {
  return FAILS() ? NULL : REAL(calloc)(n, bytes);
}
void *malloc(size_t bytes) {
  return FAILS() ? NULL : REAL(malloc)(bytes);
}
void *realloc(void *p, size_t bytes) {
  return FAILS() ? NULL : REAL(realloc)(p, bytes);
}

void raw_alloc_begin(long turn) {
  raw = (raw_alloc){.turn = turn, .plugin = "none"};
  __atomic_store_n(&raw.on, true, __ATOMIC_RELEASE);
}

void raw_alloc_end(void) {
  __atomic_store_n(&raw.on, false, __ATOMIC_RELEASE);
}
