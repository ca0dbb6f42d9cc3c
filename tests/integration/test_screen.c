/* What a run shows: a bar that fits a terminal of any width, and stands alone; plain lines where no bar belongs. */
#include <criterion/criterion.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/screen.h"
#include "training.h"

static const char small_model[] =
    "[batch]\nmicro = 1\nsequence = 33\n"
    "[model]\nplugin = gpt\nlayers = 1\nheads = 3\nwidth = 30\ncontext = 33\nvocab = 257\n";
static char *dir;
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, small_model);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(screen, .init = setup, .fini = teardown, .timeout = 120);

/* ---- what fits ---- */
Test(screen, the_most_that_has_room) {
  static const struct {
    int columns;
    const char *text;
  } rows[] = {
      {200, "[########................] 10/30 loss 5.5546 norm 1.203 14656 tok/s 32.7 MiB ETA 1:05 | held-out 5.4000"},
      {104, "[########................] 10/30 loss 5.5546 norm 1.203 14656 tok/s 32.7 MiB ETA 1:05 | held-out 5.4000"},
      {100, "[#######..............] 10/30 loss 5.5546 norm 1.203 14656 tok/s 32.7 MiB ETA 1:05 | held-out 5.4000"},
      {79, "10/30 loss 5.5546 norm 1.203 14656 tok/s 32.7 MiB ETA 1:05 | held-out 5.4000"},
      {70, "10/30 loss 5.5546 norm 1.203 14656 tok/s ETA 1:05 | held-out 5.4000"},
      {60, "10/30 loss 5.5546 14656 tok/s ETA 1:05 | held-out 5.4000"},
      {50, "10/30 loss 5.5546 ETA 1:05 | held-out 5.4000"},
      {39, "10/30 loss 5.5546 | held-out 5.4000"},
      {19, "10/30 loss 5.5546"},
      {9, "10/30 los"},
      {0, ""},
      {-1, ""},
  };
  phx__screen_line line = {.step = 10, .steps = 30, .loss = 5.5546, .norm = 1.203, .rate = 14656, .left = 65,
                           .memory = "32.7 MiB", .note = "held-out 5.4000"};
  char text[300];
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    phx__screen_fit(&line, rows[i].columns, text, sizeof text);
    cr_expect_str_eq(text, rows[i].text, "%d columns: '%s'", rows[i].columns, text);
  }
  line = (phx__screen_line){.step = 1000000000, .steps = 1000000000, .loss = -1e300, .norm = 1e300, .rate = 1e300,
                            .left = 1e300, .memory = "1234567.8 TiB"};
  for (int columns = 0; columns < 400; columns++) {
    phx__screen_fit(&line, columns, text, sizeof text);
    cr_assert_leq(strlen(text), (size_t)columns);
  }
}

static const char *variables[8];
static const char *variable(const char *name) {
  for (int i = 0; variables[i]; i += 2)
    if (!strcmp(variables[i], name)) return variables[i + 1];
  return NULL;
}
#define WANTS(terminal, ...)                                                             \
  (memset(variables, 0, sizeof variables),                                               \
   memcpy(variables, (const char *[]){__VA_ARGS__, NULL}, sizeof((const char *[]){__VA_ARGS__, NULL})), \
   phx__screen_wants_bar(terminal, variable))

Test(screen, a_bar_only_where_it_belongs) {
  cr_expect(WANTS(true, "TERM", "xterm-256color"));
  cr_expect_not(WANTS(false, "TERM", "xterm-256color"));
  cr_expect_not(WANTS(true, "TERM", "dumb"));
  cr_expect_not(WANTS(true, "TERM", ""));
  cr_expect_not(WANTS(true, "HOME", "/"));
  cr_expect_not(WANTS(true, "TERM", "xterm", "OMPI_COMM_WORLD_SIZE", "2"));
  cr_expect_not(WANTS(true, "TERM", "xterm", "PMIX_RANK", "0"));
  cr_expect_not(WANTS(true, "TERM", "xterm", "PMI_RANK", "0"));
}

/* ---- on a terminal ---- */
typedef struct shown {
  int status;
  char out[1 << 17];
  size_t used;
} shown;

/* then: the columns from the first bar on, if not 0. */
static shown *show(int columns, int then, const char *term, const char *more, const char *more_value) {
  shown *s = calloc(1, sizeof *s);
  struct winsize size = {.ws_row = 24, .ws_col = (unsigned short)columns};
  static int runs;
  char out[40];
  int master;
  snprintf(out, sizeof out, "run.out=out%d", runs++);
  const pid_t pid = forkpty(&master, NULL, NULL, &size);
  cr_assert_geq(pid, 0);
  if (pid == 0) {
    if (chdir(dir)) _exit(126);
    unsetenv("TERM");
    if (term) setenv("TERM", term, 1);
    if (more) setenv(more, more_value, 1);
    execl(PHX_TEST_COMMAND, "phalanx", "train", "run.ini", "--steps", "30", "-n", "2", "--set", "checkpoint.every=7",
          "--set", "checkpoint.background=no", "--set", "data.valid=valid.bin", "--set", out, (char *)NULL);
    _exit(127);
  }
  for (;;) {
    struct pollfd p = {.fd = master, .events = POLLIN};
    if (poll(&p, 1, 60000) <= 0) break;
    const ssize_t n = read(master, s->out + s->used, sizeof s->out - 1 - s->used);
    if (n <= 0) break; /* EIO: the other end is closed */
    s->used += (size_t)n;
    if (then && strstr(s->out, "\r\033[K")) {
      size.ws_col = (unsigned short)then;
      ioctl(master, TIOCSWINSZ, &size);
      s->out[s->used++] = '\001'; /* from here on, and the line that was being drawn */
      then = 0;
    }
  }
  kill(pid, SIGKILL); /* if the time was up; else it is a zombie already or on its way out */
  cr_assert_eq(waitpid(pid, &s->status, 0), pid);
  close(master);
  cr_assert_eq(s->status, 0, "%s", s->out);
  return s;
}

/* Each line that was drawn: from \r\033[K up to what moves the cursor next. */
static int check_bars(const char *out, int columns) {
  int n = 0;
  for (const char *at = out; (at = strstr(at, "\r\033[K")); n++) {
    at += 4;
    const size_t length = strcspn(at, "\r\n\033\001");
    cr_expect_lt(length, (size_t)columns, "%d columns: '%.*s'", columns, (int)length, at);
  }
  return n;
}

Test(screen, a_bar_fits_the_terminal) {
  static const int columns[] = {120, 80, 40, 20};
  setenv("PHALANX_LOG", "warn", 1);
  for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
    shown *s = show(columns[i], 0, "xterm", NULL, NULL);
    cr_expect_geq(check_bars(s->out, columns[i]), 30);
    cr_expect(strstr(s->out, "30/30 loss "), "%s", s->out);
    cr_expect_eq(strstr(s->out, "[########################] 30/30 loss ") != NULL, columns[i] == 120, "%s", s->out);
    cr_expect_eq(strstr(s->out, "held-out ") != NULL, columns[i] >= 40, "%s", s->out);
    cr_expect_null(strstr(s->out, "step "), "a plain line on a terminal:\n%s", s->out);
    cr_expect_eq(s->out[s->used - 1], '\n');
    cr_expect_eq(strchr(s->out, '\n'), s->out + s->used - 1, "one line: %s", s->out);
    free(s);
  }
}

Test(screen, a_window_that_changes_its_size) {
  setenv("PHALANX_LOG", "warn", 1);
  shown *s = show(120, 40, "xterm", NULL, NULL);
  const char *changed = strchr(s->out, '\001');
  cr_assert_not_null(changed);
  changed = strstr(changed, "\r\033[K"); /* what was drawn meanwhile */
  check_bars(changed ? changed + 4 : "", 40);
  free(s);
}

/* A line of the log begins on a line of its own, not behind the bar. */
Test(screen, the_log_stands_alone) {
  shown *s = show(80, 0, "xterm", NULL, NULL);
  int lines = 0;
  for (const char *at = s->out; (at = strstr(at, " rank 0 ")); at += 8) {
    const char *begin = at - 13; /* [12:34:56.789 rank 0 core] */
    const size_t plugin = strspn(at + 8, "abcdefghijklmnopqrstuvwxyz");
    if (plugin == 0 || at[8 + plugin] != ']') continue; /* a message that names the rank */
    lines++;
    cr_assert(begin >= s->out && *begin == '[', "%s", s->out);
    cr_expect(begin == s->out || begin[-1] == '\n' || !strncmp(begin - 4, "\r\033[K", 4), "'%.60s'",
              begin - (begin - s->out > 20 ? 20 : begin - s->out));
  }
  cr_expect_gt(lines, 6, "%s", s->out);
  free(s);
}

static void expect_plain(const char *what, const char *term, const char *more, const char *more_value) {
  shown *s = show(80, 0, term, more, more_value);
  cr_expect_null(strchr(s->out, '\033'), "%s: a control sequence in\n%s", what, s->out);
  cr_expect(strstr(s->out, "step   30/30 | loss "), "%s: %s", what, s->out);
  free(s);
}

Test(screen, plain_lines_on_a_dumb_terminal) {
  setenv("PHALANX_LOG", "warn", 1);
  expect_plain("dumb", "dumb", NULL, NULL);
  expect_plain("no TERM", NULL, NULL, NULL);
  expect_plain("mpirun's terminal", "xterm", "PMIX_RANK", "0");
}

Test(screen, plain_lines_elsewhere) {
  setenv("PHALANX_LOG", "warn", 1);
  command_result r = RUN(dir, 60, "train", "run.ini", "--steps", "30", "--set", "run.log_every=10", "-n", "2");
  cr_assert_eq(r.status, 0, "%s", r.out);
  int lines = 0;
  for (const char *at = r.out; (at = strchr(at, '\n')); at++) lines++;
  cr_expect_eq(lines, 4, "%s", r.out); /* the first, and every tenth */
  cr_expect(strstr(r.out, "step   30/30 | loss ") && strstr(r.out, " tok/s | ") && !strchr(r.out, '\r'), "%s", r.out);
  command_free(&r);
}
