/* core/plugin/suspect.h - code of a plugin that runs before there is a job: who crashes, exits or hangs is named.
 * [main]
 *
 * Loading a plugin runs its constructors; its descriptor, layout and estimate are code as well.  Where they crash, or
 * do not come back for 20 s, the command ends with one message, that names the file and the call, and status 2: nothing
 * was started.  Calls are given a minute: they may wake up a device.  While something is read from disks, ten times as
 * long. */
#ifndef PHX__SUSPECT_H
#define PHX__SUSPECT_H
#include <phalanx/base.h>

enum { PHX__SUSPECT_LOADS = 1, PHX__SUSPECT_CALL = 3 }; /* patience, in units of: */
extern int phx__suspect_patience_ms;                    /* 20 s; tests shorten it */

/* path must stay until the end; what: "while it was loaded", "in estimate". */
void phx__suspect_begin(const char *path, const char *what, int patience);
/* Returns status.  A failure without a text (err may be NULL) gets one. */
phx_status phx__suspect_end(phx_status status, phx_error *err);
#define PHX__SUSPECT(path, what, call, err) \
  (phx__suspect_begin(path, what, PHX__SUSPECT_CALL), phx__suspect_end(call, err))
/* [any] Somebody calls exit or _exit: does not return when a suspect does. */
void phx__suspect_exits(void);
/* For a process that only looks at one plugin: its parent says how it ended. */
void phx__suspect_off(void);
#endif
