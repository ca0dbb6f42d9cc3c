/* One strategy, wrong in the one way that CASE_* says. */
#include "../stub.h"
#include <stdlib.h>
#include <unistd.h>

typedef struct settings {
  int64_t a, b;
} settings;
static const phx_option options[] = {
    PHX_INT(settings, a, "3", 0, 10, NULL, 0, "First."),
#ifdef CASE_BADOPTION
    PHX_INT(settings, b, "11", 0, 10, NULL, 0, "Its default is out of range."),
#else
    PHX_INT(settings, b, "4", 0, 10, NULL, 0, "Second."),
#endif
};

static const phx_strategy_table table = {
#ifdef CASE_BADTABLE
    .struct_size = 12345677,
#elif defined CASE_NOCALL /* as built against a table that ended before `update` */
    .struct_size = offsetof(phx_strategy_table, update),
#else
    .struct_size = sizeof table,
#endif
    STUB_STRATEGY_CALLS,
};
#ifdef CASE_NEEDSEXT
static const char *const extensions[] = {"phx.device/1", "phx.nonsense/1", NULL};
#endif

static const phx_plugin plugin = {
    .struct_size = sizeof(phx_plugin),
#ifdef CASE_OTHERKIND
    .kind = PHX_KIND_COMM,
#else
    .kind = PHX_KIND_STRATEGY,
#endif
#ifdef CASE_OTHERABI
    .table_major = PHX_ABI_MAJOR + 1,
#else
    .table_major = PHX_ABI_MAJOR,
#endif
    .table_minor = PHX_ABI_MINOR,
#ifdef CASE_WRONGID
    .id = "rightid",
#elif defined CASE_UNNAMED
    .id = "No Name",
#else
    .id = STUB_ID,
#endif
    .version = "1.0",
    .summary = "Wrong in one way.",
    .vendor = "phalanx",
    .license = "unspecified",
    .build = "test",
#ifdef CASE_NEEDS17
    .needs = PHX_NEED_HOST_MEMORY | 1ull << 17,
#endif
#ifdef CASE_NEEDSEXT
    .extensions = extensions,
#endif
    .options = options,
    .n_options = 2,
    .option_stride = sizeof options[0],
    .config_size = sizeof(settings),
    .table = &table,
};

#ifdef CASE_UNDEFINED
void phx_test_function_that_nobody_has(void);
#endif

#if defined CASE_CRASH || defined CASE_EXITS || defined CASE_HANG
__attribute__((constructor)) static void misbehave(void) {
#ifdef CASE_CRASH
  abort();
#elif defined CASE_EXITS
  _exit(7);
#else
  for (;;) pause();
#endif
}
#endif

const phx_plugin *phx_plugin_v1(void) {
#ifdef CASE_UNDEFINED
  phx_test_function_that_nobody_has();
#endif
  return &plugin;
}
