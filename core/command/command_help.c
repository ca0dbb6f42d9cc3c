/* core/command/command_help.c - `phalanx help [NAME|PATH.so|--markdown] [FILE.ini]`: options from the tables, so that
 * they are never out of date. */
#include "base/complain.h"
#include "base/nearest.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/cli.h"
#include "command/commands.h"
#include "config/config.h"
#include "config/settings.h"
#include "plugin/config_load.h"
#include "plugin/loader.h"
#include "plugin/loader_search.h"

#include <string.h>

static void help_plugin(const phx__plugin *plugin) {
  const phx_plugin *d = plugin->descriptor;
  printf("%s %s %s: %s\n%s\n\n", phx__kind_name(d->kind), d->id, d->version, d->summary, plugin->path);
  phx__config_help(phx__plugin_section(d), d->options, d->n_options, d->option_stride, stdout);
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

/* All sections, and those of all plugins that are found: what docs/configuration.md holds. */
static int help_markdown(const phx__found *found, size_t n) {
  const phx__core_table *table;
  int exit_status = PHX__EXIT_OK;
  for (uint32_t i = 0; (table = phx__core_table_at(i)); i++) {
    printf("## [%s]\n\n", table->section);
    phx__config_markdown(table->options, table->n, sizeof(phx_option), stdout);
    printf("\n");
  }
  for (size_t i = 0; i < n; i++) {
    phx_error err = PHX_ERROR_INIT;
    const phx__plugin *plugin;
    if (found[i].shadowed) continue;
    if (phx__loader_open_file(found[i].kind, found[i].path, found[i].name, &plugin, &err)) {
      phx__complain("%s", err.message);
      exit_status = PHX__EXIT_REFUSED;
      continue;
    }
    const phx_plugin *d = plugin->descriptor;
    if (d->kind == PHX_KIND_MODEL) printf("## [model] with plugin = %s\n\n", d->id);
    else if (d->kind == PHX_KIND_OPTIMIZER) printf("## [optimizer] with name = %s\n\n", d->id);
    else printf("## [%s]\n\n", d->id);
    printf("The %s %s: %s\n\n", phx__kind_name(d->kind), d->id, d->summary);
    phx__config_markdown(d->options, d->n_options, d->option_stride, stdout);
    printf("\n");
  }
  return exit_status;
}

/* Every plugin of that name: kinds have names of their own. */
static int help_name(const char *name, const phx__found *found, size_t n) {
  const phx__core_table *table = phx__core_section(name);
  phx__nearest nearest = {.word = name};
  char hint[80];
  bool any = false, failed = false;
  if (table) {
    phx__config_help(name, table->options, table->n, sizeof(phx_option), stdout);
    if (strcmp(name, "model") == 0) printf("\n; a model's own options stand here too: phalanx help gpt\n");
    if (strcmp(name, "optimizer") == 0) printf("\n; an optimizer's own options stand here too: phalanx help adamw\n");
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

/* Only a strategy's file may have any name. */
static uint32_t kind_of_path(const char *path) {
  const char *file = strrchr(path, '/') + 1;
  return strncmp(file, "phx_optimizer_", 14) == 0 ? PHX_KIND_OPTIMIZER : PHX_KIND_STRATEGY;
}

/* NAME and FILE.ini, in either order; 0: refused. */
static int take(int argc, char **argv, const char **name, const char **file) {
  for (int i = 1; i < argc; i++) {
    const size_t length = strlen(argv[i]);
    const bool ini = length > 4 && strcmp(argv[i] + length - 4, ".ini") == 0;
    const char **place = ini ? file : name;
    if (*place || (argv[i][0] == '-' && strcmp(argv[i], "--markdown"))) {
      phx__complain("help takes a NAME, PATH.so or --markdown, and a FILE.ini whose [plugins] path is searched ('%s')",
                    argv[i]);
      return 0;
    }
    *place = argv[i];
  }
  return 1;
}

int phx__command_help(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin;
  const char *name = NULL, *file = NULL;
  char *search = NULL;
  phx__found *found = NULL;
  size_t n = 0;
  int exit_status = PHX__EXIT_REFUSED;
  if (!take(argc, argv, &name, &file)) return PHX__EXIT_REFUSED;
  if (file && phx__config_plugin_path(file, &search, &err) != PHX_OK) goto refused;
  if (name && strchr(name, '/')) {
    if (phx__loader_open(search, kind_of_path(name), name, &plugin, &err) != PHX_OK) goto refused;
    help_plugin(plugin);
    exit_status = PHX__EXIT_OK;
    goto done;
  }
  if (phx__loader_list(search, &found, &n, &err) != PHX_OK) goto refused;
  if (!name) exit_status = help_index(found, n);
  else if (strcmp(name, "--markdown") == 0) exit_status = help_markdown(found, n);
  else exit_status = help_name(name, found, n);
  goto done;
refused:
  phx__complain("%s", err.message);
done:
  phx__free(found);
  phx__free(search);
  return exit_status;
}
