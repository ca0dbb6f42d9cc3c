/* core/engine/layout.h - canonical coordinates: the host's copy of a model's declaration, with offsets and
 * blocks.  [main] */
#ifndef PHX__LAYOUT_H
#define PHX__LAYOUT_H
#include <phalanx/provider.h>

/* Copies the model plugin's declaration and fills numel, offset, blocks, first_block, PHX_USE_LAST and the totals.
 * Refuses what is inconsistent (names twice, sizes that overflow, uses out of range).  Freed with phx__layout_free. */
phx_status phx__layout_build(const phx_model *declared, phx_model **out, phx_error *err);
void phx__layout_free(phx_model *model);

/* Logical (not padding) ranges of a unit's flat, in order. */
typedef struct phx__range {
  int64_t first, numel;    /* elements of the flat */
  int64_t in_param;        /* the parameter's element at `first` */
  const phx_param *param;
  uint32_t next;           /* iteration state; zero-filled to begin */
} phx__range;
/* The next logical range inside [first, first + numel); 0 when there is none. */
int phx__layout_next(const phx_model *model, uint32_t unit, uint32_t flat, int64_t first, int64_t numel,
                     phx__range *range);
int64_t phx__layout_parameters(const phx_model *model); /* logical elements, all flats */
#endif
