/* core/checkpoint/checkpoint_resolve.h - the checkpoint that a path stands for.  [main] */
#ifndef PHX__CHECKPOINT_RESOLVE_H
#define PHX__CHECKPOINT_RESOLVE_H
#include "checkpoint/checkpoint_gone.h"
#include "checkpoint/elements.h"

bool phx__is_there(const char *dir, const char *name);
bool phx__is_checkpoint(const char *path); /* a directory with a manifest */
bool phx__is_step_name(const char *name);  /* "step-00000042" */
bool phx__has_checkpoints(const char *run); /* `latest`, or any directory of a checkpoint's name */
/* A checkpoint's directory: path itself, or the latest one of the run that path is; where no file says which that is,
 * the newest whole one, which is told. */
phx_status phx__checkpoint_resolve(const char *path, char out[PHX__TOOL_PATH], phx_error *err);

/* resolve, and opens it; where the run that path is has removed it in between, its next latest one. */
phx_status phx__checkpoint_resolve_open(const char *path, char out[PHX__TOOL_PATH], phx__sighting *seen,
                                        phx__checkpoint_reader **reader, phx_error *err);
#endif
