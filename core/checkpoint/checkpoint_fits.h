/* core/checkpoint/checkpoint_fits.h - may this run go on from that checkpoint?  [main] */
#ifndef PHX__CHECKPOINT_FITS_H
#define PHX__CHECKPOINT_FITS_H
#include <stdbool.h>

#include "checkpoint/manifest.h"
#include "engine/prepare.h"

typedef struct phx__fit {
  bool restart;         /* the order of the data begins anew (data.on_change), because of: */
  char difference[512];
} phx__fit;

/* PHX_INVALID says what does not fit: the model's parameters, what it computes, the optimizer, the data and their
 * order, the number of steps.  prepared->train is the data of this run; contents that this rank does not know are not
 * compared. */
phx_status phx__manifest_fits(const char *path, const phx__manifest *m, const phx__prepared *prepared, phx__fit *fit,
                              phx_error *err);
/* Are the states of the optimizer those that the run's optimizer has? */
bool phx__manifest_same_optimizer(const phx__manifest *m, const phx__prepared *prepared);
#endif
