/* core/checkpoint/checkpoint_dir.h - the directory of a run's checkpoints: plain file system work, no run needed. */
#ifndef PHX__CHECKPOINT_DIR_H
#define PHX__CHECKPOINT_DIR_H
#include <phalanx/base.h>
#include <stdbool.h>

enum { PHX__CHECKPOINT_NAME = 32, PHX__CHECKPOINT_PATH = 4096 };

#define PHX__CHECKPOINTS "checkpoints" /* in the run's directory */

typedef struct phx__retention {
  int64_t keep;       /* this many newest stay; 0: all */
  int64_t keep_every; /* steps that are a multiple of this stay, too; 0: none */
} phx__retention;

typedef struct phx__checkpoint_list {
  int64_t *steps; /* (n) newest first */
  size_t n;
} phx__checkpoint_list;
/* The committed checkpoints of a run, by name; none is no error.  Freed with phx__checkpoint_list_free. */
phx_status phx__checkpoint_list_read(const char *run_dir, phx__checkpoint_list *out, phx_error *err);
void phx__checkpoint_list_free(phx__checkpoint_list *list);
/* run_dir/checkpoints/step-00000042 */
phx_status phx__checkpoint_path(const char *run_dir, int64_t step, char path[PHX__CHECKPOINT_PATH], phx_error *err);
/* dir: a run directory, or one checkpoint in it (*step -1, or its step).  run_dir is "" for a checkpoint that lies in
 * no run's directory. */
phx_status phx__checkpoint_locate(const char *dir, char run_dir[PHX__CHECKPOINT_PATH], int64_t *step, phx_error *err);
/* The newest one below step `below` whose manifest is whole and whose files have its lengths (contents are verified
 * as they are read); what is passed over is said in the log.  PHX_IO: none is left; *found false, PHX_OK: there are
 * none at all. */
phx_status phx__checkpoint_newest(const char *run_dir, int64_t below, int64_t *step, bool *found, phx_error *err);
/* Removes what a retention gives up: renamed to a .part first, so that no half checkpoint is ever seen. */
phx_status phx__checkpoint_retain(const char *run_dir, const phx__retention *retention, phx_error *err);
/* Removes the leftovers of dead attempts; *removed counts them (may be NULL).  Not while a save is in flight. */
phx_status phx__checkpoint_sweep(const char *run_dir, int64_t *removed, phx_error *err);
/* Removes a directory of files, without following links. */
phx_status phx__checkpoint_remove(const char *path, phx_error *err);

/* ---- for checkpoint*.c and train.c ---- */
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
