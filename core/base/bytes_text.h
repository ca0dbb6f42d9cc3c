/* core/base/bytes_text.h - a number of bytes for people.  [any] */
#ifndef PHX__BYTES_TEXT_H
#define PHX__BYTES_TEXT_H
#include <stdint.h>

void phx__bytes_text(int64_t bytes, char text[24]); /* "123.4 MiB" */
#endif
