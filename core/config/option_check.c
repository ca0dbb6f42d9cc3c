/* core/config/option_check.c - is an option table fit to be parsed into?  Checked once, when a plugin is loaded.
 *
 * What cannot be checked: that pointers in the table point at something.  No state; any thread. */
#include "base/status.h"
#include "config/option.h"

#include <math.h>
#include <string.h>

enum { NAME_LONGEST = 48, OPTIONS_MOST = 4096 };

bool phx__name_is_plain(const char *name, size_t longest) {
  size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_");
  return n >= 1 && n <= longest && !name[n];
}

static uint32_t type_bytes(uint32_t type) {
  switch (type) {
    case PHX_OPT_BOOL:
    case PHX_OPT_ENUM: return sizeof(int32_t);
    case PHX_OPT_INT:
    case PHX_OPT_BYTES: return sizeof(int64_t);
    case PHX_OPT_REAL: return sizeof(double);
    case PHX_OPT_STRING: return sizeof(const char *);
  }
  return 0;
}

static phx_status check_field(const phx_option *o, size_t config_size, phx_error *err) {
  uint32_t bytes = type_bytes(o->type);
  if (!bytes) return phx_fail(err, PHX_INVALID, "option %s has type %u, which this phalanx does not know", o->name,
                              (unsigned)o->type);
  if (o->size != bytes)
    return phx_fail(err, PHX_INVALID, "option %s has a field of %u bytes where its type takes %u", o->name,
                    (unsigned)o->size, (unsigned)bytes);
  if ((uint64_t)o->offset + o->size > config_size || o->offset % bytes)
    return phx_fail(err, PHX_INVALID, "option %s lies at %u, outside of the %zu bytes of config_size or unaligned",
                    o->name, (unsigned)o->offset, config_size);
  return PHX_OK;
}

static phx_status check_range(const phx_option *o, phx_error *err) {
  const uint32_t known = PHX_OPTF_REQUIRED | PHX_OPTF_PER_RANK | PHX_OPTF_DEPRECATED | PHX_OPTF_EXPERIMENTAL |
                         PHX_OPTF_AUTO;
  bool whole = o->type == PHX_OPT_INT || o->type == PHX_OPT_BYTES;
  if (o->flags & ~known)
    return phx_fail(err, PHX_INVALID, "option %s has flags 0x%x, which this phalanx does not know", o->name,
                    (unsigned)(o->flags & ~known));
  if ((o->flags & PHX_OPTF_AUTO) && !whole)
    return phx_fail(err, PHX_INVALID, "option %s may be auto only as a whole number or bytes", o->name);
  if (whole && (o->imin > o->imax || (o->type == PHX_OPT_BYTES && o->imin < 0)))
    return phx_fail(err, PHX_INVALID, "option %s has an empty or negative range", o->name);
  if ((o->flags & PHX_OPTF_AUTO) && o->imin <= -1 && o->imax >= -1)
    return phx_fail(err, PHX_INVALID, "option %s has -1 in its range, which stands for auto", o->name);
  if (o->type == PHX_OPT_REAL && !(isfinite(o->rmin) && isfinite(o->rmax) && o->rmin <= o->rmax))
    return phx_fail(err, PHX_INVALID, "option %s has an empty or endless range", o->name);
  if (o->type == PHX_OPT_ENUM && (!o->choices || !o->choices[0]))
    return phx_fail(err, PHX_INVALID, "option %s has no choices", o->name);
  return PHX_OK;
}

static phx_status check_default(const phx_option *o, phx_error *err) {
  phx__value value;
  char why[400];
  if (!o->dflt) {
    if (o->flags & PHX_OPTF_REQUIRED) return PHX_OK;
    return phx_fail(err, PHX_INVALID, "option %s has no default and is not required", o->name);
  }
  if (o->flags & PHX_OPTF_REQUIRED)
    return phx_fail(err, PHX_INVALID, "option %s is required and has a default", o->name);
  if (!phx__option_parse(o, o->dflt, &value, why, sizeof why))
    return phx_fail(err, PHX_INVALID, "the default of an option is wrong: %s", why);
  return PHX_OK;
}

static phx_status check_one(const phx_option *o, uint32_t index, size_t config_size, phx_error *err) {
  if (!o->name || !phx__name_is_plain(o->name, NAME_LONGEST))
    return phx_fail(err, PHX_INVALID, "option number %u has no name of the form [a-z0-9_]{1,48}", (unsigned)index);
  size_t doc = o->doc ? strlen(o->doc) : 0;
  if (doc < 2 || o->doc[doc - 1] != '.')
    return phx_fail(err, PHX_INVALID, "the doc of option %s does not end with a full stop", o->name);
  PHX_TRY(check_field(o, config_size, err));
  PHX_TRY(check_range(o, err));
  PHX_TRY(check_default(o, err));
  return PHX_OK;
}

phx_status phx__options_check(const phx_option *options, uint32_t n, uint32_t stride, size_t config_size,
                              phx_error *err) {
  if (n == 0) return PHX_OK;
  if (!options || n > OPTIONS_MOST || stride < sizeof(phx_option) || stride % sizeof(void *))
    return phx_fail(err, PHX_INVALID, "the option table has %u rows of %u bytes at %p: not plausible", (unsigned)n,
                    (unsigned)stride, (const void *)options);
  for (uint32_t i = 0; i < n; i++) {
    const phx_option *a = phx__option_at(options, stride, i);
    PHX_TRY(check_one(a, i, config_size, err));
    for (uint32_t j = 0; j < i; j++) {
      const phx_option *b = phx__option_at(options, stride, j);
      if (strcmp(a->name, b->name) == 0)
        return phx_fail(err, PHX_INVALID, "option %s is in the table twice", a->name);
      if (a->offset < b->offset + b->size && b->offset < a->offset + a->size)
        return phx_fail(err, PHX_INVALID, "options %s and %s share bytes of the config struct", b->name, a->name);
    }
  }
  return PHX_OK;
}
