/* core/plugin/automatic.c - see automatic.h.  Every installed plugin of the kind is loaded and asked. */
#include "plugin/automatic.h"

#include <phalanx/provider.h>
#include <stdio.h>
#include <string.h>

#include "base/identity.h"
#include "base/status.h"
#include "plugin/descriptor.h"
#include "plugin/loader.h"

/* Ranks of one machine that have to share devices, by their number: under a launcher that shows each rank its own, each
 * counts one. */
static bool crowded(const phx__config *c, char *why, size_t size) {
  const phx_device_table *table = c->device.plugin->descriptor->table;
  if (!c->device.config) return false; /* it is being refused */
  const bool counts = PHX_HAS(table, phx_device_table, count) && table->count;
  const bool may_share = !PHX_HAS(table, phx_device_table, shared) || !table->shared || table->shared(c->device.config);
  const int32_t local = phx__job_local_size((int32_t)c->s.run.ranks), count = counts ? table->count() : INT32_MAX;
  if (!may_share || local <= count) return false;
  snprintf(why, size, "%d ranks may share %d devices", local, count);
  return true;
}

/* Does the communicator reach the memory of the chosen device, and of every rank's?  If not, `why` says so. */
static bool fits_device(const phx__config *c, const phx_plugin *comm, char *why, size_t size) {
  const char *wanted = PHX_HAS(comm, phx_plugin, device) ? comm->device : NULL;
  const phx_plugin *device = c->device.plugin ? c->device.plugin->descriptor : NULL;
  if (wanted && (!device || strcmp(device->id, wanted) != 0)) {
    snprintf(why, size, "device %s is not %s", device ? device->id : "(none)", wanted);
    return false;
  }
  return !(comm->needs & PHX_NEED_OWN_DEVICE) || !device || !crowded(c, why, size);
}

static int32_t preference_of(const phx_plugin *d) { return PHX_HAS(d, phx_plugin, preference) ? d->preference : 0; }

/* Can it be taken?  *preference is what it states (INT32_MAX where it cannot be asked); if not, `why` says why not. */
static const phx_plugin *look_at(phx__automatic *a, const phx__found *found, int32_t *preference, char *why,
                                 size_t size) {
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin = NULL;
  *preference = INT32_MAX;
  if (phx__loader_open_file(found->kind, found->path, found->name, &plugin, &err)) {
    a->no_memory = a->no_memory || err.code == PHX_NOMEM;
    snprintf(why, size, "%s cannot be loaded: %.150s", found->name, err.message);
    return NULL;
  }
  const phx_plugin *d = plugin->descriptor;
  *preference = preference_of(d);
  if (*preference <= 0) return NULL;
  if (d->kind == PHX_KIND_COMM && !fits_device(a->config, d, why, size)) return NULL;
  if (phx__descriptor_probe(d, &err) == PHX_OK) return d;
  snprintf(why, size, "%s cannot run here: %.150s", d->id, err.message);
  return NULL;
}

static const char *good_reason(const phx_plugin *d) {
  return d->needs & PHX_NEED_OWN_DEVICE ? "no two ranks share a device" : "it can run here";
}

const char *phx__automatic_choose(phx__automatic *a, uint32_t kind) {
  const phx_plugin *best = NULL;
  char passed_over[224] = ""; /* the reason of the most preferred one that cannot be taken */
  int32_t best_preference = 0, passed_preference = 0;
  a->no_memory = false;
  for (size_t i = 0; i < a->n; i++) {
    char why[224] = "";
    int32_t preference = 0;
    if (a->found[i].kind != kind || a->found[i].shadowed) continue;
    const phx_plugin *d = look_at(a, &a->found[i], &preference, why, sizeof why);
    if (d && preference > best_preference) {
      best = d;
      best_preference = preference;
    }
    if (!d && preference > passed_preference) {
      memcpy(passed_over, why, sizeof why);
      passed_preference = preference;
    }
  }
  if (!best || a->no_memory) {
    snprintf(a->why, sizeof a->why, "%s", *passed_over ? passed_over : "none is installed");
    return NULL;
  }
  snprintf(a->why, sizeof a->why, "%s: %s", best->id,
           passed_preference > best_preference ? passed_over : good_reason(best));
  return best->id;
}
