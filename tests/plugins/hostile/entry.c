/* entry.c - see hostile.h: options, descriptor, and what happens before there is a configuration. */
#include <signal.h>
#include <unistd.h>

#include "hostile.h"

hostile_run hostile;
int32_t hostile_rank;

static const char *const misuses[] = {
#define X(name) #name,
    HOSTILE_MISUSES(X)
#undef X
    NULL};
static const char *const calls[] = {
#define X(name) #name,
    HOSTILE_CALLS(X)
#undef X
    NULL};

enum { BASE_ROOM = 4096 }; /* of the strategy's own configuration, which comes first */
typedef struct all_config {
  char base[BASE_ROOM];
  hostile_config own;
} all_config;

#define AT(field) (uint32_t) offsetof(all_config, own.field), (uint32_t)sizeof(((hostile_config *)0)->field)
static const phx_option own_options[] = {
    {"rank", "Who misuses; -1: all.", "-1", NULL, NULL, -1, PHX_RANKS_MAX, 0, 0, PHX_OPT_INT, 0, AT(rank)},
    {"step", "From which step on.", "0", NULL, NULL, 0, 1000000, 0, 0, PHX_OPT_INT, 0, AT(step)},
    {"misuse", "What is wrong.", "none", NULL, misuses, 0, 0, 0, 0, PHX_OPT_ENUM, 0, AT(misuse)},
    {"call", "Where it crashes or fails.", "none", NULL, calls, 0, 0, 0, 0, PHX_OPT_ENUM, 0, AT(call)},
};

/* PHX_HOSTILE_LOAD: constructor or descriptor crash, exit and vanish end the process, hang and endless do not come
 * back, giant and kind are wrong numbers, own_bits promises nobody's bits. */
static bool asked(const char *what) {
  const char *load = getenv("PHX_HOSTILE_LOAD");
  return load && strcmp(load, what) == 0;
}

__attribute__((constructor)) static void on_load(void) {
  if (asked("constructor")) raise(SIGSEGV);
  if (asked("exit")) exit(0);
  if (asked("vanish")) _exit(0);
  while (asked("hang")) pause();
}

void hostile_take_memory(size_t bytes) {
  char *p = malloc(bytes);
  if (p) memset(p, 1, bytes);
  __asm__ volatile("" : : "r"(p) : "memory"); /* it is not optimised away */
}

const phx_plugin *hostile_base(void);
#undef phx_plugin_v1
PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) {
  enum { OWN = sizeof own_options / sizeof *own_options, MOST = 64 };
  static phx_option all[MOST];
  static phx_strategy_table wrapped;
  static phx_plugin renamed;
  const phx_plugin *base = hostile_base();
  if (asked("descriptor")) raise(SIGSEGV);
  while (asked("endless")) continue; /* busy */
  if (base->n_options + OWN > MOST || base->config_size > BASE_ROOM) return NULL;
  renamed = *base;
  memcpy(all, base->options, base->n_options * sizeof *all);
  memcpy(all + base->n_options, own_options, sizeof own_options);
  wrapped = *(const phx_strategy_table *)base->table;
  hostile.base = base->table;
  hostile_plan_calls(&wrapped);
  hostile_state_calls(&wrapped);
  hostile_step_calls(&wrapped);
  hostile_end_calls(&wrapped);
  renamed.id = HOSTILE_ID;
  renamed.summary = "Test only: a strategy with a misuse of choice.";
  renamed.provides = PHX_CAP_BF16 | (asked("own_bits") ? 0 : PHX_CAP_DETERMINISTIC);
  renamed.options = all;
  renamed.n_options = base->n_options + OWN;
  renamed.option_stride = sizeof *all;
  renamed.config_size = sizeof(all_config);
  renamed.table = &wrapped;
  if (asked("giant")) renamed.struct_size = (size_t)1 << 30;
  if (asked("kind")) renamed.kind = 77;
  return &renamed;
}

/* The part of a configuration that is ours. */
void hostile_configure(const void *config, const phx_topology *topology) {
  hostile.c = ((const all_config *)config)->own;
  hostile_rank = topology->rank;
}
