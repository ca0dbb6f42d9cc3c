/* core/base/clean.h - texts of others, made fit for a log.  [any], and safe in a signal handler. */
#ifndef PHX__CLEAN_H
#define PHX__CLEAN_H
#include <stddef.h>

/* In place, up to the zero or `bytes`: control characters, and bytes that are no UTF-8, become '?',
 * ends of lines and tabs a space. */
void phx__clean(char *text, size_t bytes);
#endif
