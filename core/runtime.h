/* core/runtime.h - a rank with everything open: device, communicators, model, optimizer, strategy.  [main]
 *
 * Opened in this order, closed in reverse.  The ranks have agreed on the configuration before (train.c). */
#ifndef PHX__RUNTIME_H
#define PHX__RUNTIME_H
#include "cover.h"
#include "host.h"
#include "job.h"
#include "optim.h"
#include "prepare.h"
#include "state_hash.h"

typedef struct phx__runtime {
  const phx__config *config;
  const phx_job *job;
  phx__prepared *prepared;
  phx__memory_book book;
  phx__host core_host, device_host, comm_host, model_host, strategy_host;
  phx_device_self *device_self;
  const phx_device *device;
  const phx_ops *ops;
  void *chunk;     /* pinned, PHX__STATE_CHUNK bytes; NULL where the CPU can read the device's memory */
  phx_comm *world; /* the strategy's */
  phx_comm *core;  /* the core's own order: losses, norms, hashes */
  phx__optim optim;
  phx_model_self *model;
  phx_strategy *strategy;
  phx__cover state_cover; /* what the last visit of the state named */
  int64_t *state_words;   /* its sums over the ranks */
} phx__runtime;

/* Takes prepared over (freed by close, also on failure). */
phx_status phx__runtime_open(const phx__config *config, const phx_job *job, phx__prepared *prepared,
                             phx__runtime **out, phx_error *err);
void phx__runtime_close(phx__runtime *rt);

/* [collective] every slice gets its initial values: weights from the counter-based generator, states zero. */
phx_status phx__runtime_initialise(phx__runtime *rt, phx_error *err);
/* Bytes of this process on the device as its driver counts them; -1: it does not say. */
int64_t phx__driver_bytes(const phx__runtime *rt);
/* [collective] the hash of the whole training state. */
phx_status phx__runtime_state_hash(phx__runtime *rt, phx__state_hash *out, phx_error *err);
/* Initial values of logical elements [in_param, in_param + numel) of a parameter. */
void phx__initial_values(const phx_param *p, uint64_t seed, int64_t in_param, int64_t numel, float *out);
#endif
