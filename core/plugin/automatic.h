/* core/plugin/automatic.h - what [device] and [comm] plugin = auto come to: the plugin with the highest preference that
 * it states of itself, among those that can run here.  [main] */
#ifndef PHX__AUTOMATIC_H
#define PHX__AUTOMATIC_H
#include <stdbool.h>

#include "config/config.h"
#include "plugin/loader_search.h"

typedef struct phx__automatic {
  const phx__found *found; /* (n) everything that is installed */
  size_t n;
  const phx__config *config; /* for a communicator: with the device that is chosen; device.plugin NULL: refused */
  char why[256];             /* out: "cpu: cuda cannot run here: ..."; the reason alone where there is none */
  bool no_memory;            /* out: a plugin could not be looked at, so that nothing is chosen */
} phx__automatic;

/* The plugin's id [static]; NULL: none, and `why` says why. */
const char *phx__automatic_choose(phx__automatic *a, uint32_t kind);
#endif
