/* A strategy that is wrong is not believed: each misuse of tests/plugins/hostile is run for a step or two, and found by
 * name.  What must be found is written here as a part of the message; `none` is the same runs without a misuse. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "training.h"

typedef struct misuse {
  const char *name;  /* of HOSTILE_MISUSES; may be followed by " hostile.key=value" */
  int status;        /* of the command */
  const char *says;  /* part of its output */
} misuse;

static const char hostile_model[] =
    "[batch]\nmicro = 1\nsequence = 33\n"
    "[model]\nplugin = gpt\nlayers = 2\nheads = 3\nwidth = 30\ncontext = 33\nvocab = 257\n"
    "[plugins]\npath = %s\n";

static char *hostile_dir(void) {
  char *dir = command_temp_dir(), extra[1024];
  snprintf(extra, sizeof extra, hostile_model, PHX_TEST_ONLY_PLUGINS);
  training_files(dir, extra);
  return dir;
}

/* "visit_unit rank=1" of the plugin: --set arguments, in texts. */
static size_t options_of(const char *plugin, const char *name, char texts[4][96], const char *args[8]) {
  size_t n = 0;
  for (; *name && n < 4; n++) {
    const size_t length = strcspn(name, " ");
    const bool option = memchr(name, '=', length) != NULL;
    snprintf(texts[n], sizeof texts[n], "%s.%s%.*s", plugin, option ? "" : "misuse=", (int)length, name);
    args[2 * n] = "--set";
    args[2 * n + 1] = texts[n];
    name += length + (name[length] == ' ');
  }
  return 2 * n;
}

static void run_one(const char *dir, const char *command, const char *plugin, const char *ranks, const char *steps,
                    const misuse *m) {
  char texts[4][96];
  const char *options[8], *argv[32] = {"phalanx", command, "run.ini", "-n", ranks, "--steps", steps,
                                       strcmp(command, "compare") ? "--strategy" : "--strategies", plugin};
  size_t n = 9;
  const size_t n_options = options_of(plugin, m->name, texts, options);
  memcpy(argv + n, options, n_options * sizeof *options);
  command_result r = command_run(dir, 60, argv);
  cr_expect_eq(r.status, m->status, "%s of %s on %s ranks: status %d instead of %d:\n%s", m->name, plugin, ranks,
               r.status, m->status, r.out);
  cr_expect(!m->says || strstr(r.out, m->says), "%s of %s on %s ranks: '%s' is not in:\n%s", m->name, plugin, ranks,
            m->says, r.out);
  command_free(&r);
}

static void run_all(const char *command, const char *plugin, const char *ranks, const char *steps, const misuse *m,
                    size_t n) {
  char *dir = hostile_dir();
  for (size_t i = 0; i < n; i++) run_one(dir, command, plugin, ranks, steps, &m[i]);
  command_remove_dir(dir);
}
#define RUN_ALL(command, plugin, ranks, steps, list) \
  run_all(command, plugin, ranks, steps, list, sizeof list / sizeof *list)

/* ---- the plan ---- */
static const misuse impossible_plans[] = {
    {"plan_negative", 2, "hostile plans -1 bytes of weights: expected 0 to 1125899906842624"},
    {"plan_most", 2, "hostile plans 9223372036854775807 bytes of weights"},
    {"plan_arena", 2, "hostile plans -4096 bytes with a communicator"},
    {"plan_state", 2, "hostile plans -1 bytes of state"},
    {"sent_negative", 2, "hostile plans -5 bytes sent by all_reduce"},
    {"sent_most", 2, "hostile plans 9223372036854775807 bytes sent by all_reduce"},
    {"sent_uncalled", 2, "hostile plans 4096 bytes sent by all_to_all in no call"},
    {"calls_negative", 2, "hostile plans -9223372036854775808 calls of all_reduce"},
    {"layout_rank", 2, "hostile: layout gave data rank -1 of 2, in a world of 2"},
    {"layout_size", 2, "hostile: layout gave data rank 0 of 2147483647, in a world of 2"},
    {"layout_slots", 2, "hostile: layout gave 0 activation slots"},
    {"layout_axes", 2, "hostile: layout gave 1000 axes"},
};
Test(hostile, impossible_plans_are_refused, .timeout = 120) { RUN_ALL("train", "hostile", "2", "1", impossible_plans); }

/* compare ends with 1 and names rank, kind and both numbers; the numbers are those of ddp's plan. */
static const misuse broken_plans[] = {
    {"none", 0, "plan kept: memory by kind and traffic by collective were as planned, on every rank"},
    {"plan_half rank=1", 1, "rank 1: optimizer: 139264 bytes planned, 278528 measured"},
    {"plan_triple rank=0", 1, "rank 0: optimizer: 835584 bytes planned, 278528 measured"},
    {"sent_half rank=1", 1, "rank 1: all_reduce: 69632 bytes a step planned, 139264 measured"},
    {"calls_seven", 1, "rank 0: all_reduce: 7 calls a step planned, 1 measured"},
    {"hidden_create rank=1", 1, "rank 1: the strategy's calls until the first step took 6"},
    {"hidden_step step=3", 1, "rank 0: the steps after the first took 6"},
};
Test(hostile, compare_says_who_did_not_keep_its_plan, .timeout = 120) {
  RUN_ALL("compare", "hostile", "2", "4", broken_plans);
}

/* train goes on: the run is what it is, and the warning names the rank. */
static const misuse warned_plans[] = {
    {"plan_half rank=1", 0, "warn: the plan was not kept: rank 1: optimizer: 139264 bytes planned, 278528 measured"},
};
Test(hostile, train_warns_of_a_plan_that_was_not_kept, .timeout = 120) {
  RUN_ALL("train", "hostile", "2", "2", warned_plans);
}
