/* core/checkpoint/weights.h - a run's final weights as files that other tools load, and filling a run from such.
 * [main] [collective]
 *
 * A GPT-2 becomes model.safetensors and config.json as gpt2.h says, so that a run's directory is a folder that
 * `checkpoint` and Hugging Face's from_pretrained take; any other model one model.safetensors with its own names and
 * shapes.  Every rank writes the slices it owns, at their place in the file; no rank holds the whole model. */
#ifndef PHX__WEIGHTS_H
#define PHX__WEIGHTS_H
#include "checkpoint/model_source.h"
#include "engine/runtime.h"

/* DIR/model.safetensors beside the target, flushed, then renamed by rank 0; config.json before it.  step: of the
 * weights, told in the file. */
phx_status phx__weights_write(phx__runtime *rt, const char *dir, int64_t step, phx_error *err);
/* Fills the weights (optimizer states become zero) and tells the strategy.  Parameters must match in name and shape;
 * source is read as it says (finite). */
phx_status phx__weights_fill(phx__runtime *rt, phx__source *source, phx_error *err);
#endif
