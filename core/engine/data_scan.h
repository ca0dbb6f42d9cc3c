/* core/engine/data_scan.h - what reading a whole token file told, so that one process of a machine reads it and no
 * other.
 *
 * Kept for this process and for the ranks that it starts, in memory that they inherit; found again by the file's
 * device, inode, size and times of change, so that a file that was changed since is read anew.  [main] */
#ifndef PHX__DATA_SCAN_H
#define PHX__DATA_SCAN_H
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

typedef struct phx__data_scan {
  uint64_t device, inode;
  int64_t bytes, modified_s, modified_ns, changed_s, changed_ns;
  uint64_t low, high;    /* XXH3-128 of the whole file, as `xxhsum -H2` prints it: high, low */
  int64_t header;        /* bytes before the first token */
  int64_t most, most_at; /* the largest token, and the first place where it stands */
} phx__data_scan;

#define PHX__SCAN_VARIABLE "PHALANX_SCAN_FD"

/* Of a file that was not read: its identity only. */
phx__data_scan phx__data_scan_of(const struct stat *st, int64_t header);
/* Fills the rest from what was kept; false: it has to be read. */
bool phx__data_scan_find(phx__data_scan *scan);
/* For this process and those that it starts from now on; without memory for it each reads for itself. */
void phx__data_scan_keep(const phx__data_scan *scan);
#endif
