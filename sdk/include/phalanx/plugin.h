/* phalanx/plugin.h - the one exported symbol and the descriptor behind it.
 *
 * A plugin is a shared object phx_<kind>_<id>.so that exports exactly one function.  The descriptor is constant data:
 * listing, help and validation need no device and no create().  A plugin is never unloaded. */
#ifndef PHALANX_PLUGIN_H
#define PHALANX_PLUGIN_H
#include <phalanx/base.h>
#include <phalanx/option.h>
#ifdef __cplusplus
extern "C" {
#endif

#define PHX_ENTRY_SYMBOL "phx_plugin_v1"

enum {
  PHX_KIND_STRATEGY = 1,
  PHX_KIND_DEVICE = 2,
  PHX_KIND_COMM = 3,
  PHX_KIND_MODEL = 4,
  PHX_KIND_OPTIMIZER = 5,
  PHX_KIND_OBSERVER = 6 /* reserved: sees metrics and events, never blocks the run */
};

/* provides: the core ignores bits it does not know.  Bits 1, 2 and 4 meant something before 1.2: they stay unused. */
/* Strategy: some option of it shards weights.  Without it every rank keeps all weights that it computes with, and the
 * core compares them when a run begins. */
#define PHX_CAP_SHARDS_WEIGHTS (1ull << 0)
/* Strategy: the same bits as every other one that says so.  Optimizer: the same bits however tickets are cut. */
#define PHX_CAP_DETERMINISTIC (1ull << 3)
/* Strategy: reads compute_dtype and reduce_dtype of the topology, keeps fp32 masters beside bf16 weights and casts what
 * it reduces (or refuses in estimate).  Device: its operations take PHX_BF16.  Model: honours its shape's
 * compute_dtype.  Optimizer: writes the rounded copy beside the fp32 master.  A plugin without it is not given bf16. */
#define PHX_CAP_BF16 (1ull << 5)
/* Between updates map() gives the state itself, never a copy, and it stays there; only what the optimizer does for a
 * ticket changes it (and a load).  On a device with PHX_DEVICE_HOST_MEMORY checkpoints are then saved in the
 * background. */
#define PHX_CAP_LIVE_STATE (1ull << 6)
/* Device: it has PHX_DEVICE_HOST_MEMORY wherever it runs, so that this is known before it is created. */
#define PHX_CAP_HOST_MEMORY (1ull << 7)

/* needs: the core refuses a plugin whose bit it does not know, or cannot meet, with the bit's number or name. */
#define PHX_NEED_HOST_MEMORY (1ull << 0) /* device memory must be readable by the CPU */
#define PHX_NEED_TWO_RANKS (1ull << 1)   /* makes no sense at world size 1 */
#define PHX_NEED_ONE_MACHINE (1ull << 2) /* a communicator whose ranks share memory */
#define PHX_NEED_OWN_DEVICE (1ull << 3)  /* a communicator: no two ranks share a device */

typedef struct phx_plugin {
  size_t struct_size;
  uint32_t kind;                      /* PHX_KIND_* */
  uint32_t table_major, table_minor;  /* of the table below, as compiled: PHX_ABI_MAJOR, PHX_ABI_MINOR */
  uint32_t reserved0;                 /* 0 */
  const char *id;                     /* [a-z0-9_]{1,32}; must equal the file's name */
  const char *version, *summary, *vendor, *license, *build;
  uint64_t provides, needs;           /* PHX_CAP_*, PHX_NEED_* */
  const char *const *extensions;      /* host extensions it cannot run without, NULL-terminated, or NULL */
  const phx_option *options;          /* or NULL */
  uint32_t n_options, option_stride;
  size_t config_size;                 /* the core zero-fills this many bytes, then applies options[] */
  const void *table;                  /* phx_strategy_table, phx_device_table, phx_comm_table, ..., by kind */
  /* Device and communicator: `plugin = auto` takes the one with the highest preference that can run here; 0: it is only
   * taken by name. */
  int32_t preference;
  uint32_t reserved1;                 /* 0 */
  const char *device;                 /* communicator: id of the only device that it works with, or NULL: any */
} phx_plugin;

/* Pure: no allocation, thread, device call or output; the same pointer each time.  [any] [static] */
PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
typedef const phx_plugin *phx_plugin_entry(void);

#ifdef __cplusplus
}
#endif
#endif
