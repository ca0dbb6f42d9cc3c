/* tests/integration/test_saver.c - checkpoints in the background, over a disk that is slow or fails.
 *
 * The ranks are processes of the test itself, so that phx__sys can be replaced: they meet as those of torchrun do.
 * Every run hashes its state at every step, so what a checkpoint holds can be compared with the step it is of, though
 * updates went on while it was written. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "plugin/config_load.h"
#include "engine/engine.h"
#include "checkpoint/manifest.h"
#include "command/report.h"
#include "command/run_dir.h"
#include "engine/state.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/train.h"
#include "command/train_check.h"
#include "sanitizer.h"
#include "training.h"

enum { STEPS = 12, RANKS_MOST = 3 };

/* ---- the disk ---- */
typedef struct disk {
  int slow_us;     /* every piece of state that is saved in a thread of its own takes this long */
  int flush_us;    /* and every flush */
  int fails_at;    /* the n-th call of `call` in a thread of its own fails with `cause`; 0: none */
  int rank, cause; /* rank: the one whose call fails */
  const char *call;
  int stop_at; /* the n-th piece sends SIGTERM to the process; 0: none */
  int stop_in; /* the evaluation after this step sends it; 0: none */
  int stop_step; /* this step itself does */
  int die_in;    /* the evaluation after this step is killed */
  int watched; /* evaluations and hashes say whether their step was saved by then */
} disk;
static disk plan;
static phx__sys_table real;
static int my_rank, calls, writes, parts_most, runs;

static int in_thread(void) {
  return syscall(SYS_gettid) != getpid();
}

static void wait_us(int us) {
  struct timespec t = {us / 1000000, us % 1000000 * 1000L};
  nanosleep(&t, NULL);
}

static int of_checkpoint(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  path[n > 0 ? n : 0] = 0;
  return strstr(path, "checkpoints") != NULL;
}

static int fails(const char *call) {
  if (!plan.call || strcmp(plan.call, call) || plan.rank != my_rank || !in_thread()) return 0;
  if (++calls != plan.fails_at) return 0;
  errno = plan.cause;
  return 1;
}

/* The linker puts this in front (tests/CMakeLists.txt): small files reach the disk as a whole, so a slow pwrite would
 * not keep the state from being read at once. */
phx_status __real_phx__save_write(phx__save *, size_t, int64_t, int64_t, const void *, phx_error *);
phx_status __wrap_phx__save_write(phx__save *, size_t, int64_t, int64_t, const void *, phx_error *);
phx_status __wrap_phx__save_write(phx__save *save, size_t i, int64_t first, int64_t blocks, const void *data,
                                  phx_error *err) {
  if (in_thread()) {
    if (++writes == plan.stop_at) kill(getpid(), SIGTERM);
    wait_us(plan.slow_us);
  }
  return __real_phx__save_write(save, i, first, blocks, data, err);
}

/* So do evaluations and hashes, which a save of the same step must not wait for. */
static void say_saved(const char *what, int64_t step) {
  char path[64];
  if (!plan.watched || my_rank) return;
  snprintf(path, sizeof path, "out/checkpoints/step-%08d", (int)step);
  fprintf(stderr, "%s of step %d: %s\n", what, (int)step, access(path, F_OK) ? "not saved" : "saved");
}
phx_status __real_phx__engine_validate(phx__engine *, phx__data *, int64_t, double *, phx_error *);
phx_status __wrap_phx__engine_validate(phx__engine *, phx__data *, int64_t, double *, phx_error *);
phx_status __wrap_phx__engine_validate(phx__engine *e, phx__data *data, int64_t n, double *loss, phx_error *err) {
  say_saved("evaluation", e->step);
  if (e->step == plan.stop_in && my_rank == 1) kill(getpid(), SIGTERM);
  if (e->step == plan.die_in) kill(getpid(), SIGKILL);
  return __real_phx__engine_validate(e, data, n, loss, err);
}
phx_status __real_phx__engine_step(phx__engine *, phx__data *, int64_t, phx__step_result *, phx_error *);
phx_status __wrap_phx__engine_step(phx__engine *, phx__data *, int64_t, phx__step_result *, phx_error *);
phx_status __wrap_phx__engine_step(phx__engine *e, phx__data *data, int64_t step, phx__step_result *out,
                                   phx_error *err) {
  if (step == plan.stop_step && my_rank == 1) kill(getpid(), SIGTERM);
  return __real_phx__engine_step(e, data, step, out, err);
}
static int64_t hashed;
phx_status __real_phx__runtime_state_hash(phx__runtime *, phx__state_hash *, phx_error *);
phx_status __wrap_phx__runtime_state_hash(phx__runtime *, phx__state_hash *, phx_error *);
phx_status __wrap_phx__runtime_state_hash(phx__runtime *rt, phx__state_hash *out, phx_error *err) {
  say_saved("hash", ++hashed); /* one at every step */
  return __real_phx__runtime_state_hash(rt, out, err);
}

static ssize_t failing_pwrite(int fd, const void *p, size_t n, off_t at) {
  return of_checkpoint(fd) && fails("pwrite") ? -1 : real.pwrite(fd, p, n, at);
}
static int slow_fsync(int fd) {
  if (in_thread()) wait_us(plan.flush_us);
  return fails("fsync") ? -1 : real.fsync(fd);
}
static int slow_rename(const char *from, const char *to) {
  return fails("rename") ? -1 : real.rename(from, to);
}

static int entries(const char *path, const char *part) {
  int n = 0;
  DIR *d = opendir(path);
  for (struct dirent *e; d && (e = readdir(d));) n += strstr(e->d_name, part) != NULL;
  if (d) closedir(d);
  return n;
}
static int count(const char *dir, const char *part) {
  char path[512];
  snprintf(path, sizeof path, "%s/out/checkpoints", dir);
  return entries(path, part);
}
/* A part directory is made while another is there: two saves are in flight. */
static int seen_mkdir(const char *path, mode_t mode) {
  const int made = real.mkdir(path, mode);
  if (strstr(path, ".part") && entries("out/checkpoints", ".part") > parts_most)
    parts_most = entries("out/checkpoints", ".part");
  return made;
}

/* ---- a run of n ranks ---- */
typedef struct outcome {
  int status; /* of rank 0 */
  char *said; /* by all */
} outcome;

static int run(const char *resume, int ranks, char *const *sets) {
  phx__override overrides[16] = {{"plugins.path=" PHX_TEST_PLUGINS ":" PHX_TEST_ONLY_PLUGINS, "--set"}};
  char number[32];
  size_t n = 1;
  phx__config *config = NULL;
  phx_error err = PHX_ERROR_INIT;
  snprintf(number, sizeof number, "run.ranks=%d", ranks);
  overrides[n++] = (phx__override){number, "-n"};
  for (; *sets; sets++) overrides[n++] = (phx__override){*sets, "--set"};
  if (phx__config_load("run.ini", overrides, n, stderr, &config)) return PHX__EXIT_REFUSED;
  int status = PHX__EXIT_REFUSED;
  if (phx__train_check(config, &err) || (ranks == 1 && !resume && phx__run_dir_create(config, &err)))
    fprintf(stderr, "%s\n", err.message);
  else
    status = phx__train_rank(config, resume);
  phx__config_free(config);
  return status;
}

static void be_rank(int rank, int ranks, const char *dir, const char *resume, char *const *sets) {
  char text[32];
  const int fd = chdir(dir) ? -1 : open("said", O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (fd < 0 || dup2(fd, 2) < 0 || !freopen("/dev/null", "we", stdout)) _exit(100);
  alarm(60); /* a hang is a failure of this test only */
  if (ranks > 1) {
    snprintf(text, sizeof text, "%d", rank);
    setenv("RANK", text, 1);
    setenv("LOCAL_RANK", text, 1);
    snprintf(text, sizeof text, "%d", ranks);
    setenv("WORLD_SIZE", text, 1);
    setenv("LOCAL_WORLD_SIZE", text, 1);
    snprintf(text, sizeof text, "%d", 1024 + ((int)getppid() * 64 + runs) % 64000); /* only a name: no port is opened */
    setenv("MASTER_PORT", text, 1);
  }
  my_rank = rank;
  real = phx__sys;
  phx__sys.pwrite = failing_pwrite, phx__sys.fsync = slow_fsync, phx__sys.rename = slow_rename,
  phx__sys.mkdir = seen_mkdir;
  const int status = run(resume, ranks, sets);
  if (parts_most > 1) fprintf(stderr, "%d saves at once\n", parts_most);
  fflush(NULL);
  _exit(status);
}

/* sets: words "section.key=value", separated by spaces. */
static outcome train(const char *dir, int ranks, const char *resume, const char *words) {
  char line[512], *sets[16] = {NULL}, path[300];
  int n = 0, status = 0;
  pid_t pids[RANKS_MOST];
  outcome o = {.status = -1};
  snprintf(line, sizeof line, "%s", words);
  for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) sets[n++] = word;
  snprintf(path, sizeof path, "%s/said", dir);
  unlink(path);
  fflush(NULL);
  runs++;
  for (int r = 0; r < ranks; r++) {
    pids[r] = fork();
    if (pids[r] == 0) be_rank(r, ranks, dir, resume, sets);
    cr_assert_gt(pids[r], 0);
  }
  for (int r = 0; r < ranks; r++) {
    cr_assert_eq(waitpid(pids[r], &status, 0), pids[r]);
    if (r == 0) o.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  o.said = command_read_file(dir, "said");
  return o;
}

static void clean(const char *dir) {
  char line[300];
  snprintf(line, sizeof line, "rm -rf %s/out %s/out.* %s/again", dir, dir, dir);
  cr_assert_eq(system(line), 0);
}

/* ---- what there is afterwards ---- */
typedef struct metrics {
  char hashes[STEPS + 1][33];
  int first; /* the step before them */
  int background, lines, saves;
  double stall, copies, waits; /* ms */
} metrics;

static metrics read_metrics_after(int first, const char *dir, const char *name) {
  metrics m = {.first = first};
  char *text = command_read_file(dir, name);
  cr_assert_not_null(text, "%s", name);
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
    cJSON *json = cJSON_Parse(line);
    const cJSON *hash = training_get(json, "state_hash"), *save = training_get(json, "checkpoint");
    const cJSON *own = training_get(json, "step"), *at = own ? own : training_get(json, "after_step");
    cr_assert(at && (own || hash || save), "neither of a step nor of a save: %s", line);
    const int step = (int)at->valuedouble;
    cr_assert(step >= 1 && step <= STEPS);
    if (hash) snprintf(m.hashes[step], 33, "%s", hash->valuestring);
    if (own) cr_assert_eq(step, ++m.lines + m.first, "%s: not the next step", line);
    if (save) {
      m.saves++;
      m.background += cJSON_IsTrue(training_get(save, "background"));
      m.stall += training_get(save, "stall_ms")->valuedouble;
      m.copies += training_get(save, "copies_ms")->valuedouble;
      m.waits += training_get(save, "waits_ms")->valuedouble;
    }
    cJSON_Delete(json);
  }
  free(text);
  return m;
}

static metrics read_metrics(const char *dir, const char *name) { return read_metrics_after(0, dir, name); }

/* Each checkpoint there is holds the state of its step, from end to end; returns how many. */
static int check_saved(const char *dir, const metrics *m, const char *what) {
  int n = 0;
  for (int step = 1; step <= STEPS; step++) {
    char path[512];
    phx_error err = PHX_ERROR_INIT;
    phx__manifest *manifest = NULL;
    snprintf(path, sizeof path, "%s/out/checkpoints/step-%08d", dir, step);
    if (access(path, F_OK)) continue;
    cr_assert_eq(phx__manifest_read(path, &manifest, &err), PHX_OK, "%s: %s", what, err.message);
    cr_assert_str_eq(manifest->state_hash, m->hashes[step], "%s: step %d", what, step);
    phx__manifest_free(manifest);
    command_result r = RUN(NULL, 20, "checkpoint", "verify", path);
    cr_assert_eq(r.status, 0, "%s: %s", what, r.out);
    command_free(&r);
    n++;
  }
  return n;
}

static cJSON *check_result(const char *dir, const char *what) {
  cJSON *json = training_json(dir, "out/run.json");
  cr_assert_not_null(training_get(json, "result"), "%s", what);
  if (!UNDER_TSAN) training_check_plan(training_get(json, "result"), what); /* its Criterion is another one */
  return json;
}

static const char ini[] =
    "[checkpoint]\nevery = 3\nkeep = 0\n[batch]\nmicro = 1\nsequence = 9\n"
    "[model]\nplugin = gpt\nlayers = 4\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

static char *begin(void) {
  char *dir = command_temp_dir();
  training_files(dir, ini);
  char *text = command_read_file(dir, "run.ini"), *steps = strstr(text, "steps = 20");
  memcpy(steps, "steps = 12", 10);
  steps = strstr(text, "timeout = 30");
  memcpy(steps, "hash_every=1", 12);
  command_write_file(dir, "run.ini", text, strlen(text));
  free(text);
  plan = (disk){0};
  return dir;
}

/* ---- the bits ---- */
Test(saver, saves_the_step_it_began_with, .timeout = 300) {
  static const char *const strategies[] = {"run.strategy=ddp", "run.strategy=fsdp", "run.strategy=zero zero.stage=2",
                                           "run.strategy=fsdp fsdp.sharding=none"};
  static const char *const copies[] = {"auto", "20KiB", "0"};
  char *dir = begin(), first[33] = "";
  double copied = 0, waited = 0;
  plan.slow_us = 1500;
  /* TSan looks for races between the step and the save of one process: two numbers of ranks have them all */
  const int ranks_most = UNDER_TSAN ? 2 : RANKS_MOST;
  for (int s = 0; s < 4; s++)
    for (int ranks = 1; ranks <= ranks_most; ranks++)
      for (int c = 0; c < 3; c++) {
        char words[256], what[300];
        if (s == 3 && (c != 0 || ranks != 2)) continue;
        snprintf(words, sizeof words, "%s checkpoint.copy=%s batch.micro=%d", strategies[s], copies[c], 6 / ranks);
        snprintf(what, sizeof what, "%s on %d ranks", words, ranks);
        outcome o = train(dir, ranks, NULL, words);
        cr_assert_eq(o.status, 0, "%s: status %d\n%s", what, o.status, o.said);
        cr_assert_null(strstr(o.said, "saves at once"), "%s: %s", what, o.said);
        cr_assert_null(strstr(o.said, "not saved"), "%s: %s", what, o.said);
        const metrics m = read_metrics(dir, "out/metrics.jsonl");
        cJSON *json = check_result(dir, what);
        cr_assert_eq(check_saved(dir, &m, what), 4);
        cr_assert_eq(training_get(json, "result.checkpoints.saves")->valuedouble, 4);
        cr_assert_gt(training_get(json, "result.checkpoints.stall_ms")->valuedouble, 0);
        cr_assert_eq(m.saves, 4, "%s: a save is missing from metrics.jsonl", what);
        cr_assert_geq(m.background, 2, "%s: %d\n%s", what, m.background, o.said);
        copied += c < 2 ? m.copies : 0;
        waited += c == 2 ? m.waits : 0;
        if (c == 2) cr_assert_eq(m.copies, 0, "%s", what);
        if (s == 0 && c == 0 && ranks == 1) memcpy(first, m.hashes[3], 33);
        if (s == 0 && ranks == 1) cr_assert_str_eq(first, m.hashes[3]);
        cJSON_Delete(json);
        free(o.said);
        clean(dir);
      }
  cr_assert_gt(copied, 0, "nothing was copied: the disk is not slow");
  cr_assert_gt(waited, 0, "no update waited: the disk is not slow");
  command_remove_dir(dir);
}

Test(saver, resumed_is_uninterrupted, .timeout = 60) {
  char *dir = begin();
  plan.slow_us = 1500;
  for (int ranks = 1; ranks <= 2; ranks++) {
    outcome o = train(dir, ranks, NULL, "run.strategy=zero checkpoint.copy=40KiB");
    cr_assert_eq(o.status, 0, "%s", o.said);
    free(o.said);
    const metrics whole = read_metrics(dir, "out/metrics.jsonl");
    for (int step = 3; step < STEPS; step += 3) {
      char from[64], again[600];
      snprintf(from, sizeof from, "out/checkpoints/step-%08d", step);
      snprintf(again, sizeof again, "rm -rf %s/again; mkdir %s/again", dir, dir);
      cr_assert_eq(system(again), 0);
      o = train(dir, ranks, from, "run.out=again run.strategy=fsdp");
      cr_assert_eq(o.status, 0, "%s", o.said);
      const metrics rest = read_metrics_after(step, dir, "again/metrics.jsonl");
      cr_assert_eq(rest.lines, STEPS - step);
      for (int k = step + 1; k <= STEPS; k++) cr_assert_str_eq(rest.hashes[k], whole.hashes[k], "step %d", k);
      free(o.said);
    }
    clean(dir);
  }
  command_remove_dir(dir);
}

/* ---- one at a time; the end ---- */
Test(saver, the_next_save_and_the_end_wait, .timeout = 60) {
  char *dir = begin();
  plan.flush_us = 60000;
  outcome o = train(dir, 2, NULL, "checkpoint.every=1");
  cr_assert_eq(o.status, 0, "%s", o.said);
  cr_assert(strstr(o.said, "step 2 waits: step 1 is still being saved"), "%s", o.said);
  cr_assert_null(strstr(o.said, "saves at once"), "%s", o.said);
  const metrics m = read_metrics(dir, "out/metrics.jsonl");
  cr_assert_eq(check_saved(dir, &m, "every step"), STEPS);
  cr_assert_gt(m.waits, 9 * 60.0);
  cJSON_Delete(check_result(dir, "every step"));
  free(o.said);
  clean(dir);
  o = train(dir, 2, NULL, "checkpoint.every=11"); /* still in flight when the last step is done */
  cr_assert_eq(o.status, 0, "%s", o.said);
  cr_assert_eq(count(dir, "step-"), 2);
  cr_assert_eq(count(dir, ".part"), 0);
  free(o.said);
  clean(dir);
  o = train(dir, 2, NULL, "checkpoint.every=12"); /* no save beside a step: no memory, no thread */
  cr_assert_eq(o.status, 0, "%s", o.said);
  cr_assert_null(strstr(o.said, "background"), "%s", o.said);
  cJSON_Delete(check_result(dir, "the last step only"));
  free(o.said);
  clean(dir);
  command_remove_dir(dir);
}

Test(saver, a_signal_waits_for_the_save_in_flight, .timeout = 60) {
  char *dir = begin();
  plan = (disk){.slow_us = 3000, .stop_at = 5};
  outcome o = train(dir, 2, NULL, "checkpoint.every=2");
  cr_assert_eq(o.status, PHX__EXIT_STOPPED, "%s", o.said);
  cr_assert(strstr(o.said, "stopped by SIGTERM"), "%s", o.said);
  const metrics m = read_metrics(dir, "out/metrics.jsonl");
  cr_assert_lt(m.lines, STEPS);
  cr_assert_eq(check_saved(dir, &m, "stopped"), (m.lines + 1) / 2, "%s", o.said);
  cr_assert_eq(count(dir, ".part"), 0);
  free(o.said);
  clean(dir);
  command_remove_dir(dir);
}

/* An evaluation and a hash of a large state may take minutes, and who sends SIGTERM does not wait for them. */
Test(saver, a_save_comes_before_evaluation_and_hash, .timeout = 60) {
  char *dir = begin(), text[64];
  plan = (disk){.watched = 1};
  outcome o = train(dir, 2, NULL, "checkpoint.every=4 data.valid=valid.bin run.valid_every=2 checkpoint.background=no");
  cr_assert_eq(o.status, 0, "%s", o.said);
  for (int step = 1; step <= STEPS; step++) {
    snprintf(text, sizeof text, "hash of step %d: %s\n", step, step % 4 ? "not saved" : "saved");
    cr_expect(strstr(o.said, text), "no '%s' in %s", text, o.said);
    snprintf(text, sizeof text, "evaluation of step %d: %s\n", step, step % 4 ? "not saved" : "saved");
    cr_expect_eq(strstr(o.said, text) != NULL, step % 2 == 0, "'%s' in %s", text, o.said);
  }
  free(o.said);
  clean(dir);
  command_remove_dir(dir);
}

/* What is saved has its line, though the run dies before it knows all that the line may hold. */
Test(saver, a_saved_step_keeps_its_line, .timeout = 60) {
  char *dir = begin();
  const char *words = "checkpoint.every=4 data.valid=valid.bin run.valid_every=2 checkpoint.background=no";
  plan = (disk){.die_in = 4};
  outcome o = train(dir, 1, NULL, words);
  cr_assert_eq(o.status, 128 + SIGKILL, "%s", o.said);
  cr_assert_eq(count(dir, "step-00000004"), 1, "%s", o.said);
  metrics m = read_metrics(dir, "out/metrics.jsonl");
  cr_assert_eq(m.lines, 4, "step 4 is saved, and there are %d lines", m.lines);
  free(o.said);
  plan = (disk){0};
  o = train(dir, 1, "", words);
  cr_assert_eq(o.status, 0, "%s", o.said);
  m = read_metrics(dir, "out/metrics.jsonl");
  cr_assert_eq(m.lines, STEPS);
  free(o.said);
  clean(dir);
  command_remove_dir(dir);
}

/* Who hears of it during an evaluation ends it and stops at that step; who heard of it before does not begin one. */
Test(saver, a_stop_waits_for_no_evaluation, .timeout = 60) {
  char *dir = begin();
  plan = (disk){.watched = 1, .stop_in = 5};
  outcome o = train(dir, 2, NULL, "data.valid=valid.bin checkpoint.every=100 run.valid_every=5");
  cr_assert_eq(o.status, PHX__EXIT_STOPPED, "%s", o.said);
  metrics m = read_metrics(dir, "out/metrics.jsonl");
  cr_expect_eq(m.lines, 5, "stopped after step %d, not 5", m.lines);
  cr_assert_eq(check_saved(dir, &m, "stopped"), 1, "%s", o.said);
  char *text = command_read_file(dir, "out/metrics.jsonl");
  cr_expect(strstr(text, "{\"step\":5,") && !strstr(text, "valid_loss"), "the evaluation went on: %s", text);
  free(text);
  free(o.said);
  clean(dir);
  plan = (disk){.watched = 1, .stop_step = 5};
  o = train(dir, 2, NULL, "data.valid=valid.bin checkpoint.every=2 run.valid_every=1");
  cr_assert_eq(o.status, PHX__EXIT_STOPPED, "%s", o.said);
  m = read_metrics(dir, "out/metrics.jsonl");
  cr_expect_eq(m.lines, 5, "stopped after step %d, not 5", m.lines);
  cr_expect(strstr(o.said, "evaluation of step 4:") && !strstr(o.said, "evaluation of step 5:"), "%s", o.said);
  cr_expect(strstr(o.said, "hash of step 5: saved"), "%s", o.said);
  free(o.said);
  clean(dir);
  command_remove_dir(dir);
}

/* ---- failures ---- */
Test(saver, a_failed_save_is_a_warning, .timeout = 120) {
  static const disk failures[] = {
      {.slow_us = 500, .call = "pwrite", .fails_at = 1, .rank = 1, .cause = ENOSPC},
      {.slow_us = 500, .call = "pwrite", .fails_at = 1, .rank = 0, .cause = EIO},
      {.flush_us = 2000, .call = "fsync", .fails_at = 1, .rank = 1, .cause = EIO},    /* of the file */
      {.flush_us = 2000, .call = "fsync", .fails_at = 2, .rank = 0, .cause = ENOSPC}, /* of the manifest */
      {.call = "rename", .fails_at = 1, .rank = 0, .cause = EIO},
  };
  char *dir = begin();
  for (size_t i = 0; i < sizeof failures / sizeof *failures; i++) {
    plan = failures[i];
    outcome o = train(dir, 2, NULL, i % 2 ? "checkpoint.copy=16KiB run.strategy=zero" : "run.strategy=fsdp");
    cr_assert_eq(o.status, 0, "%zu: %s", i, o.said);
    const char *warning = strstr(o.said, "step 3 was not saved: ");
    cr_assert(warning && strstr(warning, strerror(failures[i].cause)) && strstr(warning, "training goes on"), "%zu: %s",
              i, o.said);
    const metrics m = read_metrics(dir, "out/metrics.jsonl");
    cr_assert_eq(m.lines, STEPS);
    cr_assert_eq(check_saved(dir, &m, "after a failure"), 3, "%zu: %s", i, o.said);
    cr_assert_eq(count(dir, ".part"), 0, "%zu: %s", i, o.said);
    cJSON *json = check_result(dir, "after a failure");
    cr_assert_eq(training_get(json, "result.checkpoints.failed")->valuedouble, 1);
    cJSON_Delete(json);
    free(o.said);
    clean(dir);
  }
  command_remove_dir(dir);
}

Test(saver, a_strategy_without_live_state_waits, .timeout = 60) {
  char *dir = begin();
  outcome o = train(dir, 2, NULL, "run.strategy=fileopt");
  cr_assert_eq(o.status, 0, "%s", o.said);
  const char *once = strstr(o.said, "training waits for every save");
  cr_assert(once && !strstr(once + 1, "training waits"), "%s", o.said);
  const metrics m = read_metrics(dir, "out/metrics.jsonl");
  cr_assert_eq(m.background, 0);
  cr_assert_eq(check_saved(dir, &m, "fileopt"), 4);
  free(o.said);
  clean(dir);
  o = train(dir, 2, NULL, "checkpoint.background=no");
  cr_assert_eq(o.status, 0, "%s", o.said);
  cr_assert_null(strstr(o.said, "background"), "%s", o.said);
  free(o.said);
  clean(dir);
  command_remove_dir(dir);
}

/* The step before the one that is not finite is whole on all ranks: it is saved before the run fails. */
Test(saver, saved_before_it_stops, .timeout = 60) {
  static const char *const strategies[] = {"ddp", "fsdp", "zero"};
  char *dir = begin(), words[200];
  plan.slow_us = 500;
  for (int s = 0; s < 3; s++) {
    snprintf(words, sizeof words,
             "run.strategy=%s checkpoint.every=100 optimizer.lr=1000 optimizer.clip=0 "
             "optimizer.warmup=0 optimizer.name=sgd optimizer.weight_decay=1000 optimizer.schedule=constant",
             strategies[s]);
    outcome o = train(dir, 2, NULL, words);
    cr_assert_eq(o.status, PHX__EXIT_RANK, "%s", o.said);
    cr_assert(strstr(o.said, "before the one that was not finite, is saved"), "%s", o.said);
    const metrics m = read_metrics(dir, "out/metrics.jsonl");
    cr_assert_eq(check_saved(dir, &m, strategies[s]), 1, "%s", o.said);
    char name[64];
    snprintf(name, sizeof name, "out/checkpoints/step-%08d", m.lines);
    snprintf(words, sizeof words, "%s/%s", dir, name);
    cr_assert_eq(access(words, F_OK), 0, "%s is not there: %s", name, o.said);
    free(o.said);
    clean(dir);
  }
  command_remove_dir(dir);
}
