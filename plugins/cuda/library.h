/* plugins/cuda/library.h - functions of a library that is opened at run time. */
#ifndef PHX__CUDA_LIBRARY_H
#define PHX__CUDA_LIBRARY_H
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

/* Sets *to, a pointer to a function of that type; 0 where the library lacks it. */
static inline int32_t phx__library_find(void *library, const char *name, void *to) {
  void *symbol = dlsym(library, name);
  memcpy(to, &symbol, sizeof symbol);
  return symbol != NULL;
}
#endif
