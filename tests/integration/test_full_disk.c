/* A run on a disk that is full, from the beginning, for a while or to the end.  The disk is a small tmpfs in a mount
 * namespace of the test's own; without the right to make one the tests are skipped. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

static const char tiny_model[] = /* a checkpoint of 204 KiB, weights of 67 KiB */
    "[checkpoint]\nkeep = 2\n[batch]\nmicro = 1\nsequence = 9\naccumulate = 50\n"
    "[model]\nplugin = gpt\nlayers = 2\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

static char *dir;
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, tiny_model);
  command_result r = command_run(dir, 20, (const char *const[]){"/usr/bin/unshare", "-m", "mount", "-t", "tmpfs",
                                                                "-o", "size=1m", "none", dir, NULL});
  const int may = r.status == 0;
  command_free(&r);
  if (!may) cr_skip_test("needs the right to mount (root)");
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(full_disk, .init = setup, .fini = teardown, .timeout = 120);

/* `script` with a tmpfs of `size` in disk/.  train WORDS: a run on it; background WORDS: the same, while the script
 * goes on; await FILE TEXT: until the file says so; fill and free: the disk; what is to be kept is copied to kept/. */
static command_result on_disk(const char *size, const char *script) {
  static const char head[] =
      "mkdir -p disk kept && mount -t tmpfs -o size=%s none disk || exit 99\n"
      "command='%s train run.ini --set run.out=disk/out --set optimizer.schedule=constant'\n"
      "train() { $command \"$@\"; }\n"
      "background() { (exec $command \"$@\") >said 2>&1 & pid=$!; }\n"
      "await() { for i in $(seq 3000); do grep -q \"$2\" \"$1\" 2>/dev/null && return; sleep 0.01; done\n"
      "  echo \"no '$2' in $1\"; cat said; kill -9 $pid; exit 98; }\n"
      "fill() { (while :; do cat /dev/zero >>disk/fill 2>/dev/null; sleep 0.01; done) & filler=$!; }\n"
      "free() { kill $filler; wait $filler; rm disk/fill; }\n"
      "end() { wait $pid; status=$?; cat said; cp -r disk/out kept/; kill $filler 2>/dev/null; exit $status; }\n";
  char text[4096];
  const int n = snprintf(text, sizeof text, head, size, PHX_TEST_COMMAND);
  snprintf(text + n, sizeof text - (size_t)n, "%s", script);
  return command_run(dir, 100, (const char *const[]){"/usr/bin/unshare", "-m", "/bin/bash", "-c", text, NULL});
}

#define EXPECT(r, expected)                                        \
  cr_assert_eq((r).status, expected, "status %d:\n%s", (r).status, \
               (r).out + (strlen((r).out) > 6000 ? strlen((r).out) - 6000 : 0))
#define SAYS(r, text) cr_expect(strstr((r).out, text), "no '%s' in\n%s", text, (r).out)
static int times(const char *text, const char *part) {
  int n = 0;
  for (const char *at = text; (at = strstr(at, part)); at++) n++;
  return n;
}

static int steps_in_a_row(void) {
  char *text = command_read_file(dir, "kept/out/metrics.jsonl");
  int n = 0;
  cr_assert_not_null(text);
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
    int step = 0;
    cJSON *json = cJSON_Parse(line);
    cr_assert_not_null(json, "no JSON: %s", line);
    cJSON_Delete(json);
    if (sscanf(line, "{\"step\":%d,", &step) == 1) cr_assert_eq(step, ++n, "step %d follows %d", step, n - 1);
  }
  free(text);
  return n;
}

Test(full_disk, no_room_at_the_start_is_refused) {
  command_result r = on_disk("240k", "train --set checkpoint.every=5; s=$?; ls -A disk; exit $s");
  EXPECT(r, 2);
  SAYS(r, "run.out: a checkpoint and the final weights take ");
  SAYS(r, "free");
  cr_expect_eq(times(r.out, "\n"), 1, "something was left: %s", r.out);
  command_free(&r);
  r = on_disk("240k", "train"); /* room for the weights alone */
  EXPECT(r, 0);
  command_free(&r);
  r = on_disk("40k", "train");
  EXPECT(r, 2);
  SAYS(r, "run.out: the final weights take ");
  command_free(&r);
  /* what a dead save left counts as free */
  r = on_disk("600k", "train --set checkpoint.every=5 --set run.steps=5 && mkdir disk/out/checkpoints/.step-9.part &&"
                      "head -c 200000 /dev/zero >disk/out/checkpoints/.step-9.part/rank-00000.safetensors &&"
                      "rm disk/out/model.safetensors && train --resume --set run.steps=6 --set checkpoint.keep=1");
  EXPECT(r, 0);
  command_free(&r);
}

/* Lines wait in memory, saves are warnings, and when there is room again nothing is missing. */
Test(full_disk, for_a_while) {
  command_result r = on_disk(
      "4m",
      "background --set checkpoint.every=1000000 --set run.steps=1000000 --set run.log_every=1000000\n"
      "await disk/out/metrics.jsonl '\"step\":3'; fill\n"
      "await said 'cannot be written: No space left on device'; sleep 0.1; free\n"
      "await said 'is written again, and nothing is missing'; kill -TERM $pid; end");
  EXPECT(r, 5);
  cr_expect_eq(times(r.out, "cannot be written"), 1, "%s", r.out);
  command_free(&r);
  cr_expect_gt(steps_in_a_row(), 3);
}

/* Saves fail: after checkpoint.max_failures of them the run stops, and the checkpoint before is whole. */
static void check_failures(const char *words, int failures) {
  char script[1024];
  snprintf(script, sizeof script,
           "background %s --set checkpoint.every=2 --set run.steps=1000000 --set run.log_every=1000000\n"
           "await said 'step 2 saved'; fill; end",
           words);
  command_result r = on_disk("4m", script);
  EXPECT(r, 3);
  cr_expect_eq(times(r.out, "was not saved: "), failures, "%s", r.out);
  cr_expect_geq(times(r.out, "training goes on"), failures - 1);
  char said[100];
  snprintf(said, sizeof said, "%d saves in a row failed (checkpoint.max_failures)", failures);
  SAYS(r, said);
  SAYS(r, "the newest checkpoint is of step ");
  command_free(&r);
  r = RUN(dir, 60, "checkpoint", "verify", "kept/out");
  EXPECT(r, 0);
  command_free(&r);
  r = command_run(dir, 20, (const char *const[]){"/bin/sh", "-c", "ls -A kept/out/checkpoints | grep -c part", NULL});
  cr_expect_str_eq(r.out, "0\n", "a half save was left");
  command_free(&r);
}
Test(full_disk, saves_fail_in_one_rank) { check_failures("--set checkpoint.background=no", 3); }
Test(full_disk, saves_fail_in_two_ranks) { check_failures("-n 2 --set checkpoint.max_failures=2", 2); }

Test(full_disk, to_the_end) {
  command_result r = on_disk("2m",
                             "background --set checkpoint.every=2 --set checkpoint.max_failures=0 --set run.steps=60 "
                             "--set batch.accumulate=100\n"
                             "await said 'step 2 saved'; fill; end");
  EXPECT(r, 3);
  cr_expect_gt(times(r.out, "was not saved: "), 3, "%s", r.out);
  SAYS(r, "model.safetensors");
  SAYS(r, "; nor was the last step's checkpoint: ");
  cr_expect_eq(times(r.out, "metrics.jsonl cannot be written: its last lines"), 1, "%s", r.out);
  command_free(&r);
  r = command_run(dir, 20, (const char *const[]){"/bin/sh", "-c", "find kept -name '*.part' -o -name 'model.*'", NULL});
  cr_expect_str_eq(r.out, "", "a half file was left");
  command_free(&r);
  cJSON *json = training_json(dir, "kept/out/run.json");
  cr_expect(json && !training_get(json, "result"), "run.json says that the run ended well");
  cJSON_Delete(json);
}
