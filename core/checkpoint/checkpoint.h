/* core/checkpoint/checkpoint.h - a run's whole state on disk: committed or absent; loaded under any strategy and world
 * size.
 *
 * RUN/checkpoints/step-00000042/ holds rank-00000.safetensors, ... (the slices each rank owns) and manifest.json.  It
 * is written as RUN/checkpoints/.step-00000042.<nonce>.part and renamed when all of it is flushed, so a directory with
 * the final name is whole; RUN/checkpoints/latest holds that name.  Anything that ends in .part is of a dead attempt.
 *
 * A save is begin, write every slice, flush, commit (gather, publish, end).  begin, gather and end are
 * [main][collective]; the others may run in another thread (one at a time), while the state they read does not change:
 * that is core/checkpoint/saver.c.
 * Statuses: PHX_IO a file could not be written, or (loading) is damaged; PHX_INVALID it does not fit this run. */
#ifndef PHX__CHECKPOINT_H
#define PHX__CHECKPOINT_H
#include "checkpoint/checkpoint_dir.h"
#include "engine/runtime.h"

struct phx__manifest; /* manifest.h */

typedef struct phx__position { /* of the run, after a whole step */
  int64_t step;    /* updates made */
  int64_t samples; /* sequences consumed by them, all ranks together */
  int64_t skipped; /* of the steps, so many in a row up to this one were not finite */
} phx__position;

/* ---- saving ---- */
typedef struct phx__save phx__save;

/* [main][collective] Removes leftovers, makes the part directory and this rank's file, writes its header.  Nothing is
 * left behind on failure, which is the same on all ranks. */
phx_status phx__save_begin(phx__runtime *rt, const char *run_dir, const phx__position *at, phx__save **out,
                           phx_error *err);
/* Low-precision weights are left out: they are derived (phx__state_derived). */
/* This rank's slices, in the order of the file; stable until commit or abandon.  For map and unmap: they are the slices
 * of visit_state, in its order. */
size_t phx__save_n(const phx__save *save);
const phx_slice *phx__save_slice(const phx__save *save, size_t i);
int64_t phx__save_bytes(const phx__save *save); /* of this rank's file */
/* [any] Blocks [first, first + blocks) of slice i, counted from the slice's own first; data: their elements, as mapped.
 * Each block once; in order of i and first is cheapest (else checksums read back).  After a failure every later call
 * fails, too. */
phx_status phx__save_write(phx__save *save, size_t i, int64_t first, int64_t blocks, const void *data, phx_error *err);
/* [any] After the last block: the file is flushed and closed.  A failed flush is final. */
phx_status phx__save_flush(phx__save *save, phx_error *err);
int64_t phx__save_step(const phx__save *save);
/* [main] The caller's own failure (a slice that cannot be mapped) is this rank's part's; the first one counts. */
void phx__save_fail(phx__save *save, phx_status status, const phx_error *why);
/* The commit, in three parts.  Any rank's failure (not flushed included) is everybody's failure, with its message: the
 * part directory is removed and the checkpoints before stay.
 * gather [main][collective]: all ranks agree that they were flushed, and exchange their tables; on failure `save` is
 * freed.
 * publish [any]: rank 0 writes the manifest, renames, moves `latest` and removes what `retention` gives up; nothing on
 * the other ranks.  When it returns the checkpoint is there or is none; end tells whether.
 * end [main][collective]: all ranks learn what became of it; *most (or NULL): this rank's value in, the largest out.
 * Frees `save` in any case. */
phx_status phx__save_gather(phx__save *save, phx_error *err);
void phx__save_publish(phx__save *save, const phx__retention *retention);
phx_status phx__save_end(phx__save *save, int64_t *most, phx_error *err);
int64_t phx__save_all_bytes(const phx__save *save); /* of all ranks' files, after gather */
/* [main] Gives the save up without the other ranks (the job ends): closes, removes what this rank wrote unless it is
 * rank 0's to publish already; NULL is fine. */
void phx__save_abandon(phx__save *save);

/* [main][collective] All of the above at once.  bytes (or NULL): of all ranks' files. */
phx_status phx__checkpoint_save(phx__runtime *rt, const char *run_dir, const phx__position *at,
                                const phx__retention *retention, int64_t *bytes, phx_error *err);

/* Fills an empty manifest with what is known before any state is written: seeds, now, ranks, the optimizer and its
 * states, plugins, the model, the effective configuration. */
phx_status phx__checkpoint_describe(struct phx__manifest *m, const phx__prepared *prepared, int32_t ranks,
                                    phx_error *err);

/* ---- loading ---- */
typedef struct phx__resumed {
  phx__position at;
  char path[PHX__CHECKPOINT_PATH]; /* of the checkpoint */
} phx__resumed;
/* [main][collective] Fills the state from one checkpoint and tells the strategy.  Each rank streams only the ranges of
 * its own slices, through PHX__STREAM_MEMORY.  The same result on all ranks.  PHX_INVALID: it does not fit
 * (nothing was changed); PHX_IO: damaged, named by file (the state is then undefined: load another). */
phx_status phx__checkpoint_load(phx__runtime *rt, const char *path, phx__resumed *out, phx_error *err);
/* Pure: does the checkpoint fit this configuration (model, optimizer, data)?  PHX_INVALID says what differs. 
 * For the launcher, before any rank exists; phx__checkpoint_load asks the same. */
phx_status phx__checkpoint_fits(const char *path, const phx__prepared *prepared, phx__position *at, phx_error *err);
/* [main][collective] dir as in locate: loads that one, or the newest of the run that is whole; damaged ones are passed
 * over with a line on rank 0.  PHX_IO: none is left. */
phx_status phx__checkpoint_resume(phx__runtime *rt, const char *dir, phx__resumed *out, phx_error *err);
#endif
