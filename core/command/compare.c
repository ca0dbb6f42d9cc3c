/* core/command/compare.c - see compare.h.
 *
 * Each variant is a `phalanx train` process of its own (a strategy is chosen per process), with its run directory below
 * the base.  What is compared is read back from the files of the runs: run.json and metrics.jsonl.
 * Every variant is loaded and checked before the first one starts and before anything is made on disk. */
#include "command/compare.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bytes_text.h"
#include "base/complain.h"
#include "base/output.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/report.h"
#include "command/run_dir.h"
#include "command/train.h"
#include "command/train_check.h"
#include "job/run_lock.h"
#include "plugin/config_load.h"
#include "plugin/loader.h"

enum { VARIANTS_MAX = 32, SETS_MAX = 16, SET_BYTES = 256, ARGS_MAX = 2 * PHX__OVERRIDES_MOST + 4 };

typedef struct variant {
  char label[512];       /* as the user wrote it */
  char strategy[512];
  char sets[SETS_MAX][SET_BYTES]; /* "fsdp.sharding=grad_op" */
  int n_sets;
  const char *keys;      /* in label: what becomes sets; NULL: none */
  char choice[540], out[4300];    /* "run.strategy=...", "run.out=..." */
  const char *dir;                /* in out */
  cJSON *run;            /* run.json */
  char **losses;         /* "loss,norm" of each step, as written */
  size_t n_losses;
} variant;

/* Where the keys begin: behind NAME at '.', or behind PATH.so at ':'; the end when there are none. */
static size_t end_of_name(const char *label, bool is_path) {
  if (!is_path) return strcspn(label, ".");
  for (const char *so = strstr(label, ".so"); so; so = strstr(so + 1, ".so"))
    if (so[3] == ':' || !so[3]) return (size_t)(so + 3 - label);
  return strlen(label);
}

static int parse_variant(variant *v, const char *text, size_t length) {
  if (length == 0 || length >= sizeof v->label) return 0;
  memcpy(v->label, text, length);
  const bool is_path = memchr(v->label, '/', strcspn(v->label, "=")) != NULL; /* a value may hold a path, too */
  const size_t name = end_of_name(v->label, is_path);
  snprintf(v->strategy, sizeof v->strategy, "%.*s", (int)name, v->label);
  snprintf(v->choice, sizeof v->choice, "run.strategy=%s", v->strategy);
  if (name == 0 || (is_path && (name < 3 || strncmp(v->label + name - 3, ".so", 3)))) return 0;
  if (!v->label[name]) return 1;
  v->keys = v->label + name + 1;
  for (const char *at = v->keys; at[-1]; at += strcspn(at, "+") + 1)
    if (!memchr(at, '=', strcspn(at, "+"))) return 0;
  return 1;
}

/* "key=value+key=value" become settings of the strategy's section, which is its id. */
static int take_keys(variant *v, const char *search) {
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin = NULL;
  const char *section = v->strategy;
  if (!v->keys) return 1;
  if (strchr(section, '/')) {
    if (phx__loader_open(search, PHX_KIND_STRATEGY, section, &plugin, &err)) {
      phx__complain("--strategies: %s", err.message);
      return 0;
    }
    section = plugin->descriptor->id;
  }
  for (const char *at = v->keys; at[-1];) {
    const size_t part = strcspn(at, "+");
    if (v->n_sets == SETS_MAX ||
        snprintf(v->sets[v->n_sets++], SET_BYTES, "%s.%.*s", section, (int)part, at) >= SET_BYTES) {
      phx__complain("--strategies: '%s': more than %d keys, or one of more than %d characters", v->label, SETS_MAX,
                    SET_BYTES - 1);
      return 0;
    }
    at += part + 1;
  }
  return 1;
}

static int parse_variants(variant *v, const char *text, int *n) {
  for (*n = 0; *text; (*n)++) {
    const size_t length = strcspn(text, ",");
    if (*n == VARIANTS_MAX || !parse_variant(&v[*n], text, length)) {
      phx__complain(
          "--strategies: '%.*s' is not NAME, NAME.key=value[+key=value], PATH.so or PATH.so:key=value[+key=value] (at "
          "most %d of them)",
          (int)length, text, VARIANTS_MAX);
      return 0;
    }
    text += length + (text[length] == ',');
  }
  if (*n == 0) phx__complain("compare needs --strategies, such as ddp,fsdp,zero.stage=2");
  return *n > 0;
}

/* ---- before the first run ---- */
static size_t variant_overrides(const phx__compare_plan *plan, const variant *v,
                                phx__override out[PHX__OVERRIDES_MOST]) {
  size_t n = 0;
  for (; n < plan->n_overrides; n++) out[n] = plan->overrides[n];
  if (plan->checks) out[n++] = (phx__override){"run.checked=yes", "compare"};
  out[n++] = (phx__override){v->choice, "--strategies"};
  for (int i = 0; i < v->n_sets; i++) out[n++] = (phx__override){v->sets[i], "--set"};
  out[n++] = (phx__override){v->out, "--set"};
  return n;
}

/* Would this run be accepted?  Nothing is made. */
static int check_variant(const phx__compare_plan *plan, const variant *v) {
  phx__override all[PHX__OVERRIDES_MOST];
  phx__config *config = NULL;
  phx_error err = PHX_ERROR_INIT;
  char *text = NULL;
  size_t bytes = 0;
  if (plan->n_overrides + (size_t)v->n_sets + 3 > PHX__OVERRIDES_MOST) {
    phx__complain("--strategies: %s makes more than %d flags", v->label, PHX__OVERRIDES_MOST);
    return 0;
  }
  FILE *report = open_memstream(&text, &bytes); /* warnings come from the run itself */
  phx_status status =
      phx__config_load(plan->file, all, variant_overrides(plan, v, all), report ? report : stderr, &config);
  if (report) fclose(report);
  if (status && text) fputs(text, stderr);
  if (!status && (status = phx__train_check(config, &err)))
    phx__complain("%s: %s", v->label, err.message);
  phx__config_free(config);
  free(text);
  return status == PHX_OK;
}

/* ---- one run ---- */
static int run_variant(const phx__compare_plan *plan, variant *v) {
  phx__override all[PHX__OVERRIDES_MOST];
  const char *args[ARGS_MAX];
  const size_t n_overrides = variant_overrides(plan, v, all);
  int n = 0;
  args[n++] = plan->command;
  args[n++] = "train";
  args[n++] = plan->file;
  for (size_t i = 0; i < n_overrides; i++) {
    args[n++] = "--set";
    args[n++] = all[i].text;
  }
  args[n] = NULL;
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) {
    phx__complain("cannot start a run: %s", strerror(errno));
    return PHX__EXIT_RANK;
  }
  if (pid == 0) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent) _exit(127); /* no run outlives the comparison */
    setenv("PHALANX_LOG", "warn", 0);
    if (!isatty(STDOUT_FILENO)) { /* the table is this command's output; the runs' lines go to their directories */
      const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
      if (null >= 0) dup2(null, STDOUT_FILENO);
    }
    execv(plan->command, (char *const *)(uintptr_t)args);
    phx__complain("cannot start %s: %s", plan->command, strerror(errno));
    _exit(127);
  }
  int status;
  while (waitpid(pid, &status, 0) < 0)
    if (errno != EINTR) return PHX__EXIT_RANK;
  return WIFEXITED(status) ? WEXITSTATUS(status) : PHX__EXIT_RANK;
}

static int keep_losses(variant *v, char *text) {
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
    const char *begin = strstr(line, "\"loss\":"), *end = strstr(line, ",\"lr\":");
    if (!begin) continue; /* of a save */
    char **more = phx__sys.realloc(v->losses, (v->n_losses + 1) * sizeof *more);
    if (!more) return 0;
    v->losses = more;
    if (!end || end < begin) return 0;
    char *kept = phx__calloc(1, (size_t)(end - begin) + 1);
    if (!kept) return 0;
    memcpy(kept, begin, (size_t)(end - begin));
    v->losses[v->n_losses++] = kept;
  }
  return v->n_losses > 0;
}

static int read_results(variant *v) {
  char path[4300];
  snprintf(path, sizeof path, "%s/run.json", v->dir);
  char *text = phx__file_text(path);
  v->run = text ? cJSON_Parse(text) : NULL;
  phx__free(text);
  snprintf(path, sizeof path, "%s/metrics.jsonl", v->dir);
  text = phx__file_text(path);
  const int ok = cJSON_GetObjectItemCaseSensitive(v->run, "result") && text && keep_losses(v, text);
  phx__free(text);
  if (!ok) phx__complain("%s: the run left no complete run.json and metrics.jsonl", v->dir);
  return ok;
}

/* ---- numbers out of run.json ---- */
static const cJSON *result_of(const variant *v) { return cJSON_GetObjectItemCaseSensitive(v->run, "result"); }

static double number_of(const variant *v, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(result_of(v), name);
  return cJSON_IsNumber(item) ? item->valuedouble : NAN;
}

static double array_max(const cJSON *array) {
  double most = 0;
  const cJSON *item;
  cJSON_ArrayForEach(item, array) if (item->valuedouble > most) most = item->valuedouble;
  return most;
}

/* Sum over kinds (or collectives) of the largest rank's value. */
static double total_of(const variant *v, const char *group, const char *which) {
  const cJSON *item, *o = cJSON_GetObjectItemCaseSensitive(result_of(v), group);
  const int ranks = (int)cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(v->run, "ranks"));
  double most = 0;
  for (int r = 0; r < ranks; r++) {
    double sum = 0;
    cJSON_ArrayForEach(item, o) sum +=
        cJSON_GetNumberValue(cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(item, which), r));
    if (sum > most) most = sum;
  }
  return most;
}

static const char *hash_of(const variant *v) {
  const char *hash = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(result_of(v), "state_hash"));
  return hash ? hash : "?";
}

/* The first step at which the loss lines differ, 0 when none does. */
static size_t first_difference(const variant *a, const variant *b) {
  const size_t n = a->n_losses < b->n_losses ? a->n_losses : b->n_losses;
  for (size_t i = 0; i < n; i++)
    if (strcmp(a->losses[i], b->losses[i])) return i + 1;
  return a->n_losses == b->n_losses ? 0 : n + 1;
}

/* ---- the table ---- */
/* A path's last part, unless another row has the same; then all of it, and, where one is there twice, its number. */
static void name_row(const variant *v, int n, int i, char *out, size_t bytes) {
  int same_part = 0, same_label = 0, number = 1;
  const char *slash = strrchr(v[i].strategy, '/');
  const char *part = slash ? v[i].label + (slash + 1 - v[i].strategy) : v[i].label;
  for (int k = 0; k < n; k++) {
    const char *other = strrchr(v[k].strategy, '/');
    other = other ? v[k].label + (other + 1 - v[k].strategy) : v[k].label;
    same_part += !strcmp(other, part);
    same_label += !strcmp(v[k].label, v[i].label);
    number += k < i && !strcmp(v[k].label, v[i].label);
  }
  snprintf(out, bytes, "%s", same_part > same_label ? v[i].label : part);
  const size_t used = strlen(out);
  if (same_label > 1) snprintf(out + used, bytes - used, " (%d)", number);
}

static void print_table(const variant *v, int n) {
  printf("\n%-24s %10s %10s %10s %10s %11s %11s %9s %10s  %s\n", "strategy", "weights", "gradients", "optimizer",
         "gathered", "planned", "peak Pss", "tok/s", "sent/step", "loss / state hash");
  for (int i = 0; i < n; i++) {
    static const char *const kinds[] = {"weights", "gradients", "optimizer", "gathered"};
    const cJSON *bytes = cJSON_GetObjectItemCaseSensitive(result_of(&v[i]), "bytes");
    char text[7][24];
    for (int k = 0; k < 4; k++)
      phx__bytes_text((int64_t)array_max(cJSON_GetObjectItemCaseSensitive(
                          cJSON_GetObjectItemCaseSensitive(bytes, kinds[k]), "measured")),
                      text[k]);
    phx__bytes_text((int64_t)total_of(&v[i], "bytes", "planned"), text[4]);
    phx__bytes_text((int64_t)array_max(cJSON_GetObjectItemCaseSensitive(result_of(&v[i]), "peak_pss")), text[5]);
    phx__bytes_text((int64_t)total_of(&v[i], "sent", "measured"), text[6]);
    char name[540];
    name_row(v, n, i, name, sizeof name);
    printf("%-24s %10s %10s %10s %10s %11s %11s %9.0f %10s  %.17g\n%-24s %99s%s\n", name,
           text[0], text[1], text[2], text[3], text[4], text[5], number_of(&v[i], "tokens_per_s"), text[6],
           number_of(&v[i], "loss"), "", "", hash_of(&v[i]));
  }
}

static int print_verdict(const variant *v, int n) {
  int same = 1;
  for (int i = 1; i < n; i++) {
    const size_t step = first_difference(&v[0], &v[i]);
    if (step) printf("%s differs from %s: first at step %zu\n", v[i].label, v[0].label, step);
    else if (strcmp(hash_of(&v[0]), hash_of(&v[i])))
      printf("%s differs from %s in the final state, not in any loss\n", v[i].label, v[0].label);
    else continue;
    same = 0;
  }
  if (same && n > 1)
    printf("\nequal bits: %d strategies gave the same loss and gradient norm at all %zu steps (17 digits) and the same "
           "final state\n",
           n, v[0].n_losses);
  return same;
}

/* Says what was not as planned; true: everything was. */
static int print_plans(const variant *v, int n) {
  int kept = 1;
  for (int i = 0; i < n; i++) {
    const cJSON *plan = cJSON_GetObjectItemCaseSensitive(result_of(&v[i]), "plan"), *line;
    if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(plan, "kept"))) continue;
    kept = 0;
    printf("%s did not keep its plan:\n", v[i].label);
    cJSON_ArrayForEach(line, cJSON_GetObjectItemCaseSensitive(plan, "differences")) printf(
        "  %s\n", cJSON_GetStringValue(line));
  }
  if (kept) printf("plan kept: memory by kind and traffic by collective were as planned, on every rank\n");
  return kept;
}

static phx_status write_json(const variant *v, int n, int same, int kept, const char *base, phx_error *err) {
  char path[4300];
  snprintf(path, sizeof path, "%s/compare.json", base);
  phx__json_begin();
  cJSON *root = cJSON_CreateObject();
  cJSON_AddBoolToObject(root, "equal_bits", same);
  cJSON_AddBoolToObject(root, "plan_kept", kept);
  cJSON_AddNumberToObject(root, "ranks", cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(v[0].run, "ranks")));
  cJSON *list = cJSON_AddArrayToObject(root, "strategies");
  for (int i = 0; i < n; i++) {
    cJSON *o = cJSON_Duplicate(result_of(&v[i]), 1);
    cJSON_AddStringToObject(o, "strategy", v[i].label);
    cJSON_AddStringToObject(o, "run", v[i].dir);
    /* keep the 17 digits: cJSON prints 15 to 17 as needed, the raw text is certain */
    char text[40];
    snprintf(text, sizeof text, "%.17g", number_of(&v[i], "loss"));
    cJSON_DeleteItemFromObjectCaseSensitive(o, "loss");
    cJSON_AddRawToObject(o, "loss", text);
    phx__json_append(list, o);
  }
  const phx_status status = phx__json_write(path, root, err);
  cJSON_Delete(root);
  if (!status) printf("written: %s\n", path);
  return status;
}

/* Each run below the base, numbered: a strategy may be compared with itself under other options. */
static int place_run(variant *v, const char *base, int index) {
  const char *slash = strrchr(v->strategy, '/');
  v->dir = v->out + strlen("run.out=");
  if (snprintf(v->out, sizeof v->out, "run.out=%s/compare/%02d-%s", base, index + 1, slash ? slash + 1 : v->strategy) <
      (int)sizeof v->out)
    return 1;
  phx__complain("run.out = %s is too long for a path", base);
  return 0;
}

static int run_all(const phx__compare_plan *plan, const phx__config *base, variant *v, int n) {
  const char *out = base->s.run.out;
  phx_error err = PHX_ERROR_INIT;
  const char *path = base->s.plugins.path[0] ? base->s.plugins.path : NULL;
  for (int i = 0; i < n; i++)
    if (!take_keys(&v[i], path) || !place_run(&v[i], out, i) || !check_variant(plan, &v[i])) return PHX__EXIT_REFUSED;
  if (phx__run_dir_create(base, &err)) {
    phx__complain("%s", err.message);
    return PHX__EXIT_REFUSED;
  }
  for (int i = 0; i < n; i++) {
    fprintf(stderr, "-- %s (%d of %d)\n", v[i].label, i + 1, n);
    int status = run_variant(plan, &v[i]);
    if (!status && !read_results(&v[i])) status = PHX__EXIT_RANK;
    if (!status) continue;
    phx__complain("compare stopped: %s ended with status %d", v[i].label, status);
    return status;
  }
  print_table(v, n);
  const int same = print_verdict(v, n), kept = print_plans(v, n);
  if (write_json(v, n, same, kept, out, &err)) {
    phx__complain("%s", err.message);
    return PHX__EXIT_RANK;
  }
  return (!same && base->s.run.deterministic) || !kept ? 1 : PHX__EXIT_OK;
}

int phx__compare(const phx__compare_plan *given) {
  enum { AUTO = 2 };
  phx__compare_plan with_checks = *given;
  const phx__compare_plan *plan = &with_checks;
  int n = 0, status = PHX__EXIT_REFUSED;
  phx__config *base = NULL;
  variant *v = phx__calloc(VARIANTS_MAX, sizeof *v);
  if (!v) phx__complain("no memory to compare");
  if (v && parse_variants(v, plan->variants, &n) &&
      phx__config_load(plan->file, plan->overrides, plan->n_overrides, stderr, &base) == PHX_OK) {
    with_checks.checks = base->s.run.checked == AUTO;
    status = run_all(plan, base, v, n);
  }
  phx__run_lock_release();
  phx__config_free(base);
  for (int i = 0; v && i < n; i++) {
    cJSON_Delete(v[i].run);
    for (size_t k = 0; k < v[i].n_losses; k++) phx__free(v[i].losses[k]);
    phx__free(v[i].losses);
  }
  phx__free(v);
  return status;
}
