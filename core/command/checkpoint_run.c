/* core/command/checkpoint_run.c - see checkpoint_run.h.
 *
 * At most one save is in flight: before the next one begins, and before the run ends, it is waited for.  What a save
 * cost is told by rank 0: a line in the log, a member of the next line of metrics.jsonl, totals in run.json. */
#include "command/checkpoint_run.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes_text.h"
#include "base/clock.h"
#include "base/job_calls.h"
#include "base/status.h"
#include "engine/prepare.h"
#include "job/stop.h"

static void say_list(int32_t rank, int32_t level, const char *format, va_list args) {
  char text[1024];
  if (rank != 0) return;
  vsnprintf(text, sizeof text, format, args);
  phx__log(0, "checkpoint", level, text);
}

void phx__checkpoints_say(int32_t rank, int32_t level, const char *format, ...) {
  va_list args;
  va_start(args, format);
  say_list(rank, level, format, args);
  va_end(args);
}

static void say(const phx__checkpoints *c, int32_t level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void say(const phx__checkpoints *c, int32_t level, const char *format, ...) {
  va_list args;
  va_start(args, format);
  say_list(c->rt->job->rank, level, format, args);
  va_end(args);
}

/* This process takes no memory for copies: none of its saves goes on beside a step. */
static void plan_no_copies(phx__prepared *p) {
  p->planned[PHX_MEM_BUFFER] -= p->copy_bytes;
  p->copy_bytes = 0;
}

phx_status phx__checkpoints_open(phx__checkpoints *c, phx__runtime *rt, phx__progress *progress, int64_t first,
                                 int64_t saved, phx_error *err) {
  const phx__settings *s = &rt->config->s;
  const char *why;
  *c = (phx__checkpoints){.rt = rt,
                          .progress = progress,
                          .saved = saved,
                          .retention = {.keep = s->checkpoint.keep, .keep_every = s->checkpoint.keep_every}};
  if (!phx__saves_overlap(s, first)) {
    plan_no_copies(rt->prepared);
    return PHX_OK;
  }
  if (!phx__saver_possible(rt, &why)) {
    plan_no_copies(rt->prepared);
    say(c, PHX_LOG_INFO, "training waits for every save (checkpoint.background): %s", why);
    return PHX_OK;
  }
  return phx__saver_open(rt, s->run.out, &c->retention, s->checkpoint.copy, &c->saver, err);
}

void phx__checkpoints_close(phx__checkpoints *c) {
  phx__saver_close(c->saver);
  c->saver = NULL;
}

/* ---- what is told ---- */
static void tell(phx__checkpoints *c, const phx__save_report *r, bool background) {
  char bytes[24], member[400];
  phx__save_totals *t = &c->totals;
  const double rate = r->seconds > 0 ? (double)r->bytes / r->seconds / 1e6 : 0;
  t->saves++;
  c->failures = 0;
  t->bytes += r->bytes;
  t->stall += r->stall;
  t->seconds += r->seconds;
  if (r->stall > t->stall_most) t->stall_most = r->stall;
  phx__bytes_text(r->bytes, bytes);
  if (background)
    say(c, PHX_LOG_INFO,
        "step %" PRId64
        " saved in the background: %s in %.3f s, %.0f MB/s; training stood still for "
        "%.1f ms (here: begin %.1f, copies %.1f, waits %.1f, commit %.1f)",
        r->step, bytes, r->seconds, rate, 1e3 * r->stall, 1e3 * r->begin, 1e3 * r->copies, 1e3 * r->waits,
        1e3 * r->commit);
  else
    say(c, PHX_LOG_INFO, "step %" PRId64 " saved: %s in %.3f s, %.0f MB/s", r->step, bytes, r->seconds, rate);
  snprintf(member, sizeof member,
           ",\"checkpoint\":{\"saved_step\":%" PRId64 ",\"background\":%s,\"bytes\":%" PRId64
           ",\"stall_ms\":%.6g,\"begin_ms\":%.6g,\"copies_ms\":%.6g,\"waits_ms\":%.6g,\"commit_ms\":%.6g,"
           "\"seconds\":%.6g,\"mb_per_s\":%.6g}",
           r->step, background ? "true" : "false", r->bytes, 1e3 * r->stall, 1e3 * r->begin, 1e3 * r->copies,
           1e3 * r->waits, 1e3 * r->commit, r->seconds, rate);
  phx__progress_save(c->progress, member);
}

static bool too_many(const phx__checkpoints *c) {
  const int64_t most = c->rt->config->s.checkpoint.max_failures;
  return most > 0 && c->failures >= most;
}

static void tell_failure(phx__checkpoints *c, int64_t step, const phx_error *why) {
  c->totals.failed++;
  c->failures++;
  c->why = *why;
  say(c, PHX_LOG_WARN, "step %" PRId64 " was not saved: %s; %s%s", step, why->message,
      too_many(c) ? "" : "training goes on, and ",
      c->saved ? "the checkpoint before stays the newest" : "there is no checkpoint yet");
}

phx_status phx__checkpoints_given_up(const phx__checkpoints *c, phx_error *err) {
  char newest[64] = "there is no checkpoint";
  if (!too_many(c)) return PHX_OK;
  if (c->saved) snprintf(newest, sizeof newest, "the newest checkpoint is of step %" PRId64, c->saved);
  return phx_fail(err, PHX_IO,
                  "%" PRId64 " saves in a row failed (checkpoint.max_failures), the last with: %.250s; %s: make room, "
                  "and go on from it with --resume",
                  c->failures, c->why.message, newest);
}

/* What became of the save in flight: a failure is no reason to stop, but ranks that cannot meet are. */
static phx_status ended(phx__checkpoints *c, phx_status status, const phx__save_report *r, const phx_error *why,
                        phx_error *err) {
  if (status == PHX_COMM) return phx_fail(err, status, "%s", why->message);
  if (status) {
    tell_failure(c, c->at.step, why);
    return PHX_OK;
  }
  c->saved = c->at.step;
  tell(c, r, true);
  return PHX_OK;
}

/* ---- saving ---- */
phx_status phx__checkpoints_meet(phx__checkpoints *c, int *stop, phx_error *err) {
  const phx__runtime *rt = c->rt;
  const bool busy = c->saver && phx__saver_busy(c->saver);
  int64_t both[2] = {phx__stop_asked(), busy && !phx__saver_ready(c->saver)};
  PHX_TRY(rt->core->all_reduce(rt->core->ctx, both, both, 2, PHX_I64, PHX_MAX, NULL, err));
  *stop = (int)both[0];
  if (!busy || both[1]) return PHX_OK;
  phx_error why = PHX_ERROR_INIT;
  phx__save_report report;
  bool over = false;
  phx_status status = phx__saver_advance(c->saver, &over, &report, &why);
  return over ? ended(c, status, &report, &why, err) : PHX_OK;
}

static phx_status finish(phx__checkpoints *c, phx_error *err) {
  phx_error why = PHX_ERROR_INIT;
  phx__save_report report;
  if (!c->saver || !phx__saver_busy(c->saver)) return PHX_OK;
  const phx_status status = phx__saver_finish(c->saver, &report, &why);
  return ended(c, status, &report, &why, err);
}

/* One in the background is committed between two later steps: the step has its line by then. */
static phx_status save_now(phx__checkpoints *c, phx_error *err) {
  phx__progress_line(c->progress);
  const double begin = phx__now();
  phx__save_report r = {.step = c->at.step};
  const phx_status status = phx__checkpoint_save(c->rt, c->rt->config->s.run.out, &c->at, &c->retention, &r.bytes, err);
  phx__job_heartbeat(c->rt->job);
  if (status) return status;
  c->saved = c->at.step;
  r.stall = r.seconds = r.waits = phx__now() - begin;
  tell(c, &r, false);
  return PHX_OK;
}

phx_status phx__checkpoints_save(phx__checkpoints *c, const phx__position *at, bool last, phx_error *err) {
  phx_error why = PHX_ERROR_INIT;
  if (!last && c->saver && phx__saver_busy(c->saver))
    say(c, PHX_LOG_INFO, "step %" PRId64 " waits: step %" PRId64 " is still being saved", at->step, c->at.step);
  phx_status status = finish(c, err);
  if (status || at->step == c->saved) return status;
  c->at = *at;
  status = c->saver && !last ? phx__saver_begin(c->saver, at, &why) : save_now(c, &why);
  if (!status) return PHX_OK;
  if (last || status == PHX_COMM) return phx_fail(err, status, "%s", why.message);
  tell_failure(c, at->step, &why);
  return PHX_OK;
}
