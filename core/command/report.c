/* core/command/report.c - see report.h. */
#include "command/report.h"

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

#include "base/output.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/balance.h"
#include "engine/plan_kept.h"
#include "job/run_lock.h"

int64_t phx__pss_bytes(void) {
  char text[2048]; /* "Pss:" is the third line of some twenty short ones */
  const int fd = phx__sys.open("/proc/self/smaps_rollup", O_RDONLY, 0);
  if (fd < 0) return -1;
  const ssize_t n = phx__sys.read(fd, text, sizeof text - 1);
  phx__sys.close(fd);
  if (n <= 0) return -1;
  text[n] = 0;
  const char *line = strstr(text, "\nPss:");
  return line ? strtoll(line + 5, NULL, 10) * 1024 : -1;
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

/* Milliseconds of a step, of every rank. */
static void add_balance(cJSON *parent, const phx__run_result *r) {
  double ratio = 1;
  const int32_t slowest = phx__balance_slowest(r->ranks, r->n_ranks, &ratio);
  if (slowest < 0) return;
  cJSON *o = cJSON_AddObjectToObject(parent, "balance");
  cJSON_AddNumberToObject(o, "slowest", slowest);
  cJSON_AddNumberToObject(o, "ratio", ratio);
  cJSON *own = cJSON_AddArrayToObject(o, "own_ms"), *wait = cJSON_AddArrayToObject(o, "wait_ms");
  for (int32_t i = 0; i < r->n_ranks; i++) {
    phx__json_append(own, cJSON_CreateNumber(1e-6 * (double)r->ranks[i].own_ns));
    phx__json_append(wait, cJSON_CreateNumber(1e-6 * (double)r->ranks[i].wait_ns));
  }
}

static void add_difference(void *arg, const char *line) { phx__json_append(arg, cJSON_CreateString(line)); }

static void add_plan(cJSON *parent, const phx__run_result *r) {
  cJSON *plan = cJSON_AddObjectToObject(parent, "plan"), *list = cJSON_CreateArray();
  cJSON_AddBoolToObject(plan, "kept", phx__plan_differences(r->ranks, r->n_ranks, add_difference, list) == 0);
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
  if (!isnan(r->valid_loss)) cJSON_AddRawToObject(o, "valid_loss", isfinite(r->valid_loss) ? text : "null");
  cJSON_AddStringToObject(o, "state_hash", r->state_hash);
  cJSON_AddNumberToObject(o, "tokens_per_s", r->tokens_per_s);
  cJSON_AddNumberToObject(o, "step_ms", r->step_ms);
  add_saves(o, &r->saves);
  add_balance(o, r);
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
  if (phx__run_lock_check(err)) return PHX_STATE;
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
  add_plugin(plugins, "optimizer", rt->config->optimizer.plugin);
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
