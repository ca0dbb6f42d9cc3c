/* core/config/config_ini.c - inih, and the guard in front of it.
 *
 * inih accepts too much silently: an overlong line is cut and its rest parsed as a line of its own, an indented line
 * continues the value above, a NUL ends a value, keys after a broken [section go to the section before.  So a reader of
 * our own hands it one whole line at a time, checks the line first, and hands an empty one where it refuses; it counts
 * lines itself, which is right with every build of inih.  Nothing here uses inih's macros or run-time globals: builds
 * differ in them.  A line that inih's buffer cannot hold (200 bytes) is taken apart here, by the same rules.
 *
 * Does not know which sections and keys exist.  Any thread. */
#include "base/status.h"
#include "base/sys.h"
#include "base/utf8.h"
#include "config/config_ini.h"

#include <errno.h>
#include <fcntl.h>
#include <ini.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define BROKEN_SECTION "?" /* where inih is sent after a section line that was refused */

typedef struct parse {
  const phx__ini_sink *sink;
  const char *at, *end; /* what is left of the text */
  int line;             /* the one that inih works on, from 1 */
  char section[PHX__INI_NAME_LONGEST + 1];
  bool stop;            /* a callback ran out of memory */
} parse;

static void refuse(parse *p, const char *message) {
  if (!p->stop && !p->sink->error(p->sink->arg, p->line, message)) p->stop = true;
}

static bool is_blank(char c) { return c == ' ' || c == '\t'; }

static bool is_utf8(const unsigned char *s, size_t n) {
  for (size_t i = 0; i < n;) {
    const int more = phx__utf8_more(s[i]);
    if (more < 0 || (size_t)more >= n - i) return false;
    for (size_t k = 1; k <= (size_t)more; k++)
      if ((s[i + k] & 0xc0) != 0x80) return false;
    i += (size_t)more + 1;
  }
  return true;
}

static const char *bad_bytes(const char *text, size_t n) {
  if (memchr(text, 0, n)) return "the line holds a NUL byte";
  for (size_t i = 0; i < n; i++)
    if (((unsigned char)text[i] < ' ' && text[i] != '\t') || text[i] == 127)
      return "the line holds a control character";
  return is_utf8((const unsigned char *)text, n) ? NULL : "the line is not UTF-8 text";
}

/* `[name]`, then nothing but a comment.  Tells the sink, and makes sure that inih changes section in any case. */
static void check_section(parse *p, char *line, size_t bytes, size_t n) {
  char name[PHX__INI_NAME_LONGEST + 1], *close = memchr(line, ']', n);
  size_t length = close ? (size_t)(close - line) - 1 : 0;
  const char *wrong = NULL;
  if (!close)
    wrong = "a section needs a closing ']'";
  else if (length == 0 || strcspn(line + 1, " \t;[") < length)
    wrong = "a section's name is one word, as in [run]";
  else if (length > PHX__INI_NAME_LONGEST)
    wrong = "a section's name is at most 48 bytes";
  for (const char *rest = close ? close + 1 : line; !wrong && rest < line + n && *rest != ';'; rest++)
    if (!is_blank(*rest)) wrong = "only a comment may follow a section's name";
  snprintf(p->section, sizeof p->section, "%s", BROKEN_SECTION);
  if (wrong) {
    refuse(p, wrong);
    snprintf(line, bytes, "[%s]\n", BROKEN_SECTION);
    return;
  }
  memcpy(name, line + 1, length);
  name[length] = 0;
  memcpy(p->section, name, length + 1);
  if (!p->stop && !p->sink->section(p->sink->arg, p->line, name)) p->stop = true;
}

static const char *bad_entry(const char *line, size_t n) {
  size_t i = 0;
  while (i < n && line[i] != '=' && line[i] != ':' && !(line[i] == ';' && i && is_blank(line[i - 1]))) i++;
  if (i == n || line[i] == ';') return "expected [section], key = value, or a comment that begins with ';'";
  if (i == 0) return "a value without a key";
  return NULL;
}

static bool has_mark(const char *line, size_t n) { return n >= 3 && memcmp(line, "\xEF\xBB\xBF", 3) == 0; }

static int take_entry(void *arg, const char *section, const char *key, const char *value);

/* `key = value ; comment`, of which bad_entry finds no fault. */
static void take_long_entry(parse *p, const char *from, size_t n) {
  char *text = phx__calloc(1, n + 1);
  if (!text) {
    p->stop = true;
    return;
  }
  memcpy(text, from, n);
  char *value = text + strcspn(text, "=:");
  size_t key = (size_t)(value - text);
  *value++ = 0;
  while (key && is_blank(text[key - 1])) text[--key] = 0;
  for (size_t i = 1; value[i - 1] && value[i]; i++)
    if (value[i] == ';' && is_blank(value[i - 1])) value[i] = 0;
  while (is_blank(*value)) value++;
  size_t length = strlen(value);
  while (length && is_blank(value[length - 1])) value[--length] = 0;
  take_entry(p, p->section, text, value);
  phx__free(text);
}

/* inih's fgets: one line of at most `room` bytes with its end. */
static char *read_line(char *line, int room, void *arg) {
  parse *p = arg;
  if (p->stop || p->at == p->end) return NULL;
  const char *from = p->at, *newline = memchr(from, '\n', (size_t)(p->end - from));
  size_t n = (size_t)((newline ? newline : p->end) - from);
  p->at = newline ? newline + 1 : p->end;
  p->line++;
  if (p->line == 1 && has_mark(from, n)) from += 3, n -= 3;
  if (n && from[n - 1] == '\r') n--;
  while (n && is_blank(from[n - 1])) n--;
  size_t indent = 0;
  while (indent < n && is_blank(from[indent])) indent++;
  bool nothing = indent == n || from[indent] == ';' || from[indent] == '#';
  const char *wrong = bad_bytes(from, n);
  snprintf(line, (size_t)room, "\n");
  if (!wrong && nothing) return line;
  const bool is_long = room < 4 || n > (size_t)room - 4;
  if (!wrong && n > PHX__INI_LINE_LONGEST) wrong = "the line is too long (at most 8192 bytes)";
  if (!wrong && is_long && from[0] == '[') wrong = "the line of a section is too long (at most 195 bytes)";
  if (!wrong && has_mark(from, n)) wrong = "a byte order mark is more than the one that may begin the file: remove it";
  if (!wrong && indent) wrong = "an indented line would continue the one above: begin it in the first column";
  if (!wrong && from[0] != '[') wrong = bad_entry(from, n);
  if (wrong) {
    refuse(p, wrong);
    if (n && from[0] == '[') {
      snprintf(line, (size_t)room, "[%s]\n", BROKEN_SECTION);
      snprintf(p->section, sizeof p->section, "%s", BROKEN_SECTION);
    }
    return line;
  }
  if (is_long) {
    take_long_entry(p, from, n);
    return line;
  }
  memcpy(line, from, n);
  line[n] = '\n';
  line[n + 1] = 0;
  if (line[0] == '[') check_section(p, line, (size_t)room, n);
  return line;
}

static int take_entry(void *arg, const char *section, const char *key, const char *value) {
  parse *p = arg;
  if (p->stop || !value || strcmp(section, BROKEN_SECTION) == 0) return 1;
  if (!section[0])
    refuse(p, "a key before the first [section]");
  else if (strlen(key) > PHX__INI_NAME_LONGEST)
    refuse(p, "a key is at most 48 bytes");
  else if (!p->sink->entry(p->sink->arg, p->line, section, key, value))
    p->stop = true;
  return 1;
}

phx_status phx__ini_parse(const char *text, size_t bytes, const phx__ini_sink *sink) {
  parse p = {.sink = sink, .at = text, .end = text + bytes};
  int line = ini_parse_stream(read_line, &p, take_entry, &p);
  if (line < 0) return PHX_NOMEM;
  if (line > 0) {
    p.line = line;
    refuse(&p, "expected [section], key = value, or a comment that begins with ';'");
  }
  return p.stop ? PHX_NOMEM : PHX_OK;
}

phx_status phx__ini_read(const char *path, char **out, size_t *out_bytes, phx_error *err) {
  phx_status status = PHX_OK;
  struct stat info;
  char *text = NULL;
  size_t used = 0;
  int fd = phx__sys.open(path, O_RDONLY | O_NONBLOCK, 0);
  if (fd < 0) return phx_fail_errno(err, PHX_INVALID, errno, "%s", path);
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    status = phx_fail(err, PHX_INVALID, "%s: not a regular file: every rank reads it again", path);
    goto done;
  }
  text = phx__calloc(PHX__INI_FILE_LARGEST + 1, 1);
  if (!text) {
    status = phx_fail(err, PHX_NOMEM, "out of memory");
    goto done;
  }
  for (;;) {
    ssize_t got = phx__sys.read(fd, text + used, PHX__INI_FILE_LARGEST + 1 - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) status = phx_fail_errno(err, PHX_IO, errno, "%s cannot be read", path);
    if (got <= 0) break;
    used += (size_t)got;
    if (used > PHX__INI_FILE_LARGEST) {
      status = phx_fail(err, PHX_INVALID, "%s: larger than 1 MiB: not a configuration", path);
      break;
    }
  }
done:
  phx__sys.close(fd);
  if (status != PHX_OK) {
    phx__free(text);
    return status;
  }
  *out = text;
  *out_bytes = used;
  return PHX_OK;
}
