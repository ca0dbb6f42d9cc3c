/* A strategy with one option of each type. */
#include "../stub.h"

typedef struct settings {
  int64_t bucket_bytes, prefetch, limit;
  double ratio;
  const char *note;
  int32_t overlap, sharding;
} settings;

static const char *const sharding[] = {"full", "grad_op", "none", NULL};
static const phx_option options[] = {
    PHX_BYTES(settings, bucket_bytes, "25MiB", 1024, INT64_C(1) << 40, 0, "Bytes of a bucket."),
    PHX_INT(settings, prefetch, "1", 0, 8, "units", 0, "Units gathered ahead."),
    PHX_INT(settings, limit, "auto", 0, 1000, "units", PHX_OPTF_AUTO | PHX_OPTF_PER_RANK, "Units in flight."),
    PHX_REAL(settings, ratio, "0.5", -1, 1, "A ratio."),
#ifdef STUB_TWO_RANKS
    PHX_STRING(settings, note, NULL, PHX_OPTF_REQUIRED, "A note that must be given."),
#else
    PHX_STRING(settings, note, "", PHX_OPTF_EXPERIMENTAL, "A note."),
#endif
    PHX_BOOL(settings, overlap, "yes", "Overlap communication with compute."),
    PHX_ENUM(settings, sharding, "full", sharding, "What is sharded."),
};

static const phx_strategy_table table = {.struct_size = sizeof table, STUB_STRATEGY_CALLS};

static const phx_plugin plugin = {
    STUB_DESCRIPTOR(PHX_KIND_STRATEGY),
    .id = STUB_ID,
#ifdef STUB_TWO_RANKS
    .needs = PHX_NEED_TWO_RANKS,
#else
    .provides = PHX_CAP_DETERMINISTIC | 1ull << 60, /* a bit that nobody knows must be ignored */
#endif
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .option_stride = sizeof options[0],
    .config_size = sizeof(settings),
    .table = &table,
};

const phx_plugin *phx_plugin_v1(void) { return &plugin; }
