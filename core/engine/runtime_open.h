/* core/engine/runtime_open.h - opens and closes what a rank needs to train.  [main]
 *
 * Opened in the order device, communicators, model, optimizer, strategy; closed in reverse.  The ranks have agreed on
 * the configuration before (train.c). */
#ifndef PHX__RUNTIME_OPEN_H
#define PHX__RUNTIME_OPEN_H
#include "engine/runtime.h"

/* Takes prepared over (freed by close, also on failure). */
phx_status phx__runtime_open(const phx__config *config, const phx_job *job, phx__prepared *prepared,
                             phx__runtime **out, phx_error *err);
void phx__runtime_close(phx__runtime *rt);

/* Bytes of this process on the device as its driver counts them; -1: it does not say. */
int64_t phx__driver_bytes(const phx__runtime *rt);
#endif
