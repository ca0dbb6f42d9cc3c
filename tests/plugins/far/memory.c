/* memory.c - memory that the CPU cannot touch, and what may be pinned.  Calls are [main] but far_space. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "far.h"

#define PAGE ((size_t)4096)

static size_t pages(int64_t bytes) { return ((size_t)bytes + PAGE - 1) / PAGE * PAGE; }

static far_block *find(phx_device_self *self, const void *p) {
  for (size_t i = 0; i < self->n_blocks; i++)
    if ((uintptr_t)p >= self->blocks[i].at && (uintptr_t)p - self->blocks[i].at < (uintptr_t)self->blocks[i].bytes)
      return &self->blocks[i];
  return NULL;
}

static phx_status add(phx_device_self *self, const far_block *block, phx_error *err) {
  phx_status status = PHX_OK;
  pthread_mutex_lock(&self->lock);
  if (self->n_blocks == FAR_ALLOCATIONS)
    status = phx_fail(err, PHX_NOMEM, "far: more than %d allocations", FAR_ALLOCATIONS);
  else
    self->blocks[self->n_blocks++] = *block;
  pthread_mutex_unlock(&self->lock);
  return status;
}

phx_status far_alloc(phx_device_self *self, int32_t space, int64_t bytes, void **out, phx_error *err) {
  if (bytes <= 0 || bytes > INT64_MAX / 2)
    return phx_fail(err, PHX_INVALID, "far: alloc of %lld bytes", (long long)bytes);
  const size_t room = pages(bytes);
  char *map = mmap(NULL, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED || mprotect(map + PAGE, room, PROT_READ | PROT_WRITE)) {
    if (map != MAP_FAILED) munmap(map, room + 2 * PAGE);
    return phx_fail(err, PHX_NOMEM, "far: no memory for %lld bytes", (long long)bytes);
  }
  char *real = map + PAGE + room - (size_t)phx_align_bytes(bytes); /* it ends where the next page cannot be touched */
  if (phx_align_bytes(bytes) > (int64_t)room) real = map + PAGE;
  memset(real, 0, (size_t)bytes);
  const uintptr_t at = (uintptr_t)real | (space == PHX_SPACE_DEVICE ? FAR_AWAY : 0);
  const far_block block = {map, room + 2 * PAGE, at, bytes, space, 0};
  const phx_status status = add(self, &block, err);
  if (status) munmap(map, room + 2 * PAGE);
  else *out = (void *)at;
  return status;
}

static far_block take_out(phx_device_self *self, const void *p) {
  pthread_mutex_lock(&self->lock);
  far_block *block = find(self, p);
  if (!block || block->at != (uintptr_t)p) far_die("%p was freed, and is no allocation (or no longer)", p);
  const uint64_t pending = self->null->put - self->null->finished; /* others' work would crash: the pages go */
  if (pending) far_die("%p is freed while %llu pieces of work are pending", p, (unsigned long long)pending);
  const far_block gone = *block;
  *block = self->blocks[--self->n_blocks];
  pthread_mutex_unlock(&self->lock);
  return gone;
}

void far_free(phx_device_self *self, int32_t space, void *p, int64_t bytes) {
  if (!p) return;
  const far_block gone = take_out(self, p);
  if (gone.space != space || gone.bytes != bytes || gone.registered)
    far_die("%p has %lld bytes in space %d, and is freed as %lld in %d", p, (long long)gone.bytes, gone.space,
            (long long)bytes, space);
  munmap(gone.map, gone.map_bytes);
}

phx_status far_pin(void *ctx, void *p, int64_t bytes, phx_error *err) {
  const far_block block = {.at = (uintptr_t)p, .bytes = bytes, .space = PHX_SPACE_PINNED, .registered = 1};
  return add(ctx, &block, err);
}

void far_unpin(void *ctx, void *p) {
  if (p && !take_out(ctx, p).registered) far_die("%p was not pinned by pin()", p);
}

int32_t far_space(void *ctx, const void *p) {
  phx_device_self *self = ctx;
  if ((uintptr_t)p & FAR_AWAY) return PHX_SPACE_DEVICE;
  pthread_mutex_lock(&self->lock);
  const far_block *block = find(self, p);
  const int32_t space = block ? block->space : PHX_SPACE_HOST;
  pthread_mutex_unlock(&self->lock);
  return space;
}

phx_status far_check(phx_device_self *self, const char *who, const void *p, int64_t bytes, int32_t device,
                     phx_error *err) {
  static const char *const kinds[] = {"ordinary memory, neither the device's nor pinned", "the device's", "pinned"};
  pthread_mutex_lock(&self->lock);
  const far_block *block = find(self, p);
  const int is_device = block && block->space == PHX_SPACE_DEVICE, kind = !block ? 0 : is_device ? 1 : 2;
  const int64_t left = block ? block->bytes - (int64_t)((uintptr_t)p - block->at) : 0;
  pthread_mutex_unlock(&self->lock);
  if (!block || (device >= 0 && device != is_device))
    return phx_fail(err, PHX_DEVICE, "far: %s: %p is %s (or was freed)", who, p, kinds[kind]);
  if (bytes > left)
    return phx_fail(err, PHX_DEVICE, "far: %s: %lld bytes at %p, and the allocation ends after %lld", who,
                    (long long)bytes, p, (long long)left);
  return PHX_OK;
}

void far_check_leaks(const phx_device_self *self) {
  int64_t bytes = 0;
  for (size_t i = 0; i < self->n_blocks; i++) bytes += self->blocks[i].bytes;
  if (self->n_blocks) far_die("destroyed with %zu allocations, %lld bytes", self->n_blocks, (long long)bytes);
}
