/* tests/support/plugin_file.h - a plugin loaded from its file, and its options filled as the core fills them. */
#ifndef PHX__PLUGIN_FILE_H
#define PHX__PLUGIN_FILE_H
#include <phalanx/plugin.h>

/* The descriptor, for as long as the process lives; NULL: err says why. */
const phx_plugin *plugin_file_open(const char *path, phx_error *err);
/* The defaults, then "key=value key=value".  The text is cut at its spaces and '=' and must outlive the config. */
phx_status plugin_file_config(const phx_plugin *plugin, char *text, void *config, phx_error *err);
#endif
