/* double_memory.c - the double's memory: one reserved range for all devices, first fit, guarded; pinned host blocks.
 *
 * Invariant: blocks are sorted by address; behind each lie GUARD bytes of 0xA5.  In inline mode with guard the range
 * is inaccessible but between reach and leave.
 * Threads: any; one lock. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "double_inner.h"

#define GUARD ((size_t)256)
#define PAGE ((size_t)4096)
#define HUGE_PAGE ((size_t)2 << 20) /* the range's: opening and closing 64 MiB by small ones was most of a run's time */
#define RANGE ((size_t)64 << 30)
enum { FRESH = 0xFF, FENCE = 0xA5 };

typedef struct block {
  char *p;
  size_t bytes, room; /* asked for; with padding and guard */
  int device, where;
} block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *range;
static size_t open_bytes; /* of the range, that have ever been used: what reach opens */
static int reached;
static block *blocks;
static size_t n_blocks, blocks_room;
static int64_t used[8];

static void protect(int protection) {
  if (open_bytes && mprotect(range, open_bytes, protection) != 0) {
    perror("cuda double: mprotect");
    abort();
  }
}

static void reach_locked(void) {
  const cuda_double_config *c = double__config();
  if (c->guard && !c->threads && reached++ == 0) protect(PROT_READ | PROT_WRITE);
}
static void leave_locked(void) {
  const cuda_double_config *c = double__config();
  if (c->guard && !c->threads && --reached == 0) protect(PROT_NONE);
}
void cuda_double_reach(void) {
  pthread_mutex_lock(&lock);
  reach_locked();
  pthread_mutex_unlock(&lock);
}
void cuda_double_leave(void) {
  pthread_mutex_lock(&lock);
  leave_locked();
  pthread_mutex_unlock(&lock);
}

static block *find_locked(const void *p) {
  for (size_t i = 0; i < n_blocks; i++)
    if ((const char *)p >= blocks[i].p && (const char *)p < blocks[i].p + blocks[i].room) return &blocks[i];
  return NULL;
}

int double__find(const void *p, void **base, int *device) {
  pthread_mutex_lock(&lock);
  const block *b = find_locked(p);
  const int where = b ? b->where : DOUBLE_PAGEABLE;
  if (base) *base = b ? b->p : NULL;
  if (device) *device = b ? b->device : -1;
  pthread_mutex_unlock(&lock);
  return where;
}

int double__inside(const void *p, size_t bytes) {
  pthread_mutex_lock(&lock);
  const block *b = find_locked(p);
  const int inside = b ? (const char *)p + bytes <= b->p + b->bytes
                       : (const char *)p + bytes <= range || (const char *)p >= range + RANGE || !range;
  pthread_mutex_unlock(&lock);
  return inside;
}

static int fence_is_whole(const block *b) {
  for (size_t i = b->bytes; i < b->room; i++)
    if ((unsigned char)b->p[i] != FENCE) return 0;
  return 1;
}

static void check_locked(block *b) {
  if (b->where != DOUBLE_ON_DEVICE || fence_is_whole(b)) return;
  fprintf(stderr, "cuda double: bytes behind an allocation of %zu bytes were written\n", b->bytes);
  memset(b->p + b->bytes, FENCE, b->room - b->bytes);
  double__count(&double__stats.overruns, 1);
}

void double__check_all(void) {
  pthread_mutex_lock(&lock);
  reach_locked();
  for (size_t i = 0; i < n_blocks; i++) check_locked(&blocks[i]);
  leave_locked();
  pthread_mutex_unlock(&lock);
}

void double__memory_reset(void) {
  pthread_mutex_lock(&lock);
  if (n_blocks) {
    fprintf(stderr, "cuda double: configured anew with %zu allocations alive\n", n_blocks);
    abort();
  }
  if (range) protect(PROT_READ | PROT_WRITE); /* the new settings may have no guard */
  reached = 0;
  memset(used, 0, sizeof used);
  pthread_mutex_unlock(&lock);
}

static void insert_locked(size_t at, block b) {
  if (n_blocks == blocks_room) {
    blocks_room = blocks_room ? 2 * blocks_room : 64;
    blocks = realloc(blocks, blocks_room * sizeof *blocks);
    if (!blocks) abort();
  }
  memmove(blocks + at + 1, blocks + at, (n_blocks - at) * sizeof *blocks);
  blocks[at] = b;
  n_blocks++;
}

/* Where the new block goes in the list (by address), and its address: the first gap in the range that holds it. */
static size_t first_fit(size_t room, char **at) {
  char *free_from = range;
  size_t i = 0;
  for (; i < n_blocks; i++) {
    const block *b = &blocks[i];
    if (b->p < range || b->p >= range + RANGE) continue;
    if ((size_t)(b->p - free_from) >= room) break;
    free_from = b->p + b->room;
  }
  *at = free_from;
  return i;
}

static cudaError_t take_device(void **out, size_t bytes) {
  const int device = double__device();
  if (bytes == 0) {
    *out = NULL;
    return cudaSuccess;
  }
  const size_t room = (bytes + GUARD - 1) / GUARD * GUARD + GUARD;
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&lock);
  if (!range) {
    range = mmap(NULL, RANGE + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) abort();
    range += (HUGE_PAGE - (uintptr_t)range % HUGE_PAGE) % HUGE_PAGE;
    (void)madvise(range, RANGE, MADV_HUGEPAGE); /* where there are none, it is only slower */
  }
  char *p;
  const size_t at = first_fit(room, &p);
  if (used[device] + (int64_t)bytes > double__config()->memory || p + room > range + RANGE) {
    error = cudaErrorMemoryAllocation;
  } else {
    const size_t end = ((size_t)(p - range) + room + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const int open = !double__config()->guard || double__config()->threads || reached;
    if (end > open_bytes) {
      if (mprotect(range + open_bytes, end - open_bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE) != 0) abort();
      open_bytes = end;
    }
    reach_locked();
    memset(p, FRESH, bytes);
    memset(p + bytes, FENCE, room - bytes);
    leave_locked();
    insert_locked(at, (block){p, bytes, room, device, DOUBLE_ON_DEVICE});
    used[device] += (int64_t)bytes;
    *out = p;
  }
  pthread_mutex_unlock(&lock);
  if (error == cudaSuccess) {
    double__count(&double__stats.device_bytes, (int64_t)bytes);
    double__count(&double__stats.device_blocks, 1);
  }
  return cuda_double_return(error);
}

static cudaError_t give(void *p, int where) {
  if (!p) return cudaSuccess;
  pthread_mutex_lock(&lock);
  block *b = find_locked(p);
  if (!b || b->p != p || b->where != where) {
    pthread_mutex_unlock(&lock);
    return cuda_double_return(cudaErrorInvalidValue);
  }
  const block gone = *b;
  if (where == DOUBLE_ON_DEVICE) {
    reach_locked();
    check_locked(b);
    char *first = (char *)(((uintptr_t)p + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE), *last = (char *)p + gone.bytes;
    last -= (uintptr_t)last % HUGE_PAGE;
    if (last > first) madvise(first, (size_t)(last - first), MADV_DONTNEED);
    leave_locked();
    used[gone.device] -= (int64_t)gone.bytes;
  }
  memmove(b, b + 1, (size_t)(blocks + n_blocks - (b + 1)) * sizeof *b);
  if (--n_blocks == 0) { /* the list is no leak of the plugin's */
    free(blocks);
    blocks = NULL;
    blocks_room = 0;
  }
  pthread_mutex_unlock(&lock);
  double__count(where == DOUBLE_ON_DEVICE ? &double__stats.device_bytes : &double__stats.pinned_bytes,
                -(int64_t)gone.bytes);
  double__count(where == DOUBLE_ON_DEVICE ? &double__stats.device_blocks : &double__stats.pinned_blocks, -1);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
  ENTER("cudaMalloc");
  return take_device(p, bytes);
}
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream) {
  ENTER("cudaMallocAsync");
  (void)stream; /* fresh memory is nobody's: order does not matter */
  return take_device(p, bytes);
}
cudaError_t cudaFree(void *p) {
  ENTER("cudaFree");
  double__wait_all_streams();
  return give(p, DOUBLE_ON_DEVICE);
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) {
  ENTER("cudaFreeAsync");
  double__wait_stream(stream);
  return give(p, DOUBLE_ON_DEVICE);
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  ENTER("cudaDeviceGetDefaultMemPool");
  *pool = (cudaMemPool_t)(uintptr_t)(device + 1);
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attr, void *value) {
  ENTER("cudaMemPoolSetAttribute");
  (void)attr;
  return cuda_double_return(pool && value ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) {
  ENTER("cudaMemPoolTrimTo");
  (void)keep;
  return cuda_double_return(pool ? cudaSuccess : cudaErrorInvalidValue);
}

static void insert_pinned(void *p, size_t bytes) {
  pthread_mutex_lock(&lock);
  size_t at = 0;
  while (at < n_blocks && blocks[at].p < (char *)p) at++;
  insert_locked(at, (block){p, bytes, bytes, 0, DOUBLE_PINNED});
  pthread_mutex_unlock(&lock);
  double__count(&double__stats.pinned_bytes, (int64_t)bytes);
  double__count(&double__stats.pinned_blocks, 1);
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  ENTER("cudaHostAlloc");
  (void)flags;
  char *q = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
  if (!q || bytes == 0) {
    free(q);
    return cuda_double_return(cudaErrorMemoryAllocation);
  }
  memset(q, FRESH, bytes);
  insert_pinned(q, bytes);
  *p = q;
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
cudaError_t cudaFreeHost(void *p) {
  ENTER("cudaFreeHost");
  double__wait_all_streams();
  const cudaError_t error = give(p, DOUBLE_PINNED);
  if (error == cudaSuccess) free(p);
  return error;
}
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags) {
  ENTER("cudaHostRegister");
  (void)flags;
  if (!p || !bytes) return cuda_double_return(cudaErrorInvalidValue);
  if (double__find(p, NULL, NULL) != DOUBLE_PAGEABLE) return cuda_double_return(cudaErrorHostMemoryAlreadyRegistered);
  insert_pinned(p, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *p) {
  ENTER("cudaHostUnregister");
  double__wait_all_streams();
  return give(p, DOUBLE_PINNED) == cudaSuccess ? cudaSuccess : cuda_double_return(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
  ENTER("cudaHostGetDevicePointer");
  (void)flags;
  if (double__find(host, NULL, NULL) != DOUBLE_PINNED) return cuda_double_return(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  ENTER("cudaMemGetInfo");
  const int device = double__device();
  pthread_mutex_lock(&lock);
  *total_bytes = (size_t)double__config()->memory;
  *free_bytes = *total_bytes - (size_t)used[device];
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p) {
  ENTER("cudaPointerGetAttributes");
  int device;
  const int where = double__find(p, NULL, &device);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = where == DOUBLE_ON_DEVICE ? cudaMemoryTypeDevice
                     : where == DOUBLE_PINNED  ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
  attributes->device = where == DOUBLE_PAGEABLE ? -2 : device;
  memcpy(&attributes->devicePointer, &p, sizeof p);
  if (where == DOUBLE_PINNED) memcpy(&attributes->hostPointer, &p, sizeof p);
  return cudaSuccess;
}
