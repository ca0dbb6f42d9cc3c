/* core/config/config_print.c - the effective configuration as an INI, as a visit, as a hash; and help from option
 * tables.
 *
 * Invariant: what is printed parses to the same configuration, comments included.  [main] only. */
#include "config/config.h"
#include "config/config_store.h"

#include <inttypes.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* the state on the stack: no allocation that could fail */
#include <xxhash.h>

enum { LINE_LONGEST = 195, COMMENT_COLUMN = 34 };

static void print_setting(const phx__config *config, const phx__setting *s, FILE *out, bool sources) {
  char scratch[PHX__VALUE_TEXT], source[512];
  const char *value = phx__option_text(s->option, s->value, scratch);
  size_t length = strlen(s->option->name) + strlen(value) + 3;
  if (!s->entry && (s->option->flags & PHX_OPTF_REQUIRED)) { /* of a plugin that is not selected */
    fprintf(out, "; %s = must be given\n", s->option->name);
    return;
  }
  if (!sources) {
    fprintf(out, "%s = %s\n", s->option->name, value);
    return;
  }
  phx__config_source(config->priv, s, source, sizeof source);
  size_t column = length < COMMENT_COLUMN ? COMMENT_COLUMN - length : 1;
  if (length + column + strlen(source) + 2 > LINE_LONGEST) /* behind it, the line would be too long to be read again */
    fprintf(out, "; %s\n%s = %s\n", source, s->option->name, value);
  else
    fprintf(out, "%s = %s%*s; %s\n", s->option->name, value, (int)column, "", source);
}

void phx__config_print(const phx__config *config, FILE *out, bool sources) {
  const struct phx__config_private *p = config->priv;
  for (const phx__section *s = p->sections; s; s = s->next) {
    if (s != phx__config_section(p, s->name, NULL)) continue; /* [model] is two tables under one name */
    fprintf(out, "%s[%s]\n", s == p->sections ? "" : "\n", s->name);
    for (const phx__section *part = s; part; part = phx__config_section(p, s->name, part))
      for (uint32_t i = 0; i < part->n; i++) print_setting(config, &part->settings[i], out, sources);
  }
}

void phx__config_each(const phx__config *config, phx__config_fn *fn, void *arg) {
  char scratch[PHX__VALUE_TEXT], source[512];
  for (const phx__section *s = config->priv->sections; s; s = s->next)
    for (uint32_t i = 0; i < s->n; i++)
      fn(arg, s->name, s->settings[i].option->name,
         phx__option_text(s->settings[i].option, s->settings[i].value, scratch),
         phx__config_source(config->priv, &s->settings[i], source, sizeof source));
}

/* Every string with its NUL, so that neighbours cannot run together. */
static void hash_text(XXH3_state_t *state, const char *text) { XXH3_64bits_update(state, text, strlen(text) + 1); }

static void hash_plugin(XXH3_state_t *state, const phx__selected *selected) {
  const phx_plugin *d = selected->plugin->descriptor;
  hash_text(state, phx__kind_name(d->kind));
  hash_text(state, d->id);
  hash_text(state, d->version);
  hash_text(state, selected->plugin->sha256);
}

uint64_t phx__config_hash(const phx__config *config) {
  char scratch[PHX__VALUE_TEXT];
  XXH3_state_t whole, *state = &whole;
  XXH3_64bits_reset(state);
  for (const phx__section *s = config->priv->sections; s; s = s->next)
    for (uint32_t i = 0; i < s->n && s->selected; i++) {
      const phx__setting *setting = &s->settings[i];
      if (setting->option->flags & PHX_OPTF_PER_RANK) continue;
      hash_text(state, s->name);
      hash_text(state, setting->option->name);
      hash_text(state, phx__option_text(setting->option, setting->value, scratch));
    }
  hash_plugin(state, &config->strategy);
  hash_plugin(state, &config->device);
  hash_plugin(state, &config->comm);
  hash_plugin(state, &config->model);
  hash_plugin(state, &config->optimizer);
  return XXH3_64bits_digest(state);
}

/* ---- help ---- */
static void print_wrapped(FILE *out, const char *indent, const char *text) {
  size_t column = 0, width = 100 - strlen(indent);
  for (const char *word = text; *word;) {
    size_t length = strcspn(word, " ");
    if (column && column + 1 + length > width) {
      fputc('\n', out);
      column = 0;
    }
    fprintf(out, "%s%.*s", column ? " " : indent, (int)length, word);
    column += length + (column ? 1 : 0);
    word += length;
    word += strspn(word, " ");
  }
  fputc('\n', out);
}

static void print_row(const phx_option *o, FILE *out) {
  char expected[300];
  const char *dflt = o->dflt ? o->dflt : "none: must be given";
  phx__option_describe(o, expected, sizeof expected);
  fprintf(out, "  %-28s default %s\n", o->name, *dflt ? dflt : "(empty)");
  print_wrapped(out, "      ", o->doc);
  fprintf(out, "      %s%s%s%s%s%s\n", expected, o->unit ? ", in " : "", o->unit ? o->unit : "",
          o->flags & PHX_OPTF_PER_RANK ? "; may differ between ranks" : "",
          o->flags & PHX_OPTF_DEPRECATED ? "; deprecated" : "",
          o->flags & PHX_OPTF_EXPERIMENTAL ? "; experimental" : "");
}

void phx__config_help(const char *section, const phx_option *options, uint32_t n, uint32_t stride, FILE *out) {
  if (n == 0) {
    fprintf(out, "[%s] has no options.\n", section);
    return;
  }
  fprintf(out, "Options of [%s]:\n\n", section);
  for (uint32_t i = 0; i < n; i++) print_row(phx__option_at(options, stride, i), out);
  fprintf(out, "\nSample:\n\n[%s]\n", section);
  for (uint32_t i = 0; i < n; i++) {
    const phx_option *o = phx__option_at(options, stride, i);
    char expected[300];
    phx__option_describe(o, expected, sizeof expected);
    print_wrapped(out, "; ", o->doc);
    print_wrapped(out, "; ", expected);
    fprintf(out, "%s%s = %s\n", o->dflt ? "" : "; ", o->name, o->dflt ? o->dflt : "");
  }
}

/* A cell of a table in Markdown: '|' would end it. */
static void print_cell(const char *text, FILE *out) {
  for (; *text; text++) {
    if (*text == '|') fputs("\\|", out);
    else fputc(*text, out);
  }
}

static void print_markdown_row(const phx_option *o, FILE *out) {
  char expected[300];
  phx__option_describe(o, expected, sizeof expected);
  fprintf(out, "| `%s` | ", o->name);
  if (!o->dflt) fputs("must be given", out);
  else if (*o->dflt) fprintf(out, "`%s`", o->dflt);
  fputs(" | ", out);
  print_cell(expected, out);
  if (o->unit) fprintf(out, ", in %s", o->unit);
  fputs(" | ", out);
  print_cell(o->doc, out);
  if (o->flags & PHX_OPTF_PER_RANK) fputs(" May differ between ranks.", out);
  if (o->flags & PHX_OPTF_DEPRECATED) fputs(" Deprecated.", out);
  if (o->flags & PHX_OPTF_EXPERIMENTAL) fputs(" Experimental.", out);
  fputs(" |\n", out);
}

void phx__config_markdown(const phx_option *options, uint32_t n, uint32_t stride, FILE *out) {
  if (n == 0) {
    fputs("It has no options.\n", out);
    return;
  }
  fputs("| key | default | values | meaning |\n|---|---|---|---|\n", out);
  for (uint32_t i = 0; i < n; i++) print_markdown_row(phx__option_at(options, stride, i), out);
}
