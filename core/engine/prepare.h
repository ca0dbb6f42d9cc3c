/* core/engine/prepare.h - everything about a run that can be known before anything is allocated: the model's layout,
 * the strategy's layout and estimate, the memory and traffic plan.  Pure but for reading the data files'
 * headers.  [main]
 *
 * The launcher prepares once to refuse what does not fit; every rank prepares again for itself. */
#ifndef PHX__PREPARE_H
#define PHX__PREPARE_H
#include "engine/prepared.h"

/* Sums of squares that come from the device at once, at most: it is waited for each time. */
enum { PHX__NORM_BLOCKS = 65536 };

/* How much memory for copies a save in the background takes where `all` bytes of state are written and `copy` are
 * allowed (-1: all), and in what places: a place for each of all bytes, or so many of *chunk bytes. */
int64_t phx__copy_pool(int64_t copy, int64_t all, int64_t *chunk);
/* Is there a step, after `first`, whose save can go on beside another step? */
bool phx__saves_overlap(const phx__settings *s, int64_t first);

/* sequence and micro override the configuration when > 0 (sampling). */
phx_status phx__prepare(const phx__config *config, int32_t rank, int32_t size, int32_t local_rank, int32_t local_size,
                        int64_t micro, int64_t sequence, phx__prepared **out, phx_error *err);
void phx__prepared_free(phx__prepared *p);
#endif
