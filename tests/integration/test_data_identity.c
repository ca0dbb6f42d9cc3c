/* What a run is trained on: refused where it is no token file, told at start, named in checkpoints, compared at a
 * resume; and what the model computes, which a resume may not change either. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "foreign.h"
#include "root.h"
#include "training.h"

enum { TRAINED = 3 }; /* steps in the checkpoint of `before` */
static const char model[] = "[batch]\nmicro = 2\nsequence = 8\n"
                            "[model]\nplugin = gpt\nlayers = 1\nheads = 2\nwidth = 12\ncontext = 9\nvocab = 257\n";
static char *dir;
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, model);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(data_identity, .init = setup, .fini = teardown, .timeout = 120);

/* Text is in the output of `phalanx train run.ini MORE...`, and its status is this. */
static void train(int status, const char *text, const char *const *more) {
  const char *argv[40] = {"phalanx", "train", "run.ini"};
  int n = 3;
  for (; *more; more++) argv[n++] = *more;
  argv[n] = NULL;
  command_result r = command_run(dir, 60, argv);
  cr_expect_eq(r.status, status, "status %d instead of %d:\n%s", r.status, status, r.out);
  cr_expect(strstr(r.out, text), "no '%s' in:\n%s", text, r.out);
  command_free(&r);
}
#define TRAIN(status, text, ...) train(status, text, (const char *const[]){__VA_ARGS__, NULL})

static void before(void) {
  TRAIN(0, "step", "-n", "2", "--set", "run.out=before", "--steps", "3", "--set", "checkpoint.every=3");
}
/* A fork of it, for one step, with what is set. */
#define RESUME(status, text, ...) \
  TRAIN(status, text, "--resume", "before", "--steps", "4", "-n", "2", "--set", "run.out=after", __VA_ARGS__)

static double metric(const char *out, const char *name) {
  char file[64], key[64];
  snprintf(file, sizeof file, "%s/metrics.jsonl", out);
  snprintf(key, sizeof key, "\"%s\":", name);
  char *text = command_read_file(dir, file), *at = text ? strstr(text, key) : NULL;
  cr_assert_not_null(at, "%s has no %s", file, name);
  const double value = strtod(at + strlen(key), NULL);
  free(text);
  return value;
}

static void append(const char *name, const char *from, size_t more) {
  char a[300], b[300], buffer[80000];
  snprintf(a, sizeof a, "%s/%s", dir, from);
  snprintf(b, sizeof b, "%s", name);
  FILE *f = fopen(a, "r");
  cr_assert_not_null(f);
  const size_t n = fread(buffer, 1, sizeof buffer, f);
  fclose(f);
  cr_assert_geq(n, more);
  char *all = malloc(n + more);
  memcpy(all, buffer, n);
  memcpy(all + n, buffer, more);
  command_write_file(dir, b, all, n + more);
  free(all);
}

/* What is left of a launcher's environment makes no rank of it, which is said. */
Test(data_identity, half_of_a_launchers_variables_is_said) {
  setenv("RANK", "1", 1);
  TRAIN(0, "the environment's RANK is set, and neither WORLD_SIZE nor MASTER_PORT: this is taken for a run of its own",
        "--steps", "1");
  unsetenv("RANK");
  setenv("WORLD_SIZE", "2", 1);
  TRAIN(0, "the environment's WORLD_SIZE is set, and RANK is not: this is taken", "--steps", "1");
}

Test(data_identity, held_out_data_that_is_trained_on_is_said) {
  static const char says[] = "[data] valid, copy.bin, has the contents of [data] train, train.bin: the held-out loss";
  append("copy.bin", "train.bin", 0);
  TRAIN(0, says, "-n", "2", "--steps", "1", "--set", "data.valid=copy.bin");
  command_result r = RUN(dir, 60, "check", "run.ini", "--set", "data.valid=copy.bin");
  cr_expect(r.status == 0 && strstr(r.out, says), "%s", r.out);
  command_free(&r);
  r = RUN(dir, 60, "check", "run.ini", "--set", "data.valid=valid.bin");
  cr_expect(r.status == 0 && !strstr(r.out, "has the contents of"), "%s", r.out);
  command_free(&r);
}

Test(data_identity, a_resume_compares_the_data) {
  before();
  RESUME(2, "it was trained on sequences of 8 tokens, and batch.sequence is 9", "--set", "batch.sequence=9");
  append("grown.bin", "train.bin", 200);
  RESUME(2, "grown.bin has 80200 bytes, and train.bin had 80000", "--set", "data.train=grown.bin");
  append("moved.bin", "train.bin", 0);
  RESUME(0, "step", "--set", "data.train=moved.bin");
  const double on = metric("after", "loss");
  char path[300];
  snprintf(path, sizeof path, "%s/moved.bin", dir);
  FILE *f = fopen(path, "r+");
  cr_assert(f && !fseek(f, 79998, SEEK_SET) && fputc(1, f) == 1 && !fclose(f)); /* the last token of all */
  RESUME(2, "moved.bin has other contents than train.bin had", "--set", "data.train=moved.bin");
  RESUME(0, "the order of the sequences begins anew (data.on_change = restart)", "--set", "data.train=moved.bin",
         "--set", "data.on_change=restart");
  cr_expect_neq(metric("after", "loss"), on, "the step read what it would have read anyway");
  char *manifest = command_read_file(dir, "before/checkpoints/step-00000003/manifest.json");
  static const char data[] = "\"samples\":12,\"sequence\":8,\"batch\":4,\"files\":[\n{\"name\":\"train.bin\","
                             "\"bytes\":80000,\"windows\":4999,\"xxh128\":\"";
  cr_expect(manifest && strstr(manifest, data), "%s", manifest);
  free(manifest);
}

/* The order that begins anew is that of a new run: the same first batch, so with lr 0 and the first weights the same
 * loss. */
Test(data_identity, a_restarted_order_is_a_new_one) {
  TRAIN(0, "step", "--set", "run.out=before", "--steps", "3", "--set", "checkpoint.every=3", "--set", "optimizer.lr=0");
  TRAIN(0, "step", "--set", "run.out=new", "--steps", "1", "--set", "optimizer.lr=0", "--set", "batch.sequence=9");
  TRAIN(0, "begins anew", "--resume", "before", "--steps", "4", "--set", "run.out=after", "--set", "optimizer.lr=0",
        "--set", "batch.sequence=9", "--set", "data.on_change=restart", "--set", "checkpoint.every=1");
  cr_expect_eq(metric("after", "loss"), metric("new", "loss"));
  TRAIN(0, "goes on from", "--resume", "after", "--steps", "5", "--set", "run.out=later", "--set", "optimizer.lr=0",
        "--set", "batch.sequence=9"); /* its own checkpoint has the new order */
}

Test(data_identity, a_resume_computes_what_was_computed) {
  before();
  RESUME(2, "was saved with heads 2, norm_eps 1e-05, and the model of this run has heads 3, norm_eps 1e-05", "--set",
         "model.heads=3");
  RESUME(2, "heads 2, norm_eps 0.001: the same weights would compute something else", "--set", "model.norm_eps=1e-3");
  RESUME(0, "step", "--set", "model.layer_drop=0.1"); /* training, not the function */
}

Test(data_identity, another_global_batch_is_said_with_what_keeps_it) {
  before();
  TRAIN(0, "a step takes 2 sequences (micro 2 x accumulate 1 x 1 ranks), and took 4 before", "--resume", "before",
        "--steps", "4", "-n", "1", "--set", "run.out=after");
  command_result r = RUN(dir, 60, "train", "run.ini", "--resume", "before", "--steps", "4", "-n", "1", "--set",
                         "run.out=after", "--set", "batch.accumulate=2");
  cr_expect(r.status == 0 && !strstr(r.out, "and took"), "%s", r.out);
  command_free(&r);
  TRAIN(0, "batch.accumulate = 2 keeps it", "--resume", "before", "--steps", "4", "-n", "1", "--set", "run.out=after");
}

/* What people have beside token files, under a vocabulary that every two bytes fit into. */
static void no_tokens(const char *what, const char *advice, const void *bytes, size_t n) {
  char text[200], padded[4096] = {0};
  if (n < sizeof padded) memcpy(padded, bytes, n), bytes = padded, n = sizeof padded;
  command_write_file(dir, "odd.bin", bytes, n);
  snprintf(text, sizeof text, "odd.bin is no token file: it is %s", what);
  command_result r = RUN(dir, 30, "check", "run.ini", "--set", "data.train=odd.bin", "--set", "model.vocab=65536");
  cr_expect_eq(r.status, 2, "%s: status %d", what, r.status);
  cr_expect(strstr(r.out, text) && strstr(r.out, advice), "no '%s' in:\n%s", text, r.out);
  command_free(&r);
}

Test(data_identity, other_formats_are_refused_with_what_to_do) {
  char words[6000];
  uint32_t wide[2000];
  for (size_t i = 0; i < sizeof words; i++) words[i] = "the quick brown fox, and so on.\n"[i % 32];
  for (size_t i = 0; i < 2000; i++) wide[i] = (uint32_t)(i * 7919 % 50257);
  no_tokens("text", "phalanx data tokenize", words, sizeof words);
  no_tokens("integers of 32 or 64 bits", "astype('uint16')", wide, sizeof wide);
  no_tokens("a NumPy array", "astype('uint16')", "\x93NUMPY\x01", 7);
  no_tokens("compressed by gzip", "decompress it first", "\x1f\x8b\x08", 3);
  no_tokens("a Parquet file", "astype('uint16')", "PAR1", 4);
  TRAIN(2, "odd.bin is no token file", "--set", "data.train=odd.bin"); /* and so says train */
  cr_assert_eq(mkfifo(strcat(strcpy((char[300]){0}, dir), "/pipe"), 0600), 0);
  TRAIN(2, "pipe is not a regular file: it is a pipe", "--set", "data.train=pipe");
  TRAIN(2, "pipe is not a regular file: it is a pipe", "--set", "data.valid=pipe");
  command_result r = RUN(dir, 10, "data", "tokenize", "pipe", "-o", "out.bin");
  cr_expect(r.status == 2 && strstr(r.out, "it is a pipe"), "status %d: %s", r.status, r.out);
  command_free(&r);
}

/* Bytes as tokens have a high byte of 0 in every token, and words that are nearly all small; nothing speaks against
 * them. */
Test(data_identity, start_up_says_what_there_is) {
  static const char line[] = "40,000 tokens (raw uint16, 1 file) make 4,999 sequences of 8, 499 held out; 3 steps of 4 "
                             "are 0.0024 epochs; ";
  TRAIN(0, line, "-n", "2", "--steps", "3", "--set", "data.valid=valid.bin");
  command_result r =
      RUN(dir, 30, "check", "run.ini", "-n", "2", "--set", "run.steps=3", "--set", "data.valid=valid.bin");
  cr_expect(r.status == 0 && strstr(r.out, line), "%s", r.out);
  command_free(&r);
  r = RUN(dir, 30, "check", "run.ini", "--set", "data.train=none.bin");
  cr_expect(r.status == 2 && strstr(r.out, "there is no file none.bin"), "%s", r.out);
  command_free(&r);
}

/* ---- who reads it ---- */

enum { BIG = 24 << 20 }; /* bytes: much more than a process reads of anything else */

static void write_big(void) {
  uint16_t *tokens = calloc(BIG / 2, sizeof *tokens);
  for (int i = 0; i < BIG / 2; i++) tokens[i] = (uint16_t)(i % 257);
  command_write_file(dir, "train.bin", tokens, BIG);
  free(tokens);
  usleep(300000); /* a file that was written just now is read by each process anew: see data_scan.c */
}

/* Bytes that a process has read by now, by any call. */
static long long bytes_read(pid_t pid) {
  char name[64];
  long long n = -1;
  snprintf(name, sizeof name, "/proc/%d/io", (int)pid);
  FILE *f = fopen(name, "r");
  if (f && fscanf(f, "rchar: %lld", &n) != 1) n = -1;
  if (f) fclose(f);
  return n;
}

static void await_a_step(const char *log) {
  for (int i = 0; i < 8000; i++) {
    char *text = command_read_file(dir, log);
    const int there = text && strstr(text, "step    1/");
    free(text);
    if (there) return;
    usleep(5000);
  }
  cr_assert_fail("no step after 40 s");
}

#define ENDLESS "train", "run.ini", "-n", "2", "--steps", "1000000", "--set", "run.log_every=100000"

static void expect_one_reader(const pid_t *pids, int n, const char *who) {
  int readers = 0;
  for (int i = 0; i < n; i++) {
    const long long bytes = bytes_read(pids[i]);
    cr_expect(bytes >= 0 && bytes < BIG + BIG / 2, "%s: process %d read %lld bytes", who, i, bytes);
    readers += bytes >= BIG;
  }
  cr_expect_eq(readers, 1, "%s: %d of %d processes read the whole file", who, readers, n);
}

/* The command reads it, and the ranks that it starts know what it read. */
Test(data_identity, of_our_launcher_and_its_ranks_one_reads_the_data) {
  const char *const argv[] = {"phalanx", ENDLESS, NULL};
  pid_t pids[3] = {0};
  char line[64];
  if (bytes_read(getpid()) < 0) cr_skip_test("this kernel does not count what a process reads");
  write_big();
  pids[0] = fork();
  if (pids[0] == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (chdir(dir) || !freopen("log", "w", stdout) || dup2(1, 2) < 0) _exit(121);
    execv(test_path("bin/phalanx"), (char *const *)(uintptr_t)argv);
    _exit(122);
  }
  await_a_step("log");
  snprintf(line, sizeof line, "/proc/%d/task/%d/children", (int)pids[0], (int)pids[0]);
  FILE *f = fopen(line, "r");
  cr_assert(f && fscanf(f, "%d %d", &pids[1], &pids[2]) == 2, "the ranks are not there");
  fclose(f);
  expect_one_reader(pids, 3, "our launcher");
  kill(pids[0], SIGKILL);
  waitpid(pids[0], NULL, 0);
}

Test(data_identity, of_another_launchers_ranks_one_reads_the_data) {
  if (bytes_read(getpid()) < 0) cr_skip_test("this kernel does not count what a process reads");
  write_big();
  foreign f = FOREIGN(dir, FOREIGN_TORCHRUN, 2, ENDLESS);
  await_a_step("log-0");
  expect_one_reader(f.pids, 2, "torchrun");
  foreign_end(&f);
}
