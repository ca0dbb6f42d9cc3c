/* core/checkpoint_dir.h - the directory of a run's checkpoints, for checkpoint*.c and train.c; see checkpoint.h. */
#ifndef PHX__CHECKPOINT_DIR_H
#define PHX__CHECKPOINT_DIR_H
#include "checkpoint.h"

#define PHX__CHECKPOINTS "checkpoints" /* in the run's directory */

void phx__checkpoint_name(int64_t step, char name[PHX__CHECKPOINT_NAME]); /* "step-00000042" */
phx_status phx__path_join(char path[PHX__CHECKPOINT_PATH], const char *dir, const char *name, phx_error *err);
phx_status phx__dir_make(const char *path, phx_error *err); /* one that exists is fine */
phx_status phx__dir_flush(const char *path, phx_error *err);
/* `latest`, replaced by rename. */
phx_status phx__checkpoint_point(const char *run_dir, int64_t step, phx_error *err);
/* One checkpoint is removed, by way of a .part name. */
phx_status phx__checkpoint_retire(const char *run_dir, int64_t step, phx_error *err);
/* Checkpoints of later steps than the one a run goes on from belong to another future (or are damaged): they are
 * renamed to aside-NNNNNNNN.K, with a line each, so that the newest step is always of this run's own past. */
phx_status phx__checkpoint_set_aside(const char *run_dir, int64_t above, phx_error *err);
#endif
