/* core/checkpoint/manifest_inner.h - what manifest.c, manifest_read.c and manifest_check.c share. */
#ifndef PHX__MANIFEST_INNER_H
#define PHX__MANIFEST_INNER_H

#define PHX__MANIFEST_BEFORE_SUM ",\n\"checksum\":\""
#define PHX__MANIFEST_AFTER_SUM "\"}\n"
enum { PHX__STATE_KINDS = 4, PHX__MANIFEST_TEXT_MOST = 4096 /* bytes of a value of the configuration */ };
extern const char *const phx__state_kind_names[PHX__STATE_KINDS]; /* by PHX_STATE_*, private excepted */
#endif
