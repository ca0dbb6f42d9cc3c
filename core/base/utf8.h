/* core/base/utf8.h - characters of UTF-8. */
#ifndef PHX__UTF8_H
#define PHX__UTF8_H

/* Bytes that follow the first one of a character; -1: it begins none.  [any] */
static inline int phx__utf8_more(unsigned char first) {
  if (first < 0x80) return 0;
  if (first >= 0xc2 && first < 0xe0) return 1;
  if (first >= 0xe0 && first < 0xf0) return 2;
  return first >= 0xf0 && first < 0xf5 ? 3 : -1;
}
#endif
