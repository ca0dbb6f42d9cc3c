/* core/compare.c - see compare.h.
 *
 * Each variant is a `phalanx train` process of its own (a strategy is chosen per process), with its run directory below
 * the base.  What is compared is read back from the files of the runs: run.json and metrics.jsonl. */
#include "compare.h"

#include <cjson/cJSON.h>
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

#include "progress.h"
#include "status.h"
#include "sys.h"

enum { VARIANTS_MAX = 32, ARGS_MAX = 256 };

typedef struct variant {
  char label[512];       /* as the user wrote it */
  char strategy[128];
  char sets[16][192];    /* "fsdp.sharding=grad_op" */
  int n_sets;
  char dir[4200];
  cJSON *run;            /* run.json */
  char **losses;         /* "loss,norm" of each step, as written */
  size_t n_losses;
} variant;

static int parse_variant(variant *v, const char *text, size_t length) {
  if (length == 0 || length >= sizeof v->label) return 0;
  memcpy(v->label, text, length);
  const size_t name = strcspn(v->label, ".");
  const int is_path = strchr(v->label, '/') != NULL;
  snprintf(v->strategy, sizeof v->strategy, "%.*s", is_path ? (int)length : (int)name, v->label);
  if (is_path || !v->label[name]) return 1;
  for (const char *at = v->label + name + 1; at[-1]; ) {
    const size_t part = strcspn(at, "+");
    if (v->n_sets == 16 || !memchr(at, '=', part)) return 0;
    snprintf(v->sets[v->n_sets++], sizeof v->sets[0], "%s.%.*s", v->strategy, (int)part, at);
    at += part + 1;
  }
  return 1;
}

static int parse_variants(variant *v, const char *text, int *n) {
  for (*n = 0; *text; (*n)++) {
    const size_t length = strcspn(text, ",");
    if (*n == VARIANTS_MAX || !parse_variant(&v[*n], text, length)) {
      fprintf(stderr, "phalanx: --strategies: '%.*s' is not NAME or NAME.key=value[+key=value] (at most %d of them)\n",
              (int)length, text, VARIANTS_MAX);
      return 0;
    }
    text += length + (text[length] == ',');
  }
  if (*n == 0) fprintf(stderr, "phalanx: compare needs --strategies, such as ddp,fsdp,zero.stage=2\n");
  return *n > 0;
}

/* ---- one run ---- */
static int run_variant(const char *command, char *const *common, variant *v) {
  char *args[ARGS_MAX];
  char out[4300];
  int n = 0;
  args[n++] = (char *)(uintptr_t)command;
  args[n++] = (char *)(uintptr_t) "train";
  for (char *const *c = common; *c && n < ARGS_MAX - 40; c++) args[n++] = *c;
  args[n++] = (char *)(uintptr_t) "--strategy";
  args[n++] = v->strategy;
  for (int i = 0; i < v->n_sets; i++) {
    args[n++] = (char *)(uintptr_t) "--set";
    args[n++] = v->sets[i];
  }
  snprintf(out, sizeof out, "run.out=%s", v->dir);
  args[n++] = (char *)(uintptr_t) "--set";
  args[n++] = out;
  args[n] = NULL;
  const pid_t pid = fork();
  if (pid < 0) {
    fprintf(stderr, "phalanx: cannot start a run: %s\n", strerror(errno));
    return PHX__EXIT_RANK;
  }
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* the run must not outlive the comparison */
    setenv("PHALANX_LOG", "warn", 0);
    if (!isatty(STDOUT_FILENO)) { /* the table is this command's output; the runs' lines go to their directories */
      const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
      if (null >= 0) dup2(null, STDOUT_FILENO);
    }
    execv(command, args);
    fprintf(stderr, "phalanx: cannot start %s: %s\n", command, strerror(errno));
    _exit(127);
  }
  int status;
  while (waitpid(pid, &status, 0) < 0)
    if (errno != EINTR) return PHX__EXIT_RANK;
  return WIFEXITED(status) ? WEXITSTATUS(status) : PHX__EXIT_RANK;
}

static char *read_text(const char *path) {
  FILE *f = fopen(path, "re");
  char *text = NULL;
  size_t used = 0, room = 0, n;
  if (!f) return NULL;
  do {
    if (used + 65536 > room) {
      char *more = realloc(text, room = used + (1 << 20));
      if (!more) break;
      text = more;
    }
    n = fread(text + used, 1, 65535, f);
    used += n;
  } while (n > 0);
  fclose(f);
  if (text) text[used] = 0;
  return text;
}

static int keep_losses(variant *v, char *text) {
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
    const char *begin = strstr(line, "\"loss\":"), *end = strstr(line, ",\"lr\":");
    char **more = realloc(v->losses, (v->n_losses + 1) * sizeof *more);
    if (!begin || !end || end < begin || !more) return 0;
    v->losses = more;
    v->losses[v->n_losses] = strndup(begin, (size_t)(end - begin));
    if (!v->losses[v->n_losses]) return 0;
    v->n_losses++;
  }
  return v->n_losses > 0;
}

static int read_results(variant *v) {
  char path[4300];
  snprintf(path, sizeof path, "%s/run.json", v->dir);
  char *text = read_text(path);
  v->run = text ? cJSON_Parse(text) : NULL;
  free(text);
  snprintf(path, sizeof path, "%s/metrics.jsonl", v->dir);
  text = read_text(path);
  const int ok = cJSON_GetObjectItemCaseSensitive(v->run, "result") && text && keep_losses(v, text);
  free(text);
  if (!ok) fprintf(stderr, "phalanx: %s: the run left no complete run.json and metrics.jsonl\n", v->dir);
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
    printf("%-24s %10s %10s %10s %10s %11s %11s %9.0f %10s  %.17g\n%-24s %99s%s\n", v[i].label, text[0], text[1],
           text[2], text[3], text[4], text[5], number_of(&v[i], "tokens_per_s"), text[6], number_of(&v[i], "loss"), "",
           "", hash_of(&v[i]));
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
  if (same)
    printf("\nequal bits: %d strategies gave the same loss and gradient norm at all %zu steps (17 digits) and the same "
           "final state\n",
           n, v[0].n_losses);
  return same;
}

static int write_json(const variant *v, int n, int same, const char *base) {
  char path[4300], part[4400];
  snprintf(path, sizeof path, "%s/compare.json", base);
  snprintf(part, sizeof part, "%s.part", path);
  cJSON *root = cJSON_CreateObject();
  cJSON_AddBoolToObject(root, "equal_bits", same);
  cJSON_AddItemToObject(root, "ranks", cJSON_Duplicate(cJSON_GetObjectItemCaseSensitive(v[0].run, "ranks"), 1));
  cJSON *list = cJSON_AddArrayToObject(root, "strategies");
  for (int i = 0; i < n; i++) {
    cJSON *o = cJSON_Duplicate(result_of(&v[i]), 1);
    cJSON_AddStringToObject(o, "strategy", v[i].label);
    cJSON_AddStringToObject(o, "run", v[i].dir);
    /* keep the 17 digits: cJSON prints 15 to 17 as needed, the raw text is certain */
    char text[40];
    snprintf(text, sizeof text, "%.17g", number_of(&v[i], "loss"));
    cJSON_ReplaceItemInObjectCaseSensitive(o, "loss", cJSON_CreateRaw(text));
    cJSON_AddItemToArray(list, o);
  }
  char *text = cJSON_Print(root);
  FILE *f = fopen(part, "we");
  int ok = f && text && fputs(text, f) >= 0 && fputc('\n', f) >= 0 && !fflush(f);
  if (f) fclose(f);
  ok = ok && !phx__sys.rename(part, path);
  if (ok) printf("written: %s\n", path);
  else fprintf(stderr, "phalanx: cannot write %s: %s\n", path, strerror(errno));
  cJSON_free(text);
  cJSON_Delete(root);
  return ok;
}

static void directory_name(variant *v, const char *base, int index) {
  const char *slash = strrchr(v->strategy, '/');
  snprintf(v->dir, sizeof v->dir, "%.4000s/compare/%02d-%s", base, index + 1, slash ? slash + 1 : v->strategy);
}

int phx__compare(const char *command, char *const *common, const char *variants, const char *base, int deterministic) {
  int n = 0, status = PHX__EXIT_OK;
  variant *v = phx__calloc(VARIANTS_MAX, sizeof *v);
  if (!v || !parse_variants(v, variants, &n)) {
    phx__free(v);
    return PHX__EXIT_REFUSED;
  }
  for (int i = 0; i < n && !status; i++) {
    directory_name(&v[i], base, i);
    fprintf(stderr, "-- %s (%d of %d)\n", v[i].label, i + 1, n);
    status = run_variant(command, common, &v[i]);
    if (!status && !read_results(&v[i])) status = PHX__EXIT_RANK;
    if (status) fprintf(stderr, "phalanx: compare stopped: %s ended with status %d\n", v[i].label, status);
  }
  if (!status) {
    print_table(v, n);
    const int same = print_verdict(v, n);
    if (!write_json(v, n, same, base)) status = PHX__EXIT_RANK;
    else if (!same && deterministic) status = 1;
  }
  for (int i = 0; i < n; i++) {
    cJSON_Delete(v[i].run);
    for (size_t k = 0; k < v[i].n_losses; k++) free(v[i].losses[k]);
    free(v[i].losses);
  }
  phx__free(v);
  return status;
}
