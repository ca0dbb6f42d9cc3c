/* core/base/json.c - see json.h.
 *
 * One pass checks the text against the grammar and the limits, without memory and without recursion deeper than the
 * limit; only then cJSON builds its tree, so that what cJSON is lenient about (numbers, bytes, depth) never reaches it.
 * Names that stand twice are found in the tree, by sorting. */
#include "base/json.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "base/utf8.h"

typedef struct scan {
  const unsigned char *at, *begin, *end;
  uint32_t depth, values;
  const phx__json_limits *limits;
  const char *why; /* the first thing that is wrong */
} scan;

static bool wrong(scan *s, const char *why) {
  if (!s->why) s->why = why;
  return false;
}

static void blanks(scan *s) {
  while (s->at < s->end && (*s->at == ' ' || *s->at == '\t' || *s->at == '\n' || *s->at == '\r')) s->at++;
}

static bool take(scan *s, char c) {
  blanks(s);
  if (s->at == s->end || *s->at != (unsigned char)c) return false;
  s->at++;
  return true;
}

/* -1: it is none. */
static int hex_digit(unsigned char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

static bool hex4(scan *s, uint32_t *out) {
  uint32_t value = 0;
  if (s->end - s->at < 4) return wrong(s, "an escape ends too early");
  for (int i = 0; i < 4; i++) {
    const unsigned char c = *s->at++;
    const int digit = hex_digit(c);
    if (digit < 0) return wrong(s, "an escape is not hexadecimal");
    value = value << 4 | (uint32_t)digit;
  }
  *out = value;
  return true;
}

static bool escape(scan *s, uint32_t *code) {
  if (s->at == s->end) return wrong(s, "a string does not end");
  const unsigned char c = *s->at++;
  uint32_t low;
  switch (c) {
    case '"': case '\\': case '/': *code = c; return true;
    case 'b': case 'f': case 'n': case 'r': case 't': *code = '\n'; return true;
    case 'u': break;
    default: return wrong(s, "an escape is unknown");
  }
  if (!hex4(s, code)) return false;
  if (!*code) return wrong(s, "a string has a zero character");
  if (*code < 0xd800 || *code > 0xdfff) return true;
  if (*code > 0xdbff || s->end - s->at < 2 || s->at[0] != '\\' || s->at[1] != 'u')
    return wrong(s, "half a surrogate pair");
  s->at += 2;
  if (!hex4(s, &low)) return false;
  if (low < 0xdc00 || low > 0xdfff) return wrong(s, "half a surrogate pair");
  *code = 0x10000; /* no control character is that far out */
  return true;
}

/* One character of UTF-8: no overlong form, no surrogate, nothing above 10FFFF. */
static bool utf8(scan *s, uint32_t *code) {
  const unsigned char c = *s->at++;
  const int more = phx__utf8_more(c);
  uint32_t value = more <= 0 ? c : c & (0x3fu >> more);
  if (more < 0 || s->end - s->at < more) return wrong(s, "not UTF-8");
  for (int i = 0; i < more; i++) {
    if ((*s->at & 0xc0) != 0x80) return wrong(s, "not UTF-8");
    value = value << 6 | (*s->at++ & 0x3fu);
  }
  if ((more == 2 && (value < 0x800 || (value >= 0xd800 && value <= 0xdfff))) ||
      (more == 3 && (value < 0x10000 || value > 0x10ffff)))
    return wrong(s, "not UTF-8");
  *code = value;
  return true;
}

/* After the opening quote. */
static bool string(scan *s, bool name) {
  for (;;) {
    uint32_t code;
    if (s->at == s->end) return wrong(s, "a string does not end");
    if (*s->at == '"') break;
    if (*s->at < 0x20) return wrong(s, "a string has a control character");
    if (*s->at == '\\') {
      s->at++;
      if (!escape(s, &code)) return false;
    } else if (!utf8(s, &code)) {
      return false;
    }
    if (name && (code < 0x20 || (code >= 0x7f && code < 0xa0))) return wrong(s, "a name has a control character");
  }
  s->at++;
  return true;
}

static bool digits(scan *s) {
  if (s->at == s->end || *s->at < '0' || *s->at > '9') return wrong(s, "a number lacks a digit");
  while (s->at < s->end && *s->at >= '0' && *s->at <= '9') s->at++;
  return true;
}

static bool is_one_of(const scan *s, const char *set) { return s->at < s->end && *s->at && strchr(set, *s->at); }

static bool fraction(scan *s) {
  if (!is_one_of(s, ".eE")) return true;
  if (!s->limits->fractions) return wrong(s, "a number is not an integer");
  if (*s->at == '.') {
    s->at++;
    if (!digits(s)) return false;
  }
  if (!is_one_of(s, "eE")) return true;
  s->at++;
  if (is_one_of(s, "+-")) s->at++;
  return digits(s);
}

static bool number(scan *s) {
  int64_t value = 0;
  if (*s->at == '-') s->at++;
  if (s->at == s->end || *s->at < '0' || *s->at > '9') return wrong(s, "not a value");
  const bool zero = *s->at == '0';
  const unsigned char *first = s->at;
  for (; s->at < s->end && *s->at >= '0' && *s->at <= '9'; s->at++)
    if ((value = value * 10 + (*s->at - '0')) > PHX__JSON_INTEGER_MOST) return wrong(s, "a number is above 2^53");
  if (zero && s->at - first > 1) return wrong(s, "a number begins with 0");
  return fraction(s);
}

static bool word(scan *s, const char *text) {
  const size_t n = strlen(text);
  if ((size_t)(s->end - s->at) < n || memcmp(s->at, text, n)) return wrong(s, "not a value");
  s->at += n;
  return true;
}

static bool value(scan *s);

static bool members(scan *s, bool object) {
  const char close = object ? '}' : ']';
  if (++s->depth > s->limits->depth) return wrong(s, "too many levels");
  if (take(s, close)) {
    s->depth--;
    return true;
  }
  do {
    if (object) {
      if (!take(s, '"')) return wrong(s, "a member needs a name");
      if (!string(s, true)) return false;
      if (!take(s, ':')) return wrong(s, "a name needs a ':'");
    }
    if (!value(s)) return false;
  } while (take(s, ','));
  s->depth--;
  return take(s, close) || wrong(s, object ? "an object does not end" : "a list does not end");
}

static bool value(scan *s) {
  blanks(s);
  if (s->at == s->end) return wrong(s, "the text ends too early");
  if (++s->values > s->limits->values) return wrong(s, "too many values");
  switch (*s->at) {
    case '{': s->at++; return members(s, true);
    case '[': s->at++; return members(s, false);
    case '"': s->at++; return string(s, false);
    case 't': return word(s, "true");
    case 'f': return word(s, "false");
    case 'n': return word(s, "null");
    default: return number(s);
  }
}

/* ---- names that stand twice ---- */
static int by_name(const void *a, const void *b) {
  return strcmp((*(const cJSON *const *)a)->string, (*(const cJSON *const *)b)->string);
}

static phx_status check_names(const char *what, const cJSON *object, phx_error *err) {
  phx_status status = PHX_OK;
  size_t n = 0, i = 0;
  const cJSON *item;
  cJSON_ArrayForEach(item, object) n++;
  const cJSON **sorted = phx__calloc(n, sizeof *sorted);
  if (!sorted) return phx_fail(err, PHX_NOMEM, "%s: no memory", what);
  cJSON_ArrayForEach(item, object) sorted[i++] = item;
  qsort(sorted, n, sizeof *sorted, by_name);
  for (i = 1; i < n && !status; i++)
    if (!strcmp(sorted[i - 1]->string, sorted[i]->string))
      status = phx_fail(err, PHX_IO, "%s: the name '%.200s' stands twice", what, sorted[i]->string);
  phx__free(sorted);
  return status;
}

static phx_status check_tree(const char *what, const cJSON *at, phx_error *err) {
  const cJSON *item;
  phx_status status = cJSON_IsObject(at) ? check_names(what, at, err) : PHX_OK;
  if (cJSON_IsObject(at) || cJSON_IsArray(at))
    for (item = at->child; item && !status; item = item->next)
      if (item->child) status = check_tree(what, item, err);
  return status;
}

phx_status phx__json_read(const char *what, const char *text, size_t bytes, const phx__json_limits *limits,
                          cJSON **out, phx_error *err) {
  const unsigned char *begin = (const unsigned char *)text;
  scan s = {.at = begin, .begin = begin, .end = begin + bytes, .limits = limits};
  if (!bytes || text[0] != '{') return phx_fail(err, PHX_IO, "%s is not JSON: it does not begin with '{'", what);
  if (value(&s)) {
    blanks(&s);
    if (s.at != s.end) wrong(&s, "something follows the object");
  }
  if (s.why) return phx_fail(err, PHX_IO, "%s is not JSON as it should be, at byte %zu: %s", what,
                             (size_t)(s.at - s.begin), s.why);
  cJSON *root = cJSON_ParseWithLength(text, bytes);
  if (!root) return phx_fail(err, PHX_NOMEM, "%s: no memory", what); /* the text is good */
  phx_status status = check_tree(what, root, err);
  if (status) cJSON_Delete(root);
  else *out = root;
  return status;
}

bool phx__json_integer(const cJSON *item, int64_t lo, int64_t hi, int64_t *out) {
  if (!cJSON_IsNumber(item)) return false;
  const double value = item->valuedouble; /* exact for an integer up to 2^53 */
  if (!(value >= (double)lo && value <= (double)hi) || value != floor(value)) return false;
  *out = (int64_t)value;
  return true;
}

/* ---- texts ---- */
static bool make_room(phx__text *t, size_t bytes) {
  if (t->failed) return false;
  if (t->room - t->bytes > bytes) return true;
  const size_t room = (t->bytes + bytes + 1) * 2;
  char *data = phx__sys.realloc(t->data, room);
  if (!data) {
    t->failed = true;
    return false;
  }
  t->data = data;
  t->room = room;
  return true;
}

void phx__text_bytes(phx__text *t, const void *data, size_t bytes) {
  if (!make_room(t, bytes)) return;
  memcpy(t->data + t->bytes, data, bytes);
  t->bytes += bytes;
  t->data[t->bytes] = 0;
}

void phx__text_add(phx__text *t, const char *format, ...) {
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  const int n = vsnprintf(NULL, 0, format, args);
  if (n >= 0 && make_room(t, (size_t)n)) {
    vsnprintf(t->data + t->bytes, (size_t)n + 1, format, again);
    t->bytes += (size_t)n;
  }
  va_end(again);
  va_end(args);
}

void phx__text_json(phx__text *t, const char *s) {
  phx__text_bytes(t, "\"", 1);
  for (const char *p = s; *p; p++) {
    const unsigned char c = (unsigned char)*p;
    if (c == '"' || c == '\\') phx__text_add(t, "\\%c", c);
    else if (c < 0x20) phx__text_add(t, "\\u%04x", c);
    else phx__text_bytes(t, p, 1);
  }
  phx__text_bytes(t, "\"", 1);
}
