/* core/checkpoint/checkpoint_gone.h - for what reads without a lock: was the directory removed, or replaced, meanwhile?
 *
 * A run that goes on removes checkpoints ([checkpoint] keep), and a new one moves it aside.  What a reader finds then
 * is no damage.  [any] */
#ifndef PHX__CHECKPOINT_GONE_H
#define PHX__CHECKPOINT_GONE_H
#include <phalanx/base.h>
#include <stdbool.h>
#include <sys/types.h>

typedef struct phx__sighting {
  bool there;
  dev_t device;
  ino_t inode;
} phx__sighting;

/* Before anything in it is opened. */
phx__sighting phx__sighting_of(const char *dir);
/* It is not there, or another one has its name. */
bool phx__sighting_gone(const phx__sighting *seen, const char *dir);
/* PHX_IO where the directory is gone becomes PHX_INVALID, and says so; any other status stays. */
phx_status phx__sighting_explain(const phx__sighting *seen, const char *dir, phx_status status, phx_error *err);
#endif
