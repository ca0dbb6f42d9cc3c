/* core/config/config_store.h - what a phx__config is made of: entries as given, sections, settings with sources,
 * problems.
 *
 *   entry    one `key = value` of the file or one override, as text
 *   section  a name, an option table, and the struct that it fills; [model] is two of them: the core's and the plugin's
 *   setting  one option of a section: its value, and the entry it came from (NULL: the default)
 *   problem  an error or warning with its place; printed together at the end, in the order of the file
 *
 * All memory belongs to the config and is freed with it; a failed allocation sets oom and is reported once.  [main]. */
#ifndef PHX__CONFIG_STORE_H
#define PHX__CONFIG_STORE_H
#include <stdio.h>

#include "config/option.h"

struct phx__plugin; /* config.h */

/* One `--set section.key=value`, or what -n and --strategy stand for. */
typedef struct phx__override {
  const char *text; /* "section.key=value"; with "?" before it, it counts only where nothing before it gives the key */
  const char *flag; /* shown as the source: "--set", "-n", "--strategy" */
} phx__override;

typedef struct phx__entry {
  const char *section, *key, *value;
  const char *flag; /* "--set", ...; NULL: from the file */
  int line;         /* in the file; 0: an override */
  bool taken;       /* belongs to a known option, or was complained about already */
  struct phx__entry *next;
} phx__entry;

typedef struct phx__setting {
  const phx_option *option;
  phx__value value;
  const phx__entry *entry; /* NULL: the default */
  bool bad;                /* complained about; the value is the default */
  bool was_auto;           /* the value is what `auto` came to */
} phx__setting;

typedef struct phx__section {
  const char *name;
  const phx_option *options;
  uint32_t n, stride;
  void *base;                /* the struct that the options fill */
  const struct phx__plugin *plugin; /* NULL: the core's */
  bool selected;             /* part of this run; else only validated */
  phx__setting *settings;    /* (n) */
  struct phx__section *next;
} phx__section;

typedef struct phx__header { /* a [section] line of the file */
  const char *name;
  int line;
  struct phx__header *next;
} phx__header;

typedef struct phx__problem {
  const char *text;
  int line; /* sorted by it; overrides and the rest behind the file's lines */
  bool warning;
  struct phx__problem *next;
} phx__problem;

struct phx__config_private {
  struct phx__chunk *memory;
  const char *path;
  phx__entry *entries;
  phx__header *headers;
  phx__section *sections;
  phx__problem *problems;
  size_t n_errors;
  bool oom;
};

/* Zero-filled, aligned for anything, freed with the config; NULL sets oom. */
void *phx__config_keep(struct phx__config_private *p, size_t bytes);
const char *phx__config_keep_text(struct phx__config_private *p, const char *text);
void phx__config_forget(struct phx__config_private *p);

/* at: NULL is the file as a whole. */
void phx__config_error(struct phx__config_private *p, const phx__entry *at, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void phx__config_warn(struct phx__config_private *p, const phx__entry *at, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void phx__config_report(const struct phx__config_private *p, FILE *report);

phx_status phx__config_add_file(struct phx__config_private *p, phx_error *err);
void phx__config_add_override(struct phx__config_private *p, const phx__override *override);
/* Makes the section, fills `base` from defaults and entries, complains about values; marks its entries taken. */
phx__section *phx__config_add_section(struct phx__config_private *p, const char *name, const phx_option *options,
                                      uint32_t n, uint32_t stride, void *base, const struct phx__plugin *plugin,
                                      bool selected);
/* The first section of that name, or the next one after `after`. */
phx__section *phx__config_section(const struct phx__config_private *p, const char *name, const phx__section *after);
/* The core's setting of that name; it must exist. */
phx__setting *phx__config_setting(const struct phx__config_private *p, const char *section, const char *key);
/* Complains about every entry that no option took. */
void phx__config_check_unknown(struct phx__config_private *p, const char *const *excused);
/* "default", "demo.ini:4", "--set" */
const char *phx__config_source(const struct phx__config_private *p, const phx__setting *s, char *text, size_t bytes);
#endif
