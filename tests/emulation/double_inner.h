/* tests/emulation/double_inner.h - what the files of the CUDA runtime's double share. */
#ifndef PHX__DOUBLE_INNER_H
#define PHX__DOUBLE_INNER_H
#include "cuda_double.h"

#define ENTER(name)                                    \
  do {                                                 \
    const cudaError_t entered = cuda_double_enter(name); \
    if (entered != cudaSuccess) return entered;        \
  } while (0)

const cuda_double_config *double__config(void);
cudaError_t double__sticky(void);
void double__count(int64_t *counter, int64_t by); /* under the double's lock */
extern cuda_double_stats double__stats;

enum { DOUBLE_PAGEABLE, DOUBLE_PINNED, DOUBLE_ON_DEVICE };
/* Where p is; base and device (may be NULL) of the allocation around it. */
int double__find(const void *p, void **base, int *device);
/* Does [p, p + bytes) stay inside one allocation (or is it not ours)? */
int double__inside(const void *p, size_t bytes);
void double__memory_reset(void);
void double__check_all(void);
void double__wait_all_streams(void);
void double__wait_stream(cudaStream_t stream); /* NULL: all */
int double__device(void);                      /* current on this thread */
#endif
