/* core/base/screen.h - the line of progress on rank 0's standard output: a bar on a terminal, plain lines elsewhere. */
#ifndef PHX__SCREEN_H
#define PHX__SCREEN_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct phx__screen_line {
  int64_t step, steps;
  double loss, norm, lr, seconds, rate; /* of this step; rate: tokens per second */
  double left;                          /* seconds to the end, as far as one can tell */
  char memory[24];
  char note[48]; /* "held-out 4.1234"; "": nothing to note */
} phx__screen_line;

/* Pure: at most `columns` characters, and the most that has room there: first the bar gets shorter, then memory, norm,
 * rate and the time left go. */
void phx__screen_fit(const phx__screen_line *line, int columns, char *out, size_t room);
/* Pure, of what the environment says: may a bar be drawn?  terminal: isatty. */
bool phx__screen_wants_bar(bool terminal, const char *(*variable)(const char *name));

/* [main] Decides, for this process. */
bool phx__screen_has_bar(void);
/* [main] One step.  ends: the line stays and a new one begins; else the next step writes over it. */
void phx__screen_draw(const phx__screen_line *line, bool bar, bool ends);
/* [any] Before other text goes to the terminal: an unfinished line is cleared, and drawn anew with the next step. */
void phx__screen_clear(void);
/* [main] An unfinished line ends, so that what follows stands on its own. */
void phx__screen_end(void);
#endif
