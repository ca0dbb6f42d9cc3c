/* core/config/option.h - one row of an option table: parse a text, store it, print it, describe it; and check a whole
 * table.
 *
 * Used alike for the core's own sections and for plugins.  [any] thread, no state. */
#ifndef PHX__OPTION_H
#define PHX__OPTION_H
#include <phalanx/option.h>
#include <stdbool.h>

typedef union phx__value {
  int64_t i;     /* BOOL, INT, BYTES, ENUM */
  double r;      /* REAL */
  const char *s; /* STRING: the text that was parsed, [borrow] */
} phx__value;

enum { PHX__VALUE_TEXT = 64 }; /* enough for the canonical text of anything but STRING and ENUM */

static inline const phx_option *phx__option_at(const phx_option *options, uint32_t stride, uint32_t i) {
  return (const phx_option *)(const void *)((const char *)options + (size_t)i * stride);
}
/* Strict: the whole text, base 10, in range.  On refusal `why` says what is expected and *out is unchanged. */
bool phx__option_parse(const phx_option *option, const char *text, phx__value *out, char *why, size_t why_bytes);
void phx__option_store(const phx_option *option, phx__value value, void *config);
/* The text that parses to exactly this value: `scratch`, or a string that lives as long as the value or the table. */
const char *phx__option_text(const phx_option *option, phx__value value, char scratch[PHX__VALUE_TEXT]);
/* "1 to 64", "full | grad_op", "text", ... */
void phx__option_describe(const phx_option *option, char *text, size_t bytes);
/* Names, docs, defaults, ranges, offsets, sizes, overlaps. */
phx_status phx__options_check(const phx_option *options, uint32_t n, uint32_t stride, size_t config_size,
                              phx_error *err);
/* [a-z0-9_]{1,longest} */
bool phx__name_is_plain(const char *name, size_t longest);
#endif
