/* plugins/cpu/memory.c - the device's memory: anonymous maps, zero, touched, in huge pages where the kernel gives them.
 *
 * Sizes are rounded to pages here and again at free, so nothing is written beside the memory.  Advice for huge pages
 * can return success and do nothing: the page size really obtained is read from smaps once and logged.  [main] */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "cpu.h"

#define SMALL_PAGE ((size_t)4096)
#define HUGE_PAGE ((size_t)2 << 20)

static size_t rounded(int64_t bytes) {
  const size_t page = (size_t)bytes >= HUGE_PAGE ? HUGE_PAGE : SMALL_PAGE;
  return ((size_t)bytes + page - 1) / page * page;
}

/* A map of `size` bytes that begins at a multiple of HUGE_PAGE: one page more is mapped, the ends are given back. */
static void *map_huge(size_t size) {
  char *p = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return p;
  const size_t before = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
  if (before) munmap(p, before);
  munmap(p + before + size, HUGE_PAGE - before);
  madvise(p + before, size, MADV_HUGEPAGE);
  return p + before;
}

/* Bytes in huge pages of the map that holds p, and its size, from smaps; 0 and 0 when it cannot be read. */
static void huge_bytes(const void *p, size_t *huge, size_t *size) {
  char line[256];
  int inside = 0;
  *huge = *size = 0;
  FILE *f = fopen("/proc/self/smaps", "re");
  if (!f) return;
  while (fgets(line, sizeof line, f)) {
    unsigned long first, last;
    size_t kib;
    if (sscanf(line, "%lx-%lx ", &first, &last) == 2) {
      if (inside) break;
      inside = (uintptr_t)p >= first && (uintptr_t)p < last;
      if (inside) *size = last - first;
    } else if (inside && sscanf(line, "AnonHugePages: %zu", &kib) == 1) {
      *huge = kib << 10;
    }
  }
  fclose(f);
}

static void log_page_size(phx__cpu *cpu, const void *p) {
  char text[160];
  size_t huge, size;
  cpu->page_size_logged = 1;
  huge_bytes(p, &huge, &size);
  const char *pages = huge >= size ? "2 MiB" : "2 MiB and 4 KiB";
  if (!huge) pages = "4 KiB";
  snprintf(text, sizeof text, "memory in %s pages (%zu of %zu MiB huge)", pages, huge >> 20, size >> 20);
  if (cpu->host && cpu->host->log) cpu->host->log(cpu->host->ctx, PHX_LOG_INFO, text);
}

phx_status phx__cpu_alloc(phx__cpu *cpu, int64_t bytes, void **out, phx_error *err) {
  if (bytes <= 0) return phx_fail(err, PHX_INVALID, "cpu: alloc of %lld bytes", (long long)bytes);
  if (bytes > INT64_MAX / 2) return phx_fail(err, PHX_NOMEM, "cpu: alloc of %lld bytes", (long long)bytes);
  const size_t size = rounded(bytes);
  char *p =
      size >= HUGE_PAGE ? map_huge(size) : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    phx_fail_errno(err, PHX_NOMEM, errno, "cpu: no memory for %lld bytes", (long long)bytes);
    return phx_fail_more(err, PHX_NOMEM, "; make the model or the batch smaller");
  }
  for (size_t at = 0; at < size; at += SMALL_PAGE) ((volatile char *)p)[at] = 0;
  if (size >= HUGE_PAGE && !cpu->page_size_logged) log_page_size(cpu, p);
  *out = p;
  return PHX_OK;
}

void phx__cpu_free(void *p, int64_t bytes) {
  if (p) munmap(p, rounded(bytes));
}

phx_status phx__cpu_scratch(phx__cpu *cpu, void **out, phx_error *err) {
  phx_status status = PHX_OK;
  if (!cpu->scratch) status = phx__cpu_alloc(cpu, cpu->scratch_bytes, &cpu->scratch, err);
  if (status == PHX_OK) *out = cpu->scratch;
  return status;
}
