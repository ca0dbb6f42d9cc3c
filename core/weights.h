/* core/weights.h - a run's weights as one safetensors file.  [main] [collective]
 *
 * Every rank writes and reads the slices it owns, at their place in the file; no rank holds the whole model. */
#ifndef PHX__WEIGHTS_H
#define PHX__WEIGHTS_H
#include "runtime.h"

/* Beside the target, flushed, then renamed by rank 0. */
phx_status phx__weights_write(phx__runtime *rt, const char *path, phx_error *err);
/* Fills the weights (optimizer states become zero) and tells the strategy.  Tensors must match name and shape. */
phx_status phx__weights_read(phx__runtime *rt, const char *path, phx_error *err);
#endif
