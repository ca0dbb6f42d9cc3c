/* core/config/option.c - values by option table.
 *
 * strtol and its family are forgiving in ways that hurt ("" is 0, "1e6" is 1, "010" is 8, a locale's comma), so a text
 * is first checked by character, then converted, then must be consumed whole.  Does not know sections or files.
 * Invariant: text(parse(t)) parses to the same value.  Any thread: the C locale object is made once. */
#include "base/status.h"
#include "config/option.h"

#include <errno.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static locale_t c_locale;
static void c_locale_make(void) { c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0); }

static double real_from(const char *text, char **end) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, c_locale_make);
  return c_locale ? strtod_l(text, end, c_locale) : strtod(text, end);
}

static const char *hint(const char *text) { return strchr(text, '#') ? " (a comment begins with ' ;')" : ""; }

static bool parse_digits(const char *text, int64_t *out, const char **rest) {
  char *end;
  if (!(text[0] >= '0' && text[0] <= '9') && !(text[0] == '-' && text[1] >= '0' && text[1] <= '9')) return false;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (errno) return false;
  *out = value;
  *rest = end;
  return true;
}

static bool parse_bytes(const char *text, int64_t *out) {
  static const struct {
    const char *name;
    int shift;
  } units[] = {{"", 0}, {"B", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  const char *rest;
  int64_t number;
  if (!parse_digits(text, &number, &rest) || number < 0) return false;
  if (*rest == ' ' && rest[1]) rest++;
  for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
    if (strcmp(rest, units[i].name) != 0) continue;
    if (number > INT64_MAX >> units[i].shift) return false;
    *out = number * ((int64_t)1 << units[i].shift);
    return true;
  }
  return false;
}

static bool parse_integer(const phx_option *o, const char *text, int64_t *out) {
  const char *rest = "";
  if ((o->flags & PHX_OPTF_AUTO) && strcmp(text, "auto") == 0) {
    *out = -1;
    return true;
  }
  if (o->type == PHX_OPT_BYTES ? !parse_bytes(text, out) : !parse_digits(text, out, &rest)) return false;
  return !*rest && *out >= o->imin && *out <= o->imax;
}

static bool parse_real(const phx_option *o, const char *text, double *out) {
  char *end;
  if (!text[0] || text[0] == '+' || strspn(text, "0123456789+-.eE") != strlen(text)) return false;
  errno = 0;
  double value = real_from(text, &end);
  if (errno || end == text || *end || !isfinite(value) || !(value >= o->rmin && value <= o->rmax)) return false;
  *out = value + 0.0; /* -0 is 0: equal values have equal texts */
  return true;
}

static bool parse_bool(const char *text, int64_t *out) {
  static const char *const words[] = {"no", "yes", "false", "true", "off", "on", "0", "1"};
  for (size_t i = 0; i < 8; i++)
    if (strcmp(text, words[i]) == 0) {
      *out = i % 2;
      return true;
    }
  return false;
}

static bool parse_enum(const phx_option *o, const char *text, int64_t *out) {
  for (int64_t i = 0; o->choices[i]; i++)
    if (strcmp(text, o->choices[i]) == 0) {
      *out = i;
      return true;
    }
  return false;
}

/* What an INI line could not carry is refused everywhere, so that the printed configuration can be read again. */
static bool text_is_plain(const char *text) {
  size_t n = strlen(text);
  if (n && (text[0] == ' ' || text[0] == '\t' || text[n - 1] == ' ' || text[n - 1] == '\t')) return false;
  for (size_t i = 0; i < n; i++) {
    if ((unsigned char)text[i] < ' ' || text[i] == 127) return false;
    if (text[i] == ';' && (i == 0 || text[i - 1] == ' ')) return false;
  }
  return true;
}

bool phx__option_parse(const phx_option *option, const char *text, phx__value *out, char *why, size_t why_bytes) {
  phx__value value = {0};
  bool good = false;
  switch (option->type) {
    case PHX_OPT_BOOL: good = parse_bool(text, &value.i); break;
    case PHX_OPT_INT:
    case PHX_OPT_BYTES: good = parse_integer(option, text, &value.i); break;
    case PHX_OPT_REAL: good = parse_real(option, text, &value.r); break;
    case PHX_OPT_ENUM: good = parse_enum(option, text, &value.i); break;
    case PHX_OPT_STRING:
      good = text_is_plain(text) && !((option->flags & PHX_OPTF_REQUIRED) && !*text);
      value.s = text;
      break;
  }
  if (good) {
    *out = value;
    return true;
  }
  char expected[256];
  phx__option_describe(option, expected, sizeof expected);
  snprintf(why, why_bytes, "'%.100s' is not valid for %s: expected %s%s", text, option->name, expected, hint(text));
  return false;
}

void phx__option_store(const phx_option *option, phx__value value, void *config) {
  char *field = (char *)config + option->offset;
  int32_t small = (int32_t)value.i;
  switch (option->type) {
    case PHX_OPT_BOOL:
    case PHX_OPT_ENUM: memcpy(field, &small, sizeof small); break;
    case PHX_OPT_INT:
    case PHX_OPT_BYTES: memcpy(field, &value.i, sizeof value.i); break;
    case PHX_OPT_REAL: memcpy(field, &value.r, sizeof value.r); break;
    case PHX_OPT_STRING: memcpy(field, &value.s, sizeof value.s); break;
  }
}

static void print_bytes(int64_t bytes, char *text, size_t size) {
  static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes && bytes % 1024 == 0 && unit < 4) bytes /= 1024, unit++;
  snprintf(text, size, "%lld%s", (long long)bytes, units[unit]);
}

static void print_real(double value, char *text, size_t size) {
  for (int digits = 6; digits <= 17; digits++) {
    snprintf(text, size, "%.*g", digits, value);
    char *comma = strchr(text, ','); /* of the process's locale */
    if (comma) *comma = '.';
    if (real_from(text, NULL) == value) return;
  }
}

const char *phx__option_text(const phx_option *option, phx__value value, char scratch[PHX__VALUE_TEXT]) {
  scratch[0] = 0;
  switch (option->type) {
    case PHX_OPT_BOOL: return value.i ? "yes" : "no";
    case PHX_OPT_ENUM: return option->choices[value.i];
    case PHX_OPT_STRING: return value.s;
    case PHX_OPT_REAL: print_real(value.r, scratch, PHX__VALUE_TEXT); break;
    case PHX_OPT_INT:
    case PHX_OPT_BYTES:
      if ((option->flags & PHX_OPTF_AUTO) && value.i == -1) return "auto";
      if (option->type == PHX_OPT_BYTES)
        print_bytes(value.i, scratch, PHX__VALUE_TEXT);
      else
        snprintf(scratch, PHX__VALUE_TEXT, "%lld", (long long)value.i);
      break;
  }
  return scratch;
}

void phx__option_describe(const phx_option *o, char *text, size_t bytes) {
  const char *or_auto = o->flags & PHX_OPTF_AUTO ? ", or auto" : "";
  char low[PHX__VALUE_TEXT] = "", high[PHX__VALUE_TEXT] = "";
  size_t used = 0;
  switch (o->type) {
    case PHX_OPT_BOOL: snprintf(text, bytes, "yes | no"); break;
    case PHX_OPT_INT:
      if (o->imax == INT64_MAX)
        snprintf(text, bytes, "a whole number >= %lld%s", (long long)o->imin, or_auto);
      else
        snprintf(text, bytes, "a whole number from %lld to %lld%s", (long long)o->imin, (long long)o->imax, or_auto);
      break;
    case PHX_OPT_BYTES:
      print_bytes(o->imin, low, sizeof low);
      print_bytes(o->imax, high, sizeof high);
      if (o->imax == INT64_MAX)
        snprintf(text, bytes, "bytes (B KiB MiB GiB TiB) >= %s%s", low, or_auto);
      else
        snprintf(text, bytes, "bytes (B KiB MiB GiB TiB) from %s to %s%s", low, high, or_auto);
      break;
    case PHX_OPT_REAL:
      print_real(o->rmin, low, sizeof low);
      print_real(o->rmax, high, sizeof high);
      snprintf(text, bytes, "a number from %s to %s", low, high);
      break;
    case PHX_OPT_ENUM:
      text[0] = 0;
      for (size_t i = 0; o->choices[i] && used < bytes; i++)
        used += (size_t)snprintf(text + used, bytes - used, "%s%s", i ? " | " : "", o->choices[i]);
      break;
    case PHX_OPT_STRING:
      snprintf(text, bytes, "%s", o->flags & PHX_OPTF_REQUIRED
                                      ? "text on one line, not empty, without ' ;' in it"
                                      : "text on one line, without ' ;' in it");
      break;
  }
}
