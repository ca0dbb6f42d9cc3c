/* core/command_help.c - `phalanx help [NAME|PATH.so]`: options from the tables, so that they cannot be out of date. */
#include "cli.h"
#include "commands.h"
#include "complain.h"
#include "config_core.h"
#include "nearest.h"
#include "status.h"
#include "sys.h"

#include <string.h>

static void help_plugin(const phx__plugin *plugin) {
  const phx_plugin *d = plugin->descriptor;
  const char *section = d->kind == PHX_KIND_MODEL ? "model" : d->id;
  printf("%s %s %s: %s\n%s\n\n", phx__kind_name(d->kind), d->id, d->version, d->summary, plugin->path);
  phx__config_help(section, d->options, d->n_options, d->option_stride, stdout);
}

static int help_index(const phx__found *found, size_t n) {
  const phx__core_table *table;
  printf("phalanx help NAME: options of a section or of a plugin.  phalanx --help: the commands.\n\nSections:");
  for (uint32_t i = 0; (table = phx__core_table_at(i)); i++) printf(" %s", table->section);
  printf("\nPlugins:");
  for (size_t i = 0; i < n; i++)
    if (!found[i].shadowed) printf(" %s (%s)", found[i].name, phx__kind_name(found[i].kind));
  printf("%s\n", n ? "" : " none found");
  return PHX__EXIT_OK;
}

/* Every plugin of that name: kinds have names of their own. */
static int help_name(const char *name, const phx__found *found, size_t n) {
  const phx__core_table *table = phx__core_section(name);
  phx__nearest nearest = {.word = name};
  char hint[80];
  bool any = false, failed = false;
  if (table) {
    phx__config_help(name, table->options, table->n, sizeof(phx_option), stdout);
    if (strcmp(name, "model") == 0) printf("\nA model's own options stand here too: phalanx help gpt\n");
    return PHX__EXIT_OK;
  }
  for (size_t i = 0; i < n; i++) {
    phx_error err = PHX_ERROR_INIT;
    const phx__plugin *plugin;
    phx__nearest_offer(&nearest, found[i].name);
    if (found[i].shadowed || strcmp(found[i].name, name) != 0) continue;
    if (any) printf("\n");
    any = true;
    if (phx__loader_open_file(found[i].kind, found[i].path, name, &plugin, &err) == PHX_OK) {
      help_plugin(plugin);
    } else {
      failed = true;
      phx__complain("%s", err.message);
    }
  }
  if (any) return failed ? PHX__EXIT_REFUSED : PHX__EXIT_OK;
  for (uint32_t i = 0; (table = phx__core_table_at(i)); i++) phx__nearest_offer(&nearest, table->section);
  phx__complain("there is no section or plugin '%s'%s", name,
          phx__nearest_hint(&nearest, hint, sizeof hint));
  return PHX__EXIT_REFUSED;
}

int phx__command_help(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin;
  phx__found *found = NULL;
  size_t n = 0;
  int exit_status = PHX__EXIT_REFUSED;
  if (argc > 2) {
    phx__complain("help takes one NAME");
    return PHX__EXIT_REFUSED;
  }
  if (argc == 2 && strchr(argv[1], '/')) {
    if (phx__loader_open(NULL, PHX_KIND_STRATEGY, argv[1], &plugin, &err) != PHX_OK) goto refused;
    help_plugin(plugin);
    return PHX__EXIT_OK;
  }
  if (phx__loader_list(NULL, &found, &n, &err) != PHX_OK) goto refused;
  exit_status = argc == 1 ? help_index(found, n) : help_name(argv[1], found, n);
  phx__free(found);
  return exit_status;
refused:
  phx__complain("%s", err.message);
  return exit_status;
}
