/* tests/plugins/wrong_optimizer - an optimizer that is wrong in the one way that its option says. */
#include <phalanx/error.h>
#include <phalanx/provider.h>
#include <stdlib.h>

enum {
  NOTHING, GRAIN, STATES, NAME, TWICE, TAKEN, DTYPE, BYTES, BLOCKS, GROWN, REFUSES, CRASHES, WORKSPACE, ROWS,
  WHOLE_BLOCKS, NO_SELF, PLAN, UPDATE_FAILS, UPDATE_CRASHES
};
static const char *const ways[] = {"nothing", "grain", "states", "name", "twice", "taken", "dtype", "bytes", "blocks",
                                   "grown", "refuses", "crashes", "workspace", "rows", "whole_blocks", "no_self",
                                   "plan", "update_fails", "update_crashes", NULL};
typedef struct settings {
  int32_t wrong;
} settings;
static const phx_option options[] = {PHX_ENUM(settings, wrong, "nothing", ways, "What is wrong.")};
static char self_of_it, *kept;
static const phx_host *its_host;
static int32_t wrong;

static phx_status describe(const void *config, phx_optimizer_facts *out, phx_error *err) {
  wrong = ((const settings *)config)->wrong;
  out->n_states = 1;
  out->states[0] = (phx_optim_state){"m", PHX_F32, PHX_PER_ELEMENT};
  switch (wrong) {
    case GRAIN: out->grain = 4; break;
    case STATES: out->n_states = PHX_OPTIM_STATES_MAX + 1; break;
    case NAME: out->states[0].name = "A b"; break;
    case TWICE: out->states[out->n_states++] = out->states[0]; break;
    case TAKEN: out->states[0].name = "weight"; break;
    case DTYPE: out->states[0].dtype = 77; break;
    case BYTES: out->states[0].dtype = PHX_U8; break;
    case BLOCKS: out->states[0].per = PHX_PER_BLOCK; break;
    case GROWN: out->struct_size += 8; break;
    case REFUSES: return phx_fail(err, PHX_INVALID, "the value of wrong is wrong");
    case CRASHES: abort();
    case ROWS: out->grain = PHX_GRAIN_ROW; break;
    case WHOLE_BLOCKS: out->grain = PHX_GRAIN_BLOCK; break;
  }
  return PHX_OK;
}

static int64_t workspace(const void *config, const phx_model *model) {
  (void)config, (void)model;
  return wrong == WORKSPACE ? -5 : 0;
}

static phx_status create(const phx_host *host, const void *config, const phx_model *model, phx_optimizer_self **out,
                         phx_error *err) {
  const phx_memory what = {.struct_size = sizeof what, .bytes = 4096, .kind = PHX_MEM_WORKSPACE};
  void *p = NULL;
  (void)config, (void)model;
  its_host = host;
  if (wrong == NO_SELF) return PHX_OK;
  if (wrong == PLAN) PHX_TRY(host->alloc(host->ctx, &what, &p, err));
  kept = p;
  *out = (phx_optimizer_self *)(void *)&self_of_it;
  return PHX_OK;
}

static void destroy(phx_optimizer_self *self) {
  (void)self;
  if (kept) its_host->release(its_host->ctx, kept);
}

static phx_status update(phx_optimizer_self *self, const phx_piece *piece, phx_error *err) {
  (void)self, (void)piece, (void)err;
  if (wrong == UPDATE_CRASHES) abort();
  return wrong == UPDATE_FAILS ? PHX_DEVICE : PHX_OK;
}

static const phx_optimizer_table table = {.struct_size = sizeof table, .describe = describe, .workspace = workspace,
                                          .create = create, .destroy = destroy, .update = update};

const phx_plugin *phx_plugin_v1(void) {
  static const phx_plugin plugin = {
      .struct_size = sizeof plugin, .kind = PHX_KIND_OPTIMIZER, .table_major = PHX_ABI_MAJOR,
      .table_minor = PHX_ABI_MINOR, .id = "wrong_optimizer", .version = "1.0", .summary = "Wrong in one way.",
      .vendor = "phalanx", .license = "unspecified", .build = "test", .provides = PHX_CAP_DETERMINISTIC,
      .options = options, .n_options = 1, .option_stride = sizeof *options, .config_size = sizeof(settings),
      .table = &table};
  return &plugin;
}
