/* core/command/memory_room.h - does the plan of all ranks here fit into the memory that this machine, and the cgroup,
 * have left?
 *
 * The kernel refuses nothing: it lets a run begin, and kills it, or another process, when the pages are touched.  Only
 * plans of devices whose memory is this machine's are compared.  [main] */
#ifndef PHX__MEMORY_ROOM_H
#define PHX__MEMORY_ROOM_H
#include "config/config.h"
#include "engine/prepare.h"

typedef struct phx__room {
  int64_t total;     /* of this machine, or what the cgroup allows; 0: not known */
  int64_t available; /* of it, with swap and the cache that the kernel gives back */
  bool of_cgroup;    /* the cgroup has less left than the machine */
} phx__room;

/* root: "" for this process, else see cgroup.h; there it holds proc/meminfo, too. */
void phx__room_read(const char *root, phx__room *out);
/* Refuses a plan that takes more than there is, with the smallest change of the configuration that fits: saves that do
 * not run in the background, fewer sequences at a time, fewer ranks; the sequences of a step stay as many.  With
 * run.overcommit it is only said.  All ranks are here. */
phx_status phx__room_check(const phx__config *config, const phx__room *room, phx_error *err);
/* The same for a rank that another launcher started, with `local_ranks` like it on this machine; without the advice. */
phx_status phx__room_check_rank(const phx__prepared *mine, const phx__room *room, int32_t local_ranks, phx_error *err);
/* What all ranks take and what is available, in a line; "" where nothing is compared. */
phx_status phx__room_say(const phx__config *config, const phx__room *room, char *out, size_t bytes, phx_error *err);
#endif
