/* plugin_file.c - see plugin_file.h.  Options are parsed by the core's own parser.  One thread. */
#include "plugin_file.h"
#include <dlfcn.h>
#include <string.h>
#include "config/option.h"
#include "base/status.h"

const phx_plugin *plugin_file_open(const char *path, phx_error *err) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void *symbol = library ? dlsym(library, PHX_ENTRY_SYMBOL) : NULL;
  phx_plugin_entry *entry;
  if (!symbol) {
    phx_fail(err, PHX_INVALID, "%s: %s", path, dlerror());
    return NULL;
  }
  memcpy(&entry, &symbol, sizeof entry);
  return entry();
}

static phx_status set(const phx_option *option, const char *text, void *config, phx_error *err) {
  phx__value value;
  char why[400];
  if (!phx__option_parse(option, text, &value, why, sizeof why))
    return phx_fail(err, PHX_INVALID, "%s = %s: %s", option->name, text, why);
  phx__option_store(option, value, config);
  return PHX_OK;
}

phx_status plugin_file_config(const phx_plugin *plugin, char *text, void *config, phx_error *err) {
  for (uint32_t i = 0; i < plugin->n_options; i++) {
    const phx_option *option = phx__option_at(plugin->options, plugin->option_stride, i);
    if (option->dflt) PHX_TRY(set(option, option->dflt, config, err));
  }
  for (char *save = NULL, *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
    char *value = strchr(word, '=');
    const phx_option *found = NULL;
    if (value) *value++ = 0;
    for (uint32_t i = 0; i < plugin->n_options; i++) {
      const phx_option *option = phx__option_at(plugin->options, plugin->option_stride, i);
      if (strcmp(option->name, word) == 0) found = option;
    }
    if (!found || !value) return phx_fail(err, PHX_INVALID, "unknown option %s", word);
    PHX_TRY(set(found, value, config, err));
  }
  return PHX_OK;
}
