/* core/plugin/descriptor.h - is a plugin's descriptor one that this core can use?  [any] thread, no state, loads
 * nothing. */
#ifndef PHX__DESCRIPTOR_H
#define PHX__DESCRIPTOR_H
#include <phalanx/plugin.h>

/* kind: what is wanted.  name: what the file's name promises, or NULL for an explicit path. */
phx_status phx__descriptor_check(const phx_plugin *descriptor, uint32_t kind, const char *name, phx_error *err);
/* Can it run here?  Devices and communicators say so themselves; the rest can. [main] */
phx_status phx__descriptor_probe(const phx_plugin *descriptor, phx_error *err);

/* An optional call of a table: NULL where the table ends before it, or leaves it NULL. */
#define PHX__OPTIONAL(table, type, call) (PHX_HAS(table, type, call) ? (table)->call : NULL)
#endif
