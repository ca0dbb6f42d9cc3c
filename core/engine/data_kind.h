/* core/engine/data_kind.h - what is it that was given as a token file?  Pure.  [any] */
#ifndef PHX__DATA_KIND_H
#define PHX__DATA_KIND_H
#include <stddef.h>
#include <stdint.h>

enum { PHX__DATA_HEAD = 65536 }; /* bytes from the start of a file that are looked at */

typedef struct phx__data_kind {
  const char *what;   /* "text", "a NumPy array"; NULL: nothing speaks against raw uint16 tokens */
  const char *advice; /* what to do */
} phx__data_kind;

/* head: the first n bytes of a file of `bytes` bytes that has no llm.c header. */
phx__data_kind phx__data_kind_of(const unsigned char *head, size_t n, int64_t bytes);
/* The same by marks only, where text is what is wanted: "compressed by gzip"; NULL: it has none. */
const char *phx__data_mark_of(const unsigned char *head, size_t n);
#endif
