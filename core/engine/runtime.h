/* core/engine/runtime.h - a rank with everything open: device, communicators, model, optimizer, strategy.  [main]
 *
 * runtime_open.h opens and closes it. */
#ifndef PHX__RUNTIME_H
#define PHX__RUNTIME_H
#include <phalanx/job.h>

#include "engine/cover.h"
#include "engine/optim.h"
#include "engine/prepared.h"
#include "engine/state_hash.h"
#include "plugin/host.h"

typedef struct phx__runtime {
  const phx__config *config;
  const phx_job *job;
  phx__prepared *prepared;
  phx__memory_book book;
  phx__host core_host, device_host, comm_host, model_host, optimizer_host, strategy_host;
  phx_device_self *device_self;
  const phx_device *device;
  const phx_ops *ops;
  void *chunk;     /* pinned, PHX__STATE_CHUNK bytes; NULL where the CPU can read the device's memory */
  phx_comm *world; /* the strategy's */
  phx_comm *core;  /* the core's own order: losses, norms, hashes */
  phx_model_self *model;
  phx_optimizer_self *optimizer;
  phx__optim optim;
  phx_strategy *strategy;
  phx__cover state_cover; /* what the last visit of the state named */
  int64_t *state_words;   /* its sums over the ranks */
} phx__runtime;
#endif
