/* Fuzz target: any bytes as an INI file, and every value that comes out against option rows of each type.
 *
 * Properties: names and values that are delivered could be written into a file and come back equal; lines never go
 * back; a value that an option accepts prints to a text that parses to the same value.  With libFuzzer:
 *   build-clang/tests/fuzz_ini tests/fuzz/ini        The corpus is replayed by tests/unit/test_ini.c everywhere. */
#include "../../core/config/config_ini.h"
#include "../../core/config/option.h"
#include "check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

typedef struct fields {
  int64_t i, b;
  double r;
  const char *s;
  int32_t e, f;
} fields;
static const char *const words[] = {"full", "grad_op", NULL};
static const phx_option rows[] = {
    PHX_INT(fields, i, "1", INT64_MIN, INT64_MAX, NULL, 0, "An integer."),
    PHX_BYTES(fields, b, "auto", 0, INT64_MAX, PHX_OPTF_AUTO, "Bytes."),
    PHX_REAL(fields, r, "1", -1e300, 1e300, "A real."),
    PHX_STRING(fields, s, "", 0, "A string."),
    PHX_BOOL(fields, e, "no", "A switch."),
    PHX_ENUM(fields, f, "full", words, "A choice."),
};

static void check_value(const char *text) {
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    phx__value first = {0}, second = {0};
    char why[400], scratch[PHX__VALUE_TEXT], before[PHX__VALUE_TEXT];
    if (!phx__option_parse(&rows[i], text, &first, why, sizeof why)) continue;
    const char *printed = phx__option_text(&rows[i], first, scratch);
    CHECK(phx__option_parse(&rows[i], printed, &second, why, sizeof why));
    if (rows[i].type == PHX_OPT_STRING) {
      CHECK(strcmp(first.s, second.s) == 0);
    } else {
      CHECK(first.i == second.i); /* a double by its bits */
      snprintf(before, sizeof before, "%s", printed);
      CHECK(strcmp(before, phx__option_text(&rows[i], second, scratch)) == 0);
    }
  }
}

typedef struct state {
  int line;
  const char *section, *key, *value; /* what must come back; NULL while fuzzing */
  size_t entries;
} state;

static bool on_section(void *arg, int line, const char *name) {
  state *s = arg;
  CHECK(line >= s->line && *name && strlen(name) <= PHX__INI_NAME_LONGEST);
  s->line = line;
  return true;
}

static bool on_error(void *arg, int line, const char *message) {
  state *s = arg;
  CHECK(line > 0 && *message && !s->value);
  return true;
}

static bool on_again(void *arg, int line, const char *section, const char *key, const char *value) {
  state *s = arg;
  (void)line;
  CHECK(strcmp(section, s->section) == 0 && strcmp(key, s->key) == 0 && strcmp(value, s->value) == 0);
  s->entries++;
  return true;
}

static bool on_entry(void *arg, int line, const char *section, const char *key, const char *value) {
  state *s = arg;
  CHECK(line >= s->line && *section && *key && strlen(key) <= PHX__INI_NAME_LONGEST);
  s->line = line;
  check_value(value);
  phx__value kept;
  char why[400], text[800];
  int n = snprintf(text, sizeof text, "[%s]\n%s = %s\n", section, key, value);
  if (!phx__option_parse(&rows[3], value, &kept, why, sizeof why) || strlen(key) + strlen(value) + 3 > 190) return true;
  state again = {.section = section, .key = key, .value = value};
  const phx__ini_sink sink = {&again, on_section, on_again, on_error};
  CHECK(phx__ini_parse(text, (size_t)n, &sink) == PHX_OK && again.entries == 1);
  return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  state s = {0};
  const phx__ini_sink sink = {&s, on_section, on_entry, on_error};
  CHECK(phx__ini_parse((const char *)data, bytes, &sink) == PHX_OK);
  return 0;
}
