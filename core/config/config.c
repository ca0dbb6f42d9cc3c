/* core/config/config.c - see config.h. */
#include "config/config.h"

#include "base/sys.h"
#include "config/config_store.h"

const char *phx__kind_name(uint32_t kind) {
  static const char *const names[] = {"unknown", "strategy", "device", "comm", "model", "optimizer"};
  return names[kind <= PHX_KIND_OPTIMIZER ? kind : 0];
}

const char *phx__plugin_section(const phx_plugin *d) {
  const bool joins = d->kind == PHX_KIND_MODEL || d->kind == PHX_KIND_OPTIMIZER;
  return joins ? phx__kind_name(d->kind) : d->id;
}

void phx__config_free(phx__config *config) {
  if (!config) return;
  if (config->priv) phx__config_forget(config->priv);
  phx__free(config->priv);
  phx__free(config);
}
