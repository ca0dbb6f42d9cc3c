/* core/command/progress.c - see progress.h.  Losses are written with 17 digits: enough to tell any two doubles
 * apart. */
#include "command/progress.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/bytes_text.h"
#include "base/clock.h"
#include "base/output.h"
#include "base/screen.h"
#include "base/status.h"

bool phx__progress_add(phx__progress *p, const char *members) {
  const size_t used = strlen(p->extra), more = strlen(members);
  if (more >= sizeof p->extra - used) return false;
  memcpy(p->extra + used, members, more + 1);
  return true;
}

/* What waits for a step that does not come. */
static void write_rest(phx__progress *p) {
  char line[PHX__METRICS_LINE];
  if (!p->mine || !p->extra[0]) return;
  const int n = snprintf(line, sizeof line, "{\"after_step\":%" PRId64 "%s}\n", p->last, p->extra);
  phx__metrics_line(&p->metrics, line, (size_t)n, p->last);
  p->extra[0] = 0;
  p->holds_save = false;
}

void phx__progress_save(phx__progress *p, const char *members) {
  if (p->holds_save) write_rest(p);
  if (!phx__progress_add(p, members)) { /* plugins' metrics take all of the room */
    write_rest(p);
    phx__progress_add(p, members);
  }
  p->holds_save = true;
}

static void keep_metric(void *arg, const char *plugin, const char *name, double value) {
  phx__progress *p = arg;
  char both[256], quoted[600], number[32] = "null", member[700]; /* JSON has no NaN and no infinity */
  if (isfinite(value)) snprintf(number, sizeof number, "%.17g", value);
  const bool whole = snprintf(both, sizeof both, "%s.%s", plugin, name) < (int)sizeof both &&
                     phx__json_quote(both, quoted, sizeof quoted) > 0 &&
                     snprintf(member, sizeof member, ",%s:%s", quoted, number) < (int)sizeof member;
  if ((whole && phx__progress_add(p, member)) || p->left_out) return;
  p->left_out = true;
  snprintf(member, sizeof member,
           "metric %.200s is left out of metrics.jsonl: a name has %zu bytes at most, all of a step %zu; others may "
           "follow", name, sizeof both - 1, sizeof p->extra - 1);
  phx__log(0, plugin, PHX_LOG_WARN, member);
}

phx_status phx__progress_open(phx__progress *p, phx__runtime *rt, int64_t first, phx_error *err) {
  char path[4200];
  *p = (phx__progress){.rt = rt, .first = first, .last = first, .step = first, .started = phx__now()};
  p->tokens_per_step = rt->prepared->shape.micro * rt->prepared->shape.sequence * rt->prepared->topology.accumulate *
                       rt->prepared->layout.data_size;
  if (rt->job->rank != 0) return PHX_OK;
  phx__host *const hosts[] = {&rt->strategy_host, &rt->optimizer_host, &rt->model_host, &rt->comm_host,
                              &rt->device_host};
  for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
    hosts[i]->metric = keep_metric;
    hosts[i]->metric_arg = p;
  }
  p->mine = true;
  p->bar = phx__screen_has_bar();
  snprintf(path, sizeof path, "%s/metrics.jsonl", rt->config->s.run.out);
  return phx__metrics_open(&p->metrics, path, first, err);
}

static void say(const phx__progress *p, double valid_loss) {
  const phx__step_result *r = &p->done;
  const int64_t step = p->step, steps = p->rt->config->s.run.steps;
  phx__screen_line l = {.step = step, .steps = steps, .loss = r->loss, .norm = r->grad_norm, .lr = r->lr,
                        .seconds = p->seconds, .rate = (double)p->tokens_per_step / p->seconds};
  phx__bytes_text(p->rt->book.now_all, l.memory);
  l.left = (phx__now() - p->started) / (double)(step - p->first) * (double)(steps - step);
  if (isfinite(valid_loss)) snprintf(l.note, sizeof l.note, "held-out %.4f", valid_loss);
  else if (!isnan(valid_loss)) snprintf(l.note, sizeof l.note, "held-out not finite");
  if (r->skipped) snprintf(l.note, sizeof l.note, "not finite: skipped");
  phx__screen_draw(&l, p->bar, l.note[0] || step == steps);
}

/* ---- a line of metrics.jsonl ---- */
typedef struct line {
  char text[PHX__METRICS_LINE]; /* every part is bounded, and extra is half of it: it always fits */
  size_t n;
} line;

static void put(line *l, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(line *l, const char *format, ...) {
  va_list args;
  va_start(args, format);
  const int n = vsnprintf(l->text + l->n, sizeof l->text - l->n, format, args);
  va_end(args);
  l->n += (size_t)n;
}

/* JSON has no infinity. */
static void put_real(line *l, const char *name, double value) {
  if (isfinite(value)) put(l, ",\"%s\":%.17g", name, value);
  else put(l, ",\"%s\":null", name);
}

static void end_line(phx__progress *p, line *l) {
  put(l, "%s}\n", p->extra);
  phx__metrics_line(&p->metrics, l->text, l->n, p->step);
  p->extra[0] = 0;
  p->holds_save = false;
  p->last = p->step;
}

static void put_step(const phx__progress *p, line *l) {
  const phx__step_result *r = &p->done;
  put(l, "{\"step\":%" PRId64, p->step);
  put_real(l, "loss", r->loss);
  put_real(l, "grad_norm", r->grad_norm);
  put(l, ",\"lr\":%.17g,\"tokens_per_s\":%.6g,\"step_ms\":%.6g,\"bytes\":{", r->lr,
      (double)p->tokens_per_step / p->seconds, 1e3 * p->seconds);
  for (int32_t k = 0; k < PHX_MEM_KINDS; k++)
    put(l, "%s\"%s\":%" PRId64, k ? "," : "", phx__memory_name(k), p->rt->book.now[k]);
  put(l, "},\"bytes_sent\":%" PRId64, p->bytes_sent);
  if (r->skipped) put(l, ",\"skipped\":true");
}

void phx__progress_done(phx__progress *p, int64_t step, const phx__step_result *r, double seconds, int64_t bytes_sent) {
  p->step = step;
  p->done = *r;
  p->seconds = seconds;
  p->bytes_sent = bytes_sent;
}

void phx__progress_line(phx__progress *p) {
  line l = {.n = 0};
  if (!p->mine || p->last == p->step) return;
  put_step(p, &l);
  end_line(p, &l);
}

void phx__progress_tell(phx__progress *p, double valid_loss, const char *hash) {
  const phx__settings *s = &p->rt->config->s;
  const bool behind = p->last == p->step; /* the step has its line */
  line l = {.n = 0};
  if (!p->mine) return;
  if (behind) put(&l, "{\"after_step\":%" PRId64, p->step);
  else put_step(p, &l);
  if (!isnan(valid_loss)) put_real(&l, "valid_loss", valid_loss);
  if (hash) put(&l, ",\"state_hash\":\"%s\"", hash);
  if (!behind || !isnan(valid_loss) || hash) end_line(p, &l);
  if (p->step == p->first) return; /* of a run before: its numbers are not known here */
  if (p->step == p->first + 1 || p->step % s->run.log_every == 0 || p->step == s->run.steps || !isnan(valid_loss) ||
      p->done.skipped)
    say(p, valid_loss);
}

phx_status phx__progress_flush(phx__progress *p, phx_error *err) {
  write_rest(p);
  return p->mine ? phx__metrics_flush(&p->metrics, err) : PHX_OK;
}

void phx__progress_close(phx__progress *p) {
  phx_error why = PHX_ERROR_INIT;
  phx__screen_end();
  if (phx__progress_flush(p, &why)) phx__log(0, "core", PHX_LOG_WARN, why.message);
  phx__metrics_close(&p->metrics);
  p->mine = false;
}
