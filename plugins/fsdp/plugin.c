/* plugins/fsdp/plugin.c - options and descriptor. */
#include "fsdp.h"

static const char *const shardings[] = {"full", "grad_op", "none", NULL};
static const phx_option options[] = {
    PHX_ENUM(fsdp_config, sharding, "full", shardings,
             "What is sharded: full (weights, gradients, states; ZeRO-3), grad_op (the same, but weights stay gathered "
             "from forward to backward; ZeRO-2), none (nothing)."),
    PHX_INT(fsdp_config, prefetch, "1", 0, 16, "units", 0,
            "Units gathered ahead of the stage that runs, in forward and in backward."),
    PHX_BOOL(fsdp_config, reshard_after_forward, "yes",
             "With sharding = full: free a unit's gathered weights after its forward, and gather them again for "
             "backward; grad_op implies no."),
    PHX_INT(fsdp_config, max_gathered, "0", 0, 1 << 20, "units", 0,
            "The most units gathered at once, what prefetch gathers included; 0: as many as the other options need."),
    PHX_BOOL(fsdp_config, gather_alone, "no",
             "With one rank: gather and reduce all the same, to measure what it costs in copies and memory; no bit "
             "changes. Without it one rank computes with its weights where they are."),
};

static const char *const extensions[] = {PHX_EXT_DEVICE, PHX_EXT_COMM, PHX_EXT_OPTIM, NULL};

const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin,
      .kind = PHX_KIND_STRATEGY,
      .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR,
      .id = "fsdp",
      .version = "0.1.0",
      .summary = "Flat shards per unit, gathered before use, gradients reduced and scattered beside backward",
      .vendor = "Phalanx",
      .license = "unspecified",
      .build = __VERSION__,
      .provides = PHX_CAP_SHARDS_WEIGHTS | PHX_CAP_DETERMINISTIC | PHX_CAP_BF16 | PHX_CAP_LIVE_STATE,
      .extensions = extensions,
      .options = options,
      .n_options = sizeof options / sizeof *options,
      .option_stride = sizeof *options,
      .config_size = sizeof(fsdp_config),
      .table = &fsdp_table,
  };
  return &plugin;
}
