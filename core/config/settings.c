/* core/config/settings.c - every key of the core, once: name, default, range, doc, place in phx__settings.
 *
 * Parser, help, sample, hash and documentation derive from these rows.  What a key may be together with others is
 * checked in config_checks.c.  Constant data. */
#include "config/settings.h"

#include <phalanx/job.h>
#include <string.h>

#define AT(section, f) \
  (uint32_t) offsetof(phx__settings, section.f), (uint32_t)sizeof(((phx__settings *)0)->section.f)
#define INT(section, f, dflt, lo, hi, unit, flags, doc) \
  { #f, doc, dflt, unit, NULL, lo, hi, 0, 0, PHX_OPT_INT, flags, AT(section, f) }
#define BYTES(section, f, dflt, flags, doc) \
  { #f, doc, dflt, "bytes", NULL, 0, INT64_MAX, 0, 0, PHX_OPT_BYTES, flags, AT(section, f) }
#define REAL(section, f, dflt, unit, lo, hi, doc) \
  { #f, doc, dflt, unit, NULL, 0, 0, lo, hi, PHX_OPT_REAL, 0, AT(section, f) }
#define BOOL(section, f, dflt, doc) \
  { #f, doc, dflt, NULL, NULL, 0, 1, 0, 0, PHX_OPT_BOOL, 0, AT(section, f) }
#define ENUM(section, f, dflt, choices, flags, doc) \
  { #f, doc, dflt, NULL, choices, 0, 0, 0, 0, PHX_OPT_ENUM, flags, AT(section, f) }
#define STRING(section, f, dflt, flags, doc) \
  { #f, doc, dflt, NULL, NULL, 0, 0, 0, 0, PHX_OPT_STRING, flags, AT(section, f) }

static const char *const deterministic_choices[] = {"no", "yes", "auto", NULL};
static const char *const checked_choices[] = {"no", "yes", "auto", NULL};
static const char *const pin_choices[] = {"auto", "yes", "no", NULL};
static const char *const nonfinite_choices[] = {"stop", "skip", NULL};
static const char *const stopped_choices[] = {"5", "0", NULL};
static const char *const change_choices[] = {"refuse", "restart", NULL};
static const char *const reduce_choices[] = {"step", "micro_batch", NULL};
static const char *const schedule_choices[] = {"constant", "linear", "cosine", NULL};
static const char *const precision_choices[] = {"fp32", "bf16", "fp16", NULL}; /* fp16 is refused with its reason */

enum { STEPS_MOST = 1000000000, PER_STEP_MOST = 1 << 20 };

static const phx_option run_options[] = {
    STRING(run, strategy, "ddp", 0,
           "How weights, gradients and states are spread: a plugin's name, or the path of a .so."),
    INT(run, ranks, "1", 1, PHX_RANKS_MAX, "ranks", 0, "Ranks started on this machine; -n overrides."),
    INT(run, steps, "200", 1, STEPS_MOST, "steps", 0, "Training steps."),
    INT(run, seed, "1337", 0, INT64_MAX, NULL, 0, "Fixes the initial weights and the order of the samples."),
    STRING(run, out, "runs/demo", 0, "The run directory: run.json, metrics.jsonl, weights and the ranks' output."),
    ENUM(run, deterministic, "auto", deterministic_choices, 0,
         "The same bits under every strategy; a strategy that cannot is refused; auto: yes where the device's fast way "
         "is."),
    REAL(run, timeout, "60", "s", 0, 1e6,
         "Seconds that a rank may be missing from a collective, or in a call without progress; 0 waits for ever."),
    INT(run, hash_every, "0", 0, STEPS_MOST, "steps", 0, "Steps between state hashes; 0 hashes only the last step."),
    INT(run, valid_every, "0", 0, STEPS_MOST, "steps", 0, "Steps between validations; 0 validates only at the end."),
    INT(run, valid_windows, "0", 0, INT64_MAX, "sequences", 0,
        "Sequences of one validation, the first ones of the held-out data, of all ranks together; 0 takes all."),
    INT(run, log_every, "1", 1, STEPS_MOST, "steps", 0, "Steps between lines on the screen; the files have them all."),
    ENUM(run, pin, "auto", pin_choices, PHX_OPTF_PER_RANK,
         "Pin ranks to cores; auto does so when every rank can have its own."),
    ENUM(run, on_nonfinite, "stop", nonfinite_choices, 0,
         "A loss or norm that is not finite stops the run, or its update is skipped; the same on all ranks."),
    INT(run, max_skipped, "10", 0, STEPS_MOST, "steps", 0,
        "Steps in a row that on_nonfinite = skip passes over before the run is stopped; 0 sets no limit."),
    INT(run, balance_every, "100", 0, STEPS_MOST, "steps", 0,
        "Steps between lines that say which rank is the slowest; 0 says it only at the end."),
    INT(run, drift_every, "0", 0, STEPS_MOST, "steps", 0,
        "Steps between checks that all ranks have the same weights, masters and optimizer states; weights also at the "
        "start. 0: at the start only, of a strategy that keeps whole weights on every rank."),
    INT(run, max_restarts, "0", 0, 1000000, "restarts", 0,
        "Times that a run is started again after a failure, from its latest checkpoint or else from the beginning."),
    BOOL(run, elastic, "no",
         "A restart goes on without the ranks that were lost; batch.accumulate rises to keep the global batch."),
    BOOL(run, overcommit, "no", "Start a run whose plan takes more memory than is available; no: it is refused."),
    ENUM(run, checked, "auto", checked_choices, 0,
         "Compare gradients, weights and memory that the strategy hands over with what the ranks computed; auto: yes "
         "in compare, no in train."),
    ENUM(run, stopped_status, "5", stopped_choices, 0,
         "Exit status of a run that a signal stopped and whose state is saved; 0 makes it look like one that is done."),
};
static const phx_option batch_options[] = {
    INT(batch, micro, "4", 1, PER_STEP_MOST, "sequences", 0, "Sequences per rank and micro-batch."),
    INT(batch, accumulate, "1", 1, PER_STEP_MOST, "micro-batches", 0, "Micro-batches per step."),
    INT(batch, sequence, "256", 1, PER_STEP_MOST, "tokens", 0, "Tokens per sequence."),
    ENUM(batch, reduce, "step", reduce_choices, 0, "Reduce gradients once a step, or after each micro-batch."),
    INT(batch, total, "0", 0, INT64_MAX, "sequences", 0,
        "Sequences per step of all ranks, which must be ranks x micro x accumulate; 0 takes what that gives."),
};
static const phx_option model_options[] = {
    STRING(model, plugin, "gpt", 0, "The model's plugin; its own options stand in this section too."),
};
static const phx_option data_options[] = {
    STRING(data, train, NULL, PHX_OPTF_REQUIRED, "Token file to train on, or a glob of several."),
    STRING(data, valid, "", 0, "Token file that is held out, or a glob of several; empty for none."),
    ENUM(data, on_change, "refuse", change_choices, 0,
         "What a resume does where train's contents, batch.sequence or run.seed are not those of the checkpoint: it is "
         "refused, or the order of the sequences begins anew."),
};
static const phx_option optimizer_options[] = {
    STRING(optimizer, name, "adamw", 0,
           "The optimizer: a plugin's name, or the path of a .so; its own options stand in this section too."),
    REAL(optimizer, lr, "3e-4", NULL, 0, 1e3, "Learning rate, after warmup."),
    ENUM(optimizer, schedule, "cosine", schedule_choices, 0, "How the learning rate falls after warmup."),
    INT(optimizer, warmup, "0", 0, STEPS_MOST, "steps", 0, "Steps over which the learning rate rises from 0."),
    REAL(optimizer, final, "0.1", NULL, 0, 1, "Fraction of lr that the schedule ends at."),
    REAL(optimizer, weight_decay, "0.1", NULL, 0, 1e3, "Decoupled weight decay, on matrices only."),
    REAL(optimizer, clip, "1.0", NULL, 0, 1e9, "Largest norm of the gradients; 0 does not clip."),
};
static const phx_option precision_options[] = {
    ENUM(precision, compute, "fp32", precision_choices, 0,
         "Type of activations and of weights as the model reads them; bf16 keeps fp32 masters; fp16 is refused."),
    ENUM(precision, reduce, "fp32", precision_choices, 0,
         "Type of gradients on the wire; bf16 halves the traffic and changes the numbers; fp16 is refused."),
};
static const phx_option device_options[] = {
    STRING(device, plugin, "auto", 0,
           "The device's plugin; auto takes the one with the highest preference that can run here."),
    INT(device, threads, "auto", 1, 1024, "threads", PHX_OPTF_AUTO,
        "Threads per rank; auto shares the cores of this machine among its ranks."),
};
static const phx_option comm_options[] = {
    STRING(comm, plugin, "auto", 0,
           "The communicator's plugin; auto takes the one with the highest preference that fits the device and can "
           "run."),
};
static const phx_option checkpoint_options[] = {
    INT(checkpoint, every, "0", 0, STEPS_MOST, "steps", 0,
        "Steps between checkpoints, and one at the end; 0 writes only the final weights."),
    INT(checkpoint, keep, "3", 0, STEPS_MOST, NULL, 0, "Newest checkpoints that are kept; 0 keeps all."),
    INT(checkpoint, keep_every, "0", 0, STEPS_MOST, "steps", 0,
        "Checkpoints of steps that are a multiple of this are kept for good; 0 keeps none so."),
    BOOL(checkpoint, background, "yes", "Checkpoints are written while training goes on; no: it waits for them."),
    BYTES(checkpoint, copy, "auto", PHX_OPTF_AUTO,
          "Memory per rank for what an update changes before it is written; auto: all that the rank writes.  An update "
          "waits for the writer where it is too small."),
    INT(checkpoint, max_failures, "3", 0, STEPS_MOST, "saves", 0,
        "Saves that fail one after another until the run stops; 0 lets it go on to its end."),
};
static const phx_option plugins_options[] = {
    STRING(plugins, path, "", PHX_OPTF_PER_RANK, "Absolute directories of plugins, colon-separated, searched first."),
    STRING(plugins, pin, "", PHX_OPTF_PER_RANK,
           "SHA-256 sums, comma-separated: only these files are loaded from path, and as the path of a strategy or an "
           "optimizer."),
};

#define TABLE(section) \
  { #section, section##_options, sizeof section##_options / sizeof section##_options[0] }
static const phx__core_table tables[] = {
    TABLE(run), TABLE(batch), TABLE(model), TABLE(data), TABLE(optimizer), TABLE(precision), TABLE(device), TABLE(comm),
    TABLE(checkpoint), TABLE(plugins),
};

/* Keys that earlier versions had, and what to write instead. */
static const struct {
  const char *section, *key, *instead;
} replaced[] = {
    {"run", "valid_batches",
     "write valid_windows, the sequences that all ranks evaluate together (ranks x batch.micro x valid_batches gives "
     "as many as before; 0 takes all)"},
};

const char *phx__core_replaced(const char *section, const char *key) {
  for (size_t i = 0; i < sizeof replaced / sizeof replaced[0]; i++)
    if (!strcmp(replaced[i].section, section) && !strcmp(replaced[i].key, key)) return replaced[i].instead;
  return NULL;
}

const phx__core_table *phx__core_table_at(uint32_t i) {
  return i < sizeof tables / sizeof tables[0] ? &tables[i] : NULL;
}

const phx__core_table *phx__core_section(const char *name) {
  for (uint32_t i = 0; phx__core_table_at(i); i++)
    if (strcmp(tables[i].section, name) == 0) return &tables[i];
  return NULL;
}
