/* core/config/settings.h - the core's own INI sections: the struct that they fill, and their option tables.  Constant
 * data; [any]. */
#ifndef PHX__SETTINGS_H
#define PHX__SETTINGS_H
#include <phalanx/option.h>

typedef struct phx__settings { /* the core's own keys, parsed; strings live as long as the config */
  struct {
    const char *strategy; /* a name, or the path of a .so */
    int64_t ranks, steps, seed;
    const char *out;
    int32_t deterministic;
    double timeout;      /* seconds; 0: for ever */
    int64_t hash_every;  /* steps; 0: only the last */
    int64_t valid_every; /* steps; 0: only at the end */
    int64_t valid_windows; /* 0: all */
    int64_t log_every;
    int32_t pin;         /* auto | yes | no: pin ranks to cores */
    int32_t on_nonfinite; /* 0 stop, 1 skip */
    int64_t max_skipped; /* steps in a row; 0: no limit */
    int64_t drift_every; /* steps; 0: never */
    int64_t balance_every; /* steps; 0: only at the end */
    int64_t max_restarts;
    int32_t elastic;
    int32_t overcommit;
    int32_t checked;     /* 0 no, 1 yes; 2 auto, which is no here: compare asks for yes */
    int32_t stopped_status; /* 0: status 5, 1: status 0 */
  } run;
  struct {
    int64_t micro, accumulate, sequence;
    int32_t reduce;      /* PHX_REDUCE_* */
    int64_t total;       /* sequences per step of all ranks; 0: derived.  Must equal ranks * micro * accumulate */
  } batch;
  struct {
    const char *plugin;
  } model;
  struct {
    const char *train, *valid; /* a file or a glob; valid may be "" */
    int32_t on_change;         /* at a resume with other data: 0 refuse, 1 restart their order */
  } data;
  struct {
    const char *name;      /* a plugin's name, or the path of a .so */
    double lr, final, weight_decay, clip; /* clip 0: off */
    int32_t schedule;      /* 0 constant, 1 linear, 2 cosine */
    int64_t warmup;        /* steps */
  } optimizer;
  struct {
    int32_t compute, reduce; /* 0 fp32, 1 bf16; 2 fp16, which is always refused */
  } precision;
  struct {
    const char *plugin;
    int64_t threads;       /* -1: auto */
  } device;
  struct {
    const char *plugin;
  } comm;
  struct {
    int64_t every;         /* steps; 0: none */
    int64_t keep;          /* newest ones; 0: all */
    int64_t keep_every;    /* steps; 0: none */
    int32_t background;
    int64_t copy;          /* bytes per rank; -1: auto */
    int64_t max_failures;  /* saves in a row; 0: no limit */
  } checkpoint;
  struct {
    const char *path, *pin;
  } plugins;
} phx__settings;

typedef struct phx__core_table {
  const char *section;
  const phx_option *options; /* offsets are into phx__settings */
  uint32_t n;
} phx__core_table;

/* In the order of the documentation; NULL after the last. */
const phx__core_table *phx__core_table_at(uint32_t i);
/* By name, or NULL: these names are reserved, no plugin may bear one. */
const phx__core_table *phx__core_section(const char *name);
/* What to write instead of a key that earlier versions had; NULL: it never was one. */
const char *phx__core_replaced(const char *section, const char *key);
#endif
