/* Every state in which a power cut may leave a run's directory holds the checkpoint before or the new one, whole: never
 * an error, never another state.
 *
 * Two ranks train and save ten times (three under ASan, which looks at how they are loaded) with keep = 1, at once or
 * in the background, into a directory with a dead attempt's leftovers; their system calls are recorded (sys_record.h),
 * the states are rebuilt (power_cut.h says under which assumptions) and loaded by the core.  The load must give: before
 * step k's directory was renamed, k - 1 (or, before the first, that there is none); once the commit has returned on any
 * rank, k; in between, one of the two; with the hash that the run had.  Besides, no directory with a checkpoint's name
 * is damaged even where nobody would load it, `latest` names a checkpoint that is there, and leftovers are removed. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "checkpoint/checkpoint_dir.h"
#include "power_cut.h"
#include "rank_rig.h"
#include "sanitizer.h"
#include "command/report.h"
#include "command/run_dir.h"
#include "base/status.h"
#include "base/sys.h"
#include "training.h"

enum { SAVES = UNDER_ASAN ? 3 : 10, RANKS = 2 };
#define OUT "disk/out"

typedef struct shared { /* by the ranks and the test */
  sys_record *record;
  char hashes[SAVES + 1][33];
} shared;

static char *dir, *home;
static shared *all;

/* ---- recording ---- */
static void leave_a_dead_attempt(void) {
  const char *path = OUT "/checkpoints/.step-00000099.0123456789abcdef.part";
  phx__sys.mkdir(OUT "/checkpoints", 0755);
  phx__sys.mkdir(path, 0755);
  const int fd = phx__sys.open(OUT "/checkpoints/.step-00000099.0123456789abcdef.part/rank-00000.safetensors",
                               O_WRONLY | O_CREAT, 0644);
  phx__sys.write(fd, "half", 4);
  phx__sys.close(fd);
}

/* The step after it is trained before it is waited for. */
static void save_while_training(rank_rig *rig, int k, phx_error *err) {
  phx__save_report report;
  RIG_CHECK(rig, !rank_rig_save_begin(rig, 1, err), "%s", err->message);
  if (k < SAVES) RIG_CHECK(rig, !rank_rig_step(rig, err), "%s", err->message);
  RIG_CHECK(rig, !phx__saver_finish(rig->saver, &report, err), "%s", err->message);
}

static void train_and_save(rank_rig *rig, void *arg) {
  phx_error err = PHX_ERROR_INIT;
  shared *a = arg;
  sys_record_install(a->record, rig->rank);
  if (rig->rank == 0) {
    RIG_CHECK(rig, !phx__run_dir_create(rig->config, &err), "%s", err.message);
    leave_a_dead_attempt();
  }
  rank_rig_most(rig, 0);
  for (int k = 1; k <= SAVES; k++) {
    char hash[33];
    if (rig->step < k) RIG_CHECK(rig, !rank_rig_step(rig, &err), "%s", err.message);
    RIG_CHECK(rig, !rank_rig_hash(rig, hash, &err), "%s", err.message);
    if (rig->rank == 0) memcpy(a->hashes[k], hash, sizeof hash);
    if (!rig->saver) RIG_CHECK(rig, !rank_rig_save(rig, 1, &err), "%s", err.message);
    if (rig->saver) save_while_training(rig, k, &err);
    if (rig->report[0]) return;
    sys_record_mark(a->record, k);
  }
  rank_rig_most(rig, 0);
  sys_record_uninstall();
}

/* ---- loading ---- */
static void fail(power_cut_outcome *out, const char *format, const char *text, const char *more) {
  snprintf(out->why, sizeof out->why, format, text, more);
}

/* Also what no load would choose must be whole. */
static void load_each(rank_rig *rig, const phx__checkpoint_list *list, power_cut_outcome *out) {
  char path[PHX__CHECKPOINT_PATH], hash[33] = "";
  phx_error err = PHX_ERROR_INIT;
  phx__resumed resumed;
  for (size_t i = list->n; i-- > 0 && !out->why[0];) { /* the newest is loaded last, by resume */
    if (i == 0 ? phx__checkpoint_resume(rig->rt, OUT, &resumed, &err)
               : phx__checkpoint_path(OUT, list->steps[i], path, &err) ||
                     phx__checkpoint_load(rig->rt, path, &resumed, &err))
      return fail(out, "a checkpoint is not whole: %.500s%s", err.message, "");
    if (rank_rig_hash(rig, hash, &err)) return fail(out, "no hash: %.500s%s", err.message, "");
    if (resumed.at.step != list->steps[i]) return fail(out, "%.400s was passed over%s", resumed.path, "");
    if (resumed.at.step < 1 || resumed.at.step > SAVES || strcmp(hash, all->hashes[resumed.at.step]) != 0)
      return fail(out, "%.400s has the hash %s", resumed.path, hash);
  }
  out->value = list->n ? list->steps[0] : 0;
}

static void check_directory(const phx__checkpoint_list *list, power_cut_outcome *out) {
  char *latest = command_read_file(OUT "/checkpoints", "latest");
  long step = 0;
  bool there = !latest;
  phx_error err = PHX_ERROR_INIT;
  if (latest && (sscanf(latest, "step-%8ld\n", &step) != 1 || strlen(latest) != 14))
    fail(out, "latest is '%.40s'%s", latest, "");
  for (size_t i = 0; i < list->n; i++) there = there || list->steps[i] == step;
  if (!there) fail(out, "latest is %.40s, which is not there%s", latest, "");
  free(latest);
  if (phx__checkpoint_sweep(OUT, NULL, &err)) fail(out, "leftovers stay: %.400s%s", err.message, "");
  DIR *d = opendir(OUT "/checkpoints");
  for (struct dirent *e; d && (e = readdir(d));)
    if (strstr(e->d_name, ".part")) fail(out, "%.200s is left%s", e->d_name, "");
  if (d) closedir(d);
}

static void load(void *arg, power_cut_outcome *out) {
  phx__checkpoint_list list = {0};
  phx_error err = PHX_ERROR_INIT;
  if (phx__checkpoint_list_read(OUT, &list, &err)) return fail(out, "%.500s%s", err.message, "");
  load_each(arg, &list, out);
  if (!out->why[0]) check_directory(&list, out);
  phx__checkpoint_list_free(&list);
}

static bool judge(void *arg, int32_t n, int64_t value, char why[600]) {
  int64_t committed = 0, renamed = 0;
  long step;
  (void)arg;
  for (int32_t i = 0; i < n; i++) {
    const sys_record_entry *e = &all->record->entries[i];
    if (e->kind == SYS_RECORD_MARK && e->at > committed) committed = e->at;
    if (e->kind == SYS_RECORD_RENAME && sscanf(e->to, "step-%8ld", &step) == 1 && step > renamed) renamed = step;
  }
  if (value == committed || (value == renamed && renamed > committed)) return true;
  snprintf(why, 600, "step %lld is loaded; %lld was committed, and %lld renamed", (long long)value,
           (long long)committed, (long long)renamed);
  return false;
}

/* ---- the tests ---- */
static void record_saves(bool background) {
  char path[600], why[600];
  rank_rig_run run = {.size = RANKS, .out = OUT, .background = background, .limit_s = 60, .body = train_and_save};
  home = getcwd(NULL, 0);
  dir = rank_rig_dir();
  training_files(dir, rank_rig_model);
  snprintf(path, sizeof path, "%s/disk", dir);
  cr_assert_eq(mkdir(path, 0755), 0);
  all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  cr_assert_neq(all, MAP_FAILED);
  all->record = sys_record_create(path);
  run.dir = dir;
  run.arg = all;
  cr_assert(rank_rig_ranks(&run), "%s", run.message);
  cr_assert(power_cut_compare(all->record, path, why), "%s", why);
}

static void tear_down(void) {
  cr_assert_eq(chdir(home), 0);
  free(home);
  sys_record_destroy(all->record);
  munmap(all, sizeof *all);
  command_remove_dir(dir);
}
TestSuite(power_cut, .fini = tear_down, .timeout = 300);

/* One rank loads what two have saved. */
static void search(power_cut *cut, bool background, const char *what) {
  static char why[] = "errors";
  rank_rig rig = {.size = 1};
  phx_error err = PHX_ERROR_INIT;
  struct timespec begin, end;
  record_saves(background);
  cr_assert(!chdir(dir) && freopen(why, "we", stderr)); /* what the loads say would be long */
  cr_assert_eq(rank_rig_open(&rig, NULL, "out", &err), PHX_OK, "%s", err.message);
  cut->record = all->record;
  cut->scratch = "disk";
  cut->load = load;
  cut->judge = judge;
  cut->arg = &rig;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  power_cut_run(cut);
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%s: %d calls, %ld states in %ld places, %ld violations, %.1f s\n", what, all->record->n_entries, cut->states,
         cut->occurrences, cut->violations,
         (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec));
  rank_rig_close(&rig);
}

Test(power_cut, every_state_is_the_checkpoint_before_or_the_new_one) {
  power_cut cut = {.most_violations = 100};
  search(&cut, false, "as it is");
  cr_assert_eq(cut.violations, 0, "%ld violations; the first: %s", cut.violations, cut.message);
  cr_assert_geq(cut.states, 100 * SAVES);
}

Test(power_cut, every_state_of_saves_in_the_background) {
  power_cut cut = {.most_violations = 100};
  search(&cut, true, "in the background");
  cr_assert_eq(cut.violations, 0, "%ld violations; the first: %s", cut.violations, cut.message);
  cr_assert_geq(cut.occurrences, 1000 * SAVES);
  cr_assert_geq(cut.states, 100 * SAVES); /* how many are equal depends on how the calls of ranks and threads fell */
}

/* What the replay is worth: without flushes it finds what goes wrong. */
Test(power_cut, control_without_any_flush) {
  power_cut cut = {.without_file_syncs = true, .without_dir_syncs = true, .most_violations = 3};
  search(&cut, false, "without any flush");
  cr_assert_gt(cut.violations, 0);
}
Test(power_cut, control_without_flushes_of_files) {
  power_cut cut = {.without_file_syncs = true, .most_violations = 3};
  search(&cut, false, "without flushes of files");
  cr_assert_gt(cut.violations, 0);
}
Test(power_cut, control_without_flushes_of_directories) {
  power_cut cut = {.without_dir_syncs = true, .most_violations = 3};
  search(&cut, false, "without flushes of directories");
  cr_assert_gt(cut.violations, 0);
}
