/* core/report.c - see report.h. */
#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "checkpoint_dir.h"
#include "output.h"
#include "plan_kept.h"
#include "status.h"
#include "sys.h"

enum { RUN_DIR_MAX = 4000, /* PATH_MAX, with room for the names below it */ CONFIG_MAX = 16 << 20 };

int64_t phx__pss_bytes(void) {
  FILE *f = fopen("/proc/self/smaps_rollup", "re");
  char line[256];
  int64_t kib = -1;
  if (!f) return -1;
  while (kib < 0 && fgets(line, sizeof line, f))
    if (!strncmp(line, "Pss:", 4)) kib = strtoll(line + 4, NULL, 10);
  fclose(f);
  return kib < 0 ? -1 : kib * 1024;
}

/* ---- the run's directory ---- */
/* The name of a new directory is on the disk when its parent was flushed: else a power cut may take it, with every
 * checkpoint that was committed in it since. */
static phx_status flush_parent(const char *path, phx_error *err) {
  char parent[RUN_DIR_MAX];
  snprintf(parent, sizeof parent, "%s", path);
  char *slash = strrchr(parent, '/');
  if (!slash) return phx__dir_flush(".", err);
  *(slash == parent ? slash + 1 : slash) = 0;
  return phx__dir_flush(parent, err);
}

/* Makes path and its parents; *made of them, the last ones of the path, are new. */
static phx_status make_dirs(const char *path, int *made, phx_error *err) {
  char part[RUN_DIR_MAX];
  *made = 0;
  snprintf(part, sizeof part, "%s", path);
  for (char *slash = strchr(part + 1, '/');; slash = strchr(slash + 1, '/')) {
    if (slash) *slash = 0;
    if (!phx__sys.mkdir(part, 0755)) {
      ++*made;
      const phx_status status = flush_parent(part, err);
      if (status) return status;
    } else if (errno != EEXIST) {
      return phx__fail_errno(err, PHX_IO, errno, "cannot create the directory %s (run.out)", part);
    }
    if (!slash) return PHX_OK;
    *slash = '/';
  }
}

/* Takes new directories back, the deepest first; those that are not there or not empty end it. */
static void unmake_dirs(const char *path, int made) {
  char part[RUN_DIR_MAX];
  snprintf(part, sizeof part, "%s", path);
  while (made > 0 && *part) {
    if (!phx__sys.rmdir(part)) made--;
    else if (errno == ENOTEMPTY || errno == EEXIST) return;
    char *slash = strrchr(part, '/');
    if (!slash) return;
    *slash = 0;
  }
}

static bool holds_a_run(const char *dir) {
  static const char *const names[] = {"run.json", "compare.json", "compare"};
  char name[RUN_DIR_MAX + 32];
  struct stat st;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    snprintf(name, sizeof name, "%s/%s", dir, names[i]);
    if (!stat(name, &st)) return true;
  }
  return false;
}

/* Where an earlier run in dir goes: "" when there is none. */
static phx_status aside_name(const char *dir, char name[RUN_DIR_MAX + 32], phx_error *err) {
  struct stat st;
  name[0] = 0;
  if (!holds_a_run(dir)) return PHX_OK;
  for (int n = 1; n < 100000; n++) {
    snprintf(name, RUN_DIR_MAX + 32, "%s.%d", dir, n);
    if (lstat(name, &st)) return PHX_OK;
  }
  return phx__fail(err, PHX_IO, "%s has too many earlier runs beside it: remove some, or change run.out", dir);
}

static phx_status move_aside(const char *dir, phx_error *err) {
  char name[RUN_DIR_MAX + 32];
  const phx_status status = aside_name(dir, name, err);
  if (status || !name[0]) return status;
  if (phx__sys.rename(dir, name)) return phx__fail_errno(err, PHX_IO, errno, "cannot move %s to %s", dir, name);
  fprintf(stderr, "%s holds an earlier run: it is now %s\n", dir, name);
  return PHX_OK;
}

static phx_status write_config(const phx__config *config, const char *dir, phx_error *err) {
  char path[RUN_DIR_MAX + 32], *text = NULL;
  size_t bytes = 0;
  FILE *f = open_memstream(&text, &bytes);
  if (!f) return phx__fail_errno(err, PHX_NOMEM, errno, "cannot write %s/config.ini", dir);
  phx__config_print(config, f, true);
  const bool short_of_memory = ferror(f);
  phx_status status = PHX_OK;
  snprintf(path, sizeof path, "%s/config.ini", dir);
  if (fclose(f) || short_of_memory || !text) status = phx__fail(err, PHX_NOMEM, "no memory to write %s", path);
  else status = phx__text_write(path, text, err);
  free(text);
  return status;
}

static phx_status path_of(const phx__config *config, char dir[RUN_DIR_MAX], phx_error *err) {
  if (snprintf(dir, RUN_DIR_MAX, "%s", config->s.run.out) >= RUN_DIR_MAX)
    return phx__fail(err, PHX_INVALID, "run.out has %zu characters: more than %d are too long for a path",
                     strlen(config->s.run.out), RUN_DIR_MAX - 1);
  for (size_t n = strlen(dir); n > 1 && dir[n - 1] == '/'; n--) dir[n - 1] = 0;
  return PHX_OK;
}

phx_status phx__run_dir_create(const phx__config *config, phx_error *err) {
  char dir[RUN_DIR_MAX];
  int made = 0;
  phx_status status = path_of(config, dir, err);
  if (!status) status = move_aside(dir, err);
  if (status) return status;
  status = make_dirs(dir, &made, err);
  if (!status) status = write_config(config, dir, err);
  if (status) unmake_dirs(dir, made);
  return status;
}

/* Beside and renamed: the run may be going on from this very file. */
phx_status phx__run_dir_resume(const phx__config *config, phx_error *err) {
  return write_config(config, config->s.run.out, err);
}

/* ---- and back ---- */
struct phx__run_dir {
  char dir[RUN_DIR_MAX], aside[RUN_DIR_MAX + 32]; /* aside: where the earlier run goes, or "" */
  int missing;      /* the last so many parts of the path are not there */
  char *config;     /* config.ini's text, or NULL */
  int64_t logs[PHX_RANKS_MAX]; /* lengths of rank-R.log, or -1 */
};

static void log_path(const phx__run_dir *d, int32_t rank, char path[RUN_DIR_MAX + 32]) {
  snprintf(path, RUN_DIR_MAX + 32, "%s/rank-%d.log", d->dir, rank);
}

/* NULL: none that could be read. */
static char *read_config(const char *dir) {
  char path[RUN_DIR_MAX + 32], *text = NULL;
  struct stat st;
  snprintf(path, sizeof path, "%s/config.ini", dir);
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  if (fd < 0) return NULL;
  if (!phx__sys.fstat(fd, &st) && st.st_size < CONFIG_MAX) text = phx__calloc(1, (size_t)st.st_size + 1);
  if (text && phx__sys.pread(fd, text, (size_t)st.st_size, 0) != st.st_size) {
    phx__free(text);
    text = NULL;
  }
  phx__sys.close(fd);
  return text;
}

phx_status phx__run_dir_remember(const phx__config *config, phx__run_dir **out, phx_error *err) {
  char path[RUN_DIR_MAX + 32];
  struct stat st;
  phx__run_dir *d = phx__calloc(1, sizeof *d);
  if (!d) return phx__fail(err, PHX_NOMEM, "no memory to remember what run.out holds");
  phx_status status = path_of(config, d->dir, err);
  if (!status) status = aside_name(d->dir, d->aside, err);
  if (status) {
    phx__free(d);
    return status;
  }
  snprintf(path, sizeof path, "%s", d->dir);
  for (char *slash = path; slash && *path && stat(path, &st); d->missing++) {
    slash = strrchr(path, '/');
    if (slash) *slash = 0;
  }
  d->config = read_config(d->dir);
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) {
    log_path(d, r, path);
    d->logs[r] = stat(path, &st) ? -1 : st.st_size;
  }
  *out = d;
  return PHX_OK;
}

void phx__run_dir_undo(const phx__run_dir *d, bool continues) {
  char path[RUN_DIR_MAX + 32];
  struct stat st;
  if (!d || (!continues && d->aside[0] && lstat(d->aside, &st))) return; /* the earlier run was not moved */
  const bool fresh = !continues && (d->aside[0] || d->missing > 0);
  for (int32_t r = 0; r < PHX_RANKS_MAX; r++) {
    log_path(d, r, path);
    if (fresh || d->logs[r] < 0) phx__sys.unlink(path);
    else if (!stat(path, &st) && st.st_size > d->logs[r] && truncate(path, d->logs[r]))
      fprintf(stderr, "phalanx: %s could not be cut to what it was: %s\n", path, strerror(errno));
  }
  snprintf(path, sizeof path, "%s/config.ini", d->dir);
  if (fresh || !d->config) phx__sys.unlink(path);
  else if (phx__text_write(path, d->config, NULL))
    fprintf(stderr, "phalanx: %s could not be written back\n", path);
  if (!fresh) return;
  unmake_dirs(d->dir, d->aside[0] ? 1 : d->missing);
  if (!d->aside[0]) return;
  if (!phx__sys.rename(d->aside, d->dir)) fprintf(stderr, "%s is %s again\n", d->aside, d->dir);
  else fprintf(stderr, "phalanx: cannot move %s back to %s: %s\n", d->aside, d->dir, strerror(errno));
}

void phx__run_dir_forget(phx__run_dir *d) {
  if (d) phx__free(d->config);
  phx__free(d);
}

/* ---- run.json ---- */
static void add_config(void *arg, const char *section, const char *key, const char *value, const char *source) {
  cJSON *root = arg;
  cJSON *s = cJSON_GetObjectItemCaseSensitive(root, section);
  if (!s) s = cJSON_AddObjectToObject(root, section);
  cJSON *entry = cJSON_AddObjectToObject(s, key);
  cJSON_AddStringToObject(entry, "value", value);
  cJSON_AddStringToObject(entry, "source", source);
}

static void add_plugin(cJSON *parent, const char *kind, const phx__plugin *p) {
  cJSON *o = cJSON_AddObjectToObject(parent, kind);
  char abi[32];
  snprintf(abi, sizeof abi, "%u.%u", p->descriptor->table_major, p->descriptor->table_minor);
  cJSON_AddStringToObject(o, "id", p->descriptor->id);
  cJSON_AddStringToObject(o, "version", p->descriptor->version);
  cJSON_AddStringToObject(o, "abi", abi);
  cJSON_AddStringToObject(o, "path", p->path);
  cJSON_AddStringToObject(o, "sha256", p->sha256);
}

static void add_machine(cJSON *root, const phx__runtime *rt) {
  struct utsname u;
  cJSON *m = cJSON_AddObjectToObject(root, "machine");
  if (!uname(&u)) {
    cJSON_AddStringToObject(m, "system", u.sysname);
    cJSON_AddStringToObject(m, "release", u.release);
    cJSON_AddStringToObject(m, "architecture", u.machine);
  }
  cJSON_AddNumberToObject(m, "cpus", (double)sysconf(_SC_NPROCESSORS_ONLN));
  cJSON_AddStringToObject(m, "device", rt->device->name);
  cJSON_AddNumberToObject(m, "threads_per_rank", rt->device->threads);
}

static void add_ranks(cJSON *parent, const char *name, const phx__run_result *r, size_t offset) {
  cJSON *a = cJSON_AddArrayToObject(parent, name);
  for (int32_t i = 0; i < r->n_ranks; i++) {
    int64_t value;
    memcpy(&value, (const char *)&r->ranks[i] + offset, sizeof value);
    phx__json_append(a, cJSON_CreateNumber((double)value));
  }
}

/* The memory table by device: our own accounting, and the driver's count where it gives one. */
static void add_memory(cJSON *root, const phx__runtime *rt, const phx__run_result *r) {
  static const char *const spaces[] = {"device", "host", "pinned"};
  cJSON *o = cJSON_AddObjectToObject(root, "memory");
  cJSON_AddStringToObject(o, "device", rt->device->name);
  cJSON *peak = cJSON_AddObjectToObject(o, "peak");
  for (size_t i = 0; i < 3; i++)
    add_ranks(peak, spaces[i], r, offsetof(phx__rank_report, peak_in) + i * sizeof(int64_t));
  if (r->ranks[0].driver_bytes >= 0) add_ranks(o, "driver", r, offsetof(phx__rank_report, driver_bytes));
}

static void add_saves(cJSON *parent, const phx__save_totals *t) {
  if (t->saves + t->failed == 0) return;
  cJSON *o = cJSON_AddObjectToObject(parent, "checkpoints");
  cJSON_AddNumberToObject(o, "saves", (double)t->saves);
  cJSON_AddNumberToObject(o, "failed", (double)t->failed);
  cJSON_AddNumberToObject(o, "bytes", (double)t->bytes);
  cJSON_AddNumberToObject(o, "stall_ms", 1e3 * t->stall);
  cJSON_AddNumberToObject(o, "stall_ms_max", 1e3 * t->stall_most);
  cJSON_AddNumberToObject(o, "seconds", t->seconds);
}

static void add_difference(void *arg, const char *line) { phx__json_append(arg, cJSON_CreateString(line)); }

static void add_plan(cJSON *parent, const phx__run_result *r) {
  cJSON *plan = cJSON_AddObjectToObject(parent, "plan"), *list = cJSON_CreateArray();
  cJSON_AddBoolToObject(plan, "kept", phx__plan_differences(r, add_difference, list) == 0);
  cJSON_AddItemToObject(plan, "differences", list);
}

static void add_result(cJSON *root, const phx__run_result *r) {
  cJSON *o = cJSON_AddObjectToObject(root, "result");
  char text[32];
  cJSON_AddNumberToObject(o, "steps", (double)r->steps);
  snprintf(text, sizeof text, "%.17g", r->loss);
  if (isfinite(r->loss)) cJSON_AddRawToObject(o, "loss", text); /* none when there was no step left to do */
  cJSON_AddNumberToObject(o, "skipped_steps", (double)r->skipped);
  snprintf(text, sizeof text, "%.17g", r->valid_loss);
  if (isfinite(r->valid_loss)) cJSON_AddRawToObject(o, "valid_loss", text);
  cJSON_AddStringToObject(o, "state_hash", r->state_hash);
  cJSON_AddNumberToObject(o, "tokens_per_s", r->tokens_per_s);
  cJSON_AddNumberToObject(o, "step_ms", r->step_ms);
  add_saves(o, &r->saves);
  add_ranks(o, "peak_pss", r, offsetof(phx__rank_report, peak_pss));
  add_ranks(o, "steady_allocator_calls", r, offsetof(phx__rank_report, steady_calls));
  add_ranks(o, "hidden_memory", r, offsetof(phx__rank_report, hidden_bytes));
  add_ranks(o, "later_memory", r, offsetof(phx__rank_report, later_bytes));
  add_plan(o, r);
  cJSON *bytes = cJSON_AddObjectToObject(o, "bytes");
  for (size_t k = 0; k < PHX_MEM_KINDS; k++) {
    cJSON *kind = cJSON_AddObjectToObject(bytes, phx__memory_name((int32_t)k));
    add_ranks(kind, "planned", r, offsetof(phx__rank_report, planned) + k * sizeof(int64_t));
    add_ranks(kind, "measured", r, offsetof(phx__rank_report, measured) + k * sizeof(int64_t));
  }
  cJSON *sent = cJSON_AddObjectToObject(o, "sent");
  for (size_t op = 0; op < PHX_OPS; op++) {
    if (!r->ranks[0].calls_planned[op] && !r->ranks[0].calls_measured[op]) continue;
    cJSON *c = cJSON_AddObjectToObject(sent, phx_op_name((int32_t)op));
    add_ranks(c, "planned", r, offsetof(phx__rank_report, sent_planned) + op * sizeof(int64_t));
    add_ranks(c, "measured", r, offsetof(phx__rank_report, sent_measured) + op * sizeof(int64_t));
    add_ranks(c, "calls_planned", r, offsetof(phx__rank_report, calls_planned) + op * sizeof(int64_t));
    add_ranks(c, "calls_measured", r, offsetof(phx__rank_report, calls_measured) + op * sizeof(int64_t));
  }
}

enum { RUN_JSON_MAX = 16 << 20 };

/* The list of resumes of the file that is there, and one more. */
static void add_resumes(cJSON *root, const char *path, const phx__runtime *rt, const phx__resumed *resumed,
                        const char *when) {
  struct stat st;
  char *text = NULL;
  const int fd = phx__sys.open(path, O_RDONLY, 0);
  if (fd >= 0 && !phx__sys.fstat(fd, &st) && st.st_size < RUN_JSON_MAX) text = phx__calloc(1, (size_t)st.st_size + 1);
  const ssize_t n = text ? phx__sys.pread(fd, text, (size_t)st.st_size, 0) : 0;
  if (fd >= 0) phx__sys.close(fd);
  cJSON *old = n > 0 ? cJSON_ParseWithLength(text, (size_t)n) : NULL;
  phx__free(text);
  cJSON *list = cJSON_DetachItemFromObjectCaseSensitive(old, "resumed");
  cJSON_Delete(old);
  if (resumed) {
    if (!list) list = cJSON_CreateArray();
    cJSON *entry = cJSON_CreateObject();
    cJSON_AddStringToObject(entry, "time", when);
    cJSON_AddNumberToObject(entry, "step", (double)resumed->at.step);
    cJSON_AddNumberToObject(entry, "samples", (double)resumed->at.samples);
    cJSON_AddStringToObject(entry, "from", resumed->path);
    cJSON_AddStringToObject(entry, "strategy", rt->config->strategy.plugin->descriptor->id);
    cJSON_AddNumberToObject(entry, "ranks", rt->job->size);
    phx__json_append(list, entry);
  }
  if (list) cJSON_AddItemToObject(root, "resumed", list);
}

phx_status phx__run_json_write(const phx__runtime *rt, const phx__run_result *result, const phx__resumed *resumed,
                               phx_error *err) {
  char path[4200], when[64];
  time_t now = time(NULL);
  struct tm tm;
  phx__json_begin();
  cJSON *root = cJSON_CreateObject();
  snprintf(path, sizeof path, "%s/run.json", rt->config->s.run.out);
  strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
  cJSON_AddStringToObject(root, "phalanx", PHX__VERSION);
  cJSON_AddStringToObject(root, result ? "finished" : "started", when);
  cJSON_AddNumberToObject(root, "ranks", rt->job->size);
  add_machine(root, rt);
  cJSON *plugins = cJSON_AddObjectToObject(root, "plugins");
  add_plugin(plugins, "strategy", rt->config->strategy.plugin);
  add_plugin(plugins, "device", rt->config->device.plugin);
  add_plugin(plugins, "comm", rt->config->comm.plugin);
  add_plugin(plugins, "model", rt->config->model.plugin);
  cJSON *chosen = cJSON_AddObjectToObject(root, "chosen");
  if (*rt->config->device_why) cJSON_AddStringToObject(chosen, "device", rt->config->device_why);
  if (*rt->config->comm_why) cJSON_AddStringToObject(chosen, "comm", rt->config->comm_why);
  phx__config_each(rt->config, add_config, cJSON_AddObjectToObject(root, "config"));
  add_resumes(root, path, rt, resumed, when);
  if (result && !result->stopped) {
    add_result(root, result);
    add_memory(root, rt, result);
  }
  if (result && result->stopped) {
    cJSON *stopped = cJSON_AddObjectToObject(root, "stopped");
    cJSON_AddStringToObject(stopped, "by", result->stopped);
    cJSON_AddNumberToObject(stopped, "step", (double)result->steps);
    add_saves(stopped, &result->saves);
  }
  const phx_status status = phx__json_write(path, root, err);
  cJSON_Delete(root);
  return status;
}
