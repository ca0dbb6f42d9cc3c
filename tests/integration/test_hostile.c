/* A strategy that is wrong is not believed: each misuse of tests/plugins/hostile is run for a step or two, and found by
 * name.  What must be found is written here as a part of the message; `none` is the same runs without a misuse. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sanitizer.h"
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
    {"layout_axes", 2, "hostile: layout gave 1000 axes; there is room for 8"},
    {"plan_kind", 2, "hostile plans 4096 bytes of memory kind 8, which this phalanx does not have"},
    {"calls_unknown", 2, "hostile plans 2 calls of collective 10, which this phalanx does not have"},
    {"plan_period", 2, "hostile plans its traffic for periods of 4 steps; this phalanx measures single steps"},
    {"layout_flag", 2, "hostile: layout gave flag 40, which this phalanx does not know"},
    {"layout_norm", 2, "hostile: layout gave flag 1, which this phalanx has reserved and cannot honour yet"},
    {"layout_differ", 2, "hostile: its replicas differ by design (layout), and yet it promises the same bits"},
    {"layout_terms", 2, "hostile: layout gave -3 terms of a gradient: expected 0 (the plain sum), 1 (a mean)"},
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

/* ---- state ---- */
/* From here on messages are of the rank that is alone with its misuse, where replicas that are all wrong alike are not
 * wrong: `rank` -1 is all ranks. */
static const misuse wrong_state[] = {
    {"none", 0, NULL},
    {"visit_nothing", 3, "visit_state: the ranks together named 0 of 8192 elements of the weights of unit 0 (wte)"},
    {"visit_missing", 3, "visit_state: the ranks together named 0 of 8192 elements of v of unit 0 (wte)"},
    {"visit_twice", 3, "visit_state: this rank names blocks of unit 0 (wte), state 2, more than once"},
    {"visit_moved rank=1", 3, "visit_state: this rank names blocks of unit 3 (h.1), state 0, more than once"},
    {"visit_beyond", 3, "visit_state: 1008 blocks from 0 on, of unit 0 (wte), which has 8"},
    {"visit_before", 3, "visit_state: 8 blocks from -1 on, of unit 0 (wte), which has 8"},
    {"visit_unit", 3, "visit_state: unit 9999; the model has 5"},
    {"visit_flat", 3, "visit_state: optimizer state of flat 7"},
    {"visit_kind", 3, "visit_state: state of kind 99"},
    {"visit_index", 3, "visit_state: optimizer state 9; adamw has 2"},
    {"visit_dtype", 3, "visit_state: state of kind 2 has dtype 99; expected 1"},
    {"visit_place", 3, "visit_state: place 9 is no PHX_SPACE_*"},
    {"visit_empty", 3, "visit_state: 0 blocks from 0 on, of unit 0 (wte)"},
    {"visit_size", 3, "visit_state: a slice's struct_size is 8; expected 64 or more"},
    {"visit_null", 3, "visit_state named no slice (NULL)"},
    {"visit_nameless", 3, "visit_state: private state without a name"},
    {"visit_numel", 3, "visit_state: a slice has numel 5, which is reserved: expected 0"},
    {"map_null", 3, "map: the memory of state 0 of unit 0 (wte) is NULL"},
    {"map_unaligned", 3, "1, which is no multiple of 4 bytes"},
    {"map_beyond", 3, "unit 4 (ln_f) takes 4096 bytes, and the allocation that it begins in ends before"},
    {"changed_nothing", 3, "acquire: at start this rank computes with another 'h.0.mlp.c_proj.weight' than the state"},
    {"changed_one rank=1", 3, "acquire: at start this rank computes with another 'wte.weight' than the state"},
};
Test(hostile, wrong_state_is_found, .timeout = 120) { RUN_ALL("train", "hostile", "2", "1", wrong_state); }

static const misuse wrong_shards[] = {
    {"none", 0, NULL},
    {"visit_nothing", 3, "visit_state: the ranks together named 0 of 8192 elements of the weights of unit 0 (wte)"},
    {"visit_missing", 3, "visit_state: the ranks together named 0 of 8192 elements of v of unit 0 (wte)"},
    {"visit_twice", 3, "visit_state: the ranks together named 16384 of 8192 elements of m of unit 0 (wte)"},
    {"visit_unit", 3, "visit_state: unit 9999; the model has 5"},
    {"view_stale", 3, "this rank computes with another 'wpe.weight' than the state"},
    {"view_write", 3, "gradient_norm: the gradient of wte.weight, element 0, is 0; what the ranks computed adds up to"},
    {"view_gradient", 3, "acquire, stage 3: the gradient of wte.weight is NULL; in stage 3 (head), backward"},
    {"reduce_nothing", 3, "gradient_norm: the gradient of wte.weight, element 0, is"},
    {"norm_missing", 3, "gradient_norm: the ranks together added 0 of 8192 elements of the gradients of unit 0 (wte)"},
    {"norm_twice", 3, "gradient_norm: the ranks together added 16384 of 8192 elements of the gradients of unit 0"},
    {"norm_other rank=1", 3, "gradient_norm: the gradient of wte.weight, element"},
    {"ticket_missing", 3, "update: the ranks together updated 0 of 7710 elements of the weights of unit 0 (wte)"},
    {"ticket_missing rank=1", 3, "update: the ranks together updated 4096 of 7710 elements of the weights of unit 0"},
    {"ticket_twice", 3, "update: this rank updates element 0 of unit 0 (wte) more than once"},
    {"ticket_other rank=1", 3, "update: the gradient of wte.weight, element"},
};
Test(hostile, wrong_shards_are_found, .timeout = 120) { RUN_ALL("train", "hostile_shard", "2", "1", wrong_shards); }

/* ---- views, gradients, the norm, tickets ---- */
static const misuse wrong_views[] = {
    {"view_null", 3, "acquire, stage 0 gave no view (NULL) and PHX_OK"},
    {"view_size", 3, "acquire, stage 0: the view's struct_size is 8; expected 32 or more"},
    {"view_params", 3, "acquire, stage 0: the view has 2 parameters at (nil); expected 2"},
    {"view_count", 3, "acquire, stage 0: the view has 1 parameters at"},
    {"view_stride", 3, "acquire, stage 0: the view's param_stride is 4; expected 32"},
    {"view_param", 3, "acquire, stage 0: the view has parameter 9999 where 1 (wpe.weight) is expected"},
    {"view_weight", 3, "acquire, stage 0: the weight of wpe.weight is NULL"},
    {"view_dtype", 3, "acquire, stage 0: the weight of wpe.weight has dtype 4; expected 1"},
    {"view_gradient", 3, "acquire, stage 3: the gradient of wte.weight is NULL; in stage 3 (head), backward"},
    {"view_gradient_dtype", 3, "acquire, stage 3: the gradient of wte.weight has dtype 3; expected 1"},
    {"view_mode", 3, "acquire, stage 3: the gradient of wte.weight has mode 9: neither write nor add"},
    {"view_unaligned", 3, "2, which is no multiple of 256 bytes"},
    {"view_beyond", 3, "the weight of wte.weight takes 30840 bytes, and the allocation that it begins in ends before"},
    {"view_write", 3, "gradient_norm: the gradient of wte.weight, element 0, is 0; what the ranks computed adds up to"},
    {"view_stale step=1", 3, "after the last step this rank computes with another 'wpe.weight' than the state"},
};
Test(hostile, wrong_views_are_found, .timeout = 120) { RUN_ALL("train", "hostile", "2", "1", wrong_views); }

static const misuse wrong_gradients[] = {
    {"reduce_nothing", 3, "gradient_norm: the gradient of wte.weight, element 0, is"},
    {"reduce_nothing step=2", 3, "gradient_norm: the gradient of wte.weight, element 0, is"},
    {"reduce_half", 3, "gradient_norm: the gradient of"},
    {"norm_nothing", 3, "gradient_norm: the ranks together added 0 of 8192 elements of the gradients of unit 0 (wte)"},
    {"norm_missing", 3, "gradient_norm: the ranks together added 0 of 8192 elements of the gradients of unit 0 (wte)"},
    {"norm_twice", 3, "gradient_norm: this rank adds blocks of unit 0 (wte) more than once"},
    {"norm_beyond", 3, "gradient_norm: 8 blocks from 1000 on, of unit 0 (wte), which has 8"},
    {"norm_before", 3, "gradient_norm: 8 blocks from -1 on, of unit 0 (wte), which has 8"},
    {"norm_unit", 3, "gradient_norm: unit 9999; the model has 5"},
    {"norm_empty", 3, "gradient_norm: 0 blocks from 0 on, of unit 0 (wte), which has 8"},
    {"norm_null", 3, "gradient_norm: the gradient of unit 0 (wte) is NULL"},
    {"norm_unaligned", 3, "1, which is no multiple of 4 bytes"},
    {"norm_other rank=0", 3, "gradient_norm: the gradient of wte.weight, element 7, is"},
};
Test(hostile, wrong_gradients_are_found, .timeout = 120) { RUN_ALL("train", "hostile", "2", "2", wrong_gradients); }

static const misuse wrong_tickets[] = {
    {"ticket_cut", 0, NULL}, /* no misuse where the optimizer takes any part */
    {"ticket_nothing", 3, "update: the ranks together updated 0 of 7710 elements of the weights of unit 0 (wte)"},
    {"ticket_missing", 3, "update: the ranks together updated 0 of 7710 elements of the weights of unit 0 (wte)"},
    {"ticket_twice", 3, "update: this rank updates element 0 of unit 0 (wte) more than once"},
    {"ticket_beyond", 3, "ticket for unit 0 (wte), 1032192 elements from 0 on: out of range, it has 8192"},
    {"ticket_before", 3, "ticket for unit 0 (wte), 8192 elements from -4 on: out of range, it has 8192"},
    {"ticket_negative", 3, "ticket for unit 0 (wte), -9223372036854775808 elements from 0 on: out of range"},
    {"ticket_unit", 3, "update: ticket for unit 9999; the model has 5"},
    {"ticket_size", 3, "update: a ticket's struct_size is 8; expected 136 or more"},
    {"ticket_null", 3, "update: no ticket (NULL)"},
    {"ticket_weight", 3, "update: the weight of unit 0 (wte) is NULL"},
    {"ticket_gradient", 3, "update: the gradient of unit 0 (wte) is NULL"},
    {"ticket_state", 3, "update: the v of unit 0 (wte) is NULL"},
    {"ticket_dtype", 3, "update: the weight of unit 0 (wte) has dtype 99"},
    {"ticket_place", 3, "update: place 9 is no PHX_SPACE_*"},
    {"ticket_unaligned", 3, "1, which is no multiple of 4 bytes"},
    {"ticket_overrun", 3, "update: the m of unit 4 (ln_f) takes 4096 bytes, and the allocation that it begins in ends"},
    {"ticket_other", 3, "update: the gradient of wte.weight, element 7, is"},
    {"ticket_scale", 3, "update: a ticket's scale is"},
    {"weights_drift rank=1", 3, "after the last step this rank computes with another 'wte.weight' than the state"},
};
Test(hostile, wrong_tickets_are_found, .timeout = 120) { RUN_ALL("train", "hostile", "2", "1", wrong_tickets); }

/* ---- replicas that drift apart ---- */
typedef struct drift {
  misuse what;
  const char *plugin, *every, *set; /* set: one more option, or NULL */
} drift;

/* Three ranks, of which rank 1 is alone with its misuse; learning is so slow that a state's error changes no weight. */
static const drift drifts[] = {
    {{"weights_drift rank=1", 3, "step 1: the ranks' weights have drifted apart: 'wte.weight' is the first of "},
     "hostile", "run.drift_every=1", NULL},
    {{"weights_drift rank=1 step=2", 3, "step 3: the ranks' weights have drifted apart: 'wte.weight' is the first of "},
     "hostile", "run.drift_every=3", NULL},
    {{"weights_drift rank=1", 0, NULL}, "hostile", "run.drift_every=0", NULL},
    {{"frozen_drift rank=1 step=1", 3, "step 1: the ranks' weights have drifted apart: 'wpe.weight' is the first of "},
     "hostile", "run.drift_every=1", "model.freeze=wpe.*"},
    {{"state_drift rank=1", 3, "step 1: the ranks' optimizer states m have drifted apart: 'ln_f.weight' is the first "
                               "of 1 tensors that differ, rank 1 against rank 0 and those that agree with it"},
     "hostile", "run.drift_every=1", NULL},
    {{"state_drift rank=1 sharding=none", 3, "step 2: the ranks' optimizer states m have drifted apart: 'ln_f.weight'"},
     "hostile_shard", "run.drift_every=2", NULL},
    {{"state_drift rank=1 sharding=full", 0, NULL}, "hostile_shard", "run.drift_every=1", NULL}, /* no replicas */
    {{"master_jump rank=1", 3, "step 1: the ranks' weights have drifted apart: 'wte.weight' is the first of "},
     "hostile", "run.drift_every=1", "precision.compute=bf16"},
    {{"master_drift rank=1", 3, "step 1: the ranks' masters have drifted apart: 'wte.weight' is the first of 1 "},
     "hostile", "run.drift_every=1", "precision.compute=bf16"},
    /* at the start, asked for or not where weights are replicas */
    {{"changed_one rank=1", 3, "at the start: the ranks' weights have drifted apart: 'wte.weight' is the first of 1 "
                               "tensors that differ, rank 1 against rank 0 and those that agree with it"},
     "hostile", "run.drift_every=0", NULL},
    {{"changed_one rank=1 sharding=none", 3, "at the start: the ranks' weights have drifted apart: 'wte.weight'"},
     "hostile_shard", "run.drift_every=3", NULL},
    {{"none", 0, NULL}, "hostile", "run.drift_every=1", "precision.compute=bf16"},
};

Test(hostile, replicas_that_drift_apart_are_named, .timeout = 120) {
  char *dir = hostile_dir();
  for (size_t i = 0; i < sizeof drifts / sizeof *drifts; i++) {
    const drift *c = &drifts[i];
    char texts[4][96];
    const char *options[8];
    const char *argv[32] = {"phalanx", "train", "run.ini", "-n", "3", "--steps", "4", "--strategy", c->plugin,
                            "--set", "run.checked=no", "--set", "optimizer.lr=1e-12", "--set", c->every, "--set",
                            c->set ? c->set : "run.valid_every=0"};
    memcpy(argv + 17, options, options_of(c->plugin, c->what.name, texts, options) * sizeof *options);
    command_result r = command_run(dir, 60, argv);
    cr_expect(r.status == c->what.status && (!c->what.says || strstr(r.out, c->what.says)),
              "%s of %s, %s: status %d:\n%s", c->what.name, c->plugin, c->every, r.status, r.out);
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* What costs nothing is looked at in every run, without [run] checked: nothing is written out of bounds, and coverage
 * counts. */
static const misuse always_found[] = {
    {"visit_unit", 3, "visit_state: unit 9999; the model has 5"},
    {"visit_nothing", 3, "visit_state: the ranks together named 0 of 8192 elements of the weights of unit 0 (wte)"},
    {"view_weight", 3, "acquire, stage 0: the weight of wpe.weight is NULL"},
    {"norm_missing", 3, "gradient_norm: the ranks together added 0 of 8192 elements of the gradients of unit 0 (wte)"},
    {"ticket_missing", 3, "update: the ranks together updated 0 of 7710 elements of the weights of unit 0 (wte)"},
    {"ticket_gradient", 3, "update: the gradient of unit 0 (wte) is NULL"},
};
Test(hostile, what_costs_nothing_is_always_found, .timeout = 120) {
  char *dir = hostile_dir();
  for (size_t i = 0; i < sizeof always_found / sizeof *always_found; i++) {
    char texts[4][96];
    const char *options[8], *argv[32] = {"phalanx", "train", "run.ini", "-n", "2", "--steps", "1", "--strategy",
                                         "hostile", "--set", "run.checked=no"};
    const misuse *m = &always_found[i];
    memcpy(argv + 11, options, options_of("hostile", m->name, texts, options) * sizeof *options);
    command_result r = command_run(dir, 60, argv);
    cr_expect(r.status == m->status && strstr(r.out, m->says), "%s: status %d:\n%s", m->name, r.status, r.out);
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* compare checks by itself, and train does not: the same misuse, which only [run] checked finds. */
Test(hostile, compare_is_checked_and_train_is_not, .timeout = 120) {
  static const misuse in_compare = {"ticket_other rank=1", 3, "update: the gradient of wte.weight, element"};
  static const misuse in_train = {"ticket_other rank=1", 0, NULL};
  char *dir = hostile_dir(), *ini = command_read_file(dir, "run.ini");
  char *line = strstr(ini, "checked = yes");
  cr_assert_not_null(line);
  memcpy(line, "checked =auto", 13);
  command_write_file(dir, "run.ini", ini, strlen(ini));
  free(ini);
  run_one(dir, "train", "hostile", "2", "1", &in_train);
  run_one(dir, "compare", "hostile", "2", "1", &in_compare);
  command_remove_dir(dir);
}

/* ---- how calls end ---- */
static const misuse ends_of_calls[] = {
    {"crash call=layout", 2, "phx_strategy_hostile.so crashed in layout: SIGSEGV, a bad memory access"},
    {"crash call=estimate", 2, "phx_strategy_hostile.so crashed in estimate: SIGSEGV, a bad memory access"},
    {"silent call=layout", 2, "phx_strategy_hostile.so failed in layout with COMM (status 4) and gave no reason"},
    {"silent call=estimate", 2, "phx_strategy_hostile.so failed in estimate with COMM (status 4) and gave no reason"},
    {"odd_code call=estimate", 2, "failed in estimate with unknown (status 77) and gave no reason"},
    {"null_out", 3, "strategy hostile: create gave nothing (*out is NULL) and PHX_OK"},
    {"silent call=create", 3, "strategy hostile: create failed with COMM (status 4) and gave no reason"},
    {"silent call=visit_state", 3, "strategy hostile: visit_state, map or state_changed failed with COMM (status 4)"},
    {"silent call=map", 3, "strategy hostile: visit_state, map or state_changed failed with COMM (status 4)"},
    {"silent call=unmap", 3, "strategy hostile: visit_state, map or state_changed failed with COMM (status 4)"},
    {"silent call=state_changed", 3, "strategy hostile: visit_state, map or state_changed failed with COMM (status 4)"},
    {"silent call=begin_micro_batch", 3, "strategy hostile: begin_micro_batch failed with COMM (status 4)"},
    {"silent call=acquire", 3, "strategy hostile: acquire, stage 0 failed with COMM (status 4) and gave no reason"},
    {"silent call=release", 3, "strategy hostile: release, stage 0 failed with COMM (status 4) and gave no reason"},
    {"silent call=finish_gradients", 3, "failed with COMM (status 4) and gave no reason"},
    {"silent call=gradient_norm", 3, "strategy hostile: gradient_norm failed with COMM (status 4)"},
    {"silent call=update", 3, "strategy hostile: update failed with COMM (status 4) and gave no reason"},
    {"odd_code call=update", 3, "strategy hostile: update failed with unknown (status 77) and gave no reason"},
};
Test(hostile, a_failure_without_a_text_names_the_call, .timeout = 120) {
  RUN_ALL("train", "hostile", "2", "1", ends_of_calls);
}

#define HANDLERS (!SANITIZED) /* a sanitizer's own reports stand in for them */

/* On one rank, where the command is the rank, and on two. */
static const misuse crashes[] = {
    {"crash call=create", 3, "SIGSEGV, a bad memory access, in strategy hostile: create"},
    {"crash call=map", 3, "SIGSEGV, a bad memory access, in strategy hostile: visit_state, map or state_changed"},
    {"crash call=acquire", 3, "SIGSEGV, a bad memory access, in strategy hostile: acquire, stage 0"},
    {"crash call=update", 3, "SIGSEGV, a bad memory access, in strategy hostile: update"},
    {"crash call=destroy", 3, "SIGSEGV, a bad memory access, in strategy hostile: destroy"},
};
Test(hostile, a_crash_names_the_call, .timeout = 120, .disabled = !HANDLERS) {
  misuse alone[sizeof crashes / sizeof *crashes];
  memcpy(alone, crashes, sizeof crashes);
  for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++) alone[i].status = 128 + 11;
  RUN_ALL("train", "hostile", "2", "1", crashes);
  RUN_ALL("train", "hostile", "1", "1", alone);
}

/* Before there is a configuration: train, check and help name the file and end with 2, like plugins. */
Test(hostile, loading_is_not_trusted, .timeout = 120) {
  static const struct {
    const char *load, *says;
    int by_handler;
  } cases[] = {
      {"constructor", "phx_strategy_hostile.so crashed while it was loaded: SIGSEGV, a bad memory access", 1},
      {"descriptor", "phx_strategy_hostile.so crashed while its descriptor was read: SIGSEGV, a bad memory access", 1},
      {"exit", "phx_strategy_hostile.so ended the process while it was loaded", 0},
      {"vanish", "phx_strategy_hostile.so ended the process while it was loaded", 1},
      {"giant", "its descriptor says it has 1073741824 bytes: not plausible", 0},
      {"kind", "says it is of kind 77, which this phalanx does not know; one of kind strategy was asked for", 0},
  };
  static const char plugin[] = PHX_TEST_ONLY_PLUGINS "/phx_strategy_hostile.so";
  char *dir = hostile_dir();
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (cases[i].by_handler && !HANDLERS) continue;
    setenv("PHX_HOSTILE_LOAD", cases[i].load, 1);
    command_result r[] = {RUN(dir, 30, "train", "run.ini", "--strategy", plugin),
                          RUN(dir, 30, "check", "run.ini", "--strategy", plugin), RUN(dir, 30, "help", plugin),
                          RUN(dir, 30, "help", "hostile", "run.ini")};
    for (size_t k = 0; k < sizeof r / sizeof *r; k++) {
      cr_expect(r[k].status == 2 && strstr(r[k].out, cases[i].says), "%s, %zu: status %d:\n%s", cases[i].load, k,
                r[k].status, r[k].out);
      command_free(&r[k]);
    }
    unsetenv("PHX_HOSTILE_LOAD");
  }
  command_remove_dir(dir);
}

/* ---- what a layout may say of gradients and replicas ---- */
/* Half of a sum, called a mean, gives the sum's bits on two ranks; a sum that is called a mean is found. */
static const misuse means[] = {
    {"hostile.misuse=is_mean", 0, "equal bits: 2 strategies"},
    {"hostile.misuse=called_mean", 3, "gradient_norm: the gradient of"},
};
Test(hostile, a_gradient_may_be_a_mean, .timeout = 120) {
  char *dir = hostile_dir();
  for (size_t i = 0; i < sizeof means / sizeof *means; i++) {
    command_result r = RUN(dir, 60, "compare", "run.ini", "-n", "2", "--steps", "3", "--strategies", "ddp,hostile",
                           "--set", means[i].name);
    cr_expect(r.status == means[i].status && strstr(r.out, means[i].says), "%s: status %d:\n%s", means[i].name,
              r.status, r.out);
    command_free(&r);
  }
  command_remove_dir(dir);
}

/* One rank's weights differ from the start: nobody compares them, where that is by design. */
Test(hostile, replicas_that_differ_by_design_are_not_compared, .timeout = 120) {
  static const struct {
    const char *rank, *more, *says;
    int status;
  } cases[] = {
      {"hostile.rank=-1", "hostile.misuse=layout_differ", NULL, 0},
      {"hostile.rank=-1", "run.drift_every=1", "run.drift_every: the replicas of strategy hostile differ by design", 2},
      {"hostile.rank=-1", "run.checked=yes", "run.checked = yes: the replicas of strategy hostile differ by design", 2},
      /* the control: not by design */
      {"hostile.rank=1", "hostile.misuse=changed_one", "the ranks' weights have drifted apart", 3},
  };
  char *dir = hostile_dir();
  setenv("PHX_HOSTILE_LOAD", "own_bits", 1);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    command_result r = RUN(dir, 60, "train", "run.ini", "-n", "2", "--steps", "2", "--strategy", "hostile", "--set",
                           "run.checked=no", "--set", "run.deterministic=no", "--set", cases[i].rank, "--set",
                           "hostile.misuse=layout_differ", "--set", cases[i].more);
    cr_expect(r.status == cases[i].status && (!cases[i].says || strstr(r.out, cases[i].says)), "%s: status %d:\n%s",
              cases[i].more, r.status, r.out);
    command_free(&r);
  }
  unsetenv("PHX_HOSTILE_LOAD");
  command_remove_dir(dir);
}

/* ---- finding plugins, and comparing those that are given by path ---- */
Test(hostile, plugins_and_help_look_into_the_path_of_a_file, .timeout = 60) {
  char *dir = hostile_dir();
  command_result r = RUN(dir, 30, "plugins");
  cr_expect(r.status == 0 && !strstr(r.out, "hostile_shard"), "%s", r.out);
  command_free(&r);
  r = RUN(dir, 30, "plugins", "run.ini");
  cr_expect(r.status == 0 && strstr(r.out, "hostile_shard"), "%s", r.out);
  command_free(&r);
  r = RUN(dir, 30, "help", "hostile_shard");
  cr_expect_eq(r.status, 2, "%s", r.out);
  command_free(&r);
  r = RUN(dir, 30, "help", "hostile_shard", "run.ini");
  cr_expect(r.status == 0 && strstr(r.out, "misuse"), "%s", r.out);
  command_free(&r);
  command_remove_dir(dir);
}

/* A path's options stand behind ':', so that a name's '.' and a file's cannot be confused; rows of one file name are
 * told apart, and so are rows of one label. */
Test(hostile, compare_takes_options_of_a_path, .timeout = 60) {
  static const char plugin[] = PHX_TEST_ONLY_PLUGINS "/phx_strategy_hostile.so";
  char *dir = hostile_dir(), list[2048], row[1100];
  command_result r;
  snprintf(list, sizeof list, "mkdir -p %s/other && cp %s %s/other/", dir, plugin, dir);
  cr_assert_eq(system(list), 0);
  snprintf(list, sizeof list, "%s,other/phx_strategy_hostile.so,%s:misuse=plan_half+rank=0,ddp,ddp", plugin, plugin);
  r = RUN(dir, 50, "compare", "run.ini", "-n", "1", "--steps", "1", "--strategies", list);
  cr_expect_eq(r.status, 1, "status %d:\n%s", r.status, r.out);
  snprintf(row, sizeof row, "\n%s ", plugin);
  cr_expect(strstr(r.out, row), "%s is no row:\n%s", plugin, r.out);
  cr_expect(strstr(r.out, "\nother/phx_strategy_hostile.so "), "%s", r.out);
  cr_expect(strstr(r.out, "\nphx_strategy_hostile.so:misuse=plan_half+rank=0 "), "%s", r.out);
  cr_expect(strstr(r.out, "\nddp (1) ") && strstr(r.out, "\nddp (2) "), "%s", r.out);
  command_free(&r);
  r = RUN(dir, 30, "compare", "run.ini", "--strategies", "./other/phx_strategy_hostile.so.rank=1");
  cr_expect(r.status == 2 && strstr(r.out, "PATH.so:key=value[+key=value]"), "status %d:\n%s", r.status, r.out);
  command_free(&r);
  command_remove_dir(dir);
}
