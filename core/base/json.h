/* core/base/json.h - JSON from files that nobody vouches for, and JSON texts that are written piece by piece.
 *
 * Reading: RFC 8259 to the letter, UTF-8, an object outermost; only integers up to 2^53 (our formats know no others;
 * fractions and exponents where the limits say so); no name twice in an object, no control character in a name, no
 * zero character anywhere; depth and number of values are limited before a tree is built.  Any thread. */
#ifndef PHX__JSON_H
#define PHX__JSON_H
#include <phalanx/base.h>
#include <stdbool.h>
#include <cjson/cJSON.h>

typedef struct phx__json_limits {
  uint32_t depth;  /* objects and arrays within each other */
  uint32_t values; /* all of them, names not counted */
  bool fractions;  /* numbers may have a fraction and an exponent */
} phx__json_limits;
#define PHX__JSON_INTEGER_MOST 9007199254740992 /* 2^53: what a double holds exactly */

/* PHX_IO: not such a text; the message begins with `what` and says where.  Freed with cJSON_Delete. */
phx_status phx__json_read(const char *what, const char *text, size_t bytes, const phx__json_limits *limits,
                          cJSON **out, phx_error *err);
/* The number as an integer in [lo, hi]; false: it is none, such as 4.7. */
bool phx__json_integer(const cJSON *item, int64_t lo, int64_t hi, int64_t *out);

/* A text that grows; freed with phx__free(text.data).  After `failed` (no memory) calls do nothing. */
typedef struct phx__text {
  char *data; /* ends with a zero */
  size_t bytes, room;
  bool failed;
} phx__text;
void phx__text_add(phx__text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
void phx__text_bytes(phx__text *t, const void *data, size_t bytes);
void phx__text_json(phx__text *t, const char *s); /* in quotes, escaped */
#endif
