/* core/base/screen.c - see screen.h.
 *
 * A bar is drawn where its control sequences do what they say: standard output is a terminal, TERM names one that is
 * not dumb, and no MPI launcher stands between (mpirun gives rank 0 a terminal of its own and copies what comes into a
 * log).  The width is asked for at every line, so that a window may change its size.  A line never takes the last
 * column, where some terminals begin a new one.
 * Threads: phx__screen_clear from any, the rest [main]. */
#include "base/screen.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { BAR_MOST = 24, BAR_LEAST = 8, COLUMNS_UNKNOWN = 80, LINE_BYTES = 600 /* all parts at their longest */ };

static int unfinished; /* the bar stands on a line that is not ended */

/* ---- where ---- */
bool phx__screen_wants_bar(bool terminal, const char *(*variable)(const char *name)) {
  static const char *const launchers[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_FD"};
  const char *term = variable("TERM");
  if (!terminal || !term || !*term || !strcmp(term, "dumb")) return false;
  for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++)
    if (variable(launchers[i])) return false;
  return true;
}

static const char *environment(const char *name) { return getenv(name); }

bool phx__screen_has_bar(void) { return phx__screen_wants_bar(isatty(STDOUT_FILENO), environment); }

static int columns_now(void) {
  struct winsize size = {0};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) || size.ws_col == 0) return COLUMNS_UNKNOWN;
  return size.ws_col;
}

/* ---- what ---- */
typedef struct part {
  char text[64];
  int leaves; /* in this order, where there is no room; 0: it stays */
} part;
enum { STEP, LOSS, NORM, RATE, MEMORY, LEFT, NOTE, PARTS };

static void write_parts(const phx__screen_line *l, part parts[PARTS]) {
  const int64_t left = (int64_t)fmin(fmax(l->left, 0), 1e8);
  memset(parts, 0, PARTS * sizeof *parts);
  snprintf(parts[STEP].text, sizeof parts->text, "%" PRId64 "/%" PRId64, l->step, l->steps);
  snprintf(parts[LOSS].text, sizeof parts->text, "loss %.4f", l->loss);
  snprintf(parts[NORM].text, sizeof parts->text, "norm %.3f", l->norm);
  snprintf(parts[RATE].text, sizeof parts->text, "%.0f tok/s", l->rate);
  snprintf(parts[MEMORY].text, sizeof parts->text, "%s", l->memory);
  snprintf(parts[LEFT].text, sizeof parts->text, "ETA %" PRId64 ":%02d", left / 60, (int)(left % 60));
  snprintf(parts[NOTE].text, sizeof parts->text, "%s%s", l->note[0] ? "| " : "", l->note);
  parts[MEMORY].leaves = 1;
  parts[NORM].leaves = 2;
  parts[RATE].leaves = 3;
  parts[LEFT].leaves = 4;
  parts[NOTE].leaves = 5;
}

static int length(const part parts[PARTS]) {
  int n = 0;
  for (int i = 0; i < PARTS; i++)
    if (parts[i].text[0]) n += (int)strlen(parts[i].text) + (n > 0);
  return n;
}

void phx__screen_fit(const phx__screen_line *line, int columns, char *out, size_t room) {
  part parts[PARTS];
  char text[LINE_BYTES] = "";
  write_parts(line, parts);
  int bar = columns - length(parts) - 3; /* brackets and a space */
  if (bar > BAR_MOST) bar = BAR_MOST;
  if (bar < BAR_LEAST) bar = 0;
  for (int turn = 1; length(parts) > columns && turn <= 5; turn++)
    for (int i = 0; i < PARTS; i++)
      if (parts[i].leaves == turn) parts[i].text[0] = 0;
  size_t n = 0;
  if (bar > 0) {
    const int64_t full = line->step * bar / line->steps;
    text[n++] = '[';
    for (int i = 0; i < bar; i++) text[n++] = i < full ? '#' : '.';
    text[n++] = ']';
  }
  for (int i = 0; i < PARTS; i++)
    if (parts[i].text[0]) n += (size_t)snprintf(text + n, sizeof text - n, "%s%s", n > 0 ? " " : "", parts[i].text);
  snprintf(out, room, "%.*s", columns > 0 ? columns : 0, text);
}

/* ---- drawing ---- */
void phx__screen_draw(const phx__screen_line *l, bool bar, bool ends) {
  char text[LINE_BYTES];
  if (!bar) {
    printf("step %*" PRId64 "/%" PRId64 " | loss %.6f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s | %s%s%s\n", 4,
           l->step, l->steps, l->loss, l->norm, l->lr, 1e3 * l->seconds, l->rate, l->memory, l->note[0] ? " | " : "",
           l->note);
  } else {
    phx__screen_fit(l, columns_now() - 1, text, sizeof text);
    __atomic_store_n(&unfinished, !ends, __ATOMIC_RELEASE);
    printf("\r\033[K%s%s", text, ends ? "\n" : "");
  }
  fflush(stdout);
}

void phx__screen_clear(void) {
  if (!isatty(STDERR_FILENO) || !__atomic_exchange_n(&unfinished, 0, __ATOMIC_ACQ_REL)) return;
  fputs("\r\033[K", stdout);
  fflush(stdout);
}

void phx__screen_end(void) {
  if (!__atomic_exchange_n(&unfinished, 0, __ATOMIC_ACQ_REL)) return;
  putchar('\n');
  fflush(stdout);
}
