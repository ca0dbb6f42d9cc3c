/* core/plugin/config_load.h - from an INI file and overrides to a checked configuration, with its plugins.  [main]
 *
 * inih is behind config_ini.c; the core's own sections are option tables like a plugin's (settings.c).  All errors of a
 * file are collected, each with file:line and the nearest name, before anything is refused. */
#ifndef PHX__CONFIG_LOAD_H
#define PHX__CONFIG_LOAD_H
#include <stdio.h>

#include "config/config.h"
#include "config/config_store.h"

/* Loads, selects plugins, validates everything.  On refusal *out is NULL, every error
 * has been printed to `report` (one line each, "file:line: ..."), and PHX_INVALID or PHX_UNSUPPORTED is returned. */
phx_status phx__config_load(const char *path, const phx__override *overrides, size_t n, FILE *report,
                            phx__config **out);
/* The same of a file that comes with data (a run's own config.ini): it names no code.  Of it [plugins] path and pin,
 * and a strategy's path, do not count; what an override says does.  A strategy's path is refused, unless overridden. */
phx_status phx__config_load_found(const char *path, const phx__override *overrides, size_t n, FILE *report,
                                  phx__config **out);
/* [plugins] path of a file, NULL where it has none; nothing else of it is judged.  Freed with phx__free. */
phx_status phx__config_plugin_path(const char *file, char **out, phx_error *err);
#endif
