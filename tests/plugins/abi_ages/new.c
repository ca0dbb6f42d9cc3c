/* As built against a later header: descriptor, option rows and table are longer, and the tails are poisoned. */
#include "../stub.h"

typedef struct settings {
  int64_t a, b;
} settings;
typedef struct new_option {
  phx_option known;
  uint64_t tail[3];
} new_option;
#define POISON {0xA5A5A5A5A5A5A5A5u, 0xA5A5A5A5A5A5A5A5u, 0xA5A5A5A5A5A5A5A5u}
static const new_option options[] = {
    {PHX_INT(settings, a, "3", 0, 10, NULL, 0, "First."), POISON},
    {PHX_INT(settings, b, "4", 0, 10, NULL, 0, "Second, behind a longer row."), POISON},
};
static const struct {
  phx_strategy_table known;
  uint64_t tail[3];
} table = {{.struct_size = sizeof table, STUB_STRATEGY_CALLS}, POISON};
static const struct {
  phx_plugin known;
  uint64_t tail[3];
} plugin = {{.struct_size = sizeof plugin, .kind = PHX_KIND_STRATEGY, .table_major = PHX_ABI_MAJOR,
             .table_minor = PHX_ABI_MINOR + 7, .version = "9.0", .summary = "Newer than the core.", .vendor = "phalanx",
             .license = "unspecified", .build = "test",
             .id = STUB_ID, .options = &options[0].known, .n_options = 2, .option_stride = sizeof options[0],
             .config_size = sizeof(settings), .table = &table.known},
            POISON};
const phx_plugin *phx_plugin_v1(void) { return &plugin.known; }
