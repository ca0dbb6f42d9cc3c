/* core/config/config.c - see config.h. */
#include "config/config.h"

#include "base/sys.h"
#include "config/config_store.h"

const char *phx__kind_name(uint32_t kind) {
  static const char *const names[] = {"unknown", "strategy", "device", "comm", "model"};
  return names[kind <= PHX_KIND_MODEL ? kind : 0];
}

void phx__config_free(phx__config *config) {
  if (!config) return;
  if (config->priv) phx__config_forget(config->priv);
  phx__free(config->priv);
  phx__free(config);
}
