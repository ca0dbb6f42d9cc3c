/* core/checkpoint/checkpoint_gone.c - see checkpoint_gone.h.
 *
 * Invariant: a directory that stays where it was keeps its inode; a removal begins with another name, and so does a
 * move, so that whoever misses a file in it finds the directory gone. */
#include "checkpoint/checkpoint_gone.h"

#include <sys/stat.h>

#include "base/status.h"

phx__sighting phx__sighting_of(const char *dir) {
  struct stat st;
  if (stat(dir, &st)) return (phx__sighting){.there = false};
  return (phx__sighting){.there = true, .device = st.st_dev, .inode = st.st_ino};
}

bool phx__sighting_gone(const phx__sighting *seen, const char *dir) {
  const phx__sighting is = phx__sighting_of(dir);
  return !is.there || !seen->there || is.device != seen->device || is.inode != seen->inode;
}

phx_status phx__sighting_explain(const phx__sighting *seen, const char *dir, phx_status status, phx_error *err) {
  if (status != PHX_IO || !phx__sighting_gone(seen, dir)) return status;
  if (!seen->there) return phx_fail(err, PHX_INVALID, "%s is not there: name its run, or a newer checkpoint", dir);
  return phx_fail(err, PHX_INVALID,
                  "%s was removed meanwhile, or moved aside, by a run that goes on there ([checkpoint] keep says how "
                  "many stay): name its run, or a newer checkpoint", dir);
}
