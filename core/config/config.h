/* core/config/config.h - the configuration of a run: defaults < file < --set, every value with its source.  [main]
 *
 * config_load.h makes it. */
#ifndef PHX__CONFIG_H
#define PHX__CONFIG_H
#include <phalanx/plugin.h>
#include <stdbool.h>
#include <stdio.h>

#include "config/settings.h"

/* A loaded plugin; see loader.h.  [static] */
typedef struct phx__plugin {
  const phx_plugin *descriptor;
  char path[4096];   /* real path */
  char sha256[65];   /* of the file, hex; "" until it is identified */
} phx__plugin;

typedef struct phx__selected {
  const phx__plugin *plugin;
  void *config; /* the plugin's own struct, filled from its table */
} phx__selected;

typedef struct phx__config {
  phx__settings s;
  phx__selected strategy, device, comm, model, optimizer;
  char device_why[256], comm_why[256]; /* what [device] and [comm] plugin = auto came to, and why; "": not auto */
  struct phx__config_private *priv;
} phx__config;

void phx__config_free(phx__config *config);
const char *phx__kind_name(uint32_t kind); /* "strategy", "device", "comm", "model", "optimizer" */
/* The section with a plugin's options: its id, but for kinds whose options join the core's keys. */
const char *phx__plugin_section(const phx_plugin *descriptor);
/* 64-bit hash of everything that must be equal on all ranks: values not PER_RANK, plugin ids, versions, file hashes. */
uint64_t phx__config_hash(const phx__config *config);
/* The effective configuration as an INI; sources: a comment behind each value says where it came from. */
void phx__config_print(const phx__config *config, FILE *out, bool sources);
/* Visits every effective value: for run.json. */
typedef void phx__config_fn(void *arg, const char *section, const char *key, const char *value, const char *source);
void phx__config_each(const phx__config *config, phx__config_fn *fn, void *arg);
/* Help of one plugin or core section: the options as a table, and a sample INI section. */
void phx__config_help(const char *section, const phx_option *options, uint32_t n, uint32_t stride, FILE *out);
/* The options as a table in Markdown, for docs/configuration.md. */
void phx__config_markdown(const phx_option *options, uint32_t n, uint32_t stride, FILE *out);
#endif
