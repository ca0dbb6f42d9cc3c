/* What whoever starts the command gives it: closed descriptors, a reader that leaves, limits of files and of their
 * size, less memory than the plan takes.  A run computes the same, or says what is wrong; none ends by a signal. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "root.h"
#include "training.h"

#define TINY                                     \
  "[batch]\nmicro = 1\nsequence = 8\n[model]\n" \
  "plugin = gpt\nlayers = 1\nheads = 1\nwidth = 8\ncontext = 8\nvocab = 257\n"

static char *dir;
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, TINY);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(process, .init = setup, .fini = teardown, .timeout = 120);

/* A line for bash, in dir; $P is the command. */
static command_result shell(const char *line) {
  setenv("P", test_path("bin/phalanx"), 1);
  return command_run(dir, 60, (const char *const[]){"/bin/bash", "-c", line, NULL});
}

/* The state at the end of the run in `out`; freed by the caller. */
static char *final_state(const char *out) {
  char name[64];
  snprintf(name, sizeof name, "%s/run.json", out);
  cJSON *o = training_json(dir, name);
  const cJSON *hash = training_get(o, "result.state_hash");
  char *text = cJSON_IsString(hash) ? strdup(hash->valuestring) : NULL;
  cJSON_Delete(o);
  return text;
}

/* The job's memory, or a file of the run, would get the number of a descriptor that is closed. */
Test(process, closed_descriptors) {
  static const char *const closed[] = {"<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"};
  char line[300];
  for (int ranks = 1; ranks <= 2; ranks++) {
    snprintf(line, sizeof line, "$P train run.ini -n %d --steps 2 --set run.out=whole%d", ranks, ranks);
    command_result r = shell(line);
    cr_assert_eq(r.status, 0, "%s", r.out);
    command_free(&r);
    snprintf(line, sizeof line, "whole%d", ranks);
    char *want = final_state(line);
    cr_assert_not_null(want);
    for (size_t i = 0; i < sizeof closed / sizeof *closed; i++) {
      char out[32];
      snprintf(out, sizeof out, "closed-%d-%zu", ranks, i);
      snprintf(line, sizeof line, "$P train run.ini -n %d --steps 2 --set run.out=%s %s", ranks, out, closed[i]);
      r = shell(line);
      char *state = final_state(out);
      cr_expect_eq(r.status, 0, "%d ranks, %s: status %d\n%s", ranks, closed[i], r.status, r.out);
      cr_expect(state && strcmp(state, want) == 0, "%d ranks, %s: %s", ranks, closed[i], state ? state : "no state");
      free(state);
      command_free(&r);
    }
    free(want);
  }
}

/* `true` reads nothing and leaves: every line of the run is written into a pipe without a reader. */
Test(process, a_reader_that_leaves) {
  for (int ranks = 1; ranks <= 2; ranks++) {
    char line[300], out[32];
    snprintf(out, sizeof out, "left%d", ranks);
    snprintf(line, sizeof line,
             "$P train run.ini -n %d --steps 20 --set run.out=%s --set run.log_every=1 2>said | true; "
             "exit ${PIPESTATUS[0]}",
             ranks, out);
    command_result r = shell(line);
    char *state = final_state(out);
    cr_expect_eq(r.status, 0, "%d ranks: status %d\n%s", ranks, r.status, r.out);
    cr_expect(state, "%d ranks: no final state", ranks);
    free(state);
    command_free(&r);
  }
  command_result r = shell("$P check run.ini | true; exit ${PIPESTATUS[0]}");
  cr_expect_eq(r.status, 0, "check: status %d", r.status);
  cr_expect_str_empty(r.out);
  command_free(&r);
}

Test(process, output_that_cannot_be_written) {
  command_result r = shell("$P check run.ini >/dev/full");
  cr_expect_eq(r.status, 3, "check: status %d", r.status);
  cr_expect(strstr(r.out, "phalanx: standard output could not be written: No space left on device"), "%s", r.out);
  command_free(&r);
  r = shell("$P train run.ini -n 2 --steps 2 --set run.out=full >/dev/full"); /* its result is in run.out */
  cr_expect_eq(r.status, 0, "train: status %d\n%s", r.status, r.out);
  cr_expect(strstr(r.out, "phalanx: standard output could not be written"), "%s", r.out);
  command_free(&r);
}

/* The limit is an error of the write that meets it, and never SIGXFSZ. */
Test(process, limit_of_a_files_size) {
  for (int kib = 1; kib <= 64; kib *= 8) {
    char line[200];
    snprintf(line, sizeof line, "ulimit -f %d; $P train run.ini -n 2 --steps 20 --set run.out=limited%d", kib, kib);
    command_result r = shell(line);
    cr_expect(r.status == 0 || r.status == 2 || r.status == 3, "ulimit -f %d: status %d\n%s", kib, r.status, r.out);
    cr_expect(r.status == 0 || strstr(r.out, "File too large"), "ulimit -f %d: status %d\n%s", kib, r.status, r.out);
    cr_expect_null(strstr(r.out, "SIGXFSZ"), "%s", r.out);
    command_free(&r);
  }
}

/* More token files than the soft limit of open files. */
Test(process, many_files) {
  unsigned short tokens[9];
  for (int i = 0; i < 80; i++) {
    char name[32];
    snprintf(name, sizeof name, "part-%03d.bin", i);
    for (int k = 0; k < 9; k++) tokens[k] = (unsigned short)((i * 7 + k * 3) % 257);
    command_write_file(dir, name, tokens, sizeof tokens);
  }
  command_result r =
      shell("ulimit -Sn 48; $P train run.ini -n 2 --steps 45 --set data.train=part-*.bin --set run.out=soft");
  cr_expect_eq(r.status, 0, "status %d\n%s", r.status, r.out);
  command_free(&r);
}

/* ---- memory: no machine has as much as these take ---- */
#define HUGE_MODEL "--set model.width=65536 --set model.heads=1024 --set model.layers=96"
#define HUGE_BATCH "--set batch.micro=1048576 --set batch.accumulate=4"

static void expect_no_room(const char *command, const char *start) {
  char line[500];
  snprintf(line, sizeof line, "%s $P %s run.ini " HUGE_MODEL " --set run.out=none", start, command);
  command_result r = shell(line);
  cr_expect_eq(r.status, 2, "%s: status %d\n%s", line, r.status, r.out);
  cr_expect(strstr(r.out, "phalanx:") && strstr(r.out, "for each process), and ") && strstr(r.out, " are available"),
            "%s", r.out);
  command_free(&r);
  r = shell("test -e none");
  cr_expect_eq(r.status, 1, "%s: the run's directory was made", line);
  command_free(&r);
}

Test(process, a_plan_without_room_is_refused) {
  expect_no_room("train", "");
  expect_no_room("train -n 2", "");
  expect_no_room("train", "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 "
                          "MASTER_PORT=29411 TORCHELASTIC_RUN_ID=room");
}

/* A step of so many sequences needs as many in the data: over nine million. */
#define MANY_SEQUENCES "--set data.train='big*.bin'"
static void make_many_sequences(void) {
  command_result r = shell("for i in {1..106}; do cat train.bin; done > big1.bin && "
                           "for i in {2..17}; do ln big1.bin big$i.bin; done");
  cr_assert_eq(r.status, 0, "%s", r.out);
  command_free(&r);
}

/* `check` says the same, with the plan; what it advises fits, and keeps the sequences of a step. */
Test(process, what_is_advised_has_room) {
  char line[500];
  long long micro = 0, accumulate = 0;
  make_many_sequences();
  command_result r = shell("$P check run.ini " MANY_SEQUENCES " -n 2 --set model.width=512 " HUGE_BATCH);
  cr_assert_eq(r.status, 2, "status %d\n%s", r.status, r.out);
  cr_expect(strstr(r.out, "it does not fit") && strstr(r.out, "; The plan:"), "%s", r.out);
  const char *advice = strstr(r.out, "are available; batch.micro = ");
  cr_assert(advice, "%s", r.out);
  cr_assert_eq(sscanf(advice, "are available; batch.micro = %lld, batch.accumulate = %lld takes", &micro, &accumulate),
               2);
  cr_expect_eq(micro * accumulate, 4 * 1048576);
  command_free(&r);
  snprintf(line, sizeof line, "$P check run.ini " MANY_SEQUENCES " -n 2 --set model.width=512 --set batch.micro=%lld "
           "--set batch.accumulate=%lld", micro, accumulate);
  r = shell(line);
  cr_expect_eq(r.status, 0, "%s: status %d\n%s", line, r.status, r.out);
  cr_expect(strstr(r.out, ": it fits"), "%s", r.out);
  command_free(&r);
  snprintf(line, sizeof line, "$P check run.ini " MANY_SEQUENCES " -n 2 --set model.width=512 --set batch.micro=%lld",
           4 * micro);
  r = shell(line);
  cr_expect_eq(r.status, 2, "four times as many fit, too: %s", r.out);
  command_free(&r);
}

Test(process, overcommit_says_it_and_goes_on) {
  make_many_sequences();
  command_result r = shell("$P check run.ini " MANY_SEQUENCES " -n 2 --set model.width=512 "
                           "--set run.overcommit=yes " HUGE_BATCH);
  cr_expect_eq(r.status, 0, "status %d\n%s", r.status, r.out);
  cr_expect(strstr(r.out, "warn: 2 ranks take "), "%s", r.out);
  command_free(&r);
}

/* Ranks that share a CPU wait for each other: that is said once, whoever asked for it. */
Test(process, more_threads_than_cpus_is_said) {
  static const struct {
    const char *line, *said;
  } cases[] = {
      {"taskset -c 0 $P train run.ini -n 2 --steps 1 --set device.threads=2",
       "2 ranks of 2 threads on 1 CPU: they wait"},
      {"taskset -c 0 $P train run.ini -n 3 --steps 1", "3 ranks of 1 thread on 1 CPU: they wait"},
      {"taskset -c 0 $P train run.ini -n 1 --steps 1", NULL},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    command_result r = shell(cases[i].line);
    const char *at = strstr(r.out, ": they wait for each other, which is slow");
    cr_expect_eq(r.status, 0, "%s: status %d\n%s", cases[i].line, r.status, r.out);
    if (cases[i].said) cr_expect(strstr(r.out, cases[i].said), "%s:\n%s", cases[i].line, r.out);
    else cr_expect_null(at, "%s:\n%s", cases[i].line, r.out);
    if (at) cr_expect_null(strstr(at + 1, ": they wait for each other"), "said twice:\n%s", r.out);
    command_free(&r);
  }
}
