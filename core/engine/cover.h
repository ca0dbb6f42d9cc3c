/* core/engine/cover.h - is every element of the model handed over exactly once?  [main]
 *
 * What ranks hand over in parts (state, gradients for the norm, tickets) is counted per unit: the number of elements,
 * and a sum of the hashes of where parts end less those of where they begin.  The sums of all ranks are those of the
 * whole exactly when the parts are the whole, without gap and overlap; they are plain integers, so that any order of
 * ranks gives the same.  A handful of numbers per unit, whatever the model's size. */
#ifndef PHX__COVER_H
#define PHX__COVER_H
#include <phalanx/provider.h>
#include <stdbool.h>

typedef struct phx__cover_cell {
  int64_t elements, print;
} phx__cover_cell;

typedef struct phx__cover {
  const phx_model *model;
  uint32_t kinds;         /* counted apart: of state, weights and then each optimizer state; else 1 */
  bool logical;           /* only elements of parameters are counted, padding is passed over; else whole blocks */
  bool frozen;            /* frozen parameters are of kind 0, too; else there are none */
  size_t n;               /* cells */
  phx__cover_cell *cells; /* (kinds, PHX_FLATS, n_units) of this rank */
} phx__cover;

/* Then `logical` and `frozen` may be set. */
phx_status phx__cover_open(const phx_model *model, uint32_t kinds, phx__cover *out, phx_error *err);
void phx__cover_close(phx__cover *c);
void phx__cover_clear(phx__cover *c);
/* Elements [first, first + numel) of a unit's flat, which were checked before.  false: with these it is more than the
 * unit has, so this rank has handed over something twice. */
bool phx__cover_add(phx__cover *c, uint32_t kind, uint32_t unit, uint32_t flat, int64_t first, int64_t numel);
/* int64 words to all_reduce; phx__cover_words fills them, phx__cover_judge reads the sums. */
int64_t phx__cover_size(const phx__cover *c);
void phx__cover_words(const phx__cover *c, int64_t *words);
/* repeats: ranks may all hand over the same (replicas that all update), so that the whole may be there several times.
 * kind_names: (kinds) for the message; verb: "named".  The error's text has no subject: "named 0 of 8192 ...". */
phx_status phx__cover_judge(const phx__cover *c, const int64_t *sums, bool repeats, const char *const *kind_names,
                            const char *verb, phx_error *err);
#endif
