/* core/engine/data.h - token files, and the deterministic order in which every rank reads its part of them.
 *
 * A file is llm.c's .bin (256 x int32 header: magic 20240520, version 1, token count; then uint16 tokens) or nanoGPT's
 * raw uint16.  A sample is a window of `sequence` tokens and its targets, one token later; windows do not overlap and
 * do not cross files.  [main] only. */
#ifndef PHX__DATA_H
#define PHX__DATA_H
#include <phalanx/base.h>
#include <stdbool.h>

#include "engine/data_scan.h"

#define PHX__TOKENS_MAGIC 20240520
#define PHX__TOKENS_VERSION 1
#define PHX__TOKENS_HEADER 1024 /* bytes */

typedef struct phx__data phx__data;

/* pattern: a file, or a glob; files in the order of their names.  A file of another format, or with a wrong length or
 * header, is refused.  Nothing is read but the beginning of each. */
phx_status phx__data_attach(const char *pattern, int64_t sequence, int64_t vocabulary, uint64_t seed, phx__data **out,
                            phx_error *err);
/* Goes through all tokens once, for about so many seconds (0: to the end): a token that is not below `vocabulary` is
 * refused, with the file's name and the offset.  Files that were read on this machine before are not read again. */
phx_status phx__data_read(phx__data *data, double seconds, phx_error *err);
int64_t phx__data_unread(const phx__data *data); /* bytes still to be read */
/* attach and read. */
phx_status phx__data_open(const char *pattern, int64_t sequence, int64_t vocabulary, uint64_t seed, phx__data **out,
                          phx_error *err);
void phx__data_close(phx__data *data); /* NULL is fine */
int64_t phx__data_files(const phx__data *data);
int64_t phx__data_tokens(const phx__data *data);
int64_t phx__data_windows(const phx__data *data); /* samples of an epoch */
int64_t phx__data_sequence(const phx__data *data);

typedef struct phx__data_file { /* [borrow:self] */
  const char *path;
  int64_t windows;
  bool read;                  /* by this process or another: the scan is complete */
  const phx__data_scan *scan;
} phx__data_file;
phx__data_file phx__data_file_at(const phx__data *data, int64_t i);

/* Refuses, with the arithmetic, data that has fewer samples than one step takes. */
phx_status phx__data_check_batch(const phx__data *data, int64_t micro, int32_t accumulate, int32_t data_size,
                                 phx_error *err);
/* Micro-batch `micro_index` of this data rank in a step that begins with sample `first` (from 0): tokens and targets
 * (micro, sequence).  The step takes samples [first, first + G) of the shuffled, endlessly repeated epochs, G = micro *
 * accumulate * data_size; so its samples depend on first and G only, not on how ranks and micro-batches divide it. */
phx_status phx__data_batch(const phx__data *data, int64_t first, int32_t micro_index, int32_t accumulate,
                           int32_t data_rank, int32_t data_size, int64_t micro, int32_t *tokens, int32_t *targets,
                           phx_error *err);
/* One window, counted in file order: `sequence` tokens and targets.  Past the end: PHX_INVALID. */
phx_status phx__data_window(const phx__data *data, int64_t window, int32_t *tokens, int32_t *targets, phx_error *err);
/* The i-th sample of an epoch, 0 <= i < windows: a permutation of the windows. */
int64_t phx__data_order(const phx__data *data, int64_t epoch, int64_t i);
#endif
