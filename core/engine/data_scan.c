/* core/engine/data_scan.c - see data_scan.h.  A memfd of records, one after the other; its number is in the
 * environment. */
#include "engine/data_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "base/sys.h"

#define MAGIC "phalanx scans 1"
typedef struct head {
  char magic[16];
} head;

/* The memfd of this process or of the one that started it; -1: there is none. */
static int inherited(void) {
  const char *text = getenv(PHX__SCAN_VARIABLE);
  char *end = NULL;
  head h = {""};
  if (!text || !*text) return -1;
  const long fd = strtol(text, &end, 10);
  if (*end || fd < 3 || fd > 1 << 20) return -1;
  /* a number that means another file here, or none: only a memfd that begins as ours do is taken */
  if (fcntl((int)fd, F_GET_SEALS) < 0 || phx__sys.pread((int)fd, &h, sizeof h, 0) != (ssize_t)sizeof h) return -1;
  return memcmp(h.magic, MAGIC, sizeof MAGIC) ? -1 : (int)fd;
}

static int make(void) {
  char number[16];
  head h = {MAGIC};
  const int fd = phx__sys.memfd_create("phalanx-scans", 0); /* ranks inherit it */
  if (fd < 0) return -1;
  snprintf(number, sizeof number, "%d", fd);
  if (phx__sys.write(fd, &h, sizeof h) == (ssize_t)sizeof h && !setenv(PHX__SCAN_VARIABLE, number, 1)) return fd;
  phx__sys.close(fd);
  return -1;
}

phx__data_scan phx__data_scan_of(const struct stat *st, int64_t header) {
  return (phx__data_scan){.device = (uint64_t)st->st_dev, .inode = (uint64_t)st->st_ino, .bytes = (int64_t)st->st_size,
                          .modified_s = (int64_t)st->st_mtim.tv_sec, .modified_ns = (int64_t)st->st_mtim.tv_nsec,
                          .changed_s = (int64_t)st->st_ctim.tv_sec, .changed_ns = (int64_t)st->st_ctim.tv_nsec,
                          .header = header};
}

static bool same_file(const phx__data_scan *a, const phx__data_scan *b) {
  return a->device == b->device && a->inode == b->inode && a->bytes == b->bytes && a->modified_s == b->modified_s &&
         a->modified_ns == b->modified_ns && a->changed_s == b->changed_s && a->changed_ns == b->changed_ns &&
         a->header == b->header;
}

bool phx__data_scan_find(phx__data_scan *scan) {
  phx__data_scan kept[32];
  const int fd = inherited();
  size_t n = 1;
  if (fd < 0) return false;
  for (off_t at = sizeof(head); n > 0; at += (off_t)(n * sizeof *kept)) {
    const ssize_t got = phx__sys.pread(fd, kept, sizeof kept, at);
    n = got > 0 ? (size_t)got / sizeof *kept : 0;
    for (size_t i = 0; i < n; i++)
      if (same_file(scan, &kept[i])) {
        *scan = kept[i];
        return true;
      }
  }
  return false;
}

/* Was it changed so shortly ago that another change might bear the same times?  Clocks of file systems tick. */
static bool too_fresh(const phx__data_scan *scan) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  const double coarse = scan->changed_ns == 0 ? 2.0 : 0.1;
  const double age = (double)(now.tv_sec - scan->changed_s) + 1e-9 * (double)(now.tv_nsec - scan->changed_ns);
  return age < coarse;
}

void phx__data_scan_keep(const phx__data_scan *scan) {
  struct stat st;
  if (too_fresh(scan)) return;
  int fd = inherited();
  if (fd < 0) fd = make();
  if (fd < 0 || phx__sys.fstat(fd, &st)) return;
  /* half a record at the end is passed over by who reads, and is written over by the next */
  const off_t at = (off_t)sizeof(head) + (st.st_size - (off_t)sizeof(head)) / (off_t)sizeof *scan * (off_t)sizeof *scan;
  (void)!phx__sys.pwrite(fd, scan, sizeof *scan, at);
}
