/* What the overhead of a strategy is measured against must compute the same: bare's bits are ddp's on one rank.  And
 * the pretended wire changes the time of a run, not its numbers. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

#include "training.h"

Test(bare, same_bits_as_ddp, .timeout = 120) {
  char *dir = command_temp_dir();
  char extra[1024];
  snprintf(extra, sizeof extra, "%sfreeze = h.1.*,wpe.*\n[plugins]\npath = %s\n", training_odd_model,
           PHX_TEST_ONLY_PLUGINS);
  training_files(dir, extra);
  command_result r = RUN(dir, 100, "compare", "run.ini", "-n", "1", "--strategies", "ddp,bare");
  cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
  cJSON *json = training_json(dir, "out/compare.json");
  cr_assert(cJSON_IsTrue(training_get(json, "equal_bits")), "%s", r.out);
  const cJSON *list = training_get(json, "strategies"), *s;
  cr_assert_eq(cJSON_GetArraySize(list), 2);
  cJSON_ArrayForEach(s, list) training_check_plan(s, training_get(s, "strategy")->valuestring);
  cJSON_Delete(json);
  command_free(&r);
  command_remove_dir(dir);
}

Test(bare, refuses_what_it_cannot, .timeout = 60) {
  char *dir = command_temp_dir();
  char extra[1024];
  snprintf(extra, sizeof extra, "%s[plugins]\npath = %s\n", training_odd_model, PHX_TEST_ONLY_PLUGINS);
  training_files(dir, extra);
  command_result r = RUN(dir, 30, "train", "run.ini", "-n", "2", "--strategy", "bare");
  cr_assert_eq(r.status, 2, "status %d:\n%s", r.status, r.out);
  command_free(&r);
  r = RUN(dir, 30, "train", "run.ini", "--strategy", "bare", "--set", "batch.accumulate=2");
  cr_assert_eq(r.status, 2, "status %d:\n%s", r.status, r.out);
  command_free(&r);
  command_remove_dir(dir);
}

/* Two ranks, ddp: the wire must cost its time where nothing hides it, and no bit. */
Test(wire, takes_its_time_and_changes_no_bit, .timeout = 120) {
  static const char *const bandwidth[] = {"wire.bandwidth=0", "wire.bandwidth=2e6"};
  char *dir = command_temp_dir();
  char extra[1024], hash[2][40];
  double ms[2], sent = 0;
  snprintf(extra, sizeof extra, "%s[plugins]\npath = %s\n", training_odd_model, PHX_TEST_ONLY_PLUGINS);
  training_files(dir, extra);
  for (int i = 0; i < 2; i++) {
    command_result r = RUN(dir, 50, "train", "run.ini", "-n", "2", "--set", "comm.plugin=wire", "--set", bandwidth[i],
                           "--set", "run.steps=6");
    cr_assert_eq(r.status, 0, "status %d:\n%s", r.status, r.out);
    cJSON *json = training_json(dir, "out/run.json");
    const cJSON *result = training_get(json, "result");
    training_check_plan(result, bandwidth[i]);
    snprintf(hash[i], sizeof hash[i], "%s", training_get(result, "state_hash")->valuestring);
    ms[i] = training_get(result, "step_ms")->valuedouble;
    sent = cJSON_GetArrayItem(training_get(result, "sent.all_reduce.planned"), 0)->valuedouble;
    cJSON_Delete(json);
    command_free(&r);
  }
  cr_assert_str_eq(hash[0], hash[1]);
  /* one bucket after another, the last begins when backward is over: at least its part cannot be hidden */
  cr_assert_geq(ms[1], 0.9 * 1e3 * sent / 2e6, "%g ms for %g bytes", ms[1], sent);
  command_remove_dir(dir);
}
