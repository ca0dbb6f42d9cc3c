/* core/command/train.c - see train.h.  What a rank does, top to bottom: phx__train_rank. */
#include "command/train.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/complain.h"
#include "base/identity.h"
#include "base/job_calls.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/disk_room.h"
#include "checkpoint/resume.h"
#include "checkpoint/weights.h"
#include "command/balance.h"
#include "command/checkpoint_run.h"
#include "command/memory_room.h"
#include "command/progress.h"
#include "command/report.h"
#include "command/restart.h"
#include "command/run_data.h"
#include "command/run_dir.h"
#include "command/step_times.h"
#include "command/train_check.h"
#include "engine/cpus.h"
#include "engine/drift.h"
#include "engine/memory_watch.h"
#include "engine/plan_kept.h"
#include "engine/prepare.h"
#include "engine/runtime_open.h"
#include "engine/state.h"
#include "engine/state_visit.h"
#include "engine/weight_check.h"
#include "job/job.h"
#include "job/job_segment.h"
#include "job/job_watch.h"
#include "job/launcher.h"
#include "job/run_lock.h"
#include "job/stop.h"
#include "plugin/where.h"

enum { MEASURED_STEP = 2 }; /* memory and traffic are measured in this step: the first steady one */

typedef struct run {
  const phx__config *config;
  const phx_job *job;
  phx__prepared *prepared; /* until the runtime owns it */
  phx__runtime *rt;
  phx__engine *engine;
  phx__drift *drift; /* NULL: not asked for, or one rank */
  phx__run_data data;
  phx__progress progress;
  phx__checkpoints checkpoints;
  phx__run_result result;
  phx__step_times times;
  double sampling;      /* seconds of this step that went into measuring memory */
  phx__step_result done; /* of the step just done, with its seconds and bytes sent */
  double seconds;
  int64_t sent;
  phx__rank_report mine;
  phx__balance balance;
  const char *asked;    /* --resume's directory; NULL: a new run */
  phx__resume resume;   /* with asked */
  phx__resumed resumed; /* at.step 0: a new run */
  int64_t step;         /* the last whole one */
  int stopped;          /* the signal that ended it before its last step, or 0 */
  phx_status unsaved;   /* why saves that end the run failed: what can still be written comes first */
  phx_error unsaved_why;
  int failed_exit;      /* the exit status if it fails */
  phx__run_dir *dir;    /* rank 0 under another launcher */
} run;

/* ---- before anything is allocated ---- */
static bool foreign(void) { return phx__job_is_rank() && !getenv("PHALANX_RANK"); } /* of torchrun, mpirun, srun */

/* ---- measuring ---- */
static void sample_pss(void *arg) {
  run *r = arg;
  const double begin = phx__now();
  const int64_t pss = phx__pss_bytes();
  if (pss > r->mine.peak_pss) r->mine.peak_pss = pss;
  phx__memory_watch_note(r->rt->device->threads, r->rt->prepared->planned, &r->mine);
  r->sampling += phx__now() - begin;
}

/* What the strategy moved: all of the world, without the core's own losses, norms and hashes. */
static void strategy_traffic(const phx__runtime *rt, phx_comm_stats *out) {
  phx_comm_stats core = {.struct_size = sizeof core};
  out->struct_size = sizeof *out;
  rt->world->stats(rt->world->ctx, out);
  rt->core->stats(rt->core->ctx, &core);
  for (int op = 0; op < PHX_OPS; op++) {
    out->bytes[op] -= core.bytes[op];
    out->calls[op] -= core.calls[op];
  }
}

/* Ends what a strategy leaves in flight between steps, so that it is counted with the step that began it. */
static phx_status settle(phx__runtime *rt, phx_error *err) {
  const phx_status status = phx__state_visit(rt, NULL, NULL, err);
  return status ? status : rt->device->stream_synchronize(rt->device->ctx, NULL, err);
}

static int64_t bytes_of(const phx_comm_stats *s) {
  int64_t sum = 0;
  for (int op = 0; op < PHX_OPS; op++) sum += s->bytes[op];
  return sum;
}

static void keep_traffic(run *r, const phx_comm_stats *before, const phx_comm_stats *after) {
  for (int op = 0; op < PHX_OPS; op++) {
    r->mine.sent_measured[op] = after->bytes[op] - before->bytes[op];
    r->mine.calls_measured[op] = after->calls[op] - before->calls[op];
  }
}

static phx_status gather_reports(run *r, phx_error *err) {
  phx__rank_report *mine = &r->mine;
  const phx__runtime *rt = r->rt;
  phx__memory_watch_note(rt->device->threads, rt->prepared->planned, mine);
  memcpy(mine->planned, rt->prepared->planned, sizeof mine->planned);
  memcpy(mine->measured, rt->book.peak, sizeof mine->measured);
  memcpy(mine->peak_in, rt->book.peak_in, sizeof mine->peak_in);
  phx__balance_report(&r->balance, mine);
  mine->driver_bytes = phx__driver_bytes(rt);
  memcpy(mine->sent_planned, rt->prepared->estimate.sent, sizeof mine->sent_planned);
  memcpy(mine->calls_planned, rt->prepared->estimate.calls, sizeof mine->calls_planned);
  r->result.n_ranks = r->job->size;
  return rt->core->all_gather(rt->core->ctx, mine, r->result.ranks, (int64_t)(sizeof *mine / sizeof(int64_t)), PHX_I64,
                              NULL, err);
}

static void say_ruined(const run *r, int64_t step) {
  char text[100];
  snprintf(text, sizeof text, "the held-out loss after step %" PRId64 " is not finite", step);
  if (r->job->rank == 0) phx__log(0, "core", PHX_LOG_WARN, text);
}

/* ---- the loop ---- */
/* What the last step left, before it is saved. */
static phx_status check_last(run *r, phx_error *err) {
  const phx_status status = phx__engine_updated(r->engine, err);
  if (status || r->config->s.run.checked != 1) return status;
  return phx__weight_check(r->rt, "after the last step", err);
}

static phx_status train_step(run *r, int64_t step, phx_error *err) {
  const phx__settings *s = &r->config->s;
  phx_comm_stats before, after;
  const int64_t first = r->resumed.at.step, steady = first + MEASURED_STEP;
  const bool measured = step == (s->run.steps < steady ? s->run.steps : steady);
  const bool drift = r->drift && (step == s->run.steps || step % s->run.drift_every == 0);
  const int64_t allocator_calls = r->rt->book.calls;
  r->engine->at_stage = measured ? sample_pss : NULL;
  r->engine->at_stage_arg = r;
  r->sampling = 0;
  if (measured) PHX_TRY(settle(r->rt, err));
  if (drift) phx__drift_watch(r->drift);
  strategy_traffic(r->rt, &before);
  const double begin = phx__now();
  phx_status status = phx__engine_step(r->engine, r->data.train, step, &r->done, err);
  r->engine->at_stage = NULL; /* not in an evaluation, which has many more */
  if (status) return status;
  r->seconds = phx__now() - begin - r->sampling;
  if (measured) status = settle(r->rt, err);
  if (status) return status;
  strategy_traffic(r->rt, &after);
  r->sent = bytes_of(&after) - bytes_of(&before);
  phx__step_times_add(&r->times, r->seconds);
  phx__memory_watch_steady();
  if (measured) keep_traffic(r, &before, &after);
  if (measured) r->mine.traffic_counts = !r->done.skipped;
  if (step > first + 1) r->mine.steady_calls += r->rt->book.calls - allocator_calls;
  status = phx__balance_step(&r->balance, r->rt, &r->progress, step, r->seconds, after.wait_ns - before.wait_ns, err);
  if (status) return status;

  r->result.skipped += r->done.skipped;
  if (step == s->run.steps) status = check_last(r, err);
  if (status) return status;
  return drift ? phx__drift_check(r->drift, step, err) : PHX_OK;
}

/* ---- checkpoints ---- */
static phx_status save(run *r, bool last, phx_error *err) {
  const phx__position at = {.step = r->step, .samples = phx__engine_samples(r->engine, r->step),
                            .skipped = r->engine->skipped};
  return phx__checkpoints_save(&r->checkpoints, &at, last, err);
}

/* The save that ends the run may fail, and what else there is to write is written. */
static phx_status save_at_end(run *r, phx_error *err) {
  const phx_status status = save(r, true, &r->unsaved_why);
  if (status == PHX_COMM) return phx_fail(err, status, "%s", r->unsaved_why.message);
  r->unsaved = status;
  return PHX_OK;
}

/* Between two steps: the save in flight goes on, and who is to stop saves. */
static phx_status heed(run *r, phx_error *err) {
  if (r->config->s.checkpoint.every == 0 || r->step == r->config->s.run.steps) return PHX_OK;
  PHX_TRY(phx__checkpoints_meet(&r->checkpoints, &r->stopped, err));
  if (r->stopped) return save_at_end(r, err);
  r->unsaved = phx__checkpoints_given_up(&r->checkpoints, &r->unsaved_why);
  return PHX_OK;
}

/* After a whole step, before anything else that takes long. */
static phx_status save_due(run *r, phx_error *err) {
  const phx__settings *s = &r->config->s;
  if (s->checkpoint.every > 0 && r->step == s->run.steps) return save_at_end(r, err);
  phx_status status = heed(r, err);
  if (status || r->stopped || r->unsaved || s->checkpoint.every == 0 || r->step % s->checkpoint.every) return status;
  status = save(r, false, err);
  if (!status) r->unsaved = phx__checkpoints_given_up(&r->checkpoints, &r->unsaved_why);
  return status;
}

typedef struct told { /* what is told of a whole step, beside its own numbers */
  bool validated, hashed;
  double valid_loss; /* NaN: not taken */
  char hash[33];
} told;

static told what_is_due(const run *r) {
  const phx__settings *s = &r->config->s;
  const bool last = r->step == s->run.steps;
  const bool due = last || (s->run.valid_every > 0 && r->step % s->run.valid_every == 0);
  return (told){.validated = r->data.valid && due && !r->stopped,
                .hashed = last || (s->run.hash_every > 0 && r->step % s->run.hash_every == 0),
                .valid_loss = NAN};
}

/* Who is to stop does not begin an evaluation; who hears of it meanwhile does not end it, but that of the last step. */
static phx_status take(run *r, told *t, phx_error *err) {
  const phx__settings *s = &r->config->s;
  const bool last = r->step == s->run.steps, may_end = s->checkpoint.every > 0 && !last; /* it has no other time */
  phx__state_hash sum;
  phx_status status = PHX_OK;
  r->engine->stop_asked = may_end ? phx__stop_asked : NULL;
  if (t->validated) status = phx__engine_validate(r->engine, r->data.valid, s->run.valid_windows, &t->valid_loss, err);
  if (!status && isinf(t->valid_loss)) say_ruined(r, r->step);
  if (!status && t->hashed) status = phx__runtime_state_hash(r->rt, &sum, err);
  if (status) return status;
  if (t->hashed) phx__state_hash_text(sum, t->hash);
  if (last && t->validated) r->result.valid_loss = t->valid_loss;
  if (last && t->hashed) memcpy(r->result.state_hash, t->hash, sizeof t->hash);
  return PHX_OK;
}

/* Held-out loss and hash where they are due, and the step's line, if no save has asked for it before. */
static phx_status tell_step(run *r, phx_error *err) {
  told t = what_is_due(r);
  const phx_status status = take(r, &t, err);
  if (status) return status;
  if (r->step == r->config->s.run.steps) r->result.loss = r->done.loss;
  phx__progress_tell(&r->progress, t.valid_loss, t.hashed ? t.hash : NULL);
  return t.validated ? heed(r, err) : PHX_OK;
}

/* A run that ended behind a save and before that: its last whole step has a line, and what was due is not told of it.
 * Rank 0 reads the lines, for all. */
static phx_status tell_missing(run *r, phx_error *err) {
  enum { VALIDATE = 1, HASH = 2 };
  const phx__metrics_told *known = &r->progress.metrics.told;
  told t = what_is_due(r);
  int64_t missing = 0;
  if (known->step && t.validated && !known->valid_loss) missing |= VALIDATE;
  if (known->step && t.hashed && !known->state_hash) missing |= HASH;
  phx_status status = phx__job_max(r->job, missing, &missing, err);
  if (status || !missing) return status;
  t.validated = missing & VALIDATE;
  t.hashed = missing & HASH;
  status = take(r, &t, err);
  if (status) return status;
  phx__progress_tell(&r->progress, t.valid_loss, t.hashed ? t.hash : NULL);
  if (!isnan(t.valid_loss))
    phx__checkpoints_say(r->job->rank, PHX_LOG_INFO, "step %" PRId64 " had no held-out loss yet: it is %.4f", r->step,
                         t.valid_loss);
  return t.validated ? heed(r, err) : PHX_OK;
}

/* Our account of the device's memory beside its driver's, which counts what libraries and the context hold, too. */
static void say_device_memory(const run *r) {
  const phx__run_result *all = &r->result;
  for (int32_t i = 0; i < all->n_ranks; i++) {
    const phx__rank_report *one = &all->ranks[i];
    char text[160];
    if (one->driver_bytes < 0) continue; /* the device does not say */
    snprintf(text, sizeof text, "device memory of rank %d: %.1f MiB at most by our account, %.1f MiB by the driver's",
             i, (double)one->peak_in[PHX_SPACE_DEVICE] / (1 << 20), (double)one->driver_bytes / (1 << 20));
    phx__log(r->job->rank, "core", PHX_LOG_INFO, text);
  }
}

static void say_difference(void *arg, const char *line) {
  char text[300];
  snprintf(text, sizeof text, "the plan was not kept: %s", line);
  phx__log(((const run *)arg)->job->rank, "core", PHX_LOG_WARN, text);
}

static phx_status finish(run *r, phx_error *err) {
  phx__state_hash sum;
  phx_status status = PHX_OK;
  if (!r->result.state_hash[0]) { /* resumed behind the last step: nothing was left to do */
    status = phx__runtime_state_hash(r->rt, &sum, err);
    if (!status) phx__state_hash_text(sum, r->result.state_hash);
  }
  if (!status) status = phx__weights_write(r->rt, r->config->s.run.out, r->step, err);
  if (!status) status = gather_reports(r, err);
  if (status || r->job->rank != 0) return status;
  const double median = phx__step_times_median(&r->times);
  r->result.steps = r->config->s.run.steps;
  r->result.saves = r->checkpoints.totals;
  r->result.step_ms = 1e3 * median;
  r->result.tokens_per_s = median > 0 ? (double)r->progress.tokens_per_step / median : 0;
  say_device_memory(r);
  phx__balance_say(&r->result, r->balance.all_steps);
  phx__plan_differences(r->result.ranks, r->result.n_ranks, say_difference, r);
  status = phx__run_json_write(r->rt, &r->result, NULL, err);
  return status ? status : phx__progress_flush(&r->progress, err);
}

/* The step that was not finite was stopped on all ranks before its update: what there is is the step before, whole. */
static void save_before_failing(run *r) {
  phx_error why = PHX_ERROR_INIT;
  const phx_job *job = r->job;
  if (!r->engine->not_finite || r->config->s.checkpoint.every == 0 || r->step == 0) return;
  phx_status status = PHX__IN_STRATEGY(job, PHX_IN_FINISH, -1,
                                       r->rt->prepared->strategy->discard_gradients(r->rt->strategy, &why));
  if (!status) status = save(r, true, &why);
  phx__checkpoints_say(job->rank, status ? PHX_LOG_WARN : PHX_LOG_INFO,
                       "step %" PRId64 ", before the one that was not finite, %s%s", r->step,
                       status ? "was not saved: " : "is saved", status ? why.message : "");
}

static phx_status finish_stopped(run *r, phx_error *err) {
  r->result.stopped = phx__stop_name(r->stopped);
  if (r->unsaved)
    return phx_fail(err, r->unsaved, "stopped by %s after step %" PRId64 ", which was not saved: %.400s",
                    r->result.stopped, r->step, r->unsaved_why.message);
  r->result.steps = r->step;
  r->result.saves = r->checkpoints.totals;
  phx__checkpoints_say(r->job->rank, PHX_LOG_INFO,
                       "stopped by %s after step %" PRId64 ", which is saved: --resume goes on from there",
                       r->result.stopped, r->step);
  return r->job->rank == 0 ? phx__run_json_write(r->rt, &r->result, NULL, err) : PHX_OK;
}

/* The final weights are written even where the last checkpoint cannot be. */
static phx_status finish_last(run *r, phx_error *err) {
  const bool no_step = r->step == r->resumed.at.step; /* a fork from a last step has no checkpoint of its own yet */
  phx_status status = no_step && r->config->s.checkpoint.every > 0 ? save_at_end(r, err) : PHX_OK;
  if (!status) status = finish(r, err);
  if (status && r->unsaved)
    return phx_fail_more(err, status, "; nor was the last step's checkpoint: %.200s", r->unsaved_why.message);
  if (status || !r->unsaved) return status;
  return phx_fail(err, r->unsaved, "the last step's checkpoint was not saved: %.400s", r->unsaved_why.message);
}

static void say_plugin(const char *kind, const phx__plugin *p) {
  char line[4400];
  snprintf(line, sizeof line, "%s %s %s, ABI %u.%u, %s, sha256 %s", kind, p->descriptor->id, p->descriptor->version,
           p->descriptor->table_major, p->descriptor->table_minor, p->path, p->sha256);
  phx__log(0, "core", PHX_LOG_INFO, line);
}

static void say_chosen(const char *kind, const char *why) {
  char line[400];
  snprintf(line, sizeof line, "[%s] plugin = auto takes %s", kind, why);
  if (*why) phx__log(0, "core", PHX_LOG_INFO, line);
}

static void say_plugins(const phx__config *config) {
  say_plugin("strategy", config->strategy.plugin);
  say_plugin("device", config->device.plugin);
  say_plugin("comm", config->comm.plugin);
  say_plugin("model", config->model.plugin);
  say_plugin("optimizer", config->optimizer.plugin);
  say_chosen("device", config->device_why);
  say_chosen("comm", config->comm_why);
}

/* A launcher's variables of which one was lost would else start a run of its own in every process. */
static void say_half_set(void) {
  char line[200];
  const char *what = phx__job_half_set();
  if (!what) return;
  snprintf(line, sizeof line, "the environment's %s: this is taken for a run of its own, and for no launcher's rank",
           what);
  phx__log(0, "core", PHX_LOG_WARN, line);
}

static void say_start(const phx__config *config, int32_t local_ranks) {
  say_half_set();
  say_plugins(config);
  phx__cpus_say(config, local_ranks);
}

static bool is_if_any(const char *asked) { return asked && !strcmp(asked, PHX__RESUME_IF_ANY); }

/* Rank 0 looks, for all: the others might see an older state of the directory. */
static phx_status decide_resume(run *r, phx_error *err) {
  uint64_t mine = 0, all[PHX_RANKS_MAX];
  bool any = false;
  phx_status status = r->job->rank == 0 ? phx__resume_decide(r->config, &any, err) : PHX_OK;
  if (status == PHX_IO) r->failed_exit = PHX__EXIT_DAMAGED;
  if (status) return status;
  mine = any;
  PHX_TRY(r->job->exchange(r->job->ctx, "--resume=" PHX__RESUME_IF_ANY, &mine, sizeof mine, all, err));
  r->asked = all[0] ? "" : NULL;
  return r->asked ? phx__resume_locate(r->config, r->asked, &r->resume, err) : PHX_OK;
}

static void say_data(const run *r) {
  char text[400];
  phx__run_data_line(r->config, r->prepared, &r->data, text, sizeof text);
  phx__log(0, "data", PHX_LOG_INFO, text);
  phx__run_data_say_same(&r->data);
}

/* The other ranks wait already: for half of their patience at most, in milliseconds; 0 s is for ever. */
static void limit_lock_wait(double timeout_s) {
  const int half = (int)(500 * fmin(timeout_s, 1000));
  phx__run_lock_limit_ms = timeout_s > 0 && half < 1 ? 1 : half;
}

static phx_status open_run(run *r, phx_error *err) {
  PHX_TRY(phx__job_open(r->config->s.run.timeout, &r->job, err));
  phx__crash_install(r->job); /* a rank alone says where it crashed, too */
  PHX_TRY(phx__job_watch(r->job, err));
  phx_status status = phx__prepare(r->config, r->job->rank, r->job->size, r->job->local_rank, r->job->local_size, 0, 0,
                                   &r->prepared, err);
  if (!status) status = phx__run_data_attach(r->config, r->prepared, &r->data, err);
  if (!status && r->job->size != r->config->s.run.ranks)
    status = phx_fail(err, PHX_INVALID,
                      "run.ranks = %" PRId64 ", but the launcher started %d rank%s: leave -n and [run] ranks out, "
                      "which takes what it started, or give -n %d",
                      r->config->s.run.ranks, r->job->size, r->job->size == 1 ? "" : "s", r->job->size);
  if (!status && r->config->s.run.drift_every > 0) status = phx__drift_supported(r->prepared, err);
  if (!status && r->config->s.run.max_restarts > 0 && !getenv("PHALANX_RANK"))
    status = phx_fail(err, PHX_UNSUPPORTED,
                      "run.max_restarts = %" PRId64 " is for ranks that this command starts; another launcher started "
                      "these: use its restarts, and 0 here",
                      r->config->s.run.max_restarts);
  phx__room room;
  phx__room_read("", &room);
  if (!status && foreign()) status = phx__room_check_rank(r->prepared, &room, r->job->local_size, err);
  if (!status) status = phx__job_agree(r->job, phx__config_hash(r->config), "the configuration", err);
  if (!status) status = phx__run_data_meet(&r->data, r->job, err);
  /* under torchrun, mpirun or srun nobody made the directory yet; other ranks write there after they met rank 0 */
  const bool makes = r->job->rank == 0 && foreign();
  if (!status && makes) status = phx__disk_room_at_start(r->prepared, err);
  if (makes) limit_lock_wait(r->config->s.run.timeout);
  if (!status && makes) status = phx__run_dir_open(r->config, &r->dir, err);
  if (!status && is_if_any(r->asked)) status = decide_resume(r, err);
  if (!status && makes) {
    status = phx__run_dir_begin(r->dir, r->config, r->asked && r->resume.continues, err);
    if (!status) say_start(r->config, r->job->local_size);
  }
  if (!status && r->job->rank == 0) say_data(r);
  if (!status && r->job->rank == 0) status = phx__run_dir_inherit(r->config, err);
  if (!status && r->job->local_size != r->job->size) status = phx__run_dir_shared(r->config, r->job, err);
  return status;
}

/* Another batch than before: no sequence is read twice, and none is left out. */
static void say_position(const run *r) {
  const int64_t batch = phx__engine_samples(r->engine, 1) - phx__engine_samples(r->engine, 0);
  if (r->resumed.at.samples % batch == 0)
    phx__checkpoints_say(r->job->rank, PHX_LOG_INFO, "goes on from batch %" PRId64 " of %" PRId64 " sequences",
                         r->resumed.at.samples / batch, batch);
  else
    phx__checkpoints_say(r->job->rank, PHX_LOG_INFO, "goes on from sequence %" PRId64 ", %" PRId64 " a step",
                         r->resumed.at.samples, batch);
}

/* The state: of a checkpoint, or the initial one. */
static phx_status begin_state(run *r, phx_error *err) {
  if (!r->asked) return phx__runtime_initialise(r->rt, err);
  const phx_status status = phx__resume_load(&r->resume, r->rt, &r->resumed, err);
  if (status == PHX_INVALID || status == PHX_UNSUPPORTED) r->failed_exit = PHX__EXIT_REFUSED;
  if (status == PHX_IO) r->failed_exit = PHX__EXIT_DAMAGED;
  if (status) return status;
  r->step = r->engine->step = r->resumed.at.step;
  r->engine->skipped = r->resumed.at.skipped;
  r->engine->samples_ahead = r->resumed.at.samples - phx__engine_samples(r->engine, r->step);
  if (r->engine->samples_ahead) say_position(r);
  if (r->step == r->config->s.run.steps)
    phx__checkpoints_say(r->job->rank, PHX_LOG_WARN,
                         "step %" PRId64 " is the last one (run.steps): nothing is left to train", r->step);
  return PHX_OK;
}

/* Replicas begin alike: where the strategy makes them, and wherever drift is looked for. */
static phx_status check_drift_at_start(run *r, phx_error *err) {
  const bool asked = r->config->s.run.drift_every > 0;
  if (r->job->size == 1 || (!asked && !phx__drift_at_start(r->rt->prepared))) return PHX_OK;
  phx_status status = phx__drift_open(r->rt, &r->drift, err);
  if (!status) status = phx__drift_check(r->drift, 0, err);
  if (status || asked) return status;
  phx__drift_close(r->drift);
  r->drift = NULL;
  return PHX_OK;
}

static phx_status run_steps(run *r, phx_error *err) {
  phx__prepared *prepared = r->prepared;
  r->prepared = NULL;
  prepared->train = r->data.train;
  phx_status status = phx__runtime_open(r->config, r->job, prepared, &r->rt, err);
  if (!status) status = phx__engine_create(r->rt, &r->engine, err);
  if (!status) status = begin_state(r, err);
  if (!status && r->config->s.run.checked == 1) status = phx__weight_check(r->rt, "at start", err);
  if (!status) status = check_drift_at_start(r, err);
  if (!status) status = phx__progress_open(&r->progress, r->rt, r->resumed.at.step, err);
  if (!status)
    status = phx__checkpoints_open(&r->checkpoints, r->rt, &r->progress, r->step, r->resume.continues ? r->step : 0,
                                   err);
  if (!status && r->job->rank == 0) status = phx__run_json_write(r->rt, NULL, r->asked ? &r->resumed : NULL, err);
  if (!status) status = phx__step_times_open(&r->times, r->config->s.run.steps, err);
  if (!status && r->step > 0) status = tell_missing(r, err);
  while (!status && r->step < r->config->s.run.steps && !r->stopped && !r->unsaved) {
    status = train_step(r, r->step + 1, err);
    if (status) save_before_failing(r);
    if (status) break;
    r->step++;
    phx__progress_done(&r->progress, r->step, &r->done, r->seconds, r->sent);
    status = phx__run_lock_seen(err);
    if (!status) status = save_due(r, err);
    if (!status) status = tell_step(r, err);
  }
  if (status) return status;
  if (r->stopped) return finish_stopped(r, err);
  if (r->unsaved && r->step < r->config->s.run.steps) return phx_fail(err, r->unsaved, "%s", r->unsaved_why.message);
  return finish_last(r, err);
}

static phx__stop_watch who_watches(void) {
  if (getenv("PHALANX_RANK")) return PHX__STOP_LAUNCHED;
  return foreign() ? PHX__STOP_FOREIGN : PHX__STOP_ALONE;
}

/* Nobody leaves before rank 0 has written its last file and has given the directory back: other launchers end a job
 * when one of its ranks is gone for a while, or with another status than 0. */
static phx_status end_together(run *r, phx_error *err) {
  phx__run_dir_close(r->dir);
  r->dir = NULL;
  return phx__job_agree(r->job, (uint64_t)r->step, "the end", err);
}

/* The message with the rank before it, where it is known and the message does not name one already. */
static void complain_as_rank(const run *r, const char *message) {
  phx__identity me = {.rank = -1};
  int named = 0, end = 0;
  if (r->job) me.rank = r->job->rank;
  else if (!phx__job_is_rank() || phx__identity_read(&me, NULL)) me.rank = -1;
  if (me.rank < 0 || (sscanf(message, "rank %d: %n", &named, &end) == 1 && end > 0)) phx__complain("%s", message);
  else phx__complain("rank %d: %s", me.rank, message);
}

static void tell_failure(run *r, phx_status status, phx_error *err) {
  phx__where_reason(r->job, status, err);
  complain_as_rank(r, err->message);
  if (!r->job) return;
  phx__watch_leaving();
  phx__job_state(r->job, PHX_RANK_FAILED, r->engine ? r->engine->step : r->step);
  phx__job_ends(r->job, r->failed_exit);
  r->job->fail(r->job->ctx, err->message);
}

int phx__train_rank(const phx__config *config, const char *resume) {
  phx_error err = PHX_ERROR_INIT;
  run r = {.config = config, .asked = resume, .failed_exit = PHX__EXIT_REFUSED};
  r.result.loss = r.result.valid_loss = NAN;
  if (config->s.checkpoint.every > 0) phx__stop_install(who_watches());
  phx_status status = PHX_OK;
  if (resume && !is_if_any(resume)) status = phx__resume_locate(config, resume, &r.resume, &err);
  if (!status) status = open_run(&r, &err);
  if (!status) {
    r.failed_exit = PHX__EXIT_RANK;
    status = run_steps(&r, &err);
  }
  const bool refused = status && r.failed_exit != PHX__EXIT_RANK;
  if (refused && r.asked) phx__run_dir_undo(r.dir);
  phx__progress_close(&r.progress);
  if (status) tell_failure(&r, status, &err);
  phx__checkpoints_close(&r.checkpoints);
  if (!status || refused || r.job->size == 1) { /* after a failure peers may be gone: the process ends as it is */
    phx__drift_close(r.drift);
    phx__engine_destroy(r.engine);
    r.engine = NULL;
    phx__runtime_close(r.rt);
    phx__prepared_free(r.prepared);
    phx__run_data_close(&r.data);
    phx__step_times_close(&r.times);
    const phx_status ended = status ? PHX_OK : end_together(&r, &err);
    if (ended) tell_failure(&r, status = ended, &err);
  }
  if (!status) phx__job_state(r.job, PHX_RANK_DONE, config->s.run.steps);
  phx__run_dir_close(r.dir);
  if (r.job) phx__job_leave(r.job);
  if (!status) return r.stopped && config->s.run.stopped_status == 0 ? PHX__EXIT_STOPPED : PHX__EXIT_OK;
  return r.failed_exit;
}

/* What --resume names, before anything is touched. */
static phx_status check_resume(const phx__config *config, const char *asked, phx__resume *out, phx_error *err) {
  phx__prepared *p = NULL;
  phx__run_data data = {NULL, NULL};
  const int32_t size = (int32_t)config->s.run.ranks;
  phx_status status = phx__resume_locate(config, asked, out, err);
  if (!status) status = phx__prepare(config, 0, size, 0, size, 0, 0, &p, err);
  if (!status) status = phx__run_data_attach(config, p, &data, err);
  if (!status) status = phx__run_data_read(&data, err);
  if (!status) p->train = data.train;
  if (!status) status = phx__resume_check(out, p, err);
  phx__run_data_close(&data);
  phx__prepared_free(p);
  return status;
}

int phx__train_launch(const phx__config *config, const char *resume, char *const *argv) {
  phx_error err = PHX_ERROR_INIT;
  phx__resume found = {.continues = false};
  int refusal = PHX__EXIT_REFUSED;
  phx__run_dir *dir = NULL;
  phx_status status = phx__train_check(config, &err);
  if (!status) status = phx__run_dir_open(config, &dir, &err);
  bool any = resume && !is_if_any(resume);
  if (!status && is_if_any(resume)) status = phx__resume_decide(config, &any, &err);
  if (is_if_any(resume)) resume = any ? "" : NULL;
  if (!status && resume) status = check_resume(config, resume, &found, &err);
  if (status == PHX_IO && dir) refusal = PHX__EXIT_DAMAGED;
  if (!status) status = phx__run_dir_begin(dir, config, resume && found.continues, &err);
  if (status) {
    phx__complain("%s", err.message);
    phx__run_dir_close(dir);
    return refusal;
  }
  say_start(config, (int32_t)config->s.run.ranks);
  bool restarted = false;
  const bool launch = config->s.run.ranks > 1 || config->s.run.max_restarts > 0;
  const int exit_status = launch ? phx__restart_run(config, argv, &restarted) : phx__train_rank(config, resume);
  if (resume && !restarted && (exit_status == PHX__EXIT_REFUSED || exit_status == PHX__EXIT_DAMAGED))
    phx__run_dir_undo(dir); /* no rank began */
  phx__run_dir_close(dir);
  /* it was accepted above: what goes wrong in this process is a failure, not a refusal */
  return !launch && exit_status == PHX__EXIT_REFUSED ? PHX__EXIT_RANK : exit_status;
}
