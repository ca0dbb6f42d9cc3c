/* core/plugin/descriptor.c - validation of what a plugin says about itself, before anything of it runs.
 *
 * Rules of the ABI (phalanx/plugin.h): structs only grow at the end, so a longer one is fine and a shorter one is fine
 * down to the last mandatory entry; unknown `provides` are ignored, unknown `needs` refused with the bit's number.
 * Does not look at files.  No state, any thread. */
#include "plugin/descriptor.h"
#include "base/status.h"
#include "config/config.h"
#include "config/option.h"
#include "plugin/suspect.h"

#include <phalanx/provider.h>
#include <string.h>

enum { ID_LONGEST = 32, TABLE_LARGEST = 65536, CONFIG_LARGEST = 1 << 20 };

typedef struct entry {
  const char *name;
  size_t offset;
} entry;
#define ENTRY(type, call) {#call, offsetof(type, call)}
#define STRATEGY(call) ENTRY(phx_strategy_table, call)
#define DEVICE(call) ENTRY(phx_device_table, call)
#define COMM(call) ENTRY(phx_comm_table, call)
#define MODEL(call) ENTRY(phx_model_table, call)
#define OPTIMIZER(call) ENTRY(phx_optimizer_table, call)

/* Calls that the core makes without asking; every other one may be NULL or missing. */
static const entry strategy_calls[] = {
    STRATEGY(estimate), STRATEGY(create), STRATEGY(destroy), STRATEGY(visit_state), STRATEGY(map), STRATEGY(unmap),
    STRATEGY(state_changed), STRATEGY(begin_micro_batch), STRATEGY(acquire), STRATEGY(release),
    STRATEGY(finish_gradients), STRATEGY(discard_gradients), STRATEGY(gradient_norm), STRATEGY(update), {NULL, 0}};
static const entry device_calls[] = {DEVICE(probe), DEVICE(create), DEVICE(destroy), DEVICE(device), DEVICE(ops),
                                     DEVICE(alloc), DEVICE(free), {NULL, 0}};
static const entry comm_calls[] = {COMM(probe), COMM(payload), COMM(buffer_bytes), COMM(create), COMM(destroy),
                                   COMM(arena), {NULL, 0}};
static const entry model_calls[] = {MODEL(declare), MODEL(stage_memory), MODEL(create), MODEL(destroy), MODEL(forward),
                                    MODEL(backward), {NULL, 0}};
static const entry optimizer_calls[] = {OPTIMIZER(describe), OPTIMIZER(create), OPTIMIZER(destroy), OPTIMIZER(update),
                                        {NULL, 0}};
static const entry *const calls_of_kind[] = {[PHX_KIND_STRATEGY] = strategy_calls, [PHX_KIND_DEVICE] = device_calls,
                                             [PHX_KIND_COMM] = comm_calls, [PHX_KIND_MODEL] = model_calls,
                                             [PHX_KIND_OPTIMIZER] = optimizer_calls};

static phx_status check_table(const phx_plugin *d, phx_error *err) {
  size_t bytes;
  if (!d->table) return phx_fail(err, PHX_INVALID, "has no %s table", phx__kind_name(d->kind));
  memcpy(&bytes, d->table, sizeof bytes); /* every table begins with its struct_size */
  if (bytes < sizeof bytes || bytes > TABLE_LARGEST || bytes % sizeof(void *))
    return phx_fail(err, PHX_INVALID, "its %s table says it has %zu bytes: not plausible", phx__kind_name(d->kind),
                    bytes);
  for (const entry *e = calls_of_kind[d->kind]; e->name; e++) {
    void (*call)(void) = NULL;
    if (e->offset + sizeof call <= bytes) memcpy(&call, (const char *)d->table + e->offset, sizeof call);
    if (!call)
      return phx_fail(err, PHX_INVALID, "its %s table lacks the mandatory call %s", phx__kind_name(d->kind), e->name);
  }
  return PHX_OK;
}

static phx_status check_needs(const phx_plugin *d, phx_error *err) {
  static const char *const offered[] = {PHX_EXT_DEVICE, PHX_EXT_COMM, PHX_EXT_OPTIM, PHX_EXT_OPS, PHX_EXT_JOB};
  uint64_t known = PHX_NEED_HOST_MEMORY;
  if (d->kind != PHX_KIND_OPTIMIZER) known |= PHX_NEED_TWO_RANKS | PHX_NEED_ONE_MACHINE | PHX_NEED_OWN_DEVICE;
  const uint64_t unknown = d->needs & ~known;
  if (unknown)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "needs bit %d, which this phalanx does not know of a plugin of kind %s: use a newer phalanx",
                    __builtin_ctzll(unknown), phx__kind_name(d->kind));
  for (const char *const *ext = d->extensions; ext && *ext; ext++) {
    size_t i = 0, n = sizeof offered / sizeof offered[0];
    while (i < n && strcmp(*ext, offered[i]) != 0) i++;
    if (i == n)
      return phx_fail(err, PHX_UNSUPPORTED, "needs the host extension '%s', which this phalanx does not offer", *ext);
  }
  return PHX_OK;
}

/* Options that stand in a section of the core's, behind the core's own keys. */
static phx_status check_option_names(const phx_plugin *d, phx_error *err) {
  const char *section = phx__plugin_section(d);
  const phx__core_table *core = phx__core_section(section);
  for (uint32_t i = 0; core && i < d->n_options; i++)
    for (uint32_t k = 0; k < core->n; k++)
      if (!strcmp(phx__option_at(d->options, d->option_stride, i)->name, core->options[k].name))
        return phx_fail(err, PHX_INVALID, "its option '%s' is one of the core's own keys of [%s]",
                         core->options[k].name, section);
  return PHX_OK;
}

static phx_status check_id(const phx_plugin *d, const char *name, phx_error *err) {
  if (!d->id || !phx__name_is_plain(d->id, ID_LONGEST))
    return phx_fail(err, PHX_INVALID, "its id is not of the form [a-z0-9_]{1,32}");
  if (name && strcmp(name, d->id) != 0)
    return phx_fail(err, PHX_INVALID, "its id is '%s', but its file's name says '%s': rename the file", d->id, name);
  if (phx__core_section(d->id))
    return phx_fail(err, PHX_INVALID, "its id '%s' is the name of one of the core's own sections", d->id);
  if (!d->version || !d->summary || !d->vendor || !d->license || !d->build)
    return phx_fail(err, PHX_INVALID, "version, summary, vendor, license and build must not be NULL");
  return PHX_OK;
}

phx_status phx__descriptor_check(const phx_plugin *d, uint32_t kind, const char *name, phx_error *err) {
  if (!d || d->struct_size < offsetof(phx_plugin, table) + sizeof d->table)
    return phx_fail(err, PHX_INVALID, "its descriptor is missing or shorter than version 1 (%zu bytes, expected %zu)",
                    d ? d->struct_size : 0, sizeof *d);
  if (d->struct_size > TABLE_LARGEST)
    return phx_fail(err, PHX_INVALID, "its descriptor says it has %zu bytes: not plausible (expected %zu, at most %d)",
                    d->struct_size, sizeof *d, TABLE_LARGEST);
  if (d->table_major != PHX_ABI_MAJOR)
    return phx_fail(err, PHX_UNSUPPORTED, "was built for ABI %u, this phalanx speaks ABI %d: build it again",
                    (unsigned)d->table_major, PHX_ABI_MAJOR);
  if (d->table_minor < PHX_ABI_MINOR_OLDEST)
    return phx_fail(err, PHX_UNSUPPORTED,
                    "was built for ABI %u.%u, and the oldest that is taken is %d.%d: build it again",
                    (unsigned)d->table_major, (unsigned)d->table_minor, PHX_ABI_MAJOR, PHX_ABI_MINOR_OLDEST);
  const unsigned reserved1 = PHX_HAS(d, phx_plugin, reserved1) ? d->reserved1 : 0;
  if (d->reserved0 || reserved1)
    return phx_fail(err, PHX_INVALID, "its descriptor has reserved0 = %u, reserved1 = %u; expected 0",
                    (unsigned)d->reserved0, reserved1);
  if (d->kind < PHX_KIND_STRATEGY || d->kind > PHX_KIND_OPTIMIZER)
    return phx_fail(err, PHX_INVALID,
                    "says it is of kind %u, which this phalanx does not know; one of kind %s was asked for",
                    (unsigned)d->kind, phx__kind_name(kind));
  if (d->kind != kind)
    return phx_fail(err, PHX_INVALID, "is a plugin of kind %s (%u), and one of kind %s was asked for",
                    phx__kind_name(d->kind), (unsigned)d->kind, phx__kind_name(kind));
  PHX_TRY(check_id(d, name, err));
  PHX_TRY(check_needs(d, err));
  if (d->config_size > CONFIG_LARGEST)
    return phx_fail(err, PHX_INVALID, "config_size %zu is not plausible", d->config_size);
  PHX_TRY(phx__options_check(d->options, d->n_options, d->option_stride, d->config_size, err));
  PHX_TRY(check_option_names(d, err));
  PHX_TRY(check_table(d, err));
  return PHX_OK;
}

phx_status phx__descriptor_probe(const phx_plugin *d, phx_error *err) {
  if (d->kind == PHX_KIND_DEVICE)
    return PHX__SUSPECT(d->id, "in probe", ((const phx_device_table *)d->table)->probe(err), err);
  if (d->kind == PHX_KIND_COMM)
    return PHX__SUSPECT(d->id, "in probe", ((const phx_comm_table *)d->table)->probe(err), err);
  return PHX_OK;
}
