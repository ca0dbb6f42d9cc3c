/* metrics.jsonl over a disk that is full for a while: every line is there once and whole, or said to be lost; the file
 * of a run that goes on stays the same file; names become JSON whatever they hold. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "command.h"
#include "fault_turn.h"
#include "command/metrics.h"
#include "base/output.h"
#include "base/status.h"
#include "base/sys.h"

static char *dir, path[300];
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(metrics, .init = setup, .fini = teardown, .timeout = 60);

static char *content(void) { return command_read_file(dir, "metrics.jsonl"); }
static void put(phx__metrics *m, int step) {
  char line[64];
  const int n = snprintf(line, sizeof line, "{\"step\":%d,\"loss\":%d.5}\n", step, 100 - step);
  phx__metrics_line(m, line, (size_t)n, step);
}
/* Steps first..last, once each and in order. */
static void expect_steps(int first, int last) {
  char *text = content(), line[64], *at = text;
  for (int step = first; step <= last; step++) {
    const int n = snprintf(line, sizeof line, "{\"step\":%d,\"loss\":%d.5}\n", step, 100 - step);
    cr_assert(!strncmp(at, line, (size_t)n), "step %d is not at '%.80s'", step, at);
    at += n;
  }
  cr_assert_str_empty(at);
  free(text);
}

static const char *said_path(void) {
  static char said[300];
  snprintf(said, sizeof said, "%s/said", dir);
  return said;
}

/* ---- a disk that fails ---- */
Test(metrics, any_write_that_fails_or_is_short_loses_nothing) {
  static const int kinds[] = {FAULT_WRITING, FAULT_SHORT};
  fault_install();
  for (int k = 0; k < 2; k++)
    for (long turn = 1;; turn++) {
      phx_error err = PHX_ERROR_INIT;
      phx__metrics m;
      unlink(path);
      cr_assert_eq(phx__metrics_open(&m, path, 0, &err), PHX_OK);
      fault_begin((fault_kind)kinds[k], ENOSPC, turn);
      for (int step = 1; step <= 4; step++) put(&m, step);
      fault_end();
      cr_assert_eq(phx__metrics_flush(&m, &err), PHX_OK, "%s", err.message);
      phx__metrics_close(&m);
      expect_steps(1, 4);
      if (!fault.fired) break;
    }
}

static long room = -1; /* bytes that the disk still takes; -1: any number */
static phx__sys_table real;
static ssize_t full_write(int fd, const void *data, size_t bytes) {
  if (room < 0) return real.write(fd, data, bytes);
  if (room == 0) {
    errno = ENOSPC;
    return -1;
  }
  if ((long)bytes > room) bytes = (size_t)room;
  room -= (long)bytes;
  return real.write(fd, data, bytes);
}

Test(metrics, a_full_disk_is_said_once_and_caught_up) {
  phx_error err = PHX_ERROR_INIT;
  phx__metrics m;
  cr_assert_eq(phx__metrics_open(&m, path, 0, &err), PHX_OK);
  real = phx__sys;
  phx__sys.write = full_write;
  fflush(stderr);
  const int screen = dup(2), said_fd = open(said_path(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  dup2(said_fd, 2);
  for (int step = 1; step <= 60; step++) {
    if (step == 4) room = 10; /* the fourth line has begun */
    if (step == 50) room = -1;
    put(&m, step);
  }
  fflush(stderr);
  dup2(screen, 2);
  cr_assert_eq(phx__metrics_flush(&m, &err), PHX_OK, "%s", err.message);
  phx__metrics_close(&m);
  expect_steps(1, 60);
  char *said = command_read_file(dir, "said");
  const char *once = strstr(said, "cannot be written: No space left on device; its lines wait in memory");
  cr_assert(once && !strstr(once + 1, "cannot be written"), "%s", said);
  cr_assert(strstr(said, "is written again, and nothing is missing"), "%s", said);
  free(said);
}

Test(metrics, what_has_no_room_to_wait_is_said_to_be_lost) {
  enum { STEPS = 6000 };
  static char line[1000];
  phx_error err = PHX_ERROR_INIT;
  phx__metrics m;
  cr_assert_eq(phx__metrics_open(&m, path, 0, &err), PHX_OK);
  real = phx__sys;
  phx__sys.write = full_write;
  memset(line, ' ', sizeof line);
  line[sizeof line - 1] = '\n';
  for (int step = 1; step <= STEPS; step++) {
    room = 0;
    if (step == 1) room = 7;
    if (step == STEPS) room = -1;
    line[snprintf(line, 40, "{\"step\":%d}", step)] = ' ';
    phx__metrics_line(&m, line, sizeof line, step);
  }
  const int rest = (int)sizeof line - 7; /* of the first, which has begun */
  const int kept = 1 + (PHX__METRICS_WAITING - rest) / (int)sizeof line;
  cr_assert_eq(phx__metrics_flush(&m, &err), PHX_IO);
  char expected[64];
  snprintf(expected, sizeof expected, "lacks %d lines from step ", STEPS - 1 - kept);
  cr_assert(strstr(err.message, expected), "no '%s' in: %s", expected, err.message);
  cr_assert_eq(phx__metrics_flush(&m, &err), PHX_OK, "it is told once");
  phx__metrics_close(&m);
  FILE *f = fopen(path, "re");
  int lines = 0, last = 0;
  for (; fread(line, sizeof line, 1, f) == 1; lines++) {
    int step = 0;
    cr_assert_eq(sscanf(line, "{\"step\":%d}", &step), 1);
    cr_assert(step > last && line[sizeof line - 1] == '\n', "a line is torn after step %d", last);
    last = step;
  }
  cr_assert_eq(fgetc(f), EOF);
  fclose(f);
  cr_assert_eq(lines, kept + 1);
  cr_assert_eq(last, STEPS);
}

Test(metrics, what_is_missing_at_the_end_is_an_error) {
  phx_error err = PHX_ERROR_INIT;
  phx__metrics m;
  cr_assert_eq(phx__metrics_open(&m, path, 0, &err), PHX_OK, "%s", err.message);
  real = phx__sys;
  phx__sys.write = full_write;
  room = 0;
  put(&m, 1);
  cr_assert_eq(phx__metrics_flush(&m, &err), PHX_IO);
  cr_assert(strstr(err.message, "No space left on device") && strstr(err.message, "missing"), "%s", err.message);
  phx__metrics_close(&m);
}

/* ---- going on ---- */
static void cut_to(int last, const char *before, const char *after) {
  phx_error err = PHX_ERROR_INIT;
  phx__metrics m;
  struct stat was, is;
  command_write_file(dir, "metrics.jsonl", before, strlen(before));
  cr_assert_eq(stat(path, &was), 0);
  cr_assert_eq(phx__metrics_open(&m, path, last, &err), PHX_OK, "%s", err.message);
  phx__metrics_close(&m);
  cr_assert_eq(stat(path, &is), 0);
  cr_expect_eq(was.st_ino, is.st_ino, "another file");
  char *text = content();
  cr_expect_str_eq(text, after, "cut to %d", last);
  free(text);
}

Test(metrics, the_file_of_a_run_that_goes_on_is_cut_in_place) {
  const char *five =
      "{\"step\":1,\"a\":1}\n{\"step\":2}\n{\"after_step\":2,\"checkpoint\":{}}\n{\"step\":3}\n{\"step\":4}\n";
  cut_to(2, five, "{\"step\":1,\"a\":1}\n{\"step\":2}\n{\"after_step\":2,\"checkpoint\":{}}\n");
  cut_to(4, five, five);
  cut_to(9, five, five);
  cut_to(9, "{\"step\":1}\n{\"step\":2,\"lo", "{\"step\":1}\n");
  cut_to(1, "{\"step\":1", "");
  cut_to(1, "", "");
  cut_to(3, "{\"step\":3}\n{\"after_step\":4,\"checkpoint\":{}}\n", "{\"step\":3}\n");
  /* lines across the pieces that are read */
  enum { LINES = 5000, KEPT = 4321 };
  char *whole = calloc(LINES, 40), *at = whole;
  size_t kept = 0;
  for (int step = 1; step <= LINES; step++) {
    at += sprintf(at, "{\"step\":%d,\"loss\":%d}\n", step, step);
    if (step == KEPT) kept = (size_t)(at - whole);
  }
  char *part = strndup(whole, kept);
  cut_to(KEPT, whole, part);
  free(part);
  free(whole);
  phx_error err = PHX_ERROR_INIT; /* none there: a new one */
  phx__metrics m;
  unlink(path);
  cr_assert_eq(phx__metrics_open(&m, path, 7, &err), PHX_OK);
  put(&m, 8);
  phx__metrics_close(&m);
  expect_steps(8, 8);
}

/* What the lines up to `last` say of it. */
static void expect_told(int last, const char *lines, int step, int loss, int hash) {
  phx_error err = PHX_ERROR_INIT;
  phx__metrics m;
  command_write_file(dir, "metrics.jsonl", lines, strlen(lines));
  cr_assert_eq(phx__metrics_open(&m, path, last, &err), PHX_OK, "%s", err.message);
  cr_expect_eq(m.told.step, step, "%s", lines);
  cr_expect_eq(m.told.valid_loss, loss, "%s", lines);
  cr_expect_eq(m.told.state_hash, hash, "%s", lines);
  phx__metrics_close(&m);
}

Test(metrics, what_is_told_of_the_step_before_is_known) {
  expect_told(2, "{\"step\":2,\"loss\":1}\n", 1, 0, 0);
  expect_told(2, "{\"step\":2,\"loss\":1,\"valid_loss\":null,\"state_hash\":\"0\"}\n", 1, 1, 1);
  expect_told(2, "{\"step\":2,\"loss\":1}\n{\"after_step\":2,\"valid_loss\":3}\n", 1, 1, 0);
  expect_told(2, "{\"step\":1,\"valid_loss\":3}\n{\"step\":2,\"loss\":1}\n", 1, 0, 0);
  expect_told(2, "{\"step\":2,\"loss\":1}\n{\"step\":3,\"valid_loss\":3}\n", 1, 0, 0);
  expect_told(2, "{\"step\":2,\"loss\":1}\n{\"after_step\":2,\"valid_loss\":3", 1, 0, 0); /* torn */
  expect_told(2, "{\"step\":2,\"ddp.valid_loss\":1,\"ddp.\\\"state_hash\":2}\n", 1, 0, 0);
  expect_told(2, "{\"step\":1,\"valid_loss\":3}\n", 0, 0, 0);
  expect_told(0, "{\"step\":2,\"valid_loss\":3}\n", 0, 0, 0);
}

Test(metrics, every_call_of_opening_may_fail) {
  const char *two = "{\"step\":1}\n{\"step\":2}\n";
  static const int kinds[] = {FAULT_WRITING, FAULT_READING, FAULT_MEMORY};
  fault_install();
  for (int k = 0; k < 3; k++)
    for (long turn = 1;; turn++) {
      phx_error err = PHX_ERROR_INIT;
      phx__metrics m;
      command_write_file(dir, "metrics.jsonl", two, strlen(two));
      fault_begin((fault_kind)kinds[k], EIO, turn);
      const phx_status status = phx__metrics_open(&m, path, 1, &err);
      fault_end();
      cr_assert_eq(status != PHX_OK, fault.fired, "%s failed, and the status is %d", fault.call, status);
      phx__metrics_close(&m);
      char *text = content();
      cr_expect_str_eq(text, status ? two : "{\"step\":1}\n", "%s failed", fault.call);
      free(text);
      if (!fault.fired) break;
    }
}

/* ---- names ---- */
Test(metrics, any_name_becomes_json) {
  static const char *const names[] = {"loss",       "a\"b",       "back\\slash",           "new\nline", "\x01\x1f\x7f",
                                      "gr\xc3\xbc\xc3\x9f", "bad \xff\xc3", "}, \"step\": 9 //", ""};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    char quoted[300];
    const size_t n = phx__json_quote(names[i], quoted, sizeof quoted);
    cr_assert_eq(n, strlen(quoted));
    cr_expect_null(strchr(quoted, '\n'));
    cJSON *json = cJSON_Parse(quoted);
    cr_assert(cJSON_IsString(json), "%s", quoted);
    cr_expect_eq(strlen(json->valuestring), strlen(names[i]));
    if (i != 4 && i != 6) cr_expect_str_eq(json->valuestring, names[i]);
    cJSON_Delete(json);
  }
  char small[12], longer[300];
  memset(longer, 'x', sizeof longer);
  longer[sizeof longer - 1] = 0;
  cr_expect_eq(phx__json_quote("much too long", small, sizeof small), 0);
  cr_expect_eq(phx__json_quote(longer, small, sizeof small), 0);
}
