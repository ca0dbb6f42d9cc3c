/* core/config/config_store.c - see config_store.h: memory, problems, entries and settings of one configuration.
 *
 * Does not load plugins and does not know what settings mean.  [main] only. */
#include "config/config_store.h"
#include "base/nearest.h"
#include "base/status.h"
#include "base/sys.h"
#include "config/config_ini.h"
#include "config/settings.h"

#include <limits.h>
#include <stdarg.h>
#include <string.h>

typedef struct phx__chunk {
  struct phx__chunk *next;
  max_align_t start[]; /* C11's largest alignment: config structs of plugins lie here */
} phx__chunk;

typedef struct phx__config_private store;

void *phx__config_keep(store *p, size_t bytes) {
  phx__chunk *chunk = phx__calloc(1, sizeof *chunk + bytes);
  if (!chunk) {
    p->oom = true;
    return NULL;
  }
  chunk->next = p->memory;
  p->memory = chunk;
  return chunk->start;
}

const char *phx__config_keep_text(store *p, const char *text) {
  size_t bytes = strlen(text) + 1;
  char *copy = phx__config_keep(p, bytes);
  if (copy) memcpy(copy, text, bytes);
  return copy;
}

void phx__config_forget(store *p) {
  while (p->memory) {
    phx__chunk *next = p->memory->next;
    phx__free(p->memory);
    p->memory = next;
  }
}

/* ---- problems ---- */
static void add_problem(store *p, int line, bool warning, const char *prefix, const char *format, va_list args) {
  char text[1536];
  int used = snprintf(text, sizeof text, "%.700s%s", prefix, warning ? "warning: " : "");
  vsnprintf(text + used, sizeof text - (size_t)used, format, args);
  phx__problem *problem = phx__config_keep(p, sizeof *problem), **at = &p->problems;
  const char *kept = phx__config_keep_text(p, text);
  if (!warning) p->n_errors++;
  if (!problem || !kept) return;
  *problem = (phx__problem){.text = kept, .line = line, .warning = warning};
  while (*at && (*at)->line <= line) at = &(*at)->next;
  problem->next = *at;
  *at = problem;
}

static void problem_at(store *p, const phx__entry *at, bool warning, const char *format, va_list args) {
  char prefix[512];
  if (!at)
    snprintf(prefix, sizeof prefix, "%s: ", p->path);
  else if (at->flag && *at->section && strcmp(at->flag, "--set") == 0)
    snprintf(prefix, sizeof prefix, "--set %s.%s=%s: ", at->section, at->key, at->value);
  else if (at->flag) /* -n 65: what was typed, not what it stands for */
    snprintf(prefix, sizeof prefix, "%s %s: ", at->flag, at->value);
  else
    snprintf(prefix, sizeof prefix, "%s:%d: ", p->path, at->line);
  add_problem(p, at && at->line ? at->line : INT_MAX, warning, prefix, format, args);
}

void phx__config_error(store *p, const phx__entry *at, const char *format, ...) {
  va_list args;
  va_start(args, format);
  problem_at(p, at, false, format, args);
  va_end(args);
}

void phx__config_warn(store *p, const phx__entry *at, const char *format, ...) {
  va_list args;
  va_start(args, format);
  problem_at(p, at, true, format, args);
  va_end(args);
}

void phx__config_report(const store *p, FILE *report) {
  for (const phx__problem *problem = p->problems; problem; problem = problem->next)
    fprintf(report, "phalanx: %s\n", problem->text);
  if (p->oom) fprintf(report, "phalanx: %s: out of memory\n", p->path ? p->path : "configuration");
}

/* ---- entries ---- */
static phx__entry *add_entry(store *p, const char *section, const char *key, const char *value, const char *flag,
                             int line) {
  phx__entry *entry = phx__config_keep(p, sizeof *entry), **at = &p->entries;
  if (!entry) return NULL;
  entry->section = phx__config_keep_text(p, section);
  entry->key = phx__config_keep_text(p, key);
  entry->value = phx__config_keep_text(p, value);
  entry->flag = flag;
  entry->line = line;
  if (p->oom) return NULL;
  while (*at) at = &(*at)->next;
  *at = entry;
  return entry;
}

static bool take_section(void *arg, int line, const char *name) {
  store *p = arg;
  phx__header *header = phx__config_keep(p, sizeof *header), **at = &p->headers;
  const char *kept = phx__config_keep_text(p, name);
  if (!header || !kept) return false;
  *header = (phx__header){.name = kept, .line = line};
  while (*at) at = &(*at)->next;
  *at = header;
  return true;
}

static bool take_entry(void *arg, int line, const char *section, const char *key, const char *value) {
  store *p = arg;
  phx__entry *first = p->entries;
  while (first && (strcmp(first->section, section) != 0 || strcmp(first->key, key) != 0)) first = first->next;
  phx__entry *entry = add_entry(p, section, key, value, NULL, line);
  if (!entry) return false;
  if (first) {
    phx__config_error(p, entry, "[%s] %s is given twice: first on line %d", section, key, first->line);
    entry->taken = true;
    entry->key = ""; /* the first one counts */
  }
  return !p->oom;
}

static bool take_error(void *arg, int line, const char *message) {
  store *p = arg;
  phx__entry at = {.line = line};
  phx__config_error(p, &at, "%s", message);
  return !p->oom;
}

phx_status phx__config_add_file(store *p, phx_error *err) {
  char *text;
  size_t bytes;
  PHX_TRY(phx__ini_read(p->path, &text, &bytes, err));
  const phx__ini_sink sink = {p, take_section, take_entry, take_error};
  if (phx__ini_parse(text, bytes, &sink) != PHX_OK) p->oom = true;
  phx__free(text);
  return PHX_OK;
}

void phx__config_add_override(store *p, const phx__override *override) {
  char section[PHX__INI_NAME_LONGEST + 1], key[PHX__INI_NAME_LONGEST + 1];
  const bool weak = override->text[0] == '?';
  const char *text = override->text + weak, *equals = strchr(text, '='), *dot = memchr(text, '.', strcspn(text, "="));
  size_t section_bytes = dot ? (size_t)(dot - text) : 0;
  size_t key_bytes = dot && equals ? (size_t)(equals - dot) - 1 : 0;
  if (!section_bytes || !key_bytes || section_bytes >= sizeof section || key_bytes >= sizeof key) {
    phx__entry at = {.section = "", .key = "", .value = override->text, .flag = override->flag};
    phx__config_error(p, &at, "expected section.key=value");
    return;
  }
  snprintf(section, sizeof section, "%.*s", (int)section_bytes, text);
  snprintf(key, sizeof key, "%.*s", (int)key_bytes, dot + 1);
  for (const phx__entry *e = weak ? p->entries : NULL; e; e = e->next)
    if (strcmp(e->section, section) == 0 && strcmp(e->key, key) == 0) return;
  add_entry(p, section, key, equals + 1, override->flag, 0);
}

/* ---- sections and settings ---- */
static void apply_entry(store *p, phx__setting *s, phx__entry *entry) {
  char why[512];
  entry->taken = true;
  if (phx__option_parse(s->option, entry->value, &s->value, why, sizeof why)) {
    s->entry = entry;
    if (s->option->dflt && strcmp(entry->value, s->option->dflt) == 0) return; /* nothing was asked for */
    if (s->option->flags & PHX_OPTF_DEPRECATED) phx__config_warn(p, entry, "%s is deprecated", entry->key);
    if (s->option->flags & PHX_OPTF_EXPERIMENTAL) phx__config_warn(p, entry, "%s is experimental", entry->key);
  } else {
    phx__config_error(p, entry, "[%s] %s", entry->section, why);
    s->bad = true;
  }
}

static void fill_setting(store *p, const phx__section *section, phx__setting *s) {
  char why[512];
  const phx_option *o = s->option;
  if (o->dflt && !phx__option_parse(o, o->dflt, &s->value, why, sizeof why))
    phx__config_error(p, NULL, "[%s] default of %s", section->name, why); /* checked when it was loaded */
  if (!o->dflt && o->type == PHX_OPT_STRING) s->value.s = "";
  for (phx__entry *e = p->entries; e; e = e->next)
    if (strcmp(e->section, section->name) == 0 && strcmp(e->key, o->name) == 0) apply_entry(p, s, e);
  if ((o->flags & PHX_OPTF_REQUIRED) && section->selected && !s->entry && !s->bad) {
    phx__config_error(p, NULL, "[%s] %s is missing: %s", section->name, o->name, o->doc);
    s->bad = true;
  }
  phx__option_store(o, s->value, section->base);
}

phx__section *phx__config_add_section(store *p, const char *name, const phx_option *options, uint32_t n,
                                      uint32_t stride, void *base, const struct phx__plugin *plugin, bool selected) {
  phx__section *section = phx__config_keep(p, sizeof *section), **at = &p->sections;
  phx__setting *settings = phx__config_keep(p, n * sizeof *settings);
  if (!section || !settings) return NULL;
  *section = (phx__section){.name = name, .options = options, .n = n, .stride = stride, .base = base,
                            .plugin = plugin, .selected = selected, .settings = settings};
  while (*at) at = &(*at)->next;
  *at = section;
  for (uint32_t i = 0; i < n; i++) {
    settings[i].option = phx__option_at(options, stride, i);
    fill_setting(p, section, &settings[i]);
  }
  return section;
}

phx__section *phx__config_section(const store *p, const char *name, const phx__section *after) {
  for (phx__section *s = after ? after->next : p->sections; s; s = s->next)
    if (strcmp(s->name, name) == 0) return s;
  return NULL;
}

phx__setting *phx__config_setting(const store *p, const char *section, const char *key) {
  phx__section *s = phx__config_section(p, section, NULL);
  for (uint32_t i = 0; s && i < s->n; i++)
    if (strcmp(s->settings[i].option->name, key) == 0) return &s->settings[i];
  return NULL;
}

/* The key stands in another section of the core: which; NULL: in none. */
static const char *section_with(const store *p, const char *key) {
  for (const phx__section *s = p->sections; s; s = s->next)
    for (uint32_t i = 0; !s->plugin && i < s->n; i++)
      if (!strcmp(s->settings[i].option->name, key)) return s->name;
  return NULL;
}

static void complain_key(store *p, phx__entry *entry) {
  char hint[80];
  const char *other = section_with(p, entry->key);
  phx__nearest nearest = {.word = entry->key};
  const char *instead = phx__core_replaced(entry->section, entry->key);
  if (instead) {
    phx__config_error(p, entry, "[%s] %s is no key any more: %s", entry->section, entry->key, instead);
    return;
  }
  for (const phx__section *s = NULL; (s = phx__config_section(p, entry->section, s));)
    for (uint32_t i = 0; i < s->n; i++) phx__nearest_offer(&nearest, s->settings[i].option->name);
  phx__nearest_hint(&nearest, hint, sizeof hint);
  if (!nearest.best && other) snprintf(hint, sizeof hint, ": [%.60s] has it", other);
  phx__config_error(p, entry, "[%s] has no key '%s'%s%s", entry->section, entry->key, hint,
                    strchr(entry->value, '=') ? " (':' ends a key, like '=')" : "");
}

void phx__config_check_unknown(store *p, const char *const *excused) {
  for (phx__entry *e = p->entries; e; e = e->next) {
    bool excuse = e->taken;
    for (const char *const *name = excused; *name && !excuse; name++) excuse = strcmp(*name, e->section) == 0;
    if (!excuse) complain_key(p, e);
  }
}

const char *phx__config_source(const store *p, const phx__setting *s, char *text, size_t bytes) {
  const char *via = s->was_auto ? "auto, " : "";
  if (!s->entry)
    snprintf(text, bytes, "%sdefault", via);
  else if (s->entry->flag)
    snprintf(text, bytes, "%s%s", via, s->entry->flag);
  else
    snprintf(text, bytes, "%s%s:%d", via, p->path, s->entry->line);
  return text;
}
