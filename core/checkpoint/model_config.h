/* core/checkpoint/model_config.h - a configuration to open a model with, from what comes with its weights.  [main] */
#ifndef PHX__MODEL_CONFIG_H
#define PHX__MODEL_CONFIG_H
#include "checkpoint/model_source.h"
#include "config/config.h"
#include "config/config_store.h"

/* ini: the run's own configuration, or "": one is made of what a checkpoint's manifest says of [model], or of the sizes
 * in config.json.  `more` overrides.  What comes with data names plugins by their id.  Errors are printed to stderr,
 * too. */
phx_status phx__model_config(const phx__source *source, const char *ini, const phx__override *more, size_t n,
                             phx__config **out, phx_error *err);
#endif
