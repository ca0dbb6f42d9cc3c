/* core/config/config_ini.h - reading INI text strictly.  The only module that knows inih.  [any] thread, no state. */
#ifndef PHX__CONFIG_INI_H
#define PHX__CONFIG_INI_H
#include <phalanx/base.h>
#include <stdbool.h>

enum { PHX__INI_NAME_LONGEST = 48, PHX__INI_LINE_LONGEST = 8192, PHX__INI_FILE_LARGEST = 1 << 20 };

typedef struct phx__ini_sink {
  void *arg;
  /* false: out of memory, stop listening.  Strings are [borrow:call]. */
  bool (*section)(void *arg, int line, const char *name);
  bool (*entry)(void *arg, int line, const char *section, const char *key, const char *value);
  bool (*error)(void *arg, int line, const char *message);
} phx__ini_sink;

/* Every error goes to the sink; what is well-formed is delivered all the same, so that all errors of a file are found
 * at once.  PHX_NOMEM when a callback said so, else PHX_OK. */
phx_status phx__ini_parse(const char *text, size_t bytes, const phx__ini_sink *sink);
/* The whole file, freed with phx__free. */
phx_status phx__ini_read(const char *path, char **text, size_t *bytes, phx_error *err);
#endif
