/* core/plugin/config_load.c - from an INI file and overrides to a checked phx__config with its plugins.
 *
 * Order: entries of the file and the overrides; the core's sections; plugins by [run] strategy, [device], [comm],
 * [model] plugin, [optimizer] name; their sections; sections, and keys of [optimizer], of plugins that are installed
 * and not selected (validated all the same, so that one file can hold every strategy's); what is left is unknown;
 * checks across settings.  Every problem is kept and all are reported together.  Does not open data and creates
 * nothing.
 * Invariant: *out is set only when there is no error.  [main] only. */
#include "plugin/config_load.h"

#include "base/nearest.h"
#include "base/status.h"
#include "base/sys.h"
#include "config/config_checks.h"
#include "plugin/automatic.h"
#include "plugin/descriptor.h"
#include "plugin/loader.h"
#include "plugin/loader_search.h"

#include <phalanx/provider.h>
#include <stdio.h>
#include <string.h>

typedef struct phx__config_private store;

/* Plugins of the source tree, which a build may lack (no toolkit): their sections may stand in a file anyway.  The
 * build gives the list. */
static const char *const house[] = {PHX__TREE_PLUGINS};

typedef struct loading {
  phx__config *config;
  const char *search;        /* [plugins] path or NULL */
  phx__found *found;
  size_t n_found;
  const char *excused[12];   /* sections whose keys cannot be judged, because their plugin was refused */
  size_t n_excused;
  bool found_file;           /* the file comes with data: phx__config_load_found */
  bool strategy_unknown;     /* a strategy's path was refused, so its section's name is not known */
} loading;

static void add_core_sections(phx__config *config) {
  const phx__core_table *table;
  for (uint32_t i = 0; (table = phx__core_table_at(i)); i++)
    phx__config_add_section(config->priv, table->section, table->options, table->n, sizeof(phx_option), &config->s,
                            NULL, true);
}

/* Somebody else may have written the file, and put the plugin beside it: unpacked, both are the user's own. */
static bool comes_with_data(const loading *l, const phx__setting *s) {
  return l->found_file && s->entry && !s->entry->flag;
}

/* [plugins] of a file that comes with data, unless the user pins what may be loaded. */
static void judge_paths(loading *l) {
  phx__settings *s = &l->config->s;
  store *p = l->config->priv;
  phx_error err = PHX_ERROR_INIT;
  phx__setting *path = phx__config_setting(p, "plugins", "path"), *pin = phx__config_setting(p, "plugins", "pin");
  if (comes_with_data(l, pin)) pin->value.s = s->plugins.pin = "";
  if (comes_with_data(l, path) && *s->plugins.path && !*s->plugins.pin) {
    phx__config_warn(p, path->entry,
                     "[plugins] path = %s is not followed: this file comes with a run.  Where its plugins are needed "
                     "and trusted, give it yourself: --set plugins.path, or PHALANX_PLUGIN_PATH",
                     s->plugins.path);
    path->value.s = s->plugins.path = "";
  }
  const char *const files[PHX__GUARDED_FILES] = {strchr(s->run.strategy, '/') ? s->run.strategy : NULL,
                                                 strchr(s->optimizer.name, '/') ? s->optimizer.name : NULL};
  if (phx__loader_guard(s->plugins.path, files, s->plugins.pin, &err))
    phx__config_error(p, pin->entry, "%s", err.message);
}

/* false: it is not known which plugins there are, so nothing can be said about their sections. */
static bool list_plugins(loading *l) {
  store *p = l->config->priv;
  phx_error err = PHX_ERROR_INIT;
  const phx__setting *path = phx__config_setting(p, "plugins", "path");
  if (*l->config->s.plugins.path) l->search = l->config->s.plugins.path;
  if (path->bad) l->search = NULL;
  if (phx__loader_list(l->search, &l->found, &l->n_found, &err) == PHX_OK) return true;
  phx__config_error(p, l->search ? path->entry : NULL, "%s", err.message);
  l->strategy_unknown = true;
  l->excused[l->n_excused++] = "model";
  l->excused[l->n_excused++] = "optimizer";
  return false;
}

static void warn_shadowed(loading *l, const phx__plugin *plugin, const phx__entry *at) {
  const phx_plugin *d = plugin->descriptor;
  for (size_t i = 0; i < l->n_found; i++)
    if (l->found[i].shadowed && l->found[i].kind == d->kind && strcmp(l->found[i].name, d->id) == 0)
      phx__config_warn(l->config->priv, at, "%s %s is loaded from %s; %s is not used", phx__kind_name(d->kind), d->id,
                       plugin->path, l->found[i].path);
}

/* Do the options of this kind join a section of the core's? */
static bool joins_core(uint32_t kind) { return kind == PHX_KIND_MODEL || kind == PHX_KIND_OPTIMIZER; }

/* The plugin's own options, under its id; a model's stand in [model], an optimizer's in [optimizer]. */
static void *add_plugin_section(loading *l, const phx__plugin *plugin, bool selected) {
  const phx_plugin *d = plugin->descriptor;
  void *base = phx__config_keep(l->config->priv, d->config_size);
  if (!base) return NULL;
  phx__config_add_section(l->config->priv, phx__plugin_section(d), d->options, d->n_options, d->option_stride, base,
                          plugin, selected);
  return base;
}

/* What `auto` comes to; NULL: it was complained about. */
static const char *choose(loading *l, uint32_t kind, const phx__setting *setting, char *why, size_t size) {
  phx__automatic a = {.found = l->found, .n = l->n_found, .config = l->config};
  const char *id = phx__automatic_choose(&a, kind);
  snprintf(why, size, "%s", id ? a.why : "");
  if (!id)
    phx__config_error(l->config->priv, setting->entry, "[%s] plugin = auto: no installed plugin can be taken: %s",
                      phx__kind_name(kind), a.why);
  return id;
}

/* [run] deterministic = auto: yes where the device promises it without being asked. */
static void resolve_deterministic(loading *l) {
  enum { AUTO = 2 };
  phx__config *c = l->config;
  phx__setting *setting = phx__config_setting(c->priv, "run", "deterministic");
  if (setting->bad || c->s.run.deterministic != AUTO) return;
  const phx_plugin *device = c->device.plugin ? c->device.plugin->descriptor : NULL;
  const bool yes = !device || (device->provides & PHX_CAP_DETERMINISTIC);
  setting->was_auto = true;
  setting->value.i = c->s.run.deterministic = yes;
  if (!yes)
    phx__config_warn(
        c->priv, setting->entry,
        "[run] deterministic = auto comes to no on device %s: runs may differ in their last bits; yes makes "
        "them equal, and slower",
        device->id);
}

/* `wish` is the text of section.key; what `auto` comes to is stored back into it, and the reason into why (NULL: there
 * is no auto). */
static void select_plugin(loading *l, uint32_t kind, const char *section, const char *key, char *why, size_t why_bytes,
                          const char **wish, phx__selected *out) {
  store *p = l->config->priv;
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin = NULL;
  phx__setting *setting = phx__config_setting(p, section, key);
  if (setting->bad) goto refused;
  if (strchr(*wish, '/') && comes_with_data(l, setting) && !*l->config->s.plugins.pin) {
    phx__config_error(p, setting->entry,
                      "[%s] %s = %s names code by its path, and this file comes with a run.  If you trust it: "
                      "--set %s.%s=%s, or its SHA-256 in plugins.pin", section, key, *wish, section, key, *wish);
    goto refused;
  }
  if (why && strcmp(*wish, "auto") == 0) {
    const char *id = choose(l, kind, setting, why, why_bytes);
    if (!id) goto refused;
    setting->was_auto = true;
    setting->value.s = *wish = id;
  }
  if (phx__loader_open(l->search, kind, *wish, &plugin, &err) != PHX_OK) {
    phx__config_error(p, setting->entry, "[%s] %s: %s", section, key, err.message);
    goto refused;
  }
  if (phx__descriptor_probe(plugin->descriptor, &err) != PHX_OK) {
    phx__config_error(p, setting->entry, "[%s] %s = %s cannot run here: %s", section, key, *wish, err.message);
    goto refused;
  }
  if (!strchr(*wish, '/')) warn_shadowed(l, plugin, setting->entry);
  const phx__section *twin = phx__config_section(p, plugin->descriptor->id, NULL);
  if (twin && !joins_core(kind))
    phx__config_error(p, setting->entry, "[%s] %s: %s and %s have the same id '%s', hence the same section", section,
                      key, plugin->path, twin->plugin ? twin->plugin->path : "the core", plugin->descriptor->id);
  out->plugin = plugin;
  out->config = add_plugin_section(l, plugin, true);
  return;
refused:
  if (kind == PHX_KIND_STRATEGY && strchr(*wish, '/')) l->strategy_unknown = true;
  l->excused[l->n_excused++] = joins_core(kind) ? section : *wish;
}

static const phx__found *find_installed(const loading *l, const char *name) {
  for (size_t i = 0; i < l->n_found; i++)
    if (strcmp(l->found[i].name, name) == 0) return &l->found[i];
  return NULL;
}

static void take_entries(store *p, const char *section) {
  for (phx__entry *e = p->entries; e; e = e->next)
    if (strcmp(e->section, section) == 0) e->taken = true;
}

static void unknown_section(loading *l, const char *name, const phx__entry *at) {
  char hint[80];
  phx__nearest nearest = {.word = name};
  take_entries(l->config->priv, name);
  for (size_t i = 0; i < l->n_excused; i++)
    if (strcmp(l->excused[i], name) == 0) return;
  if (l->strategy_unknown) return;
  for (size_t i = 0; i < sizeof house / sizeof house[0]; i++)
    if (strcmp(name, house[i]) == 0) {
      phx__config_warn(l->config->priv, at, "[%s] is not checked: no plugin of that name is installed", name);
      return;
    }
  for (uint32_t i = 0; phx__core_table_at(i); i++) phx__nearest_offer(&nearest, phx__core_table_at(i)->section);
  for (const phx__section *s = l->config->priv->sections; s; s = s->next) phx__nearest_offer(&nearest, s->name);
  for (size_t i = 0; i < l->n_found; i++)
    if (!joins_core(l->found[i].kind)) phx__nearest_offer(&nearest, l->found[i].name);
  phx__config_error(l->config->priv, at, "there is no section [%s], in the core or of an installed plugin%s", name,
                    phx__nearest_hint(&nearest, hint, sizeof hint));
}

/* A section that nothing selected asks for: of an installed plugin, or unknown. */
static void judge_section(loading *l, const char *name, const phx__entry *at) {
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin;
  if (phx__config_section(l->config->priv, name, NULL)) return;
  const phx__found *found = find_installed(l, name);
  if (!found) {
    unknown_section(l, name, at);
    return;
  }
  if (joins_core(found->kind)) {
    const char *kind = phx__kind_name(found->kind);
    take_entries(l->config->priv, name);
    phx__config_error(l->config->priv, at, "the options of %s %s stand in [%s], not in [%s]", kind, name, kind, name);
  } else if (phx__loader_open_file(found->kind, found->path, found->name, &plugin, &err) == PHX_OK) {
    add_plugin_section(l, plugin, false);
  } else {
    take_entries(l->config->priv, name);
    phx__config_error(l->config->priv, at, "[%s]: %s", name, err.message);
  }
}

/* A strategy named by its path and then overridden: its section may stand in the file, as any other's. */
static void add_overridden_strategies(loading *l) {
  store *p = l->config->priv;
  phx_error err = PHX_ERROR_INIT;
  for (const phx__entry *e = p->entries; e; e = e->next) {
    const phx__plugin *plugin = NULL;
    if (strcmp(e->section, "run") || strcmp(e->key, "strategy") || !strchr(e->value, '/')) continue;
    if (strcmp(e->value, l->config->s.run.strategy) == 0) continue;
    if (l->found_file && !e->flag) {
      l->strategy_unknown = true;
      continue;
    }
    if (phx__loader_open(l->search, PHX_KIND_STRATEGY, e->value, &plugin, &err) != PHX_OK) l->strategy_unknown = true;
    else if (!phx__config_section(p, plugin->descriptor->id, NULL)) add_plugin_section(l, plugin, false);
  }
}

/* ---- keys of [optimizer] that neither the core nor the chosen optimizer has ---- */

/* An option of another optimizer: checked by its table, and not used.  So one file serves several optimizers, as it
 * serves several strategies. */
static void take_key(loading *l, const phx_plugin *d, phx__entry *e) {
  char why[512];
  phx__value value;
  store *p = l->config->priv;
  for (uint32_t i = 0; i < d->n_options && !e->taken; i++) {
    const phx_option *o = phx__option_at(d->options, d->option_stride, i);
    if (strcmp(o->name, e->key) != 0) continue;
    e->taken = true;
    const bool is_default = o->dflt && !strcmp(o->dflt, e->value);
    if (!phx__option_parse(o, e->value, &value, why, sizeof why))
      phx__config_error(p, e, "[optimizer] %s", why);
    else if (!is_default && !l->found_file)
      phx__config_warn(p, e, "[optimizer] %s is an option of %s; %s, which is chosen, does not use it", e->key, d->id,
                       l->config->optimizer.plugin->descriptor->id);
  }
}

/* Of optimizers that were named by their path and then overridden; what cannot be loaded cannot be judged. */
static void take_key_of_paths(loading *l, phx__entry *e) {
  for (const phx__entry *n = l->config->priv->entries; n && !e->taken; n = n->next) {
    phx_error err = PHX_ERROR_INIT;
    const phx__plugin *plugin = NULL;
    if (strcmp(n->section, "optimizer") || strcmp(n->key, "name") || !strchr(n->value, '/')) continue;
    const bool foreign = l->found_file && !n->flag;
    if (foreign || phx__loader_open(l->search, PHX_KIND_OPTIMIZER, n->value, &plugin, &err) != PHX_OK) e->taken = true;
    else take_key(l, plugin->descriptor, e);
  }
}

static void judge_optimizer_keys(loading *l) {
  if (!l->config->optimizer.plugin) return;
  for (phx__entry *e = l->config->priv->entries; e; e = e->next) {
    if (strcmp(e->section, "optimizer") || e->taken) continue;
    for (size_t i = 0; i < l->n_found && !e->taken; i++) {
      phx_error err = PHX_ERROR_INIT;
      const phx__plugin *plugin = NULL;
      const phx__found *f = &l->found[i];
      if (f->kind != PHX_KIND_OPTIMIZER || f->shadowed) continue;
      if (phx__loader_open_file(f->kind, f->path, f->name, &plugin, &err) == PHX_OK) take_key(l, plugin->descriptor, e);
    }
    take_key_of_paths(l, e);
  }
}

static void judge_sections(loading *l) {
  store *p = l->config->priv;
  for (const phx__header *h = p->headers; h; h = h->next) {
    const phx__header *first = p->headers;
    phx__entry at = {.section = h->name, .line = h->line};
    while (strcmp(first->name, h->name) != 0) first = first->next;
    if (first == h) judge_section(l, h->name, &at);
  }
  for (const phx__entry *e = p->entries; e; e = e->next)
    if (e->flag && !e->taken) judge_section(l, e->section, e);
}

static void select_plugins(loading *l) {
  phx__config *c = l->config;
  select_plugin(l, PHX_KIND_STRATEGY, "run", "strategy", NULL, 0, &c->s.run.strategy, &c->strategy);
  select_plugin(l, PHX_KIND_DEVICE, "device", "plugin", c->device_why, sizeof c->device_why, &c->s.device.plugin,
                &c->device);
  select_plugin(l, PHX_KIND_COMM, "comm", "plugin", c->comm_why, sizeof c->comm_why, &c->s.comm.plugin, &c->comm);
  resolve_deterministic(l);
  select_plugin(l, PHX_KIND_MODEL, "model", "plugin", NULL, 0, &c->s.model.plugin, &c->model);
  select_plugin(l, PHX_KIND_OPTIMIZER, "optimizer", "name", NULL, 0, &c->s.optimizer.name, &c->optimizer);
}

static void fill(loading *l) {
  phx__config *c = l->config;
  add_core_sections(c);
  if (c->priv->oom) return;
  judge_paths(l);
  if (list_plugins(l)) select_plugins(l);
  else resolve_deterministic(l);
  if (c->priv->oom) return;
  add_overridden_strategies(l);
  if (c->priv->oom) return;
  judge_sections(l);
  judge_optimizer_keys(l);
  phx__config_check_unknown(c->priv, l->excused);
  phx__config_check_together(c);
}

static phx_status load(const char *path, const phx__override *overrides, size_t n, FILE *report, bool found,
                       phx__config **out) {
  phx_error err = PHX_ERROR_INIT;
  phx_status status = PHX_NOMEM;
  *out = NULL;
  phx__config *config = phx__calloc(1, sizeof *config);
  store *p = config ? phx__calloc(1, sizeof *p) : NULL;
  if (!p) {
    fprintf(report, "phalanx: %s: out of memory\n", path);
    goto done;
  }
  config->priv = p;
  p->path = phx__config_keep_text(p, path);
  if (p->path) {
    status = phx__config_add_file(p, &err);
    if (status != PHX_OK) {
      fprintf(report, "phalanx: %s\n", err.message);
      goto done;
    }
    for (size_t i = 0; i < n && !p->oom; i++) phx__config_add_override(p, &overrides[i]);
  }
  loading l = {.config = config, .found_file = found};
  if (!p->oom) fill(&l);
  phx__free(l.found);
  phx__config_report(p, report);
  status = p->n_errors ? PHX_INVALID : PHX_OK;
  if (p->oom) status = PHX_NOMEM;
  if (status == PHX_OK) {
    *out = config;
    config = NULL;
  }
done:
  phx__config_free(config);
  return status;
}

phx_status phx__config_load(const char *path, const phx__override *overrides, size_t n, FILE *report,
                            phx__config **out) {
  return load(path, overrides, n, report, false, out);
}

phx_status phx__config_load_found(const char *path, const phx__override *overrides, size_t n, FILE *report,
                                  phx__config **out) {
  return load(path, overrides, n, report, true, out);
}

phx_status phx__config_plugin_path(const char *file, char **out, phx_error *err) {
  phx_status status = PHX_OK;
  store *p = phx__calloc(1, sizeof *p);
  *out = NULL;
  if (!p) return phx_fail(err, PHX_NOMEM, "%s: out of memory", file);
  p->path = phx__config_keep_text(p, file);
  status = p->path ? phx__config_add_file(p, err) : PHX_NOMEM;
  const char *value = NULL;
  for (const phx__entry *e = p->entries; e && !status; e = e->next)
    if (strcmp(e->section, "plugins") == 0 && strcmp(e->key, "path") == 0) value = e->value;
  if (!status && p->oom) status = PHX_NOMEM;
  if (!status && value) *out = phx__strdup(value);
  if (status == PHX_NOMEM || (!status && value && !*out)) status = phx_fail(err, PHX_NOMEM, "%s: out of memory", file);
  phx__config_forget(p);
  phx__free(p);
  return status;
}
