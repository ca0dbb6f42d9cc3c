/* What a run refuses before anything is made: token files, batches, ranks, the run directory, the variants of compare.
 * Each is exit status 2, one clear message, nothing left on disk.  And what happens to a run that cannot write its
 * files or size its memory. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "training.h"

#define SMALL                                 \
  "[batch]\nmicro = 1\nsequence = 33\n"       \
  "[model]\nplugin = gpt\nlayers = 1\nheads = 3\nwidth = 30\ncontext = 33\nvocab = 257\n"

static char *dir;
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, SMALL);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(run_refusals, .init = setup, .fini = teardown, .timeout = 120);
TestSuite(runs, .init = setup, .fini = teardown, .timeout = 120);

static int entries(const char *path) {
  int n = 0;
  DIR *d = opendir(path);
  for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
  if (d) closedir(d);
  return n;
}

static size_t lines(const char *text) {
  size_t n = 0;
  for (; *text; text++) n += *text == '\n';
  return n;
}

static void expect_refused(const char *message, const char *const *argv) {
  const int before = entries(dir);
  command_result r = command_run(dir, 60, argv);
  cr_expect_eq(r.status, 2, "%s: status %d\n%s", message, r.status, r.out);
  cr_expect(strstr(r.out, message), "'%s' lacks '%s'", r.out, message);
  cr_expect_eq(lines(r.out), 1, "%s: more than one message:\n%s", message, r.out);
  cr_expect_eq(strncmp(r.out, "phalanx: ", 9), 0, "%s", r.out);
  cr_expect_eq(entries(dir), before, "%s: something was left on disk", message);
  command_free(&r);
}
#define TRAIN(message, ...) \
  expect_refused(message, (const char *const[]){"phalanx", "train", "run.ini", __VA_ARGS__, NULL})
#define COMPARE(message, ...) \
  expect_refused(message, (const char *const[]){"phalanx", "compare", "run.ini", __VA_ARGS__, NULL})

/* llm.c's header, `announced` tokens, then `real` of them. */
static void write_llmc(const char *name, int32_t magic, int32_t announced, size_t real, uint16_t token) {
  const size_t bytes = 1024 + 2 * real;
  char *file = calloc(1, bytes);
  const int32_t head[3] = {magic, 1, announced};
  memcpy(file, head, sizeof head);
  for (size_t i = 0; i < real; i++) memcpy(file + 1024 + 2 * i, &token, 2);
  command_write_file(dir, name, file, bytes);
  free(file);
}

#define DATA "--set", "data.train=bad.bin"
Test(run_refusals, token_files) {
  TRAIN("bad.bin", DATA); /* missing */
  command_write_file(dir, "bad.bin", "", 0);
  TRAIN("bad.bin is empty", DATA);
  command_write_file(dir, "bad.bin", "abc", 3);
  TRAIN("3 bytes are not a whole number of uint16 tokens", DATA);
  write_llmc("bad.bin", 20240520, 1000, 999, 5);
  TRAIN("it is truncated", DATA);
  write_llmc("bad.bin", 20240520, 1000, 1001, 5);
  TRAIN("it is too long", DATA);
  write_llmc("bad.bin", 20240521, 1000, 1000, 5);
  TRAIN("wrong magic 20240521", DATA);
  write_llmc("bad.bin", 20240801, 1000, 1000, 5);
  TRAIN("llm.c's Llama 3 tokens", DATA);
  write_llmc("bad.bin", 20240520, 1000, 1000, 257);
  TRAIN("token 257 at position 0 (byte 1024) is not below the vocabulary of 257", DATA);
  write_llmc("bad.bin", 20240520, 20, 20, 5);
  TRAIN("bad.bin has 20 tokens, one sample of sequence = 33 needs 34", DATA);
  mkdir(strcat(strcpy((char[300]){0}, dir), "/folder"), 0755);
  TRAIN("folder is not a regular file", "--set", "data.train=folder");
  TRAIN("none.bin", "--set", "data.valid=none.bin");
}

Test(run_refusals, batches_and_ranks) {
  TRAIN("[batch] sequence = 34 does not fit the model's context of 33", "--set", "batch.sequence=34");
  TRAIN("micro 100 x accumulate 10 x ranks 2 = 2000 samples, but 40000 tokens in 1 file(s) make only 1212", "-n", "2",
        "--set", "batch.micro=100", "--set", "batch.accumulate=10");
  TRAIN("[batch] total = 7, but ranks x micro x accumulate = 2 x 1 x 3 = 6", "-n", "2", "--set", "batch.total=7",
        "--set", "batch.accumulate=3");
  TRAIN("1048576 x 1048576 x 33", "--set", "batch.micro=1048576", "--set", "batch.accumulate=1048576");
  TRAIN("whole number from 1 to 64", "-n", "0");
  TRAIN("whole number from 1 to 64", "-n", "65");
  TRAIN("heads", "--set", "model.heads=4"); /* does not divide 30 */
  command_result r = RUN(dir, 60, "train", "run.ini", "--set", "run.deterministic=no", "--strategy",
                         PHX_TEST_ONLY_PLUGINS "/phx_strategy_pipeline.so");
  cr_expect(r.status == 2 && strstr(r.out, "strategy pipeline needs at least two ranks"), "%d: %s", r.status, r.out);
  cr_expect_eq(entries(dir), 3);
  command_free(&r);
}

/* What train refuses, check does, too, below what it prints. */
static void check_refuses(const char *message, const char *set) {
  const int before = entries(dir);
  command_result r = RUN(dir, 60, "check", "run.ini", "--set", set);
  cr_expect(r.status == 2 && strstr(r.out, message), "%s: status %d, no '%s' in\n%s", set, r.status, message, r.out);
  cr_expect_eq(entries(dir), before, "%s: something was left on disk", set);
  command_free(&r);
}

Test(run_refusals, check_looks_at_the_run_directory) {
  check_refuses("cannot create the directory run.ini/x (run.out): Not a directory", "run.out=run.ini/x");
  check_refuses("run.out = run.ini is not a directory", "run.out=run.ini");
  check_refuses("File name too long", "run.out=" /* 300 of them */
                "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
  command_write_file(dir, "run.json", "{}", 2);
  check_refuses("holds an earlier run, and is the directory you work in", "run.out=.");
  command_result r = RUN(dir, 60, "check", "run.ini", "--set", "run.out=made/on/the/way");
  cr_expect_eq(r.status, 0, "%s", r.out);
  command_free(&r);
}

/* The directories that were made on the way are taken back. */
Test(run_refusals, run_directory) {
  char too_long[400], set[5000];
  TRAIN("cannot create the directory /proc/", "--set", "run.out=/proc/phalanx/out");
  TRAIN("run.ini", "--set", "run.out=run.ini");
  TRAIN("cannot create the directory run.ini/x (run.out): Not a directory", "--set", "run.out=run.ini/x");
  memset(too_long, 'x', 300);
  too_long[300] = 0;
  snprintf(set, sizeof set, "run.out=made/on/the/way/%s", too_long);
  TRAIN("File name too long", "--set", set);
  TRAIN("[run] out is empty", "--set", "run.out=");
  command_write_file(dir, "made", "", 0);
  snprintf(set, sizeof set, "run.out=%04100d", 1);
  TRAIN("", "--set", set);
}

Test(run_refusals, compare_checks_every_run_before_the_first) {
  COMPARE("[fsdp] has no key 'shardin': did you mean 'sharding'?", "--strategies", "ddp,fsdp.shardin=full");
  COMPARE("there is no strategy plugin 'fspd'", "--strategies", "ddp,fspd");
  COMPARE("'4' is not valid for stage", "--strategies", "ddp,zero.stage=4");
  COMPARE("missing.so", "--strategies", "ddp,./missing.so");
  COMPARE("is not NAME", "--strategies", "ddp,zero.stage");
  COMPARE("is not NAME", "--strategies", "ddp,,zero");
  COMPARE("is not NAME", "--strategies", ".stage=1");
  COMPARE("compare needs --strategies", "-n", "2");
  COMPARE("phalanx: ddp: [batch] sequence = 34 does not fit the model's context", "--strategies", "ddp,fsdp", "--set",
          "batch.sequence=34");
  COMPARE("none.bin", "--strategies", "ddp,fsdp", "--set", "data.train=none.bin");
  COMPARE("has no key 'stesp'", "--strategies", "ddp,fsdp", "--set", "run.stesp=3");
  COMPARE("cannot create the directory", "--strategies", "ddp", "--set", "run.out=run.ini/x");
}

Test(runs, compare_takes_the_path_of_a_strategy) {
  command_result r = RUN(dir, 60, "compare", "run.ini", "-n", "2", "--steps", "3", "--strategies",
                         "ddp," PHX_TEST_ONLY_PLUGINS "/phx_strategy_fileopt.so");
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  r = RUN(dir, 60, "compare", "run.ini", "--steps", "2", "--strategies", "ddp");
  cr_assert(r.status == 0 && strstr(r.out, "out holds an earlier run: it is now out.1"), "%s", r.out);
  command_free(&r);
  cJSON *json = training_json(dir, "out.1/compare.json");
  cr_assert_eq(cJSON_GetArraySize(training_get(json, "strategies")), 2);
  cJSON_Delete(json);
}

/* A strategy named by a path has its section in the file; under another strategy it is one of the unselected. */
Test(runs, samples_what_a_strategy_of_a_file_trained) {
  command_result r = RUN(dir, 60, "train", "run.ini", "--steps", "2", "--strategy",
                         PHX_TEST_ONLY_PLUGINS "/phx_strategy_fileopt.so");
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
  r = RUN(dir, 60, "sample", "out", "--tokens", "3");
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
}

/* torchrun's variables with one rank: there is no launcher of ours, so the rank makes the directory, and says what ours
 * would have said. */
Test(runs, rank_0_makes_the_directory_under_another_launcher) {
  command_result r =
      command_run(dir, 60,
                  (const char *const[]){"/usr/bin/env", "RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1",
                                        "MASTER_PORT=1", PHX_TEST_COMMAND, "train", "run.ini", "--steps", "2",
                                        "--set", "precision.reduce=bf16", NULL});
  cr_assert_eq(r.status, 0, "%s", r.out);
  cr_expect(strstr(r.out, "warning: [precision] reduce = bf16") && strstr(r.out, " core] device cpu "), "%s", r.out);
  command_free(&r);
  cJSON *json = training_json(dir, "out/run.json");
  cr_assert_not_null(training_get(json, "result"));
  cJSON_Delete(json);
}

/* ---- what cannot be written (a full disk: test_full_disk.c) ---- */
Test(runs, a_configuration_that_cannot_be_written_is_refused) {
  for (int n = 1; n <= 2; n++) {
    char line[600];
    snprintf(line, sizeof line, "trap '' XFSZ; ulimit -f 1; exec %s train run.ini -n %d --steps 3", PHX_TEST_COMMAND,
             n);
    command_result r = command_run(dir, 60, (const char *const[]){"/bin/bash", "-c", line, NULL});
    cr_expect(r.status == 2 && strstr(r.out, "cannot write out/config.ini"), "status %d\n%s", r.status, r.out);
    command_free(&r);
    cr_expect_eq(entries(dir), 3, "something was left on disk");
  }
}

/* No room for the job's memory: the configuration was good, so this is a failure (3), with its reason. */
Test(runs, no_room_for_the_jobs_memory) {
  for (int n = 1; n <= 2; n++) {
    char line[600];
    snprintf(line, sizeof line, "trap '' XFSZ; ulimit -f 40; exec %s train run.ini -n %d --steps 3", PHX_TEST_COMMAND,
             n);
    command_result r = command_run(dir, 60, (const char *const[]){"/bin/bash", "-c", line, NULL});
    cr_expect(r.status == 3 && strstr(r.out, "cannot size the job's shared memory"), "status %d\n%s", r.status, r.out);
    command_free(&r);
  }
}
