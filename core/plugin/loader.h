/* core/plugin/loader.h - finding and loading plugins.  The only module that knows libltdl.  [main] only.
 *
 * A name is looked for as phx_<kind>_<name>.so in: [plugins] path, PHALANX_PLUGIN_PATH (not when AT_SECURE),
 * <directory of the command>/../lib/phalanx, the compiled-in directory.  A strategy or an optimizer may also be the
 * path of a .so (it holds a '/' ).  Trust and provenance rules: see loader.c.  Plugins are never unloaded. */
#ifndef PHX__LOADER_H
#define PHX__LOADER_H
#include <stdbool.h>

#include "config/config.h"

/* search: colon-separated directories of [plugins] path, or NULL.  name_or_path as above.  Loads and validates the
 * descriptor for this kind, and identifies the file; the same file loaded twice gives the same plugin.  [static] */
phx_status phx__loader_open(const char *search, uint32_t kind, const char *name_or_path, const phx__plugin **out,
                            phx_error *err);
/* One known file, not yet identified; name: what its id must be, or NULL.  [static] */
phx_status phx__loader_open_file(uint32_t kind, const char *path, const char *name, const phx__plugin **out,
                                 phx_error *err);
/* While pins is not empty, what lies in directories (colon-separated) or is one of the files is loaded only when its
 * SHA-256 is one of pins (hex, comma-separated).  Each may be NULL; replaces what was said before.  [static] */
enum { PHX__GUARDED_FILES = 2 };
phx_status phx__loader_guard(const char *directories, const char *const files[PHX__GUARDED_FILES], const char *pins,
                             phx_error *err);
/* Fills sha256: for what is used or shown, not for what is only asked whether it can run (reading it takes time). */
phx_status phx__loader_identify(const phx__plugin *plugin, phx_error *err);
#endif
