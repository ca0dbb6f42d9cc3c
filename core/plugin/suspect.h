/* core/plugin/suspect.h - code of a plugin that runs before there is a job: who crashes, or exits, is named.  [main]
 *
 * Loading a plugin runs its constructors; its descriptor, layout and estimate are code as well.  Where they crash the
 * command ends with one message, that names the file and the call, and status 2: nothing was started.
 * Does not: stop a plugin that calls _exit, or that hangs. */
#ifndef PHX__SUSPECT_H
#define PHX__SUSPECT_H
#include <phalanx/base.h>

/* path must stay until the end; what: "while it was loaded", "in estimate". */
void phx__suspect_begin(const char *path, const char *what);
/* Returns status.  A failure without a text (err may be NULL) gets one. */
phx_status phx__suspect_end(phx_status status, phx_error *err);
#define PHX__SUSPECT(path, what, call, err) (phx__suspect_begin(path, what), phx__suspect_end(call, err))
/* For a process that only looks at one plugin: its parent says how it ended. */
void phx__suspect_off(void);
#endif
