/* core/command/train_check.h - what a run needs, checked before a process is started.  [main] */
#ifndef PHX__TRAIN_CHECK_H
#define PHX__TRAIN_CHECK_H
#include "config/config.h"

/* Refuses what does not fit (model, batch, strategy's estimate, data, memory, disk) for every rank. */
phx_status phx__train_check(const phx__config *config, phx_error *err);
#endif
