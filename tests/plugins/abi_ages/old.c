/* As built against a header whose table ended with `update`: run_step and what follows do not exist.  Where they would
 * be, there is poison, which the core must not read. */
#include "../stub.h"
#include <string.h>

static struct {
  phx_strategy_table table;
} old = {.table = {.struct_size = offsetof(phx_strategy_table, run_step), STUB_STRATEGY_CALLS}};

static phx_plugin plugin = {STUB_DESCRIPTOR(PHX_KIND_STRATEGY), .id = STUB_ID, .table = &old.table};

__attribute__((constructor)) static void poison(void) {
  memset((char *)&old.table + old.table.struct_size, 0xA5, sizeof old.table - old.table.struct_size);
}
const phx_plugin *phx_plugin_v1(void) { return &plugin; }
