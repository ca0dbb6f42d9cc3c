/* core/job/job_segment.c - the job's shared memory: made, mapped, and grown by parts.
 *
 * What it is for: one memfd holds the liveness pages, the ranks' meeting slots and every part that share() appends.
 * It has no name in the file system, so that kill -9 of everything leaves nothing behind.
 * What it does not do: find out who this process is (identity.c), meet (job_exchange.c), watch (launcher.c).
 * Invariant: rank 0 alone grows the file, and only between two exchanges, so all ranks know the same parts in the same
 * order; a share() that fails on one rank fails on all, and its pages go back.  The file is sealed: nobody can cut it.
 * Threads: [main], but phx__segment_fail is [any]. */
#include "job/job_segment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/futex.h"
#include "base/status.h"
#include "base/sys.h"

#ifndef MADV_POPULATE_WRITE /* Linux 5.14; glibc 2.35 */
#define MADV_POPULATE_WRITE 23
#endif

_Static_assert(sizeof(phx__page) == 4096, "a liveness record fits a page");
_Static_assert(sizeof(phx__post) == 64, "a post is a cache line");

void phx__segment_fail(phx__segment *segment, uint32_t who) {
  uint32_t none = 0;
  __atomic_compare_exchange_n(&segment->failed, &none, who, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  __atomic_add_fetch(&segment->bell, 1, __ATOMIC_RELEASE);
  phx__futex_wake(&segment->failed);
  phx__futex_wake(&segment->bell);
}

static int64_t page_up(int64_t bytes) {
  int64_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

int phx__job_create_segment(int32_t size, phx_error *err) {
  phx__segment *segment = MAP_FAILED;
  size_t bytes = sizeof *segment;
  if (size < 1 || size > PHX_RANKS_MAX) {
    phx_fail(err, PHX_INVALID, "a job has 1 to %d ranks, not %d", PHX_RANKS_MAX, size);
    return -1;
  }
  int fd = phx__sys.memfd_create("phalanx-job", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) {
    phx_fail_errno(err, PHX_NOMEM, errno, "cannot create the job's shared memory (memfd_create)");
    return -1;
  }
  if (phx__sys.ftruncate(fd, (off_t)bytes) != 0) {
    phx_fail_errno(err, PHX_NOMEM, errno, "cannot size the job's shared memory to %zu bytes (ftruncate)", bytes);
    goto failed;
  }
  /* Cut by anybody, it would end every rank by SIGBUS.  It grows with every share(), so that stays allowed; no other
   * seal can follow.  A kernel that cannot seal goes without. */
  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL);
  segment = phx__sys.mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (segment == MAP_FAILED) {
    phx_fail_errno(err, PHX_NOMEM, errno, "cannot map the job's shared memory, %zu bytes (mmap)", bytes);
    goto failed;
  }
  if (getrandom(&segment->nonce, sizeof segment->nonce, GRND_NONBLOCK) < 0) segment->nonce = phx__now_ns();
  segment->magic = PHX__SEGMENT_MAGIC;
  segment->version = PHX__SEGMENT_VERSION;
  segment->size = size;
  segment->created_ns = phx__now_ns();
  segment->end = (int64_t)bytes;
  phx__sys.munmap(segment, bytes);
  return fd;
failed:
  phx__sys.close(fd);
  return -1;
}

phx_status phx__segment_map(int fd, int32_t size, phx__segment **out, phx_error *err) {
  struct stat info;
  if (fstat(fd, &info) != 0)
    return phx_fail_errno(err, PHX_INVALID, errno, "file descriptor %d, said to be the job's memory, is not open", fd);
  if (!S_ISREG(info.st_mode) || info.st_size < (off_t)sizeof(phx__segment))
    return phx_fail(err, PHX_INVALID, "file descriptor %d is not a job's memory (%lld bytes)", fd,
                    (long long)info.st_size);
  phx__segment *segment = phx__sys.mmap(NULL, sizeof *segment, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (segment == MAP_FAILED)
    return phx_fail_errno(err, PHX_NOMEM, errno, "cannot map the job's shared memory, %zu bytes (mmap)",
                          sizeof *segment);
  phx_status status = PHX_OK;
  if (segment->magic != PHX__SEGMENT_MAGIC || segment->version != PHX__SEGMENT_VERSION)
    status = phx_fail(err, PHX_INVALID,
                      "file descriptor %d is not a job's memory of this version (version %u, this build has %d): all "
                      "ranks and the launcher must be the same phalanx",
                      fd, segment->magic == PHX__SEGMENT_MAGIC ? segment->version : 0, PHX__SEGMENT_VERSION);
  else if (segment->size != size)
    status = phx_fail(err, PHX_INVALID, "this rank is told of %d ranks, but the job's memory is for %d", size,
                      segment->size);
  if (status != PHX_OK) {
    phx__sys.munmap(segment, sizeof *segment);
    return status;
  }
  *out = segment;
  return PHX_OK;
}

void phx__segment_unmap(phx__segment *segment) {
  if (segment) phx__sys.munmap(segment, sizeof *segment);
}

/* The value of a line of /proc/meminfo in bytes, or 0. */
static int64_t meminfo(const char *text, const char *name) {
  long long kib = 0;
  const char *at = strstr(text, name);
  return at && sscanf(at + strlen(name), "%lld", &kib) == 1 ? (int64_t)kib * 1024 : 0;
}

/* Shared memory that does not fit is not refused by the kernel: it kills somebody when the pages are touched.  True
 * also where the kernel does not say. */
static bool fits_memory(int64_t bytes) {
  char text[4096];
  int fd = phx__sys.open("/proc/meminfo", O_RDONLY, 0);
  if (fd < 0) return true;
  ssize_t n = phx__sys.read(fd, text, sizeof text - 1);
  phx__sys.close(fd);
  if (n <= 0) return true;
  text[n] = 0;
  int64_t available = meminfo(text, "MemAvailable:") + meminfo(text, "SwapFree:");
  return available == 0 || bytes <= available;
}

/* Pages now, so that the first step is not the slow one, and so that a lack of memory shows here. */
static int prefault(void *part, size_t bytes) {
  if (madvise(part, bytes, MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno; /* EINVAL: a kernel before 5.14 */
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  for (size_t at = 0; at < bytes; at += page) ((volatile char *)part)[at] = 0;
  return 0;
}

/* After an exchange that may carry a cause: names the ranks where the step went wrong. */
static phx_status check_causes(const phx__member *me, const phx__post *all, const char *step, const char *name,
                               int64_t bytes, phx_error *err) {
  for (int32_t r = 0; r < me->size; r++)
    if (all[r].cause)
      return phx_fail_errno(err, PHX_NOMEM, all[r].cause,
                            "rank %d cannot %s shared memory '%s', %lld bytes for each "
                            "of %d ranks",
                            r, step, name, (long long)bytes, me->size);
  return PHX_OK;
}

static phx_status check_request(const phx__member *me, const phx__post *all, phx_error *err) {
  for (int32_t r = 1; r < me->size; r++) {
    if (strncmp(all[r].name, all[0].name, sizeof all[0].name) != 0)
      return phx_fail(err, PHX_COMM, "the ranks disagree: rank %d asks for shared memory '%s', rank 0 for '%s'", r,
                      all[r].name, all[0].name);
    if (all[r].value != all[0].value)
      return phx_fail(err, PHX_COMM,
                      "the ranks disagree about shared memory '%s': rank %d asks for %lld bytes, rank 0 for %lld",
                      all[0].name, r, (long long)all[r].value, (long long)all[0].value);
  }
  return PHX_OK;
}

phx_status phx__segment_share(phx__member *me, const char *name, int64_t bytes, void **bases, phx_error *err) {
  phx__post all[PHX_RANKS_MAX], mine = {.kind = PHX__POST_SHARE, .value = (uint64_t)bytes};
  phx__segment *segment = me->segment;
  snprintf(mine.name, sizeof mine.name, "%s", name);
  PHX_TRY(phx__exchange(me, &mine, all, err));
  PHX_TRY(check_request(me, all, err));
  /* From here on every rank sees the same request, and decides the same. */
  int64_t part = 0, whole = 0;
  if (bytes < 1 || bytes > INT64_MAX / PHX_RANKS_MAX / 2)
    return phx_fail(err, PHX_INVALID, "shared memory '%s': %lld bytes per rank is out of range", name,
                    (long long)bytes);
  part = page_up(bytes);
  whole = part * me->size;
  if (__atomic_load_n(&segment->n_shares, __ATOMIC_ACQUIRE) >= PHX__SHARES_MAX)
    return phx_fail(err, PHX_UNSUPPORTED, "shared memory '%s': a job has at most %d parts", name, PHX__SHARES_MAX);

  mine.kind = PHX__POST_GROWN;
  mine.value = 0;
  if (me->rank == 0) {
    int64_t at = page_up(segment->end);
    if (at > INT64_MAX - whole)
      mine.cause = EOVERFLOW;
    else if (!fits_memory(whole))
      mine.cause = ENOMEM;
    else if (phx__sys.ftruncate(me->fd, (off_t)(at + whole)) != 0)
      mine.cause = errno;
    mine.value = (uint64_t)at;
  }
  PHX_TRY(phx__exchange(me, &mine, all, err));
  PHX_TRY(check_causes(me, all, "grow the file of", name, bytes, err));

  off_t at = (off_t)all[0].value;
  char *base = phx__sys.mmap(NULL, (size_t)whole, PROT_READ | PROT_WRITE, MAP_SHARED, me->fd, at);
  mine.kind = PHX__POST_MAPPED;
  mine.cause = 0;
  if (base == MAP_FAILED) {
    mine.cause = errno;
  } else {
    /* Where the kernel gives huge pages to shared memory; it may say yes and do nothing. */
    madvise(base, (size_t)whole, MADV_HUGEPAGE);
    mine.cause = prefault(base + part * me->rank, (size_t)part);
  }
  phx_status status = phx__exchange(me, &mine, all, err);
  if (status == PHX_OK) status = check_causes(me, all, "map", name, bytes, err);
  if (status != PHX_OK) {
    if (base != MAP_FAILED) phx__sys.munmap(base, (size_t)whole);
    /* Nobody uses the part: its pages go back.  A failure here only keeps memory until the job ends, which is now. */
    if (me->rank == 0) fallocate(me->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, whole);
    return status;
  }
  if (me->rank == 0) {
    phx__share_entry *entry = &segment->shares[segment->n_shares];
    memcpy(entry->name, mine.name, sizeof entry->name);
    entry->bytes = part;
    entry->offset = at;
    segment->end = at + whole;
    __atomic_store_n(&segment->n_shares, segment->n_shares + 1, __ATOMIC_RELEASE);
  }
  for (int32_t r = 0; r < me->size; r++) bases[r] = base + part * r;
  return PHX_OK;
}
