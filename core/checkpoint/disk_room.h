/* core/checkpoint/disk_room.h - is there room on the disk for what a run is going to save?  [main] */
#ifndef PHX__DISK_ROOM_H
#define PHX__DISK_ROOM_H
#include "engine/prepared.h"

/* Bytes of a checkpoint of all ranks together, without a strategy's private state, which nobody knows before. */
int64_t phx__checkpoint_bytes(const phx__prepared *p);
/* PHX_IO: the file system of `dir`, or of the nearest directory above that is there, has less than `bytes` free; what:
 * needs them.  One that does not say (no blocks at all) has room. */
phx_status phx__disk_room_for(const char *dir, int64_t bytes, const char *what, phx_error *err);
/* Before anything is made: room for the final weights and, with checkpoint.every > 0, for a checkpoint.  Leftovers of
 * dead saves count as free, since the next save removes them. */
phx_status phx__disk_room_at_start(const phx__prepared *p, phx_error *err);
#endif
