/* core/base/clean.c - what another process says may reach a terminal: it must not move the cursor, or end a line.
 *
 * Control characters are those below a space, DEL, and U+0080 to U+009F, which some terminals obey as well.  UTF-8
 * stays, since messages hold names of files.  The length never changes.  No state, any thread. */
#include "base/clean.h"

/* Bytes of the character that begins at s, with `left` bytes there; 0: it is no UTF-8, or a control character. */
static size_t character(const unsigned char *s, size_t left) {
  size_t n = 4;
  if (s[0] < 0x80) return s[0] >= ' ' && s[0] != 127;
  if (s[0] < 0xc2 || s[0] > 0xf4) return 0;
  if (s[0] < 0xe0)
    n = 2;
  else if (s[0] < 0xf0)
    n = 3;
  if (n > left) return 0;
  for (size_t i = 1; i < n; i++)
    if ((s[i] & 0xc0) != 0x80) return 0;
  return s[0] == 0xc2 && s[1] < 0xa0 ? 0 : n;
}

void phx__clean(char *text, size_t bytes) {
  unsigned char *s = (unsigned char *)text;
  for (size_t i = 0; i < bytes && s[i];) {
    const size_t n = character(s + i, bytes - i);
    const int is_space = s[i] == '\n' || s[i] == '\r' || s[i] == '\t';
    if (n == 0 && is_space) s[i] = ' ';
    if (n == 0 && !is_space) s[i] = '?';
    i += n ? n : 1;
  }
}
