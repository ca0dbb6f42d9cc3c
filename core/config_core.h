/* core/config_core.h - the core's own INI sections as option tables.  Constant data; [any] thread. */
#ifndef PHX__CONFIG_CORE_H
#define PHX__CONFIG_CORE_H
#include <phalanx/option.h>

typedef struct phx__core_table {
  const char *section;
  const phx_option *options; /* offsets are into phx__settings */
  uint32_t n;
} phx__core_table;

/* In the order of the documentation; NULL after the last. */
const phx__core_table *phx__core_table_at(uint32_t i);
/* By name, or NULL: these names are reserved, no plugin may bear one. */
const phx__core_table *phx__core_section(const char *name);
/* What to write instead of a key that earlier versions had; NULL: it never was one. */
const char *phx__core_replaced(const char *section, const char *key);
#endif
