/* private.c - ddp that also keeps private state (tests only): numbers that depend on every step before and on the rank,
 * like the residue of error feedback, and a byte per element that counts steps.
 *
 * It logs what prepare_state and state_restored are told.  Everything else is ddp's own code.  One strategy per
 * process. */
#define phx_plugin_v1 ddp_entry
#include "ddp.c"
#undef phx_plugin_v1

enum { RESIDUE_BLOCKS = 300, COUNT_BLOCKS = 3 }; /* more than a chunk of a file; no multiple of 4096 bytes */

static const phx_host *own_host;
static const phx_comm *own_comm;
static float residue[RESIDUE_BLOCKS * PHX_BLOCK];
static uint8_t counts[COUNT_BLOCKS * PHX_BLOCK];

static phx_status own_create(const phx_host *host, const void *config, const phx_topology *topology,
                                 const phx_model *model, phx_strategy **out, phx_error *err) {
  memset(residue, 0, sizeof residue);
  memset(counts, 0, sizeof counts);
  own_host = host;
  own_comm = host->extension(host->ctx, PHX_EXT_COMM);
  return ddp_create(host, config, topology, model, out, err);
}

static phx_status own_visit(phx_strategy *self, const phx_visitor *visitor, phx_error *err) {
  const phx_slice bytes = {.struct_size = sizeof bytes, .kind = PHX_STATE_PRIVATE, .dtype = PHX_U8, .name = "counts",
                           .blocks = COUNT_BLOCKS};
  const phx_slice floats = {.struct_size = sizeof floats, .kind = PHX_STATE_PRIVATE, .dtype = PHX_F32,
                            .name = "residue", .blocks = RESIDUE_BLOCKS};
  phx_status status = visitor->slice(visitor->ctx, &bytes, err); /* first, so that nothing behind it is aligned */
  if (status == PHX_OK) status = ddp_visit_state(self, visitor, err);
  return status == PHX_OK ? visitor->slice(visitor->ctx, &floats, err) : status;
}

static phx_status own_map(phx_strategy *self, const phx_slice *slice, int32_t mode, void **out, phx_error *err) {
  if (slice->kind != PHX_STATE_PRIVATE) return ddp_map(self, slice, mode, out, err);
  *out = slice->dtype == PHX_U8 ? (void *)counts : (void *)residue;
  return PHX_OK;
}

static phx_status own_unmap(phx_strategy *self, const phx_slice *slice, int32_t mode, void *p, phx_error *err) {
  return slice->kind == PHX_STATE_PRIVATE ? PHX_OK : ddp_unmap(self, slice, mode, p, err);
}

static phx_status own_update(phx_strategy *self, int64_t step, float scale, phx_error *err) {
  const phx_status status = ddp_update(self, step, scale, err);
  for (int64_t i = 0; status == PHX_OK && i < RESIDUE_BLOCKS * PHX_BLOCK; i++)
    residue[i] = 0.75f * residue[i] + (float)(i % 1013 + 7 * self->topology->rank) / (float)step;
  for (int64_t i = 0; status == PHX_OK && i < COUNT_BLOCKS * PHX_BLOCK; i++) counts[i] += (uint8_t)(1 + i % 5);
  return status;
}

/* Both say what they were told; prepare_state also meets the other ranks, as only a collective call may. */
static void tell(const char *what, int64_t a, int64_t b, int64_t c, int64_t d) {
  char text[120];
  snprintf(text, sizeof text, "%s %lld %lld %lld %lld", what, (long long)a, (long long)b, (long long)c, (long long)d);
  own_host->log(own_host->ctx, PHX_LOG_INFO, text);
}
static phx_status own_prepare(phx_strategy *self, int32_t purpose, phx_error *err) {
  int64_t least[2] = {purpose, -purpose};
  (void)self;
  const phx_status status = own_comm->all_reduce(own_comm->ctx, least, least, 2, PHX_I64, PHX_MIN, NULL, err);
  if (status != PHX_OK) return status;
  if (least[0] != -least[1]) return phx_fail(err, PHX_INTERNAL, "the ranks prepare the state for different things");
  tell("prepare", purpose, 0, 0, 0);
  return PHX_OK;
}
static phx_status own_restored(phx_strategy *self, const phx_restored *what, phx_error *err) {
  (void)self, (void)err;
  tell("restored", what->what, what->world_size, what->step, what->privates);
  return PHX_OK;
}

PHX_EXPORT const phx_plugin *phx_plugin_v1(void);
const phx_plugin *phx_plugin_v1(void) {
  static phx_strategy_table own;
  static phx_plugin renamed;
  renamed = *ddp_entry();
  own = *(const phx_strategy_table *)renamed.table;
  own.create = own_create;
  own.visit_state = own_visit;
  own.map = own_map;
  own.unmap = own_unmap;
  own.update = own_update;
  own.prepare_state = own_prepare;
  own.state_restored = own_restored;
  renamed.id = "private";
  renamed.summary = "Test only: ddp with private state.";
  renamed.provides = PHX_CAP_DETERMINISTIC; /* the private state changes outside the optimizer */
  renamed.table = &own;
  return &renamed;
}
