/* The INI reader: what is delivered, what is refused with its line, and every trap of the library below it. */
#include <criterion/criterion.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "config/config_ini.h"
#include "base/status.h"
#include "base/sys.h"
#include "../fuzz/fuzz_ini.c"

typedef struct heard {
  char text[8192];
  size_t budget; /* callbacks until one says that memory ran out */
} heard;

static bool say(heard *h, const char *format, int line, const char *a, const char *b, const char *c) {
  size_t used = strlen(h->text);
  snprintf(h->text + used, sizeof h->text - used, format, line, a, b, c);
  return h->budget == 0 || --h->budget > 0;
}
static bool hear_section(void *arg, int line, const char *name) { return say(arg, "%d[%s]\n", line, name, "", ""); }
static bool hear_entry(void *arg, int line, const char *section, const char *key, const char *value) {
  return say(arg, "%d %s.%s=<%s>\n", line, section, key, value);
}
static bool hear_error(void *arg, int line, const char *message) {
  char first[17];
  snprintf(first, sizeof first, "%s", message);
  return say(arg, "%d! %s\n", line, first, "", "");
}

static void expect_bytes(const char *ini, size_t bytes, const char *events) {
  heard h = {0};
  const phx__ini_sink sink = {&h, hear_section, hear_entry, hear_error};
  cr_expect_eq(phx__ini_parse(ini, bytes, &sink), PHX_OK);
  cr_expect_str_eq(h.text, events);
}
static void expect_events(const char *ini, const char *events) { expect_bytes(ini, strlen(ini), events); }

Test(ini, plain) {
  expect_events("; c\n[run]\nsteps = 3 ; three\n\n# c\nout=a b\nempty =\n[x]\ny : 2\n",
                "2[run]\n3 run.steps=<3>\n6 run.out=<a b>\n7 run.empty=<>\n8[x]\n9 x.y=<2>\n");
  expect_events("", "");
  expect_events("[run]\nlast = line without end", "1[run]\n2 run.last=<line without end>\n");
  expect_events("\xEF\xBB\xBF[run]\r\na = 1\r\n", "1[run]\n2 run.a=<1>\n");
  expect_events("[run]\na = 1 # not a comment\n", "1[run]\n2 run.a=<1 # not a comment>\n");
  expect_events("[run]\na = x;y\n", "1[run]\n2 run.a=<x;y>\n");
}

/* inih passes over a mark at the first line, behind the one that is ours to take: an entry became a section. */
Test(ini, second_byte_order_mark_is_refused) {
  expect_events("\xEF\xBB\xBF\xEF\xBB\xBF[run]=junk ] here\nb = 1\n", "1! a byte order mar\n2! a key before the\n");
  expect_events("\xEF\xBB\xBF\xEF\xBB\xBF[run]\nb = 1\n", "1! a byte order mar\n2! a key before the\n");
  expect_events("[run]\n\xEF\xBB\xBF" "a = 1\nb = \xEF\xBB\xBF\n",
                "1[run]\n2! a byte order mar\n3 run.b=<\xEF\xBB\xBF>\n");
}

/* inih would make this the value of lr. */
Test(ini, indented_line_is_refused) {
  expect_events("[a]\nlr = 0.1\n  stage = 3\n\tx = 1\n  ; comment\n \nb = 2\n  [c]\n",
                "1[a]\n2 a.lr=<0.1>\n3! an indented line\n4! an indented line\n7 a.b=<2>\n"
                "8! an indented line\n");
}

/* inih would cut it at 199 bytes and parse the rest as a line of its own: a path is often longer. */
static char value_heard[9000];
static bool keep_value(void *arg, int line, const char *section, const char *key, const char *value) {
  if (line == 2 && !strcmp(section, "a") && !strcmp(key, "k")) snprintf(value_heard, sizeof value_heard, "%s", value);
  return hear_entry(arg, line, section, key, line == 2 ? "long" : value);
}
Test(ini, long_values) {
  static char text[9500], value[9000];
  for (int n = 1; n <= 8400; n += n < 400 ? 1 : 97) {
    heard h = {0};
    const phx__ini_sink sink = {&h, hear_section, keep_value, hear_error};
    for (int i = 0; i < n; i++) value[i] = (char)('a' + i % 26);
    value[n] = 0;
    snprintf(text, sizeof text, "[a]\nk = %s \t; told = here\nb = 2\n[c]\nd = 3\n", value);
    const bool fits = strcspn(text + 4, "\n") <= 8192;
    value_heard[0] = 0;
    cr_assert_eq(phx__ini_parse(text, strlen(text), &sink), PHX_OK);
    cr_assert_str_eq(value_heard, fits ? value : "", "length %d", n);
    cr_assert_eq(!strstr(h.text, "2! the line is too"), fits, "length %d", n);
    cr_assert(strstr(h.text, "3 a.b=<2>\n4[c]\n5 c.d=<3>\n"), "length %d: %s", n, h.text);
  }
  memset(text, ';', 500); /* a long comment is only a comment */
  snprintf(text + 500, sizeof text - 500, "\n[a]\n");
  expect_events(text, "2[a]\n");
}

/* inih would give the keys to the section before. */
Test(ini, broken_section_takes_no_keys) {
  expect_events("[a]\nx = 1\n[b\ny = 2\n[c]\nz = 3\n", "1[a]\n2 a.x=<1>\n3! a section needs \n5[c]\n6 c.z=<3>\n");
  expect_events("[]\n[a b]\n[a]x\n[a] ; fine\n",
                "1! a section's name\n2! a section's name\n3! only a comment m\n4[a]\n");
  expect_events("x = 1\n", "1! a key before the\n");
}

Test(ini, bytes) {
  static const char nul[] = "[a]\nk = a\0b\nb = 2\n";
  expect_bytes(nul, sizeof nul - 1, "1[a]\n2! the line holds a\n3 a.b=<2>\n");
  expect_events("[a]\nk = \x1b[31m\n", "1[a]\n2! the line holds a\n");
  expect_events("[a]\nk = \xff\xfe\nl = \xc3\xa9\n", "1[a]\n2! the line is not \n3 a.l=<\xc3\xa9>\n");
}

Test(ini, names) {
  expect_events("[a]\nnothing here\n= 3\nabc ; x = 1\n",
                "1[a]\n2! expected [sectio\n3! a value without \n4! expected [sectio\n");
  char text[200], events[300];
  for (int n = 48; n <= 50; n++) {
    snprintf(text, sizeof text, "[a]\n%0*d = 1\n[%0*d]\n", n, 7, n, 7);
    if (n == 48)
      snprintf(events, sizeof events, "1[a]\n2 a.%048d=<1>\n3[%048d]\n", 7, 7);
    else
      snprintf(events, sizeof events, "1[a]\n2! a key is at most\n3! a section's name\n");
    expect_events(text, events);
  }
}

Test(ini, out_of_memory_stops) {
  for (size_t budget = 1; budget <= 3; budget++) {
    heard h = {.budget = budget};
    const phx__ini_sink sink = {&h, hear_section, hear_entry, hear_error};
    const char *text = "[a]\nx = 1\n  bad\ny = 2\n";
    cr_assert_eq(phx__ini_parse(text, strlen(text), &sink), PHX_NOMEM);
    cr_assert_null(strstr(h.text, "a.y"));
  }
}

Test(ini, files) {
  char *text = NULL;
  size_t bytes = 99;
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__ini_read("/nonexistent.ini", &text, &bytes, &err), PHX_INVALID);
  cr_assert_eq(phx__ini_read("/tmp", &text, &bytes, &err), PHX_INVALID);
  cr_assert_eq(phx__ini_read("/dev/zero", &text, &bytes, &err), PHX_INVALID);
  cr_assert(!text && bytes == 99);
  char path[] = "/tmp/phx-ini-XXXXXX";
  int fd = mkstemp(path);
  cr_assert_eq(ftruncate(fd, PHX__INI_FILE_LARGEST), 0);
  cr_assert_eq(phx__ini_read(path, &text, &bytes, &err), PHX_OK);
  cr_assert_eq(bytes, PHX__INI_FILE_LARGEST);
  phx__free(text);
  cr_assert_eq(ftruncate(fd, PHX__INI_FILE_LARGEST + 1), 0);
  cr_assert_eq(phx__ini_read(path, &text, &bytes, &err), PHX_INVALID);
  close(fd);
  unlink(path);
}

/* The fuzzer's corpus, each file whole, cut at every place, and with a byte changed. */
Test(ini, fuzz_corpus, .timeout = 120) {
  glob_t files;
  cr_assert_eq(glob(PHX_TEST_SOURCE "/tests/fuzz/ini/*", 0, NULL, &files), 0);
  cr_assert_geq(files.gl_pathc, 4);
  uint64_t random = 1;
  for (size_t i = 0; i < files.gl_pathc; i++) {
    char *text;
    size_t bytes;
    cr_assert_eq(phx__ini_read(files.gl_pathv[i], &text, &bytes, NULL), PHX_OK);
    for (size_t n = 0; n <= bytes; n++) {
      char *cut = malloc(n ? n : 1); /* exact size: reading past it is seen by AddressSanitizer */
      memcpy(cut, text, n);
      LLVMFuzzerTestOneInput((const uint8_t *)cut, n);
      random = random * 6364136223846793005u + 1442695040888963407u;
      if (n) cut[random >> 33 & 0xffff ? (random >> 33) % n : 0] = (char)(random >> 56);
      LLVMFuzzerTestOneInput((const uint8_t *)cut, n);
      free(cut);
    }
    phx__free(text);
  }
  globfree(&files);
}
