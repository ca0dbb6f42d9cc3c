/* core/config.h - the configuration of a run: defaults < file < --set, every value with its source.
 *
 * inih is behind config_ini.c; the core's own sections are option tables like a plugin's (config_core.c).  All errors
 * of a file are collected, each with file:line and the nearest name, before anything is refused.  [main] only. */
#ifndef PHX__CONFIG_H
#define PHX__CONFIG_H
#include "loader.h"
#include <stdio.h>

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
    int32_t name;          /* 0 adamw, 1 sgd */
    double lr, final, weight_decay, clip, beta1, beta2, eps; /* clip 0: off */
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

typedef struct phx__selected {
  const phx__plugin *plugin;
  void *config; /* the plugin's own struct, filled from its table */
} phx__selected;

typedef struct phx__config {
  phx__settings s;
  phx__selected strategy, device, comm, model;
  char device_why[256], comm_why[256]; /* what [device] and [comm] plugin = auto came to, and why; "": not auto */
  struct phx__config_private *priv;
} phx__config;

/* One `--set section.key=value`, or what -n and --strategy stand for. */
typedef struct phx__override {
  const char *text; /* "section.key=value"; with "?" before it, it counts only where nothing before it gives the key */
  const char *flag; /* shown as the source: "--set", "-n", "--strategy" */
} phx__override;

/* Loads, selects plugins, validates everything.  On refusal *out is NULL, every error
 * has been printed to `report` (one line each, "file:line: ..."), and PHX_INVALID or PHX_UNSUPPORTED is returned. */
phx_status phx__config_load(const char *path, const phx__override *overrides, size_t n, FILE *report,
                            phx__config **out);
/* The same of a file that comes with data (a run's own config.ini): it names no code.  Of it [plugins] path and pin,
 * and a strategy's path, do not count; what an override says does.  A strategy's path is refused, unless overridden. */
phx_status phx__config_load_found(const char *path, const phx__override *overrides, size_t n, FILE *report,
                                  phx__config **out);
void phx__config_free(phx__config *config);
/* [plugins] path of a file, NULL where it has none; nothing else of it is judged.  Freed with phx__free. */
phx_status phx__config_plugin_path(const char *file, char **out, phx_error *err);
/* 64-bit hash of everything that must be equal on all ranks: values not PER_RANK, plugin ids, versions, file hashes. */
uint64_t phx__config_hash(const phx__config *config);
/* The effective configuration as an INI; sources: a comment behind each value says where it came from. */
void phx__config_print(const phx__config *config, FILE *out, bool sources);
/* Visits every effective value: for run.json. */
typedef void phx__config_fn(void *arg, const char *section, const char *key, const char *value, const char *source);
void phx__config_each(const phx__config *config, phx__config_fn *fn, void *arg);
/* Help of one plugin or core section: the options as a table, and a sample INI section. */
void phx__config_help(const char *section, const phx_option *options, uint32_t n, uint32_t stride, FILE *out);
#endif
