/* Checkpoints of whole runs through the command: k steps, save, resume and k more are 2k steps bit for bit, under every
 * strategy and across; any strategy and world size loads any other's; retention, leftovers, damage, refusals.  Signals
 * are in test_stops.c. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <phalanx/host.h>

#include "rank_rig.h"
#include "base/status.h"
#include "training.h"

static const char tiny_model[] =
    "[batch]\nmicro = 1\nsequence = 9\n"
    "[model]\nplugin = gpt\nlayers = 2\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

typedef struct outcome {
  int status;
  char *out;
} outcome;

/* `phalanx` and the words of a command line. */
static outcome phalanx(const char *dir, const char *format, ...) {
  char line[2048];
  const char *argv[64] = {"phalanx"};
  int n = 1;
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[n++] = word;
  argv[n] = NULL;
  command_result r = command_run(dir, 120, argv);
  return (outcome){r.status, r.out};
}

static void expect(outcome r, int status, const char *text) {
  cr_assert_eq(r.status, status, "status %d instead of %d:\n%s", r.status, status, r.out);
  cr_assert(!text || strstr(r.out, text), "no '%s' in:\n%s", text, r.out);
  free(r.out);
}
#define TRAIN(dir, ...) expect(phalanx(dir, "train run.ini " __VA_ARGS__), 0, NULL)

static void hash_of(const char *dir, const char *out, char hash[40]) {
  char name[256];
  snprintf(name, sizeof name, "%s/run.json", out);
  cJSON *json = training_json(dir, name);
  const cJSON *value = training_get(json, "result.state_hash");
  cr_assert_not_null(value, "%s has no result", name);
  snprintf(hash, 40, "%s", value->valuestring);
  cJSON_Delete(json);
}

static void saved_hash(const char *dir, const char *out, int step, char hash[40]) {
  char name[256];
  snprintf(name, sizeof name, "%s/checkpoints/step-%08d/manifest.json", out, step);
  cJSON *json = training_json(dir, name);
  const cJSON *value = training_get(json, "state_hash");
  cr_assert_not_null(value, "%s is missing", name);
  snprintf(hash, 40, "%s", value->valuestring);
  cJSON_Delete(json);
}

static int64_t saved_samples(const char *dir, const char *out, int step) {
  char name[256];
  snprintf(name, sizeof name, "%s/checkpoints/step-%08d/manifest.json", out, step);
  cJSON *json = training_json(dir, name);
  const cJSON *value = training_get(json, "data.samples");
  cr_assert_not_null(value, "%s does not say", name);
  const int64_t samples = (int64_t)value->valuedouble;
  cJSON_Delete(json);
  return samples;
}

/* Step, loss and norm of every line of metrics.jsonl. */
static char *losses_of(const char *dir, const char *out) {
  char name[256];
  snprintf(name, sizeof name, "%s/metrics.jsonl", out);
  char *text = command_read_file(dir, name), *kept = text, *at = text;
  cr_assert_not_null(text, "%s is missing", name);
  while (*at) {
    const size_t line = strcspn(at, "\n");
    const char *end = strstr(at, ",\"lr\"");
    if (end && end < at + line) {
      memmove(kept, at, (size_t)(end - at));
      kept += end - at;
      *kept++ = '\n';
    } else {
      cr_assert(!strncmp(at, "{\"after_step\":", 14), "%s: neither a step nor behind one: %.*s", name, (int)line, at);
    }
    at += line + (at[line] == '\n');
  }
  *kept = 0;
  return text;
}

static int exists(const char *dir, const char *name) {
  char path[512];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", dir, name);
  return lstat(path, &st) == 0;
}

/* Entries of out/checkpoints whose name contains `part`. */
static int count_entries(const char *dir, const char *out, const char *part) {
  char path[512];
  int n = 0;
  snprintf(path, sizeof path, "%s/%s/checkpoints", dir, out);
  DIR *d = opendir(path);
  cr_assert_not_null(d, "no %s", path);
  for (struct dirent *e; (e = readdir(d));) n += strstr(e->d_name, part) != NULL;
  closedir(d);
  return n;
}

/* ---- exact ---- */
Test(checkpoint, resumed_is_uninterrupted, .timeout = 240) {
  static const char *const strategies[] = {"ddp", "fsdp", "zero --set zero.stage=3"};
  char *dir = command_temp_dir(), whole[40], again[40], model[512];
  snprintf(model, sizeof model, "%slayer_drop = 0.2\n", training_odd_model); /* the model draws numbers, too */
  training_files(dir, model);
  for (int s = 0; s < 3; s++) {
    TRAIN(dir, "-n 2 --strategy %s --set run.out=whole%d --set checkpoint.every=10", strategies[s], s);
    hash_of(dir, "whole0", whole);
    for (int to = 0; to < 3; to++) { /* a fork: run.out is another run */
      TRAIN(dir, "-n 2 --strategy %s --set run.out=again --resume whole%d/checkpoints/step-00000010", strategies[to],
            s);
      hash_of(dir, "again", again);
      cr_assert_str_eq(whole, again, "10 steps of %s, then 10 of %s", strategies[s], strategies[to]);
    }
  }
  char *losses = losses_of(dir, "whole0"), *rest = losses_of(dir, "again");
  cr_assert_str_eq(strstr(losses, "{\"step\":11,"), rest, "the steps after the resume");
  /* in the same directory: metrics are cut and appended, later checkpoints set aside */
  expect(phalanx(dir, "train --resume whole1/checkpoints/step-00000010 -n 2 --strategy ddp"), 0,
         "the strategy was fsdp and is ddp");
  char *joined = losses_of(dir, "whole1");
  cr_assert_str_eq(losses, joined);
  hash_of(dir, "whole1", again);
  cr_assert_str_eq(whole, again);
  cr_assert(exists(dir, "whole1/checkpoints/aside-00000020.1") && exists(dir, "whole1/checkpoints/step-00000020"));
  cJSON *json = training_json(dir, "whole1/run.json");
  cr_assert_eq(cJSON_GetArraySize(training_get(json, "resumed")), 1);
  cJSON_Delete(json);
  free(joined);
  free(rest);
  free(losses);
  command_remove_dir(dir);
}

/* The batch may be divided in another way, and may change where the samples divide. */
Test(checkpoint, another_world_size_and_batch, .timeout = 120) {
  char *dir = command_temp_dir(), one[40], other[40];
  training_files(dir, training_odd_model);
  TRAIN(dir, "-n 1 --set batch.micro=4 --set run.steps=6 --set checkpoint.every=4 --set checkpoint.keep=0");
  for (int ranks = 1; ranks <= 4; ranks += 3) {
    expect(phalanx(dir, "train run.ini -n %d --strategy fsdp --set batch.micro=2 --set batch.accumulate=%d "
                        "--set run.steps=6 --set run.out=on%d --resume out/checkpoints/step-00000004",
                   ranks, ranks == 1 ? 4 : 1, ranks), 0, "goes on from batch 2 of 8 sequences");
  }
  hash_of(dir, "on1", one);
  saved_hash(dir, "out", 6, other);
  cr_assert_str_neq(one, other); /* twice the samples a step */
  command_remove_dir(dir);
}

/* 2 ranks, 3, 2 again, one directory: the position is counted in sequences, so no batch has to divide it. */
Test(checkpoint, ranks_come_and_go, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, tiny_model);
  TRAIN(dir, "-n 2 --set run.steps=10 --set checkpoint.every=10");
  expect(phalanx(dir, "train run.ini -n 3 --strategy fsdp --set run.steps=14 --set checkpoint.every=4 --resume"), 0,
         "goes on from sequence 20, 3 a step");
  cr_assert_eq(saved_samples(dir, "out", 14), 2 * 10 + 3 * 4);
  expect(phalanx(dir, "train run.ini -n 2 --strategy zero --set run.steps=17 --set checkpoint.every=4 "
                      "--set checkpoint.keep=0 --resume"), 0,
         "goes on from batch 16 of 2 sequences");
  cr_assert_eq(saved_samples(dir, "out", 17), 2 * 10 + 3 * 4 + 2 * 3);
  /* back to an earlier one, nothing saved since: `latest` names it */
  TRAIN(dir, "-n 2 --set run.steps=14 --resume out/checkpoints/step-00000014");
  expect(phalanx(dir, "checkpoint verify out"), 0, "step-00000014: whole");
  command_remove_dir(dir);
}

/* What was trained elsewhere begins here: any seed, any optimizer, and the weights that it had. */
Test(checkpoint, an_import_continues, .timeout = 60) {
  static const char *const ways[] = {"", "--strategy zero --set zero.stage=3 --set optimizer.name=sgd"};
  char *dir = command_temp_dir();
  training_files(dir, tiny_model);
  TRAIN(dir, "-n 2 --set run.steps=3 --set checkpoint.every=3 --set data.valid=valid.bin");
  cJSON *json = training_json(dir, "out/run.json");
  const double loss = training_get(json, "result.valid_loss")->valuedouble;
  cJSON_Delete(json);
  expect(phalanx(dir, "checkpoint export out hf"), 0, NULL);
  expect(phalanx(dir, "checkpoint import hf -o new"), 0, NULL);
  for (int i = 0; i < 2; i++) {
    TRAIN(dir, "-n 2 %s --set run.out=on%d --set run.seed=7 --set optimizer.lr=0 --set run.steps=1 --resume new "
               "--set data.valid=valid.bin --set checkpoint.every=1", ways[i], i);
    char name[32];
    snprintf(name, sizeof name, "on%d/run.json", i);
    json = training_json(dir, name);
    cr_assert_eq(training_get(json, "result.valid_loss")->valuedouble, loss, "%s", ways[i]);
    cJSON_Delete(json);
  }
  expect(phalanx(dir, "checkpoint diff out on1 --weights"), 0, "equal");
  expect(phalanx(dir, "checkpoint verify on1"), 0, "whole");
  command_remove_dir(dir);
}

/* ---- any to any ---- */
enum { STRATEGIES = 6, RANKS = 4 };
static const char *const strategies[STRATEGIES] = {"ddp",          "fsdp",         "fsdp.sharding=grad_op",
                                                   "zero.stage=1", "zero.stage=2", "zero.stage=3"};
static char saved[STRATEGIES][RANKS][40];

/* One job loads all of them; those that follow one another are of other steps, so that no load is without effect. */
static void load_all(rank_rig *rig, void *arg) {
  phx_error err = PHX_ERROR_INIT;
  (void)arg;
  for (int k = 0; k < STRATEGIES * RANKS; k++) {
    const int s = k / RANKS, n = k % RANKS;
    char path[64], hash[33];
    phx__resumed resumed;
    snprintf(path, sizeof path, "out-%d-%d/checkpoints/step-%08d", s, n, n + 1);
    RIG_CHECK(rig, !phx__checkpoint_load(rig->rt, path, &resumed, &err), "%s: %s", path, err.message);
    RIG_CHECK(rig, resumed.at.step == n + 1, "%s: step %lld", path, (long long)resumed.at.step);
    RIG_CHECK(rig, !rank_rig_hash(rig, hash, &err), "%s: %s", path, err.message);
    RIG_CHECK(rig, !strcmp(hash, saved[s][n]), "of %s on %d ranks: %s instead of %s", strategies[s], n + 1, hash,
              saved[s][n]);
  }
}

Test(checkpoint, matrix, .timeout = 400) {
  char *dir = command_temp_dir(), out[32], hash[40];
  training_files(dir, tiny_model);
  for (int s = 0; s < STRATEGIES; s++)
    for (int n = 0; n < RANKS; n++) {
      const char *option = strchr(strategies[s], '.');
      snprintf(out, sizeof out, "out-%d-%d", s, n);
      TRAIN(dir, "-n %d --strategy %.*s %s %s --set run.out=%s --set run.steps=%d --set batch.micro=%d "
                 "--set checkpoint.every=%d", n + 1, (int)strcspn(strategies[s], "."), strategies[s],
            option ? "--set" : "", option ? strategies[s] : "", out, n + 1, 12 / (n + 1), n + 1);
      hash_of(dir, out, hash);
      saved_hash(dir, out, n + 1, saved[s][n]);
      cr_assert_str_eq(saved[s][n], hash, "%s on %d ranks: the manifest's hash", strategies[s], n + 1);
      cr_assert_str_eq(hash, saved[0][n], "%s and ddp on %d ranks differ", strategies[s], n + 1);
      cr_assert(n == 0 || strcmp(hash, saved[s][n - 1]), "another number of steps, and the same state");
    }
  for (int s = 0; s < STRATEGIES; s++)
    for (int n = 1; n <= RANKS; n++) {
      rank_rig_run run = {.size = n, .dir = dir, .strategy = strategies[s], .limit_s = 60, .body = load_all};
      cr_assert(rank_rig_ranks(&run), "loaded by %s on %d ranks: %s", strategies[s], n, run.message);
    }
  command_remove_dir(dir);
}

/* `check` names the copies of saves in the background, so they were planned before the run; which keeps to it, byte for
 * byte. */
Test(checkpoint, copies_are_planned_before_the_run, .timeout = 60) {
  static const char *const ways[] = {"ddp", "fsdp --set precision.compute=bf16", "zero --set zero.stage=2",
                                     "zero --set checkpoint.copy=40KiB"};
  char *dir = command_temp_dir();
  training_files(dir, tiny_model);
  for (int i = 0; i < 4; i++) {
    char flags[300], *words[64];
    int n = 0;
    snprintf(flags, sizeof flags, "run.ini -n 2 --strategy %s --set checkpoint.every=2 --set run.steps=5", ways[i]);
    outcome r = phalanx(dir, "check %s", flags);
    cr_assert_eq(r.status, 0, "%s", r.out);
    char *row = strstr(r.out, "\n;  0 ");
    cr_assert(row, "%s", r.out);
    row[strcspn(row + 1, "\n") + 1] = 0;
    for (char *word = strtok(row, " \n"); word && n < 64; word = strtok(NULL, " \n")) words[n++] = word;
    cr_assert_geq(n, 2 + 2 * (PHX_MEM_KINDS + 3));
    cr_assert_str_neq(words[n - 4], "0", "%s: no memory for copies in the plan", ways[i]);
    free(r.out);
    TRAIN(dir, "%s", flags + strlen("run.ini "));
    cJSON *json = training_json(dir, "out/run.json");
    training_check_plan(training_get(json, "result"), ways[i]);
    cJSON_Delete(json);
  }
  command_remove_dir(dir);
}

/* ---- the directory ---- */
Test(checkpoint, retention_and_leftovers, .timeout = 60) {
  char *dir = command_temp_dir();
  training_files(dir, tiny_model);
  TRAIN(dir, "-n 2 --set checkpoint.every=2 --set checkpoint.keep=2 --set checkpoint.keep_every=6");
  cr_assert_eq(count_entries(dir, "out", "step-"), 4);
  static const char *const kept[] = {"06", "12", "18", "20"};
  for (int i = 0; i < 4; i++) {
    char name[64];
    snprintf(name, sizeof name, "out/checkpoints/step-000000%s", kept[i]);
    cr_assert(exists(dir, name), "%s is gone", name);
  }
  char *latest = command_read_file(dir, "out/checkpoints/latest");
  cr_assert_str_eq(latest, "step-00000020\n");
  free(latest);
  char path[512];
  snprintf(path, sizeof path, "%s/out/checkpoints/.step-00000099.0123456789abcdef.part", dir);
  cr_assert_eq(mkdir(path, 0755), 0);
  command_write_file(path, "rank-00000.safetensors", "half", 4);
  command_write_file(dir, "out/checkpoints/.latest.part", "x", 1);
  command_write_file(dir, "out/checkpoints/latest", "step-77777777\n", 14); /* a hint: nothing is lost by it */
  expect(phalanx(dir, "train run.ini -n 2 --resume"), 0, "2 leftovers of dead attempts removed");
  cr_assert_eq(count_entries(dir, "out", ".part"), 0);
  command_remove_dir(dir);
}

static void change_byte(const char *dir, const char *name, long at) {
  char path[512];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *f = fopen(path, "r+b");
  cr_assert_not_null(f, "%s", path);
  cr_assert_eq(fseek(f, at, at < 0 ? SEEK_END : SEEK_SET), 0);
  const int c = fgetc(f);
  cr_assert_neq(c, EOF);
  fseek(f, -1, SEEK_CUR);
  fputc(c ^ 1, f);
  fclose(f);
}

/* Every name below dir, and the content of every file. */
static char *tree_of(const char *dir) {
  command_result r = command_run(
      dir, 60, (const char *const[]){"/bin/sh", "-c", "find . | sort; find . -type f -exec cksum {} + | sort", NULL});
  cr_assert_eq(r.status, 0, "%s", r.out);
  return r.out;
}

/* Exit status 4: in place, beside, and over an earlier run, everything is as it was. */
static void check_untouched(const char *dir) {
  static const char *const outs[] = {"out", "new/run", "other"};
  for (int ranks = 1; ranks <= 2; ranks++)
    for (int i = ranks == 1 ? 2 : 0; i < 3; i++) {
      char *before = tree_of(dir);
      expect(phalanx(dir, "train run.ini -n %d --set optimizer.lr=1e-3 --set run.out=%s "
                          "--resume out/checkpoints/step-00000020", ranks, outs[i]), 4, "rank-00001.safetensors");
      char *after = tree_of(dir);
      cr_assert_str_eq(before, after, "%d ranks, run.out = %s", ranks, outs[i]);
      free(before);
      free(after);
    }
}

Test(checkpoint, damage_falls_back, .timeout = 120) {
  char *dir = command_temp_dir(), whole[40], again[40];
  training_files(dir, tiny_model);
  TRAIN(dir, "-n 2 --set checkpoint.every=5 --set checkpoint.keep=0");
  hash_of(dir, "out", whole);
  /* in the state of one rank, in a manifest, a file that is gone: three times the one before */
  change_byte(dir, "out/checkpoints/step-00000020/rank-00001.safetensors", -5000);
  change_byte(dir, "out/checkpoints/step-00000015/manifest.json", 100);
  char gone[512];
  snprintf(gone, sizeof gone, "%s/out/checkpoints/step-00000010/rank-00000.safetensors", dir);
  cr_assert_eq(remove(gone), 0);
  TRAIN(dir, "-n 2 --set run.steps=1 --set run.out=other");
  check_untouched(dir);
  outcome r = phalanx(dir, "train run.ini -n 2 --strategy fsdp --set checkpoint.every=5 --resume");
  cr_assert_eq(r.status, 0, "%s", r.out);
  cr_assert(strstr(r.out, "step-00000020/rank-00001.safetensors") && strstr(r.out, "step-00000015/manifest.json") &&
                strstr(r.out, "step-00000010/rank-00000.safetensors"), "not all are named:\n%s", r.out);
  free(r.out);
  hash_of(dir, "out", again);
  cr_assert_str_eq(whole, again);
  cr_assert_eq(count_entries(dir, "out", "aside-"), 3);
  for (int step = 5; step <= 20; step += 5) {
    char name[128];
    snprintf(name, sizeof name, "out/checkpoints/step-%08d/rank-00000.safetensors", step);
    if (exists(dir, name)) change_byte(dir, name, -5000);
  }
  expect(phalanx(dir, "train run.ini -n 2 --resume"), 4, "no whole checkpoint");
  command_remove_dir(dir);
}

Test(checkpoint, refusals, .timeout = 120) {
  char *dir = command_temp_dir(), before[40], after[40];
  training_files(dir, tiny_model);
  expect(phalanx(dir, "train run.ini --resume"), 2, "out");
  TRAIN(dir, "-n 2 --set run.steps=4");
  expect(phalanx(dir, "train run.ini --resume"), 2, "has no checkpoint to go on from");
  TRAIN(dir, "-n 2 --set run.steps=4 --set checkpoint.every=4");
  hash_of(dir, "out", before);
  expect(phalanx(dir, "train run.ini -n 2 --resume --set model.width=20"), 2, "wte.weight");
  expect(phalanx(dir, "train run.ini -n 2 --resume --set optimizer.name=sgd"), 2, "optimizer.name = adamw");
  expect(phalanx(dir, "train run.ini -n 2 --resume --set run.seed=1"), 2, "run.seed = 1337");
  expect(phalanx(dir, "train run.ini -n 2 --resume --set run.steps=3"), 2, "this run ends at run.steps = 3");
  expect(phalanx(dir, "train run.ini -n 2 --resume nowhere"), 2, "nowhere");
  expect(phalanx(dir, "train run.ini -n 2 --resume run.ini"), 2, "no directory");
  expect(phalanx(dir, "train --resume"), 2, "needs a FILE.ini");
  expect(phalanx(dir, "train run.ini --resume="), 2, "needs a directory");
  expect(phalanx(dir, "compare run.ini --strategies ddp,zero --resume"), 2, "--resume");
  hash_of(dir, "out", after);
  cr_assert_str_eq(before, after);
  command_remove_dir(dir);
}
