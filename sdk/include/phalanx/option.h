/* phalanx/option.h - a plugin's options, as one constant table.
 *
 * The core parses the INI section [ID] straight into the plugin's own config struct by this table; a model's options
 * stand in [model], an optimizer's in [optimizer], behind the core's own keys.  The same table makes `phalanx help ID`,
 * the sample INI, the fuzz inputs and the hash that all ranks compare. */
#ifndef PHALANX_OPTION_H
#define PHALANX_OPTION_H
#include <phalanx/base.h>
#ifdef __cplusplus
extern "C" {
#endif

enum {
  PHX_OPT_BOOL = 1,  /* int32_t, 0 or 1; yes no true false on off 1 0 */
  PHX_OPT_INT = 2,   /* int64_t */
  PHX_OPT_REAL = 3,  /* double; finite */
  PHX_OPT_BYTES = 4, /* int64_t; B KiB MiB GiB TiB */
  PHX_OPT_ENUM = 5,  /* int32_t, index into choices */
  PHX_OPT_STRING = 6 /* const char *, owned by the core, [borrow:self] */
};
enum {
  PHX_OPTF_REQUIRED = 1u << 0, /* no default: must be given when the plugin is selected */
  PHX_OPTF_PER_RANK = 1u << 1, /* may differ between ranks: left out of the hash that ranks compare */
  PHX_OPTF_DEPRECATED = 1u << 2,
  PHX_OPTF_EXPERIMENTAL = 1u << 3,
  PHX_OPTF_AUTO = 1u << 4 /* INT and BYTES: the word `auto` is allowed and stored as -1 */
};
typedef struct phx_option {    /* no struct_size: arrays are walked with the descriptor's option_stride */
  const char *name;            /* INI key, [a-z0-9_]{1,48} */
  const char *doc;             /* one sentence, ends with a full stop */
  const char *dflt;            /* as text, parsed like the file; NULL only with PHX_OPTF_REQUIRED */
  const char *unit;            /* "bytes", "steps", "elements", "s", or NULL */
  const char *const *choices;  /* ENUM: NULL-terminated; else NULL */
  int64_t imin, imax;          /* INT and BYTES, both ends included */
  double rmin, rmax;           /* REAL, both ends included */
  uint32_t type, flags;        /* PHX_OPT_*, PHX_OPTF_* */
  uint32_t offset, size;       /* the field inside the config struct */
} phx_option;

#define PHX_FIELD_(T, f) (uint32_t)offsetof(T, f), (uint32_t)sizeof(((T *)0)->f)
/* One row each.  T is the config struct, f its field; the key is the field's name. */
#define PHX_INT(T, f, dflt, lo, hi, unit, flags, doc) \
  {#f, doc, dflt, unit, NULL, lo, hi, 0, 0, PHX_OPT_INT, flags, PHX_FIELD_(T, f)}
#define PHX_BYTES(T, f, dflt, lo, hi, flags, doc) \
  {#f, doc, dflt, "bytes", NULL, lo, hi, 0, 0, PHX_OPT_BYTES, flags, PHX_FIELD_(T, f)}
#define PHX_REAL(T, f, dflt, lo, hi, doc) {#f, doc, dflt, NULL, NULL, 0, 0, lo, hi, PHX_OPT_REAL, 0, PHX_FIELD_(T, f)}
#define PHX_BOOL(T, f, dflt, doc) {#f, doc, dflt, NULL, NULL, 0, 1, 0, 0, PHX_OPT_BOOL, 0, PHX_FIELD_(T, f)}
#define PHX_ENUM(T, f, dflt, ch, doc) {#f, doc, dflt, NULL, ch, 0, 0, 0, 0, PHX_OPT_ENUM, 0, PHX_FIELD_(T, f)}
#define PHX_STRING(T, f, dflt, flags, doc) \
  {#f, doc, dflt, NULL, NULL, 0, 0, 0, 0, PHX_OPT_STRING, flags, PHX_FIELD_(T, f)}

#ifdef __cplusplus
}
#endif
#endif
